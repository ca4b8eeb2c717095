//! `lapidary compress --interactions`: what two methods cost together beside what each costs alone.

use super::{data, unheard, windows};
use crate::cli::{Compress, Global};
use crate::{loading, output, report};
use anyhow::{Context, Result, ensure};
use lapidary_compress::quality::{agreement, likeness, perplexity};
use lapidary_compress::{Interactions, Method, Settings, Stage, interactions};
use lapidary_explain::report::{Cell, Report, Table};
use lapidary_model::Model;
use serde::Serialize;

use super::measure::BATCH;

#[derive(Serialize)]
struct Found {
    /// What a loss is.
    loss: &'static str,
    #[serde(flatten)]
    interactions: Interactions,
    #[serde(flatten)]
    report: Report,
}

pub(super) fn run(
    methods: &str,
    arguments: &Compress,
    settings: &Settings,
    global: &Global,
) -> Result<()> {
    let ratio: f64 = arguments.ratio().trim().parse().unwrap_or(f64::NAN);
    ensure!(
        ratio > 0.0 && ratio < 1.0,
        "ratio is {:?}, but must be one number above 0 and below 1",
        arguments.ratio()
    );
    let methods = methods
        .split(',')
        .map(|name| Ok(Method::find(name.trim())?))
        .collect::<Result<Vec<&'static Method>>>()?;
    ensure!(
        methods.len() >= 2,
        "--interactions names {} method, but must name two at least, by commas",
        methods.len()
    );
    unheard::check_methods(&methods, arguments, false)?;
    let stages: Vec<Stage> = methods
        .iter()
        .map(|method| Stage {
            method: method.name.to_owned(),
            ratio: (!method.rounds()).then_some(ratio),
            settings: None,
        })
        .collect();
    let package = loading::package(&arguments.model, global)?;
    let model = package.single_model()?;
    let needs = |method: &&&Method| {
        let requirements = method.requirements(model, settings);
        method.observes || requirements.is_ok_and(|needed| !needed.is_empty())
    };
    let needed_by = methods.iter().find(needs).copied();
    let data = data::calibration(&package, model, needed_by, arguments, global)?;
    let windows = windows(&package, model, data.as_ref(), arguments)?;
    ensure!(
        data.is_some() || !windows.is_empty(),
        "--interactions needs --calibrate FILE, or of a language model --evaluate FILE: what losses are measured on"
    );
    // Of models that predict no text, how far they are from the original.
    type Loss<'a> = &'a dyn Fn(&Model) -> Result<f64>;
    let (loss_name, loss): (_, Loss<'_>) = match windows.is_empty() {
        false => ("nats per token", &|model| {
            Ok(perplexity(model, &windows, BATCH)?.value.ln())
        }),
        true => ("distance from the original", &|other| {
            let data = data.as_ref().context("no text to measure on")?;
            match likeness(model, other, data, BATCH) {
                Ok(found) => Ok(1.0 - found.cosine),
                Err(_) => Ok(agreement(model, other, data, BATCH)?.divergence),
            }
        }),
    };
    let found = interactions(model, &stages, data.as_ref(), settings, loss)?;
    let report = shown(&arguments.model, loss_name, &found);
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&report)?)?;
    }
    match global.json {
        true => output::print_json(&Found {
            loss: loss_name,
            interactions: found,
            report,
        }),
        false => output::print(&report::analysis_text(&report)),
    }
}

fn shown(model: &str, loss: &str, found: &Interactions) -> Report {
    let name = |at: usize| {
        let stage = found.methods.get(at);
        stage.map_or_else(String::new, |stage| stage.method.clone())
    };
    let mut alone = Table::new("Alone", &["method", "rise"]);
    for (at, rise) in found.alone.iter().enumerate() {
        alone.push([Cell::from(name(at)), Cell::from(*rise)]);
    }
    let columns = [
        "first",
        "then",
        "rise",
        "reversed",
        "interaction",
        "order effect",
    ];
    let mut pairs = Table::new("Together", &columns);
    let number = |found: Option<f64>| found.map_or(Cell::from("–"), Cell::from);
    for pair in &found.pairs {
        pairs.push([
            Cell::from(name(pair.first)),
            Cell::from(name(pair.second)),
            number(pair.in_order),
            number(pair.reversed),
            Cell::from(pair.interaction),
            number(pair.order_effect),
        ]);
    }
    let mut notes = vec![format!(
        "{loss}: {:.4} before; a rise is what a method, or two, add; an interaction below zero says that \
         two cost less together than the sum of both",
        found.whole
    )];
    notes.extend(found.pairs.iter().filter_map(|pair| {
        let refused = pair.refused.as_ref()?;
        let (first, then) = match pair.in_order {
            Some(_) => (pair.first, pair.second),
            None => (pair.second, pair.first),
        };
        let (first, then) = (name(first), name(then));
        Some(format!(
            "in one order only: {first}, then {then}; the other is not run, since {refused}"
        ))
    }));
    let why = found.left_out.iter();
    notes.extend(why.map(|(one, other, reason)| {
        format!("left out in either order: {one} and {other}, since {reason}")
    }));
    Report {
        title: format!("Interactions of methods on {model}"),
        notes,
        tables: vec![alone, pairs],
        ..Report::default()
    }
}
