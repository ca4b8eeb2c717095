//! Contextual decomposition (Hsu et al., arXiv 2407.00886): each token, or a phrase as one, is
//! made the relevant part of the embeddings and followed to the score.
//!
//! What a source scores is what it contributes together with its interactions with the rest,
//! which every source that takes part in them is given; so the scores need not sum to the number.

use crate::contextual::{decompose, phrases};
use crate::error::engine;
use crate::explainer::Explainer;
use crate::{Explanation, Options, Question, Result, Target, Unit};
use lapidary_model::{Input, InputSpec};

/// Contextual decomposition in the list of explainers; reads [`Options::contextual`] and
/// [`Options::phrase`].
pub(crate) const CONTEXTUAL_DECOMPOSITION: Explainer = Explainer {
    name: "contextual-decomposition",
    summary: "Each token, or a phrase, as the relevant part of the value",
    source: "Hsu et al. 2024, arXiv 2407.00886",
    unit: Unit::Token,
    explain,
};

fn explain(
    question: &Question<'_>,
    targets: &[Target],
    options: &Options,
) -> Result<Vec<Explanation>> {
    let units = phrases(tokens(question)?, options.phrase)?;
    let sources: Vec<Vec<usize>> = units.iter().cloned().map(Iterator::collect).collect();
    let (scores, numbers) = decompose(question, targets, &sources, options.contextual)?;
    let left_out = "interactions of sources are in the scores of each that takes part";
    let explain = |(scores, explained)| {
        let unit = match options.phrase {
            Some(_) => Unit::Phrase,
            None => Unit::Token,
        };
        let name = CONTEXTUAL_DECOMPOSITION.name;
        let left_out = vec![left_out.to_owned()];
        let explanation = Explanation::new(name, unit, scores, explained, left_out);
        match options.phrase {
            Some(_) => explanation.with_labels(units.iter().map(named).collect()),
            None => explanation,
        }
    };
    Ok(scores.into_iter().zip(numbers).map(explain).collect())
}

/// The positions of a unit, as the command line takes them.
fn named(unit: &std::ops::Range<usize>) -> String {
    match unit.len() {
        1 => unit.start.to_string(),
        _ => format!("{}-{}", unit.start, unit.end.saturating_sub(1)),
    }
}

/// How many positions the embeddings have.
fn tokens(question: &Question<'_>) -> Result<usize> {
    match (question.input, &question.model.spec().input) {
        (Input::Tokens { ids, .. }, _) => engine(ids.dim(1)),
        (Input::Pixels(_), InputSpec::Patches(spec)) => Ok(spec.patches() + spec.class_tokens),
        (Input::Pixels(_), InputSpec::Tokens(_)) => Ok(0),
    }
}
