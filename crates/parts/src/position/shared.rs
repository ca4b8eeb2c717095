//! Biases of scores that several layers of a pass have in common.

use super::Span;
use super::fire::{Fire, FireSpec};
use crate::Result;
use lapidary_kernels::ScoreBias;
use std::sync::{Mutex, PoisonError};

/// What one pass has computed of FIRE's shared network so far. Layers that share it ask for the same
/// queries and keys: the first of them runs the network, the others get its bias. A pass begins with
/// none, since training changes the network in between; a part that is run again in the backward pass
/// has none, since a gradient would not find its way out of it.
#[derive(Debug, Default)]
pub struct SharedBiases(Mutex<Vec<Computed>>);

#[derive(Debug)]
struct Computed {
    spec: FireSpec,
    causal: bool,
    span: Span,
    bias: ScoreBias,
}

impl SharedBiases {
    /// How often the network was run.
    pub fn runs(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The bias of a network that is shared.
    pub(super) fn of(&self, fire: &Fire, span: Span) -> Result<ScoreBias> {
        let mut computed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (spec, causal) = (fire.spec(), fire.is_causal());
        let mut known = computed.iter();
        if let Some(known) =
            known.find(|one| one.span == span && one.causal == causal && one.spec == *spec)
        {
            return Ok(known.bias.clone());
        }
        let bias = fire.bias(span)?;
        computed.push(Computed {
            spec: spec.clone(),
            causal,
            span,
            bias: bias.clone(),
        });
        Ok(bias)
    }
}
