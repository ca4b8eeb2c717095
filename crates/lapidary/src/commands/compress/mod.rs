//! `lapidary compress`: fewer parameters, and what that cost.

mod auto;
mod compare;
mod data;
mod healing;
mod interactions;
mod measure;
mod show;
mod stage;
mod unheard;

use std::path::Path;
use std::time::Instant;

use crate::cli::{Compress, Global};
use crate::{loading, output};
use anyhow::{Context, Result, bail, ensure};
use lapidary_compress::quality::{Window, sliding_windows};
use lapidary_compress::{
    Calibration, CalibrationData, CalibrationOptions, Change, Done, HealReport, Method, Plan,
    Recipe, Report, RoundingGoal, Seconds, Settings, Stage, Task, export_dense,
};
use lapidary_model::{Checkpoint, Limits, Model, Origin, Package, SavedAs};
use serde_json::json;

use healing::Prepared;
use measure::Measure;
use show::Outcome;

/// Windows to calibrate on, all of which are held.
const MOST_WINDOWS: usize = 1 << 16;

pub fn run(arguments: &Compress, global: &Global) -> Result<()> {
    ensure!(
        (1..=MOST_WINDOWS).contains(&arguments.windows),
        "windows is {}, but must be between 1 and {MOST_WINDOWS}",
        arguments.windows
    );
    ensure!(
        arguments.window >= 2,
        "window is {}, but must be at least 2 tokens",
        arguments.window
    );
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    unheard::check(arguments)?;
    let settings = stage::settings(arguments, global)?;
    healing::check(arguments, global)?;
    if arguments.auto {
        return auto::run(arguments, &settings, global);
    }
    if let Some(methods) = &arguments.interactions {
        return interactions::run(methods, arguments, &settings, global);
    }
    match &arguments.compare {
        Some(methods) => compare::run(methods, arguments, &settings, global),
        None => one(arguments, &settings, global),
    }
}

fn one(arguments: &Compress, settings: &Settings, global: &Global) -> Result<()> {
    let (recipe, order) = stage::recipe(arguments, global)?;
    unheard::check_stages(&recipe, arguments, settings)?;
    let rounding = rounding(&recipe, arguments, settings)?;
    check_empty(arguments)?;
    let package = loading::package(&arguments.model, global)?;
    let started = Instant::now();
    let original = package.single_model()?;
    let order = stage::checked(&recipe, order, original, settings)?;
    let mut needed_by = None;
    for stage in &recipe.stages {
        let method = stage.method()?;
        let requirements = method.requirements(original, Recipe::settings(stage, settings))?;
        if needed_by.is_none() && (!requirements.is_empty() || method.observes) {
            needed_by = Some(method);
        }
    }
    let data = data::calibration(&package, original, needed_by, arguments, global)?;
    if arguments.plan_only {
        return print_plan(original, data.as_ref(), &recipe, settings);
    }
    let windows = windows(&package, original, data.as_ref(), arguments)?;
    measure::check_rounded(settings, data.as_ref(), &windows)?;
    let prepared = Prepared::of(&package, original, arguments, global)?;
    let by = |rounding| Healing {
        prepared: prepared.as_ref(),
        original,
        rounding,
    };
    let (done, healing) = match &arguments.plan {
        Some(path) => {
            let mut done = by_hand(path, &recipe, original, data.as_ref(), settings)?;
            let model = &done.compressed.model;
            let (model, report) = by(None).healed(model)?.unzip();
            if let Some(model) = model {
                done.compressed.set_healed(model);
            }
            (vec![done], report)
        }
        None => {
            let heal = |model: &Model| by(rounding).healed(model);
            cut_heal_and_round(&recipe, original, data.as_ref(), settings, heal)
                .map_err(|error| stage::advised(error, order.as_ref()))?
        }
    };
    for done in &done {
        let mut cut = false;
        for module in &done.plan.modules {
            match &module.change {
                Change::Leave { reason } => {
                    tracing::info!("{} stays as it is: {reason}", module.path);
                }
                _ => cut = true,
            }
        }
        if !cut {
            tracing::warn!("{} leaves every module as it is", done.plan.method);
        }
    }
    let mut compressed = None;
    let mut reports: Vec<(Report, Seconds)> = Vec::new();
    for done in done {
        reports.push((done.compressed.report, done.seconds));
        compressed = Some(done.compressed.model);
    }
    let made = Made {
        reports,
        model: compressed.context("no method was named")?,
        windows,
        calibrated: needed_by.is_some(),
        search: None,
        order,
        healing,
        started,
    };
    conclude(package, made, data.as_ref(), settings, arguments, global)
}

/// A model that is ready to be measured and written.
struct Made {
    reports: Vec<(Report, Seconds)>,
    model: Model,
    /// Text for the perplexity: what cannot be read is told before the work.
    windows: Vec<Window>,
    /// Whether a method looked at data.
    calibrated: bool,
    search: Option<auto::Searched>,
    order: Option<stage::Order>,
    healing: Option<HealReport>,
    started: Instant,
}

/// Measures what was made, writes it and says what it is.
fn conclude(
    package: Package,
    made: Made,
    data: Option<&CalibrationData>,
    settings: &Settings,
    arguments: &Compress,
    global: &Global,
) -> Result<()> {
    let out = arguments
        .out
        .as_deref()
        .context("--out is missing: the directory to write")?;
    let original = package.single_model()?;
    let measure = Measure {
        package: &package,
        embedded: arguments.model == "embedded",
        data,
        windows: &made.windows,
    };
    let before = measure.of(original)?;
    let after = measure.of(&made.model)?;
    let reports = made.reports.iter().map(|(report, _)| report);
    let distance = measure.between(original, &made.model, reports)?;
    let activations = measure.rounded(original, &made.model, settings)?;
    let width = original.spec().width;
    let few = data.map(|data| tokens_of(original, data));
    let few = few.filter(|tokens| made.calibrated && *tokens < width);
    let result = match arguments.dense {
        true => export_dense(&made.model)?,
        false => made.model,
    };
    let package = package.with_model(result);
    // A directory of that name is not what was compressed.
    let original_files = match arguments.model.as_str() {
        "embedded" => None,
        directory => stored(Path::new(directory)),
    };
    let saved = package.save(out, None)?;
    let family = matches!(package.origin, Origin::HuggingFace { .. });
    let outcome = Outcome {
        reports: made.reports,
        search: made.search,
        order: made.order,
        before,
        after,
        distance,
        activations,
        few: few.map(|tokens| [tokens, width]),
        disk: [original_files, stored(out)],
        healing: made.healing,
        held_out: arguments.evaluate.is_some(),
        dense: arguments.dense,
        saved,
        family,
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

/// Tokens that the model sees of this data: an image has as many as the model makes of it.
fn tokens_of(model: &Model, data: &CalibrationData) -> usize {
    match model.spec().vocabulary() {
        Some(_) => data.tokens(),
        None => data.len() * model.spec().length(),
    }
}

/// Bytes of the files that a model directory is read from; others may lie beside them.
fn stored(directory: &Path) -> Option<u64> {
    let checkpoint = Checkpoint::open(directory, &Limits::default()).ok()?;
    Some(checkpoint.file_bytes())
}

/// What `--heal-rounded` has passes see: what the last method rounds to.
fn rounding(
    recipe: &Recipe,
    arguments: &Compress,
    settings: &Settings,
) -> Result<Option<RoundingGoal>> {
    if !arguments.heal_rounded {
        return Ok(None);
    }
    ensure!(
        arguments.plan.is_none(),
        "--heal-rounded is for methods that round after healing, which --plan does not"
    );
    let last = recipe.stages.last().context("no method was named")?;
    let goal = last.method()?.rounding(Recipe::settings(last, settings));
    ensure!(
        goal.is_some(),
        "--heal-rounded needs a last method that rounds, such as int4, but the last is {}",
        last.method
    );
    Ok(goal)
}

/// The stages that cut, then healing, then the one that rounds.
fn cut_heal_and_round(
    recipe: &Recipe,
    original: &Model,
    data: Option<&CalibrationData>,
    settings: &Settings,
    heal: impl FnOnce(&Model) -> Result<Option<(Model, HealReport)>>,
) -> Result<(Vec<Done>, Option<HealReport>)> {
    let (mut cutting, mut rounding) = (Vec::new(), Vec::new());
    for stage in recipe.stages.clone() {
        match stage.method()?.rounds() {
            true => rounding.push(stage),
            false => cutting.push(stage),
        }
    }
    let mut done = match cutting.is_empty() {
        true => Vec::new(),
        false => Recipe { stages: cutting }.run(original, data, settings)?,
    };
    let cut = done.last().map_or(original, |done| &done.compressed.model);
    let (healed, report) = heal(cut)?.unzip();
    if rounding.is_empty() {
        if let Some((model, last)) = healed.zip(done.last_mut()) {
            last.compressed.set_healed(model);
        }
        return Ok((done, report));
    }
    let rounded =
        Recipe { stages: rounding }.run(healed.as_ref().unwrap_or(cut), data, settings)?;
    done.extend(rounded);
    Ok((done, report))
}

/// What a model heals by.
struct Healing<'a> {
    prepared: Option<&'a Prepared>,
    original: &'a Model,
    /// What it is rounded to after.
    rounding: Option<RoundingGoal>,
}

impl Healing<'_> {
    /// What `--heal` makes of the model, when it is asked for.
    fn healed(self, model: &Model) -> Result<Option<(Model, HealReport)>> {
        self.prepared
            .map(|prepared| prepared.run(model, self.original, self.rounding))
            .transpose()
    }
}

/// Refuses a directory that something is in, or that could not be written after all the work.
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
    output::check_directory_writable(out)
}

/// What the only method would do; a plan for a later one depends on it.
fn print_plan(
    model: &Model,
    data: Option<&CalibrationData>,
    recipe: &Recipe,
    settings: &Settings,
) -> Result<()> {
    let stage = only_stage(recipe, "--plan-only")?;
    let method = stage.method()?;
    let settings = Recipe::settings(stage, settings);
    let (calibration, _) = calibrated(method, model, data, settings)?;
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data,
        settings: Some(settings),
    };
    let budget = stage.budget()?;
    let plan = method.plan(&task, &budget)?;
    if let Some(short) = plan.shortfall(&task, &budget) {
        tracing::warn!("{}: {short}", method.name);
    }
    output::print_json(&plan)
}

fn only_stage<'a>(recipe: &'a Recipe, option: &str) -> Result<&'a Stage> {
    match recipe.stages.as_slice() {
        [stage] => Ok(stage),
        several => bail!(
            "{option} is about the plan of one method, not of {}",
            several.len()
        ),
    }
}

/// What a method needs to know, and the seconds that it took to find out.
fn calibrated(
    method: &Method,
    model: &Model,
    data: Option<&CalibrationData>,
    settings: &Settings,
) -> Result<(Option<Calibration>, f64)> {
    let started = Instant::now();
    let requirements = method.requirements(model, settings)?;
    let calibration = match data {
        Some(data) if !requirements.is_empty() => Some(Calibration::collect(
            model,
            data,
            &requirements,
            CalibrationOptions::default(),
        )?),
        _ => None,
    };
    Ok((calibration, started.elapsed().as_secs_f64()))
}

/// Carries out a plan from a file, which `--plan-only` wrote and somebody may have edited.
fn by_hand(
    path: &Path,
    recipe: &Recipe,
    model: &Model,
    data: Option<&CalibrationData>,
    settings: &Settings,
) -> Result<Done> {
    const MOST: u64 = 1 << 24;
    let stage = only_stage(recipe, "--plan")?;
    let settings = Recipe::settings(stage, settings);
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
    let method = stage.method()?;
    let made_by = &plan.method;
    ensure!(
        made_by == method.name,
        "{} is a plan of {made_by}, but the method is {}; give --method {made_by}",
        path.display(),
        method.name,
    );
    let (calibration, seconds) = calibrated(method, model, data, settings)?;
    let started = Instant::now();
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data,
        settings: Some(settings),
    };
    Ok(Done {
        compressed: method.apply(&task, &plan)?,
        plan,
        seconds: Seconds {
            calibration: seconds,
            cut: started.elapsed().as_secs_f64(),
        },
    })
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
            let length = data::window(arguments, model)?;
            let mut windows = sliding_windows(&tokens, length, (length / 2).max(1))?;
            windows.truncate(arguments.windows);
            Ok(windows)
        }
        (None, Some(data)) => data::data_windows(data),
        (None, None) => Ok(Vec::new()),
    }
}

/// What kind of directory was written, of a model that has a family or was made here.
fn class(saved: SavedAs, dense: bool, family: bool) -> &'static str {
    match (saved, dense) {
        (SavedAs::HuggingFace, true) => {
            "a Hugging Face directory with merged weights: same outputs, original size and speed"
        }
        (SavedAs::HuggingFace, false) => "a Hugging Face directory that `transformers` loads",
        (SavedAs::Lapidary, false) if family => {
            "a Lapidary directory: lapidary.json beside safetensors; load it with lapidary, or write --dense for other programs"
        }
        (SavedAs::Lapidary, _) => {
            "a Lapidary directory: lapidary.json beside safetensors; load it with lapidary"
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
