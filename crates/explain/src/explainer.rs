//! What an explainer is, and the list of all.

use crate::contextual::Phrase;
use crate::explainers::{
    alti, alti_logit, attention_gradcam, attention_rollout, chefer, contextual, decompx, erasure,
    full_lrp, gradient, gradient_norm, logit_attribution, partial_lrp, random, raw_attention,
};
use crate::{Error, Explanation, Result, Target, Unit};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_signal::contextual::ContextualRules;
use lapidary_signal::streams::StreamRules;

/// A model and one input to it. Of a batch, the first sequence is explained.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The model.
    pub model: &'a Model,
    /// What it is given.
    pub input: &'a Input,
    /// `[batch, length]`, 1 = keep; all kept when absent.
    pub padding: Option<&'a Tensor>,
}

impl<'a> Question<'a> {
    /// An input without padding.
    pub fn new(model: &'a Model, input: &'a Input) -> Self {
        Self {
            model,
            input,
            padding: None,
        }
    }

    /// A forward pass that `trace` looks into.
    pub(crate) fn pass<'b>(&self, trace: &'b Trace) -> Pass<'b>
    where
        'a: 'b,
    {
        Pass {
            padding: self.padding,
            trace: Some(trace),
            ..Pass::default()
        }
    }
}

/// What some explainers let the user choose; each documents which it reads.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// DecompX and what is built on it: the streams' rules.
    pub streams: StreamRules,
    /// Contextual decomposition: the rules of relevant parts.
    pub contextual: ContextualRules,
    /// Contextual decomposition: neighbouring tokens that are scored as one.
    pub phrase: Option<Phrase>,
    /// Integrated gradients: steps on the way from the zero embedding.
    pub steps: usize,
    /// Methods that multiply matrices layer by layer: the first layer that takes part.
    pub start_layer: usize,
    /// Methods that draw numbers.
    pub seed: u64,
    /// ALTI-Logit: what the embedding of the explained position writes counts as that token's.
    pub include_residual: bool,
    /// ALTI-Logit: what feed-forward parts write is spread over tokens by the mixing below them.
    pub trace_feedforward: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            streams: StreamRules::default(),
            contextual: ContextualRules::default(),
            phrase: None,
            steps: 32,
            start_layer: 0,
            seed: 0,
            include_residual: false,
            trace_feedforward: false,
        }
    }
}

/// Explains several targets of one question, sharing what they can: one forward pass at least.
pub type Explain = fn(&Question<'_>, &[Target], &Options) -> Result<Vec<Explanation>>;

/// A method that scores the units of an input or a model for a target.
#[derive(Clone, Copy, Debug)]
pub struct Explainer {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// Where it was published.
    pub source: &'static str,
    /// What its scores are over.
    pub unit: Unit,
    /// How it is done.
    pub explain: Explain,
}

impl Explainer {
    /// Explains one target.
    pub fn explain(
        &self,
        question: &Question<'_>,
        target: Target,
        options: &Options,
    ) -> Result<Explanation> {
        let mut all = (self.explain)(question, &[target], options)?;
        all.pop().ok_or_else(|| Error::Target {
            what: "explanations",
            found: "none".to_owned(),
            expected: "one for each target".to_owned(),
        })
    }
}

/// Every explainer, by name.
pub fn explainers() -> &'static [Explainer] {
    &EXPLAINERS
}

static EXPLAINERS: [Explainer; 22] = [
    alti::ALTI,
    alti_logit::ALTI_LOGIT,
    attention_gradcam::ATTENTION_GRADCAM,
    attention_rollout::ATTENTION_ROLLOUT,
    gradient::ATTNLRP,
    gradient::ATTNLRP_EXPLICIT,
    chefer::CHEFER,
    contextual::CONTEXTUAL_DECOMPOSITION,
    gradient::CP_LRP,
    gradient::CP_LRP_EXPLICIT,
    decompx::DECOMPX,
    erasure::ERASURE,
    full_lrp::FULL_LRP,
    alti::GLOBENC,
    gradient_norm::GRADIENT_L1,
    gradient_norm::GRADIENT_L2,
    gradient::GRADIENT_TIMES_INPUT,
    gradient::INTEGRATED_GRADIENTS,
    logit_attribution::LOGIT_ATTRIBUTION,
    partial_lrp::PARTIAL_LRP,
    random::RANDOM,
    raw_attention::RAW_ATTENTION,
];

/// The explainer of that name.
///
/// # Errors
/// When there is none; the message lists what there is.
///
/// ```
/// let error = lapidary_explain::explainer("decomp").unwrap_err();
/// assert!(error.to_string().contains("decompx"));
/// ```
pub fn explainer(name: &str) -> Result<&'static Explainer> {
    let found = EXPLAINERS.iter().find(|explainer| explainer.name == name);
    found.ok_or_else(|| {
        let names: Vec<_> = EXPLAINERS.iter().map(|explainer| explainer.name).collect();
        Error::Target {
            what: "method",
            found: name.to_owned(),
            expected: format!("one of {}", names.join(", ")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_found() {
        assert!(EXPLAINERS.windows(2).all(|two| two[0].name < two[1].name));
        for one in explainers() {
            assert_eq!(explainer(one.name).unwrap().name, one.name);
        }
    }
}
