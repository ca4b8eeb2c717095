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
//! them, a longer one is refused, or has columns between them (`longer = "interpolate"`). What is padded is
//! zeroed before it is projected, so that it never counts; a slot that sees pads alone keeps the logit 0
//! and value 0. Every slot is made of all positions: there is no causal form.
//!
//! Heads may have different numbers of slots: the spectrum of attention falls faster in some than in others,
//! and in higher layers. Rows of a matrix that they share are then theirs from the first on.
//!
//! The largest entries of windows stand in for keys alone (`projection = "max"`), since values are mixed
//! by weights that are the same for all their features: theirs is the mean of the window.
//!
//! Where heads share the projections, tokens may be projected in the place of keys and values (`project = "tokens"`,
//! `tokens.rs`), which gives the same at the cost of `k` rows in the layers of keys and values.
//!
//! Whoever looks finds `P F` at the site `weights`, as of any attention; `P` at `slot_weights`, zero behind
//! a head's own slots; and `P E` at `key_weights`, where `E` is linear.
//!
//! Cost: `2 n k (head_width + value_width)` for the projections of a head and as much again, and
//! `5 n k`, for its softmax, where dense attention has `n` in place of `k`. Parameters:
//! `longest · k` for each matrix.

mod side;
mod tokens;

use super::{
    Abilities, Describe, Heads, Mechanism, MechanismPass, QueryKeySharing, Shortening, Subsets,
};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{AttentionOptions, SoftmaxMask, Tensor, attention, matmul, softmax};
use lapidary_signal::{Mixing, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use side::{Along, Counted, Side, neighbours};

const MAX_LENGTH: usize = 1 << 24;
const MAX_SLOTS: usize = 1 << 16;

/// Attention over projected keys and values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinformerSpec {
    /// Slots `k` that keys and values are projected to.
    pub slots: usize,
    /// Slots of each head, none of them more than `slots`, where heads differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slots_by_head: Vec<usize>,
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
    /// What is projected.
    #[serde(default, skip_serializing_if = "Project::is_keys")]
    pub project: Project,
}

/// What is projected along the sequence. Both give the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Project {
    /// Keys and values, `E (X W)`.
    #[default]
    Keys,
    /// The tokens that they are made of, `(E X) W`, where heads share the projections: layers of keys and values then see
    /// slots in the place of tokens.
    Tokens,
}

impl Project {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_keys(&self) -> bool {
        *self == Self::Keys
    }
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
    /// The largest of `longest / slots` neighbours, feature by feature, as the key; their mean as
    /// the value, since weights are the same for all features of a value.
    Max,
    /// A learned weighting of `longest / slots` neighbours, the same for every slot.
    Convolution,
}

impl LinformerSpec {
    /// One learned matrix of `slots` rows each for keys and for values, shared by the heads of a layer.
    pub fn new(slots: usize, longest: usize) -> Self {
        Self {
            slots,
            slots_by_head: Vec::new(),
            longest,
            longer: Longer::default(),
            sharing: Sharing::default(),
            projection: Projection::default(),
            project: Project::default(),
        }
    }

    fn validate_project(&self, heads: &Heads, field: &str) -> Result<()> {
        if self.project == Project::Keys {
            return Ok(());
        }
        let obstacle = if self.sharing == Sharing::None {
            "projections of each head: tokens are projected once for all of them"
        } else if self.projection == Projection::Max {
            "projection = \"max\": the largest entries of keys are not those of tokens"
        } else if !self.slots_by_head.is_empty() && self.projection != Projection::Learned {
            "windows of different lengths: tokens are projected once for all heads"
        } else if heads.sharing != QueryKeySharing::None {
            "queries that are keys: queries are made of all tokens"
        } else {
            return Ok(());
        };
        let expected = format!("keys beside {obstacle}");
        Err(Error::spec(format!("{field}.project"), "tokens", expected))
    }

    /// Heads side by side that have as many slots: how many heads, and slots.
    fn runs(&self, heads: usize) -> Vec<(usize, usize)> {
        if self.slots_by_head.is_empty() {
            return vec![(heads, self.slots)];
        }
        let alike = self.slots_by_head.chunk_by(|a, b| a == b);
        alike
            .filter_map(|run| Some((run.len(), *run.first()?)))
            .collect()
    }

    fn validate_slots_by_head(&self, heads: usize, field: &str) -> Result<()> {
        if self.slots_by_head.is_empty() {
            return Ok(());
        }
        let field = format!("{field}.slots_by_head");
        if self.slots_by_head.len() != heads {
            let found = self.slots_by_head.len();
            let expected = format!("{heads}, one number for each head");
            return Err(Error::spec(format!("number of {field}"), found, expected));
        }
        for (head, slots) in self.slots_by_head.iter().enumerate() {
            bounded(format!("{field}[{head}]"), *slots, 1..=self.slots)?;
        }
        if self.projection == Projection::Convolution && self.sharing != Sharing::None {
            let expected = "absent, or beside sharing = \"none\": windows of different lengths have no \
                            weights in common";
            return Err(Error::spec(field, "given", expected));
        }
        Ok(())
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

    fn longest(&self) -> Option<(String, usize)> {
        let refuses = self.longer == Longer::Refuse;
        refuses.then(|| ("longest".to_owned(), self.longest))
    }

    fn reads_tokens(&self) -> bool {
        self.project == Project::Tokens
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        bounded(format!("{field}.slots"), self.slots, 1..=MAX_SLOTS)?;
        self.validate_slots_by_head(heads.heads, field)?;
        self.validate_project(heads, field)?;
        bounded(format!("{field}.longest"), self.longest, 1..=MAX_LENGTH)?;
        let learned = matches!(
            self.projection,
            Projection::Learned | Projection::Convolution
        );
        if !learned && self.sharing != Sharing::default() {
            return Err(Error::spec(
                format!("{field}.sharing"),
                "given",
                "headwise beside projection = \"mean\" or \"max\", which learn nothing that could be shared",
            ));
        }
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
                let keys = self.projections("keys", heads, &mut place)?;
                (keys, self.projections("values", heads, &mut place)?)
            }
            Sharing::KeyValue | Sharing::Layerwise => {
                let both = self.projections("both", heads, &mut place)?;
                (both.clone(), both)
            }
        };
        let mut first = 0;
        let runs = self.runs(heads.heads).into_iter().zip(keys).zip(values);
        let runs = runs.map(|(((heads, slots), keys), values)| {
            first += heads;
            let side = |along| Side {
                along,
                slots,
                longest: self.longest,
            };
            Run {
                first: first - heads,
                heads,
                keys: side(keys),
                values: side(match self.projection {
                    Projection::Max => Along::Windows(None),
                    _ => values,
                }),
            }
        });
        Ok(Box::new(Linformer {
            spec: self.clone(),
            scale: heads.scale,
            runs: runs.collect(),
        }))
    }
}

impl LinformerSpec {
    /// The projection of each run of heads, from one parameter: `[heads or 1, slots, longest]` for
    /// matrices and `[heads or 1, neighbours]` for windows, or, where each head has its own and their
    /// numbers differ, all rows `[rows, longest]`, or weights, one behind the other.
    fn projections(
        &self,
        name: &str,
        heads: &Heads,
        parameters: &mut Parameters<'_>,
    ) -> Result<Vec<Along>> {
        let runs = self.runs(heads.heads);
        let own = self.sharing == Sharing::None;
        let each = if own { heads.heads } else { 1 };
        let differ = !self.slots_by_head.is_empty();
        match self.projection {
            Projection::Mean => Ok(vec![Along::Windows(None); runs.len()]),
            Projection::Max => Ok(vec![Along::Largest; runs.len()]),
            Projection::Learned => {
                // As deep in the sum as a mean, and as large in the mean square.
                let deviation = 1.0 / (self.longest as f64).sqrt();
                let start = Init::Normal { deviation };
                if own && differ {
                    let rows: usize = self.slots_by_head.iter().sum();
                    let all = parameters.tensor(name, &[rows, self.longest], start)?;
                    let parts = parted(&all, runs, |slots| slots)?.into_iter();
                    return Ok(parts.map(Along::Matrix).collect());
                }
                let shape = [each, self.slots, self.longest];
                let all = parameters.tensor(name, &shape, start)?;
                runs.into_iter()
                    .map(|(_, slots)| Ok(Along::Matrix(tensor(all.narrow(1, 0, slots))?)))
                    .collect()
            }
            Projection::Convolution => {
                let window = |slots| neighbours(self.longest, slots);
                if differ {
                    let each = self.slots_by_head.iter().map(|slots| window(*slots));
                    let weights: usize = each.sum();
                    // Near the mean of each window.
                    let mean = Init::Constant(self.slots as f64 / self.longest as f64);
                    let all = parameters.tensor(name, &[weights], mean)?;
                    let parts = parted(&all, runs, window)?.into_iter();
                    return Ok(parts.map(|part| Along::Windows(Some(part))).collect());
                }
                let count = window(self.slots);
                let mean = Init::Constant(1.0 / count as f64);
                let weights = parameters.tensor(name, &[each, count], mean)?;
                Ok(vec![Along::Windows(Some(weights))])
            }
        }
    }
}

/// `all` `[rows, ..]`, of which each head of a run has `each(slots)`, as one tensor
/// `[heads, rows of a head, ..]` for every run.
fn parted(
    all: &Tensor,
    runs: Vec<(usize, usize)>,
    each: impl Fn(usize) -> usize,
) -> Result<Vec<Tensor>> {
    let mut first = 0;
    let parts = runs.into_iter().map(|(heads, slots)| {
        let rows = each(slots);
        let part = tensor(all.narrow(0, first, heads * rows))?;
        first += heads * rows;
        let mut shape = vec![heads, rows];
        shape.extend(all.dims().iter().skip(1));
        tensor(part.reshape(shape))
    });
    parts.collect()
}

/// Heads side by side that have as many slots.
#[derive(Clone, Debug)]
struct Run {
    first: usize,
    heads: usize,
    keys: Side,
    values: Side,
}

impl Run {
    /// Those of `x` `[batch, heads, ..]`.
    fn of(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        Ok(x.narrow(1, self.first, self.heads)?)
    }
}

/// The module.
#[derive(Debug)]
struct Linformer {
    spec: LinformerSpec,
    scale: f64,
    runs: Vec<Run>,
}

impl Mechanism for Linformer {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        self.among(q, k, Counted::real(pass.keep), pass)
    }

    fn mixing_of_drawn(
        &self,
        q: &Tensor,
        k: &Tensor,
        drawn: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        self.among(q, k, Counted::drawn(drawn, pass.keep)?, pass)
    }

    fn shortening(
        &self,
        tokens: [usize; 2],
        pass: &MechanismPass<'_>,
    ) -> Result<Option<Shortening>> {
        if self.spec.project == Project::Keys {
            return Ok(None);
        }
        self.check_length(tokens[1], pass)?;
        Ok(self.projections(tokens, pass.keep))
    }

    fn mixing_of_rows(
        &self,
        q: &Tensor,
        k: &Tensor,
        _: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        Ok(Box::new(self.over_slots(q, k)?))
    }
}

impl Linformer {
    /// The mixing of values of the keys that count.
    fn among(
        &self,
        q: &Tensor,
        k: &Tensor,
        counted: Counted,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let (batch, heads, queries, _) = tensor(q.dims4())?;
        let keys = tensor(k.dim(2))?;
        self.check_length(keys, pass)?;
        let met = self.runs.iter().map(|run| {
            Ok(Met {
                run: run.clone(),
                q: run.of(q)?,
                keys: run.keys.project(&run.of(k)?, &counted)?,
            })
        });
        let slots = Slots {
            sizes: [batch, heads, queries, keys],
            head_width: tensor(q.dim(3))?,
            met: met.collect::<Result<_>>()?,
            most: self.spec.slots,
            counted,
            scale: self.scale,
        };
        slots.show(pass)?;
        Ok(Box::new(slots))
    }

    fn check_length(&self, keys: usize, pass: &MechanismPass<'_>) -> Result<()> {
        if keys <= self.spec.longest || self.spec.longer == Longer::Interpolate {
            return Ok(());
        }
        Err(Error::spec(
            format!("number of tokens at {}", pass.path),
            keys,
            format!(
                "at most {}, the positions that linformer's projections have columns for",
                self.spec.longest
            ),
        ))
    }
}

/// Queries of a run of heads, and the keys that they meet.
#[derive(Debug)]
struct Met {
    run: Run,
    q: Tensor,
    /// `E K`.
    keys: Tensor,
}

/// `softmax(scale · Q (E K)ᵀ)` of each run of heads, over the values of slots that it is given, side by side.
fn side_by_side(
    met: &[Met],
    head_width: usize,
    scale: f64,
    values_of: impl Fn(&Run) -> lapidary_kernels::Result<Tensor>,
) -> lapidary_kernels::Result<Tensor> {
    let options = AttentionOptions {
        scale,
        ..AttentionOptions::new(head_width)
    };
    let each = met
        .iter()
        .map(|Met { run, q, keys }| attention(q, keys, &values_of(run)?, &options));
    let each = each.collect::<lapidary_kernels::Result<Vec<_>>>()?;
    match each.as_slice() {
        [all] => Ok(all.clone()),
        runs => Ok(Tensor::cat(runs, 1)?),
    }
}

/// `y = softmax(scale · Q (E K)ᵀ) F v`.
#[derive(Debug)]
struct Slots {
    sizes: [usize; 4],
    head_width: usize,
    met: Vec<Met>,
    /// Slots of the head that has the most.
    most: usize,
    counted: Counted,
    scale: f64,
}

impl Slots {
    /// Writes `P` and `P E` where somebody looks.
    fn show(&self, pass: &MechanismPass<'_>) -> Result<()> {
        let trace = pass.context.trace;
        let site = format_args!("{}.slot_weights", pass.path);
        if trace.wants(site) {
            let weights = self.laid_out(|met, weights| {
                let behind = self.most.saturating_sub(met.run.keys.slots);
                Ok(weights.pad_with_zeros(3, 0, behind)?)
            })?;
            trace.site(site, Signal::from(weights))?;
        }
        let linear = |met: &Met| !matches!(met.run.keys.along, Along::Largest);
        let site = format_args!("{}.key_weights", pass.path);
        if trace.wants(site) && self.met.iter().all(linear) {
            let weights = self.laid_out(|met, weights| {
                let [batch, _, _, keys] = self.sizes;
                let units = Tensor::eye(keys, weights.dtype(), weights.device())?;
                let units = units.broadcast_as((batch, met.run.heads, keys, keys))?;
                let projection = &met.run.keys;
                matmul(weights, &projection.project(&units, &self.counted)?)
            })?;
            trace.site(site, Signal::from(weights))?;
        }
        Ok(())
    }

    /// What `of` makes of `P` `[batch, heads, query, slot]` of each run of heads, side by side.
    fn laid_out(
        &self,
        of: impl Fn(&Met, &Tensor) -> lapidary_kernels::Result<Tensor>,
    ) -> Result<Tensor> {
        let each = self.met.iter().map(|met| {
            let scores = matmul(&met.q, &met.keys.transpose(2, 3)?)?;
            let weights = softmax(&(scores * self.scale)?, &SoftmaxMask::default())?;
            of(met, &weights)
        });
        let each = each.collect::<lapidary_kernels::Result<Vec<_>>>()?;
        tensor(Tensor::cat(&each, 1))
    }
}

impl Mixing for Slots {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        side_by_side(&self.met, self.head_width, self.scale, |run| {
            run.values.project(&run.of(values)?, &self.counted)
        })
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, _, queries, keys] = self.sizes.map(|size| size as u64);
        let widths = (self.head_width + width) as u64;
        let each = self.met.iter().map(|met| {
            let slots = met.run.values.slots as u64;
            let meets = met.run.values.meets() as u64;
            let one = 2 * meets * keys * widths + queries * slots * (2 * widths + 5);
            met.run.heads as u64 * one
        });
        batch * each.sum::<u64>()
    }
}
