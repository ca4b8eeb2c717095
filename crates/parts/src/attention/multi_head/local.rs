//! A filter of each head over values beside the mixing: what is near counts by where it lies (Dong et al., CSWin
//! Transformer, 2021, arXiv 2107.00652, whose encoding of positions it is; Lu et al., SOFT, arXiv 2110.11945, have one
//! for each head).
//!
//! ```text
//! y = concat_h( A_h V_h + w_h ∗ V_h ) W_Oᵀ
//! ```
//!
//! Cost: `(2 taps + 1) value_width` for each token of each head. Parameters: `heads · taps`.

use super::MultiHeadSpec;
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Context, Error, Result};
use lapidary_kernels::{Tensor, local_filter};
use lapidary_signal::{Mixing, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_SIDE: usize = 63;
const MAX_COLUMNS: usize = 1 << 16;

/// A filter of each head, the same for all its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LocalFilter {
    /// Width of the filter, and on an image its height; odd.
    pub side: usize,
    /// Tokens of a row where the sequence is an image, row by row; a line when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<usize>,
}

impl LocalFilter {
    /// Entries of the filter of a head.
    fn taps(self) -> usize {
        match self.columns {
            None => self.side,
            Some(_) => self.side * self.side,
        }
    }
}

impl MultiHeadSpec {
    pub(super) fn validate_local(&self, field: &str) -> Result<()> {
        let Some(LocalFilter { side, columns }) = self.local else {
            return Ok(());
        };
        if side.is_multiple_of(2) || side > MAX_SIDE {
            return Err(Error::spec(
                format!("{field}.local.side"),
                side,
                format!("odd and at most {MAX_SIDE}"),
            ));
        }
        if let Some(columns) = columns {
            bounded(format!("{field}.local.columns"), columns, 1..=MAX_COLUMNS)?;
        }
        let obstacle = if self.causal {
            "absent in causal attention: a filter sees later tokens too"
        } else if !self.mechanism.is_softmax() {
            "absent beside a mechanism, which has a filter of its own or none"
        } else if self.groups() != self.heads {
            "absent where heads share their values: each filters its own"
        } else {
            return Ok(());
        };
        Err(Error::spec(format!("{field}.local"), "given", obstacle))
    }
}

/// The filters of heads.
#[derive(Debug)]
pub(super) struct Local {
    spec: LocalFilter,
    /// `[heads, side]`, or `[heads, side, side]`.
    filters: Tensor,
}

impl Local {
    pub(super) fn new(
        spec: LocalFilter,
        heads: usize,
        parameters: &mut Parameters<'_>,
    ) -> Result<Self> {
        let (line, image) = ([heads, spec.side], [heads, spec.side, spec.side]);
        let shape = match spec.columns {
            None => &line[..],
            Some(_) => &image[..],
        };
        let start = Init::Normal {
            deviation: 1.0 / spec.taps() as f64,
        };
        Ok(Self {
            spec,
            filters: parameters.tensor("local", shape, start)?,
        })
    }

    /// `mixed` `[batch, token, heads · value_width]` and what the filters make of the values `v` of the same tokens.
    pub(super) fn beside(
        &self,
        mixed: &Signal,
        v: &Signal,
        keep: Option<&Tensor>,
        path: &str,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let (batch, length, _) = tensor(v.value().dims3())?;
        let queries = mixed.dims().get(1).copied().unwrap_or(0);
        if queries != length || cx.places.is_some() || cx.key_bias.is_some() {
            return Err(Error::spec(
                format!("tokens beside the filter at {path}"),
                format!("{queries} queries of {length} keys, or such as stand for others"),
                "a whole sequence, one token behind the other",
            ));
        }
        let heads = tensor(self.filters.dim(0))?;
        let near = Near {
            sizes: [batch, heads, length, length],
            columns: self.spec.columns.unwrap_or(length).max(1),
            taps: self.spec.taps(),
            filters: match self.spec.columns {
                None => tensor(self.filters.unsqueeze(1))?,
                Some(_) => self.filters.clone(),
            },
            keep: keep.cloned(),
        };
        let filtered = v.split_heads(heads)?.mix_through(&near)?;
        Ok(mixed.add(&filtered.merge_heads()?)?)
    }
}

/// `w ∗ v`.
#[derive(Debug)]
struct Near {
    sizes: [usize; 4],
    columns: usize,
    taps: usize,
    /// `[heads, high, wide]`.
    filters: Tensor,
    /// `[batch, key]` in `u8`.
    keep: Option<Tensor>,
}

impl Mixing for Near {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        match &self.keep {
            None => local_filter(values, &self.filters, self.columns),
            Some(keep) => {
                let keep = keep.unsqueeze(1)?.unsqueeze(3)?.to_dtype(values.dtype())?;
                local_filter(&values.broadcast_mul(&keep)?, &self.filters, self.columns)
            }
        }
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes;
        (batch * heads * length * 2 * self.taps * width) as u64
    }
}
