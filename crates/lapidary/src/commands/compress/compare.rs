//! `lapidary compress --compare`: every method that the model allows, at several ratios, on one
//! calibration.

use std::time::Instant;

use super::measure::{Measure, Measured};
use super::{data, unheard, windows};
use crate::cli::{Compress, Global};
use crate::{loading, output, report};
use anyhow::{Result, ensure};
use lapidary_compress::{
    Budget, Calibration, CalibrationOptions, Method, Objective, Requirements, Schedule, Settings,
    Shortfall, Task, warm_up,
};
use lapidary_explain::report::{Cell, Plot, Report, Series, Table};
use lapidary_kernels::memory::most_held;
use serde::Serialize;

/// One method at one ratio.
#[derive(Serialize)]
struct Row {
    method: &'static str,
    ratio: f64,
    /// What of the ratio was not reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    shortfall: Option<Shortfall>,
    /// Share of all parameters that is left.
    kept: f64,
    /// Share of the bytes of all parameters that is left.
    bytes: f64,
    measured: Measured,
    #[serde(skip_serializing_if = "Option::is_none")]
    divergence: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cosine: Option<f64>,
    /// What it has to find out: nothing, activations, gradients, or by training.
    needs: &'static str,
    /// Most bytes that planning and cutting held beside the model and the calibration.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<usize>,
    /// Seconds of planning and cutting.
    seconds: f64,
}

/// Methods that do not apply, and why.
type LeftOut = Vec<(&'static str, String)>;

/// The whole comparison.
#[derive(Serialize)]
struct Comparison {
    original: Measured,
    rows: Vec<Row>,
    /// Methods that do not apply, and why.
    left_out: LeftOut,
    /// Seconds of the one calibration.
    calibration_seconds: f64,
    #[serde(flatten)]
    report: Report,
}

pub(super) fn run(
    methods: &str,
    arguments: &Compress,
    settings: &Settings,
    global: &Global,
) -> Result<()> {
    let every = methods == "all";
    let methods: Vec<&'static Method> = match methods {
        "all" => Method::all().to_vec(),
        names => names
            .split(',')
            .map(|name| Ok(Method::find(name.trim())?))
            .collect::<Result<_>>()?,
    };
    unheard::check_methods(&methods, arguments, false)?;
    let ratios = arguments
        .ratio()
        .split(',')
        .map(|text| {
            let ratio: f64 = text.trim().parse().unwrap_or(f64::NAN);
            let valid = ratio > 0.0 && ratio < 1.0;
            ensure!(
                valid,
                "ratio is {text:?}, but must be above 0 and below 1; several are given by commas"
            );
            Ok(ratio)
        })
        .collect::<Result<Vec<_>>>()?;
    let package = loading::package(&arguments.model, global)?;
    let model = package.single_model()?;
    let mut left_out = Vec::new();
    let mut applicable = Vec::new();
    for method in methods {
        if every && method.schedule == Schedule::Training {
            left_out.push((method.name, TRAINS.to_owned()));
            continue;
        }
        match method.requirements(model, settings) {
            Ok(needed) => applicable.push((method, needed)),
            Err(error) => left_out.push((method.name, error.to_string())),
        }
    }
    let needed_by = applicable
        .iter()
        .find(|(method, needed)| method.observes || !needed.is_empty())
        .map(|(method, _)| *method);
    let data = data::calibration(&package, model, needed_by, arguments, global)?;
    let windows = windows(&package, model, data.as_ref(), arguments)?;
    // Where the data has nothing to ask for, the methods go on that need no gradients.
    let nothing_asked = data
        .as_ref()
        .and_then(|data| Objective::of(model, data).err());
    if let Some(error) = nothing_asked {
        applicable.retain(|(method, needed)| {
            let goes_on = needed.gradients().is_empty();
            if !goes_on {
                left_out.push((method.name, error.to_string()));
            }
            goes_on
        });
    }
    let requirements = applicable
        .iter()
        .fold(Requirements::default(), |all, (_, needed)| {
            all.union(needed.clone())
        });
    let started = Instant::now();
    let calibration = match &data {
        Some(data) if !requirements.is_empty() => Some(Calibration::collect(
            model,
            data,
            &requirements,
            CalibrationOptions::default(),
        )?),
        _ => None,
    };
    let calibration_seconds = started.elapsed().as_secs_f64();
    let measure = Measure {
        package: &package,
        embedded: arguments.model == "embedded",
        data: data.as_ref(),
        windows: &windows,
    };
    let original = measure.of(model)?;
    warm_up();
    let mut rows = Vec::new();
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data: data.as_ref(),
        settings: Some(settings),
    };
    for (method, needed) in &applicable {
        let ratios: &[f64] = if method.rounds() { &[0.0] } else { &ratios };
        let mut failed: Vec<(f64, String)> = Vec::new();
        for &ratio in ratios {
            match one_row((*method, needed), ratio, &task, &measure, &original) {
                Ok(row) => rows.push(row),
                Err(error) => failed.push((ratio, format!("{error:#}"))),
            }
        }
        left_out.extend(at_ratios(method.name, failed, ratios.len()));
    }
    let report = shown(
        &arguments.model,
        &original,
        &rows,
        &left_out,
        calibration_seconds,
    );
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&report)?)?;
    }
    let comparison = Comparison {
        original,
        rows,
        left_out,
        calibration_seconds,
        report,
    };
    match global.json {
        true => output::print_json(&comparison),
        false => output::print(&report::analysis_text(&comparison.report)),
    }
}

/// Why a method that trains is not among all.
const TRAINS: &str = "it trains while it cuts: name it to have it measured";

/// A method at one ratio, cut and measured.
fn one_row(
    (method, needed): (&Method, &Requirements),
    ratio: f64,
    task: &Task<'_>,
    measure: &Measure<'_>,
    original: &Measured,
) -> Result<Row> {
    let started = Instant::now();
    let (cut, memory) =
        most_held(|| -> Result<_> { Ok(method.cut(task, &Budget::Keep(1.0 - ratio))?.1) });
    let compressed = cut?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!("{} at {ratio}: {seconds:.1} s", method.name);
    let measured = measure.of(&compressed.model)?;
    let distance = measure.between(task.model, &compressed.model, [&compressed.report])?;
    Ok(Row {
        method: method.name,
        ratio,
        shortfall: compressed.report.shortfall,
        kept: measured.size.parameters as f64 / original.size.parameters.max(1) as f64,
        bytes: measured.size.bytes as f64 / original.size.bytes.max(1) as f64,
        divergence: distance.agreement.map(|agreement| agreement.divergence),
        top1: distance.agreement.map(|agreement| agreement.top1),
        cosine: distance.likeness.map(|likeness| likeness.cosine),
        measured,
        needs: needed_by_method(method, needed),
        memory,
        seconds,
    })
}

/// Why a method could not be compared, each reason once: with the ratios, where it could at others.
fn at_ratios(method: &'static str, failed: Vec<(f64, String)>, ratios: usize) -> LeftOut {
    let mut reasons: Vec<(String, Vec<String>)> = Vec::new();
    for (ratio, reason) in failed {
        match reasons.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, at)) => at.push(ratio.to_string()),
            None => reasons.push((reason, vec![ratio.to_string()])),
        }
    }
    let told = reasons.into_iter().map(|(reason, at)| {
        let reason = match at.len() == ratios {
            true => reason,
            false => format!("at {}: {reason}", at.join(", ")),
        };
        (method, reason)
    });
    told.collect()
}

/// What a method has to find out about a model before it cuts.
fn needed_by_method(method: &Method, needed: &Requirements) -> &'static str {
    match method.schedule {
        Schedule::Training => "training",
        _ if !needed.gradients().is_empty() => "gradients",
        _ if needed.is_empty() && !method.observes => "nothing",
        _ => "activations",
    }
}

/// The mean share of two-way choices that are right, of models that are asked any.
fn right(measured: &Measured) -> Option<f64> {
    let choices = &measured.choices;
    let sum: f64 = choices.iter().map(|(_, share)| share).sum();
    (!choices.is_empty()).then(|| sum / choices.len() as f64)
}

fn shown(
    model: &str,
    original: &Measured,
    rows: &[Row],
    left_out: &[(&'static str, String)],
    calibration_seconds: f64,
) -> Report {
    let columns = [
        "method",
        "ratio",
        "parameters kept",
        "bytes kept",
        "perplexity",
        "KL or 1 − cosine",
        "same answer",
        "reading",
        "writing",
        "right",
        "needs",
        "memory",
        "seconds",
    ];
    let mut table = Table::new("Methods", &columns);
    let faster = |after: Option<f64>, before: Option<f64>| {
        let pair = after.zip(before);
        pair.map_or(Cell::from("–"), |(after, before)| {
            Cell::from(format!("{:.2}×", after / before))
        })
    };
    let number = |found: Option<f64>| found.map_or(Cell::from("–"), Cell::from);
    for row in rows {
        let distance = row.divergence.or(row.cosine.map(|cosine| 1.0 - cosine));
        table.push([
            Cell::from(row.method),
            match row.ratio > 0.0 {
                true => format!("{}", row.ratio).into(),
                false => Cell::from("–"),
            },
            format!("{:.1} %", 100.0 * row.kept).into(),
            format!("{:.1} %", 100.0 * row.bytes).into(),
            number(row.measured.perplexity.map(|found| found.value)),
            number(distance),
            row.top1.map_or(Cell::from("–"), |share| {
                format!("{:.1} %", 100.0 * share).into()
            }),
            faster(row.measured.prefill, original.prefill),
            faster(row.measured.decode, original.decode),
            right(&row.measured).map_or(Cell::from("–"), |share| {
                format!("{:.0} %", 100.0 * share).into()
            }),
            row.needs.into(),
            row.memory.map_or(Cell::from("–"), |bytes| {
                output::bytes(bytes as u64).into()
            }),
            format!("{:.2}", row.seconds).into(),
        ]);
    }
    let mut notes = vec![format!(
        "{model}: {} parameters; one calibration for all, {calibration_seconds:.1} s",
        output::grouped(original.size.parameters)
    )];
    if let Some(perplexity) = original.perplexity {
        notes.push(format!(
            "perplexity of the original {:.3} ({} scored tokens, {} windows)",
            perplexity.value,
            output::grouped(perplexity.tokens),
            perplexity.windows
        ));
    }
    let missing = without_empty(&mut table);
    if !missing.is_empty() {
        notes.push(format!(
            "not measured, since this model or what was given allows none: {}",
            missing.join(", ")
        ));
    }
    notes.extend(rows.iter().filter_map(|row| {
        let short = row.shortfall.as_ref()?;
        Some(format!("{} at {}: {short}", row.method, row.ratio))
    }));
    notes.extend(reasons(left_out));
    Report {
        title: format!("Compression of {model}"),
        notes,
        tables: vec![table],
        plots: plots(original, rows),
        ..Report::default()
    }
}

/// Takes the columns out of a table in which nothing stands, and gives their names.
fn without_empty(table: &mut Table) -> Vec<String> {
    if table.rows.is_empty() {
        return Vec::new();
    }
    let stands = |column: usize| {
        let mut cells = table.rows.iter().filter_map(|row| row.get(column));
        cells.any(|cell| *cell != Cell::from("–"))
    };
    let kept: Vec<bool> = (0..table.columns.len()).map(stands).collect();
    let keeps = |column: usize| kept.get(column).copied().unwrap_or(true);
    let columns = std::mem::take(&mut table.columns);
    let (there, missing): (Vec<_>, Vec<_>) = columns
        .into_iter()
        .enumerate()
        .partition(|(column, _)| keeps(*column));
    table.columns = there.into_iter().map(|(_, name)| name).collect();
    for row in &mut table.rows {
        let mut column = 0;
        row.retain(|_| {
            column += 1;
            keeps(column - 1)
        });
    }
    // Methods that round have no ratio: nothing is missing there.
    let names = missing.into_iter().map(|(_, name)| name);
    names.filter(|name| name != "ratio").collect()
}

/// A line for each reason, with all methods that were left out for it: what is said of each with its own name
/// is said once, of these.
fn reasons(left_out: &[(&'static str, String)]) -> Vec<String> {
    let mut lines: Vec<(String, Vec<(&str, &str)>)> = Vec::new();
    for (method, reason) in left_out {
        let nameless = without_name(reason, method);
        match lines.iter_mut().find(|(known, _)| *known == nameless) {
            Some((_, methods)) => methods.push((method, reason)),
            None => lines.push((nameless, vec![(method, reason)])),
        }
    }
    let line = |(nameless, methods): (String, Vec<(&str, &str)>)| match methods.as_slice() {
        [(method, reason)] => format!("left out: {method}, since {reason}"),
        several => {
            let names: Vec<&str> = several.iter().map(|(method, _)| *method).collect();
            format!("left out: {}, since {nameless}", names.join(", "))
        }
    };
    lines.into_iter().map(line).collect()
}

/// A sentence with "these" where it says `name` as a word of its own; names may be the beginnings of others.
fn without_name(sentence: &str, name: &str) -> String {
    let inside = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
    let mut said = String::new();
    let mut rest = sentence;
    while let Some((before, after)) = rest.split_once(name) {
        let alone = !before.ends_with(inside) && !after.starts_with(inside);
        said += before;
        said += if alone { "these" } else { name };
        rest = after;
    }
    said + rest
}

/// Quality against size, against measured speed, and against the share removed, from the whole model on.
fn plots(original: &Measured, rows: &[Row]) -> Vec<Plot> {
    let nats = |measured: &Measured| measured.perplexity.map(|found| found.value.ln());
    let quality = |row: &Row| {
        nats(&row.measured)
            .or(row.divergence)
            .or(row.cosine.map(|cosine| 1.0 - cosine))
    };
    // The original is at no distance from itself.
    let whole = nats(original).unwrap_or(0.0);
    let line = |x: &dyn Fn(&Row) -> Option<f64>| -> Vec<Series> {
        let mut series: Vec<Series> = Vec::new();
        for row in rows {
            let Some(point) = x(row).zip(quality(row)) else {
                continue;
            };
            match series.iter_mut().find(|series| series.name == row.method) {
                Some(series) => series.points.push(point),
                None => series.push(Series {
                    name: row.method.to_owned(),
                    points: vec![point],
                }),
            }
        }
        for series in &mut series {
            series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        series
    };
    let plot = |title: &str, x: &str, series: Vec<Series>| Plot {
        title: title.to_owned(),
        x: x.to_owned(),
        y: "nats per token (or distance, of models that predict none)".to_owned(),
        series,
    };
    let mut by_ratio = line(&|row| (row.ratio > 0.0).then_some(row.ratio));
    for series in &mut by_ratio {
        series.points.insert(0, (0.0, whole));
    }
    let all = [
        plot(
            "Quality against size",
            "share of bytes kept",
            line(&|row| Some(row.bytes)),
        ),
        plot(
            "Quality against speed",
            "tokens per second, reading",
            line(&|row| row.measured.prefill),
        ),
        plot("Quality against ratio", "share removed", by_ratio),
    ];
    all.into_iter()
        .filter(|plot| !plot.series.is_empty())
        .collect()
}
