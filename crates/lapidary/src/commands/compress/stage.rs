//! What is run: a recipe, its settings, and a word for each change.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use lapidary_compress::{Change, Recipe, Settings};
use lapidary_model::Model;
use serde::Serialize;

use crate::cli::{Compress, Global};
use crate::loading;

/// Most bytes of a recipe or of settings.
const MOST: u64 = 1 << 20;

/// The order that is better than the one that was given, or was before `--reorder`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Order {
    /// The methods in it.
    methods: String,
    /// Whether it is the one that was run.
    taken: bool,
    /// Why, a sentence for each pair that changes places.
    reasons: Vec<String>,
    #[serde(skip)]
    recipe: Recipe,
}

impl Order {
    /// For the terminal and for a page.
    pub(super) fn lines(&self) -> Vec<String> {
        let Self {
            methods, reasons, ..
        } = self;
        let first = match self.taken {
            true => format!("order       put as {methods}, since"),
            false => format!("order       better as {methods} (--reorder), since"),
        };
        let reasons = reasons.iter().map(|reason| format!("            {reason}"));
        std::iter::once(first).chain(reasons).collect()
    }
}

/// The recipe of `--recipe`, or of `--method` and `--ratio`; and a better order, if there is one.
pub(super) fn recipe(arguments: &Compress, global: &Global) -> Result<(Recipe, Option<Order>)> {
    let recipe: Recipe = match &arguments.recipe {
        None => Recipe::as_given(&arguments.method, &arguments.ratio())?,
        Some(path) => from_file(path, arguments, global)?,
    };
    let better = recipe.reordered()?;
    let names = better.recipe.stages.iter();
    let names: Vec<&str> = names.map(|stage| stage.method.as_str()).collect();
    let order = (!better.reasons.is_empty()).then(|| Order {
        methods: names.join("+"),
        taken: arguments.reorder,
        reasons: better.reasons.clone(),
        recipe: better.recipe.clone(),
    });
    let recipe = match arguments.reorder {
        true => better.recipe,
        false => recipe,
    };
    if let Err(error) = recipe.check() {
        let better = order.filter(|order| !order.taken);
        return match better {
            Some(Order { methods, .. }) => {
                Err(error).with_context(|| format!("--reorder runs it as {methods}"))
            }
            None => Err(error.into()),
        };
    }
    Ok((recipe, order))
}

/// Refuses a recipe of which a stage cannot be run on what an earlier one leaves of the model. The order
/// that is better goes where that is so of it.
pub(super) fn checked(
    recipe: &Recipe,
    order: Option<Order>,
    model: &Model,
    settings: &Settings,
) -> Result<Option<Order>> {
    let order = order.filter(|order| {
        let runs = order.recipe.check_model(model, settings).is_ok();
        order.taken || runs
    });
    match (recipe.check_model(model, settings), order) {
        (Ok(()), order) => Ok(order),
        (Err(error), Some(Order { methods, taken, .. })) if !taken => {
            Err(error).with_context(|| format!("--reorder runs it as {methods}"))
        }
        (Err(error), _) => Err(error.into()),
    }
}

/// Beside what a stage says of the model that an earlier one left, the order in which that does not arise.
pub(super) fn advised(error: anyhow::Error, order: Option<&Order>) -> anyhow::Error {
    let later = matches!(
        error.downcast_ref(),
        Some(lapidary_compress::Error::Later { .. })
    );
    match order.filter(|order| later && !order.taken) {
        Some(Order { methods, .. }) => error.context(format!("--reorder runs it as {methods}")),
        None => error,
    }
}

/// The recipe of a file. What a stage with settings of its own does not say is as the whole run was told.
fn from_file(path: &Path, arguments: &Compress, global: &Global) -> Result<Recipe> {
    let text = read(path)?;
    let misread = |error| loading::misread(path, &text, &error);
    let mut recipe: Recipe = toml::from_str(&text).map_err(misread)?;
    let whole = told(arguments, global)?;
    let written: toml::Table = toml::from_str(&text).map_err(misread)?;
    let stages = written.get("stage").and_then(toml::Value::as_array);
    let stages = recipe.stages.iter_mut().zip(stages.into_iter().flatten());
    for (number, (stage, written)) in (1..).zip(stages) {
        if let Some(own) = written.get("settings").and_then(toml::Value::as_table) {
            let mut all = whole.clone();
            merge(&mut all, own.clone());
            let what = || format!("{}, the settings of stage {number}", path.display());
            let settings = settings_of(all).with_context(what)?;
            let method = stage.method()?;
            if let Some(section) = own.keys().find(|section| !method.reads(section)) {
                bail!(
                    "{}: stage {number} has settings of `{section}`, which {} does not read",
                    path.display(),
                    method.name
                );
            }
            stage.settings = Some(settings);
        }
    }
    Ok(recipe)
}

/// The settings of the whole run.
pub(super) fn settings(arguments: &Compress, global: &Global) -> Result<Settings> {
    let settings = settings_of(told(arguments, global)?).context("the settings")?;
    // What is measured last would fail after everything else.
    settings.activations.check()?;
    Ok(settings)
}

/// Settings of a table, or what is wrong in it, on one line.
fn settings_of(table: toml::Table) -> Result<Settings> {
    let settings: Settings = table.try_into().map_err(|error: toml::de::Error| {
        let text = error.to_string();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        anyhow!("{}", lines.join(" "))
    })?;
    ensure!(settings.batch >= 1, "batch is 0, but must be at least 1");
    Ok(settings)
}

/// The settings of `--settings`, changed by each `--set key=value` and by the options that stand for some.
fn told(arguments: &Compress, global: &Global) -> Result<toml::Table> {
    let mut table = match &arguments.settings {
        Some(path) => {
            let text = read(path)?;
            toml::from_str(&text).map_err(|error| loading::misread(path, &text, &error))?
        }
        None => toml::Table::new(),
    };
    for text in &arguments.set {
        let (key, value) = text
            .split_once('=')
            .with_context(|| format!("--set has {text:?}, but must have KEY=VALUE"))?;
        // What is no TOML value by itself is a word.
        let parsed = toml::from_str::<toml::Table>(&format!("{key} = {value}"));
        let parsed = match parsed {
            Ok(table) => table,
            Err(_) => {
                let word = toml::from_str(&format!("{key} = {value:?}"));
                word.map_err(|error| {
                    anyhow!(
                        "--set has {text:?}, which is no setting: {}",
                        error.message()
                    )
                })?
            }
        };
        merge(&mut table, parsed);
    }
    let seed = i64::try_from(global.seed).ok().with_context(|| {
        format!(
            "seed is {}, but must be at most {} to be a setting",
            global.seed,
            i64::MAX
        )
    })?;
    table.entry("seed").or_insert(toml::Value::Integer(seed));
    let mut tell = |section: &str, key: &str, value: toml::Value| {
        let section = table
            .entry(section.to_owned())
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        // What is no table there is refused when the settings are read.
        if let toml::Value::Table(section) = section {
            section.insert(key.to_owned(), value);
        }
    };
    if arguments.uniform || arguments.uniform_heads {
        let heads = || toml::Value::Boolean(arguments.uniform_heads);
        tell("modegpt", "smoothing", toml::Value::Float(f64::INFINITY));
        tell("modegpt", "heads", heads());
        tell("modegpt", "stock", heads());
        tell("lorap", "attention", toml::Value::Boolean(false));
    }
    if let Some(range) = arguments.activations {
        tell("activations", "range", toml::Value::try_from(range)?);
    }
    if let Some(pattern) = arguments.pattern {
        tell("pruning", "pattern", toml::Value::try_from(pattern)?);
    }
    if let Some(globs) = &arguments.layers {
        let globs = globs.split(',').map(|glob| glob.trim().to_owned());
        let globs = globs.map(toml::Value::String).collect();
        tell("selection", "layers", toml::Value::Array(globs));
    }
    Ok(table)
}

/// Puts every value of `from` into `into`, tables within tables.
fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(into)), toml::Value::Table(from)) => merge(into, from),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn read(path: &Path) -> Result<String> {
    let size = std::fs::metadata(path)
        .with_context(|| format!("{} cannot be read", path.display()))?
        .len();
    ensure!(
        size <= MOST,
        "{} has {size} bytes, but at most {MOST} are read",
        path.display()
    );
    std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))
}

/// What became of a module, in a word or two.
pub(super) fn changed(change: &Change) -> String {
    match change {
        Change::Factorise { rank } => format!("rank {rank}"),
        Change::Narrow { features } => format!("{features} features"),
        Change::NarrowHeads { query_key, value } => format!("heads of {query_key} and {value}"),
        Change::FewerHeads { heads } => format!("{heads} heads"),
        Change::Slice { width } => format!("width {width}"),
        Change::Remove => "left out".to_owned(),
        Change::Linearise { blocks: 1 } => "a linear map".to_owned(),
        Change::Linearise { blocks } => format!("a linear map for {blocks} blocks"),
        Change::Fuse { from } => format!("takes over from blocks.{from}"),
        Change::Prune { share } => format!("{:.1} % zero", 100.0 * share),
        Change::Edit { mass } => format!("{:.1} % kept", 100.0 * mass),
        Change::Quantise { bits, group } => format!("{bits} bits, groups of {group}"),
        Change::Leave { .. } => "as it was".to_owned(),
    }
}
