//! Methods that read one backward pass: gradient times input, integrated gradients (Sundararajan
//! et al., arXiv 1703.01365), and relevance propagation under any rules.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::engine;
use crate::explainer::Explainer;
use crate::leaks::{self, Leak};
use crate::target::number;
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::{D, DType, GradStore, Tensor, Var, backward};
use lapidary_model::{Input, Model, Output};
use lapidary_signal::Trace;
use lapidary_signal::relevance::{
    ActivationRule, AttentionRule, Form, NormRule, ProductRule, RelevanceRules, Seed,
};

/// AttnLRP in the list of explainers.
pub(crate) const ATTNLRP: Explainer = Explainer {
    name: "attnlrp",
    summary: "Relevance through attention weights too (AttnLRP)",
    source: "Achtibat et al. 2024, arXiv 2402.05602",
    unit: Unit::Token,
    explain: |question, targets, _| {
        let rules = RelevanceRules::attention_aware();
        times_gradient(ATTNLRP.name, question, targets, rules)
    },
};

/// AttnLRP in its explicit form in the list of explainers.
pub(crate) const ATTNLRP_EXPLICIT: Explainer = Explainer {
    name: "attnlrp-explicit",
    summary: "AttnLRP as printed, a stabiliser at every quotient",
    explain: |question, targets, _| {
        let rules = RelevanceRules::attention_aware().explicit();
        times_gradient(ATTNLRP_EXPLICIT.name, question, targets, rules)
    },
    ..ATTNLRP
};

/// CP-LRP in the list of explainers.
pub(crate) const CP_LRP: Explainer = Explainer {
    name: "cp-lrp",
    summary: "Relevance with attention weights held fixed (CP-LRP)",
    source: "Ali et al. 2022, arXiv 2202.07304",
    unit: Unit::Token,
    explain: |question, targets, _| {
        times_gradient(CP_LRP.name, question, targets, RelevanceRules::value_only())
    },
};

/// CP-LRP in its explicit form in the list of explainers.
pub(crate) const CP_LRP_EXPLICIT: Explainer = Explainer {
    name: "cp-lrp-explicit",
    summary: "CP-LRP as printed, a stabiliser at every quotient",
    explain: |question, targets, _| {
        let rules = RelevanceRules {
            epsilon: 1e-6,
            ..RelevanceRules::value_only().explicit()
        };
        times_gradient(CP_LRP_EXPLICIT.name, question, targets, rules)
    },
    ..CP_LRP
};

/// Gradient times input in the list of explainers.
pub(crate) const GRADIENT_TIMES_INPUT: Explainer = Explainer {
    name: "gradient-x-input",
    summary: "Gradient times input",
    source: "Shrikumar et al. 2016, arXiv 1605.01713",
    unit: Unit::Token,
    explain: |question, targets, _| {
        let rules = RelevanceRules::gradient_times_input();
        times_gradient(GRADIENT_TIMES_INPUT.name, question, targets, rules)
    },
};

/// Integrated gradients in the list of explainers; reads [`Options::steps`].
pub(crate) const INTEGRATED_GRADIENTS: Explainer = Explainer {
    name: "integrated-gradients",
    summary: "Gradients along the way from the zero embedding",
    source: "Sundararajan et al. 2017, arXiv 1703.01365",
    unit: Unit::Token,
    explain: |question, targets, options| along_the_way(question, targets, options.steps),
};

/// Relevance of the input's tokens under `rules`, summed over the features of each embedding.
pub fn relevance(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    rules: RelevanceRules,
) -> Result<Explanation> {
    let question = Question {
        model,
        input,
        padding,
    };
    one(times_gradient("relevance", &question, &[target], rules)?)
}

/// Gradient times input, summed over the features of each token's embedding.
pub fn gradient_times_input(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
) -> Result<Explanation> {
    let question = Question {
        model,
        input,
        padding,
    };
    GRADIENT_TIMES_INPUT.explain(&question, target, &Options::default())
}

/// Integrated gradients from the zero embedding, by the midpoint rule with `steps` steps.
pub fn integrated_gradients(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    steps: usize,
) -> Result<Explanation> {
    let question = Question {
        model,
        input,
        padding,
    };
    one(along_the_way(&question, &[target], steps)?)
}

fn one(explanations: Vec<Explanation>) -> Result<Explanation> {
    let one = explanations.into_iter().next();
    one.ok_or_else(|| Error::Target {
        what: "explanations",
        found: "none".to_owned(),
        expected: "one for each target".to_owned(),
    })
}

fn times_gradient(
    name: &str,
    question: &Question<'_>,
    targets: &[Target],
    rules: RelevanceRules,
) -> Result<Vec<Explanation>> {
    let forward = Forward::with_leaks(question, rules)?;
    let explain = |target: &Target| {
        let found = forward.relevance(*target)?;
        let scores = token_sums(&found.of_leaf)?;
        let explanation =
            Explanation::new(name, Unit::Token, scores, found.explained, left_out(&rules));
        Ok(explanation.with_leaks(found.leaks))
    };
    targets.iter().map(explain).collect()
}

fn along_the_way(
    question: &Question<'_>,
    targets: &[Target],
    steps: usize,
) -> Result<Vec<Explanation>> {
    let rules = RelevanceRules::gradient_times_input();
    let steps = steps.max(1);
    let intact = Forward::new(question, rules, None)?;
    let mut totals = vec![engine(intact.leaf.zeros_like())?; targets.len()];
    for step in 0..steps {
        let fraction = (step as f64 + 0.5) / steps as f64;
        let forward = Forward::new(question, rules, Some(fraction))?;
        for (total, target) in totals.iter_mut().zip(targets) {
            *total = engine(&*total + forward.gradient(*target)?.1)?;
        }
    }
    let explain = |(total, target): (Tensor, &Target)| {
        let scores = token_sums(&engine(
            engine(intact.leaf.detach() * total)? / steps as f64,
        )?)?;
        let left_out =
            vec!["the score of the zero embedding, and the error of the quadrature".to_owned()];
        Ok(Explanation::new(
            INTEGRATED_GRADIENTS.name,
            Unit::Token,
            scores,
            number(&target.number(&intact.output)?)?,
            left_out,
        ))
    };
    totals.into_iter().zip(targets).map(explain).collect()
}

/// A forward pass under relevance rules with the embeddings as the leaf, from which any number
/// of targets can be pulled back.
pub(crate) struct Forward {
    pub(crate) leaf: Var,
    pub(crate) output: Output,
    pub(crate) trace: Trace,
    rules: RelevanceRules,
    blocks: usize,
}

/// What one backward pass brings.
pub(crate) struct Pulled {
    /// The explained number.
    pub(crate) explained: f64,
    /// Relevance of the embeddings, `[batch, tokens, features]`.
    pub(crate) of_leaf: Tensor,
    /// What each part keeps; empty without [`Forward::with_leaks`].
    pub(crate) leaks: Vec<Leak>,
    /// For the sites that the trace taps.
    pub(crate) gradients: GradStore,
}

impl Forward {
    /// The embeddings are scaled by `fraction` first.
    pub(crate) fn new(
        question: &Question<'_>,
        rules: RelevanceRules,
        fraction: Option<f64>,
    ) -> Result<Self> {
        Self::through(question, rules, fraction, Trace::new())
    }

    /// Taps what the leaks are read from.
    pub(crate) fn with_leaks(question: &Question<'_>, rules: RelevanceRules) -> Result<Self> {
        let trace = leaks::tap(Trace::new(), blocks_in_a_row(question.model))?;
        Self::through(question, rules, None, trace)
    }

    /// As [`Forward::new`], with sites that `trace` names already.
    pub(crate) fn through(
        question: &Question<'_>,
        rules: RelevanceRules,
        fraction: Option<f64>,
        trace: Trace,
    ) -> Result<Self> {
        let slot: Arc<Mutex<Option<Var>>> = Arc::default();
        let kept = slot.clone();
        let trace = trace.replace("embeddings", move |_, signal| {
            let signal = match fraction {
                Some(fraction) => signal.scale(fraction)?,
                None => signal,
            };
            let (signal, leaf) = signal.into_relevance(rules)?;
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(leaf);
            Ok(signal)
        })?;
        let output = question
            .model
            .forward(question.input, question.pass(&trace))?;
        let leaf = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let leaf = leaf.ok_or_else(|| Error::Target {
            what: "site",
            found: "embeddings never written".to_owned(),
            expected: "a model that writes embeddings".to_owned(),
        })?;
        Ok(Self {
            leaf,
            output,
            trace,
            rules,
            blocks: blocks_in_a_row(question.model),
        })
    }

    /// The explained number, and its gradient at the leaf; zero where it does not depend on it.
    pub(crate) fn gradient(&self, target: Target) -> Result<(f64, Tensor)> {
        let (explained, gradients) = self.backward(target)?;
        Ok((explained, self.at_leaf(&gradients)?))
    }

    /// The explained number and its relevance.
    pub(crate) fn relevance(&self, target: Target) -> Result<Pulled> {
        let (explained, gradients) = self.backward(target)?;
        let arrived = self.at_leaf(&gradients)?;
        let seed = self.seed(target, explained)?;
        Ok(Pulled {
            explained,
            of_leaf: self.rules.relevance(self.leaf.as_tensor(), &arrived)?,
            leaks: leaks::leaks(&self.trace.records(), &gradients, self.blocks, seed)?,
            gradients,
        })
    }

    fn backward(&self, target: Target) -> Result<(f64, GradStore)> {
        let explained = target.number(&self.output)?;
        Ok((number(&explained)?, engine(backward(&explained))?))
    }

    /// The relevance of all outputs together.
    fn seed(&self, target: Target, explained: f64) -> Result<f64> {
        match self.rules.seed {
            Seed::Value => Ok(explained),
            Seed::One => {
                let vector = target.vector(&self.output)?;
                number(&engine(target.direction(vector.value())?.sum_all())?)
            }
        }
    }

    fn at_leaf(&self, gradients: &GradStore) -> Result<Tensor> {
        match gradients.get(self.leaf.as_tensor()) {
            Some(gradient) => Ok(gradient.clone()),
            None => engine(self.leaf.zeros_like()),
        }
    }
}

/// Blocks that all relevance passes, one after the other; none where an organisation has them see groups or means of the
/// tokens, or another stream, so that what arrives at one is a part of the whole.
fn blocks_in_a_row(model: &Model) -> usize {
    match model.spec().organisation {
        None => model.spec().expanded_blocks().len(),
        Some(_) => 0,
    }
}

/// `[1.., tokens, features] -> tokens`, of the first sequence.
pub(crate) fn token_sums(relevance: &Tensor) -> Result<Vec<f64>> {
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
        rules.epsilon > 0.0 && rules.form == Form::ModifiedGradient,
        "what the epsilon of linear layers damps",
    );
    note(
        rules.epsilon > 0.0 && rules.form == Form::Explicit,
        "what the stabilisers of quotients damp",
    );
    left_out
}
