//! Erasure: what the explained number loses when one token is masked out of attention (Li et
//! al. 2016, Understanding Neural Networks through Representation Erasure, arXiv 1612.08220).

use crate::error::engine;
use crate::explainer::Explainer;
use crate::target::number;
use crate::{Error, Explanation, Question, Result, Target, Unit};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Output, Pass};
use lapidary_signal::Signal;

/// Erasure in the list of explainers.
pub(crate) const ERASURE: Explainer = Explainer {
    name: "erasure",
    summary: "Drop of the score as each token is masked out of attention",
    source: "Li et al. 2016, arXiv 1612.08220",
    unit: Unit::Token,
    explain: |question, targets, _| explain(question, targets),
};

/// Inputs run at one time.
const AT_ONCE: usize = 32;

/// `y(x) − y(x without token k)` for each token: one forward pass of as many inputs as there are
/// tokens. Tokens that the padding masks anyway have the score zero.
fn explain(question: &Question<'_>, targets: &[Target]) -> Result<Vec<Explanation>> {
    let (ids, types) = match question.input {
        Input::Tokens { ids, token_types } => (ids, token_types.as_ref()),
        Input::Pixels(_) => {
            return Err(Error::invalid(
                "the input of erasure",
                "an image, whose patches cannot be masked",
                "tokens; attention-rollout, cp-lrp and decompx take images",
            ));
        }
    };
    let ids = engine(ids.narrow(0, 0, 1))?;
    let types = types
        .map(|types| engine(types.narrow(0, 0, 1)))
        .transpose()?;
    let length = engine(ids.dim(1))?;
    let kept = match question.padding {
        Some(padding) => {
            let first = engine(engine(padding.get(0))?.to_dtype(DType::U8))?;
            engine(first.to_vec1::<u8>())?
        }
        None => vec![1; length],
    };
    let run = |rows: Vec<Vec<u8>>| -> Result<Output> {
        let count = rows.len();
        let repeated =
            |one: &Tensor| engine(engine(one.broadcast_as((count, length)))?.contiguous());
        let input = Input::Tokens {
            ids: repeated(&ids)?,
            token_types: types.as_ref().map(repeated).transpose()?,
        };
        let flat: Vec<u8> = rows.into_iter().flatten().collect();
        let padding = engine(Tensor::from_vec(flat, (count, length), ids.device()))?;
        let pass = Pass {
            padding: Some(&padding),
            ..Pass::default()
        };
        Ok(question.model.forward(&input, pass)?)
    };
    let intact = run(vec![kept.clone()])?;
    let intact: Vec<f64> = targets
        .iter()
        .map(|target| number(&target.number(&intact)?))
        .collect::<Result<_>>()?;
    let mut scores = vec![vec![0.0; length]; targets.len()];
    let tokens: Vec<usize> = (0..length)
        .filter(|token| kept.get(*token) == Some(&1))
        .collect();
    for tokens in tokens.chunks(AT_ONCE) {
        let without = |token: &usize| {
            let each = kept.iter().enumerate();
            each.map(|(other, kept)| if other == *token { 0 } else { *kept })
                .collect()
        };
        let output = run(tokens.iter().map(without).collect())?;
        for (row, token) in tokens.iter().enumerate() {
            let output = of_row(&output, row)?;
            for ((target, intact), scores) in targets.iter().zip(&intact).zip(&mut scores) {
                if let Some(score) = scores.get_mut(*token) {
                    *score = intact - number(&target.number(&output)?)?;
                }
            }
        }
    }
    let explain = |(scores, explained): (Vec<f64>, f64)| {
        let left_out = vec!["what tokens do together: each is masked alone".to_owned()];
        Explanation::new(ERASURE.name, Unit::Token, scores, explained, left_out)
    };
    Ok(scores.into_iter().zip(intact).map(explain).collect())
}

/// What the model gives for one sequence of a batch.
fn of_row(output: &Output, row: usize) -> Result<Output> {
    let one = |signal: &Signal| Ok(signal.narrow(0, row, 1)?);
    let maybe = |signal: &Option<Signal>| -> Result<Option<Signal>> {
        signal.as_ref().map(one).transpose()
    };
    Ok(Output {
        hidden: one(&output.hidden)?,
        pooled: maybe(&output.pooled)?,
        logits: maybe(&output.logits)?,
        pixels: maybe(&output.pixels)?,
    })
}
