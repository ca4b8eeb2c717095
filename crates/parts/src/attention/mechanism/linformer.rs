//! Linformer (Wang et al., Linformer: Self-Attention with Linear Complexity, 2020, arXiv
//! 2006.04768): keys and values are projected along the sequence, from its length `n` to a fixed
//! number of slots `k`, so that the softmax has `n · k` weights.
//!
//! ```text
//! P = softmax(scale · Q (E K)ᵀ)                    [batch, heads, query, slot]
//! y = P (F V)                                      E, F: [slot, key]
//! ```
//!
//! `E` and `F` have a column for every position up to `longest`; a shorter input uses the first of
//! them, a longer one is refused, or has columns between them (`longer = "interpolate"`). What is padded is zeroed before it is projected, so that it never counts; a slot that sees
//! pads alone keeps the logit 0 and value 0. Every slot is made of all positions: there is no causal
//! form.
//!
//! Cost: `2 n k (head_width + value_width)` for the projections of a head and as much again, and
//! `5 n k`, for its softmax, where dense attention has `n` in place of `k`. Parameters:
//! `longest · k` for each matrix.

use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Subsets};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{AttentionOptions, Tensor, attention, matmul};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_LENGTH: usize = 1 << 24;
const MAX_SLOTS: usize = 1 << 16;

/// Attention over projected keys and values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinformerSpec {
    /// Slots `k` that keys and values are projected to.
    pub slots: usize,
    /// Positions that there are columns for.
    pub longest: usize,
    /// What becomes of longer inputs.
    #[serde(default, skip_serializing_if = "Longer::is_refused")]
    pub longer: Longer,
    /// Which projections are one and the same.
    #[serde(default)]
    pub sharing: Sharing,
    /// What the projections are.
    #[serde(default)]
    pub projection: Projection,
}

/// What becomes of inputs longer than the positions that there are columns for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Longer {
    /// They are refused.
    #[default]
    Refuse,
    /// The columns of a learned matrix are spread over them, with others in between by linear
    /// interpolation. No slot then gets more than it was made for: the columns' sum is kept.
    Interpolate,
}

impl Longer {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_refused(&self) -> bool {
        *self == Self::Refuse
    }
}

/// Which of the matrices `E` and `F` are one and the same.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// None: two for every head.
    None,
    /// One `E` and one `F` for the heads of a layer.
    #[default]
    Headwise,
    /// `E = F`, one for the heads of a layer.
    KeyValue,
    /// `E = F`, one for all layers that say so.
    Layerwise,
}

/// What projects along the sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// A learned matrix.
    #[default]
    Learned,
    /// The mean of `longest / slots` neighbours.
    Mean,
    /// A learned weighting of `longest / slots` neighbours, the same for every slot.
    Convolution,
}

impl LinformerSpec {
    fn neighbours(&self) -> usize {
        self.longest.div_ceil(self.slots.max(1))
    }
}

impl Describe for LinformerSpec {
    fn kind(&self) -> &'static str {
        "linformer"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            bidirectional: true,
            cross: true,
            ..Abilities::default()
        }
    }

    fn subsets(&self) -> Subsets {
        Subsets::AsPadding
    }

    fn validate(&self, _: &Heads, field: &str) -> Result<()> {
        bounded(format!("{field}.slots"), self.slots, 1..=MAX_SLOTS)?;
        bounded(format!("{field}.longest"), self.longest, 1..=MAX_LENGTH)?;
        if self.longer == Longer::Interpolate && self.projection != Projection::Learned {
            return Err(Error::spec(
                format!("{field}.longer"),
                "interpolate",
                "refuse, or projection = \"learned\", which has columns to interpolate",
            ));
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        let mut place = match self.sharing {
            Sharing::Layerwise => parameters.at_root("linformer"),
            Sharing::None | Sharing::Headwise | Sharing::KeyValue => parameters,
        };
        let (keys, values) = match self.sharing {
            Sharing::None | Sharing::Headwise => {
                let keys = self.matrix("keys", heads, &mut place)?;
                (keys, self.matrix("values", heads, &mut place)?)
            }
            Sharing::KeyValue | Sharing::Layerwise => {
                let both = self.matrix("both", heads, &mut place)?;
                (both.clone(), both)
            }
        };
        Ok(Box::new(Linformer {
            spec: self.clone(),
            scale: heads.scale,
            keys,
            values,
        }))
    }
}

impl LinformerSpec {
    /// `[heads or 1, slots, longest]`.
    fn matrix(&self, name: &str, heads: &Heads, parameters: &mut Parameters<'_>) -> Result<Along> {
        let heads = match self.sharing {
            Sharing::None => heads.heads,
            _ => 1,
        };
        // As deep in the sum as a mean, and as large in the mean square.
        let deviation = 1.0 / (self.longest as f64).sqrt();
        Ok(match self.projection {
            Projection::Learned => {
                let shape = [heads, self.slots, self.longest];
                Along::Matrix(parameters.tensor(name, &shape, Init::Normal { deviation })?)
            }
            Projection::Mean => Along::Windows(None),
            Projection::Convolution => {
                let neighbours = self.neighbours();
                let mean = Init::Constant(1.0 / neighbours as f64);
                Along::Windows(Some(parameters.tensor(name, &[heads, neighbours], mean)?))
            }
        })
    }
}

/// A projection along the sequence.
#[derive(Clone, Debug)]
enum Along {
    /// `[heads or 1, slots, longest]`.
    Matrix(Tensor),
    /// The same weights `[heads or 1, neighbours]` for the neighbours of each slot; equal ones when
    /// absent.
    Windows(Option<Tensor>),
}

/// The module.
#[derive(Debug)]
struct Linformer {
    spec: LinformerSpec,
    scale: f64,
    keys: Along,
    values: Along,
}

impl Mechanism for Linformer {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let (batch, heads, queries, _) = tensor(q.dims4())?;
        let keys = tensor(k.dim(2))?;
        if keys > self.spec.longest && self.spec.longer == Longer::Refuse {
            return Err(Error::spec(
                format!("number of tokens at {}", pass.path),
                keys,
                format!(
                    "at most {}, the positions that linformer's projections have columns for",
                    self.spec.longest
                ),
            ));
        }
        let keep = pass.kept(k.dtype())?;
        let along = |along: &Along, x: &Tensor| project(along, &self.spec, x, keep.as_ref());
        let projected = along(&self.keys, k)?;
        Ok(Box::new(Slots {
            sizes: [batch, heads, queries, keys],
            head_width: tensor(q.dim(3))?,
            q: q.clone(),
            keys: projected,
            values: self.values.clone(),
            spec: self.spec.clone(),
            keep,
            scale: self.scale,
        }))
    }
}

/// `E x` for `x` `[batch, heads, key, width]`, pads zeroed first: `[batch, heads, slot, width]`.
fn project(
    along: &Along,
    spec: &LinformerSpec,
    x: &Tensor,
    keep: Option<&Tensor>,
) -> lapidary_kernels::Result<Tensor> {
    let x = match keep {
        Some(keep) => x.broadcast_mul(keep)?,
        None => x.clone(),
    };
    let (batch, heads, keys, width) = x.dims4()?;
    match along {
        Along::Matrix(matrix) => {
            let matrix = columns(matrix, keys)?;
            if matrix.dim(0)? == 1 {
                // One matrix for all heads is one product for each sequence.
                let merged = x.transpose(1, 2)?.contiguous()?;
                let merged = merged.reshape((batch, keys, heads * width))?;
                let slots = matmul(&matrix, &merged)?;
                let slots = slots.reshape((batch, spec.slots, heads, width))?;
                return Ok(slots.transpose(1, 2)?.contiguous()?);
            }
            matmul(&matrix.unsqueeze(0)?, &x)
        }
        Along::Windows(weights) => {
            // Neighbours beyond the input count as zeros, as its columns would.
            let neighbours = spec.neighbours();
            let used = keys.div_ceil(neighbours);
            let x = x.pad_with_zeros(2, 0, used * neighbours - keys)?;
            let windows = x
                .contiguous()?
                .reshape((batch, heads, used, neighbours, width))?;
            let slots = match weights {
                None => windows.mean(3)?,
                Some(weights) => {
                    let heads = weights.dim(0)?;
                    let weights = weights.reshape((1, heads, 1, neighbours, 1))?;
                    windows.broadcast_mul(&weights)?.sum(3)?
                }
            };
            Ok(slots.pad_with_zeros(2, 0, spec.slots - used)?)
        }
    }
}

/// The columns of `matrix` `[heads, slots, longest]` for `keys` positions.
fn columns(matrix: &Tensor, keys: usize) -> lapidary_kernels::Result<Tensor> {
    let longest = matrix.dim(2)?;
    if keys <= longest {
        return Ok(matrix.narrow(2, 0, keys)?);
    }
    // Position `t` stands at `t (longest − 1) / (keys − 1)` between the columns.
    let step = (longest - 1) as f64 / (keys - 1) as f64;
    let (mut left, mut share) = (Vec::new(), Vec::new());
    for t in 0..keys {
        let place = t as f64 * step;
        let below = (place as usize).min(longest.saturating_sub(2));
        left.push(below as u32);
        share.push(place - below as f64);
    }
    let right = left.iter().map(|below| (below + 1).min(longest as u32 - 1));
    let right = Tensor::from_vec(right.collect::<Vec<_>>(), keys, matrix.device())?;
    let left = Tensor::from_vec(left, keys, matrix.device())?;
    let share = Tensor::from_vec(share, keys, matrix.device())?.to_dtype(matrix.dtype())?;
    let (left, right) = (
        matrix.contiguous()?.index_select(&left, 2)?,
        matrix.contiguous()?.index_select(&right, 2)?,
    );
    let between = (&left + (right - &left)?.broadcast_mul(&share)?)?;
    Ok((between * (longest as f64 / keys as f64))?)
}

/// `y = softmax(scale · Q (E K)ᵀ) F v`.
#[derive(Debug)]
struct Slots {
    sizes: [usize; 4],
    head_width: usize,
    q: Tensor,
    /// `E K`.
    keys: Tensor,
    values: Along,
    spec: LinformerSpec,
    keep: Option<Tensor>,
    scale: f64,
}

impl Mixing for Slots {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let projected = project(&self.values, &self.spec, values, self.keep.as_ref())?;
        let options = AttentionOptions {
            scale: self.scale,
            ..AttentionOptions::new(self.head_width)
        };
        attention(&self.q, &self.keys, &projected, &options)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, queries, keys] = self.sizes.map(|size| size as u64);
        let (slots, widths) = (self.spec.slots as u64, (self.head_width + width) as u64);
        // Windows meet each key once.
        let meets = match self.values {
            Along::Matrix(_) => slots,
            Along::Windows(_) => 1,
        };
        batch * heads * (2 * meets * keys * widths + queries * slots * (2 * widths + 5))
    }
}
