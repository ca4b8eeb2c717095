//! `lapidary bench mixers`: from which length on a mechanism of attention is faster than softmax.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{Table, presets};
use lapidary_kernels::{AttentionOptions, DType, Device, Tensor, Var, attention};
use lapidary_lab::mechanisms::{
    Mechanism as Candidate, attention_in_bands, mechanisms, mixing_alone,
};
use lapidary_model::Initialiser;
use lapidary_parts::attention::mechanism::{Heads, Mechanism};
use lapidary_parts::parameters::Parameters;
use serde::Serialize;
use serde_json::json;

use crate::cli::{Bench, Global};
use crate::output;

/// Beyond this, what grows with the square of the length is left out.
const QUADRATIC: usize = 16_384;

/// One mechanism at one length.
#[derive(Clone, Serialize)]
struct Row {
    mechanism: &'static str,
    causal: bool,
    length: usize,
    /// Median seconds.
    forward: f64,
    forward_and_backward: f64,
}

/// Queries, keys and values of `--batch` sequences with `--heads` heads of `--width / --heads`
/// features, from `--least` tokens to `--length`.
pub(super) fn run(arguments: &Bench, global: &Global) -> Result<()> {
    ensure!(
        arguments.heads >= 1 && arguments.width.is_multiple_of(arguments.heads),
        "heads is {}, but must divide the width {}",
        arguments.heads,
        arguments.width
    );
    let wanted = arguments.method.as_deref();
    let chosen: Vec<&Candidate> = mechanisms()
        .iter()
        .filter(|one| wanted.is_none_or(|name| one.name.starts_with(name)))
        .collect();
    let names: Vec<&str> = mechanisms().iter().map(|one| one.name).collect();
    ensure!(
        !chosen.is_empty(),
        "method is {:?}, but must be the beginning of one of {}",
        wanted.unwrap_or_default(),
        names.join("; ")
    );
    let mut rows = Vec::new();
    let mut length = arguments.least.clamp(1, arguments.length.max(1));
    while length <= arguments.length {
        for candidate in &chosen {
            if !candidate.quadratic || length <= QUADRATIC {
                rows.push(measured(arguments, global, candidate, length)?);
                tracing::info!("{} at {length}", candidate.name);
            }
        }
        length *= 2;
    }
    let peak = super::peak_memory();
    if global.json {
        return output::print_json(&json!({
            "work": "mixers",
            "rows": rows,
            "peak_bytes": peak,
            "threads": rayon::current_num_threads(),
        }));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "tokens",
        "mechanism",
        "forward",
        "and backward",
        "of softmax",
    ]);
    for row in &rows {
        let dense = rows.iter().find(|other| {
            let softmax = match row.causal {
                true => "softmax, causal",
                false => "softmax",
            };
            other.mechanism == softmax && other.length == row.length
        });
        let ratio = dense.map_or(String::new(), |dense| {
            format!("{:.2}", row.forward / dense.forward)
        });
        table.add_row([
            row.length.to_string(),
            row.mechanism.to_owned(),
            format!("{:.2} ms", row.forward * 1e3),
            format!("{:.2} ms", row.forward_and_backward * 1e3),
            ratio,
        ]);
    }
    let peak = peak.map_or_else(|| "unknown".to_owned(), output::bytes);
    output::print(&format!("{table}\npeak memory {peak}\n"))
}

fn measured(
    arguments: &Bench,
    global: &Global,
    candidate: &Candidate,
    length: usize,
) -> Result<Row> {
    let head_width = arguments.width / arguments.heads;
    let heads = Heads {
        width: arguments.width,
        heads: arguments.heads,
        head_width,
        causal: candidate.causal,
        scale: 1.0 / (head_width as f64).sqrt(),
        sharing: candidate.sharing,
    };
    let spec = candidate.spec(length);
    let mechanism = match spec.spec() {
        None => None,
        Some(described) => {
            described.validate(&heads, "mechanism")?;
            let mut source = Initialiser::new(global.seed, DType::F32, Device::Cpu);
            let (ranks, mut linears) = (Default::default(), Vec::new());
            let parameters = Parameters::new(&mut source, &ranks, &mut linears);
            Some(described.build(&heads, parameters)?)
        }
    };
    let drawn = |seed: u64| -> Result<Tensor> {
        let shape = (arguments.batch, length, arguments.heads, head_width);
        let mut random = lapidary_train::generator(global.seed ^ seed);
        let count = arguments.batch * length * arguments.width;
        let values: Vec<f32> = (0..count)
            .map(|_| rand::RngExt::random_range(&mut random, -1.0..1.0f32))
            .collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    };
    let tokens = drawn(9)?.reshape((arguments.batch, length, arguments.width))?;
    // As a projection leaves them, heads side by side.
    let split = |x: &Tensor| x.transpose(1, 2);
    let [q, k, v] = [drawn(1)?, drawn(2)?, drawn(3)?];
    let k = match candidate.sharing.is_none() {
        true => k,
        false => q.clone(),
    };
    let pass = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<Tensor> {
        let (q, k, v) = (split(q)?, split(k)?, split(v)?);
        mixed(mechanism.as_deref(), candidate, &tokens, [&q, &k, &v])
    };
    let forward = median(arguments.repeat, || {
        pass(&q, &k, &v)?;
        Ok(())
    })?;
    let [q, k, v] = [&q, &k, &v].map(Var::from_tensor);
    let [q, k, v] = [q?, k?, v?];
    let forward_and_backward = median(arguments.repeat, || {
        let y = pass(q.as_tensor(), k.as_tensor(), v.as_tensor())?;
        // In the order that it lies in: the engine sums a view up more slowly than some mechanisms attend.
        let y = match y.is_contiguous() {
            true => y,
            false => y.transpose(1, 2)?,
        };
        y.sum_all()?.backward()?;
        Ok(())
    })?;
    Ok(Row {
        mechanism: candidate.name,
        causal: candidate.causal,
        length,
        forward,
        forward_and_backward,
    })
}

fn mixed(
    mechanism: Option<&dyn Mechanism>,
    candidate: &Candidate,
    tokens: &Tensor,
    [q, k, v]: [&Tensor; 3],
) -> Result<Tensor> {
    if candidate.wavelets {
        return Ok(attention_in_bands([q, k, v])?);
    }
    let Some(mechanism) = mechanism else {
        let width = q.dims().last().copied().context("queries have no width")?;
        let options = AttentionOptions {
            causal: candidate.causal,
            ..AttentionOptions::new(width)
        };
        return Ok(attention(q, k, v, &options)?);
    };
    Ok(mixing_alone(mechanism, [q, k], tokens, None)?.mix(v)?)
}

/// Median seconds of some calls, after one that is not counted.
fn median(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let each: Result<Vec<f64>> = (0..times)
        .map(|_| {
            let started = Instant::now();
            work()?;
            Ok(started.elapsed().as_secs_f64())
        })
        .collect();
    Ok(super::median(each?))
}
