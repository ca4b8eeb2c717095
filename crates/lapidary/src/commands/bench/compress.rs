//! `lapidary bench compress`: what finding out, and cutting, costs beside the forward passes, and
//! what it brings.

use std::time::Instant;

use anyhow::{Result, ensure};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Method, Settings, Task,
};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model, Pass};
use serde_json::json;

use crate::cli::{Bench, Global};
use crate::output;

/// The share of the weights that is kept.
const KEPT: f64 = 0.7;

/// Cuts a random decoder on `batch` windows of `length` tokens.
pub(super) fn run(arguments: &Bench, global: &Global) -> Result<()> {
    ensure!(
        arguments.batch >= 1 && arguments.length >= 2,
        "batch is {} and length {}, but there must be a window of two tokens at least",
        arguments.batch,
        arguments.length
    );
    let name = arguments.method.as_deref().unwrap_or("slicegpt");
    let method = Method::find(name)?;
    let model = super::model(arguments, global)?;
    let rows = super::ids(&model, arguments.batch, arguments.length)?.to_vec2::<u32>()?;
    let data = CalibrationData::windows(rows.iter().cloned())?;
    let settings = Settings::default();
    let weights = model.parameters().values();
    let weights: usize = weights
        .map(|t| t.elem_count() * t.dtype().size_in_bytes())
        .sum();

    let options = CalibrationOptions::default();
    pass(&model, &rows[..1])?;
    let forward = seconds(|| {
        rows.chunks(options.batch)
            .try_for_each(|part| pass(&model, part))
    })?;
    let requirements = method.requirements(&model, &settings)?;
    let mut calibration = None;
    let calibrated = seconds(|| {
        if !requirements.is_empty() {
            calibration = Some(Calibration::collect(&model, &data, &requirements, options)?);
        }
        Ok(())
    })?;
    let task = Task {
        model: &model,
        calibration: calibration.as_ref(),
        data: Some(&data),
        settings: Some(&settings),
    };
    let mut compressed = None;
    let cut = seconds(|| {
        compressed = Some(method.cut(&task, &Budget::Keep(KEPT))?.1);
        Ok(())
    })?;
    let peak = super::peak_memory();
    let speeds = match &compressed {
        Some(compressed) => Some(speeds([&model, &compressed.model], arguments)?),
        None => None,
    };
    let parameters =
        |model: &Model| -> usize { model.parameters().values().map(Tensor::elem_count).sum() };
    let kept = compressed
        .as_ref()
        .map(|after| parameters(&after.model) as f64 / parameters(&model) as f64);
    if global.json {
        return output::print_json(&json!({
            "work": "compress",
            "method": name,
            "windows": arguments.batch,
            "length": arguments.length,
            "forward_seconds": forward,
            "calibration_seconds": calibrated,
            "cut_seconds": cut,
            "weights_bytes": weights,
            "peak_bytes": peak,
            "parameters_kept": kept,
            "speeds": speeds.map(|both| both.map(|speed| json!({
                "prefill_tokens_per_second": speed.prefill,
                "decode_tokens_per_second": speed.decode,
            }))),
            "threads": rayon::current_num_threads(),
        }));
    }
    let mut text = format!(
        "{name}, {} windows of {} tokens\n\
         forward passes  {forward:.2} s\n\
         calibration     {calibrated:.2} s, {:.2} of the forward passes\n\
         plan and cut    {cut:.2} s\n",
        arguments.batch,
        arguments.length,
        calibrated / forward,
    );
    if let Some(peak) = peak {
        let over = peak.saturating_sub(weights as u64);
        text.push_str(&format!(
            "peak memory     {}, {} more than the weights\n",
            output::bytes(peak),
            output::bytes(over)
        ));
    }
    if let (Some([before, after]), Some(kept)) = (speeds, kept) {
        text.push_str(&format!(
            "parameters kept {:.1} %\n\
             reading         {:.0} tokens/s, {:.0} after, {:.2} times\n\
             writing         {:.1} tokens/s, {:.1} after, {:.2} times\n",
            100.0 * kept,
            before.prefill,
            after.prefill,
            after.prefill / before.prefill,
            before.decode,
            after.decode,
            after.decode / before.decode,
        ));
    }
    output::print(&text)
}

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

fn pass(model: &Model, rows: &[Vec<u32>]) -> Result<()> {
    let length = rows.first().map_or(0, Vec::len);
    let ids = Tensor::from_vec(rows.concat(), (rows.len(), length), &model.device())?;
    model.forward(&Input::tokens(ids), Pass::default())?;
    Ok(())
}

/// Tokens a second, one sequence at a time.
struct Speed {
    prefill: f64,
    decode: f64,
}

/// Of both models in turns, so that a machine whose speed drifts treats them alike.
fn speeds(models: [&Model; 2], arguments: &Bench) -> Result<[Speed; 2]> {
    let read = |model: &Model| -> Result<f64> {
        let input = Input::tokens(super::ids(model, 1, arguments.length)?);
        seconds(|| {
            model.forward(&input, Pass::default())?;
            Ok(())
        })
    };
    let write = |model: &Model| -> Result<f64> {
        let one = seconds(|| super::written(model, 8, 1))?;
        let many = seconds(|| super::written(model, 8, 33))?;
        Ok((many - one).max(f64::EPSILON) / 32.0)
    };
    for model in models {
        read(model)?;
    }
    let (mut reads, mut writes): ([Vec<f64>; 2], [Vec<f64>; 2]) = Default::default();
    for _ in 0..arguments.repeat {
        for ((model, reads), writes) in models.into_iter().zip(&mut reads).zip(&mut writes) {
            reads.push(read(model)?);
            writes.push(write(model)?);
        }
    }
    let [before, after] = reads;
    let [first, second] = writes;
    let speed = |reads: Vec<f64>, writes: Vec<f64>| Speed {
        prefill: arguments.length as f64 / super::median(reads),
        decode: 1.0 / super::median(writes),
    };
    Ok([speed(before, first), speed(after, second)])
}
