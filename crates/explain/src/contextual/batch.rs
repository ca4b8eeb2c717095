//! Prompts of one length, run together, and what their plain pass found.

use std::collections::BTreeMap;

use super::AT_ONCE;
use super::node::{Place, attentions};
use crate::error::engine;
use crate::{Error, Result, Target};
use lapidary_kernels::{DType, SoftmaxMask, Tensor, softmax};
use lapidary_model::{Input, Model, Output, Pass};
use lapidary_signal::{Signal, Trace};

/// A prompt `[1, length]`, and the score (less another) that is followed.
#[derive(Clone, Debug)]
pub struct Case {
    /// The prompt, without padding.
    pub input: Input,
    /// A [`Target::Score`].
    pub target: Target,
    /// What is read in place of the target's class and foil, where several answers are right.
    pub contrast: Option<Contrast>,
}

/// Right answers and wrong ones. Their scores are compared by mean, their probabilities by sum.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contrast {
    /// Classes that are right.
    pub right: Vec<usize>,
    /// Classes that are wrong.
    pub wrong: Vec<usize>,
}

/// `class` of the model's scores for `input` less its closest competitor, at the last position.
///
/// # Errors
/// When the model has no second score, or not so many classes.
pub fn against_closest(model: &Model, input: &Input, class: usize) -> Result<Target> {
    let output = model.forward(input, Pass::default())?;
    let scores = Target::class(class).vector(&output)?.into_value();
    let scores = engine(engine(scores.flatten_all())?.to_dtype(DType::F64))?;
    let scores = engine(scores.to_vec1::<f64>())?;
    let others = scores
        .iter()
        .enumerate()
        .filter(|(index, _)| *index != class);
    let closest = others.max_by(|a, b| a.1.total_cmp(b.1));
    match closest {
        Some((foil, _)) if class < scores.len() => Ok(Target::Score {
            class,
            foil: Some(foil),
            position: None,
        }),
        _ => {
            let expected = format!("below {}, one of several scores", scores.len());
            Err(Error::invalid("class", class, expected))
        }
    }
}

/// Some cases of one length.
pub(super) struct Batch {
    /// `[cases, ..]`.
    input: Input,
    targets: Vec<Target>,
    contrasts: Vec<Option<Contrast>>,
    length: usize,
    /// Whether every target is read at the last position.
    only_last: bool,
    /// What flows into each block, `[cases, length, width]`.
    residuals: Vec<Tensor>,
    /// What heads read and write, `[cases, length, features]`.
    found: BTreeMap<String, Tensor>,
    /// The explained number of each case.
    pub(super) numbers: Vec<f64>,
}

/// Cases grouped by their length.
pub(super) fn batches(model: &Model, cases: &[Case]) -> Result<Vec<Batch>> {
    attentions(model)?;
    if cases.is_empty() {
        return Err(Error::invalid("prompts", "none", "at least one"));
    }
    let mut by_length: BTreeMap<usize, Vec<&Case>> = BTreeMap::new();
    for case in cases {
        let length = match &case.input {
            Input::Tokens { ids, .. } => ids.dims().get(1).copied().unwrap_or(0),
            Input::Pixels(_) => 0,
        };
        by_length.entry(length).or_default().push(case);
    }
    let mut batches = Vec::new();
    for (_, cases) in by_length {
        for chunk in cases.chunks(AT_ONCE / 4) {
            batches.push(Batch::new(model, chunk)?);
        }
    }
    Ok(batches)
}

impl Batch {
    fn new(model: &Model, cases: &[&Case]) -> Result<Self> {
        let input = stacked(cases)?;
        let blocks = model.spec().expanded_blocks().len();
        let mut trace = Trace::new().capture("blocks.*.attention.{mixed,query,key,value}")?;
        for block in 0..blocks {
            trace = trace.capture(&format!("blocks.{block}.in"))?;
        }
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let output = model.forward(&input, pass)?;
        let mut found: BTreeMap<String, Tensor> = trace
            .records()
            .into_iter()
            .map(|(site, record)| (site, record.signal.into_value().detach()))
            .collect();
        let mut residuals = Vec::new();
        for block in 0..blocks {
            let site = format!("blocks.{block}.in");
            let residual = found.remove(&site);
            residuals
                .push(residual.ok_or_else(|| Error::invalid(site, "never written", "written"))?);
        }
        let length = residuals
            .first()
            .and_then(|residual| residual.dims().get(1).copied())
            .unwrap_or(0);
        let targets: Vec<Target> = cases.iter().map(|case| case.target).collect();
        let is_last = |target: &Target| match target {
            Target::Score { position, .. } => position.is_none_or(|at| at + 1 == length),
            Target::Representation => false,
        };
        let mut batch = Self {
            input,
            only_last: targets.iter().all(is_last),
            targets,
            contrasts: cases.iter().map(|case| case.contrast.clone()).collect(),
            length,
            residuals,
            found,
            numbers: Vec::new(),
        };
        let last = match (batch.only_last, batch.logits(&output)?) {
            (true, logits) if logits.rank() == 3 => {
                engine(logits.narrow(1, length.saturating_sub(1), 1))?
            }
            (_, logits) => logits,
        };
        let numbers = batch.read(&engine(last.unsqueeze(0))?, Reading::Difference)?;
        batch.numbers = numbers.into_iter().flatten().collect();
        Ok(batch)
    }

    /// How many cases.
    pub(super) fn cases(&self) -> usize {
        self.targets.len()
    }

    /// Tokens of each.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// How many copies of the batch run at one time.
    pub(super) fn copies_at_once(&self) -> usize {
        (AT_ONCE / self.cases().max(1)).max(1)
    }

    /// What the plain pass found at a place, `[cases, length, features]`.
    pub(super) fn found(&self, place: Place, block: usize) -> Result<&Tensor> {
        let site = place.site(block);
        let found = self.found.get(&site);
        found.ok_or_else(|| Error::invalid(format!("site {site}"), "never written", "written"))
    }

    /// Runs `copies` of the batch from `block` on, one after the other along the batch axis.
    pub(super) fn run(
        &self,
        model: &Model,
        block: usize,
        copies: usize,
        trace: &Trace,
    ) -> Result<Output> {
        let residual = self.residuals.get(block).ok_or_else(|| {
            let expected = format!("below {}, the number of blocks", self.residuals.len());
            Error::invalid("block to start at", block, expected)
        })?;
        let start = Signal::from(repeated(residual, copies)?);
        let input = match &self.input {
            Input::Tokens { ids, token_types } => Input::Tokens {
                ids: repeated(ids, copies)?,
                token_types: token_types
                    .as_ref()
                    .map(|types| repeated(types, copies))
                    .transpose()?,
            },
            Input::Pixels(pixels) => Input::Pixels(repeated(pixels, copies)?),
        };
        let pass = Pass {
            trace: Some(trace),
            only_last: self.only_last,
            start: Some((block, &start)),
            ..Pass::default()
        };
        Ok(model.forward(&input, pass)?)
    }

    /// The scores of an output.
    pub(super) fn logits(&self, output: &Output) -> Result<Tensor> {
        Ok(self.scores(output)?.value().clone())
    }

    /// The scores of an output, with their lens.
    pub(super) fn scores<'a>(&self, output: &'a Output) -> Result<&'a Signal> {
        let logits = output.logits.as_ref();
        logits.ok_or_else(|| Error::invalid("scores", "none", "those of a model with a head"))
    }

    /// What each case's target reads in `scores` `[copies, cases, (length,) classes]`:
    /// `[copy][case]`.
    pub(super) fn read(&self, scores: &Tensor, reading: Reading) -> Result<Vec<Vec<f64>>> {
        let copies = engine(scores.dim(0))?;
        let mut all = vec![Vec::with_capacity(self.cases()); copies];
        let contrasts = self.targets.iter().zip(&self.contrasts);
        for (case, (target, contrast)) in contrasts.enumerate() {
            let Target::Score {
                class,
                foil,
                position,
            } = *target
            else {
                return Err(Error::invalid("target", "representation", "a score"));
            };
            let mut of_case = engine(engine(scores.narrow(1, case, 1))?.squeeze(1))?;
            if of_case.rank() == 3 {
                let length = engine(of_case.dim(1))?;
                let position = match position {
                    Some(position) if !self.only_last => position,
                    _ => length.saturating_sub(1),
                };
                if position >= length {
                    let expected = format!("below {length}");
                    return Err(Error::invalid("position of the target", position, expected));
                }
                of_case = engine(engine(of_case.narrow(1, position, 1))?.squeeze(1))?;
            }
            if reading == Reading::ProbabilityDifference {
                let laid_out = engine(of_case.contiguous())?;
                of_case = softmax(&laid_out, &SoftmaxMask::default())?;
            }
            let classes = engine(of_case.dim(1))?;
            let column = |class: usize| -> Result<Vec<f64>> {
                if class >= classes {
                    let expected = format!("below {classes}, the number of scores");
                    return Err(Error::invalid("class of the target", class, expected));
                }
                let column = engine(engine(of_case.narrow(1, class, 1))?.flatten_all())?;
                engine(engine(column.to_dtype(DType::F64))?.to_vec1::<f64>())
            };
            let (right, wrong) = match contrast {
                Some(contrast) => (contrast.right.clone(), contrast.wrong.clone()),
                None => (vec![class], foil.into_iter().collect()),
            };
            let mut numbers = vec![0.0; copies];
            for (classes, sign) in [(right, 1.0), (wrong, -1.0)] {
                let share = match reading {
                    Reading::Difference => sign / classes.len().max(1) as f64,
                    Reading::ProbabilityDifference => sign,
                };
                for class in classes {
                    for (number, value) in numbers.iter_mut().zip(column(class)?) {
                        *number += share * value;
                    }
                }
            }
            for (copy, number) in all.iter_mut().zip(numbers) {
                copy.push(number);
            }
        }
        Ok(all)
    }
}

/// What is read of the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// The score of the class less that of the foil.
    Difference,
    /// The same of probabilities.
    ProbabilityDifference,
}

/// `copies` of `t` one after the other along the first dimension.
pub(super) fn repeated(t: &Tensor, copies: usize) -> Result<Tensor> {
    match copies {
        1 => Ok(t.clone()),
        _ => engine(Tensor::cat(&vec![t; copies], 0)),
    }
}

fn stacked(cases: &[&Case]) -> Result<Input> {
    let (mut rows, mut types) = (Vec::new(), Vec::new());
    for case in cases {
        match &case.input {
            Input::Tokens { ids, token_types } => {
                rows.push(ids);
                types.extend(token_types);
            }
            Input::Pixels(pixels) => rows.push(pixels),
        }
    }
    let joined = engine(Tensor::cat(&rows, 0))?;
    if engine(joined.dim(0))? != cases.len() {
        let expected = format!("{}, one for each prompt", cases.len());
        return Err(Error::invalid(
            "sequences",
            joined.dims().first().unwrap_or(&0),
            expected,
        ));
    }
    match cases.first().map(|case| &case.input) {
        Some(Input::Pixels(_)) => Ok(Input::Pixels(joined)),
        _ if types.is_empty() => Ok(Input::tokens(joined)),
        _ if types.len() == cases.len() => Ok(Input::Tokens {
            ids: joined,
            token_types: Some(engine(Tensor::cat(&types, 0))?),
        }),
        _ => {
            let expected = "given for every prompt or none";
            Err(Error::invalid("token types", "given for some", expected))
        }
    }
}
