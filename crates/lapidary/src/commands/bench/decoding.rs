//! `lapidary bench decoding`: what the next token costs after ten, a hundred, a thousand tokens.

use std::time::Instant;

use anyhow::{Result, ensure};
use comfy_table::{Table, presets};
use lapidary_kernels::{DType, Tensor};
use lapidary_lab::mechanisms::{Mechanism, mechanisms};
use lapidary_model::{AbsolutePosition, HeadSpec, Input, InputSpec, Model, ModelSpec, Pass};
use serde::Serialize;
use serde_json::json;

use crate::cli::{Bench, Global};
use crate::{loading, output};

/// One mechanism after so many tokens.
#[derive(Serialize)]
struct Row {
    mechanism: &'static str,
    tokens: usize,
    /// Median seconds of one more; none where the mechanism refuses.
    seconds: Option<f64>,
    /// Why it does.
    refused: Option<String>,
}

/// One block of attention alone, for every causal mechanism, after 10, 100, … tokens up to `--length`.
pub(super) fn run(arguments: &Bench, global: &Global) -> Result<()> {
    ensure!(
        arguments.length >= 10,
        "length is {}, but must be at least 10",
        arguments.length
    );
    let causal = mechanisms().iter().filter(|one| one.causal);
    let names: Vec<&str> = causal.clone().map(|one| one.name).collect();
    let wanted = arguments.method.as_deref();
    let chosen: Vec<&Mechanism> = causal
        .filter(|one| wanted.is_none_or(|name| one.name.starts_with(name)))
        .collect();
    ensure!(
        !chosen.is_empty(),
        "method is {:?}, but must be the beginning of one of {}",
        wanted.unwrap_or_default(),
        names.join("; ")
    );
    let mut rows = Vec::new();
    for candidate in chosen {
        let model = alone(candidate, arguments, global)?;
        let mut tokens = 10;
        while tokens <= arguments.length {
            // Some keep no memory of fixed form unless they are told more than is compared here.
            let found = next_token(&model, tokens, arguments.repeat);
            let refused = found.as_ref().err().map(|error| format!("{error:#}"));
            let ends = refused.is_some();
            rows.push(Row {
                mechanism: candidate.name,
                tokens,
                seconds: found.ok(),
                refused,
            });
            if ends {
                break;
            }
            tokens *= 10;
        }
        tracing::info!("{}", candidate.name);
    }
    if global.json {
        return output::print_json(&json!({
            "work": "decoding",
            "rows": rows,
            "threads": rayon::current_num_threads(),
        }));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["mechanism", "tokens before", "the next one"]);
    for row in &rows {
        table.add_row([
            row.mechanism.to_owned(),
            row.tokens.to_string(),
            match (row.seconds, &row.refused) {
                (Some(seconds), _) => format!("{:.1} µs", seconds * 1e6),
                (None, why) => why.clone().unwrap_or_default(),
            },
        ]);
    }
    output::print(&format!("{table}\n"))
}

/// A model of one block that only attends.
fn alone(candidate: &Mechanism, arguments: &Bench, global: &Global) -> Result<Model> {
    let mut spec: ModelSpec = super::spec(arguments);
    let longest = arguments.length + arguments.repeat + 1;
    spec.final_norm = None;
    spec.head = HeadSpec::None;
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        tokens.length = longest;
        tokens.position = AbsolutePosition::None;
    }
    for block in &mut spec.blocks {
        block.repeat = 1;
        block.feedforward = None;
        block.attention = candidate.mixer(arguments.heads, longest);
    }
    let device = loading::device(global)?;
    Ok(Model::initialised(spec, global.seed, DType::F32, &device)?)
}

/// Median seconds of a token after `before` others and one more that is not counted.
fn next_token(model: &Model, before: usize, repeat: usize) -> Result<f64> {
    let mut state = model.decode_state();
    let mut read = |ids: Tensor| -> Result<()> {
        let pass = Pass {
            state: Some(&mut state),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids), pass)?;
        Ok(())
    };
    read(super::ids(model, 1, before)?)?;
    let one = super::ids(model, 1, 1)?;
    read(one.clone())?;
    let each: Result<Vec<f64>> = (0..repeat)
        .map(|_| {
            let started = Instant::now();
            read(one.clone())?;
            Ok(started.elapsed().as_secs_f64())
        })
        .collect();
    Ok(super::median(each?))
}
