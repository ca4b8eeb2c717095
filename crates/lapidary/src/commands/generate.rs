//! `lapidary generate`: continue a text.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;

use crate::cli::{Generate, Global};
use crate::{loading, output};
use anyhow::Result;
use lapidary_model::generation::{
    GenerationOptions, SamplingOptions, StopStrings, TextStream, generate,
};
use serde_json::json;

pub fn run(arguments: &Generate, global: &Global) -> Result<()> {
    let package = loading::package(&arguments.model, global)?;
    let model = package.text_model()?;
    let tokenizer = package.tokenizer()?;
    let mut prompts = Vec::new();
    for prompt in &arguments.prompt {
        prompts.push(loading::encode(&package, model, prompt)?.ids);
    }
    let options = GenerationOptions {
        new_tokens: arguments.tokens,
        sampling: SamplingOptions {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            repetition_penalty: arguments.repetition_penalty,
            seed: global.seed,
        },
        stop_ids: Vec::new(),
        cache: !arguments.no_cache,
    };
    let mut streams = Vec::new();
    for prompt in &prompts {
        let stops = StopStrings::new(arguments.stop.clone())?;
        streams.push((
            TextStream::new(tokenizer, prompt, true)?,
            stops,
            String::new(),
        ));
    }
    // A single prompt on a terminal is shown as it grows.
    let live = prompts.len() == 1 && !global.json && std::io::stdout().is_terminal();
    if live {
        output::print(&arguments.prompt.concat())?;
    }
    let mut failure = None;
    let started = std::time::Instant::now();
    let continued = generate(model, &prompts, &options, |sequence, id| {
        let Some((stream, stops, text)) = streams.get_mut(sequence) else {
            return ControlFlow::Break(());
        };
        match stream.push(id) {
            Ok(fresh) => {
                let fresh = stops.push(&fresh);
                if live {
                    let mut out = std::io::stdout().lock();
                    failure = out
                        .write_all(fresh.as_bytes())
                        .and_then(|()| out.flush())
                        .err();
                }
                text.push_str(&fresh);
                match stops.is_stopped() || failure.is_some() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            }
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if let Some(error) = failure {
        return Err(error.into());
    }
    let mut results = Vec::new();
    for (((stream, stops, mut text), prompt), ids) in
        streams.into_iter().zip(&arguments.prompt).zip(&continued)
    {
        let mut rest = stream;
        let mut stops = stops;
        let end = rest.finish()?;
        let mut tail = stops.push(&end);
        tail += &stops.finish();
        text += &tail;
        if live {
            output::print(&format!("{tail}\n"))?;
        } else if !global.json {
            output::print(&format!("{prompt}{text}\n"))?;
        }
        results.push(
            json!({ "prompt": prompt, "text": text, "tokens": ids, "stopped": stops.is_stopped() }),
        );
    }
    let tokens: usize = continued.iter().map(Vec::len).sum();
    if global.json {
        return output::print_json(&json!({
            "sequences": results,
            "tokens_per_second": tokens as f64 / seconds,
            "seed": global.seed,
        }));
    }
    eprintln!(
        "{tokens} tokens in {seconds:.2} s ({:.1} tokens/s)",
        tokens as f64 / seconds
    );
    Ok(())
}
