//! Doubly stochastic attention (Born, Skogh, Rhrissorrakrai, Utro, Wagner, Sobczyk, Quantum Doubly
//! Stochastic Transformers, 2025, arXiv 2504.16275): the softmax over scores replaced by an operator
//! after which columns sum to one as rows do.
//!
//! ```text
//! A = Op(M),  M = Q Kᵀ  [query, key];   y = A V
//! ```
//!
//! * *Softmax*, and *NormSoftmax* `softmax(M / min(τ, σ(M)))` (Jiang et al., 2023): rows alone.
//! * *Sinkhorn*: rows and columns of `e^{scale · M}` are normalised in turns, an odd number of times, so
//!   that rows are exact and columns nearly so. One iteration is softmax (Sander et al., Sinkformers,
//!   arXiv 2110.11773).
//! * *QR*: `A = U ⊙ U` for `M = U R`. Scores without full rank, as those of heads narrower than the
//!   sequence is long, get normal noise of variance `10⁻⁷` first.
//! * *Circuit*: the angles of a quantum circuit are `φ = θ ⊙ tile(vec(M))`, and `A` what its qubits are
//!   measured as; see [`circuit`].
//!
//! With any of the last three the mean over tokens of `A V` is that of `V`: no token is lost sight of.
//! Every row depends on all tokens, so there is no causal form. Pads are left out of rows, columns,
//! statistics and ranks; a circuit, whose size is fixed, sees `10` on the diagonal for tokens that are
//! not there and gives them weight that no value takes up.
//!
//! [`diagnose`] says how far a matrix is from the doubly stochastic ones and [`birkhoff_projection`]
//! which of them is nearest; the operators alone are [`Operator::apply`].
//!
//! Cost for each head: `2 n² (head_width + value_width)` and `5 n²` (softmax), `15 n²` (NormSoftmax),
//! `(4 K + 3) n²` (Sinkhorn; `(2 K + 3) n²` naively), `4 n³` (QR), `6 N² (angles + ½)` (circuit, of `N`
//! rows). All but Sinkhorn by potentials lay the weights out; that one keeps a number for each row or column and
//! iteration, and makes the scores anew in each. Parameters: none, or one for each angle of a circuit that is
//! trained.

mod birkhoff;
pub mod circuit;
mod normalisers;
mod orthogonal;

pub use birkhoff::{Diagnosis, birkhoff_projection, diagnose};
pub use normalisers::{Over, SinkhornForm, Statistic};

use super::{Abilities, Describe, Heads, Mechanism, MechanismPass};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use circuit::Circuit;
use lapidary_kernels::{SinkhornOptions, Tensor, matmul, sinkhorn_attention};
use lapidary_signal::Mixing;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_ITERATIONS: usize = 10_001;
const MAX_QUBITS: usize = 10;
const MAX_LAYERS: usize = 256;
/// The score of a token that is not there with itself.
const ABSENT: f64 = 10.0;

/// Attention whose weights come from an operator on the scores.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DoublyStochasticSpec {
    /// What makes weights of scores.
    #[serde(default)]
    pub operator: Operator,
}

/// What makes weights of scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Operator {
    /// Rows that sum to one.
    #[serde(deserialize_with = "crate::fields::none")]
    Softmax,
    /// The same with a temperature that is at most a statistic of the scores.
    NormSoftmax {
        /// Which.
        #[serde(default)]
        statistic: Statistic,
        /// Of which scores.
        #[serde(default)]
        over: Over,
    },
    /// Rows and columns normalised in turns.
    Sinkhorn {
        /// How often; odd.
        #[serde(default = "three")]
        iterations: usize,
        /// How it is computed.
        #[serde(default)]
        form: SinkhornForm,
        /// What scores are divided by, beside the scale.
        #[serde(default = "one")]
        epsilon: f64,
    },
    /// The squares of an orthogonal factor.
    Qr {
        /// Seed of what is added to scores that have not full rank.
        #[serde(default)]
        seed: u64,
    },
    /// The outcomes of a quantum circuit.
    Circuit(CircuitSpec),
}

fn three() -> usize {
    3
}

fn one() -> f64 {
    1.0
}

impl Default for Operator {
    fn default() -> Self {
        Self::Sinkhorn {
            iterations: three(),
            form: SinkhornForm::default(),
            epsilon: one(),
        }
    }
}

/// A circuit and its angles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CircuitSpec {
    /// Most tokens of a sequence; the circuit has as many as the next power of two.
    pub tokens: usize,
    /// Qubits `n_w`, at least as many as it takes to number the tokens.
    pub qubits: usize,
    /// Layers of blocks, in each half where there are two; steps of Trotter's product.
    #[serde(default = "two")]
    pub layers: usize,
    /// What the layers are.
    #[serde(default)]
    pub ansatz: Ansatz,
    /// How `θ` is found.
    #[serde(default)]
    pub training: Training,
    /// Whether the gradient passes through the angles to queries and keys.
    #[serde(default = "yes")]
    pub grad_through: bool,
    /// Seed of `θ`, uniform in `[−1, 1]` at the start.
    #[serde(default)]
    pub seed: u64,
}

fn two() -> usize {
    2
}

fn yes() -> bool {
    true
}

/// How a circuit is put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Ansatz {
    /// One circuit.
    Simple,
    /// A circuit for each side of the entangled register, which act one after the other.
    #[default]
    Parted,
    /// One circuit whose matrix is the same seen from the other end.
    Centrosymmetric,
    /// Steps of the time that an Ising model takes, with the same angles in each.
    Trotter,
}

/// How the angles' factors `θ` are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Training {
    /// They stay as they were drawn.
    #[default]
    Static,
    /// By a search outside of back-propagation, which sets the parameter `shift` that is added to them.
    Mixed,
    /// By back-propagation into that parameter.
    Differentiable,
}

impl CircuitSpec {
    /// A circuit of so many qubits for sequences of so many tokens, and the defaults otherwise.
    pub fn new(tokens: usize, qubits: usize) -> Self {
        Self {
            tokens,
            qubits,
            layers: two(),
            ansatz: Ansatz::default(),
            training: Training::default(),
            grad_through: true,
            seed: 0,
        }
    }

    /// Qubits that number the tokens.
    fn data(&self) -> usize {
        self.tokens.max(1).next_power_of_two().ilog2() as usize
    }

    /// The circuit.
    pub fn circuit(&self) -> Circuit {
        let (data, layers) = (self.data(), self.layers);
        let extra = self.qubits.saturating_sub(data);
        match self.ansatz {
            Ansatz::Simple => Circuit::bricks(data, extra, layers),
            Ansatz::Parted => Circuit::bricks(data, extra, 2 * layers),
            Ansatz::Centrosymmetric => Circuit::centrosymmetric(data, extra, layers),
            Ansatz::Trotter => Circuit::trotter(data, extra, layers),
        }
    }

    /// `θ` as drawn.
    pub fn drawn(&self) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let angles = 0..self.circuit().angles();
        angles.map(|_| random.random_range(-1.0..1.0)).collect()
    }

    fn validate(&self, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        bounded(at("qubits"), self.qubits, 1..=MAX_QUBITS)?;
        bounded(at("tokens"), self.tokens, 2..=1 << self.qubits)?;
        bounded(at("layers"), self.layers, 0..=MAX_LAYERS)
    }
}

impl Operator {
    fn validate(&self, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        match self {
            Self::Sinkhorn {
                iterations,
                epsilon,
                ..
            } => {
                bounded(at("iterations"), *iterations, 1..=MAX_ITERATIONS)?;
                if iterations.is_multiple_of(2) {
                    let expected = "an odd number, so that rows are normalised last";
                    return Err(Error::spec(at("iterations"), iterations, expected));
                }
                if !(epsilon.is_finite() && *epsilon > 0.0) {
                    return Err(Error::spec(at("epsilon"), epsilon, "a positive number"));
                }
                Ok(())
            }
            Self::Circuit(circuit) => circuit.validate(field),
            Self::Softmax | Self::NormSoftmax { .. } | Self::Qr { .. } => Ok(()),
        }
    }

    /// Refuses a scale of which there is no temperature.
    fn validate_scale(&self, scale: f64, field: &str) -> Result<()> {
        if !matches!(self, Self::NormSoftmax { .. }) || scale > 0.0 {
            return Ok(());
        }
        let expected =
            "another operator where the scale is not positive: its inverse is the temperature";
        Err(Error::spec(
            format!("{field}.kind"),
            "norm-softmax",
            expected,
        ))
    }

    /// What the operator makes of raw scores `M` `[batch, heads, T, T]`, of that shape and
    /// differentiable: rows are queries. `scale` multiplies them where an operator has a temperature.
    /// `real` `[batch, 1, T, 1]` is 1 at real tokens and 0 at pads, whose rows and columns become zero.
    /// `theta` are the factors of a circuit's angles `[angles]`; as drawn when absent.
    ///
    /// # Errors
    /// For an operator or a scale that attention would refuse too, for scores that are not square, for more
    /// tokens than a circuit has, and for another number of factors than it has angles.
    pub fn apply(
        &self,
        scores: &Tensor,
        scale: f64,
        real: Option<&Tensor>,
        theta: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.validate("operator")?;
        self.validate_scale(scale, "operator")?;
        let (_, _, rows, columns) = tensor(scores.dims4())?;
        if rows != columns {
            let expected = "[batch, heads, T, T], as many queries as keys";
            return Err(Error::spec("shape of scores", scores.dims(), expected));
        }
        let scored = Scored {
            real: real.cloned(),
        };
        match self {
            Self::Softmax => normalisers::softmax(&tensor(scores * scale)?, &scored),
            Self::NormSoftmax { statistic, over } => {
                normalisers::norm_softmax(scores, &scored, scale, (*statistic, *over))
            }
            Self::Sinkhorn {
                iterations,
                form,
                epsilon,
            } => {
                let scores = tensor(scores * (scale / epsilon))?;
                normalisers::sinkhorn(&scores, &scored, *iterations, *form)
            }
            Self::Qr { seed } => orthogonal::squared(scores, &scored, *seed),
            Self::Circuit(spec) => spec.apply(scores, &scored, theta),
        }
    }

    /// Operations on the scores of a head of `n` tokens.
    fn operations(&self, n: usize) -> u64 {
        let squared = (n * n) as u64;
        match self {
            Self::Softmax => 5 * squared,
            Self::NormSoftmax { .. } => 15 * squared,
            Self::Sinkhorn {
                iterations, form, ..
            } => match form {
                SinkhornForm::Log => (4 * *iterations as u64 + 3) * squared,
                SinkhornForm::Naive => (2 * *iterations as u64 + 3) * squared,
            },
            Self::Qr { .. } => 4 * squared * n as u64,
            Self::Circuit(spec) => {
                let circuit = spec.circuit();
                circuit.angles() as u64 + circuit.operations()
            }
        }
    }
}

impl CircuitSpec {
    fn apply(&self, scores: &Tensor, scored: &Scored, theta: Option<&Tensor>) -> Result<Tensor> {
        let (batch, heads, tokens, _) = tensor(scores.dims4())?;
        if tokens > self.tokens {
            return Err(Error::spec(
                "number of tokens of a circuit",
                tokens,
                format!("at most {}, as its spec says", self.tokens),
            ));
        }
        let circuit = self.circuit();
        let scores = match self.grad_through {
            true => scores.clone(),
            false => scores.detach(),
        };
        let scores = scored.bordered(&scores, ABSENT)?;
        let missing = circuit.tokens() - tokens;
        let mut scores =
            tensor(tensor(scores.pad_with_zeros(3, 0, missing))?.pad_with_zeros(2, 0, missing))?;
        if missing > 0 {
            let size = circuit.tokens();
            let mut diagonal = vec![0f64; size * size];
            for token in tokens..size {
                diagonal[token * size + token] = ABSENT;
            }
            let shape = (1, 1, size, size);
            let diagonal = tensor(Tensor::from_vec(diagonal, shape, scores.device()))?;
            scores = tensor(scores.broadcast_add(&tensor(diagonal.to_dtype(scores.dtype()))?))?;
        }
        // φ = θ ⊙ tile(vec(M))
        let size = circuit.tokens();
        let each = tensor(scores.reshape((batch * heads, size * size)))?;
        let copies = circuit.angles().div_ceil(size * size);
        let tiled = tensor(Tensor::cat(&vec![&each; copies], 1))?;
        let tiled = tensor(tiled.narrow(1, 0, circuit.angles()))?;
        let theta = match theta {
            Some(theta) if theta.dims() != [circuit.angles()] => {
                let expected = format!("[{}], a factor for each angle", circuit.angles());
                return Err(Error::spec("shape of theta", theta.dims(), expected));
            }
            Some(theta) => theta.clone(),
            None => self.theta(&each)?,
        };
        let angles = tensor(tiled.broadcast_mul(&theta))?;
        let made = circuit.transitions(&angles)?;
        let made = tensor(made.reshape((batch, heads, size, size)))?;
        let made = tensor(tensor(made.narrow(2, 0, tokens))?.narrow(3, 0, tokens))?;
        scored.real(&tensor(made.contiguous())?)
    }

    /// `θ` as drawn, a tensor such as another.
    fn theta(&self, like: &Tensor) -> Result<Tensor> {
        let drawn = self.drawn();
        let count = drawn.len();
        let drawn = tensor(Tensor::from_vec(drawn, count, like.device()))?;
        tensor(drawn.to_dtype(like.dtype()))
    }
}

/// Which of the tokens that scores are of are real.
#[derive(Debug)]
struct Scored {
    /// `[batch, 1, T, 1]`, 1 at real ones.
    real: Option<Tensor>,
}

impl Scored {
    /// 1 for real columns, `[batch, 1, 1, T]`.
    fn columns(real: &Tensor) -> Result<Tensor> {
        tensor(tensor(real.transpose(2, 3))?.contiguous())
    }

    /// 1 at pairs of real tokens, of the shape of `like`.
    fn pairs(&self, like: &Tensor) -> Result<Tensor> {
        self.real(&tensor(like.ones_like())?)
    }

    /// `x` `[batch, heads, T, T]` with rows and columns of pads zero.
    fn real(&self, x: &Tensor) -> Result<Tensor> {
        let Some(real) = &self.real else {
            return Ok(x.clone());
        };
        let rows = tensor(x.broadcast_mul(real))?;
        tensor(rows.broadcast_mul(&Self::columns(real)?))
    }

    /// What belongs to rows (`side` 0, `[batch, heads, T, 1]`) or columns (1, `[batch, heads, 1, T]`), zero
    /// at pads.
    fn real_side(&self, x: &Tensor, side: usize) -> Result<Tensor> {
        match (&self.real, side) {
            (None, _) => Ok(x.clone()),
            (Some(real), 0) => tensor(x.broadcast_mul(real)),
            (Some(real), _) => tensor(x.broadcast_mul(&Self::columns(real)?)),
        }
    }

    /// Scores in which pairs with a pad are `hidden`.
    fn hidden(&self, scores: &Tensor, hidden: f64) -> Result<Tensor> {
        if self.real.is_none() {
            return Ok(scores.clone());
        }
        let added = tensor(self.pairs(scores)?.affine(-hidden, hidden))?;
        // What a pad's scores are must not matter, however large.
        tensor(self.real(scores)? + added)
    }

    /// Scores in which pads have `diagonal` with themselves and nothing with others.
    fn bordered(&self, scores: &Tensor, diagonal: f64) -> Result<Tensor> {
        let Some(real) = &self.real else {
            return Ok(scores.clone());
        };
        let size = scores.dims().last().copied().unwrap_or(0);
        let eye = tensor(Tensor::eye(size, scores.dtype(), scores.device()))?;
        let absent = tensor(tensor(real.affine(-1.0, 1.0))? * diagonal)?;
        let border = tensor(absent.broadcast_mul(&tensor(eye.reshape((1, 1, size, size)))?))?;
        tensor(self.real(scores)?.broadcast_add(&border))
    }
}

impl Describe for DoublyStochasticSpec {
    fn kind(&self) -> &'static str {
        "doubly-stochastic"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            bidirectional: true,
            ..Abilities::default()
        }
    }

    fn is_scaled(&self) -> bool {
        !matches!(self.operator, Operator::Qr { .. } | Operator::Circuit(_))
    }

    fn longest(&self) -> Option<(String, usize)> {
        match &self.operator {
            Operator::Circuit(circuit) => Some(("operator.tokens".to_owned(), circuit.tokens)),
            _ => None,
        }
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let field = format!("{field}.operator");
        self.operator.validate_scale(heads.scale, &field)?;
        self.operator.validate(&field)
    }

    fn build(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        let shift = match &self.operator {
            Operator::Circuit(circuit) if circuit.training != Training::Static => {
                let shape = [circuit.circuit().angles()];
                let shift = parameters.tensor("shift", &shape, Init::Zeros)?;
                Some(match circuit.training {
                    Training::Mixed => shift.detach(),
                    Training::Static | Training::Differentiable => shift,
                })
            }
            _ => None,
        };
        Ok(Box::new(DoublyStochastic {
            spec: self.clone(),
            scale: heads.scale,
            shift,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct DoublyStochastic {
    spec: DoublyStochasticSpec,
    scale: f64,
    /// What is added to the factors of a circuit's angles, where they are not those drawn.
    shift: Option<Tensor>,
}

impl DoublyStochastic {
    /// Factors of a circuit's angles, where they are not those drawn: of each pass anew, since training changes them.
    fn theta(&self) -> Result<Option<Tensor>> {
        match (&self.spec.operator, &self.shift) {
            (Operator::Circuit(circuit), Some(shift)) => {
                Ok(Some(tensor(circuit.theta(shift)? + shift)?))
            }
            _ => Ok(None),
        }
    }
}

impl Mechanism for DoublyStochastic {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let (queries, keys) = (tensor(q.dim(2))?, tensor(k.dim(2))?);
        if queries != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("{keys}, as many as keys"),
            ));
        }
        if let Operator::Sinkhorn {
            iterations,
            form: SinkhornForm::Log,
            epsilon,
        } = self.spec.operator
        {
            return Ok(Box::new(Balanced {
                q: q.clone(),
                k: k.clone(),
                options: SinkhornOptions {
                    scale: self.scale / epsilon,
                    iterations,
                    keep: pass.keep.cloned(),
                },
                before: self.spec.operator.operations(keys),
            }));
        }
        let scores = matmul(q, &tensor(k.transpose(2, 3))?)?;
        let real = pass.kept(q.dtype())?;
        let operator = &self.spec.operator;
        let theta = self.theta()?;
        let weights = operator.apply(&scores, self.scale, real.as_ref(), theta.as_ref())?;
        Ok(Box::new(Laid {
            weights,
            head_width: tensor(q.dim(3))?,
            before: operator.operations(keys),
        }))
    }
}

/// Multiplications and additions of weights of so many heads, whose operator takes `before` on the scores of
/// each, and of mixing by them.
fn operations(sizes: [usize; 4], widths: usize, before: u64) -> u64 {
    let [batch, heads, queries, keys] = sizes.map(|size| size as u64);
    batch * heads * (2 * queries * keys * widths as u64 + before)
}

/// Sinkhorn's weights, of which potentials alone are kept.
#[derive(Debug)]
struct Balanced {
    /// `[batch, heads, length, head_width]`.
    q: Tensor,
    k: Tensor,
    options: SinkhornOptions,
    /// Operations on the scores of one head.
    before: u64,
}

impl Mixing for Balanced {
    fn sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        sinkhorn_attention(&self.q, &self.k, values, &self.options)
    }

    fn operations(&self, width: usize) -> u64 {
        let head_width = self.q.dims().last().copied().unwrap_or(0);
        operations(self.sizes(), head_width + width, self.before)
    }
}

/// Weights that are laid out.
#[derive(Debug)]
struct Laid {
    /// `[batch, heads, query, key]`.
    weights: Tensor,
    head_width: usize,
    /// Operations on the scores of one head.
    before: u64,
}

impl Mixing for Laid {
    fn sizes(&self) -> [usize; 4] {
        match *self.weights.dims() {
            [batch, heads, queries, keys] => [batch, heads, queries, keys],
            _ => [0; 4],
        }
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        matmul(&self.weights, values)
    }

    fn weights(&self, _: &Tensor) -> lapidary_kernels::Result<Tensor> {
        Ok(self.weights.clone())
    }

    fn operations(&self, width: usize) -> u64 {
        operations(self.sizes(), self.head_width + width, self.before)
    }
}
