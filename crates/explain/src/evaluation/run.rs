//! The evaluation itself.

use std::ops::Range;
use std::time::Instant;

use super::Example;
use crate::error::engine;
use crate::explainer::Explainer;
use crate::faithfulness::Summary;
use crate::faithfulness::agreement::{Agreement, EvidenceF1};
use crate::faithfulness::masking::{self, Curve, Masks, RATIOS};
use crate::report::{Cell, Report, Table};
use crate::{Options, Question, Result, Target, Unit, over_words};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{HeadSpec, Input, Model, Pass};
use serde::Serialize;

/// What one method is worth on a data set.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MethodRow {
    /// Its name.
    pub method: String,
    /// Agreement with the evidence, in the order of [`Agreement::NAMES`].
    pub agreement: Vec<Summary>,
    /// F1 of the highest tokens beside the evidence.
    pub evidence_f1: EvidenceF1,
    /// What the model loses when tokens are hidden.
    pub masking: Curve,
    /// `|left out|` relative to `|explained|`, over the examples in which that is not 0.
    pub left_out: Summary,
    /// Seconds for one example.
    pub seconds: Summary,
    /// Why it could not be used, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Every method over a data set.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Evaluation {
    /// Examples of the data set.
    pub examples: usize,
    /// Those that the model gets right, which alone are scored: the score of the target is above
    /// that of the foil, or without a foil above all others.
    pub right: usize,
    /// In the order of the methods asked for; those that score tokens.
    pub rows: Vec<MethodRow>,
}

/// Sequences run at one time when tokens are hidden.
const AT_ONCE: usize = 16;

/// Scores `methods` on the examples that `model` gets right. Tokens are hidden by leaving them out
/// of attention, which every model knows from padding; special tokens and the position that is
/// explained stay. Where examples have words, scores are summed over each, and words are judged and
/// hidden in place of tokens.
///
/// `progress` is told the number of explanations done.
///
/// # Errors
/// When the model fails on an example. A method that is not defined for the model is a row that
/// says so.
pub fn evaluate(
    model: &Model,
    examples: &[Example],
    methods: &[&Explainer],
    options: &Options,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation> {
    let mut right = Vec::new();
    for example in examples {
        if is_right(model, example)? {
            right.push(example);
        }
    }
    let mut evaluation = Evaluation {
        examples: examples.len(),
        right: right.len(),
        rows: Vec::new(),
    };
    let mut done = 0;
    for method in methods.iter().filter(|method| method.unit == Unit::Token) {
        let mut tell = || {
            done += 1;
            progress(done);
        };
        let row = method_row(model, &right, method, options, &mut tell);
        evaluation.rows.push(match row {
            Ok(row) => row,
            Err(error) => MethodRow {
                method: method.name.to_owned(),
                refused: Some(error.to_string()),
                ..MethodRow::default()
            },
        });
    }
    Ok(evaluation)
}

fn input(model: &Model, example: &Example) -> Result<Input> {
    let shape = (1, example.ids.len());
    let ids = engine(Tensor::from_slice(&example.ids, shape, &model.device()))?;
    Ok(Input::tokens(ids))
}

fn target(example: &Example) -> Target {
    Target::Score {
        class: example.target,
        foil: example.foil,
        position: example.position,
    }
}

fn is_right(model: &Model, example: &Example) -> Result<bool> {
    let output = model.forward(&input(model, example)?, Pass::default())?;
    let scores = target(example).vector(&output)?.into_value();
    let scores = engine(engine(scores.flatten_all())?.to_dtype(DType::F64))?;
    let scores = engine(scores.to_vec1::<f64>())?;
    // Checks that target and foil exist.
    target(example).number(&output)?;
    let of = |class: usize| scores.get(class).copied().unwrap_or(f64::NEG_INFINITY);
    Ok(match example.foil {
        Some(foil) => of(example.target) > of(foil),
        None => masking::most_likely(&scores) == example.target,
    })
}

/// What is scored as one: the example's words, or its tokens.
fn units(example: &Example) -> Vec<Range<usize>> {
    match example.words.is_empty() {
        true => (0..example.ids.len())
            .map(|token| token..token + 1)
            .collect(),
        false => example.words.clone(),
    }
}

/// The units that hold one of the positions, in order.
fn units_at(units: &[Range<usize>], positions: &[usize]) -> Vec<usize> {
    let holds = |unit: &Range<usize>| positions.iter().any(|position| unit.contains(position));
    (0..)
        .zip(units)
        .filter(|(_, unit)| holds(unit))
        .map(|(index, _)| index)
        .collect()
}

fn method_row(
    model: &Model,
    examples: &[&Example],
    method: &Explainer,
    options: &Options,
    tell: &mut dyn FnMut(),
) -> Result<MethodRow> {
    let (mut agreements, mut f1) = (Vec::new(), Vec::new());
    let (mut seconds, mut left_out) = (Vec::new(), Vec::new());
    let mut scores = Vec::with_capacity(examples.len());
    for (index, example) in examples.iter().enumerate() {
        let input = input(model, example)?;
        let question = Question::new(model, &input);
        // Methods that draw numbers draw others for each example.
        let options = Options {
            seed: options.seed.wrapping_add(index as u64),
            ..*options
        };
        let started = Instant::now();
        let explanation = method.explain(&question, target(example), &options)?;
        seconds.push(started.elapsed().as_secs_f64());
        let account = &explanation.account;
        // Relative to nothing it is nothing that could be averaged.
        if account.explained != 0.0 {
            left_out.push((account.unattributed / account.explained).abs());
        }
        let units = units(example);
        let mut of_units = over_words(&explanation.scores, &units)?;
        of_units.truncate(units.len());
        if !example.evidence.is_empty() {
            let evidence = units_at(&units, &example.evidence);
            agreements.push(Agreement::of(&of_units, &evidence)?.values());
            f1.push(EvidenceF1::of(&of_units, &evidence)?);
        }
        scores.push(of_units);
        tell();
    }
    let measure = |index: usize| {
        let values = agreements.iter().filter_map(|values| values.get(index));
        Summary::of(values.copied())
    };
    Ok(MethodRow {
        method: method.name.to_owned(),
        agreement: (0..Agreement::NAMES.len()).map(measure).collect(),
        evidence_f1: EvidenceF1::over(&f1),
        masking: hide(model, examples, &scores)?,
        left_out: Summary::of(left_out),
        seconds: Summary::of(seconds),
        refused: None,
    })
}

/// A place among the units of all examples stands for a unit here, so that what is hidden can be
/// told from what is there.
const HIDDEN: u32 = u32::MAX;

fn hide(model: &Model, examples: &[&Example], scores: &[Vec<f64>]) -> Result<Curve> {
    // Start of each example among all places.
    let mut starts = Vec::with_capacity(examples.len());
    let mut stays: Vec<bool> = Vec::new();
    for example in examples {
        starts.push(stays.len() as u32);
        let explained = match model.spec().head {
            HeadSpec::LanguageModel { .. } => {
                Some(example.position.unwrap_or(example.ids.len() - 1))
            }
            _ => None,
        };
        let mut kept = example.special.clone();
        kept.extend(explained);
        let units = units(example);
        let kept = units_at(&units, &kept);
        stays.extend((0..units.len()).map(|unit| kept.contains(&unit)));
    }
    let texts: Vec<Vec<u32>> = starts
        .iter()
        .zip(scores)
        .map(|(start, scores)| (*start..start + scores.len() as u32).collect())
        .collect();
    let masks = Masks {
        token: HIDDEN,
        is_special: &|place| stays.get(place as usize).copied().unwrap_or(true),
    };
    let masked: Vec<masking::Example<'_>> = texts
        .iter()
        .zip(scores)
        .map(|(tokens, scores)| masking::Example {
            tokens,
            scores,
            label: None,
        })
        .collect();
    let predict = |texts: &[Vec<u32>]| {
        let mut all = Vec::with_capacity(texts.len());
        for (texts, examples) in texts.chunks(AT_ONCE).zip(examples.chunks(AT_ONCE)) {
            all.extend(probabilities(model, texts, examples)?);
        }
        Ok::<_, crate::Error>(all)
    };
    masking::curve(&masked, masks, &RATIOS, predict)
}

/// Probabilities of each example's answer while the hidden places of its text are padding.
fn probabilities(
    model: &Model,
    texts: &[Vec<u32>],
    examples: &[&Example],
) -> Result<Vec<Vec<f64>>> {
    let longest = examples.iter().map(|example| example.ids.len());
    let longest = longest.max().unwrap_or(0);
    let (mut ids, mut keep) = (Vec::new(), Vec::new());
    for (text, example) in texts.iter().zip(examples) {
        let beyond = longest - example.ids.len();
        ids.extend(example.ids.iter().copied().chain(vec![0; beyond]));
        for (place, unit) in text.iter().zip(units(example)) {
            keep.extend(unit.map(|_| u8::from(*place != HIDDEN)));
        }
        keep.extend(vec![0; beyond]);
    }
    let shape = (texts.len(), longest);
    let padding = engine(Tensor::from_vec(keep, shape, &model.device()))?;
    let input = Input::tokens(engine(Tensor::from_vec(ids, shape, &model.device()))?);
    let pass = Pass {
        padding: Some(&padding),
        ..Pass::default()
    };
    let logits = model.forward(&input, pass)?.into_logits()?.into_value();
    let mut all = Vec::with_capacity(texts.len());
    for (row, example) in examples.iter().enumerate() {
        let scores = engine(logits.get(row))?;
        let scores = match scores.rank() {
            2 => engine(scores.get(example.position.unwrap_or(example.ids.len() - 1)))?,
            _ => scores,
        };
        let scores = engine(engine(scores.to_dtype(DType::F64))?.to_vec1::<f64>())?;
        all.push(softmax(&scores));
    }
    Ok(all)
}

pub(super) fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

impl Evaluation {
    /// The rows as tables, means with 95 % intervals.
    pub fn report(&self, title: &str) -> Report {
        let mut columns = vec!["method"];
        columns.extend(Agreement::NAMES);
        let mut agreement = Table::new("Agreement with the evidence", &columns);
        let shares = EvidenceF1::SHARES.map(|share| format!("{share} %"));
        let mut columns = vec!["method"];
        columns.extend(shares.iter().map(String::as_str));
        columns.extend(["mean", "best", "at"]);
        let mut f1 = Table::new("F1 of the highest tokens beside the evidence", &columns);
        let mut faithfulness = Table::new(
            "Faithfulness and cost",
            &[
                "method",
                "AOPC ↑",
                "log-odds ↓",
                "sufficiency ↓",
                "left out / explained",
                "seconds",
            ],
        );
        let mut notes = vec![format!(
            "{} examples, of which the model gets {} right ({:.1} %); those are scored; ± is a 95 % interval",
            self.examples,
            self.right,
            100.0 * self.right as f64 / self.examples.max(1) as f64
        )];
        if self.right == 0 {
            notes.push("nothing is scored: the model gets no example right".to_owned());
        }
        for row in &self.rows {
            let name = Cell::from(row.method.as_str());
            if let Some(reason) = &row.refused {
                notes.push(format!("{} was left out: {reason}", row.method));
                continue;
            }
            if self.right == 0 {
                continue;
            }
            let of = |summary: &Summary| Cell::from(format!("{summary:.3}"));
            if row.agreement.iter().any(|summary| summary.count > 0) {
                agreement.push(std::iter::once(name.clone()).chain(row.agreement.iter().map(of)));
                let found = &row.evidence_f1;
                let points = found.points.iter();
                let cells = points.map(|point| format!("{:.3}", point.mean).into());
                let last = [of(&found.mean), of(&found.best)];
                let last = last
                    .into_iter()
                    .chain([format!("{} %", found.best_share).into()]);
                f1.push(std::iter::once(name.clone()).chain(cells).chain(last));
            }
            faithfulness.push([
                name,
                of(&row.masking.aopc),
                of(&row.masking.log_odds),
                of(&row.masking.sufficiency),
                match row.left_out.count {
                    0 => "explains nothing".into(),
                    _ => format!("{:.2e}", row.left_out.mean).into(),
                },
                format!("{:.2e}", row.seconds.mean).into(),
            ]);
        }
        let tables = [agreement, f1, faithfulness];
        Report {
            title: title.to_owned(),
            notes,
            tables: tables.into_iter().filter(|t| !t.rows.is_empty()).collect(),
            ..Report::default()
        }
    }
}
