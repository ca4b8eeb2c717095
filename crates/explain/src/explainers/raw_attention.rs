//! Raw attention: the head mean of the last layer's weights, in the row of the explained
//! position. It knows of no class.

use super::attention_maps::{AttentionPass, explained_row, head_mean, heat, is_a_map};
use crate::explainer::Explainer;
use crate::target::number;
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};

/// Raw attention in the list of explainers.
pub(crate) const RAW_ATTENTION: Explainer = Explainer {
    name: "raw-attention",
    summary: "Attention weights of the last layer",
    source: "Vaswani et al. 2017, arXiv 1706.03762",
    unit: Unit::Token,
    explain: |question, targets, _| explain(question, targets),
};

/// Scores of the input's tokens: the weights of the explained position in the last layer.
///
/// # Errors
/// When a block has no attention weights.
pub fn raw_attention(question: &Question<'_>, target: Target) -> Result<Explanation> {
    RAW_ATTENTION.explain(question, target, &Options::default())
}

fn explain(question: &Question<'_>, targets: &[Target]) -> Result<Vec<Explanation>> {
    let pass = AttentionPass::new(question, None)?;
    let weights = pass.weights()?;
    let last = weights
        .last()
        .ok_or_else(|| Error::invalid("number of blocks", 0, "at least 1"))?;
    let mean = head_mean(last)?;
    let explain = |target: &Target| {
        let row = explained_row(question, &mean, 0, *target)?;
        let mut left_out = is_a_map(question);
        left_out.push("the target, and every layer but the last".to_owned());
        Ok(Explanation::new(
            RAW_ATTENTION.name,
            Unit::Token,
            heat(question, row),
            number(&target.number(&pass.output)?)?,
            left_out,
        ))
    };
    targets.iter().map(explain).collect()
}
