//! A parametric quantum circuit as a map from angles to doubly stochastic matrices, simulated exactly
//! (QontOT: Mariella et al., 2024, arXiv 2402.14991).
//!
//! On `n_w = q_d + q_x` qubits, `q_d` of them for data, angles `φ` make a unitary `W(φ)` of
//! `N = 2^{n_w}` rows. Of a register that is entangled with its copy, `W` acts on one half and the data
//! qubits of both are measured:
//!
//! ```text
//! P_ij = 2^{−q_x} Σ_{a,b} |⟨j, b| W(φ) |i, a⟩|²,   i, j < T = 2^{q_d},  a, b < 2^{q_x}
//! ```
//!
//! `P` is a mean of unistochastic matrices, doubly stochastic for every `φ`. Qubits for data come first:
//! a row of `W` is `j · 2^{q_x} + b`.
//!
//! Gates are applied to all rows of `W` one after the other. The gradient runs them backwards
//! (adjoint differentiation): from `W` itself and `Λ = ∂L/∂W`, each gate is taken off both, and a
//! rotation `R = e^{−iφσ/2}` has `∂L/∂φ = Re⟨Λ, −iσ/2 · W⟩`. Nothing but `W` is held.
//!
//! Cost: `6 N²` for each rotation and `3 N²` for `P`; three times that backwards.

use lapidary_kernels::{ByHand, Tensor, by_hand};
use rayon::prelude::*;

/// An axis to rotate around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    X,
    Y,
    Z,
}

/// One step of a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    /// `e^{−iφσ/2}` on a qubit, by the angle of this number.
    Rotation(Axis, usize, usize),
    /// Turns the second qubit over where the first is 1.
    Not(usize, usize),
}

/// A circuit of a fixed shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Circuit {
    data: usize,
    extra: usize,
    gates: Vec<Gate>,
    angles: usize,
    /// What every angle is divided by.
    steps: usize,
}

impl Circuit {
    /// `R_z R_y R_z` on each qubit, and then `layers` of blocks on the pairs `(0, 1), (2, 3), …` and
    /// `(1, 2), (3, 4), …`. A block is `[R_y(φ₁) ⊗ R_y(φ₂)] CNOT [R_x(φ₃) ⊗ R_z(φ₄)] CNOT`, nothing
    /// where its angles are 0.
    ///
    /// Two circuits whose halves act on the two sides of the entangled register are one of as many
    /// layers as both: `(Aᵀ ⊗ B)|Φ⟩ = (1 ⊗ BA)|Φ⟩`.
    pub fn bricks(data: usize, extra: usize, layers: usize) -> Self {
        let mut circuit = Self::empty(data, extra);
        circuit.turn(&[Axis::Z, Axis::Y, Axis::Z]);
        circuit.lay(layers, Axis::Y);
        circuit
    }

    /// `R_x` on each qubit, and then layers as those of [`Circuit::bricks`] whose blocks end in `R_x` where
    /// those have `R_y`: `[R_x(φ₁) ⊗ R_x(φ₂)] e^{−iφ₃ X⊗X/2} e^{−iφ₄ Z⊗Z/2}`.
    ///
    /// Turning all qubits over commutes with every gate, so that `P` is the same seen from the other end,
    /// `P_ij = P_{T−1−i, T−1−j}`.
    pub fn centrosymmetric(data: usize, extra: usize, layers: usize) -> Self {
        let mut circuit = Self::empty(data, extra);
        circuit.turn(&[Axis::X]);
        circuit.lay(layers, Axis::X);
        circuit
    }

    /// So many steps of Trotter's product for the time 1 of an Ising model with a field in every direction,
    ///
    /// ```text
    /// W ≈ e^{−iH},   H = ½ Σ_q (φ X_q + φ' Y_q + φ'' Z_q) + ½ Σ_{p<q} (φ X_p X_q + φ' Z_p Z_q)
    /// ```
    ///
    /// with numbers of their own for each qubit and each pair, and the same in all steps: the product errs by
    /// `O(1 / steps)`. Nothing moves in no step.
    pub fn trotter(data: usize, extra: usize, steps: usize) -> Self {
        let mut circuit = Self::empty(data, extra);
        let qubits = data + extra;
        circuit.turn(&[Axis::X, Axis::Y, Axis::Z]);
        for first in 0..qubits {
            for second in first + 1..qubits {
                circuit.couple(first, second);
            }
        }
        circuit.steps = steps.max(1);
        let step = std::mem::take(&mut circuit.gates);
        circuit.gates = step.repeat(steps);
        circuit
    }

    fn empty(data: usize, extra: usize) -> Self {
        Self {
            data,
            extra,
            gates: Vec::new(),
            angles: 0,
            steps: 1,
        }
    }

    /// Rotations of every qubit, by angles of their own.
    fn turn(&mut self, axes: &[Axis]) {
        for qubit in 0..self.data + self.extra {
            for axis in axes {
                let angle = self.angle();
                self.gates.push(Gate::Rotation(*axis, qubit, angle));
            }
        }
    }

    /// `e^{−iφ X⊗X/2} e^{−iφ' Z⊗Z/2}`: rotations of single qubits between two CNOT.
    fn couple(&mut self, first: usize, second: usize) {
        let [x, z] = [(); 2].map(|()| self.angle());
        self.gates.extend([
            Gate::Not(first, second),
            Gate::Rotation(Axis::X, first, x),
            Gate::Rotation(Axis::Z, second, z),
            Gate::Not(first, second),
        ]);
    }

    /// Layers of blocks that couple neighbours and then turn both around `axis`.
    fn lay(&mut self, layers: usize, axis: Axis) {
        let qubits = self.data + self.extra;
        let pairs = (0..qubits)
            .step_by(2)
            .chain((1..qubits).step_by(2))
            .filter(|first| first + 1 < qubits);
        for first in std::iter::repeat_n(pairs, layers).flatten() {
            let [one, two] = [(); 2].map(|()| self.angle());
            self.couple(first, first + 1);
            self.gates.extend([
                Gate::Rotation(axis, first, one),
                Gate::Rotation(axis, first + 1, two),
            ]);
        }
    }

    fn angle(&mut self) -> usize {
        self.angles += 1;
        self.angles - 1
    }

    /// Number of angles: `3 n_w + 4 (n_w − 1) layers` of bricks, `n_w + 4 (n_w − 1) layers` where they are
    /// centrosymmetric, `3 n_w + n_w (n_w − 1)` of Trotter's product.
    pub fn angles(&self) -> usize {
        self.angles
    }

    /// Rows of the matrices, `T`.
    pub fn tokens(&self) -> usize {
        1 << self.data
    }

    /// Rows of the unitary, `N`.
    fn rows(&self) -> usize {
        1 << (self.data + self.extra)
    }

    /// Multiplications and additions for one matrix.
    pub fn operations(&self) -> u64 {
        let squared = (self.rows() * self.rows()) as u64;
        let turns = |gate: &&Gate| matches!(gate, Gate::Rotation(..));
        let turns = self.gates.iter().filter(turns).count() as u64;
        (6 * turns + 3) * squared
    }

    /// `W(φ)`, real and imaginary parts row by row.
    pub fn unitary(&self, angles: &[f64]) -> [Vec<f64>; 2] {
        let rows = self.rows();
        let mut state = State {
            rows,
            qubits: self.data + self.extra,
            parts: [(); 2].map(|()| vec![0.0; rows * rows]),
        };
        for row in 0..rows {
            state.parts[0][row * rows + row] = 1.0;
        }
        let share = 1.0 / self.steps as f64;
        for gate in &self.gates {
            state.apply(*gate, angles, share);
        }
        state.parts
    }

    /// `P(φ)`, row by row.
    fn probabilities(&self, [real, imaginary]: &[Vec<f64>; 2]) -> Vec<f64> {
        let (rows, tokens) = (self.rows(), self.tokens());
        let mut all = vec![0.0; tokens * tokens];
        let share = 1.0 / (1usize << self.extra) as f64;
        for (at, (re, im)) in real.iter().zip(imaginary).enumerate() {
            let (to, from) = ((at / rows) >> self.extra, (at % rows) >> self.extra);
            all[from * tokens + to] += share * (re * re + im * im);
        }
        all
    }

    /// The gradient of angles for that of `P`.
    fn backward(&self, angles: &[f64], gradient: &[f64]) -> Vec<f64> {
        let (rows, tokens) = (self.rows(), self.tokens());
        let qubits = self.data + self.extra;
        let parts = self.unitary(angles);
        let share = 2.0 / (1usize << self.extra) as f64;
        let weigh = |part: &Vec<f64>| -> Vec<f64> {
            let each = part.iter().enumerate().map(|(at, w)| {
                let (to, from) = ((at / rows) >> self.extra, (at % rows) >> self.extra);
                share * gradient[from * tokens + to] * w
            });
            each.collect()
        };
        let mut slopes = State {
            rows,
            qubits,
            parts: parts.each_ref().map(weigh),
        };
        let mut state = State {
            rows,
            qubits,
            parts,
        };
        let mut found = vec![0.0; self.angles];
        let part = 1.0 / self.steps as f64;
        for gate in self.gates.iter().rev() {
            if let Gate::Rotation(axis, qubit, angle) = *gate {
                found[angle] += part * state.turned(axis, qubit, &slopes);
            }
            state.apply(*gate, angles, -part);
            slopes.apply(*gate, angles, -part);
        }
        found
    }

    /// `P(φ)` `[batch, T, T]` of angles `[batch, angles]`; differentiable.
    ///
    /// # Errors
    /// For another number of angles.
    pub fn transitions(&self, angles: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let (batch, found) = angles.dims2()?;
        if found != self.angles {
            return Err(lapidary_kernels::Error::argument(
                "circuit",
                "number of angles",
                found,
                self.angles.to_string(),
            ));
        }
        let tokens = self.tokens();
        by_hand(Run(self.clone()), &[angles], &[batch, tokens, tokens])
    }
}

/// A circuit over a batch of angles.
struct Run(Circuit);

impl ByHand for Run {
    fn name(&self) -> &'static str {
        "circuit"
    }

    fn forward(&self, inputs: &[&[f64]]) -> Vec<f64> {
        let circuit = &self.0;
        let each = inputs[0].par_chunks(circuit.angles.max(1));
        each.flat_map_iter(|angles| circuit.probabilities(&circuit.unitary(angles)))
            .collect()
    }

    fn backward(&self, inputs: &[&[f64]], gradient: &[f64]) -> Vec<Vec<f64>> {
        let circuit = &self.0;
        let squared = circuit.tokens() * circuit.tokens();
        let each = inputs[0]
            .par_chunks(circuit.angles.max(1))
            .zip(gradient.par_chunks(squared));
        vec![
            each.flat_map_iter(|(angles, gradient)| circuit.backward(angles, gradient))
                .collect(),
        ]
    }
}

/// Amplitudes `[rows, rows]`, real and imaginary parts.
struct State {
    rows: usize,
    qubits: usize,
    parts: [Vec<f64>; 2],
}

impl State {
    /// How far apart rows are that differ in a qubit alone.
    fn stride(&self, qubit: usize) -> usize {
        1 << (self.qubits - 1 - qubit)
    }

    /// The rows that a qubit is 0 in.
    fn zeros(&self, qubit: usize) -> impl Iterator<Item = usize> + use<> {
        let stride = self.stride(qubit);
        (0..self.rows).filter(move |row| row & stride == 0)
    }

    /// Two rows of both parts, `[re₀, re₁, im₀, im₁]`, the first before the second.
    fn pair(&mut self, low: usize, high: usize) -> [&mut [f64]; 4] {
        let width = self.rows;
        let [real, imaginary] = &mut self.parts;
        let (re0, re1) = two(real, low, high, width);
        let (im0, im1) = two(imaginary, low, high, width);
        [re0, re1, im0, im1]
    }

    /// Applies a gate to the rows, its angle times `share`; the inverse where that is negative.
    fn apply(&mut self, gate: Gate, angles: &[f64], share: f64) {
        match gate {
            Gate::Not(control, target) => {
                let (control, target) = (self.stride(control), self.stride(target));
                for row in 0..self.rows {
                    if row & control != 0 && row & target == 0 {
                        let [re0, re1, im0, im1] = self.pair(row, row | target);
                        re0.swap_with_slice(re1);
                        im0.swap_with_slice(im1);
                    }
                }
            }
            Gate::Rotation(axis, qubit, angle) => {
                let (s, c) = (share * angles[angle] / 2.0).sin_cos();
                let stride = self.stride(qubit);
                for row in self.zeros(qubit) {
                    let rows = self.pair(row, row | stride);
                    rotate(axis, rows, c, s);
                }
            }
        }
    }

    /// `Re⟨Λ, −iσ/2 · W⟩`.
    fn turned(&self, axis: Axis, qubit: usize, slopes: &Self) -> f64 {
        let (stride, width) = (self.stride(qubit), self.rows);
        let [real, imaginary] = &self.parts;
        let [d_real, d_imaginary] = &slopes.parts;
        let dot = |a: &[f64], i: usize, b: &[f64], j: usize| -> f64 {
            let (a, b) = (&a[i * width..][..width], &b[j * width..][..width]);
            a.iter().zip(b).map(|(a, b)| a * b).sum()
        };
        let mut sum = 0.0;
        for low in self.zeros(qubit) {
            let high = low | stride;
            sum += match axis {
                // −iσ_x/2: (a + ib) of the other row becomes (b − ia) / 2.
                Axis::X => {
                    dot(d_real, low, imaginary, high) - dot(d_imaginary, low, real, high)
                        + dot(d_real, high, imaginary, low)
                        - dot(d_imaginary, high, real, low)
                }
                // −iσ_y/2: minus the other row half in the first, the other row half in the second.
                Axis::Y => {
                    dot(d_real, high, real, low) + dot(d_imaginary, high, imaginary, low)
                        - dot(d_real, low, real, high)
                        - dot(d_imaginary, low, imaginary, high)
                }
                // −iσ_z/2: (b − ia) / 2 in the first, (−b + ia) / 2 in the second.
                Axis::Z => {
                    dot(d_real, low, imaginary, low)
                        - dot(d_imaginary, low, real, low)
                        - dot(d_real, high, imaginary, high)
                        + dot(d_imaginary, high, real, high)
                }
            };
        }
        sum / 2.0
    }
}

/// Two rows of `width`, the first of which comes before the second.
fn two(part: &mut [f64], low: usize, high: usize, width: usize) -> (&mut [f64], &mut [f64]) {
    let (before, from) = part.split_at_mut(high * width);
    (
        &mut before[low * width..(low + 1) * width],
        &mut from[..width],
    )
}

/// `e^{−iφσ/2}` on two rows, `c` and `s` being cosine and sine of half the angle.
fn rotate(axis: Axis, [re0, re1, im0, im1]: [&mut [f64]; 4], c: f64, s: f64) {
    let rows = re0.iter_mut().zip(re1).zip(im0.iter_mut().zip(im1));
    match axis {
        Axis::X => rows.for_each(|((a, b), (x, y))| {
            let (p, q, r, t) = (*a, *b, *x, *y);
            (*a, *x) = (c * p + s * t, c * r - s * q);
            (*b, *y) = (c * q + s * r, c * t - s * p);
        }),
        Axis::Y => rows.for_each(|((a, b), (x, y))| {
            let (p, q, r, t) = (*a, *b, *x, *y);
            (*a, *x) = (c * p - s * q, c * r - s * t);
            (*b, *y) = (s * p + c * q, s * r + c * t);
        }),
        Axis::Z => rows.for_each(|((a, b), (x, y))| {
            let (p, q, r, t) = (*a, *b, *x, *y);
            (*a, *x) = (c * p + s * r, c * r - s * p);
            (*b, *y) = (c * q - s * t, c * t + s * q);
        }),
    }
}
