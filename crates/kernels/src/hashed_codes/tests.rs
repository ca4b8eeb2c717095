//! Codes and their gradients against every distance laid out.

use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{DType, Device, Var};

fn hash(heads: usize, [anchors, bits, width]: [usize; 3], fitted: bool, dtype: DType) -> CodeHash {
    let bandwidths = arange(&[heads], 6.0, dtype).abs().unwrap();
    CodeHash {
        anchors: (arange(&[heads, anchors, width], 3.0, dtype) * 0.4).unwrap(),
        means: (arange(&[heads, anchors], 4.0, dtype).abs().unwrap() * 0.3).unwrap(),
        hashes: arange(&[heads, bits, anchors], 5.0, dtype),
        bandwidths: fitted.then(|| (bandwidths + 0.5).unwrap()),
    }
}

/// 1 but for every third token.
fn kept(batch: usize, length: usize, dtype: DType) -> Tensor {
    let kept: Vec<f64> = (0..batch * length)
        .map(|token| if token % 3 == 1 { 0.0 } else { 1.0 })
        .collect();
    let kept = Tensor::from_vec(kept, (batch, 1, length, 1), &Device::Cpu).unwrap();
    kept.to_dtype(dtype).unwrap()
}

/// Vectors as heads have them, side by side in a row of a token.
fn vectors(dims: [usize; 4], dtype: DType) -> Tensor {
    let [batch, heads, length, width] = dims;
    let x = arange(&[batch, length, heads, width], 1.0, dtype);
    x.transpose(1, 2).unwrap()
}

const SIZES: [([usize; 4], [usize; 2]); 4] = [
    ([2, 3, 70, 5], [7, 4]),
    ([1, 2, 130, 24], [25, 16]),
    ([2, 1, 1, 3], [1, 1]),
    ([1, 2, 64, 8], [16, 33]),
];

/// Every case: sizes, whether tokens are left out, whether bandwidths are given.
fn cases(of: impl Fn([usize; 4], [usize; 3], bool, bool)) {
    for (dims, [anchors, bits]) in SIZES {
        for masked in [false, true] {
            for fitted in [false, true] {
                of(dims, [anchors, bits, dims[3]], masked, fitted);
            }
        }
    }
}

#[test]
fn equal_the_signs_of_arguments_laid_out() {
    cases(|dims, sizes, masked, fitted| {
        compare(0.0, |dtype| {
            let x = vectors(dims, dtype);
            let hash = hash(dims[1], sizes, fitted, dtype);
            let kept = masked.then(|| kept(dims[0], dims[2], dtype));
            let codes = hashed_codes(&x, kept.as_ref(), &hash).unwrap();
            (
                codes,
                naive::hashed_codes(&x, kept.as_ref(), &hash).unwrap(),
            )
        });
    });
}

#[test]
fn features_hold_codes_and_a_constant() {
    cases(|dims, sizes, masked, fitted| {
        let x = vectors(dims, DType::F64);
        let hash = hash(dims[1], sizes, fitted, DType::F64);
        let kept = masked.then(|| kept(dims[0], dims[2], DType::F64));
        let found = hashed_features(&x, kept.as_ref(), &hash, 7.5).unwrap();
        let expected = naive::hashed_features(&x, kept.as_ref(), &hash, 7.5).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert!(difference(found, expected).unwrap() == 0.0);
        }
    });
}

/// The gradient of `x` through `of`, contracted with irregular numbers and `decided`.
fn slopes(x: &Tensor, decided: &Tensor, of: impl Fn(&Tensor) -> Vec<Tensor>) -> Tensor {
    let x = Var::from_tensor(x).unwrap();
    let mut loss = Tensor::zeros((), x.dtype(), x.device()).unwrap();
    for (result, phase) in of(x.as_tensor()).iter().zip([8.0, 9.0]) {
        let codes = result.narrow(3, 0, decided.dim(3).unwrap()).unwrap();
        let weights = (arange(codes.dims(), phase, x.dtype()) * decided).unwrap();
        loss = (loss + (codes * weights).unwrap().sum_all().unwrap()).unwrap();
    }
    let gradients = loss.backward().unwrap();
    gradients.get(x.as_tensor()).unwrap().clone()
}

/// 0 where rounding could decide whether a gradient passes, 1 elsewhere.
fn decided(x: &Tensor, kept: Option<&Tensor>, hash: &CodeHash) -> Tensor {
    let arguments = naive::hash_arguments(x, kept, hash).unwrap();
    let apart = (arguments.abs().unwrap() - 1.0).unwrap().abs().unwrap();
    let decided = apart.gt(1e-3).unwrap().to_dtype(x.dtype()).unwrap();
    // What is compared is nearly all of them.
    let share = decided.mean_all().unwrap().to_dtype(DType::F64).unwrap();
    assert!(share.to_scalar::<f64>().unwrap() > 0.98);
    decided
}

#[test]
fn gradients_equal_those_of_the_composition() {
    cases(|dims, sizes, masked, fitted| {
        compare(2e-4, |dtype| {
            let x = vectors(dims, dtype);
            let hash = hash(dims[1], sizes, fitted, dtype);
            let kept = masked.then(|| kept(dims[0], dims[2], dtype));
            let kept = kept.as_ref();
            let decided = decided(&x, kept, &hash);
            let found = slopes(&x, &decided, |x| {
                vec![hashed_codes(x, kept, &hash).unwrap()]
            });
            let plain = slopes(&x, &decided, |x| {
                vec![naive::hashed_codes(x, kept, &hash).unwrap()]
            });
            (found, plain)
        });
        compare(2e-4, |dtype| {
            let x = vectors(dims, dtype);
            let hash = hash(dims[1], sizes, fitted, dtype);
            let kept = masked.then(|| kept(dims[0], dims[2], dtype));
            let kept = kept.as_ref();
            let decided = decided(&x, kept, &hash);
            let found = slopes(&x, &decided, |x| {
                hashed_features(x, kept, &hash, 3.0).unwrap().to_vec()
            });
            let plain = slopes(&x, &decided, |x| {
                let both = naive::hashed_features(x, kept, &hash, 3.0);
                both.unwrap().to_vec()
            });
            (found, plain)
        });
    });
}

/// What the composition's gradient is compared with is right itself.
#[test]
fn gradients_of_arguments_equal_finite_differences() {
    for fitted in [false, true] {
        let x = arange(&[2, 2, 5, 3], 1.0, DType::F64);
        let hash = hash(2, [4, 3, 3], fitted, DType::F64);
        let kept = kept(2, 5, DType::F64);
        let arguments = |x: &[Tensor]| naive::hash_arguments(&x[0], Some(&kept), &hash);
        assert!(gradient_error(arguments, &[x]).unwrap() < 1e-6);
    }
}

/// Vectors of no length are hashed as such, and have a gradient that is a number.
#[test]
fn vectors_of_zeros_are_hashed() {
    let x = Tensor::zeros((1, 1, 3, 4), DType::F64, &Device::Cpu).unwrap();
    let hash = hash(1, [5, 3, 4], false, DType::F64);
    let codes = hashed_codes(&x, None, &hash).unwrap();
    let expected = naive::hashed_codes(&x, None, &hash).unwrap();
    assert!(difference(&codes, &expected).unwrap() == 0.0);
    let all = codes.ones_like().unwrap();
    let found = slopes(&x, &all, |x| vec![hashed_codes(x, None, &hash).unwrap()]);
    let plain = slopes(&x, &all, |x| {
        vec![naive::hashed_codes(x, None, &hash).unwrap()]
    });
    let scale = plain.abs().unwrap().max_all().unwrap();
    let scale = scale.to_scalar::<f64>().unwrap();
    assert!(scale.is_finite());
    assert!(difference(&found, &plain).unwrap() <= 1e-10 * scale);
}

#[test]
fn do_not_depend_on_the_number_of_threads() {
    let x = vectors([2, 3, 300, 24], DType::F32);
    let hash = hash(3, [25, 16, 24], false, DType::F32);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let codes = hashed_codes(&x, None, &hash).unwrap();
            let all = codes.ones_like().unwrap();
            let slopes = slopes(&x, &all, |x| vec![hashed_codes(x, None, &hash).unwrap()]);
            (codes, slopes)
        })
    };
    let one = with(1);
    for threads in [2, 5] {
        let (codes, slopes) = with(threads);
        assert!(difference(&codes, &one.0).unwrap() == 0.0);
        assert!(difference(&slopes, &one.1).unwrap() == 0.0);
    }
}

#[test]
fn wrong_shapes_are_named() {
    let x = vectors([2, 3, 4, 5], DType::F32);
    let right = hash(3, [7, 4, 5], true, DType::F32);
    assert!(hashed_codes(&x, None, &right).is_ok());
    let refused = |hash: &CodeHash, kept: Option<&Tensor>| {
        let error = hashed_codes(&x, kept, hash).unwrap_err();
        error.to_string()
    };
    let of = |dims: &[usize]| arange(dims, 1.0, DType::F32);
    let with = |change: &dyn Fn(&mut CodeHash)| {
        let mut hash = right.clone();
        change(&mut hash);
        refused(&hash, None)
    };
    let said = with(&|hash| hash.anchors = of(&[3, 7, 6]));
    assert!(said.contains("anchors is [3, 7, 6]"), "{said}");
    assert!(said.contains("[3, 7, 5]"), "{said}");
    assert!(with(&|hash| hash.means = of(&[3, 6])).contains("means"));
    assert!(with(&|hash| hash.hashes = of(&[3, 4, 6])).contains("hashes"));
    assert!(with(&|hash| hash.hashes = of(&[3, 0, 7])).contains("one bit"));
    assert!(with(&|hash| hash.bandwidths = Some(of(&[2]))).contains("bandwidths"));
    assert!(refused(&right, Some(&of(&[2, 1, 5, 1]))).contains("kept"));
}
