//! GradCAM on attention (Selvaraju et al., Grad-CAM, 2017, arXiv 1610.02391, as applied to
//! Transformers by Chefer et al., arXiv 2012.09838): each head of the last layer is weighted by
//! the mean of the gradient over its map, and what is positive of their mean is kept. A head's map
//! is its row of the explained position, without the tokens that stand for the whole.

use super::attention_maps::{
    AttentionPass, class_tokens, explained_row, heat, is_a_map, kept, reads_patches,
};
use crate::error::engine;
use crate::explainer::Explainer;
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::Tensor;

/// GradCAM on attention in the list of explainers.
pub(crate) const ATTENTION_GRADCAM: Explainer = Explainer {
    name: "attention-gradcam",
    summary: "Heads of the last layer, weighted by their mean gradient",
    source: "Selvaraju et al. 2017, arXiv 1610.02391",
    unit: Unit::Token,
    explain: |question, targets, _| explain(question, targets),
};

/// Scores of the input's tokens by GradCAM on the last layer's attention.
///
/// # Errors
/// When a block has no attention weights.
pub fn attention_gradcam(question: &Question<'_>, target: Target) -> Result<Explanation> {
    ATTENTION_GRADCAM.explain(question, target, &Options::default())
}

fn explain(question: &Question<'_>, targets: &[Target]) -> Result<Vec<Explanation>> {
    let pass = AttentionPass::new(question, None)?;
    let weights = pass.weights()?;
    let missing = || Error::invalid("number of blocks", 0, "at least 1");
    let last = weights.last().ok_or_else(missing)?;
    let explain = |target: &Target| {
        let arrived = pass.arrived(&[(0, *target)])?;
        let gradient = arrived.blocks.last().ok_or_else(missing)?;
        let scores = weighted_heads(question, last, gradient, *target)?;
        let mut left_out = is_a_map(question);
        left_out.push("every layer but the last, and evidence against the class".to_owned());
        Ok(Explanation::new(
            ATTENTION_GRADCAM.name,
            Unit::Token,
            heat(question, scores),
            arrived.explained.first().copied().unwrap_or(f64::NAN),
            left_out,
        ))
    };
    targets.iter().map(explain).collect()
}

/// `max(mean_h(mean(∇A_h) A_h), 0)` of the first sequence, for `[batch, heads, query, key]`.
fn weighted_heads(
    question: &Question<'_>,
    weights: &Tensor,
    gradient: &Tensor,
    target: Target,
) -> Result<Vec<f64>> {
    let heads = engine(weights.dim(1))?;
    let skipped = match reads_patches(question) {
        true => class_tokens(question),
        false => 0,
    };
    let mut sum = Vec::new();
    for head in 0..heads {
        let row = |all: &Tensor| {
            let head = engine(engine(all.narrow(1, head, 1))?.squeeze(1))?;
            explained_row(question, &head, 0, target)
        };
        let (weights, gradient) = (row(weights)?, row(gradient)?);
        // Weights of pads are nought, but their gradients are not.
        let kept = kept(question, 0, gradient.len())?;
        let places = gradient.iter().zip(kept).skip(skipped);
        let map: Vec<f64> = places
            .filter(|(_, kept)| *kept != 0)
            .map(|(gradient, _)| *gradient)
            .collect();
        let importance = map.iter().sum::<f64>() / map.len().max(1) as f64;
        sum.resize(weights.len(), 0.0);
        for (sum, weight) in sum.iter_mut().zip(&weights) {
            *sum += importance * weight / heads as f64;
        }
    }
    Ok(sum.into_iter().map(|score: f64| score.max(0.0)).collect())
}
