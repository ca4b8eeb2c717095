//! What a pass may say of scores: a bias of each key, and where tokens stand; and scores that are asked
//! for by themselves.

use super::MultiHeadAttention;
use super::by_place::ByPlace;
use crate::error::tensor;
use crate::{Context, Error, Result};
use lapidary_kernels::{AttentionOptions, Tensor, beside_feature};
use lapidary_signal::{Lens, Signal};

impl MultiHeadAttention {
    /// How much attention each of `keys` `[batch, key, width]` gets from `queries`
    /// `[batch, query, width]`, both as this attention reads them: the mean over heads of the
    /// weights, summed over queries with `shares` `[batch, query]`. Positions don't count. Gives
    /// `[batch, key]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn received(
        &self,
        queries: &Signal,
        keys: &Signal,
        shares: &Tensor,
        key_padding: Option<&Tensor>,
    ) -> Result<Signal> {
        let q = queries.linear(&self.query)?;
        let k = keys.linear(self.key.as_ref().unwrap_or(&self.query))?;
        let q = self.normalise(&q, &self.query_norm)?;
        let k = self.normalise(&k, &self.key_norm)?;
        let options = AttentionOptions {
            scale: self.scale,
            key_padding: key_padding.cloned(),
            ..AttentionOptions::new(self.head_width)
        };
        let (q, k) = (
            q.split_heads(self.spec.heads)?,
            k.split_heads(self.spec.groups())?,
        );
        Ok(q.attention_received(&k, shares, &options)?)
    }

    /// Softmax over keys that stand where `places` `[batch, key]` say, the queries being the last of them.
    pub(super) fn mix_by_place(
        &self,
        q: &Signal,
        k: &Signal,
        v: &Signal,
        options: AttentionOptions,
        places: &Tensor,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let (heads, groups) = (self.spec.heads, self.spec.groups());
        let q = q.split_heads(heads)?.for_weights()?;
        let k = k.split_heads(groups)?.for_weights()?;
        let mixing = ByPlace::new(q, k, options, places)?;
        let mixed = self.mix_values(&v.split_heads(groups)?, &mixing, cx)?;
        Ok(mixed.merge_heads()?)
    }

    /// Refuses a bias of keys, or places of tokens, where they mean nothing.
    pub(super) fn check_scores(&self, cx: &Context<'_>, decodes: bool) -> Result<()> {
        let given = match (cx.key_bias, cx.places) {
            (None, None) => return Ok(()),
            (Some(_), _) => "a bias of keys",
            (None, Some(_)) => "places of tokens",
        };
        let refuse = |what: String| {
            let field = format!("{given} at {}", self.path);
            Err(Error::spec(field, what, "softmax of a whole sequence"))
        };
        if let Some(mechanism) = self.spec.mechanism.spec() {
            return refuse(mechanism.kind().to_owned());
        }
        if decodes && (cx.key_bias.is_some() || self.position.is_bias()) {
            return refuse("given while decoding".to_owned());
        }
        let orders = self.spec.causal || self.spec.window.is_some();
        if cx.places.is_some() && orders && (self.position.is_bias() || self.spec.dropout > 0.0) {
            return refuse("causal with a bias of distances or dropout of weights".to_owned());
        }
        Ok(())
    }

    /// Queries and keys with one more feature for each head, whose product is what is added to a
    /// score: `s (q k + b / s) = s q k + b`.
    pub(super) fn with_key_bias(
        &self,
        q: &Signal,
        k: &Signal,
        bias: &Tensor,
    ) -> Result<(Signal, Signal)> {
        let one = tensor(Tensor::ones(q.dims()[..2].to_vec(), q.dtype(), q.device()))?;
        let bias = tensor(bias / self.scale)?;
        Ok((
            widened(q, self.spec.heads, &one)?,
            widened(k, self.spec.groups(), &bias)?,
        ))
    }
}

/// One more feature for each head of `x` `[batch, length, heads · width]`, the number of its token in
/// `feature` `[batch, length]`.
fn widened(x: &Signal, heads: usize, feature: &Tensor) -> Result<Signal> {
    if let Lens::Plain = x.lens() {
        return Ok(Signal::from(beside_feature(x.value(), feature, heads)?));
    }
    let (batch, length, width) = tensor(x.value().dims3())?;
    let width = width / heads.max(1);
    let each = tensor(feature.reshape((batch, length, 1, 1)))?;
    let each = tensor(tensor(each.broadcast_as((batch, length, heads, 1)))?.contiguous())?;
    let split = x.reshape(&[batch, length, heads, width])?;
    let joined = Signal::concatenate(&[split, Signal::from(each)], 3)?;
    Ok(joined.reshape(&[batch, length, heads * (width + 1)])?)
}
