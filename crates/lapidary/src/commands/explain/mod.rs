//! `lapidary explain`: a prediction, decomposed.

mod evaluate;
pub mod target;
mod terminal;

use std::ops::Range;
use std::time::Instant;

use crate::cli::{Explain, ExplainOptions, Global, TextUnit};
use crate::report;
use crate::subject::Subject;
use crate::{loading, output};
use anyhow::{Result, bail, ensure};
use lapidary_explain::contextual::phrases;
use lapidary_explain::{
    Explainer, Explanation, Options, Question, Target, Unit, explainer, explainers,
};
use lapidary_model::{Input, Package};
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};
use lapidary_signal::streams::{BiasSplit, StreamRules};
use schemars::JsonSchema;
use serde::Serialize;

/// One input explained: what `lapidary explain --json` prints.
#[derive(Serialize, JsonSchema)]
pub struct Explained {
    /// The model as it was named.
    pub model: String,
    /// The input's tokens or patches.
    pub tokens: Vec<String>,
    /// The input's words, where they are what is scored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<String>,
    /// The most probable answers, best first; absent for a model without scores.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predictions: Vec<Prediction>,
    /// One for each method and target.
    pub explanations: Vec<Answer>,
    /// Methods that are not defined for this model, with why; only when several were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<Refused>,
    /// Whether the positions are patches of an image: rows and columns.
    #[serde(skip)]
    pub patches: Option<(usize, usize)>,
}

impl Explained {
    /// What the scores of an explanation are called.
    pub fn names<'a>(&'a self, explanation: &'a Explanation) -> &'a [String] {
        match (explanation.labels.as_slice(), explanation.unit) {
            ([], Unit::Word) => &self.words,
            ([], _) => &self.tokens,
            (labels, _) => labels,
        }
    }
}

/// One explanation.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The class or token that is explained.
    pub target: String,
    /// What it is contrasted with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foil: Option<String>,
    /// The scores and their account.
    pub explanation: Explanation,
    /// Time of the method for all targets, in seconds.
    pub seconds: f64,
}

/// One of the most probable answers.
#[derive(Clone, Serialize, JsonSchema)]
pub struct Prediction {
    /// The class or token.
    pub name: String,
    /// Its probability.
    pub probability: f64,
    /// Its score.
    pub score: f64,
}

/// A method that could not be used.
#[derive(Serialize, JsonSchema)]
pub struct Refused {
    /// The method.
    pub method: String,
    /// Why.
    pub reason: String,
}

/// A target with its names.
pub struct Named {
    pub target: Target,
    pub name: String,
    pub foil: Option<String>,
}

pub fn run(arguments: &Explain, global: &Global) -> Result<()> {
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    if let Some(dataset) = &arguments.evaluate {
        return evaluate::run(dataset, arguments, global);
    }
    let options = options(&arguments.options, global)?;
    let methods = methods(&arguments.method)?;
    let package = loading::written_out(&arguments.model, global)?;
    let subject = Subject::new(&arguments.subject, &package, global)?;
    let position = match arguments.position {
        Some(position) => position,
        None => subject.last()?,
    };
    let predictions = target::predictions(&package, &subject, position)?;
    let targets = target::targets(arguments, &package, subject.model, position, &predictions)?;
    let (mut explanations, refused) = answers(&methods, &subject.question(), &targets, &options)?;
    let names = subject.readable_names();
    for answer in &mut explanations {
        name_phrases(&mut answer.explanation, &names, &options)?;
    }
    let words = match arguments.unit {
        TextUnit::Token => Vec::new(),
        TextUnit::Word => by_word(&mut explanations, &package, &subject)?,
    };
    let explained = Explained {
        model: arguments.model.clone(),
        tokens: names,
        words,
        predictions: predictions
            .into_iter()
            .map(|(_, prediction)| prediction)
            .take(5)
            .collect(),
        explanations,
        refused,
        patches: match &subject.input {
            Input::Pixels(_) => subject.patch_grid(),
            Input::Tokens { .. } => None,
        },
    };
    if let Some(html) = &arguments.html {
        let first = targets.first().map(|named| named.target);
        let page = report::explanation_page(&explained, &subject.question(), first)?;
        output::write_text(html, &page)?;
    }
    if global.json {
        return output::print_json(&explained);
    }
    output::print(&terminal::in_terminal(&explained))
}

/// Phrases are called by their words.
fn name_phrases(explanation: &mut Explanation, names: &[String], options: &Options) -> Result<()> {
    if explanation.unit == Unit::Phrase {
        let text = |unit: Range<usize>| names.get(unit).unwrap_or_default().join(" ");
        let units = phrases(names.len(), options.phrase)?;
        explanation.labels = units.into_iter().map(text).collect();
    }
    Ok(())
}

/// Sums scores of tokens to scores of words; the words, as people read them.
fn by_word(
    answers: &mut [Answer],
    package: &Package,
    subject: &Subject<'_>,
) -> Result<Vec<String>> {
    let Input::Tokens { ids, .. } = &subject.input else {
        bail!("an image has no words; leave --unit out");
    };
    let ids = ids.get(0)?.to_vec1::<u32>()?;
    let tokenizer = package.tokenizer()?;
    let words = tokenizer.words(&ids);
    for answer in answers {
        if answer.explanation.unit == Unit::Token {
            answer.explanation = answer.explanation.clone().by_word(&words)?;
        }
    }
    let name = |word: Range<usize>| -> Result<String> {
        let text = tokenizer.decode(ids.get(word.clone()).unwrap_or_default(), false)?;
        // White space, and ids without a token, have no text to see.
        let names = subject.names.get(word).unwrap_or_default();
        Ok(match text.trim() {
            "" => names.iter().map(|name| readable(name)).collect(),
            text => text.to_owned(),
        })
    };
    words.into_iter().map(name).collect()
}

/// The methods that the command line names; `all` are all.
pub fn methods(names: &[String]) -> Result<Vec<&'static Explainer>> {
    if names.iter().any(|name| name == "all") {
        return Ok(explainers().iter().collect());
    }
    Ok(names
        .iter()
        .map(|name| explainer(name))
        .collect::<std::result::Result<_, _>>()?)
}

/// Explains every target by every method. One method alone must work; of several, those that are
/// not defined for the model are left out and named.
fn answers(
    methods: &[&Explainer],
    question: &Question<'_>,
    targets: &[Named],
    options: &Options,
) -> Result<(Vec<Answer>, Vec<Refused>)> {
    let plain: Vec<Target> = targets.iter().map(|named| named.target).collect();
    let (mut answers, mut refused) = (Vec::new(), Vec::new());
    for method in methods {
        let started = Instant::now();
        let explanations = match (method.explain)(question, &plain, options) {
            Ok(explanations) => explanations,
            Err(error) if methods.len() == 1 => return Err(error.into()),
            Err(error) => {
                refused.push(Refused {
                    method: method.name.to_owned(),
                    reason: error.to_string(),
                });
                continue;
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        for (explanation, named) in explanations.into_iter().zip(targets) {
            answers.push(Answer {
                target: named.name.clone(),
                foil: named.foil.clone(),
                explanation,
                seconds,
            });
        }
    }
    if answers.is_empty() {
        let reasons: Vec<_> = refused.iter().map(|one| one.reason.as_str()).collect();
        bail!("no method explains this model: {}", reasons.join("; "));
    }
    Ok((answers, refused))
}

/// The options that the command line gives.
pub fn options(arguments: &ExplainOptions, global: &Global) -> Result<Options> {
    ensure!(
        arguments.steps >= 1,
        "steps is {}, but must be at least 1",
        arguments.steps
    );
    Ok(Options {
        streams: StreamRules {
            bias: BiasSplit::from_name(&arguments.bias)?,
            ..StreamRules::default()
        },
        steps: arguments.steps,
        start_layer: arguments.start_layer,
        seed: global.seed,
        contextual: rules_of_parts(arguments),
        phrase: arguments.phrase,
        include_residual: arguments.include_residual,
        trace_feedforward: arguments.trace_feedforward,
    })
}

fn rules_of_parts(arguments: &ExplainOptions) -> ContextualRules {
    ContextualRules {
        attention: match arguments.split_attention {
            true => AttentionSplit::Split,
            false => AttentionSplit::Frozen,
        },
        stabilise: arguments.stabilise,
    }
}

/// A token as people read it: byte-level and sentence-piece marks for a space become a space.
pub fn readable(token: &str) -> String {
    token.replace(['Ġ', '▁'], " ").replace('Ċ', "⏎")
}
