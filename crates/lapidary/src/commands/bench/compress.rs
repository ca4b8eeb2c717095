//! `lapidary bench compress`: what finding out, and cutting, costs beside the forward passes, and
//! what it brings.

use std::time::Instant;

use anyhow::{Result, ensure};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Method, Settings, Size, Task,
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
    let kept = compressed.as_ref().map(|compressed| {
        let [before, after] = [Size::of(&model), Size::of(&compressed.model)];
        let share = |after: usize, before: usize| after as f64 / before.max(1) as f64;
        [
            share(after.parameters, before.parameters),
            share(after.bytes, before.bytes),
        ]
    });
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
            "parameters_kept": kept.map(|[parameters, _]| parameters),
            "bytes_kept": kept.map(|[_, bytes]| bytes),
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
    if let (Some([before, after]), Some([parameters, bytes])) = (speeds, kept) {
        text.push_str(&format!(
            "parameters kept {:.1} %, {:.1} % of the bytes\n\
             reading         {:.0} tokens/s, {:.0} after, {:.2} times\n",
            100.0 * parameters,
            100.0 * bytes,
            before.prefill,
            after.prefill,
            after.prefill / before.prefill,
        ));
        text.push_str(&match before.decode.zip(after.decode) {
            Some((before, after)) => format!(
                "writing         {before:.1} tokens/s, {after:.1} after, {:.2} times\n",
                after / before
            ),
            None => "writing         too short to be told from noise; give more --repeat, or a larger model\n"
                .to_owned(),
        });
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
    /// None where one token takes no more time than many do, since the machine was busy.
    decode: Option<f64>,
}

/// Tokens of the prompt that is written behind, and of the longest text behind it.
const WRITING: [usize; 2] = [8, 33];

/// Of both models in turns, so that a machine whose speed drifts treats them alike.
fn speeds(models: [&Model; 2], arguments: &Bench) -> Result<[Speed; 2]> {
    let read = |model: &Model| -> Result<f64> {
        let input = Input::tokens(super::ids(model, 1, arguments.length)?);
        seconds(|| {
            model.forward(&input, Pass::default())?;
            Ok(())
        })
    };
    let [prompt, most] = WRITING;
    // No text is longer than either model has room for.
    let room = models.map(|model| model.spec().length().saturating_sub(prompt));
    let count = room.into_iter().fold(most, usize::min);
    let write = |model: &Model| -> Result<f64> {
        if count < 2 {
            return Ok(0.0);
        }
        let one = seconds(|| super::written(model, prompt, 1))?;
        let many = seconds(|| super::written(model, prompt, count))?;
        Ok((many - one) / (count - 1) as f64)
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
        decode: Some(1.0 / super::median(writes)).filter(|speed| speed.is_finite() && *speed > 0.0),
    };
    Ok([speed(before, first), speed(after, second)])
}
