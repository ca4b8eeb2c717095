//! Against pads multiplied by zero and plain products.

use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{Device, IndexOp, Var};

const HEADS: usize = 3;

/// Two sequences whose heads lie side by side, and a matrix with more columns than there are positions.
fn given([length, slots, width, matrices]: [usize; 4], dtype: DType) -> [Tensor; 2] {
    let x = arange(&[2, length, HEADS, width], 1.0, dtype);
    let matrix = arange(&[matrices, slots, length + 3], 2.0, dtype);
    [
        x.transpose(1, 2).unwrap(),
        matrix.narrow(2, 0, length).unwrap(),
    ]
}

/// Pads behind the first sequence; here and there and for whole blocks in the second.
fn kept(length: usize) -> Tensor {
    let first = (0..length).map(|at| u8::from(at < length.div_ceil(2)));
    let second = (0..length).map(|at| u8::from(at % 7 != 3 && at / BLOCK % 3 != 1));
    let both: Vec<u8> = first.chain(second).collect();
    Tensor::from_vec(both, (2, length), &Device::Cpu).unwrap()
}

fn gradients(
    function: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    [x, matrix]: &[Tensor; 2],
) -> [Tensor; 2] {
    let variables = [x, matrix].map(|x| Var::from_tensor(x).unwrap());
    let [x, matrix] = &variables;
    let y = function(x.as_tensor(), matrix.as_tensor()).unwrap();
    let slopes = arange(y.dims(), 5.0, y.dtype());
    let all = (y * slopes).unwrap().sum_all().unwrap().backward().unwrap();
    [x, matrix].map(|x| all.get(x).unwrap().clone())
}

#[test]
fn equals_the_composition() {
    for length in [1, 5, BLOCK, 3 * BLOCK + 37] {
        for (slots, width, matrices) in [(1, 1, 1), (9, 17, HEADS), (33, 20, 1)] {
            for kept in [None, Some(kept(length))] {
                compare(1e-5, |dtype| {
                    let [x, matrix] = given([length, slots, width, matrices], dtype);
                    (
                        sequence_projection(&x, &matrix, kept.as_ref()).unwrap(),
                        naive::sequence_projection(&x, &matrix, kept.as_ref()).unwrap(),
                    )
                });
            }
        }
    }
}

#[test]
fn gradients_equal_those_of_the_composition() {
    for length in [1, BLOCK, 3 * BLOCK + 37] {
        for matrices in [1, HEADS] {
            for kept in [None, Some(kept(length))] {
                for index in 0..2 {
                    compare(1e-5, |dtype| {
                        let given = given([length, 18, 17, matrices], dtype);
                        let kept = kept.as_ref();
                        let ours = gradients(|x, e| sequence_projection(x, e, kept), &given);
                        let plain =
                            gradients(|x, e| naive::sequence_projection(x, e, kept), &given);
                        (ours[index].clone(), plain[index].clone())
                    });
                }
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for matrices in [1, HEADS] {
        let inputs = given([11, 3, 2, matrices], DType::F64);
        for kept in [None, Some(kept(11))] {
            let f = |x: &[Tensor]| sequence_projection(&x[0], &x[1], kept.as_ref());
            let error = gradient_error(f, &inputs).unwrap();
            assert!(error < 1e-8, "{error:e}");
        }
    }
}

#[test]
fn what_pads_hold_is_never_read() {
    let length = 2 * BLOCK + 9;
    let [x, matrix] = given([length, 20, 17, 1], DType::F32);
    let (x, kept) = (x.contiguous().unwrap(), kept(length));
    let shape = (2, 1, length, 1);
    let here = kept
        .reshape(shape)
        .unwrap()
        .broadcast_as(x.shape())
        .unwrap();
    let nothing = Tensor::full(f32::NAN, x.shape(), x.device()).unwrap();
    let holes = here.where_cond(&x, &nothing).unwrap();
    let of = |x: &Tensor, e: &Tensor| sequence_projection(x, e, Some(&kept));
    let expected = of(&x, &matrix).unwrap();
    assert_eq!(
        difference(&of(&holes, &matrix).unwrap(), &expected).unwrap(),
        0.0
    );
    let found = gradients(of, &[holes, matrix.clone()]);
    let expected = gradients(of, &[x, matrix]);
    for (found, expected) in found.iter().zip(&expected) {
        assert!(difference(found, expected).unwrap() == 0.0);
    }
    // Sequences of pads alone.
    let none = kept.zeros_like().unwrap();
    let x = Tensor::full(f32::NAN, (2, HEADS, length, 4), &Device::Cpu).unwrap();
    let e = arange(&[1, 6, length], 1.0, DType::F32);
    let y = sequence_projection(&x, &e, Some(&none)).unwrap();
    assert_eq!(difference(&y, &y.zeros_like().unwrap()).unwrap(), 0.0);
}

#[test]
fn pieces_have_no_pads_at_their_ends() {
    let mut kept = vec![1u8; 3 * BLOCK];
    kept[0] = 0;
    kept[2 * BLOCK + 5] = 0;
    kept[3 * BLOCK - 1] = 0;
    let found = pieces(&kept);
    assert_eq!(found.len(), 2);
    assert_eq!(
        found[0],
        Piece {
            range: 1..2 * BLOCK,
            kept: None
        }
    );
    assert_eq!(found[1].range, 2 * BLOCK..3 * BLOCK - 1);
    let inside = found[1].within(&(2 * BLOCK + 4..2 * BLOCK + 7)).unwrap();
    assert_eq!(inside.kept, Some(vec![1, 0, 1]));
    assert_eq!(found[0].within(&(2 * BLOCK..3 * BLOCK)), None);
    assert!(pieces(&[0; 10]).is_empty() && pieces(&[]).is_empty());
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    let length = 2 * BLOCK + 50;
    let kept = kept(length);
    for (dtype, threads) in [(DType::F32, 2), (DType::F32, 5), (DType::F64, 2)] {
        let given = given([length, 40, 33, 1], dtype);
        for kept in [None, Some(&kept)] {
            let with = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let run = || {
                    let [x, e] = &given;
                    let y = sequence_projection(x, e, kept).unwrap();
                    let [of_x, of_e] = gradients(|x, e| sequence_projection(x, e, kept), &given);
                    [y, of_x, of_e]
                };
                pool.build().unwrap().install(run)
            };
            for (found, expected) in with(threads).iter().zip(&with(1)) {
                assert_eq!(difference(found, expected).unwrap(), 0.0);
            }
        }
    }
}

#[test]
fn nothing_is_projected_to_zeros() {
    let e = arange(&[1, 4, 0], 1.0, DType::F32);
    let x = arange(&[2, 3, 0, 5], 1.0, DType::F32);
    let y = sequence_projection(&x, &e, None).unwrap();
    assert_eq!(y.dims(), [2, 3, 4, 5]);
    assert_eq!(
        y.i((0, 0)).unwrap().to_vec2::<f32>().unwrap(),
        [[0.0; 5]; 4]
    );
    for (slots, width) in [(0, 5), (4, 0)] {
        let [x, e] = given([6, slots, width, 1], DType::F32);
        let y = sequence_projection(&x, &e, None).unwrap();
        assert_eq!(y.dims(), [2, HEADS, slots, width]);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let [x, e] = given([6, 4, 5, 1], DType::F32);
    let refused = |e: &Tensor, kept: Option<&Tensor>| {
        sequence_projection(&x, e, kept).unwrap_err().to_string()
    };
    let two = arange(&[2, 4, 6], 1.0, DType::F32);
    let short = e.narrow(2, 0, 5).unwrap();
    for e in [&two, &short, &e.squeeze(0).unwrap()] {
        assert!(refused(e, None).contains("matrix"));
    }
    assert!(refused(&e, Some(&kept(5))).contains("kept"));
}
