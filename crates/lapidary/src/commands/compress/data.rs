//! What a compression is calibrated and measured on.

use std::path::Path;

use super::measure::is_language_model;
use crate::cli::{Compress, Global};
use crate::loading;
use crate::tensors::Tensors;
use anyhow::{Context, Result, bail, ensure};
use lapidary_compress::quality::{Window, sliding_windows};
use lapidary_compress::{CalibrationData, Content, Example, Method};
use lapidary_model::{HeadSpec, Model, Package};

/// The calibration data of these methods: from the file that was given, of the embedded model
/// from its own language, or none where none of them needs any.
pub(super) fn calibration(
    package: &Package,
    model: &Model,
    needed_by: Option<&Method>,
    arguments: &Compress,
    global: &Global,
) -> Result<Option<CalibrationData>> {
    ensure!(
        arguments.evaluate.is_none() || is_language_model(model),
        "--evaluate is for a model that predicts each next token, whose perplexity it measures, but {} \
         does not",
        arguments.model
    );
    Ok(match (&arguments.calibrate, needed_by) {
        (Some(path), _) => Some(calibration_data(package, model, path, arguments, global)?),
        (None, _) if arguments.model == "embedded" => Some(loading::embedded_windows(
            arguments.windows,
            window(arguments, model)?,
        )?),
        (None, Some(method)) => bail!(
            "method {} needs --calibrate FILE with {} like what the model is for; svd needs none",
            method.name,
            match model.spec().vocabulary() {
                Some(_) => "text",
                None => "images (JSON of pixel_values)",
            }
        ),
        (None, None) => None,
    })
}

/// Tokens in a window: as many as are asked for, or, where nothing is, as the model reads.
pub(super) fn window(arguments: &Compress, model: &Model) -> Result<usize> {
    /// What the command line has without the option.
    const DEFAULT: usize = 128;
    let (window, length) = (arguments.window, model.spec().length());
    ensure!(
        window <= length || window == DEFAULT,
        "window is {window}, but must be between 2 and {length}, the length of the model"
    );
    Ok(window.min(length))
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
    ensure!(
        pixels.rank() == 4,
        "pixel_values shape is {:?}, but must be [images, channels, rows, columns]",
        pixels.dims()
    );
    let examples = (0..pixels.dim(0)?).take(arguments.windows).map(|index| {
        Ok(Example {
            content: Content::Pixels(pixels.get(index)?),
            target: Default::default(),
        })
    });
    Ok(CalibrationData::new(examples.collect::<Result<_>>()?)?)
}

/// Calibration windows from the beginning of a text.
fn windows(
    package: &Package,
    model: &Model,
    tokens: &[u32],
    arguments: &Compress,
    seed: u64,
) -> Result<CalibrationData> {
    let length = window(arguments, model)?;
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
    if sees_both_sides && mask.is_none() {
        tracing::warn!(
            "the tokenizer has none of {}: nothing can be asked for, so that gradients and --heal are \
             refused",
            MASKS.join(", ")
        );
    }
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

pub(super) fn data_windows(data: &CalibrationData) -> Result<Vec<Window>> {
    let mut all = Vec::new();
    for example in data.examples() {
        if let Content::Tokens { ids, .. } = &example.content {
            all.extend(sliding_windows(ids, ids.len(), ids.len() - 1)?);
        }
    }
    Ok(all)
}
