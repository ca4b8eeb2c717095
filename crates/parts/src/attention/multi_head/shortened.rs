//! Keys and values of fewer rows than there are tokens, for mechanisms that make these rows of the tokens.

use super::MultiHeadAttention;
use crate::attention::mechanism::MechanismPass;
use crate::error::tensor;
use crate::{Context, Result};
use lapidary_kernels::{Tensor, naive};
use lapidary_signal::{Lens, Linear, Mixing, Signal};

/// Sites of what all tokens have, and only they.
const OF_ALL_TOKENS: [&str; 3] = ["key", "value", "weights"];

impl MultiHeadAttention {
    /// What is mixed, `[batch, query, heads · value_width]`, of tokens `x` with queries `q` that read `source`, where the
    /// mechanism makes fewer rows of `source` before keys and values are made of these; nothing where it does not. Nor
    /// where keys and values of all tokens are looked at, or followed by a lens: the result is the same.
    pub(super) fn shortened(
        &self,
        [x, source, q]: [&Signal; 3],
        keep: Option<&Tensor>,
        cx: &Context<'_>,
    ) -> Result<Option<Signal>> {
        let (Some(mechanism), Some(key), Some(value)) =
            (self.mechanism.as_deref(), &self.key, &self.value)
        else {
            return Ok(None);
        };
        let metered = match source.lens() {
            Lens::Plain => false,
            Lens::Meter(..) => true,
            _ => return Ok(None),
        };
        let tokens = x.for_weights()?;
        let pass = MechanismPass {
            path: &self.path,
            tokens: &tokens,
            keep,
            offset: cx.offset,
            context: cx,
        };
        let (batch, length, _) = tensor(source.value().dims3())?;
        let Some(shortening) = mechanism.shortening([batch, length], &pass)? else {
            return Ok(None);
        };
        let mut sites = OF_ALL_TOKENS.iter().chain(shortening.sites);
        let looked_at = sites.any(|name| cx.trace.wants(format_args!("{}.{name}", self.path)));
        // Counted as if nobody looked, so that looking doesn't change the cost.
        if looked_at && !metered {
            return Ok(None);
        }
        let rows = |projection: &dyn Mixing| -> Result<Signal> {
            Ok(source.unsqueeze(1)?.mix_through(projection)?.squeeze(1)?)
        };
        let of_keys = shortening.keys.as_ref();
        let of_values = shortening.values.as_deref();
        let read = rows(of_keys)?;
        let k = projected(&read, key, of_keys)?;
        let read = match of_values {
            Some(of_values) => rows(of_values)?,
            None => read,
        };
        let v = projected(&read, value, of_values.unwrap_or(of_keys))?;
        let (heads, groups) = (self.spec.heads, self.spec.groups());
        let each = |x: &Signal, parts: usize| -> Result<Tensor> {
            let split = x.split_heads(parts)?.for_weights()?;
            Ok(naive::repeat_groups(&split, heads)?)
        };
        let mixing = mechanism.mixing_of_rows(&each(q, heads)?, &each(&k, groups)?, &pass)?;
        let mixed = v.split_heads(groups)?.mix_through(mixing.as_ref())?;
        Ok(Some(mixed.merge_heads()?))
    }
}

/// `E (X W + 1 bᵀ) = (E X) W + (E 1) bᵀ` of rows `E X` `[batch, row, width]`.
fn projected(rows: &Signal, layer: &Linear, projection: &dyn Mixing) -> Result<Signal> {
    let y = rows.linear(layer)?;
    let Some(bias) = layer.bias() else {
        return Ok(y);
    };
    let [batch, heads, _, tokens] = projection.sizes();
    let ones = tensor(Tensor::ones(
        (batch, heads, tokens, 1),
        y.dtype(),
        y.device(),
    ))?;
    // The layer has added the bias once to each row.
    let further = tensor(projection.mix(&ones)?.affine(1.0, -1.0))?;
    let further = tensor(tensor(further.squeeze(1))?.broadcast_mul(bias))?;
    Ok(y.add_constant(&further)?)
}
