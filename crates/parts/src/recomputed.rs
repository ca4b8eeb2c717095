//! Parts of a pass that are run again in the backward pass.

use std::sync::Arc;

use crate::block::Block;
use crate::decisions::Decisions;
use crate::error::tensor;
use crate::{Context, Error, Result};
use lapidary_kernels::{Recomputation, Tensor};
use lapidary_signal::{Signal, Trace};

/// What a part has to be told when it runs again. Parts of one of these are of one block: what they decide is kept
/// by their mixers' paths.
#[derive(Clone, Debug)]
pub struct Again {
    padding: Option<Tensor>,
    places: Option<Tensor>,
    offset: usize,
    dropout_seed: Option<u64>,
    draw: Option<u64>,
    step: Option<u64>,
    annealing: f64,
    /// What parts decide when they run first.
    decisions: Decisions,
}

impl Again {
    /// As the pass of `cx` runs.
    ///
    /// # Errors
    /// Where a gradient would be lost: that of a bias of keys.
    pub fn new(cx: &Context<'_>) -> Result<Self> {
        if cx.key_bias.is_some() {
            return Err(Error::spec(
                "recomputation",
                "given",
                "absent where scores of keys are biased and a part is run that is no block",
            ));
        }
        Ok(Self {
            padding: cx.key_padding.cloned(),
            places: cx.places.cloned(),
            offset: cx.offset,
            dropout_seed: cx.dropout_seed,
            draw: cx.draw,
            step: cx.step,
            annealing: cx.annealing,
            decisions: Decisions::default(),
        })
    }

    /// `part` as a map of tensors, which can be run at any time.
    pub fn part(
        &self,
        part: impl Fn(Signal, &Context<'_>) -> Result<Signal> + Send + Sync + 'static,
    ) -> impl Fn(&Tensor) -> lapidary_kernels::Result<Tensor> + Send + Sync + 'static {
        let told = self.clone();
        move |x: &Tensor| {
            let trace = Trace::new();
            let cx = Context {
                key_padding: told.padding.as_ref(),
                places: told.places.as_ref(),
                offset: told.offset,
                dropout_seed: told.dropout_seed,
                draw: told.draw,
                step: told.step,
                annealing: told.annealing,
                decisions: Some(&told.decisions),
                ..Context::new(&trace)
            };
            match part(Signal::from(x.clone()), &cx) {
                Ok(y) => Ok(y.into_value()),
                Err(Error::Kernel(error)) => Err(error),
                Err(other) => Err(lapidary_kernels::Error::argument(
                    "recompute",
                    "block",
                    other.to_string(),
                    "one that runs",
                )),
            }
        }
    }
}

/// One block whose intermediates are not remembered.
///
/// # Errors
/// Those of the block.
pub fn recomputed(
    recomputation: &Recomputation,
    block: &Arc<Block>,
    x: &Signal,
    cx: &Context<'_>,
) -> Result<Signal> {
    let block = block.clone();
    let Some(bias) = cx.key_bias else {
        let part = Again::new(cx)?.part(move |x, cx| block.forward(x, cx, None));
        return Ok(Signal::from(recomputation.run(x.value(), part)?));
    };
    // A bias of keys goes in as one more feature of each token, so that its gradient comes out.
    let width = tensor(x.value().dim(2))?;
    let both = tensor(Tensor::cat(&[x.value(), &tensor(bias.unsqueeze(2))?], 2))?;
    let unbiased = Context {
        key_bias: None,
        ..*cx
    };
    let part = Again::new(&unbiased)?.part(move |both, cx| {
        let bias = both.narrow(2, width, 1)?.squeeze(2)?.into_value();
        let cx = Context {
            key_bias: Some(&bias),
            ..*cx
        };
        block.forward(both.narrow(2, 0, width)?.contiguous()?, &cx, None)
    });
    Ok(Signal::from(recomputation.run(&both, part)?))
}
