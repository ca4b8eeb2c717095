//! Relevance inside a model: of each token at each layer, and of each head.

use crate::error::engine;
use crate::explainers::gradient::{Forward, token_sums};
use crate::leaks::{self, Leak};
use crate::{Question, Result, Target};
use lapidary_kernels::DType;
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::Trace;
use lapidary_signal::relevance::RelevanceRules;
use serde::Serialize;

/// Relevance of what flows between and within the blocks, of the first sequence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatentRelevance {
    /// The explained number.
    pub explained: f64,
    /// Of each token where it enters each block, and last where it leaves the last one:
    /// `[blocks + 1][token]`.
    pub tokens: Vec<Vec<f64>>,
    /// Of what each head of attention gives, `[block][head]`; empty for other mixers.
    pub heads: Vec<Vec<f64>>,
    /// Of each hidden feature of the feed-forward part, summed over tokens, `[block][feature]`;
    /// empty where there is none.
    pub neurons: Vec<Vec<f64>>,
    /// What each part of the model keeps.
    pub leaks: Vec<Leak>,
}

/// Relevance at the sites between blocks, at the heads' outputs before they are projected, and at
/// the hidden features of feed-forward parts, by `rules`, for the first sequence of the question.
///
/// # Errors
/// When the model fails, or the rules cannot be carried.
///
/// ```
/// use lapidary_explain::{Question, Target, latent_relevance};
/// use lapidary_kernels::{DType, Device, Tensor};
/// use lapidary_model::{Input, Model, ModelSpec};
/// use lapidary_signal::relevance::RelevanceRules;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let spec: ModelSpec = serde_json::from_str(r#"{
///     "width": 8,
///     "input": { "kind": "tokens", "vocabulary": 10, "length": 4 },
///     "blocks": [{ "repeat": 2, "attention": { "kind": "multi-head", "heads": 2 } }],
///     "head": { "kind": "pooled", "labels": 2 }
/// }"#)?;
/// let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
/// let input = Input::tokens(Tensor::new(&[[3u32, 1, 4]], &Device::Cpu)?);
/// let question = Question::new(&model, &input);
/// let rules = RelevanceRules::attention_aware().explicit();
/// let inside = latent_relevance(&question, Target::class(1), rules)?;
/// assert_eq!(inside.heads[1].len(), 2); // two heads in the second block
/// assert_eq!(inside.tokens[2].len(), 3); // three tokens after it
/// # Ok(()) }
/// ```
pub fn latent_relevance(
    question: &Question<'_>,
    target: Target,
    rules: RelevanceRules,
) -> Result<LatentRelevance> {
    crate::error::require_one_stream(question.model, "relevance inside a model")?;
    let blocks = question.model.spec().expanded_blocks();
    let mut trace = leaks::tap(Trace::new(), blocks.len())?;
    for index in 0..blocks.len() {
        let path = format!("blocks.{index}");
        trace = trace.tap(&format!("{path}.{{attention.mixed,feedforward.hidden}}"))?;
    }
    let forward = Forward::through(question, rules, None, trace)?;
    let pulled = forward.relevance(target)?;
    let records = forward.trace.records();
    // `[tokens, features]` of the first sequence; nothing where nothing arrives.
    let at = |site: &str| {
        let reached =
            |record: &&_| lapidary_signal::SiteRecord::is_reached(record, &pulled.gradients);
        let record = records.get(site).filter(reached);
        record
            .map(|record| Ok::<_, crate::Error>(record.relevance(&pulled.gradients)?))
            .transpose()
    };
    let tokens_at = |site: &str| match at(site)? {
        Some(relevance) => token_sums(&relevance),
        None => Ok(vec![0.0; forward.leaf.dims().get(1).copied().unwrap_or(0)]),
    };
    let features_at = |site: &str| match at(site)? {
        Some(relevance) => {
            let sums = engine(engine(relevance.get(0))?.sum(0))?;
            engine(engine(sums.to_dtype(DType::F64))?.to_vec1::<f64>())
        }
        None => Ok(Vec::new()),
    };
    let (mut tokens, mut heads, mut neurons) = (Vec::new(), Vec::new(), Vec::new());
    for (index, block) in blocks.iter().enumerate() {
        tokens.push(tokens_at(&format!("blocks.{index}.in"))?);
        let count = match &block.attention {
            MixerSpec::MultiHead(spec) => spec.heads,
            _ => 0,
        };
        let features = features_at(&format!("blocks.{index}.attention.mixed"))?;
        heads.push(match features.len().checked_div(count) {
            Some(width) => {
                let each = features.chunks(width.max(1));
                each.map(|head| head.iter().sum()).collect()
            }
            None => Vec::new(),
        });
        neurons.push(features_at(&format!("blocks.{index}.feedforward.hidden"))?);
    }
    if let Some(last) = blocks.len().checked_sub(1) {
        tokens.push(tokens_at(&format!("blocks.{last}.out"))?);
    }
    Ok(LatentRelevance {
        explained: pulled.explained,
        tokens,
        heads,
        neurons,
        leaks: pulled.leaks,
    })
}
