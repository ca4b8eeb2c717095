//! `lapidary compress`: fewer parameters, and what that cost.

use std::path::Path;
use std::time::Instant;

use crate::cli::{Compress, Global};
use crate::tensors::Tensors;
use crate::{loading, output};
use anyhow::{Context, Result, bail, ensure};
use comfy_table::{Table, presets};
use lapidary_compress::quality::{agreement, likeness, perplexity, sliding_windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Content, Example, Method,
    Plan, Selection, export_dense,
};
use lapidary_model::{HeadSpec, Model, Package, SavedAs};
use serde_json::json;

/// Sequences in a forward pass that only measures.
const BATCH: usize = 8;

/// Windows to calibrate on, all of which are held.
const MOST_WINDOWS: usize = 1 << 16;

pub fn run(arguments: &Compress, global: &Global) -> Result<()> {
    let method = method(&arguments.method)?;
    let ratio = arguments.ratio;
    ensure!(
        ratio > 0.0 && ratio < 1.0,
        "ratio is {ratio}, but must be above 0 and below 1: the share of weights to remove"
    );
    ensure!(
        (1..=MOST_WINDOWS).contains(&arguments.windows),
        "windows is {}, but must be between 1 and {MOST_WINDOWS}",
        arguments.windows
    );
    let out = &arguments.out;
    ensure!(
        !out.exists()
            || out
                .read_dir()
                .is_ok_and(|mut entries| entries.next().is_none()),
        "{} exists and is not an empty directory; give a new one",
        out.display()
    );
    let package = loading::package(&arguments.model, global)?;
    ensure!(
        package
            .towers
            .iter()
            .all(|tower| !tower.model.shares_weights()),
        "the blocks of {} share one set of weights, but calibration needs a matrix that is used once",
        arguments.model
    );
    let started = Instant::now();
    let model = package.single_model()?;
    let selection = Selection::default();
    let requirements = method.requirements(model, &selection)?;
    let data = match (&arguments.calibrate, requirements.is_empty()) {
        (Some(path), _) => Some(calibration_data(&package, model, path, arguments, global)?),
        (None, false) if arguments.model == "embedded" => Some(loading::embedded_windows(
            arguments.windows,
            arguments.window.min(model.spec().length()),
        )?),
        (None, false) => bail!(
            "method {method} needs --calibrate FILE with {} like what the model is for; svd needs none",
            match model.spec().vocabulary() {
                Some(_) => "text",
                None => "images (JSON of pixel_values)",
            }
        ),
        (None, true) => None,
    };
    let calibration = match &data {
        Some(data) if !requirements.is_empty() => Some(Calibration::collect(
            model,
            data,
            &requirements,
            CalibrationOptions::default(),
        )?),
        _ => None,
    };
    let plan = Plan::new(model, method, &selection, &Budget::Keep(1.0 - ratio))?;
    for layer in &plan.layers {
        if let Change::Leave { reason } = &layer.change {
            tracing::info!("{} stays as it is: {reason}", layer.path);
        }
    }
    let compressed = plan.apply(model, calibration.as_ref())?;
    let scores = match &data {
        Some(data) if has_scores(model) => Some(agreement(model, &compressed.model, data, BATCH)?),
        _ => None,
    };
    let vectors = match &data {
        Some(data) if !has_scores(model) => Some(likeness(model, &compressed.model, data, BATCH)?),
        _ => None,
    };
    let perplexities = match &data {
        Some(data) if is_language_model(model) => {
            let windows = data_windows(data)?;
            Some((
                perplexity(model, &windows, BATCH)?,
                perplexity(&compressed.model, &windows, BATCH)?,
            ))
        }
        _ => None,
    };
    let report = &compressed.report;
    let (before, after, kept) = (report.before, report.after, report.kept());
    let rows: Vec<[String; 5]> = report
        .layers
        .iter()
        .map(|layer| {
            let error = |errors: &Option<lapidary_compress::LayerErrors>| {
                errors.as_ref().map_or_else(
                    || "–".to_owned(),
                    |errors| format!("{:.4}", errors.weighted),
                )
            };
            [
                layer.path.clone(),
                format!("{}×{}", layer.output, layer.input),
                layer
                    .rank
                    .map_or_else(|| "dense".to_owned(), |rank| rank.to_string()),
                error(&layer.chosen),
                error(&layer.plain),
            ]
        })
        .collect();
    let document = serde_json::to_value(report)?;
    let result = if arguments.dense {
        export_dense(&compressed.model)?
    } else {
        compressed.model
    };
    let package = package.with_model(result);
    let saved = package.save(out, None)?;
    let class = match (saved, arguments.dense) {
        (SavedAs::HuggingFace, true) => {
            "a Hugging Face directory with merged weights: same outputs, original size and speed"
        }
        (SavedAs::HuggingFace, false) => "a Hugging Face directory that `transformers` loads",
        (SavedAs::Lapidary, _) => {
            "a Lapidary directory: lapidary.json beside safetensors; load it with lapidary, or write --dense for other programs"
        }
    };
    if global.json {
        return output::print_json(&json!({
            "report": document,
            "kept": kept,
            "agreement_on_calibration": scores,
            "likeness_on_calibration": vectors,
            "perplexity_on_calibration": perplexities.map(|(before, after)| json!({ "before": before, "after": after })),
            "saved_as": match saved { SavedAs::HuggingFace => "hugging-face", SavedAs::Lapidary => "lapidary" },
            "directory": out,
            "seconds": started.elapsed().as_secs_f64(),
        }));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "layer",
        "shape",
        "rank",
        "weighted error",
        "plain SVD's",
    ]);
    for row in rows {
        table.add_row(row);
    }
    let mut text = format!("{table}\n\nmethod      {method}\n");
    let as_factors = match arguments.dense {
        true => "; as factors, before they were multiplied out",
        false => "",
    };
    text += &format!(
        "parameters  {} -> {} ({:.1} % kept{as_factors})\nbytes       {} -> {}\nFLOPs/token {} -> {}\n",
        output::grouped(before.parameters),
        output::grouped(after.parameters),
        100.0 * kept,
        output::bytes(before.bytes as u64),
        output::bytes(after.bytes as u64),
        output::grouped(before.flops_per_token),
        output::grouped(after.flops_per_token),
    );
    if let Some((before, after)) = perplexities {
        text += &format!(
            "perplexity  {:.3} -> {:.3} on the calibration text ({} scored tokens, {} windows)\n",
            before.value,
            after.value,
            output::grouped(before.tokens),
            before.windows
        );
    }
    if let Some(measured) = scores {
        text += &format!(
            "agreement   KL {:.4} nats, same first answer {:.1} % of {} predictions\n",
            measured.divergence,
            100.0 * measured.top1,
            output::grouped(measured.predictions)
        );
    }
    if let Some(measured) = vectors {
        text += &format!(
            "likeness    cosine {:.4}, relative error {:.4} over {} last hidden vectors\n",
            measured.cosine,
            measured.relative_error,
            output::grouped(measured.vectors)
        );
    }
    text += &format!(
        "written to  {} ({class}), {:.1} s\n",
        out.display(),
        started.elapsed().as_secs_f64()
    );
    output::print(&text)
}

/// The method of that name; short forms are allowed.
pub fn method(name: &str) -> Result<Method> {
    Ok(match name {
        "activation" => Method::ActivationWeighted,
        "row-column" => Method::RowColumnFisher,
        "generalised" => Method::GeneralisedFisher,
        other => other.parse()?,
    })
}

fn is_language_model(model: &Model) -> bool {
    model.spec().is_causal() && matches!(model.spec().head, HeadSpec::LanguageModel { .. })
}

/// What a file shows the model: windows of its text, or its images.
fn calibration_data(
    package: &Package,
    model: &Model,
    path: &Path,
    arguments: &Compress,
    global: &Global,
) -> Result<CalibrationData> {
    if model.spec().vocabulary().is_some() {
        let tokens = loading::file_tokens(package, path)?;
        return windows(package, model, &tokens, arguments, global.seed);
    }
    let tensors = Tensors::read(path, &loading::device(global)?)?;
    let pixels = tensors
        .pixels
        .with_context(|| format!("pixel_values is missing from {}", path.display()))?;
    let examples = (0..pixels.dim(0)?).take(arguments.windows).map(|index| {
        Ok(Example {
            content: Content::Pixels(pixels.get(index)?),
            target: Default::default(),
        })
    });
    Ok(CalibrationData::new(examples.collect::<Result<_>>()?)?)
}

fn has_scores(model: &Model) -> bool {
    match &model.spec().head {
        HeadSpec::LanguageModel { .. } => true,
        HeadSpec::Pooled { labels, .. } => labels.is_some(),
        HeadSpec::None => false,
    }
}

/// Calibration windows from the beginning of a text.
fn windows(
    package: &Package,
    model: &Model,
    tokens: &[u32],
    arguments: &Compress,
    seed: u64,
) -> Result<CalibrationData> {
    let length = arguments.window.min(model.spec().length());
    let special = package
        .tokenizer
        .as_ref()
        .and_then(|tokenizer| tokenizer.encode("", &Default::default()).ok());
    // Encoders expect their own marks around a text; a decoder's windows are cut from its middle.
    let marks = special
        .filter(|_| !model.spec().is_causal())
        .map(|encoding| encoding.ids)
        .unwrap_or_default();
    let room = length.saturating_sub(marks.len());
    ensure!(
        room >= 2,
        "window is {}, but must be at least {}",
        arguments.window,
        marks.len() + 2
    );
    let windows: Vec<Vec<u32>> = tokens
        .chunks(room)
        .filter(|chunk| chunk.len() == room)
        .take(arguments.windows)
        .map(|chunk| match marks.split_first() {
            Some((first, last)) => std::iter::once(*first)
                .chain(chunk.iter().copied())
                .chain(last.iter().copied())
                .collect(),
            None => chunk.to_vec(),
        })
        .collect();
    ensure!(
        !windows.is_empty(),
        "the calibration text has {} tokens, but must have at least {room}, one window",
        tokens.len()
    );
    let sees_both_sides =
        !model.spec().is_causal() && matches!(model.spec().head, HeadSpec::LanguageModel { .. });
    let mask = package.tokenizer.as_ref().and_then(|tokenizer| {
        let mask = MASKS.iter().find_map(|name| tokenizer.id_of(name))?;
        Some((tokenizer, mask))
    });
    let data = match mask {
        Some((tokenizer, mask)) if sees_both_sides => {
            let mut generator = lapidary_train::generator(seed);
            let may_hide = |id| !tokenizer.is_special(id);
            CalibrationData::masked(windows, mask, MASKED, may_hide, &mut generator)
        }
        _ => CalibrationData::windows(windows),
    };
    data.context("the calibration text cannot be used")
}

/// What mask tokens are called.
const MASKS: [&str; 2] = ["[MASK]", "<mask>"];

/// Share of the tokens that a masked language model is asked for, as in its training.
const MASKED: f64 = 0.15;

fn data_windows(data: &CalibrationData) -> Result<Vec<lapidary_compress::quality::Window>> {
    let mut all = Vec::new();
    for example in data.examples() {
        if let Content::Tokens { ids, .. } = &example.content {
            all.extend(sliding_windows(ids, ids.len(), ids.len() - 1)?);
        }
    }
    Ok(all)
}
