//! Partial LRP (Voita et al., Analyzing Multi-Head Self-Attention, ACL 2019, arXiv 1905.09418):
//! the relevance of the last layer's attention weights, what is positive averaged over heads, in
//! the row of the explained position. The rules are the deep Taylor ones of [`super::chefer`].

use super::attention_maps::{AttentionPass, explained_row, head_mean, heat, is_a_map};
use crate::error::engine;
use crate::explainer::Explainer;
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};
use lapidary_signal::relevance::RelevanceRules;

/// Partial LRP in the list of explainers.
pub(crate) const PARTIAL_LRP: Explainer = Explainer {
    name: "partial-lrp",
    summary: "Relevance of the last layer's attention weights",
    source: "Voita et al. 2019, arXiv 1905.09418",
    unit: Unit::Token,
    explain: |question, targets, _| explain(question, targets),
};

/// Scores of the input's tokens: relevance of the explained position's weights in the last layer.
///
/// # Errors
/// When a block has no attention weights.
pub fn partial_lrp(question: &Question<'_>, target: Target) -> Result<Explanation> {
    PARTIAL_LRP.explain(question, target, &Options::default())
}

fn explain(question: &Question<'_>, targets: &[Target]) -> Result<Vec<Explanation>> {
    let pass = AttentionPass::new(question, Some(RelevanceRules::deep_taylor()))?;
    let explain = |target: &Target| {
        let arrived = pass.arrived(&[(0, *target)])?;
        let last = arrived
            .blocks
            .last()
            .ok_or_else(|| Error::invalid("number of blocks", 0, "at least 1"))?;
        let mean = head_mean(&engine(last.relu())?)?;
        let row = explained_row(question, &mean, 0, *target)?;
        let mut left_out = is_a_map(question);
        left_out.push("every layer but the last, and negative relevance".to_owned());
        Ok(Explanation::new(
            PARTIAL_LRP.name,
            Unit::Token,
            heat(question, row),
            arrived.explained.first().copied().unwrap_or(f64::NAN),
            left_out,
        ))
    };
    targets.iter().map(explain).collect()
}
