//! ALTI-Logit (Ferrando et al. 2023, Explaining How Transformers Use Context to Build
//! Predictions, arXiv 2305.12535), for models whose norms stand before their parts.
//!
//! The residual stream at the explained position `t` is a sum of what the parts write. With the
//! final norm linearised there, `L_f`, the explained number is `U · L_f(·)` of each:
//!
//! ```text
//! y = U·L_f(x⁰_t) + Σ_l ( Σ_j U·L_f(T^l_t(x_j)) + U·L_f(b_O^l) + U·L_f(mlp^l_t) ) + U·β_f + rest
//! ```
//!
//! What attention writes from position `j` of block `l` is then traced to the tokens by the
//! mixing of the blocks below, `r_k = Σ_l Σ_j U·L_f(T^l_t(x_j)) M^{l−1}_jk` ([`crate::mixing`]).
//! All else is in the account, term by term, so that everything sums to the number.

use crate::error::engine;
use crate::explainer::Explainer;
use crate::mixing::{Captured, Contributions, FixedNorm, after, dot, identity};
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::{DType, Tensor};
use lapidary_parts::block::Wiring;
use lapidary_parts::norm::NormSpec;

/// ALTI-Logit in the list of explainers; reads [`Options::include_residual`] and
/// [`Options::trace_feedforward`].
pub(crate) const ALTI_LOGIT: Explainer = Explainer {
    name: "alti-logit",
    summary: "What attention writes to the logit, traced to tokens (ALTI-Logit)",
    source: "Ferrando et al. 2023, arXiv 2305.12535",
    unit: Unit::Token,
    explain: |question, targets, options| {
        let updates = logit_updates(question, targets)?;
        Ok(updates.iter().map(|one| one.explanation(options)).collect())
    },
};

/// What one part of a block writes to the explained number.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockUpdates {
    /// What each head writes from each position, `[head][token]`, before it is traced to the
    /// input.
    pub heads: Vec<Vec<f64>>,
    /// The same of all heads, traced to the input's tokens.
    pub tokens: Vec<f64>,
    /// What the bias of attention's output writes.
    pub output_bias: f64,
    /// What the feed-forward part writes.
    pub feedforward: f64,
    /// Row `t` of the mixing after the block: the shares of tokens in the position's vector.
    pub mixing: Vec<f64>,
}

/// The explained number, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitUpdates {
    /// The explained number.
    pub explained: f64,
    /// The position whose vector it is read from.
    pub position: usize,
    /// What the position's embedding writes.
    pub embedding: f64,
    /// For each block.
    pub blocks: Vec<BlockUpdates>,
    /// What the bias of the final norm writes.
    pub norm_bias: f64,
    /// What is the head's alone: its bias, and of heads that are not affine what their
    /// linearisation leaves.
    pub head: f64,
}

impl LogitUpdates {
    /// Scores of tokens, and the account of all else.
    pub fn explanation(&self, options: &Options) -> Explanation {
        let tokens = self.blocks.first().map_or(0, |block| block.tokens.len());
        let mut scores = vec![0.0; tokens];
        let mut add = |shares: &[f64], factor: f64| {
            for (score, share) in scores.iter_mut().zip(shares) {
                *score += factor * share;
            }
        };
        for block in &self.blocks {
            add(&block.tokens, 1.0);
            if options.trace_feedforward {
                add(&block.mixing, block.feedforward);
            }
        }
        if options.include_residual
            && let Some(score) = scores.get_mut(self.position)
        {
            *score += self.embedding;
        }
        let sum = |of: fn(&BlockUpdates) -> f64| self.blocks.iter().map(of).sum::<f64>();
        let mut elsewhere = Vec::new();
        if !options.include_residual {
            elsewhere.push(("embedding of the position".to_owned(), self.embedding));
        }
        if !options.trace_feedforward {
            elsewhere.push(("feed-forward parts".to_owned(), sum(|b| b.feedforward)));
        }
        elsewhere.push(("biases of attention".to_owned(), sum(|b| b.output_bias)));
        elsewhere.push(("bias of the final norm".to_owned(), self.norm_bias));
        elsewhere.push(("head".to_owned(), self.head));
        elsewhere.retain(|(_, amount)| *amount != 0.0);
        let left_out = vec![
            "the effect of tokens on attention weights and on the deviations of norms".to_owned(),
        ];
        Explanation::new(
            ALTI_LOGIT.name,
            Unit::Token,
            scores,
            self.explained,
            left_out,
        )
        .with_elsewhere(elsewhere)
    }
}

/// Takes the explained number of each target apart, for the first sequence of the input.
///
/// # Errors
/// For models with post-norm blocks or other mixers than self-attention, and targets that read
/// several positions, as of a head that pools by the mean.
pub fn logit_updates(question: &Question<'_>, targets: &[Target]) -> Result<Vec<LogitUpdates>> {
    let specs = question.model.spec().expanded_blocks();
    let is_post_norm = |wiring: Wiring| wiring == Wiring::PostNorm;
    if let Some(index) = specs.iter().position(|block| is_post_norm(block.wiring)) {
        return Err(Error::invalid(
            format!("the wiring of block {index}"),
            "post-norm",
            "pre-norm or parallel for alti-logit; alti, globenc and decompx take post-norm",
        ));
    }
    let captured = Captured::new(question, targets)?;
    let final_norm = final_norm(&captured)?;
    let mut all = targets
        .iter()
        .map(|target| Line::new(&captured, &final_norm, target))
        .collect::<Result<Vec<_>>>()?;
    let tokens = engine(captured.last()?.dim(0))?;
    let mut before = identity(tokens);
    for index in 0..captured.blocks() {
        let attention = captured.attention(index)?;
        let feedforward = captured.feedforward(index)?;
        let mixing = after(&Contributions::Alti.of(&captured, index)?, &before);
        for line in &mut all {
            let t = line.updates.position;
            let heads = attention.writes(t, &line.direction)?;
            let block = BlockUpdates {
                tokens: traced(&heads, &before),
                heads,
                output_bias: match &attention.bias {
                    Some(bias) => dot(&numbers(bias)?, &line.direction),
                    None => 0.0,
                },
                feedforward: match &feedforward {
                    Some(written) => line.along(written)?,
                    None => 0.0,
                },
                mixing: mixing.get(t).cloned().unwrap_or_default(),
            };
            line.updates.blocks.push(block);
        }
        before = mixing;
    }
    Ok(all.into_iter().map(|line| line.updates).collect())
}

/// One target while its number is taken apart.
struct Line {
    /// The direction in the residual stream along which the number is read, `[width]`.
    direction: Vec<f64>,
    updates: LogitUpdates,
}

impl Line {
    fn new(captured: &Captured<'_>, final_norm: &FixedNorm, target: &Target) -> Result<Self> {
        let reading = captured.reading(target)?;
        let last = engine(captured.last()?.dims2())?;
        let (position, along) = match reading.at.as_slice() {
            [one] => one.clone(),
            [] => (last.0.saturating_sub(1), vec![0.0; last.1]),
            several => {
                return Err(Error::invalid(
                    "the number of positions that the target reads",
                    several.len(),
                    "one for alti-logit; alti and decompx take any",
                ));
            }
        };
        let mut line = Self {
            direction: final_norm.pulled_back(position, &along)?,
            updates: LogitUpdates {
                explained: reading.explained,
                position,
                embedding: 0.0,
                blocks: Vec::new(),
                norm_bias: match final_norm.bias() {
                    Some(bias) => dot(&numbers(bias)?, &along),
                    None => 0.0,
                },
                head: reading.rest,
            },
        };
        line.updates.embedding = line.along(&captured.site("blocks.0.in")?)?;
        Ok(line)
    }

    /// The row of `written` `[tokens, width]` at the position, along the direction.
    fn along(&self, written: &Tensor) -> Result<f64> {
        let row = engine(written.get(self.updates.position))?;
        Ok(dot(&numbers(&row)?, &self.direction))
    }
}

fn final_norm(captured: &Captured<'_>) -> Result<FixedNorm> {
    let model = captured.model();
    let spec = model.spec().final_norm.unwrap_or(NormSpec::None);
    FixedNorm::at(model, "final_norm", &spec, &captured.last()?)
}

/// `Σ_j (Σ_h update^h_j) M_jk` for each token `k`.
fn traced(heads: &[Vec<f64>], mixing: &[Vec<f64>]) -> Vec<f64> {
    let mut updates = vec![0.0; mixing.len()];
    for head in heads {
        for (update, of_head) in updates.iter_mut().zip(head) {
            *update += of_head;
        }
    }
    let rows = after(&[updates], mixing);
    rows.into_iter().next().unwrap_or_default()
}

fn numbers(vector: &Tensor) -> Result<Vec<f64>> {
    engine(engine(vector.to_dtype(DType::F64))?.to_vec1::<f64>())
}
