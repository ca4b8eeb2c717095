//! SOFT's attention against its formula laid out by hand, and its inverse against eigenvalues and
//! differences.
#![allow(clippy::needless_range_loop, clippy::panic, clippy::unwrap_used)]

use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, mask, spec,
};
use crate::common::{
    Map, assert_near, contracted, difference, gradient_error, is_finite, random, tensor, values,
};
use lapidary_kernels::{Activation, DType, Device, Tensor, Var, activate};
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::soft::{
    Landmarks, SoftSpec, newton_inverse, regularised_inverse,
};
use lapidary_parts::attention::{MultiHeadSpec, QueryKeySharing};

type Rows = Vec<Vec<f64>>;

fn subject(soft: &SoftSpec) -> Subject {
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..spec(MechanismSpec::Soft(soft.clone()), false)
    };
    Subject::new(spec, 4)
}

/// With enough steps that the inverse is one.
fn plain(landmarks: Landmarks) -> SoftSpec {
    SoftSpec {
        steps: 60,
        ..SoftSpec::new(landmarks)
    }
}

fn specs() -> Vec<SoftSpec> {
    let convolution = plain(Landmarks::Convolution { ratio: 3 });
    let mean = plain(Landmarks::Mean { ratio: 2 });
    let segments = plain(Landmarks::Segments { count: 4 });
    let mut all = Vec::new();
    for normalised in [true, false] {
        for (columns, local) in [
            (None, None),
            (None, Some(5)),
            (Some(4), Some(3)),
            (Some(5), None),
        ] {
            for of in [&convolution, &mean, &segments] {
                all.push(SoftSpec {
                    columns,
                    local,
                    normalised,
                    ..of.clone()
                });
            }
        }
    }
    all
}

fn transposed(a: &Rows) -> Rows {
    (0..a[0].len())
        .map(|j| a.iter().map(|row| row[j]).collect())
        .collect()
}

fn times(a: &Rows, b: &Rows) -> Rows {
    let columns = transposed(b);
    a.iter()
        .map(|row| columns.iter().map(|column| dot(row, column)).collect())
        .collect()
}

/// By elimination with pivots.
fn inverse(a: &Rows) -> Rows {
    let size = a.len();
    let mut rows: Rows = a
        .iter()
        .enumerate()
        .map(|(i, row)| {
            let unit = (0..size).map(|j| f64::from(u8::from(i == j)));
            row.iter().copied().chain(unit).collect()
        })
        .collect();
    for column in 0..size {
        let pivot = (column..size)
            .max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()))
            .unwrap();
        rows.swap(column, pivot);
        let by = rows[column][column];
        rows[column].iter_mut().for_each(|x| *x /= by);
        let pivot = rows[column].clone();
        for (i, row) in rows.iter_mut().enumerate() {
            if i != column {
                let share = row[column];
                row.iter_mut()
                    .zip(&pivot)
                    .for_each(|(x, p)| *x -= share * p);
            }
        }
    }
    rows.into_iter().map(|row| row[size..].to_vec()).collect()
}

fn kernel(a: &[f64], b: &[f64]) -> f64 {
    let squares: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (-squares / 2.0).exp()
}

/// The tokens of each window, by place; nothing where there is none.
fn windows(soft: &SoftSpec, ratio: usize, keep: &[bool]) -> Vec<Vec<Option<usize>>> {
    let length = keep.len();
    let columns = soft.columns.unwrap_or(length);
    let [high, wide] = if soft.columns.is_some() {
        [ratio; 2]
    } else {
        [1, ratio]
    };
    let mut all = Vec::new();
    for top in (0..length.div_ceil(columns)).step_by(high) {
        for left in (0..columns).step_by(wide) {
            let mut window = Vec::new();
            for row in top..top + high {
                for column in left..left + wide {
                    let token = row * columns + column;
                    let there = column < columns && token < length && keep[token];
                    window.push(there.then_some(token));
                }
            }
            all.push(window);
        }
    }
    all.retain(|window| window.iter().any(Option::is_some));
    all
}

fn landmarks(soft: &SoftSpec, map: &Map, q: &Rows, keep: &[bool]) -> Rows {
    let mean = |tokens: &[usize]| -> Vec<f64> {
        let count = tokens.len() as f64;
        (0..HEAD_WIDTH)
            .map(|f| tokens.iter().map(|&t| q[t][f]).sum::<f64>() / count)
            .collect()
    };
    match soft.landmarks {
        Landmarks::Segments { count } => {
            let real: Vec<usize> = (0..keep.len()).filter(|&t| keep[t]).collect();
            let parts = count.min(real.len());
            let mut all = vec![Vec::new(); parts];
            for (at, &token) in real.iter().enumerate() {
                all[at * parts / real.len()].push(token);
            }
            all.iter().map(|tokens| mean(tokens)).collect()
        }
        Landmarks::Mean { ratio } => windows(soft, ratio, keep)
            .iter()
            .map(|window| mean(&window.iter().copied().flatten().collect::<Vec<_>>()))
            .collect(),
        Landmarks::Convolution { ratio } => {
            let weight = values(&map["mechanism.landmarks.weight"]);
            let scale = values(&map["mechanism.landmarks.norm.weight"]);
            let shift = values(&map["mechanism.landmarks.norm.bias"]);
            let one = |window: &Vec<Option<usize>>| -> Vec<f64> {
                let places = window.len();
                let mapped: Vec<f64> = (0..HEAD_WIDTH)
                    .map(|output| {
                        let mut sum = 0.0;
                        for (place, token) in window.iter().enumerate() {
                            for input in 0..HEAD_WIDTH {
                                let entry = weight[(output * HEAD_WIDTH + input) * places + place];
                                sum += token.map_or(0.0, |t| q[t][input] * entry);
                            }
                        }
                        sum
                    })
                    .collect();
                let mean = mapped.iter().sum::<f64>() / HEAD_WIDTH as f64;
                let squares = mapped.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
                let deviation = (squares / HEAD_WIDTH as f64 + 1e-5).sqrt();
                let normed: Vec<f64> = (0..HEAD_WIDTH)
                    .map(|f| (mapped[f] - mean) / deviation * scale[f] + shift[f])
                    .collect();
                let normed = tensor(normed, &[HEAD_WIDTH]);
                values(&activate(&normed, Activation::Gelu).unwrap())
            };
            windows(soft, ratio, keep).iter().map(one).collect()
        }
    }
}

/// The weights of one head.
fn expected(soft: &SoftSpec, map: &Map, run: &Run, [b, head]: [usize; 2], keep: &[bool]) -> Rows {
    let root = (1.0 / (HEAD_WIDTH as f64).sqrt()).sqrt();
    let length = run.length;
    let q: Rows = (0..length)
        .map(|t| run.query(b, head, t).iter().map(|x| root * x).collect())
        .collect();
    let points = landmarks(soft, map, &q, keep);
    let inner: Rows = points
        .iter()
        .map(|a| points.iter().map(|b| kernel(a, b)).collect())
        .collect();
    let mut raised = inner.clone();
    for (i, row) in raised.iter_mut().enumerate() {
        row[i] += soft.epsilon;
    }
    let mut middle = inverse(&raised);
    if soft.normalised {
        let degrees: Vec<f64> = inner.iter().map(|row| row.iter().sum::<f64>()).collect();
        for (i, row) in middle.iter_mut().enumerate() {
            for (j, entry) in row.iter_mut().enumerate() {
                *entry /= (degrees[i] * degrees[j]).sqrt();
            }
        }
    }
    let rows: Rows = (0..length)
        .map(|t| {
            let seen = f64::from(u8::from(keep[t]));
            points.iter().map(|p| seen * kernel(&q[t], p)).collect()
        })
        .collect();
    let mut weights = times(&times(&rows, &middle), &transposed(&rows));
    if let Some(side) = soft.local {
        let filters = values(&map["mechanism.local"]);
        let columns = soft.columns.unwrap_or(length) as isize;
        let half = side as isize / 2;
        let down = if soft.columns.is_some() { half } else { 0 };
        for (i, row) in weights.iter_mut().enumerate() {
            let (y, x) = (i as isize / columns, i as isize % columns);
            let mut tap = head * if down == 0 { side } else { side * side };
            for dy in -down..=down {
                for dx in -half..=half {
                    let j = (y + dy) * columns + x + dx;
                    let inside =
                        (0..columns).contains(&(x + dx)) && (0..length as isize).contains(&j);
                    if inside && keep[j as usize] {
                        row[j as usize] += filters[tap];
                    }
                    tap += 1;
                }
            }
        }
    }
    weights
}

#[test]
fn equals_the_formula_laid_out() {
    for length in [1, 8, 13] {
        let x = random(&[2, length, WIDTH], 1);
        for soft in specs() {
            let subject = subject(&soft);
            let run = subject.run(&x, Given::default());
            let keep = vec![true; length];
            let of = |b, head| expected(&soft, &subject.map, &run, [b, head], &keep);
            let all: Vec<Vec<Rows>> = (0..2)
                .map(|b| (0..HEADS).map(|h| of(b, h)).collect())
                .collect();
            let row = |b: usize, head: usize, i: usize| all[b][head][i].clone();
            run.check(2, row, 1e-8, &format!("{soft:?} at {length}"));
        }
    }
}

#[test]
fn pads_have_no_row_and_are_in_no_landmark() {
    let keep = [1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0];
    let bits = mask(&[&keep]);
    let keep = keep.map(|keep| keep == 1);
    let x = random(&[1, 12, WIDTH], 1);
    for soft in specs() {
        let subject = subject(&soft);
        let given = Given {
            keep: Some(&bits),
            ..Given::default()
        };
        let run = subject.run(&x, given);
        let of = |head| expected(&soft, &subject.map, &run, [0, head], &keep);
        let all: Vec<Rows> = (0..HEADS).map(of).collect();
        run.check(
            1,
            |_, head, i| all[head][i].clone(),
            1e-8,
            &format!("{soft:?}"),
        );
        for head in 0..HEADS {
            for j in (0..12).filter(|&j| !keep[j]) {
                assert!((0..12).all(|i| run.weight(0, head, i, j) == 0.0));
            }
        }
    }
}

/// `A_ij = f(i xor j)`, whose eigenvectors are Hadamard's, and its eigenvalues.
fn with_known_eigenvalues(size: usize) -> (Tensor, Vec<f64>) {
    let f: Vec<f64> = (0..size)
        .map(|i| {
            if i == 0 {
                1.0
            } else {
                0.05 + 0.3 / (1 + i * i % 11) as f64
            }
        })
        .collect();
    let entries = (0..size * size)
        .map(|at| f[(at / size) ^ (at % size)])
        .collect();
    let eigenvalue = |u: usize| (0..size).map(|i| hadamard(u, i) * f[i]).sum();
    (
        tensor(entries, &[1, 1, size, size]),
        (0..size).map(eigenvalue).collect(),
    )
}

fn hadamard(i: usize, j: usize) -> f64 {
    match (i & j).count_ones() % 2 {
        0 => 1.0,
        _ => -1.0,
    }
}

#[test]
fn newtons_steps_filter_eigenvalues() {
    let size = 8;
    let (a, eigenvalues) = with_known_eigenvalues(size);
    let norm = eigenvalues[0];
    for epsilon in [0.0, 0.01, 0.05] {
        for steps in [0, 1, 2, 5, 10, 20] {
            let alpha = 1.8 / (norm * norm);
            let filtered: Vec<f64> = eigenvalues
                .iter()
                .map(|lambda| lambda + epsilon)
                .map(|lambda| {
                    let left = (1.0 - alpha * lambda * lambda).powf(2f64.powi(steps));
                    (1.0 - left) / lambda
                })
                .collect();
            let entry = |i: usize, j: usize| -> f64 {
                let each = (0..size).map(|u| hadamard(u, i) * filtered[u] * hadamard(u, j));
                each.sum::<f64>() / size as f64
            };
            let entries = (0..size * size)
                .map(|at| entry(at / size, at % size))
                .collect();
            let expected = tensor(entries, &[1, 1, size, size]);
            let found = newton_inverse(&a, epsilon, steps as usize).unwrap();
            assert_near(
                &found,
                &expected,
                1e-13,
                &format!("{epsilon} after {steps}"),
            );
        }
        let raised = (&a
            + (Tensor::eye(size, DType::F64, &Device::Cpu).unwrap() * epsilon)
                .unwrap()
                .reshape((1, 1, size, size))
                .unwrap())
        .unwrap();
        let product = newton_inverse(&a, epsilon, 60)
            .unwrap()
            .matmul(&raised)
            .unwrap();
        let identity = Tensor::eye(size, DType::F64, &Device::Cpu).unwrap();
        let identity = identity.reshape((1, 1, size, size)).unwrap();
        assert_near(&product, &identity, 1e-12, "an inverse in the end");
    }
}

/// Rows of kernels have different sums: the largest of them in its own slice says how long the step is.
#[test]
fn the_largest_row_of_a_slice_is_its_step() {
    let points = values(&random(&[2, 3, 7, 4], 5));
    let mut entries = Vec::new();
    for slice in points.chunks(7 * 4) {
        for a in slice.chunks(4) {
            entries.extend(slice.chunks(4).map(|b| kernel(a, b)));
        }
    }
    let a = tensor(entries, &[2, 3, 7, 7]);
    for steps in [0, 1, 3, 20] {
        let found = newton_inverse(&a, 0.01, steps).unwrap();
        let expected = followed(&a, 0.01, steps);
        assert_near(&found, &expected, 1e-10, &format!("after {steps}"));
    }
}

/// Each slice has its own step length: one of them changes no other.
#[test]
fn slices_are_inverted_by_themselves() {
    let (a, _) = with_known_eigenvalues(4);
    let identity = Tensor::eye(4, DType::F64, &Device::Cpu).unwrap();
    let other = identity.reshape((1, 1, 4, 4)).unwrap();
    let both = Tensor::cat(&[&a, &other], 1).unwrap();
    let found = newton_inverse(&both, 0.01, 3)
        .unwrap()
        .narrow(1, 0, 1)
        .unwrap();
    assert_near(
        &found,
        &newton_inverse(&a, 0.01, 3).unwrap(),
        0.0,
        "beside another",
    );
}

/// With every token a landmark, `G G⁻¹ G = G`.
#[test]
fn all_tokens_as_landmarks_are_the_gaussian_kernel() {
    let length = 7;
    let x = (random(&[1, length, WIDTH], 1) * 3.0).unwrap();
    let soft = SoftSpec {
        epsilon: 0.0,
        normalised: false,
        steps: 60,
        ..SoftSpec::new(Landmarks::Mean { ratio: 1 })
    };
    let run = subject(&soft).run(&x, Given::default());
    let root = (1.0 / (HEAD_WIDTH as f64).sqrt()).sqrt();
    let gaussian = |head: usize, i: usize, j: usize| {
        let at =
            |t: usize| -> Vec<f64> { run.query(0, head, t).iter().map(|x| root * x).collect() };
        kernel(&at(i), &at(j))
    };
    let row = |_: usize, head: usize, i: usize| (0..length).map(|j| gaussian(head, i, j)).collect();
    run.check(1, row, 1e-8, "G");
    for head in 0..HEADS {
        for i in 0..length {
            assert!((run.weight(0, head, i, i) - 1.0).abs() < 1e-8);
            for j in 0..length {
                let weight = run.weight(0, head, i, j);
                assert!(weight > -1e-12 && weight < 1.0 + 1e-8, "{weight}");
            }
        }
    }
}

/// Whether `a + shift I` has a Cholesky factor.
fn is_positive(a: &Rows, shift: f64) -> bool {
    let mut factor = vec![vec![0.0; a.len()]; a.len()];
    for i in 0..a.len() {
        for j in 0..=i {
            let rest = a[i][j] - dot(&factor[i][..j], &factor[j][..j]);
            if i == j {
                let square = rest + shift;
                if square <= 0.0 {
                    return false;
                }
                factor[i][i] = square.sqrt();
            } else {
                factor[i][j] = rest / factor[j][j];
            }
        }
    }
    true
}

#[test]
fn weights_are_symmetric_and_have_no_negative_eigenvalue() {
    let length = 16;
    let x = random(&[1, length, WIDTH], 3);
    for soft in specs().into_iter().filter(|soft| soft.local.is_none()) {
        // Also where Newton's iteration is far from done.
        for steps in [2, 20, 60] {
            let soft = SoftSpec {
                steps,
                ..soft.clone()
            };
            let run = subject(&soft).run(&x, Given::default());
            for head in 0..HEADS {
                let row = |i| (0..length).map(|j| run.weight(0, head, i, j)).collect();
                let weights: Rows = (0..length).map(row).collect();
                for i in 0..length {
                    for j in 0..i {
                        assert!((weights[i][j] - weights[j][i]).abs() < 1e-10);
                    }
                }
                assert!(is_positive(&weights, 1e-5), "{soft:?}");
            }
        }
    }
}

/// One vector added to every query moves landmarks that are means with them.
#[test]
fn weights_do_not_change_where_all_queries_move() {
    let x = random(&[1, 9, WIDTH], 1);
    for landmarks in [
        Landmarks::Mean { ratio: 2 },
        Landmarks::Segments { count: 3 },
    ] {
        let soft = SoftSpec::new(landmarks);
        let before = subject(&soft);
        for (far, tolerance) in [(1.0, 1e-12), (1e3, 1e-7)] {
            let mut map = before.map.clone();
            let bias = (&map["query.bias"] + (random(&[WIDTH], 8) * far).unwrap()).unwrap();
            map.insert("query.bias".to_owned(), bias);
            let after = Subject {
                spec: before.spec.clone(),
                map,
            };
            let weights = |subject: &Subject| {
                let run = subject.run(&x, Given::default());
                tensor(run.weights, &[HEADS * 81])
            };
            assert_near(&weights(&after), &weights(&before), tolerance, "moved");
        }
    }
}

/// Newton's iteration with a graph of every step.
fn followed(a: &Tensor, epsilon: f64, steps: usize) -> Tensor {
    let size = a.dim(2).unwrap();
    let norm = a.detach().sum_keepdim(3).unwrap().max_keepdim(2).unwrap();
    let alpha = (norm.sqr().unwrap().recip().unwrap() * 1.8).unwrap();
    let identity = Tensor::eye(size, DType::F64, &Device::Cpu).unwrap();
    let raised = a.broadcast_add(&(identity * epsilon).unwrap()).unwrap();
    let mut y = raised.broadcast_mul(&alpha).unwrap();
    for _ in 0..steps {
        let next = y.matmul(&raised).unwrap().matmul(&y).unwrap();
        y = ((&y * 2.0).unwrap() - next).unwrap();
    }
    y
}

fn gradient_of(a: &Tensor, inverse: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let a = Var::from_tensor(a).unwrap();
    let gradients = contracted(&inverse(a.as_tensor())).backward().unwrap();
    gradients.get(a.as_tensor()).unwrap().clone()
}

#[test]
fn the_gradient_is_that_of_an_inverse() {
    let (a, _) = with_known_eigenvalues(8);
    let inputs = Map::from([("a".to_owned(), a.clone())]);
    let error = gradient_error(&inputs, 40, |inputs| {
        contracted(&regularised_inverse(&inputs["a"], 0.01, 40).unwrap())
    });
    assert!(error < 1e-6, "{error:e}");
    // −Yᵀ G Yᵀ, whatever Y is.
    for steps in [3, 20] {
        let y = newton_inverse(&a, 0.01, steps).unwrap();
        let found = gradient_of(&a, |a| regularised_inverse(a, 0.01, steps).unwrap());
        let across = y.transpose(2, 3).unwrap().contiguous().unwrap();
        let given = random(&[1, 1, 8, 8], 77);
        let expected = across
            .matmul(&given)
            .unwrap()
            .matmul(&across)
            .unwrap()
            .neg()
            .unwrap();
        assert_near(&found, &expected, 1e-12, "closed form");
    }
    // That of the steps themselves is the same once they are done, and another before.
    let closed = |steps| gradient_of(&a, |a| regularised_inverse(a, 0.01, steps).unwrap());
    let graph = |steps| gradient_of(&a, |a| followed(a, 0.01, steps));
    let far = |steps| {
        let size = values(&graph(steps))
            .into_iter()
            .fold(0.0, |m: f64, x| m.max(x.abs()));
        difference(&closed(steps), &graph(steps)) / size
    };
    assert!(far(20) < 1e-6, "{:e}", far(20));
    assert!(far(3) > 1e-2, "{:e}", far(3));
}

/// The largest singular value of a symmetric matrix.
fn spectral_norm(a: &Rows) -> f64 {
    let mut x: Vec<f64> = (0..a.len()).map(|i| 1.0 + (i as f64).sin()).collect();
    let mut norm = 0.0;
    for _ in 0..3000 {
        let y: Vec<f64> = a.iter().map(|row| dot(row, &x)).collect();
        norm = dot(&y, &y).sqrt();
        x = y.iter().map(|y| y / norm).collect();
    }
    norm
}

/// Degrees are at least 1, so that dividing by them makes the middle no larger; with every token a landmark
/// and nothing added, so does it make the weights.
#[test]
fn the_normalisation_bounds_the_spectral_norm() {
    for seed in 0..20 {
        let points = random(&[1, 1, 9, 4], seed);
        let rows: Rows = values(&points).chunks(4).map(<[f64]>::to_vec).collect();
        let inner: Rows = rows
            .iter()
            .map(|a| rows.iter().map(|b| kernel(a, b)).collect())
            .collect();
        let a = tensor(inner.concat(), &[1, 1, 9, 9]);
        let middle: Rows = values(&newton_inverse(&a, 0.01, 20).unwrap())
            .chunks(9)
            .map(<[f64]>::to_vec)
            .collect();
        let degrees: Vec<f64> = inner.iter().map(|row| row.iter().sum()).collect();
        assert!(degrees.iter().all(|degree| *degree >= 1.0));
        let divided: Rows = (0..9)
            .map(|i| {
                let entry = |j: usize| middle[i][j] / (degrees[i] * degrees[j]).sqrt();
                (0..9).map(entry).collect()
            })
            .collect();
        assert!(spectral_norm(&divided) <= spectral_norm(&middle) + 1e-9);
    }
    let x = random(&[1, 12, WIDTH], 2);
    let norm = |normalised| {
        let soft = SoftSpec {
            normalised,
            ..SoftSpec::new(Landmarks::Mean { ratio: 1 })
        };
        let run = subject(&soft).run(&x, Given::default());
        let row = |i| (0..12).map(|j| run.weight(0, 0, i, j)).collect();
        spectral_norm(&(0..12).map(row).collect())
    };
    assert!(norm(true) < norm(false));
}

#[test]
fn operations_grow_linearly_with_as_many_landmarks() {
    for local in [None, Some(3)] {
        let subject = subject(&SoftSpec {
            local,
            ..SoftSpec::new(Landmarks::Segments { count: 8 })
        });
        let exponent = growth(2048, |n| subject.mixing_operations(n));
        assert!((exponent - 1.0).abs() < 0.1, "{exponent}");
    }
}

/// Weights fit any length, and any number of rows.
#[test]
fn twice_the_tokens_run_with_the_same_parameters() {
    for soft in specs() {
        let subject = subject(&soft);
        for length in [12, 24] {
            let x = random(&[1, length, WIDTH], 1);
            let y = subject.output(&x, Given::default());
            assert!(is_finite(&y) && y.dims() == [1, length, WIDTH]);
        }
    }
}
