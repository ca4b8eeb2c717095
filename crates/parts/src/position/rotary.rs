//! Rotary position embedding (Su et al., RoFormer, 2021, arXiv 2104.09864): the pair of features `i`
//! of a query or key at position `t` turns by `t θ^(−2 i / width)`, so that their product knows the
//! distance alone. No parameters; `3 n · heads · head_width` operations.

use std::f64::consts::PI;
use std::sync::{Mutex, PoisonError};

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::{DType, Device, RotaryPairs, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RotarySpec {
    /// Base of the wavelengths.
    #[serde(default = "default_theta")]
    pub theta: f64,
    /// Features of a head that are rotated; all when absent, or two for each kept pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// The pairs that are left of wider heads; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<KeptPairs>,
    /// Whether features `2 i` and `2 i + 1` form a pair instead of `i` and `i + width / 2`.
    #[serde(default)]
    pub interleaved: bool,
    /// How frequencies change for longer contexts.
    #[serde(default)]
    pub scaling: RotaryScaling,
}

/// The rotary pairs that are left of wider heads, each still turning at its own speed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeptPairs {
    /// Features that were rotated in the wider heads, which frequencies are computed from.
    pub of: usize,
    /// Indices of the pairs, rising, for each group of keys; its query heads keep the same ones.
    pub groups: Vec<Vec<usize>>,
}

impl KeptPairs {
    /// How many pairs each head keeps.
    pub fn pairs(&self) -> usize {
        self.groups.first().map_or(0, Vec::len)
    }

    fn validate(&self, groups: usize, field: &str) -> Result<()> {
        if self.of == 0 || !self.of.is_multiple_of(2) || self.of > MAX_ROTATED {
            let expected = format!("an even number of at most {MAX_ROTATED}");
            return Err(Error::spec(format!("{field}.of"), self.of, expected));
        }
        if self.groups.len() != groups {
            let expected = format!("{groups}, one list for each group of keys");
            let field = format!("number of lists in {field}.groups");
            return Err(Error::spec(field, self.groups.len(), expected));
        }
        let (pairs, all) = (self.pairs(), self.of / 2);
        for (group, kept) in self.groups.iter().enumerate() {
            let rising = kept.windows(2).all(|two| matches!(two, [a, b] if a < b));
            let below = kept.last().is_some_and(|last| *last < all);
            if kept.len() != pairs || !rising || !below {
                return Err(Error::spec(
                    format!("{field}.groups.{group}"),
                    kept,
                    format!("{} rising indices below {all}", pairs.max(1)),
                ));
            }
        }
        Ok(())
    }
}

/// Rotated features of a head that is no longer there.
const MAX_ROTATED: usize = 1 << 20;

fn default_theta() -> f64 {
    10_000.0
}

impl Default for RotarySpec {
    fn default() -> Self {
        Self {
            theta: default_theta(),
            width: None,
            kept: None,
            interleaved: false,
            scaling: RotaryScaling::None,
        }
    }
}

/// Changes to the rotary frequencies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RotaryScaling {
    /// None.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    None,
    /// Every frequency divided by `factor` (Chen et al., arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// The divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_length / low_frequency_factor` are long.
        low_frequency_factor: f64,
        /// Wavelengths below `original_length / high_frequency_factor` are short.
        high_frequency_factor: f64,
        /// Context the model was first trained with.
        original_length: usize,
    },
}

impl RotarySpec {
    /// Features that are rotated in heads of `head_width`.
    pub fn rotated(&self, head_width: usize) -> usize {
        let kept = self.kept.as_ref().map(|kept| 2 * kept.pairs());
        self.width.or(kept).unwrap_or(head_width)
    }

    /// Refuses widths, bases and kept pairs that make no sense for heads of `head_width` with
    /// `groups` groups of keys.
    pub fn validate(&self, head_width: usize, groups: usize, field: &str) -> Result<()> {
        if let Some(kept) = &self.kept {
            kept.validate(groups, &format!("{field}.kept"))?;
            if let Some(width) = self.width.filter(|width| *width != 2 * kept.pairs()) {
                let expected = format!("absent or {}, two for each kept pair", 2 * kept.pairs());
                return Err(Error::spec(format!("{field}.width"), width, expected));
            }
        }
        let width = self.rotated(head_width);
        if width == 0 || !width.is_multiple_of(2) || width > head_width {
            return Err(Error::spec(
                format!("{field}.width"),
                width,
                format!("an even number of at most {head_width}, the width of a head"),
            ));
        }
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(Error::spec(
                format!("{field}.theta"),
                self.theta,
                "a positive number",
            ));
        }
        let factor = match self.scaling {
            RotaryScaling::None => 1.0,
            RotaryScaling::Linear { factor } | RotaryScaling::Llama3 { factor, .. } => factor,
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(Error::spec(
                format!("{field}.scaling.factor"),
                factor,
                "a positive number",
            ));
        }
        if let RotaryScaling::Llama3 {
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_length,
            ..
        } = self.scaling
        {
            if !(low.is_finite() && low > 0.0) {
                return Err(Error::spec(
                    format!("{field}.scaling.low_frequency_factor"),
                    low,
                    "a positive number",
                ));
            }
            if !(high.is_finite() && high > low) {
                return Err(Error::spec(
                    format!("{field}.scaling.high_frequency_factor"),
                    high,
                    format!("above the low_frequency_factor {low}"),
                ));
            }
            if original_length == 0 {
                return Err(Error::spec(
                    format!("{field}.scaling.original_length"),
                    original_length,
                    "at least 1",
                ));
            }
        }
        Ok(())
    }

    /// Angle per position of each pair, `θ^(−2 i / width)` after scaling: one list for all heads,
    /// or one for each group of keys where these kept different pairs.
    fn frequencies(&self, head_width: usize) -> Vec<Vec<f64>> {
        let Some(kept) = &self.kept else {
            return vec![self.all_frequencies(self.rotated(head_width))];
        };
        let all = self.all_frequencies(kept.of);
        let of = |pairs: &Vec<usize>| pairs.iter().filter_map(|i| all.get(*i)).copied().collect();
        kept.groups.iter().map(of).collect()
    }

    fn all_frequencies(&self, width: usize) -> Vec<f64> {
        let base = (0..width / 2).map(|i| self.theta.powf(-2.0 * i as f64 / width as f64));
        match self.scaling {
            RotaryScaling::None => base.collect(),
            RotaryScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_length,
            } => base
                .map(|f| {
                    let wavelength = 2.0 * PI / f;
                    let ratio = original_length as f64 / wavelength;
                    if ratio < low {
                        f / factor
                    } else if ratio > high {
                        f
                    } else {
                        let smooth = (ratio - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }
}

/// Rotary tables.
#[derive(Debug)]
pub struct Rotary {
    /// One list for all heads, or one for each group of keys.
    frequencies: Vec<Vec<f64>>,
    heads_of_a_group: usize,
    pairs: RotaryPairs,
    /// Cosines and sines `[length, lists, pairs]`.
    tables: Mutex<Option<(Tensor, Tensor)>>,
}

impl Rotary {
    /// The angles of `heads` heads of `head_width` that read `groups` groups of keys.
    pub(super) fn new(
        spec: &RotarySpec,
        (heads, groups): (usize, usize),
        head_width: usize,
    ) -> Self {
        Self {
            frequencies: spec.frequencies(head_width),
            heads_of_a_group: heads / groups.max(1),
            pairs: if spec.interleaved {
                RotaryPairs::Interleaved
            } else {
                RotaryPairs::Halves
            },
            tables: Mutex::new(None),
        }
    }

    /// How features are paired.
    pub fn pairs(&self) -> RotaryPairs {
        self.pairs
    }

    /// Cosines and sines of positions `offset .. offset + length`, for queries of all heads or
    /// keys of all groups: `[length, pairs]` where every head turns alike, else
    /// `[length, heads, pairs]`.
    pub fn tables(
        &self,
        heads: usize,
        offset: usize,
        length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let (cos, sin) = self.by_list(offset, length, dtype, device)?;
        let of_heads = |table: Tensor| -> Result<Tensor> {
            let (length, lists, pairs) = tensor(table.dims3())?;
            if lists == 1 {
                return tensor(table.squeeze(1));
            }
            let each = if heads == lists {
                1
            } else {
                self.heads_of_a_group
            };
            let table = tensor(table.unsqueeze(2))?;
            let table = tensor(table.broadcast_as((length, lists, each, pairs)))?;
            tensor(table.reshape((length, lists * each, pairs)))
        };
        Ok((of_heads(cos)?, of_heads(sin)?))
    }

    /// As [`Rotary::tables`] for one head of the queries: `[length, pairs]`.
    pub fn tables_of_head(
        &self,
        head: usize,
        offset: usize,
        length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let (cos, sin) = self.by_list(offset, length, dtype, device)?;
        let list = match self.frequencies.len() {
            1 => 0,
            _ => head / self.heads_of_a_group.max(1),
        };
        let of_list = |table: Tensor| tensor(tensor(table.narrow(1, list, 1))?.squeeze(1));
        Ok((of_list(cos)?, of_list(sin)?))
    }

    /// `[length, lists, pairs]`, grown as needed.
    fn by_list(
        &self,
        offset: usize,
        length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset + length;
        let ready = tables.as_ref().is_some_and(|(cos, _)| {
            cos.dims()[0] >= end && cos.dtype() == dtype && cos.device().same_device(device)
        });
        if !ready {
            let rows = end.next_power_of_two();
            let lists = self.frequencies.len();
            let pairs = self.frequencies.first().map_or(0, Vec::len);
            let each = || self.frequencies.iter().flatten();
            let angles = (0..rows).flat_map(|t| each().map(move |f| t as f64 * f));
            let (sin, cos): (Vec<f64>, Vec<f64>) = angles.map(f64::sin_cos).unzip();
            let shape = (rows, lists, pairs);
            let table = |values: Vec<f64>| -> Result<Tensor> {
                tensor(tensor(Tensor::from_vec(values, shape, device))?.to_dtype(dtype))
            };
            *tables = Some((table(cos)?, table(sin)?));
        }
        match tables.as_ref() {
            Some((cos, sin)) => Ok((
                tensor(cos.narrow(0, offset, length))?,
                tensor(sin.narrow(0, offset, length))?,
            )),
            None => Err(Error::spec("rotary tables", "absent", "computed")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_short_and_divides_long_wavelengths() {
        let plain = RotarySpec::default();
        let scaled = RotarySpec {
            scaling: RotaryScaling::Llama3 {
                factor: 8.0,
                low_frequency_factor: 1.0,
                high_frequency_factor: 4.0,
                original_length: 8192,
            },
            ..RotarySpec::default()
        };
        let (plain, scaled) = (plain.all_frequencies(128), scaled.all_frequencies(128));
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-12);
        assert!(
            plain
                .iter()
                .zip(&scaled)
                .all(|(p, s)| s <= p && *s >= p / 8.0 - 1e-18)
        );
    }
}
