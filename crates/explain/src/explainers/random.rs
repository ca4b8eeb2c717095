//! Random scores: what every other method should beat.

use crate::error::engine;
use crate::explainer::Explainer;
use crate::target::number;
use crate::{Explanation, Options, Question, Result, Target, Unit};
use lapidary_model::Pass;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random scores in the list of explainers; reads [`Options::seed`].
pub(crate) const RANDOM: Explainer = Explainer {
    name: "random",
    summary: "Random scores, to compare others with",
    source: "-",
    unit: Unit::Token,
    explain,
};

/// Uniform numbers below one, drawn from the seed for one target after the other.
fn explain(
    question: &Question<'_>,
    targets: &[Target],
    options: &Options,
) -> Result<Vec<Explanation>> {
    let pass = Pass {
        padding: question.padding,
        ..Pass::default()
    };
    let output = question.model.forward(question.input, pass)?;
    let tokens = engine(output.hidden.value().dim(1))?;
    let mut generator = ChaCha8Rng::seed_from_u64(options.seed);
    let explain = |target: &Target| {
        Ok(Explanation::new(
            RANDOM.name,
            Unit::Token,
            (0..tokens).map(|_| generator.random::<f64>()).collect(),
            number(&target.number(&output)?)?,
            vec!["everything".to_owned()],
        ))
    };
    targets.iter().map(explain).collect()
}
