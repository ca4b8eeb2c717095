//! Sources that are tokens and phrases of the input.

use std::ops::Range;

use super::AT_ONCE;
use crate::error::engine;
use crate::target::number;
use crate::{Error, Question, Result, Target};
use lapidary_kernels::{DType, Tensor};
use lapidary_signal::contextual::ContextualRules;
use lapidary_signal::{Signal, Trace};

/// Neighbouring tokens that are scored as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phrase {
    /// Position of the first token.
    pub first: usize,
    /// Position of the last.
    pub last: usize,
}

/// The positions of a sequence of `length`, those of `phrase` as one and each other alone.
///
/// # Errors
/// When the phrase is empty or reaches beyond the sequence.
pub fn phrases(length: usize, phrase: Option<Phrase>) -> Result<Vec<Range<usize>>> {
    let Some(Phrase { first, last }) = phrase else {
        return Ok((0..length).map(|at| at..at + 1).collect());
    };
    if first > last || last >= length {
        return Err(Error::invalid(
            "phrase",
            format!("{first}-{last}"),
            format!("FIRST-LAST with FIRST ≤ LAST < {length}, the number of tokens"),
        ));
    }
    let alone = |range: Range<usize>| range.map(|at| at..at + 1);
    let joined = std::iter::once(first..last + 1);
    Ok(alone(0..first)
        .chain(joined)
        .chain(alone(last + 1..length))
        .collect())
}

/// The contributions of `sources`, each a set of positions, to each target: the relevant part of
/// the target's number when the embeddings at those positions are relevant, `[target][source]`;
/// and the numbers themselves, of the first sequence of the question.
///
/// Sources may overlap, and need not cover the input: each is followed by itself. Activations and
/// products give what would be lost without a source, so that scores of disjoint sources do not
/// sum to the number.
///
/// ```
/// use lapidary_explain::{Question, Target, contextual::decompose};
/// use lapidary_kernels::{DType, Device, Tensor};
/// use lapidary_model::{Input, Model};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let spec = serde_json::from_str(r#"{
///     "width": 8,
///     "input": { "kind": "tokens", "vocabulary": 10, "length": 4 },
///     "blocks": [{ "attention": { "kind": "multi-head", "heads": 2, "causal": true } }],
///     "head": { "kind": "language-model" }
/// }"#)?;
/// let model = Model::initialised(spec, 1, DType::F64, &Device::Cpu)?;
/// let input = Input::tokens(Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?);
/// let question = Question::new(&model, &input);
/// let sources = [vec![0, 1, 2], vec![]];
/// let (scores, numbers) = decompose(&question, &[Target::class(4)], &sources, Default::default())?;
/// assert!((scores[0][0] - numbers[0]).abs() < 1e-12); // everything
/// assert_eq!(scores[0][1], 0.0); // nothing
/// # Ok(()) }
/// ```
///
/// # Errors
/// When a position is beyond the input, or a part of the model has no rule (recurrences).
pub fn decompose(
    question: &Question<'_>,
    targets: &[Target],
    sources: &[Vec<usize>],
    rules: ContextualRules,
) -> Result<(Vec<Vec<f64>>, Vec<f64>)> {
    let mut scores = vec![Vec::with_capacity(sources.len()); targets.len()];
    let mut numbers = vec![f64::NAN; targets.len()];
    for chunk in sources.chunks(AT_ONCE) {
        let owned = chunk.to_vec();
        let trace = Trace::new().replace("embeddings", move |_, signal| {
            let relevant = at_positions(&signal, &owned)?;
            signal.into_contextual(relevant, rules)
        })?;
        let output = question
            .model
            .forward(question.input, question.pass(&trace))?;
        for ((scores, explained), target) in scores.iter_mut().zip(&mut numbers).zip(targets) {
            let vector = target.vector(&output)?;
            let direction = target.direction(vector.value())?;
            // [sources, 1, features] · [features]
            let along = engine(vector.relevant()?.broadcast_mul(&direction))?;
            let along = engine(engine(along.sum((1, 2)))?.to_dtype(DType::F64))?;
            scores.extend(engine(along.to_vec1::<f64>())?);
            *explained = number(&target.number(&output)?)?;
        }
    }
    Ok((scores, numbers))
}

/// `signal` `[batch, length, width]` at each source's positions and zero elsewhere:
/// `[sources, batch, length, width]`.
fn at_positions(signal: &Signal, sources: &[Vec<usize>]) -> lapidary_signal::Result<Tensor> {
    let length = signal.dims().get(1).copied().unwrap_or(0);
    let mut keep = vec![0f32; sources.len() * length];
    for (row, source) in keep.chunks_mut(length.max(1)).zip(sources) {
        for position in source {
            *row.get_mut(*position).ok_or_else(|| {
                let expected = format!("below {length}, the number of tokens");
                lapidary_signal::Error::invalid("position of a source", position, expected)
            })? = 1.0;
        }
    }
    let shape = (sources.len(), 1, length, 1);
    Tensor::from_vec(keep, shape, signal.device())
        .and_then(|keep| keep.to_dtype(signal.dtype())?.broadcast_mul(signal.value()))
        .map_err(|error| lapidary_kernels::Error::from(error).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phrase_stands_between_its_neighbours() {
        let ranges = |first, last| phrases(5, Some(Phrase { first, last }));
        assert_eq!(ranges(1, 2).unwrap(), [0..1, 1..3, 3..4, 4..5]);
        assert_eq!(ranges(0, 4).unwrap(), std::slice::from_ref(&(0..5)));
        assert_eq!(phrases(2, None).unwrap(), [0..1, 1..2]);
        for (first, last) in [(2, 1), (3, 5)] {
            let said = ranges(first, last).unwrap_err().to_string();
            assert!(
                said.contains(&format!("phrase is {first}-{last}")),
                "{said}"
            );
        }
    }
}
