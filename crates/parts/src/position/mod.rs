//! Positions inside attention: queries and keys that turn ([`rotary`]), and biases of the scores, by
//! distance (ALiBi, T5's buckets, Kerple, Sandwich) or by distance relative to the query's position
//! ([`fire`]).
//!
//! Biases by distance are held as such, a number for each head and distance, and never laid out for the
//! pairs of queries and keys where attention is fused ([`ScoreBias::ByDistance`]), and FIRE's beyond its
//! length as a function of one number for each pair ([`ScoreBias::Functional`]); those of positions that are
//! drawn are laid out. Positions that are added to the embeddings (learned, sinusoidal) belong to the
//! model's input.

mod distance;
pub mod fire;
pub mod rotary;
mod shared;

pub use fire::FireSpec;
pub use rotary::{KeptPairs, Rotary, RotaryScaling, RotarySpec};
pub use shared::SharedBiases;

use crate::dropout::seed_of_site;
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use distance::{
    Kerple, alibi_slopes, both_ways, bucket, column, distances, kerple, rows_of, sandwich,
};
use fire::Fire;
use lapidary_kernels::{DType, Device, ScoreBias, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How attention scores know about positions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PositionSpec {
    /// They do not.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    None,
    /// Queries and keys are rotated by their positions (Su et al., arXiv 2104.09864).
    Rotary(RotarySpec),
    /// A penalty proportional to the distance, with one slope per head (Press et al., arXiv
    /// 2108.12409). Bidirectional attention uses the absolute distance.
    #[serde(deserialize_with = "crate::fields::none")]
    Alibi,
    /// A learned bias per head and distance bucket (Raffel et al., arXiv 1910.10683).
    RelativeBuckets {
        /// Number of buckets.
        #[serde(default = "default_buckets")]
        buckets: usize,
        /// Distances from here on share the last bucket.
        #[serde(default = "default_max_distance")]
        max_distance: usize,
    },
    /// A learned logarithmic penalty of the distance (Chi et al., Kerple, arXiv 2205.09921).
    #[serde(deserialize_with = "crate::fields::none")]
    KerpleLogarithmic,
    /// A learned power of the distance as its penalty (the same).
    #[serde(deserialize_with = "crate::fields::none")]
    KerplePower,
    /// The product of two sinusoidal embeddings (Chi et al., Sandwich, arXiv 2212.10356).
    Sandwich {
        /// Width of the embeddings.
        #[serde(default = "default_sandwich")]
        width: usize,
    },
    /// A small network of the distance relative to the query's position (Li et al., FIRE, arXiv
    /// 2310.04418).
    Fire(FireSpec),
}

const MAX_BUCKETS: usize = 1 << 12;
const MAX_SANDWICH: usize = 1 << 16;

impl PositionSpec {
    /// Whether it adds to the scores.
    pub fn is_bias(&self) -> bool {
        !matches!(self, Self::None | Self::Rotary(_))
    }

    /// How queries and keys turn, if they do.
    pub fn rotary(&self) -> Option<&RotarySpec> {
        match self {
            Self::Rotary(rotary) => Some(rotary),
            Self::Fire(fire) => fire.rotary.as_ref(),
            _ => None,
        }
    }

    /// As [`PositionSpec::rotary`], to be changed.
    pub fn rotary_mut(&mut self) -> Option<&mut RotarySpec> {
        match self {
            Self::Rotary(rotary) => Some(rotary),
            Self::Fire(fire) => fire.rotary.as_mut(),
            _ => None,
        }
    }

    /// Refuses what cannot be built for `groups` groups of keys of `head_width`.
    ///
    /// # Errors
    /// Names the field, what it is and what it could be.
    pub fn validate(
        &self,
        groups: usize,
        head_width: usize,
        causal: bool,
        field: &str,
    ) -> Result<()> {
        match self {
            Self::None | Self::Alibi | Self::KerpleLogarithmic | Self::KerplePower => Ok(()),
            Self::Rotary(rotary) => rotary.validate(head_width, groups, field),
            Self::Sandwich { width } => bounded(format!("{field}.width"), *width, 2..=MAX_SANDWICH),
            Self::Fire(fire) => fire.validate(groups, head_width, field),
            Self::RelativeBuckets {
                buckets,
                max_distance,
            } => {
                let least = if causal { 2 } else { 4 };
                bounded(format!("{field}.buckets"), *buckets, least..=MAX_BUCKETS)?;
                let exact = if causal { buckets / 2 } else { buckets / 4 };
                if *max_distance <= exact {
                    return Err(Error::spec(
                        format!("{field}.max_distance"),
                        max_distance,
                        format!("above {exact}, the distances that have a bucket of their own"),
                    ));
                }
                Ok(())
            }
        }
    }

    /// The kind's name in a spec.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Rotary(_) => "rotary",
            Self::Alibi => "alibi",
            Self::RelativeBuckets { .. } => "relative-buckets",
            Self::KerpleLogarithmic => "kerple-logarithmic",
            Self::KerplePower => "kerple-power",
            Self::Sandwich { .. } => "sandwich",
            Self::Fire(_) => "fire",
        }
    }
}

fn default_buckets() -> usize {
    32
}

fn default_max_distance() -> usize {
    128
}

fn default_sandwich() -> usize {
    128
}

/// Positions of one attention module, with their parameters and tables.
#[derive(Debug)]
pub enum Position {
    /// None.
    None,
    /// Rotary, with the angles' tables grown as needed.
    Rotary(Rotary),
    /// ALiBi with these slopes, one per head.
    Alibi(Vec<f64>),
    /// T5's table `[buckets, heads]`.
    RelativeBuckets {
        /// Bias of each bucket and head.
        table: Tensor,
        /// Distances from here on share the last bucket.
        max_distance: usize,
        /// Whether only the past has buckets.
        causal: bool,
    },
    /// Kerple with its two numbers of each head.
    Kerple(KerpleBias),
    /// Sandwich of this width, the same for so many heads.
    Sandwich {
        /// Width of the embeddings.
        width: usize,
        /// Heads.
        heads: usize,
    },
    /// FIRE, and the rotation beside it.
    Fire(Box<Fire>, Option<Rotary>),
}

/// Kerple's parameters.
#[derive(Debug)]
pub struct KerpleBias {
    form: Kerple,
    /// `[2, heads]`: their softplus is `r₁` and `r₂`.
    coefficients: Tensor,
}

/// The queries and keys that a bias is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Number of queries.
    pub queries: usize,
    /// Number of keys, from position 0.
    pub keys: usize,
    /// Position of the first query.
    pub offset: usize,
    /// Seed of what this pass draws anew.
    pub draw: Option<u64>,
}

impl Position {
    /// Builds the positions of an attention module with `heads` heads of `head_width` that read
    /// `groups` groups of keys.
    pub fn new(
        spec: &PositionSpec,
        (heads, groups): (usize, usize),
        head_width: usize,
        causal: bool,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        Ok(match spec {
            PositionSpec::None => Self::None,
            PositionSpec::Rotary(spec) => {
                Self::Rotary(Rotary::new(spec, (heads, groups), head_width))
            }
            PositionSpec::Alibi => Self::Alibi(alibi_slopes(heads)),
            PositionSpec::RelativeBuckets {
                buckets,
                max_distance,
            } => Self::RelativeBuckets {
                table: parameters.tensor(
                    "buckets",
                    &[*buckets, heads],
                    Init::Normal { deviation: 0.02 },
                )?,
                max_distance: *max_distance,
                causal,
            },
            PositionSpec::KerpleLogarithmic | PositionSpec::KerplePower => {
                let form = match spec {
                    PositionSpec::KerplePower => Kerple::Power,
                    _ => Kerple::Logarithmic,
                };
                // Spread over the heads, as the published code's uniform draw is.
                let spread = Init::InverseSoftplusLogUniform {
                    low: 0.1,
                    high: 1.0,
                };
                let coefficients = parameters.tensor("coefficients", &[2, heads], spread)?;
                Self::Kerple(KerpleBias { form, coefficients })
            }
            PositionSpec::Sandwich { width } => Self::Sandwich {
                width: *width,
                heads,
            },
            PositionSpec::Fire(spec) => {
                let turn = |rotary| Rotary::new(rotary, (heads, groups), head_width);
                let rotary = spec.rotary.as_ref().map(turn);
                Self::Fire(
                    Box::new(Fire::new(spec, heads, causal, parameters)?),
                    rotary,
                )
            }
        })
    }

    /// How queries and keys turn, if they do.
    pub fn rotary(&self) -> Option<&Rotary> {
        match self {
            Self::Rotary(rotary) | Self::Fire(_, Some(rotary)) => Some(rotary),
            _ => None,
        }
    }

    /// The additive bias of every head, for kinds that have one.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn bias(&self, span: Span, dtype: DType, device: &Device) -> Result<Option<ScoreBias>> {
        let count = span.keys.max(span.offset + span.queries);
        let bias = match self {
            Self::None | Self::Rotary(_) => return Ok(None),
            Self::Kerple(KerpleBias { form, coefficients }) => {
                both_ways(&kerple(*form, coefficients, count)?, span)?
            }
            Self::Sandwich { width, heads } => {
                let one = column(sandwich(*width, count).into_iter(), dtype, device)?;
                both_ways(&tensor(one.broadcast_as((count, *heads)))?, span)?
            }
            Self::Fire(fire, _) => fire.bias(span)?,
            Self::Alibi(slopes) => {
                let of_head =
                    |&slope: &f64| distances(span).map(move |apart| -slope * apart.abs() as f64);
                let entries: Vec<f64> = slopes.iter().flat_map(of_head).collect();
                let shape = (slopes.len(), distances(span).count());
                let entries = tensor(Tensor::from_vec(entries, shape, device))?;
                ScoreBias::ByDistance(tensor(entries.to_dtype(dtype))?)
            }
            Self::RelativeBuckets {
                table,
                max_distance,
                causal,
            } => {
                let buckets = tensor(table.dim(0))?;
                let rows = distances(span)
                    .map(|apart| bucket(apart, buckets, *max_distance, *causal) as u32);
                rows_of(table, rows.collect())?
            }
        };
        Ok(Some(bias))
    }

    /// [`Position::bias`] of a layer at `path` in a pass with such a `draw`: what layers share is
    /// computed once where the pass keeps it, and draws the same positions for all of them.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn bias_in_pass(
        &self,
        span: Span,
        path: &str,
        shared: Option<&SharedBiases>,
        (dtype, device): (DType, &Device),
    ) -> Result<Option<ScoreBias>> {
        let at = |site: &str| Span {
            draw: span.draw.map(|seed| seed_of_site(seed, site)),
            ..span
        };
        match (self, shared) {
            (Self::Fire(fire, _), Some(shared)) if fire.spec().shared => {
                shared.of(fire, at(fire::SHARED)).map(Some)
            }
            (Self::Fire(fire, _), None) if fire.spec().shared => {
                fire.bias(at(fire::SHARED)).map(Some)
            }
            _ => self.bias(at(path), dtype, device),
        }
    }

    /// Whether it adds to the scores.
    pub fn is_bias(&self) -> bool {
        !matches!(self, Self::None | Self::Rotary(_))
    }

    /// The additive bias `[batch, heads, token, token]` of tokens that stand where `places`
    /// `[batch, token]` in `u32` say, for kinds that have one.
    ///
    /// # Errors
    /// For kinds whose tables are for tokens one behind the other.
    pub fn bias_between(&self, places: &Tensor) -> Result<Option<Tensor>> {
        let (table, max_distance, causal) = match self {
            Self::None => return Ok(None),
            Self::RelativeBuckets {
                table,
                max_distance,
                causal,
            } => (table, *max_distance, *causal),
            _ => {
                return Err(Error::spec(
                    "position",
                    "a kind for tokens one behind the other",
                    "none or relative-buckets where tokens have places of their own",
                ));
            }
        };
        let (buckets, heads) = tensor(table.dims2())?;
        let rows = tensor(places.to_vec2::<u32>())?;
        let (batch, tokens) = tensor(places.dims2())?;
        let mut indices = Vec::with_capacity(batch * tokens * tokens);
        for row in &rows {
            for query in row {
                let distances = row.iter().map(|key| i64::from(*key) - i64::from(*query));
                indices.extend(
                    distances.map(|apart| bucket(apart, buckets, max_distance, causal) as u32),
                );
            }
        }
        let indices = tensor(Tensor::from_vec(
            indices,
            batch * tokens * tokens,
            table.device(),
        ))?;
        let bias = tensor(table.index_select(&indices, 0))?;
        let bias = tensor(bias.reshape((batch, tokens, tokens, heads)))?;
        let bias = tensor(bias.permute((0, 3, 1, 2)))?;
        Ok(Some(tensor(bias.contiguous())?))
    }
}
