//! Circuits against vectors of amplitudes and products of their gates.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::{Map, contracted, gradient_error, random, tensor, values};
use crate::doubly_stochastic::assert_doubly_stochastic;
use lapidary_kernels::{DType, Var};
use lapidary_parts::attention::mechanism::doubly_stochastic::circuit::Circuit;
use lapidary_parts::attention::mechanism::doubly_stochastic::{Ansatz, CircuitSpec, Operator};

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
