//! Doubly stochastic operators' exact properties.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, is_finite, random, tensor, values,
};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::doubly_stochastic::{
    Ansatz, CircuitSpec, DoublyStochasticSpec, Operator, Over, SinkhornForm, Statistic, Training,
    birkhoff_projection, diagnose,
};
use lapidary_parts::attention::mechanism::{Describe, Heads, MechanismPass};
use lapidary_signal::Trace;

const TOKENS: usize = 8;

fn sinkhorn(iterations: usize) -> Operator {
    Operator::Sinkhorn {
        iterations,
        form: SinkhornForm::Log,
        epsilon: 1.0,
    }
}

fn circuit(qubits: usize) -> Operator {
    Operator::Circuit(CircuitSpec::new(TOKENS, qubits))
}

fn scores(seed: u64) -> Tensor {
    random(&[2, 2, TOKENS, TOKENS], seed)
}

fn apply(operator: &Operator, scores: &Tensor) -> Tensor {
    operator.apply(scores, 1.0, None, None).unwrap()
}

/// The largest distance of a sum of rows or columns from one.
fn sums_off(made: &Tensor) -> [f64; 2] {
    [3, 2].map(|along| {
        let sums = values(&made.sum(along).unwrap());
        sums.iter()
            .fold(0.0, |m: f64, sum| m.max((sum - 1.0).abs()))
    })
}

#[track_caller]
pub fn assert_doubly_stochastic(made: &Tensor, tolerance: f64) {
    assert!(values(made).iter().all(|entry| *entry >= 0.0));
    let [rows, columns] = sums_off(made);
    assert!(
        rows < tolerance && columns < tolerance,
        "{rows:e} {columns:e}"
    );
}

#[test]
fn only_angles_that_are_learned_are_parameters() {
    let heads = Heads {
        width: 8,
        heads: 1,
        head_width: 8,
        value_width: 8,
        causal: false,
        scale: 0.5,
        sharing: QueryKeySharing::None,
    };
    for training in [Training::Static, Training::Mixed, Training::Differentiable] {
        let circuit = CircuitSpec {
            training,
            ..CircuitSpec::new(4, 3)
        };
        let count = circuit.circuit().angles();
        let spec = DoublyStochasticSpec {
            operator: Operator::Circuit(circuit),
        };
        let map = draw(3, |p| spec.build(&heads, p));
        if training == Training::Static {
            assert!(map.is_empty());
            continue;
        }
        let shift = Var::from_tensor(&map["shift"]).unwrap();
        assert_eq!(shift.dims(), [count]);
        let live = Map::from([("shift".to_owned(), shift.as_tensor().clone())]);
        let module = build(&live, |p| spec.build(&heads, p)).unwrap();
        let trace = Trace::new();
        let context = Context::new(&trace);
        let x = random(&[1, 1, 4, 8], 4);
        let tokens = random(&[1, 4, 8], 5);
        let pass = MechanismPass {
            path: "attention",
            tokens: &tokens,
            keep: None,
            offset: 0,
            context: &context,
        };
        let y = module.mixing(&x, &x, &pass).unwrap().mix(&x).unwrap();
        let learned = match contracted(&y).backward() {
            Ok(gradients) => gradients.get(shift.as_tensor()).is_some(),
            Err(_) => false,
        };
        assert_eq!(learned, training == Training::Differentiable);
    }
}

#[test]
fn squares_of_an_orthogonal_factor_are_doubly_stochastic() {
    let scores = scores(3);
    let qr = Operator::Qr { seed: 0 };
    let made = apply(&qr, &scores);
    assert_doubly_stochastic(&made, 1e-12);
    let single = apply(&qr, &scores.to_dtype(DType::F32).unwrap());
    assert_doubly_stochastic(&single, 1e-5);
    // An upper-triangular factor with a positive diagonal on the right is taken up by R.
    let triangle: Vec<f64> = values(&random(&[TOKENS, TOKENS], 9))
        .into_iter()
        .enumerate()
        .map(|(at, entry)| match (at / TOKENS).cmp(&(at % TOKENS)) {
            std::cmp::Ordering::Less => entry,
            std::cmp::Ordering::Equal => 0.5 + entry.abs(),
            std::cmp::Ordering::Greater => 0.0,
        })
        .collect();
    let triangle = tensor(triangle, &[1, 1, TOKENS, TOKENS]);
    let triangle = triangle.broadcast_as(scores.dims()).unwrap();
    let other = scores.matmul(&triangle.contiguous().unwrap()).unwrap();
    assert_near(&apply(&qr, &other), &made, 1e-9, "triangle");
}

#[test]
fn scores_without_full_rank_are_repaired_one_by_one() {
    let narrow = random(&[2, 2, TOKENS, 3], 4);
    let low = narrow
        .matmul(&narrow.t().unwrap().contiguous().unwrap())
        .unwrap();
    let full = scores(5);
    let qr = Operator::Qr { seed: 7 };
    for dtype in [DType::F64, DType::F32] {
        let low = low.to_dtype(dtype).unwrap();
        let made = apply(&qr, &low);
        assert!(is_finite(&made));
        assert_doubly_stochastic(&made, 2e-4);
        assert_eq!(values(&made), values(&apply(&qr, &low)));
    }
    assert!(difference(&apply(&Operator::Qr { seed: 8 }, &low), &apply(&qr, &low)) > 1e-3);
    // Those of full rank beside them are as they were.
    let both = Tensor::cat(
        &[
            &low.narrow(0, 0, 1).unwrap(),
            &full.narrow(0, 0, 1).unwrap(),
        ],
        0,
    );
    let made = apply(&qr, &both.unwrap());
    let alone = apply(&qr, &full.narrow(0, 0, 1).unwrap());
    assert_near(&made.narrow(0, 1, 1).unwrap(), &alone, 1e-13, "full rank");
}

/// What is added to such scores belongs to tokens, not to places of the batch.
#[test]
fn scores_without_full_rank_are_repaired_alike_wherever_pads_are() {
    const PADDED: usize = TOKENS + 2;
    let narrow = random(&[1, 2, PADDED, 3], 4);
    let low = narrow
        .matmul(&narrow.t().unwrap().contiguous().unwrap())
        .unwrap();
    let qr = Operator::Qr { seed: 7 };
    let inner = |x: &Tensor, first: usize| {
        let rows = x.narrow(2, first, TOKENS).unwrap();
        rows.narrow(3, first, TOKENS).unwrap()
    };
    for first in 0..=2 {
        let alone = apply(&qr, &inner(&low, first).contiguous().unwrap());
        let real = (0..PADDED).map(|at| f64::from((first..first + TOKENS).contains(&at)));
        let real = tensor(real.collect(), &[1, 1, PADDED, 1]);
        let padded = qr.apply(&low, 1.0, Some(&real), None).unwrap();
        assert_near(&inner(&padded, first), &alone, 1e-9, "pads");
        let rest = values(&padded).iter().sum::<f64>() - values(&alone).iter().sum::<f64>();
        assert!(rest.abs() < 1e-9, "{rest:e}");
    }
}

#[test]
fn one_iteration_is_softmax() {
    let scores = scores(1);
    let softmax = apply(&Operator::Softmax, &scores);
    for form in [SinkhornForm::Log, SinkhornForm::Naive] {
        let once = apply(
            &Operator::Sinkhorn {
                iterations: 1,
                form,
                epsilon: 1.0,
            },
            &scores,
        );
        assert_near(&once, &softmax, 1e-13, "one iteration");
    }
}

#[test]
fn iterations_keep_rows_exact_and_bring_columns_closer() {
    let scores = scores(2);
    let mut last = f64::INFINITY;
    for iterations in [1, 3, 5, 9, 21, 101] {
        let forms = [SinkhornForm::Log, SinkhornForm::Naive].map(|form| {
            apply(
                &Operator::Sinkhorn {
                    iterations,
                    form,
                    epsilon: 1.0,
                },
                &scores,
            )
        });
        assert_near(&forms[0], &forms[1], 1e-12, "both forms");
        let [rows, columns] = sums_off(&forms[0]);
        assert!(rows < 1e-13);
        assert!(columns < last, "{columns} after {last}");
        last = columns;
    }
    assert!(last < 1e-8);
}

fn permuted(x: &Tensor, order: &[u32]) -> Tensor {
    let order = Tensor::new(order, &Device::Cpu).unwrap();
    let rows = x.contiguous().unwrap().index_select(&order, 2).unwrap();
    rows.index_select(&order, 3).unwrap()
}

#[test]
fn what_iterations_converge_to_knows_neither_offsets_nor_order() {
    let scores = scores(4);
    let converged = sinkhorn(2001);
    let made = apply(&converged, &scores);
    let offsets = random(&[2, 2, TOKENS, 1], 5);
    let moved = scores.broadcast_add(&offsets).unwrap();
    let moved = moved
        .broadcast_add(&offsets.transpose(2, 3).unwrap())
        .unwrap();
    assert_near(&apply(&converged, &moved), &made, 1e-9, "offsets");

    let order = [3, 0, 7, 1, 2, 6, 5, 4];
    let equivariance = |operator: &Operator| {
        let other = apply(operator, &permuted(&scores, &order));
        difference(&other, &permuted(&apply(operator, &scores), &order))
    };
    assert!(equivariance(&converged) < 1e-12);
    assert!(equivariance(&Operator::Qr { seed: 0 }) > 1e-2);
    assert!(equivariance(&circuit(4)) > 1e-2);
}

#[test]
fn a_temperature_is_at_most_the_statistic() {
    let scores = scores(6);
    let scale = 0.5;
    for over in [Over::Row, Over::Matrix] {
        for statistic in [Statistic::Deviation, Statistic::Variance] {
            let operator = Operator::NormSoftmax { statistic, over };
            // Wide scores have the temperature 1 / scale, narrow ones that of the statistic.
            for (factor, capped) in [(10.0, true), (0.3, false)] {
                let scores = (&scores * factor).unwrap();
                let made = values(&operator.apply(&scores, scale, None, None).unwrap());
                let raw = values(&scores);
                for (matrix, made) in raw
                    .chunks(TOKENS * TOKENS)
                    .zip(made.chunks(TOKENS * TOKENS))
                {
                    for (row, made) in matrix.chunks(TOKENS).zip(made.chunks(TOKENS)) {
                        let of = if over == Over::Row { row } else { matrix };
                        let count = of.len() as f64;
                        let mean = of.iter().sum::<f64>() / count;
                        let variance = of.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / count;
                        let temperature = match statistic {
                            Statistic::Deviation => variance.sqrt(),
                            Statistic::Variance => variance,
                        };
                        assert_eq!(temperature > 1.0 / scale, capped);
                        let temperature = temperature.min(1.0 / scale);
                        let sum: f64 = row.iter().map(|s| (s / temperature).exp()).sum();
                        for (score, made) in row.iter().zip(made) {
                            let expected = (score / temperature).exp() / sum;
                            assert!((made - expected).abs() < 1e-9);
                        }
                    }
                }
            }
        }
    }
}

fn every() -> Vec<(&'static str, Operator, bool)> {
    vec![
        ("softmax", Operator::Softmax, false),
        ("sinkhorn", sinkhorn(3), false),
        ("converged", sinkhorn(2001), true),
        ("qr", Operator::Qr { seed: 0 }, true),
        ("circuit", circuit(4), true),
    ]
}

#[test]
fn the_projection_is_the_nearest_doubly_stochastic_matrix() {
    let scores = random(&[1, 1, TOKENS, TOKENS], 3);
    let matrix = |x: &Tensor| x.reshape((TOKENS, TOKENS)).unwrap();
    let nearest = birkhoff_projection(&matrix(&scores)).unwrap();
    let four = |x: &Tensor| x.reshape((1, 1, TOKENS, TOKENS)).unwrap();
    assert_doubly_stochastic(&four(&nearest), 1e-10);
    let change = |made: &Tensor| diagnose(made, &matrix(&scores)).unwrap().change;
    for (name, operator, is_doubly) in every() {
        let made = matrix(&apply(&operator, &scores));
        let found = diagnose(&made, &matrix(&scores)).unwrap();
        if is_doubly {
            let again = birkhoff_projection(&made).unwrap();
            assert_near(&again, &made, 1e-9, name);
            assert!(found.distance < 5e-6, "{name} {}", found.distance);
            assert!(change(&nearest) <= found.change, "{name}");
        } else {
            assert!(found.distance > 1e-3, "{name}");
        }
        assert!(found.entropy > 0.0 && found.entropy <= (TOKENS as f64).ln() + 1e-12);
    }
    // Small against all doubly stochastic ones: also permutations.
    for shift in 0..TOKENS {
        let mut permutation = vec![0.0; TOKENS * TOKENS];
        for row in 0..TOKENS {
            permutation[row * TOKENS + (row + shift) % TOKENS] = 1.0;
        }
        let permutation = tensor(permutation, &[TOKENS, TOKENS]);
        assert!(change(&nearest) <= change(&permutation));
    }
    assert!(diagnose(&nearest, &tensor(vec![0.0; 4], &[2, 2])).is_err());
    assert!(birkhoff_projection(&tensor(vec![f64::NAN], &[1, 1])).is_err());
}

/// Entries far below zero are taken back over many rounds in which nothing else moves.
#[test]
fn the_projection_of_large_entries_is_doubly_stochastic_too() {
    for large in [1e2, 1e4, 1e6] {
        let mut matrix = vec![0.0; 9];
        matrix[8] = -large;
        let nearest = birkhoff_projection(&tensor(matrix, &[3, 3])).unwrap();
        let expected = vec![0.25, 0.25, 0.5, 0.25, 0.25, 0.5, 0.5, 0.5, 0.0];
        assert_near(&nearest, &tensor(expected, &[3, 3]), 1e-9, "one corner");
        let rows = (random(&[1, 1, TOKENS, TOKENS], 3) * large).unwrap();
        let nearest = birkhoff_projection(&rows.reshape((TOKENS, TOKENS)).unwrap()).unwrap();
        let nearest = nearest.reshape((1, 1, TOKENS, TOKENS)).unwrap();
        assert_doubly_stochastic(&nearest, 1e-9);
    }
}

#[test]
fn means_over_tokens_pass_through_what_is_doubly_stochastic() {
    let scores = scores(7);
    let v = random(&[2, 2, TOKENS, 5], 8);
    let mean = |x: &Tensor| x.mean(2).unwrap();
    for (name, operator, is_doubly) in every() {
        let mixed = apply(&operator, &scores).matmul(&v).unwrap();
        let off = difference(&mean(&mixed), &mean(&v));
        assert_eq!(off < 1e-8, is_doubly, "{name}: {off:e}");
    }
}

/// Pads are not there, whatever stands in their rows and columns.
#[test]
fn pads_have_no_part_in_anything() {
    let real = 5;
    let short = random(&[1, 2, real, real], 3);
    let keep: Vec<f64> = (0..TOKENS).map(|t| f64::from(u8::from(t < real))).collect();
    let keep = tensor(keep, &[1, 1, TOKENS, 1]);
    let norm = Operator::NormSoftmax {
        statistic: Statistic::Deviation,
        over: Over::Matrix,
    };
    let mut all = every();
    all.push(("norm-softmax", norm, false));
    for (name, operator, _) in all {
        let alone = operator.apply(&short, 0.7, None, None).unwrap();
        for junk in [1.0, 1e3] {
            let mut padded = values(&(random(&[1, 2, TOKENS, TOKENS], 4) * junk).unwrap());
            let small = values(&short);
            for (at, entry) in padded.iter_mut().enumerate() {
                let (head, i, j) = (at / TOKENS / TOKENS, at / TOKENS % TOKENS, at % TOKENS);
                if i < real && j < real {
                    *entry = small[(head * real + i) * real + j];
                }
            }
            let padded = tensor(padded, &[1, 2, TOKENS, TOKENS]);
            let made = operator.apply(&padded, 0.7, Some(&keep), None).unwrap();
            let inner = made.narrow(2, 0, real).unwrap().narrow(3, 0, real).unwrap();
            assert_near(&inner, &alone, 1e-10, name);
            let total = values(&made.sum_all().unwrap())[0];
            let within = values(&alone.sum_all().unwrap())[0];
            assert!((total - within).abs() < 1e-9, "{name}");
        }
    }
}

#[test]
fn longer_sequences_than_a_circuit_has_tokens_are_refused() {
    let operator = Operator::Circuit(CircuitSpec {
        ansatz: Ansatz::Simple,
        ..CircuitSpec::new(6, 3)
    });
    let message = operator
        .apply(&scores(1), 1.0, None, None)
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "number of tokens of a circuit is 8, but must be at most 6, as its spec says"
    );
}

#[test]
fn operators_alone_are_refused_as_those_of_attention() {
    for (operator, expected) in [
        (
            Operator::Circuit(CircuitSpec::new(TOKENS, 2)),
            "operator.tokens is 8, but must be between 2 and 4",
        ),
        (
            Operator::Circuit(CircuitSpec::new(TOKENS, 200)),
            "operator.qubits is 200, but must be between 1 and 10",
        ),
        (
            sinkhorn(2),
            "operator.iterations is 2, but must be an odd number, so that rows are normalised last",
        ),
    ] {
        let refused = operator.apply(&scores(1), 1.0, None, None).unwrap_err();
        assert_eq!(refused.to_string(), expected);
    }
    let norm = Operator::NormSoftmax {
        statistic: Statistic::Deviation,
        over: Over::Row,
    };
    for scale in [0.0, -1.0, f64::NAN] {
        let refused = norm.apply(&scores(1), scale, None, None).unwrap_err();
        let said = refused.to_string();
        assert!(
            said.starts_with("operator.kind is \"norm-softmax\", but must be another operator"),
            "{said}"
        );
    }
    // An orthogonal factor would leave keys beyond the queries out without a word.
    let wide = random(&[1, 1, 3, 5], 2);
    for (_, operator, _) in every() {
        let refused = operator.apply(&wide, 1.0, None, None).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "shape of scores is [1, 1, 3, 5], but must be [batch, heads, T, T], as many queries as keys"
        );
    }
    let theta = random(&[7], 3);
    let refused = circuit(4).apply(&scores(1), 1.0, None, Some(&theta));
    let expected = CircuitSpec::new(TOKENS, 4).circuit().angles();
    assert_eq!(
        refused.unwrap_err().to_string(),
        format!("shape of theta is [7], but must be [{expected}], a factor for each angle")
    );
}

#[test]
fn work_grows_as_it_is_said_to() {
    let work = |operator: &Operator, n: usize| -> f64 {
        let heads = Heads {
            width: 4,
            heads: 1,
            head_width: 4,
            value_width: 4,
            causal: false,
            scale: 0.5,
            sharing: QueryKeySharing::None,
        };
        let spec = DoublyStochasticSpec {
            operator: operator.clone(),
        };
        let module = build(&Map::new(), |p| spec.build(&heads, p)).unwrap();
        let trace = Trace::new();
        let context = Context::new(&trace);
        let x = random(&[1, 1, n, 4], 4);
        let tokens = random(&[1, n, 4], 5);
        let pass = MechanismPass {
            path: "attention",
            tokens: &tokens,
            keep: None,
            offset: 0,
            context: &context,
        };
        module.mixing(&x, &x, &pass).unwrap().operations(4) as f64
    };
    for (operator, exponent) in [
        (Operator::Softmax, 2.0),
        (sinkhorn(5), 2.0),
        (Operator::Qr { seed: 0 }, 3.0),
    ] {
        let found = (work(&operator, 256) / work(&operator, 64)).ln() / 4f64.ln();
        assert!((found - exponent).abs() < 0.1, "{found}");
    }
}
