//! SOFT (Lu et al., SOFT: Softmax-free Transformer with Linear Complexity, 2021, arXiv 2110.11945; with
//! the normalisation of Lu et al., Softmax-free Linear Transformers, 2022, arXiv 2207.03341): a Gaussian
//! kernel of queries that are keys too, factored through a few landmarks.
//!
//! ```text
//! G(a, b) = exp(−‖a − b‖² / 2),     Q ← √scale · Q
//! P = G(Q, Q̃)  [query, landmark],   A = G(Q̃, Q̃),   D = diag(A 1)
//! y = P A† Pᵀ V,   normalised:  y = P D^{−1/2} A† D^{−1/2} Pᵀ V,   and beside it  w ∗ V
//! ```
//!
//! Landmarks `Q̃` are windows of queries under a learned map with layer norm and GELU, or their means
//! ([`Landmarks`]); with `columns` the sequence is an image row by row, and windows are squares of it. `A†`
//! is a regularised inverse by Newton's iteration ([`newton_inverse`]) whose gradient is that of an
//! inverse ([`regularised_inverse`]). Rows do not sum to 1. The normalisation bounds the spectral norm of the
//! middle, so that features do not grow where there are more tokens than in training. With `local`, a
//! filter of odd width for each head, the same for all its features, adds what is near.
//!
//! Squared distances are `‖a‖² + ‖b‖² − 2 a·b`, of points whose mean is taken away first, which changes none
//! of them but what rounding does.
//!
//! Pads have no row in `P`, are nothing in a window, and a window of pads alone is no landmark. Windows are
//! of places, so that padding to the left is another input; segments are of real tokens. There is no
//! causal form: every landmark's inverse depends on all of them. Where queries are normalised, their norm is
//! the one that counts.
//!
//! Cost of a head of `n` tokens and `m` landmarks: `(n m + m²)(2 head_width + 4)` for the kernels,
//! `steps (4 m³ + 2 m²)`, `5 m²` where it is normalised, `4 n m value_width + 2 m² value_width` for values,
//! and `(2 taps + 1) n value_width` for the filter; landmarks cost
//! `m (2 window head_width² + 11 head_width)`, or `n head_width` where they are means. Parameters:
//! `window head_width² + 2 head_width` for learned landmarks, `heads · taps` for filters.

mod inverse;
mod landmarks;

pub use inverse::{newton_inverse, regularised_inverse};
pub use landmarks::Landmarks;

use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, QueryKeySharing};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use landmarks::{Grid, Points, Pooling, like, odd};
use lapidary_kernels::{Tensor, gaussian, landmark_attention, local_filter};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_COLUMNS: usize = 1 << 16;
const MAX_TAPS: usize = 63;
const MAX_STEPS: usize = 100;
/// `α (‖A‖ + ε)² < 2` for every `A` with ones on its diagonal.
const MAX_EPSILON: f64 = 0.05;

/// Attention by a Gaussian kernel, factored through landmarks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SoftSpec {
    /// What landmarks are made from.
    pub landmarks: Landmarks,
    /// Tokens of a row where the sequence is an image, row by row; a line when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<usize>,
    /// Whether the middle is divided by the landmarks' degrees.
    #[serde(default = "yes")]
    pub normalised: bool,
    /// Width of the filter of each head, and on an image its height; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<usize>,
    /// Added to the diagonal of what is inverted.
    #[serde(default = "hundredth")]
    pub epsilon: f64,
    /// Steps of Newton's iteration.
    #[serde(default = "twenty")]
    pub steps: usize,
}

fn yes() -> bool {
    true
}

fn hundredth() -> f64 {
    0.01
}

fn twenty() -> usize {
    20
}

impl SoftSpec {
    /// Such landmarks, and the defaults otherwise.
    pub fn new(landmarks: Landmarks) -> Self {
        Self {
            landmarks,
            columns: None,
            normalised: true,
            local: None,
            epsilon: hundredth(),
            steps: twenty(),
        }
    }

    /// Entries of the filter of a head.
    fn taps(&self) -> usize {
        let side = self.local.unwrap_or(0);
        match self.columns {
            None => side,
            Some(_) => side * side,
        }
    }
}

impl Describe for SoftSpec {
    fn kind(&self) -> &'static str {
        "soft"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            bidirectional: true,
            ..Abilities::default()
        }
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if heads.sharing == QueryKeySharing::None {
            return Err(Error::spec(
                field,
                "soft with keys of their own",
                "one with sharing = \"query-key\" beside it: its kernel is of queries that are \
                 keys too",
            ));
        }
        if heads.scale.is_nan() || heads.scale <= 0.0 {
            let expected = "softmax where the scale is not positive: its root multiplies queries";
            return Err(Error::spec(at("kind"), "soft", expected));
        }
        self.landmarks.validate(&at("landmarks"))?;
        if let Some(columns) = self.columns {
            bounded(at("columns"), columns, 1..=MAX_COLUMNS)?;
        }
        if let Some(local) = self.local {
            odd(at("local"), local, MAX_TAPS)?;
        }
        let segments = matches!(self.landmarks, Landmarks::Segments { .. });
        if let (true, Some(columns), None) = (segments, self.columns, self.local) {
            let expected = "absent beside landmarks of segments, which are of a line, unless there is a local filter";
            return Err(Error::spec(at("columns"), columns, expected));
        }
        if !(0.0..=MAX_EPSILON).contains(&self.epsilon) {
            let expected =
                format!("between 0 and {MAX_EPSILON}, for which Newton's iteration converges");
            return Err(Error::spec(at("epsilon"), self.epsilon, expected));
        }
        bounded(at("steps"), self.steps, 1..=MAX_STEPS)
    }

    fn build(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        let pooling = Pooling::new(self, heads.head_width, parameters.at("landmarks"))?;
        let filters = match self.local {
            None => None,
            Some(side) => {
                let (line, image) = ([heads.heads, side], [heads.heads, side, side]);
                let shape = match self.columns {
                    None => &line[..],
                    Some(_) => &image[..],
                };
                let start = Init::Normal {
                    deviation: 1.0 / self.taps() as f64,
                };
                Some(parameters.tensor("local", shape, start)?)
            }
        };
        Ok(Box::new(Soft {
            spec: self.clone(),
            root: heads.scale.sqrt(),
            pooling,
            filters,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Soft {
    spec: SoftSpec,
    /// Of the attention's scale.
    root: f64,
    pooling: Pooling,
    /// `[heads, taps]`, or `[heads, taps, taps]`.
    filters: Option<Tensor>,
}

impl Mechanism for Soft {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let (batch, heads, length, width) = tensor(q.dims4())?;
        let keys = tensor(k.dim(2))?;
        if length != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                length,
                format!("{keys}, as keys, which soft's queries are"),
            ));
        }
        // exp(−‖√s a − √s b‖² / 2) = exp(−s ‖a − b‖² / 2), which spares the product with the root.
        let rate = 0.5 * self.root * self.root;
        let real = match pass.keep {
            None => None,
            Some(keep) => Some(real_tokens(keep)?),
        };
        let grid = Grid::new(&self.spec, length);
        let Points {
            points,
            kept: of_points,
            operations,
        } = self.pooling.points(q, self.root, real.as_deref(), grid)?;
        let count = tensor(points.dim(2))?;
        let (points, middle) = self.middle(points, of_points.as_ref(), rate)?;
        let normalising = if self.spec.normalised { 5 } else { 0 };
        let squares = count * count;
        let before = operations
            + (length * count + squares) * (2 * width + 4)
            + self.spec.steps * (4 * squares * count + 2 * squares)
            + normalising * squares;
        Ok(Box::new(Factored {
            sizes: [batch, heads, length, length],
            queries: q.clone(),
            points,
            rate,
            middle,
            near: self.filters.clone().map(|filters| Near { filters, grid }),
            kept: pass.keep.cloned(),
            before: (batch * heads * before) as u64,
            taps: self.spec.taps(),
        }))
    }
}

impl Soft {
    /// `M` for landmarks of which some may stand for no token, as `kept` `[batch, 1, landmark, 1]` says, and the
    /// landmarks, those of no token moved to where they change nothing.
    fn middle(&self, points: Tensor, kept: Option<&Tensor>, rate: f64) -> Result<(Tensor, Tensor)> {
        // No gradient passes through the centre: it changes nothing.
        let (points, centre) = match kept {
            None => {
                let centre = tensor(points.mean_keepdim(2))?.detach();
                (points, centre)
            }
            Some(kept) => {
                let points = tensor(points.broadcast_mul(kept))?;
                let total = tensor(tensor(kept.sum_keepdim(2))?.maximum(1.0))?;
                let centre = tensor(tensor(points.sum_keepdim(2))?.broadcast_div(&total))?.detach();
                let others = tensor(centre.broadcast_mul(&tensor(kept.affine(-1.0, 1.0))?))?;
                (tensor(points + others)?, centre)
            }
        };
        let apart = tensor(points.broadcast_sub(&centre))?;
        let mut inner = gaussian(&apart, &apart, &like(vec![rate], (1, 1), &apart)?)?;
        let mut both = None;
        if let Some(kept) = kept {
            // A landmark of nothing is apart from all others, and at no distance from itself.
            let across = tensor(tensor(kept.transpose(2, 3))?.contiguous())?;
            let each = tensor(kept.broadcast_mul(&across))?;
            let count = tensor(points.dim(2))?;
            let identity = tensor(Tensor::eye(count, points.dtype(), points.device()))?;
            let alone = tensor(identity.broadcast_mul(&tensor(kept.affine(-1.0, 1.0))?))?;
            inner = tensor(inner.broadcast_mul(&each))?;
            inner = tensor(inner.broadcast_add(&alone))?;
            both = Some(each);
        }
        let mut middle = regularised_inverse(&inner, self.spec.epsilon, self.spec.steps)?;
        if self.spec.normalised {
            let degrees = tensor(tensor(inner.sum_keepdim(3))?.sqrt())?;
            let other = tensor(tensor(degrees.transpose(2, 3))?.contiguous())?;
            middle = tensor(middle.broadcast_div(&degrees))?;
            middle = tensor(middle.broadcast_div(&other))?;
        }
        if let Some(both) = &both {
            middle = tensor(middle.broadcast_mul(both))?;
        }
        Ok((points, middle))
    }
}

/// Which tokens of each sequence are real, by a mask `[batch, key]` in `u8`.
fn real_tokens(keep: &Tensor) -> Result<Vec<Vec<bool>>> {
    let keep = tensor(keep.to_vec2::<u8>())?;
    let real = |sequence: Vec<u8>| sequence.into_iter().map(|keep| keep != 0).collect();
    Ok(keep.into_iter().map(real).collect())
}

/// The filters of heads, and how tokens lie.
#[derive(Debug)]
struct Near {
    filters: Tensor,
    grid: Grid,
}

impl Near {
    /// Every feature of a head under the head's filter, for `x` `[batch, heads, length, width]`.
    fn filter(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        match self.grid.is_line {
            true => local_filter(x, &self.filters.unsqueeze(1)?, self.grid.columns),
            false => local_filter(x, &self.filters, self.grid.columns),
        }
    }
}

/// `y = P M Pᵀ v + w ∗ v`.
#[derive(Debug)]
struct Factored {
    sizes: [usize; 4],
    /// Queries and landmarks, whose kernel is `P`.
    queries: Tensor,
    points: Tensor,
    /// What squared distances are multiplied by.
    rate: f64,
    /// `M` `[batch, heads, landmark, landmark]`.
    middle: Tensor,
    near: Option<Near>,
    /// `[batch, key]` in `u8`.
    kept: Option<Tensor>,
    before: u64,
    taps: usize,
}

impl Mixing for Factored {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let y = landmark_attention(
            &self.queries,
            &self.points,
            &self.middle,
            values,
            self.rate,
            self.kept.as_ref(),
        )?;
        match &self.near {
            None => Ok(y),
            Some(near) => {
                let near = match &self.kept {
                    None => near.filter(values)?,
                    Some(kept) => {
                        let kept = kept.unsqueeze(1)?.unsqueeze(3)?.to_dtype(values.dtype())?;
                        near.filter(&values.broadcast_mul(&kept)?)?
                    }
                };
                Ok((y + near)?)
            }
        }
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes;
        let count = self.middle.dims().last().copied().unwrap_or(0);
        let near = match &self.near {
            None => 0,
            Some(_) => (2 * self.taps + 1) * length,
        };
        let each = 4 * length * count + 2 * count * count + near;
        self.before + (batch * heads * each * width) as u64
    }
}
