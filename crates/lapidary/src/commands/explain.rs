//! `lapidary explain`: a prediction, decomposed.

use std::time::Instant;

use crate::cli::{Explain, ExplainOptions, Global};
use crate::report::{self, Coloured};
use crate::subject::Subject;
use crate::{loading, output};
use anyhow::{Context, Result, ensure};
use lapidary_explain::contextual::phrases;
use lapidary_explain::{Explanation, Options, Target, Unit, explainer};
use lapidary_kernels::DType;
use lapidary_model::{Input, Model, Package, Pass};
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};
use lapidary_signal::streams::{BiasSplit, StreamRules};
use serde::Serialize;

/// An explanation with what it is about.
#[derive(Serialize)]
pub struct Explained {
    pub tokens: Vec<String>,
    pub target: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foil: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predictions: Vec<Prediction>,
    pub explanation: Explanation,
    pub seconds: f64,
    /// Whether the positions are patches of an image.
    #[serde(skip)]
    pub image: bool,
}

/// One of the most probable answers.
#[derive(Clone, Serialize)]
pub struct Prediction {
    pub name: String,
    pub probability: f64,
    pub score: f64,
}

pub fn run(arguments: &Explain, global: &Global) -> Result<()> {
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    let options = options(&arguments.options, global)?;
    let method = explainer(&arguments.method)?;
    let package = loading::package(&arguments.model, global)?;
    let subject = Subject::new(&arguments.subject, &package, global)?;
    let position = match arguments.position {
        Some(position) => position,
        None => subject.last()?,
    };
    let predictions = predictions(&package, &subject, position)?;
    let (target, target_name, foil_name) =
        target(arguments, &package, subject.model, position, &predictions)?;
    let started = Instant::now();
    let mut explanation = method.explain(&subject.question(), target, &options)?;
    if explanation.unit == Unit::Phrase {
        let units = phrases(subject.names.len(), options.phrase)?;
        let names = subject.readable_names();
        let text = |unit: std::ops::Range<usize>| names.get(unit).unwrap_or_default().concat();
        explanation.labels = units.into_iter().map(text).collect();
    }
    let seconds = started.elapsed().as_secs_f64();
    let explained = Explained {
        tokens: subject.readable_names(),
        target: target_name,
        foil: foil_name,
        predictions: predictions
            .into_iter()
            .map(|(_, prediction)| prediction)
            .take(5)
            .collect(),
        explanation,
        seconds,
        image: matches!(subject.input, Input::Pixels(_)),
    };
    if let Some(html) = &arguments.html {
        output::write_text(
            html,
            &report::explanation_page(&arguments.model, &explained),
        )?;
    }
    if global.json {
        return output::print_json(&explained);
    }
    output::print(&in_terminal(&explained))
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
        contextual: rules_of_parts(arguments),
        phrase: arguments.phrase,
        steps: arguments.steps,
        start_layer: arguments.start_layer,
        seed: global.seed,
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

/// The scores by descending probability, with their indices; none for a model without scores.
pub fn predictions(
    package: &Package,
    subject: &Subject<'_>,
    position: usize,
) -> Result<Vec<(usize, Prediction)>> {
    let model = subject.model;
    let pass = Pass {
        padding: subject.padding.as_ref(),
        ..Pass::default()
    };
    let output = model.forward(&subject.input, pass)?;
    let Some(logits) = output.logits else {
        return Ok(Vec::new());
    };
    let logits = logits.into_value().get(0)?;
    let logits = match logits.rank() {
        2 => {
            let length = logits.dim(0)?;
            ensure!(
                position < length,
                "position is {position}, but must be below {length}"
            );
            logits.get(position)?
        }
        _ => logits,
    };
    let scores = logits.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let is_language_model = matches!(
        model.spec().head,
        lapidary_model::HeadSpec::LanguageModel { .. }
    );
    Ok(order
        .into_iter()
        .map(|index| {
            let name = match (is_language_model, &package.tokenizer) {
                (true, Some(tokenizer)) => tokenizer.token_of(index as u32),
                (false, _) => package.labels.get(index).cloned(),
                _ => None,
            };
            let name = name.map_or_else(|| index.to_string(), |name| readable(&name));
            let score = scores[index];
            (
                index,
                Prediction {
                    name,
                    probability: (score - largest).exp() / total,
                    score,
                },
            )
        })
        .collect())
}

/// What is explained, and how it is called.
fn target(
    arguments: &Explain,
    package: &Package,
    model: &Model,
    position: usize,
    predictions: &[(usize, Prediction)],
) -> Result<(Target, String, Option<String>)> {
    let Some((best, prediction)) = predictions.first() else {
        ensure!(
            arguments.target.is_none() && arguments.foil.is_none(),
            "this model has no scores; leave --target and --foil out to explain its representation"
        );
        return Ok((Target::Representation, "representation".to_owned(), None));
    };
    let is_language_model = matches!(
        model.spec().head,
        lapidary_model::HeadSpec::LanguageModel { .. }
    );
    let find = |what: &str, name: &str| -> Result<(usize, String)> {
        let count = predictions.len();
        if let Ok(number) = name.parse::<usize>() {
            ensure!(
                number < count,
                "{what} is {number}, but must be below {count}"
            );
            let found = predictions.iter().find(|(index, _)| *index == number);
            return Ok((
                number,
                found.map_or_else(|| number.to_string(), |(_, p)| p.name.clone()),
            ));
        }
        if !is_language_model {
            let index = package.labels.iter().position(|label| label == name);
            let index = index.with_context(|| {
                format!(
                    "{what} {name:?} is not a class; the classes are {}",
                    package.labels.join(", ")
                )
            })?;
            return Ok((index, name.to_owned()));
        }
        let id = loading::single_token(package, what, name)?;
        Ok((id as usize, name.to_owned()))
    };
    let (class, name) = match &arguments.target {
        Some(target) => find("target", target)?,
        None => (*best, prediction.name.clone()),
    };
    let (foil, foil_name) = match &arguments.foil {
        Some(foil) => {
            let (index, name) = find("foil", foil)?;
            (Some(index), Some(name))
        }
        None => (None, None),
    };
    Ok((
        Target::Score {
            class,
            foil,
            position: Some(position),
        },
        name,
        foil_name,
    ))
}

/// A token as people read it: byte-level and sentence-piece marks for a space become a space.
pub fn readable(token: &str) -> String {
    token.replace(['Ġ', '▁'], " ").replace('Ċ', "⏎")
}

fn in_terminal(explained: &Explained) -> String {
    let explanation = &explained.explanation;
    let mut text = String::new();
    if !explained.predictions.is_empty() {
        text += "predictions ";
        for prediction in &explained.predictions {
            text += &format!(
                " {} {:.1}%",
                prediction.name.trim(),
                100.0 * prediction.probability
            );
        }
        text += "\n";
    }
    text += &format!("explained    {}", explained.target.trim());
    if let Some(foil) = &explained.foil {
        text += &format!(" rather than {}", foil.trim());
    }
    text += &format!(" by {}, {:.3} s\n\n", explanation.method, explained.seconds);
    // Patches do not read as a line of text.
    if explanation.unit == Unit::Token && !explained.image {
        let coloured = Coloured::new(&explained.tokens, &explanation.scores);
        text += &format!("{}\n\n", coloured.in_terminal(output::is_coloured()));
    }
    let names = if explanation.labels.is_empty() {
        &explained.tokens
    } else {
        &explanation.labels
    };
    text += &bars(names, &explanation.scores);
    text += &format!("\n{}", account(explanation));
    text
}

/// Every score as a line with a bar.
fn bars(names: &[String], scores: &[f64]) -> String {
    const WIDTH: f64 = 24.0;
    let largest = scores
        .iter()
        .fold(0.0f64, |largest, score| largest.max(score.abs()));
    let wide = names
        .iter()
        .map(|name| name.chars().count())
        .max()
        .unwrap_or(0)
        .clamp(5, 32);
    let mut text = String::new();
    for (index, score) in scores.iter().enumerate() {
        let name = names.get(index).map_or("bias", String::as_str).trim();
        let length = if largest > 0.0 {
            (score.abs() / largest * WIDTH).round() as usize
        } else {
            0
        };
        let bar = if *score >= 0.0 { "█" } else { "░" }.repeat(length);
        text += &format!("{name:>wide$} {score:+10.4} {bar}\n");
    }
    text
}

/// What adds up, and what is left out.
pub fn account(explanation: &Explanation) -> String {
    let account = &explanation.account;
    let mut text = format!(
        "score {:.4} = attributed {:.4} + left out {:.2e}\n",
        account.explained, account.attributed, account.unattributed
    );
    if let Some(error) = account.largest_site_error {
        text += &format!("largest conservation error at any site {error:.1e}\n");
    }
    if !account.left_out.is_empty() {
        text += &format!("left out by this method: {}\n", account.left_out.join("; "));
    }
    text
}
