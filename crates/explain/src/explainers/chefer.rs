//! Transformer Interpretability Beyond Attention Visualization (Chefer, Gur, Wolf, CVPR 2021,
//! arXiv 2012.09838).
//!
//! For each block, the relevance of the attention weights under the deep Taylor rules is
//! multiplied by the gradient of the class score there; what is positive, averaged over heads,
//! moves along with the tokens from layer to layer:
//!
//! `Ā⁽ᵇ⁾ = I + mean_h max(∇A⁽ᵇ⁾ ⊙ R⁽ᵇ⁾, 0)`, `C = Ā⁽ᴮ⁾ ⋯ Ā⁽ˢ⁾`
//!
//! The scores are the row of `C` of the explained position. For images the rows of `Ā` stay as
//! they are; for text each is divided by its sum.
//!
//! Sums are balanced for each sample by itself, so that a batch gives what its samples give
//! alone.

use super::attention_maps::{
    AttentionPass, class_tokens, explained_row, head_mean, heat, is_a_map, reads_patches, roll_out,
};
use crate::error::engine;
use crate::explainer::Explainer;
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model};
use lapidary_signal::relevance::RelevanceRules;

/// The method in the list of explainers; reads [`Options::start_layer`].
pub(crate) const CHEFER: Explainer = Explainer {
    name: "chefer",
    summary: "Relevance of attention times its gradient, over all layers",
    source: "Chefer et al. 2021, arXiv 2012.09838",
    unit: Unit::Token,
    explain: |question, targets, options| {
        let method = Relevancy {
            start_layer: options.start_layer,
            ..Relevancy::default()
        };
        let passes = Passes::new(question, method.evidence)?;
        let explain = |target: &Target| passes.explain(&[(0, *target)], method);
        let all = targets.iter().map(explain).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().flatten().collect())
    },
};

/// What counts as evidence that one token tells another about the class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Evidence {
    /// Relevance times gradient: the method.
    #[default]
    RelevanceTimesGradient,
    /// Relevance alone: the method without its gradient.
    Relevance,
    /// Weights times gradient: the method without its relevance.
    WeightsTimesGradient,
}

/// The method and its ablations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relevancy {
    /// What is added up.
    pub evidence: Evidence,
    /// The first layer that takes part; the last layer alone when it is the last.
    pub start_layer: usize,
}

/// Scores of the input's tokens for `target`, for the first sequence of `input`, from
/// `start_layer` on.
///
/// # Errors
/// When a block has no attention weights, or there is no such layer.
///
/// ```
/// use lapidary_explain::{Target, chefer, patch_heat};
/// use lapidary_kernels::{DType, Device, Tensor};
/// use lapidary_model::{Input, Model, ModelSpec};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let spec: ModelSpec = serde_json::from_str(r#"{
///     "width": 8,
///     "input": { "kind": "patches", "image": [8, 8], "patch": 4 },
///     "blocks": [{ "repeat": 2, "attention": { "kind": "multi-head", "heads": 2 } }],
///     "head": { "kind": "pooled", "labels": 3 }
/// }"#)?;
/// let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
/// let image = Input::Pixels(Tensor::rand(0f32, 1.0, (1, 3, 8, 8), &Device::Cpu)?);
/// let why_two = chefer(&model, &image, None, Target::class(2), 0)?;
/// assert_eq!(patch_heat(&model, &why_two.scores)?.len(), 4);
/// # Ok(()) }
/// ```
pub fn chefer(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    start_layer: usize,
) -> Result<Explanation> {
    let question = Question {
        model,
        input,
        padding,
    };
    let options = Options {
        start_layer,
        ..Options::default()
    };
    CHEFER.explain(&question, target, &options)
}

/// Explains every sequence of a batch, each its own target, with one pass for all: what
/// [`chefer`] gives for each alone.
///
/// # Errors
/// As [`chefer`]; when there are not as many targets as sequences.
pub fn relevancy_of_batch(
    question: &Question<'_>,
    targets: &[Target],
    method: Relevancy,
) -> Result<Vec<Explanation>> {
    let passes = Passes::new(question, method.evidence)?;
    let sequences = passes.plain.output.hidden.dims().first().copied();
    if sequences != Some(targets.len()) {
        return Err(Error::invalid(
            "number of targets",
            targets.len(),
            format!("{}, one for each sequence", sequences.unwrap_or(0)),
        ));
    }
    let seeds: Vec<(usize, Target)> = targets.iter().copied().enumerate().collect();
    passes.explain(&seeds, method)
}

/// The heat of each patch of an image, row by row: the scores without those of the class tokens.
///
/// # Errors
/// When the model reads no patches.
pub fn patch_heat(model: &Model, scores: &[f64]) -> Result<Vec<f64>> {
    match &model.spec().input {
        lapidary_model::InputSpec::Patches(patches) => {
            Ok(scores.iter().skip(patches.class_tokens).copied().collect())
        }
        lapidary_model::InputSpec::Tokens(_) => {
            Err(Error::invalid("input of the model", "tokens", "patches"))
        }
    }
}

/// The forward passes that any number of targets share.
struct Passes<'a> {
    question: &'a Question<'a>,
    plain: AttentionPass,
    /// Absent where no relevance is asked for.
    relevance: Option<AttentionPass>,
}

impl<'a> Passes<'a> {
    fn new(question: &'a Question<'a>, evidence: Evidence) -> Result<Self> {
        let rules = RelevanceRules::deep_taylor();
        let relevance = match evidence {
            Evidence::WeightsTimesGradient => None,
            _ => Some(AttentionPass::new(question, Some(rules))?),
        };
        Ok(Self {
            question,
            plain: AttentionPass::new(question, None)?,
            relevance,
        })
    }

    fn explain(&self, seeds: &[(usize, Target)], method: Relevancy) -> Result<Vec<Explanation>> {
        let gradient = self.plain.arrived(seeds)?;
        let partner = match &self.relevance {
            Some(pass) => pass.arrived(seeds)?.blocks,
            None => self.plain.weights()?,
        };
        let mut layers = Vec::with_capacity(partner.len());
        for (gradient, partner) in gradient.blocks.iter().zip(&partner) {
            layers.push(match method.evidence {
                Evidence::Relevance => head_mean(&engine(partner.relu())?)?,
                _ => positive_evidence(gradient, partner)?,
            });
        }
        let patches = reads_patches(self.question);
        let product = roll_out(&layers, method.start_layer, !patches)?;
        let mut explanations = Vec::with_capacity(seeds.len());
        for ((sequence, target), explained) in seeds.iter().zip(&gradient.explained) {
            let row = explained_row(self.question, &product, *sequence, *target)?;
            let scores = heat(self.question, row);
            let mut left_out = is_a_map(self.question);
            left_out.push("evidence against the class".to_owned());
            if patches && class_tokens(self.question) > 0 {
                left_out.push("what the class token keeps".to_owned());
            }
            explanations.push(Explanation::new(
                CHEFER.name,
                Unit::Token,
                scores,
                *explained,
                left_out,
            ));
        }
        Ok(explanations)
    }
}

/// `mean_h max(∇A ⊙ R, 0)`, `[batch, heads, query, key] -> [batch, query, key]`.
fn positive_evidence(gradient: &Tensor, relevance: &Tensor) -> Result<Tensor> {
    head_mean(&engine(engine(gradient * relevance)?.relu())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    fn matrix(values: &[f64], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn flat(t: &Tensor) -> Vec<f64> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// With gradients of 1 and the weights as relevance, it is a rollout of `A + I`.
    #[test]
    fn without_gradient_and_relevance_it_is_a_rollout() {
        let first = matrix(&[0.25, 0.75, 0.5, 0.5], &[1, 1, 2, 2]);
        let second = matrix(&[1.0, 0.0, 0.4, 0.6], &[1, 1, 2, 2]);
        let layers = [&first, &second]
            .map(|weights| positive_evidence(&weights.ones_like().unwrap(), weights).unwrap());
        let product = roll_out(&layers, 0, false).unwrap();
        // [[2, 0], [0.4, 1.6]] · [[1.25, 0.75], [0.5, 1.5]]
        let expected = [2.5, 1.5, 0.5 + 0.8, 0.3 + 2.4];
        for (found, expected) in flat(&product).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12);
        }
        let plain = roll_out(
            &[head_mean(&first).unwrap(), head_mean(&second).unwrap()],
            0,
            false,
        );
        assert_eq!(flat(&plain.unwrap()), flat(&product));
        let last = roll_out(&layers, 1, true).unwrap();
        assert_eq!(flat(&last), [1.0, 0.0, 0.2, 0.8]);
        assert!(
            roll_out(&layers, 2, true)
                .unwrap_err()
                .to_string()
                .contains("below 2")
        );
    }

    /// Weights that are not a softmax: rows that sum to less than nought would turn every sign around.
    #[test]
    fn rows_without_a_sum_are_no_shares() {
        let signed = matrix(&[0.5, -0.25, 0.25, -1.5], &[1, 2, 2]);
        let said = roll_out(std::slice::from_ref(&signed), 0, true).unwrap_err();
        assert_eq!(
            said.to_string(),
            "least sum of a token's attention weights and its residual is -0.25, but must be above 0 to be divided \
             into shares; decompx, attnlrp and cp-lrp take weights of any sign"
        );
        let sums = flat(&roll_out(&[signed], 0, false).unwrap());
        assert_eq!(sums, [1.5, -0.25, 0.25, -0.5]);
    }

    #[test]
    fn evidence_is_averaged_over_heads_where_it_is_positive() {
        let gradient = matrix(&[1.0, -1.0, 2.0, 1.0, -3.0, 0.5, 0.0, 2.0], &[1, 2, 2, 2]);
        let relevance = matrix(&[0.5, 0.5, 1.0, -1.0, -1.0, 2.0, 5.0, 1.0], &[1, 2, 2, 2]);
        let found = positive_evidence(&gradient, &relevance).unwrap();
        assert_eq!(flat(&found), [1.75, 0.5, 1.0, 1.0]);
    }
}
