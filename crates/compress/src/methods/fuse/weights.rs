//! A parameter that takes in parameters of blocks that go.

use lapidary_kernels::{DType, Device, Tensor, Var};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::Result;
use crate::error::engine;
use serde::{Deserialize, Serialize};

/// How an entry of a matrix that goes is weighed before it is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    /// `P Q` of the rank of [`super::FuseSettings`].
    #[default]
    LowRank,
    /// One number for each output.
    Row,
    /// A number for each entry.
    Full,
}

/// A tensor that is learned; zero when it is made.
#[derive(Clone, Debug)]
enum Learned {
    /// `left · right`, `[output, rank]` and `[rank, input]`.
    Product { left: Var, right: Var },
    /// `[output, 1]`, for every input.
    Rows(Var),
    /// Every entry.
    Entries(Var),
}

impl Learned {
    /// A gate of the form of `like`; a vector has one for each entry.
    fn gate(kind: Gate, rank: usize, like: &Tensor, generator: &mut ChaCha8Rng) -> Result<Self> {
        match (kind, like.dims()) {
            (Gate::LowRank, &[output, input]) => {
                let sizes = [output, rank.clamp(1, output.min(input).max(1)), input];
                Self::product(sizes, like, generator)
            }
            (Gate::Row, &[output, _]) => Ok(Self::Rows(zeros(&[output, 1], like)?)),
            _ => Self::entries(like),
        }
    }

    /// `left` starts at zero and `right` uniform within `±1/√input` (He et al. 2015 with `a = √5`).
    fn product(
        [output, rank, input]: [usize; 3],
        like: &Tensor,
        generator: &mut ChaCha8Rng,
    ) -> Result<Self> {
        let bound = 1.0 / (input.max(1) as f64).sqrt();
        let drawn: Vec<f64> = (0..rank * input)
            .map(|_| generator.random_range(-bound..bound))
            .collect();
        let right = engine(Tensor::from_vec(drawn, (rank, input), &Device::Cpu))?;
        let right = engine(engine(right.to_dtype(like.dtype()))?.to_device(like.device()))?;
        Ok(Self::Product {
            left: zeros(&[output, rank], like)?,
            right: engine(Var::from_tensor(&right))?,
        })
    }

    fn entries(like: &Tensor) -> Result<Self> {
        Ok(Self::Entries(zeros(like.dims(), like)?))
    }

    /// What it stands for; `Rows` is broadcast by whoever uses it.
    fn value(&self) -> Result<Tensor> {
        match self {
            Self::Product { left, right } => engine(left.matmul(right)),
            Self::Rows(rows) => Ok(rows.as_tensor().clone()),
            Self::Entries(entries) => Ok(entries.as_tensor().clone()),
        }
    }

    fn variables(&self) -> Vec<Var> {
        match self {
            Self::Product { left, right } => vec![left.clone(), right.clone()],
            Self::Rows(only) | Self::Entries(only) => vec![only.clone()],
        }
    }
}

fn zeros(shape: &[usize], like: &Tensor) -> Result<Var> {
    engine(Var::zeros(shape, like.dtype(), like.device()))
}

/// A parameter of a survivor:
///
/// ```text
/// W_eff = W + B A + Σ_j (P_j Q_j) ⊙ W_f^{(j)}
/// ```
///
/// with `W` and every `W_f` fixed. Biases and the parameters of norms have a free correction in
/// place of `B A`; those of norms take nothing in.
#[derive(Clone, Debug)]
pub(super) struct Fused {
    fixed: Tensor,
    correction: Learned,
    taken: Vec<(Learned, Tensor)>,
}

impl Fused {
    /// A matrix with a correction of low rank.
    pub(super) fn matrix(weight: &Tensor, rank: usize, generator: &mut ChaCha8Rng) -> Result<Self> {
        Self::new(
            weight,
            Learned::gate(Gate::LowRank, rank, weight, generator)?,
        )
    }

    /// A bias, or a parameter of a norm.
    pub(super) fn free(value: &Tensor) -> Result<Self> {
        Self::new(value, Learned::entries(value)?)
    }

    fn new(fixed: &Tensor, correction: Learned) -> Result<Self> {
        Ok(Self {
            fixed: fixed.detach(),
            correction,
            taken: Vec::new(),
        })
    }

    /// Takes in what a block that goes has in the same place, `[output, input]` or `[output]`.
    pub(super) fn take_in(
        &mut self,
        gone: &Tensor,
        kind: Gate,
        rank: usize,
        generator: &mut ChaCha8Rng,
    ) -> Result<()> {
        let gate = Learned::gate(kind, rank, &self.fixed, generator)?;
        self.taken.push((gate, gone.detach()));
        Ok(())
    }

    /// `W_eff`, a function of the variables.
    pub(super) fn value(&self) -> Result<Tensor> {
        let mut value = engine(&self.fixed + self.correction.value()?)?;
        for (gate, gone) in &self.taken {
            let gated = engine(gate.value()?.broadcast_mul(gone))?;
            value = engine(value + gated)?;
        }
        Ok(value)
    }

    /// The variables of its gates.
    pub(super) fn gates(&self) -> Vec<Var> {
        let gates = self.taken.iter();
        gates.flat_map(|(gate, _)| gate.variables()).collect()
    }

    /// The variables of its correction.
    pub(super) fn corrections(&self) -> Vec<Var> {
        self.correction.variables()
    }
}

/// The type that is tuned in: that of the model where it is exact enough.
pub(super) fn working(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::golden;
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn fused_matrices_and_their_gradients_are_numpys() {
        let document = golden();
        let given = document.inside("fused");
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let mut fused = Fused::matrix(&given.matrix("own"), 2, &mut generator).unwrap();
        let gone = given.matrix("gone");
        fused
            .take_in(&gone, Gate::LowRank, 3, &mut generator)
            .unwrap();
        let variables = fused.corrections().into_iter().chain(fused.gates());
        let variables: Vec<Var> = variables.collect();
        for (variable, name) in variables.iter().zip(["b", "a", "p", "q"]) {
            variable.set(&given.matrix(name)).unwrap();
        }
        let value = fused.value().unwrap();
        close(&value, &document.matrix("effective"));
        let loss = (value * given.matrix("cotangent")).unwrap();
        let store = loss.sum_all().unwrap().backward().unwrap();
        for (variable, name) in variables.iter().skip(2).zip(["by_p", "by_q"]) {
            close(
                store.get(variable.as_tensor()).unwrap(),
                &document.matrix(name),
            );
        }
    }

    fn drawn(shape: &[usize], seed: u64) -> Tensor {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let count = shape.iter().product();
        let numbers: Vec<f64> = (0..count)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn close(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.dims(), expected.dims());
        for (a, b) in numbers(found).iter().zip(numbers(expected)) {
            assert!((a - b).abs() < 1e-7, "{a} {b}");
        }
    }

    fn fused(kind: Gate, rank: usize) -> (Fused, Tensor, Tensor) {
        let (own, gone) = (drawn(&[5, 4], 1), drawn(&[5, 4], 2));
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        let mut fused = Fused::matrix(&own, rank, &mut generator).unwrap();
        fused.take_in(&gone, kind, rank, &mut generator).unwrap();
        (fused, own, gone)
    }

    #[test]
    fn at_the_start_a_parameter_is_itself_bit_for_bit() {
        for kind in [Gate::LowRank, Gate::Row, Gate::Full] {
            let (fused, own, _) = fused(kind, 2);
            assert_eq!(numbers(&fused.value().unwrap()), numbers(&own));
        }
    }

    #[test]
    fn a_gate_of_ones_adds_the_matrix_that_goes() {
        let (fused, own, gone) = fused(Gate::LowRank, 1);
        let Learned::Product { left, right } = &fused.taken[0].0 else {
            panic!("{fused:?}");
        };
        left.set(&left.ones_like().unwrap()).unwrap();
        right.set(&right.ones_like().unwrap()).unwrap();
        close(&fused.value().unwrap(), &(own + gone).unwrap());
    }

    #[test]
    fn rank_one_represents_any_scaling_of_rows() {
        let scales = drawn(&[5, 1], 9);
        let (low, own, gone) = fused(Gate::LowRank, 1);
        let Learned::Product { left, right } = &low.taken[0].0 else {
            panic!("{low:?}");
        };
        left.set(&scales).unwrap();
        right.set(&right.ones_like().unwrap()).unwrap();
        let (rows, ..) = fused(Gate::Row, 1);
        rows.gates()[0].set(&scales).unwrap();
        let expected = (own + scales.broadcast_mul(&gone).unwrap()).unwrap();
        close(&low.value().unwrap(), &expected);
        close(&rows.value().unwrap(), &expected);
    }

    /// `L = Σ V ⊙ W_eff²` has `∂L/∂W_eff = 2 V ⊙ W_eff`; the gates' gradients are
    /// `(∂L/∂W_eff ⊙ W_f) Qᵀ` and `Pᵀ (∂L/∂W_eff ⊙ W_f)`, and central differences agree.
    #[test]
    fn gradients_of_gates_are_the_formula_and_central_differences() {
        let (fused, _, gone) = fused(Gate::LowRank, 3);
        let Learned::Product { left, right } = &fused.taken[0].0 else {
            panic!("{fused:?}");
        };
        left.set(&drawn(&[5, 3], 7)).unwrap();
        let weigh = drawn(&[5, 4], 8);
        let loss = || {
            let value = fused.value().unwrap();
            let squares = value.sqr().unwrap();
            (squares * &weigh).unwrap().sum_all().unwrap()
        };
        let store = loss().backward().unwrap();
        let outer = (fused.value().unwrap().detach() * 2.0).unwrap();
        let outer = ((outer * &weigh).unwrap() * &gone).unwrap();
        let (p, q) = (left.as_tensor().detach(), right.as_tensor().detach());
        close(
            store.get(left.as_tensor()).unwrap(),
            &outer.matmul(&q.t().unwrap()).unwrap(),
        );
        close(
            store.get(right.as_tensor()).unwrap(),
            &p.t().unwrap().matmul(&outer).unwrap(),
        );
        for variable in fused.gates().into_iter().chain(fused.corrections()) {
            let gradient = numbers(store.get(variable.as_tensor()).unwrap());
            // A variable's own values change in place, so they are copied first.
            let start = variable.as_tensor().copy().unwrap().detach();
            for (at, expected) in gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut entries = numbers(&start);
                    entries[at] += by;
                    let there = Tensor::from_vec(entries, start.dims(), &Device::Cpu).unwrap();
                    variable.set(&there).unwrap();
                    loss().to_scalar::<f64>().unwrap()
                };
                let found = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!((found - expected).abs() < 1e-7, "{found} {expected}");
            }
            variable.set(&start).unwrap();
        }
    }

    #[test]
    fn what_is_fixed_gets_no_gradient_and_does_not_move() {
        let own = Var::from_tensor(&drawn(&[5, 4], 1)).unwrap();
        let gone = Var::from_tensor(&drawn(&[5, 4], 2)).unwrap();
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        let mut fused = Fused::matrix(own.as_tensor(), 2, &mut generator).unwrap();
        fused
            .take_in(gone.as_tensor(), Gate::LowRank, 2, &mut generator)
            .unwrap();
        let loss = fused.value().unwrap().sqr().unwrap().sum_all().unwrap();
        let store = loss.backward().unwrap();
        assert!(store.get(own.as_tensor()).is_none());
        assert!(store.get(gone.as_tensor()).is_none());
        assert!(fused.gates().iter().all(|gate| store.get(gate).is_some()));
        assert_eq!(numbers(&fused.fixed), numbers(own.as_tensor()));
    }

    #[test]
    fn a_matrix_may_take_in_several_and_ranks_are_bounded_by_it() {
        let (mut fused, own, first) = fused(Gate::LowRank, 128);
        let second = drawn(&[5, 4], 4);
        let mut generator = ChaCha8Rng::seed_from_u64(5);
        fused
            .take_in(&second, Gate::Full, 128, &mut generator)
            .unwrap();
        let gates = fused.gates();
        let shapes: Vec<&[usize]> = gates.iter().map(|gate| gate.dims()).collect();
        assert_eq!(shapes, [&[5, 4][..], &[4, 4], &[5, 4]]);
        gates[0].set(&gates[0].ones_like().unwrap()).unwrap();
        gates[1]
            .set(&(gates[1].ones_like().unwrap() * 0.25).unwrap())
            .unwrap();
        gates[2]
            .set(&(gates[2].ones_like().unwrap() * 3.0).unwrap())
            .unwrap();
        let expected = ((own + first).unwrap() + (second * 3.0).unwrap()).unwrap();
        close(&fused.value().unwrap(), &expected);
    }
}
