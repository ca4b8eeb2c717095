//! The length of the gradient at each token's embedding (Simonyan et al. 2013, Deep Inside
//! Convolutional Networks, arXiv 1312.6034): how much the explained number could change, without
//! a sign.

use super::gradient::Forward;
use crate::error::engine;
use crate::explainer::Explainer;
use crate::{Explanation, Question, Result, Target, Unit};
use lapidary_kernels::{D, DType, VectorNorm};
use lapidary_signal::relevance::RelevanceRules;

/// The gradient's absolute values in the list of explainers.
pub(crate) const GRADIENT_L1: Explainer = Explainer {
    name: "gradient-l1",
    summary: "Sum of the gradient's absolute values at each token",
    source: "Simonyan et al. 2013, arXiv 1312.6034",
    unit: Unit::Token,
    explain: |question, targets, _| lengths(GRADIENT_L1.name, question, targets, VectorNorm::L1),
};

/// The gradient's Euclidean length in the list of explainers.
pub(crate) const GRADIENT_L2: Explainer = Explainer {
    name: "gradient-l2",
    summary: "Length of the gradient at each token",
    source: "Simonyan et al. 2013, arXiv 1312.6034",
    unit: Unit::Token,
    explain: |question, targets, _| lengths(GRADIENT_L2.name, question, targets, VectorNorm::L2),
};

fn lengths(
    name: &str,
    question: &Question<'_>,
    targets: &[Target],
    norm: VectorNorm,
) -> Result<Vec<Explanation>> {
    let rules = RelevanceRules::gradient_times_input();
    let forward = Forward::new(question, rules, None)?;
    let explain = |target: &Target| {
        let (explained, gradient) = forward.gradient(*target)?;
        let gradient = engine(engine(gradient.get(0))?.to_dtype(DType::F64))?;
        let lengths = match norm {
            VectorNorm::L1 => engine(engine(gradient.abs())?.sum(D::Minus1))?,
            VectorNorm::L2 => engine(engine(engine(gradient.sqr())?.sum(D::Minus1))?.sqrt())?,
        };
        let left_out =
            vec!["the sign: the scores are sensitivities, not parts of the number".to_owned()];
        Ok(Explanation::new(
            name,
            Unit::Token,
            engine(lengths.to_vec1::<f64>())?,
            explained,
            left_out,
        ))
    };
    targets.iter().map(explain).collect()
}
