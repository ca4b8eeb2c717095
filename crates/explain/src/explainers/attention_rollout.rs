//! Attention rollout (Abnar & Zuidema, Quantifying Attention Flow in Transformers, ACL 2020,
//! arXiv 2005.00928): the product over layers of the head mean of the weights with the residual
//! added, `Ā = (A + I)` with rows that sum to one. It knows of no class.

use super::attention_maps::{AttentionPass, explained_row, head_mean, heat, is_a_map, roll_out};
use crate::explainer::Explainer;
use crate::target::number;
use crate::{Explanation, Options, Question, Result, Target, Unit};

/// Attention rollout in the list of explainers; reads [`Options::start_layer`].
pub(crate) const ATTENTION_ROLLOUT: Explainer = Explainer {
    name: "attention-rollout",
    summary: "Attention weights multiplied over layers",
    source: "Abnar & Zuidema 2020, arXiv 2005.00928",
    unit: Unit::Token,
    explain,
};

/// Scores of the input's tokens: how much each flows into the explained position, from
/// `start_layer` on.
///
/// # Errors
/// When a block has no attention weights, or there is no such layer.
pub fn attention_rollout(
    question: &Question<'_>,
    target: Target,
    start_layer: usize,
) -> Result<Explanation> {
    let options = Options {
        start_layer,
        ..Options::default()
    };
    ATTENTION_ROLLOUT.explain(question, target, &options)
}

fn explain(
    question: &Question<'_>,
    targets: &[Target],
    options: &Options,
) -> Result<Vec<Explanation>> {
    let pass = AttentionPass::new(question, None)?;
    let weights = pass.weights()?;
    let layers = weights.iter().map(head_mean).collect::<Result<Vec<_>>>()?;
    let product = roll_out(&layers, options.start_layer, true)?;
    let explain = |target: &Target| {
        let row = explained_row(question, &product, 0, *target)?;
        let mut left_out = is_a_map(question);
        left_out.push("the target: the map is the same for every class".to_owned());
        Ok(Explanation::new(
            ATTENTION_ROLLOUT.name,
            Unit::Token,
            heat(question, row),
            number(&target.number(&pass.output)?)?,
            left_out,
        ))
    };
    targets.iter().map(explain).collect()
}
