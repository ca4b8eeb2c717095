//! One side reads from the other: latents from their group, a group from latents, latents from what
//! a pass is conditioned on.

use crate::attention::{MultiHeadAttention, MultiHeadSpec};
use crate::feedforward::{Feedforward, FeedforwardSpec};
use crate::norm::{Norm, NormSpec};
use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Signal;

/// `x + A(q = N x, kv = N memory)`, and with a feed-forward part `y + F(N y)` of that.
#[derive(Debug)]
pub(super) struct Exchange {
    path: String,
    norm: Norm,
    memory_norm: Norm,
    attention: MultiHeadAttention,
    feedforward: Option<(Norm, Feedforward)>,
}

impl Exchange {
    /// For tokens of `width` that read others of `memory_width`.
    pub(super) fn new(
        (attention, norm): (&MultiHeadSpec, &NormSpec),
        feedforward: Option<&FeedforwardSpec>,
        [width, memory_width]: [usize; 2],
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        Ok(Self {
            path: parameters.path().to_owned(),
            norm: Norm::new(norm, width, parameters.at("attention_norm"))?,
            memory_norm: Norm::new(norm, memory_width, parameters.at("memory_norm"))?,
            attention: MultiHeadAttention::between(
                attention,
                width,
                memory_width,
                parameters.at("attention"),
            )?,
            feedforward: match feedforward {
                None => None,
                Some(spec) => Some((
                    Norm::new(norm, width, parameters.at("feedforward_norm"))?,
                    Feedforward::new(spec, width, parameters.at("feedforward"))?,
                )),
            },
        })
    }

    /// `x` `[batch, length, width]` after reading `memory` `[batch, tokens, memory_width]`.
    pub(super) fn forward(
        &self,
        x: &Signal,
        memory: &Signal,
        memory_padding: Option<&Tensor>,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let queries = self.norm.forward(x)?;
        let memory = self.memory_norm.forward(memory)?;
        let cx = &Context {
            memory: Some((&memory, memory_padding)),
            ..*cx
        };
        let read = self
            .attention
            .cross(&queries, &memory, memory_padding, cx)?;
        let mut x = x.add(&read)?;
        if let Some((norm, feedforward)) = &self.feedforward {
            x = x.add(&feedforward.forward(&norm.forward(&x)?, cx)?)?;
        }
        Ok(cx.trace.site(format_args!("{}.out", self.path), x)?)
    }
}
