//! Methods that read one backward pass: gradient times input, integrated gradients (Sundararajan
//! et al., arXiv 1703.01365), and relevance propagation under any rules.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::engine;
use crate::{Error, Explanation, Result, Target, Unit};
use lapidary_kernels::{D, DType, Tensor, Var};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_signal::relevance::{
    ActivationRule, AttentionRule, NormRule, ProductRule, RelevanceRules,
};

/// Relevance of the input's tokens under `rules`, summed over the features of each embedding.
pub fn relevance(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    rules: RelevanceRules,
) -> Result<Explanation> {
    let (leaf, explained, gradient) = backward(model, input, padding, target, rules, None)?;
    let scores = token_sums(&engine(leaf.detach() * gradient)?)?;
    Ok(Explanation::new(
        "relevance",
        Unit::Token,
        scores,
        explained,
        left_out(&rules),
    ))
}

/// Gradient times input, summed over the features of each token's embedding.
pub fn gradient_times_input(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
) -> Result<Explanation> {
    let rules = RelevanceRules::gradient_times_input();
    let explanation = relevance(model, input, padding, target, rules)?;
    Ok(Explanation {
        method: "gradient-x-input".to_owned(),
        ..explanation
    })
}

/// Integrated gradients from the zero embedding, by the midpoint rule with `steps` steps.
pub fn integrated_gradients(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    steps: usize,
) -> Result<Explanation> {
    let rules = RelevanceRules::gradient_times_input();
    let (leaf, explained, _) = backward(model, input, padding, target, rules, None)?;
    let mut total = engine(leaf.zeros_like())?;
    for step in 0..steps.max(1) {
        let fraction = (step as f64 + 0.5) / steps.max(1) as f64;
        let (_, _, gradient) = backward(model, input, padding, target, rules, Some(fraction))?;
        total = engine(total + gradient)?;
    }
    let scores = token_sums(&engine(
        engine(leaf.detach() * total)? / steps.max(1) as f64,
    )?)?;
    let left_out =
        vec!["the score of the zero embedding, and the error of the quadrature".to_owned()];
    Ok(Explanation::new(
        "integrated-gradients",
        Unit::Token,
        scores,
        explained,
        left_out,
    ))
}

/// One forward and backward pass with the embeddings, scaled by `fraction`, as the leaf: the
/// leaf, the explained number and the gradient.
fn backward(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    rules: RelevanceRules,
    fraction: Option<f64>,
) -> Result<(Tensor, f64, Tensor)> {
    let slot: Arc<Mutex<Option<Var>>> = Arc::default();
    let kept = slot.clone();
    let trace = Trace::new().replace("embeddings", move |_, signal| {
        let signal = match fraction {
            Some(fraction) => signal.scale(fraction)?,
            None => signal,
        };
        let (signal, leaf) = signal.into_relevance(rules)?;
        *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(leaf);
        Ok(signal)
    })?;
    let pass = Pass {
        padding,
        trace: Some(&trace),
        ..Pass::default()
    };
    let output = model.forward(input, pass)?;
    let vector = target.vector(&output)?;
    let direction = target.direction(vector.value())?;
    let explained = engine(engine(vector.value().broadcast_mul(&direction))?.sum_all())?;
    let gradients = engine(explained.backward())?;
    let leaf = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let leaf = leaf.ok_or_else(|| Error::Target {
        what: "site",
        found: "embeddings never written".to_owned(),
        expected: "a model that writes embeddings".to_owned(),
    })?;
    let gradient = match gradients.get(leaf.as_tensor()) {
        Some(gradient) => gradient.clone(),
        None => engine(leaf.zeros_like())?,
    };
    let explained = engine(engine(explained.to_dtype(DType::F64))?.to_scalar::<f64>())?;
    Ok((leaf.as_tensor().clone(), explained, gradient))
}

/// `[1.., tokens, features] -> tokens`, of the first sequence.
fn token_sums(relevance: &Tensor) -> Result<Vec<f64>> {
    let sums = engine(engine(engine(relevance.get(0))?.sum(D::Minus1))?.to_dtype(DType::F64))?;
    engine(sums.to_vec1::<f64>())
}

fn left_out(rules: &RelevanceRules) -> Vec<String> {
    let mut left_out = vec!["the parts of biases in every layer".to_owned()];
    let mut note = |condition: bool, text: &str| {
        if condition {
            left_out.push(text.to_owned());
        }
    };
    note(
        rules.attention == AttentionRule::Detach,
        "the effect of tokens on attention weights",
    );
    note(
        rules.norm == NormRule::Detach,
        "the effect of tokens on the deviations of norms",
    );
    note(
        rules.activation == ActivationRule::Gradient,
        "the curvature of activations",
    );
    note(
        rules.product == ProductRule::Gradient,
        "what products count twice",
    );
    note(
        rules.epsilon > 0.0,
        "what the epsilon of linear layers damps",
    );
    left_out
}
