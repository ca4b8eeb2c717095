//! Doubly stochastic operators' exact properties, and a circuit against vectors of amplitudes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, is_finite, random,
    tensor, values,
};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::doubly_stochastic::circuit::Circuit;
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
fn assert_doubly_stochastic(made: &Tensor, tolerance: f64) {
    assert!(values(made).iter().all(|entry| *entry >= 0.0));
    let [rows, columns] = sums_off(made);
    assert!(
        rows < tolerance && columns < tolerance,
        "{rows:e} {columns:e}"
    );
}

fn angles(circuit: &Circuit, seed: u64) -> Vec<f64> {
    values(&(random(&[circuit.angles()], seed) * 2.0).unwrap())
}

fn transition(circuit: &Circuit, angles: &[f64]) -> Vec<f64> {
    let angles = tensor(angles.to_vec(), &[1, angles.len()]);
    values(&circuit.transitions(&angles).unwrap())
}

const ANSATZE: [fn(usize, usize, usize) -> Circuit; 3] =
    [Circuit::bricks, Circuit::centrosymmetric, Circuit::trotter];

#[test]
fn circuits_are_doubly_stochastic_whatever_their_angles() {
    for data in 0..=3 {
        // Of one qubit at least.
        for extra in usize::from(data == 0)..=2 {
            for (layers, make) in [0, 1, 3]
                .into_iter()
                .flat_map(|n| ANSATZE.map(|make| (n, make)))
            {
                let circuit = make(data, extra, layers);
                let batch = 3;
                let drawn = (random(&[batch, circuit.angles()], 4) * 3.0).unwrap();
                for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
                    let made = circuit
                        .transitions(&drawn.to_dtype(dtype).unwrap())
                        .unwrap();
                    assert_eq!(made.dims(), [batch, 1 << data, 1 << data]);
                    assert_doubly_stochastic(&made.unsqueeze(1).unwrap(), tolerance);
                }
            }
        }
    }
}

/// Counts that the paper gives for its circuits.
#[test]
fn circuits_have_as_many_angles_as_the_paper_counts() {
    let angles = |tokens, layers, qubits| {
        let spec = CircuitSpec {
            layers,
            ..CircuitSpec::new(tokens, qubits)
        };
        spec.circuit().angles()
    };
    assert_eq!(angles(4, 2, 6), 98);
    assert_eq!(angles(8, 16, 8), 920);
}

#[test]
fn without_angles_nothing_moves_and_with_any_the_matrix_is_unitary() {
    for make in ANSATZE {
        let circuit = make(2, 2, 3);
        moves_by_angles_alone(&circuit);
    }
}

fn moves_by_angles_alone(circuit: &Circuit) {
    let still = transition(circuit, &vec![0.0; circuit.angles()]);
    for (at, entry) in still.iter().enumerate() {
        assert_eq!(*entry, f64::from(u8::from(at / 4 == at % 4)));
    }
    let rows = 16;
    let [re, im] = circuit.unitary(&angles(circuit, 3));
    for a in 0..rows {
        for b in 0..rows {
            let (mut real, mut imaginary) = (0.0, 0.0);
            for row in 0..rows {
                let (x, y) = (row * rows + a, row * rows + b);
                real += re[x] * re[y] + im[x] * im[y];
                imaginary += re[x] * im[y] - im[x] * re[y];
            }
            let expected = f64::from(u8::from(a == b));
            assert!((real - expected).abs() < 1e-13 && imaginary.abs() < 1e-13);
        }
    }
}

type Complex = (f64, f64);

fn times((a, b): Complex, (c, d): Complex) -> Complex {
    (a * c - b * d, a * d + b * c)
}

/// A matrix `[size, size]`.
type Gate = Vec<Vec<Complex>>;

fn product(a: &Gate, b: &Gate) -> Gate {
    let size = a.len();
    let entry = |i: usize, j: usize| {
        (0..size).fold((0.0, 0.0), |(re, im), k| {
            let (x, y) = times(a[i][k], b[k][j]);
            (re + x, im + y)
        })
    };
    (0..size)
        .map(|i| (0..size).map(|j| entry(i, j)).collect())
        .collect()
}

fn kron(a: &Gate, b: &Gate) -> Gate {
    let size = a.len() * b.len();
    let entry =
        |i: usize, j: usize| times(a[i / b.len()][j / b.len()], b[i % b.len()][j % b.len()]);
    (0..size)
        .map(|i| (0..size).map(|j| entry(i, j)).collect())
        .collect()
}

fn eye(size: usize) -> Gate {
    let entry = |i: usize, j: usize| (f64::from(u8::from(i == j)), 0.0);
    (0..size)
        .map(|i| (0..size).map(|j| entry(i, j)).collect())
        .collect()
}

fn rotation(axis: char, angle: f64) -> Gate {
    let (s, c) = (angle / 2.0).sin_cos();
    match axis {
        'x' => vec![vec![(c, 0.0), (0.0, -s)], vec![(0.0, -s), (c, 0.0)]],
        'y' => vec![vec![(c, 0.0), (-s, 0.0)], vec![(s, 0.0), (c, 0.0)]],
        _ => vec![vec![(c, -s), (0.0, 0.0)], vec![(0.0, 0.0), (c, s)]],
    }
}

fn controlled_not() -> Gate {
    let mut gate = eye(4);
    gate.swap(2, 3);
    gate
}

/// `[R_y(φ₁) ⊗ R_y(φ₂)] CNOT [R_x(φ₃) ⊗ R_z(φ₄)] CNOT`.
fn block(phi: &[f64]) -> Gate {
    let first = kron(&rotation('x', phi[2]), &rotation('z', phi[3]));
    let last = kron(&rotation('y', phi[0]), &rotation('y', phi[1]));
    let not = controlled_not();
    product(&last, &product(&not, &product(&first, &not)))
}

/// The circuit's unitary, multiplied out by Kronecker products.
fn by_products(qubits: usize, layers: usize, mut phi: &[f64], first: bool) -> Gate {
    let mut all = eye(1 << qubits);
    let mut take = |count: usize| {
        let (head, rest) = phi.split_at(count);
        phi = rest;
        head.to_vec()
    };
    if first {
        let mut layer = eye(1);
        for _ in 0..qubits {
            let phi = take(3);
            let turned = product(&rotation('y', phi[1]), &rotation('z', phi[0]));
            layer = kron(&layer, &product(&rotation('z', phi[2]), &turned));
        }
        all = product(&layer, &all);
    }
    for _ in 0..layers {
        let pairs = (0..qubits).step_by(2).chain((1..qubits).step_by(2));
        for pair in pairs.filter(|pair| pair + 1 < qubits) {
            let middle = kron(&eye(1 << pair), &block(&take(4)));
            let layer = kron(&middle, &eye(1 << (qubits - pair - 2)));
            all = product(&layer, &all);
        }
    }
    all
}

#[test]
fn unitaries_are_products_of_their_gates() {
    for (qubits, layers) in [(1, 0), (2, 1), (3, 2), (4, 1)] {
        let circuit = Circuit::bricks(qubits, 0, layers);
        let phi = angles(&circuit, 8);
        let [re, im] = circuit.unitary(&phi);
        let expected = by_products(qubits, layers, &phi, true).concat();
        for ((re, im), (x, y)) in re.iter().zip(&im).zip(expected) {
            assert!((re - x).abs() < 1e-13 && (im - y).abs() < 1e-13);
        }
    }
}

/// Both halves applied to a vector of `2^{2n}` amplitudes, measured.
#[test]
fn a_parted_circuit_is_what_the_entangled_register_is_measured_as() {
    for (data, extra, layers) in [(1, 0, 1), (1, 1, 1), (2, 1, 2), (1, 2, 1)] {
        let qubits = data + extra;
        let spec = CircuitSpec {
            layers,
            ..CircuitSpec::new(1 << data, qubits)
        };
        let circuit = spec.circuit();
        let phi = angles(&circuit, 5);
        let half = 3 * qubits + 4 * (qubits - 1) * layers;
        let one = by_products(qubits, layers, &phi[..half], true);
        let two = by_products(qubits, layers, &phi[half..], false);
        let rows = 1 << qubits;
        // |Φ⟩, one register before the other.
        let mut vector = vec![(0.0, 0.0); rows * rows];
        for i in 0..rows {
            vector[i * rows + i] = (1.0 / (rows as f64).sqrt(), 0.0);
        }
        let transposed: Gate = (0..rows)
            .map(|i| (0..rows).map(|j| one[j][i]).collect())
            .collect();
        let gate = kron(&transposed, &two);
        let vector: Vec<Complex> = gate
            .iter()
            .map(|row| {
                row.iter()
                    .zip(&vector)
                    .fold((0.0, 0.0), |(re, im), (a, b)| {
                        let (x, y) = times(*a, *b);
                        (re + x, im + y)
                    })
            })
            .collect();
        let tokens = 1 << data;
        let mut expected = vec![0.0; tokens * tokens];
        for (at, (re, im)) in vector.iter().enumerate() {
            let (i, j) = ((at / rows) >> extra, (at % rows) >> extra);
            expected[i * tokens + j] += tokens as f64 * (re * re + im * im);
        }
        for (found, expected) in transition(&circuit, &phi).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-13, "{found} {expected}");
        }
    }
}

#[test]
fn without_extra_qubits_it_is_the_squares_of_a_unitary() {
    let circuit = Circuit::bricks(3, 0, 2);
    let phi = angles(&circuit, 2);
    let [re, im] = circuit.unitary(&phi);
    for (at, found) in transition(&circuit, &phi).into_iter().enumerate() {
        let across = at % 8 * 8 + at / 8;
        let expected = re[across] * re[across] + im[across] * im[across];
        assert!((found - expected).abs() < 1e-14);
    }
}

/// `P_ij = P_{T−1−i, T−1−j}` whatever the angles, where other circuits have no such thing; and blocks are those
/// of the usual circuit but for the axis.
#[test]
fn centrosymmetric_circuits_are_the_same_from_both_ends() {
    let apart = |circuit: &Circuit| {
        let made = transition(circuit, &angles(circuit, 6));
        let pairs = made.iter().zip(made.iter().rev());
        pairs.fold(0.0, |most: f64, (a, b)| most.max((a - b).abs()))
    };
    for (data, extra) in [(1, 0), (2, 0), (2, 2), (3, 1)] {
        let own = apart(&Circuit::centrosymmetric(data, extra, 3));
        assert!(own < 1e-14, "{data}, {extra}: {own:e}");
    }
    assert!(apart(&Circuit::bricks(2, 2, 3)) > 1e-2);
    assert!(apart(&Circuit::trotter(2, 2, 3)) > 1e-2);
    // One block on two qubits.
    let circuit = Circuit::centrosymmetric(2, 0, 1);
    let phi = angles(&circuit, 7);
    let not = controlled_not();
    let inner = kron(&rotation('x', phi[4]), &rotation('z', phi[5]));
    let before = kron(&rotation('x', phi[0]), &rotation('x', phi[1]));
    let after = kron(&rotation('x', phi[2]), &rotation('x', phi[3]));
    let coupled = product(&not, &product(&inner, &not));
    let expected = product(&after, &product(&coupled, &before)).concat();
    let [re, im] = circuit.unitary(&phi);
    for ((re, im), (x, y)) in re.iter().zip(&im).zip(expected) {
        assert!((re - x).abs() < 1e-14 && (im - y).abs() < 1e-14);
    }
}

/// `e^{−iH}` by its series, `H` being multiplied out from Pauli's matrices.
fn evolved(qubits: usize, phi: &[f64]) -> Gate {
    let pauli = |axis: usize| -> Gate {
        match axis {
            0 => vec![vec![(0.0, 0.0), (1.0, 0.0)], vec![(1.0, 0.0), (0.0, 0.0)]],
            1 => vec![vec![(0.0, 0.0), (0.0, -1.0)], vec![(0.0, 1.0), (0.0, 0.0)]],
            _ => vec![vec![(1.0, 0.0), (0.0, 0.0)], vec![(0.0, 0.0), (-1.0, 0.0)]],
        }
    };
    let on = |sites: &[(usize, usize)]| {
        (0..qubits).fold(eye(1), |all, qubit| {
            let here = sites.iter().find(|site| site.0 == qubit);
            kron(&all, &here.map_or_else(|| eye(2), |site| pauli(site.1)))
        })
    };
    let mut terms = Vec::new();
    for qubit in 0..qubits {
        terms.extend((0..3).map(|axis| on(&[(qubit, axis)])));
    }
    for first in 0..qubits {
        for second in first + 1..qubits {
            terms.extend([0, 2].map(|axis| on(&[(first, axis), (second, axis)])));
        }
    }
    assert_eq!(terms.len(), phi.len());
    let size = 1 << qubits;
    // −i H
    let mut generator = vec![vec![(0.0, 0.0); size]; size];
    for (term, phi) in terms.iter().zip(phi) {
        for (to, from) in generator.iter_mut().flatten().zip(term.iter().flatten()) {
            let (re, im) = times((0.0, -phi / 2.0), *from);
            *to = (to.0 + re, to.1 + im);
        }
    }
    let (mut sum, mut power) = (eye(size), eye(size));
    for n in 1..60 {
        power = product(&power, &generator);
        for (sum, entry) in sum.iter_mut().flatten().zip(power.iter_mut().flatten()) {
            *entry = (entry.0 / f64::from(n), entry.1 / f64::from(n));
            *sum = (sum.0 + entry.0, sum.1 + entry.1);
        }
    }
    sum
}

/// Twice as many steps are half as far from the evolution that they approach.
#[test]
fn steps_approach_the_evolution_of_an_ising_model() {
    for qubits in [1, 2, 3] {
        let phi = angles(&Circuit::trotter(qubits, 0, 1), 9);
        let expected = evolved(qubits, &phi).concat();
        let error = |steps: usize| {
            let [re, im] = Circuit::trotter(qubits, 0, steps).unitary(&phi);
            let squares = re.iter().zip(&im).zip(&expected);
            let squares = squares.map(|((re, im), (x, y))| (re - x).powi(2) + (im - y).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let order = (error(64) / error(128)).log2();
        assert!((order - 1.0).abs() < 0.1, "{qubits}: {order}");
    }
}

#[test]
fn the_gradient_of_a_rotation_is_the_shift_rule() {
    let circuit = Circuit::bricks(1, 0, 0);
    for y in [-2.0, 0.3, 1.1] {
        let at = |y: f64| transition(&circuit, &[0.4, y, -0.7])[0];
        let half = std::f64::consts::FRAC_PI_2;
        let shifted = (at(y + half) - at(y - half)) / 2.0;
        let variable = Var::from_tensor(&tensor(vec![0.4, y, -0.7], &[1, 3])).unwrap();
        let made = circuit.transitions(variable.as_tensor()).unwrap();
        let first = made.narrow(1, 0, 1).unwrap().narrow(2, 0, 1).unwrap();
        let gradients = first.sum_all().unwrap().backward().unwrap();
        let gradient = values(gradients.get(variable.as_tensor()).unwrap());
        assert!((gradient[1] - shifted).abs() < 1e-14);
        assert!((at(y) - (y / 2.0).cos().powi(2)).abs() < 1e-14);
    }
}

#[test]
fn gradients_pass_to_angles_and_scores() {
    for ansatz in [Ansatz::Parted, Ansatz::Centrosymmetric] {
        passes_gradients(CircuitSpec {
            layers: 1,
            ansatz,
            ..CircuitSpec::new(4, 3)
        });
    }
    passes_gradients(CircuitSpec {
        layers: 3,
        ansatz: Ansatz::Trotter,
        ..CircuitSpec::new(4, 3)
    });
}

fn passes_gradients(spec: CircuitSpec) {
    let inputs = Map::from([
        ("theta".to_owned(), random(&[spec.circuit().angles()], 1)),
        ("scores".to_owned(), random(&[2, 1, 4, 4], 2)),
    ]);
    let operator = Operator::Circuit(spec.clone());
    let error = gradient_error(&inputs, 16, |inputs| {
        let theta = Some(&inputs["theta"]);
        contracted(&operator.apply(&inputs["scores"], 1.0, None, theta).unwrap())
    });
    assert!(error < 1e-8, "{error:e}");

    // Held, the scores have none.
    let held = Operator::Circuit(CircuitSpec {
        grad_through: false,
        ..spec
    });
    let [scores, theta] = ["scores", "theta"].map(|name| Var::from_tensor(&inputs[name]).unwrap());
    let made = held
        .apply(scores.as_tensor(), 1.0, None, Some(theta.as_tensor()))
        .unwrap();
    let gradients = contracted(&made).backward().unwrap();
    assert!(gradients.get(scores.as_tensor()).is_none());
    assert!(gradients.get(theta.as_tensor()).is_some());
}

#[test]
fn only_angles_that_are_learned_are_parameters() {
    let heads = Heads {
        width: 8,
        heads: 1,
        head_width: 8,
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
fn work_grows_as_it_is_said_to() {
    let work = |operator: &Operator, n: usize| -> f64 {
        let heads = Heads {
            width: 4,
            heads: 1,
            head_width: 4,
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
