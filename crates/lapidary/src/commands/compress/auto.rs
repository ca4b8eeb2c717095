//! `lapidary compress --auto`: a mix of methods within a budget, found by search.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use lapidary_compress::automatic::{Automatic, AutomaticSettings, AutomaticState, Mix};
use lapidary_compress::{CalibrationData, Method, Seconds, Settings};
use lapidary_explain::report::{Cell, Plot, Series, Table};
use serde::Serialize;

use super::healing::Prepared;
use super::measure::BATCH;
use super::{Healing, Made, check_empty, conclude, data, windows};
use crate::cli::{Compress, Global};
use crate::{loading, output};

/// Of so many windows in a row the last is kept for choosing between mixes.
const EVERY: usize = 4;
/// Largest state of a search that is read, in bytes.
const MOST: u64 = 1 << 28;

/// One mix that was tried.
#[derive(Clone, Debug, Serialize)]
struct Tried {
    /// Of a uniform mix.
    name: Option<String>,
    parameters: usize,
    loss: f64,
}

/// How a mix was found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Searched {
    /// What mixes were compared by.
    score: &'static str,
    /// Examples that they were compared on, which nothing was calibrated on.
    examples: usize,
    /// Parameters that were allowed.
    budget: usize,
    /// The original's score.
    original: f64,
    /// Number of the best mix.
    best: usize,
    tried: Vec<Tried>,
    /// Methods that do not apply, and why.
    left_out: Vec<(String, String)>,
    /// The best mix, as a plan for each of its methods.
    mix: Mix,
}

pub(super) fn run(arguments: &Compress, told: &Settings, global: &Global) -> Result<()> {
    // Methods of a mix run as they are; the rounding of activations is measured after.
    let mut heard = Settings {
        seed: global.seed,
        activations: told.activations,
        ..Settings::default()
    };
    if told.activations.range.is_some() {
        heard.quantise = told.quantise;
    }
    ensure!(
        *told == heard,
        "--auto does not tell methods what --set and --settings say, but only takes `quantise` and \
         `activations`, for --activations"
    );
    check_empty(arguments)?;
    if let Some(state) = &arguments.state {
        output::check_writable(state)?;
    }
    let started = Instant::now();
    let package = loading::package(&arguments.model, global)?;
    let model = package.single_model()?;
    let budget = arguments.budget.as_deref().unwrap_or_default();
    let settings = AutomaticSettings {
        methods: arguments.mix.clone(),
        evaluations: arguments.evaluations,
        batch: BATCH,
        seed: global.seed,
        ..AutomaticSettings::new(parameters(budget, model.parameter_count())?)
    };
    let needed_by = Method::find("whitened")?;
    let all = data::calibration(&package, model, Some(needed_by), arguments, global)?
        .context("there is nothing to calibrate on")?;
    let windows = windows(&package, model, Some(&all), arguments)?;
    let prepared = Prepared::of(&package, model, arguments, global)?;
    let (data, held_out) = split(&all)?;
    let mut search = Automatic::new(model, &data, &held_out, settings)?;
    if let Some(path) = arguments.state.as_deref().filter(|path| path.exists()) {
        search = search
            .resumed(read(path)?)
            .with_context(|| format!("{} cannot be gone on from", path.display()))?;
    }
    advance(&mut search, arguments.state.as_deref())?;
    let searched = searched(&search, held_out.len())?;
    let cut = Instant::now();
    let compressed = search.best_model()?;
    drop(search);
    let seconds = Seconds {
        calibration: (cut - started).as_secs_f64(),
        cut: cut.elapsed().as_secs_f64(),
    };
    let by = Healing {
        prepared: prepared.as_ref(),
        original: model,
        rounding: None,
    };
    let (model, healing) = by.healed(&compressed.model)?.unzip();
    let made = Made {
        reports: vec![(compressed.report, seconds)],
        model: model.unwrap_or(compressed.model),
        windows,
        calibrated: true,
        search: Some(searched),
        order: None,
        healing,
        started,
    };
    conclude(package, made, Some(&all), told, arguments, global)
}

/// What is said of a result with more parameters than a search was allowed.
fn beyond(budget: usize, parameters: usize) -> Option<String> {
    (parameters > budget).then(|| {
        format!(
            "budget      {} parameters, more than the {} that mixes were allowed: adapters were taken in at \
             higher ranks",
            output::grouped(parameters),
            output::grouped(budget)
        )
    })
}

/// The parameters that a budget allows: `0.7x` of `whole`, or a number.
fn parameters(budget: &str, whole: usize) -> Result<usize> {
    let wrong = || {
        format!(
            "budget is {budget:?}, but must be a share of the parameters above 0 and at most 1, as \
             0.7x, or a number of them up to {whole}"
        )
    };
    let found = match budget.strip_suffix('x') {
        Some(share) => {
            let share: f64 = share.trim().parse().ok().with_context(wrong)?;
            ensure!(share > 0.0 && share <= 1.0, wrong());
            (share * whole as f64).floor() as usize
        }
        None => budget.trim().parse().ok().with_context(wrong)?,
    };
    ensure!((1..=whole).contains(&found), wrong());
    Ok(found)
}

/// What methods are calibrated on, and what mixes are compared on.
fn split(all: &CalibrationData) -> Result<(CalibrationData, CalibrationData)> {
    ensure!(
        all.len() >= 2,
        "there is {} window to calibrate and compare on, but must be at least 2; give more text, or more \
         --windows",
        all.len()
    );
    let every = EVERY.min(all.len());
    let part = |held_out: bool| -> Result<CalibrationData> {
        let examples = all.examples().iter().enumerate();
        let here = examples.filter(|(index, _)| ((index + 1) % every == 0) == held_out);
        let here = here.map(|(_, example)| example.clone()).collect();
        Ok(CalibrationData::new(here)?)
    };
    Ok((part(false)?, part(true)?))
}

fn read(path: &Path) -> Result<AutomaticState> {
    let text = lapidary_model::files::read_text(path, MOST)?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is no state of a search", path.display()))
}

/// Tries mixes until enough were, and keeps each.
fn advance(search: &mut Automatic<'_>, state: Option<&Path>) -> Result<()> {
    let bar = bar(search.state().settings.evaluations);
    bar.set_position(search.state().evaluations.len() as u64);
    while !search.is_finished() {
        let loss = search.step()?.loss;
        tracing::info!("mix {}: {loss:.4}", search.state().evaluations.len());
        if let Some(path) = state {
            output::write_text(path, &serde_json::to_string(search.state())?)?;
        }
        bar.set_message(format!("{:.4}", search.best()?.1.loss));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// How far it is, on a terminal only.
fn bar(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    let style = "{bar:30} {pos}/{len} mixes, best {msg}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

fn searched(search: &Automatic<'_>, examples: usize) -> Result<Searched> {
    let (mix, best) = search.best()?;
    let evaluations = &search.state().evaluations;
    let names = search.baselines();
    let tried = evaluations.iter().enumerate().map(|(index, one)| Tried {
        name: names.get(index).cloned(),
        parameters: one.parameters,
        loss: one.loss,
    });
    Ok(Searched {
        score: search.score().name(),
        examples,
        budget: search.state().settings.parameters,
        original: search.original_loss()?,
        best: evaluations.iter().position(|one| one == best).unwrap_or(0),
        tried: tried.collect(),
        left_out: search.left_out().to_vec(),
        mix,
    })
}

impl Searched {
    /// A line about a result of so many parameters, where those are more than was allowed.
    pub(super) fn beyond(&self, parameters: usize) -> Option<String> {
        beyond(self.budget, parameters)
    }

    /// Lines of a mix, its score and its parameters: the uniform ones and the best.
    fn lines(&self) -> Vec<[String; 3]> {
        let line = |name: String, one: &Tried| {
            let parameters = output::grouped(one.parameters);
            [name, format!("{:.4}", one.loss), parameters]
        };
        let uniform = self.tried.iter();
        let uniform = uniform.filter_map(|one| Some(line(one.name.clone()?, one)));
        let best = self.tried.get(self.best);
        let best = best.map(|one| line(format!("best, mix {}", self.best + 1), one));
        uniform.chain(best).collect()
    }

    /// For the terminal.
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "search      {} mixes of at most {} parameters, by {} on {} examples held out; the \
             original's {:.4}\n",
            self.tried.len(),
            output::grouped(self.budget),
            self.score,
            self.examples,
            self.original
        );
        for [name, loss, parameters] in self.lines() {
            text += &format!("            {name:<28} {loss:>9}  {parameters} parameters\n");
        }
        for (method, reason) in &self.left_out {
            text += &format!("left out    {method}, since {reason}\n");
        }
        text
    }

    /// For a page.
    pub(super) fn table(&self) -> Table {
        let title = format!("Mixes by {}", self.score);
        let mut table = Table::new(title, &["mix", "score", "parameters"]);
        for line in self.lines() {
            table.push(line.map(Cell::from));
        }
        table
    }

    /// The score of each mix, and the best so far.
    pub(super) fn plot(&self) -> Plot {
        let losses = || {
            (1..)
                .map(f64::from)
                .zip(self.tried.iter().map(|one| one.loss))
        };
        let least = losses().scan(f64::INFINITY, |least, (number, loss)| {
            *least = least.min(loss);
            Some((number, *least))
        });
        let series = |name: &str, points: Vec<(f64, f64)>| Series {
            name: name.to_owned(),
            points,
        };
        Plot {
            title: "Search of the mix".to_owned(),
            x: "mix".to_owned(),
            y: self.score.to_owned(),
            series: vec![
                series("tried", losses().collect()),
                series("best so far", least.collect()),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_search_was_allowed_is_compared_with_what_came_out() {
        assert_eq!(beyond(1_000, 1_000), None);
        let said = beyond(25_435, 27_696).unwrap();
        assert!(
            said.contains("27 696 parameters, more than the 25 435"),
            "{said}"
        );
    }
}
