//! `lapidary compress`: fewer parameters, and what that cost.

mod auto;
mod compare;
mod data;
mod measure;
mod show;
mod stage;

use std::path::Path;
use std::time::Instant;

use crate::cli::{Compress, Global};
use crate::{loading, output};
use anyhow::{Context, Result, bail, ensure};
use lapidary_compress::quality::{Window, sliding_windows};
use lapidary_compress::{
    CalibrationData, Compressed, Method, Plan, Report, Settings, Task, export_dense,
};
use lapidary_model::{Model, Package, SavedAs};
use serde_json::json;

use measure::Measure;
use show::Outcome;
use stage::{Seconds, stages};

/// Windows to calibrate on, all of which are held.
const MOST_WINDOWS: usize = 1 << 16;

pub fn run(arguments: &Compress, global: &Global) -> Result<()> {
    ensure!(
        (1..=MOST_WINDOWS).contains(&arguments.windows),
        "windows is {}, but must be between 1 and {MOST_WINDOWS}",
        arguments.windows
    );
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    let settings = Settings {
        seed: global.seed,
        ..Settings::default()
    };
    if arguments.auto {
        return auto::run(arguments, global);
    }
    match &arguments.compare {
        Some(methods) => compare::run(methods, arguments, &settings, global),
        None => one(arguments, &settings, global),
    }
}

fn one(arguments: &Compress, settings: &Settings, global: &Global) -> Result<()> {
    let stages = stages(&arguments.method, &arguments.ratio)?;
    check_empty(arguments)?;
    let package = loading::package(&arguments.model, global)?;
    let started = Instant::now();
    let original = package.single_model()?;
    let mut needed_by = None;
    for stage in &stages {
        let requirements = stage.method.requirements(original, settings)?;
        if needed_by.is_none() && (!requirements.is_empty() || stage.method.observes) {
            needed_by = Some(stage.method);
        }
    }
    let data = data::calibration(&package, original, needed_by, arguments, global)?;
    if arguments.plan_only {
        return print_plan(original, data.as_ref(), &stages, settings);
    }
    let mut reports: Vec<(Report, Seconds)> = Vec::new();
    let mut current: Option<Model> = None;
    for stage in &stages {
        let model = current.as_ref().unwrap_or(original);
        let (compressed, seconds) = match &arguments.plan {
            Some(path) => by_hand(path, stage.method, model, data.as_ref(), settings)?,
            None => {
                let (compressed, _, seconds) = stage.run(model, data.as_ref(), settings)?;
                (compressed, seconds)
            }
        };
        reports.push((compressed.report, seconds));
        current = Some(compressed.model);
    }
    let made = Made {
        reports,
        model: current.context("no method was named")?,
        search: None,
        started,
    };
    conclude(package, made, data.as_ref(), arguments, global)
}

/// A model that is ready to be measured and written.
struct Made {
    reports: Vec<(Report, Seconds)>,
    model: Model,
    search: Option<auto::Searched>,
    started: Instant,
}

/// Measures what was made, writes it and says what it is.
fn conclude(
    package: Package,
    made: Made,
    data: Option<&CalibrationData>,
    arguments: &Compress,
    global: &Global,
) -> Result<()> {
    let out = arguments
        .out
        .as_deref()
        .context("--out is missing: the directory to write")?;
    let original = package.single_model()?;
    let windows = windows(&package, original, data, arguments)?;
    let measure = Measure {
        package: &package,
        embedded: arguments.model == "embedded",
        data,
        windows: &windows,
    };
    let before = measure.of(original)?;
    let after = measure.of(&made.model)?;
    let distance = measure.between(original, &made.model)?;
    let result = match arguments.dense {
        true => export_dense(&made.model)?,
        false => made.model,
    };
    let package = package.with_model(result);
    let saved = package.save(out, None)?;
    let outcome = Outcome {
        reports: made.reports,
        search: made.search,
        before,
        after,
        distance,
        held_out: arguments.evaluate.is_some(),
        dense: arguments.dense,
        saved,
        directory: out.to_owned(),
        seconds: made.started.elapsed().as_secs_f64(),
    };
    if let Some(html) = &arguments.html {
        output::write_text(html, &crate::report::analysis_page(&outcome.report())?)?;
    }
    match global.json {
        true => output::print_json(&outcome.json()?),
        false => output::print(&outcome.text()),
    }
}

/// Refuses a directory that something is in.
fn check_empty(arguments: &Compress) -> Result<()> {
    let Some(out) = &arguments.out else {
        return Ok(());
    };
    ensure!(
        !out.exists()
            || out
                .read_dir()
                .is_ok_and(|mut entries| entries.next().is_none()),
        "{} exists and is not an empty directory; give a new one",
        out.display()
    );
    Ok(())
}

/// What the first method would do; a plan for a later one depends on it.
fn print_plan(
    model: &Model,
    data: Option<&CalibrationData>,
    stages: &[stage::Stage],
    settings: &Settings,
) -> Result<()> {
    let [stage] = stages else {
        bail!(
            "--plan-only shows the plan of one method, not of {}",
            stages.len()
        );
    };
    let (_, plan, _) = stage.run(model, data, settings)?;
    output::print_json(&plan)
}

/// Carries out a plan from a file, which `--plan-only` wrote and somebody may have edited.
fn by_hand(
    path: &Path,
    method: &Method,
    model: &Model,
    data: Option<&CalibrationData>,
    settings: &Settings,
) -> Result<(Compressed, Seconds)> {
    const MOST: u64 = 1 << 24;
    let size = std::fs::metadata(path)
        .with_context(|| format!("{} cannot be read", path.display()))?
        .len();
    ensure!(
        size <= MOST,
        "{} has {size} bytes, but a plan has at most {MOST}",
        path.display()
    );
    let text = std::fs::read_to_string(path)?;
    let plan: Plan =
        serde_json::from_str(&text).with_context(|| format!("{} is no plan", path.display()))?;
    let started = Instant::now();
    let requirements = method.requirements(model, settings)?;
    let calibration = match data {
        Some(data) if !requirements.is_empty() => Some(lapidary_compress::Calibration::collect(
            model,
            data,
            &requirements,
            Default::default(),
        )?),
        _ => None,
    };
    let calibrated = started.elapsed().as_secs_f64();
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data,
        settings: Some(settings),
    };
    let compressed = method.apply(&task, &plan)?;
    let seconds = Seconds {
        calibration: calibrated,
        cut: started.elapsed().as_secs_f64() - calibrated,
    };
    Ok((compressed, seconds))
}

/// Windows for the perplexity: of the text that was given for it, else of the calibration's.
fn windows(
    package: &Package,
    model: &Model,
    data: Option<&CalibrationData>,
    arguments: &Compress,
) -> Result<Vec<Window>> {
    if !measure::is_language_model(model) {
        return Ok(Vec::new());
    }
    match (&arguments.evaluate, data) {
        (Some(path), _) => {
            let tokens = loading::file_tokens(package, path)?;
            let length = arguments.window.min(model.spec().length());
            let mut windows = sliding_windows(&tokens, length, (length / 2).max(1))?;
            windows.truncate(arguments.windows);
            Ok(windows)
        }
        (None, Some(data)) => data::data_windows(data),
        (None, None) => Ok(Vec::new()),
    }
}

/// What kind of directory was written.
fn class(saved: SavedAs, dense: bool) -> &'static str {
    match (saved, dense) {
        (SavedAs::HuggingFace, true) => {
            "a Hugging Face directory with merged weights: same outputs, original size and speed"
        }
        (SavedAs::HuggingFace, false) => "a Hugging Face directory that `transformers` loads",
        (SavedAs::Lapidary, _) => {
            "a Lapidary directory: lapidary.json beside safetensors; load it with lapidary, or write --dense for other programs"
        }
    }
}

fn saved_as(saved: SavedAs) -> &'static str {
    match saved {
        SavedAs::HuggingFace => "hugging-face",
        SavedAs::Lapidary => "lapidary",
    }
}

/// What of a run goes into JSON whichever way it is shown.
fn stage_json(report: &Report, seconds: Seconds) -> Result<serde_json::Value> {
    Ok(json!({
        "report": serde_json::to_value(report)?,
        "seconds": seconds,
    }))
}
