//! `lapidary train`: from a spec to a model.

use crate::cli::{Global, Train};
use crate::{loading, output};
use anyhow::{Context, Result, bail};
use lapidary_train::TrainSpec;
use lapidary_train::spec::DataSpec;
use serde_json::json;

const SPEC_BYTES: u64 = 16 << 20;

pub fn run(arguments: &Train, global: &Global) -> Result<()> {
    let text = lapidary_model::files::read_text(&arguments.spec, SPEC_BYTES)?;
    let mut spec: TrainSpec = toml::from_str(&text)
        .map_err(|error| anyhow::anyhow!("{}: {}", arguments.spec.display(), error.message()))
        .with_context(|| "the training spec cannot be read")?;
    if let Some(data) = &arguments.data {
        match &mut spec.data {
            DataSpec::Text { file, .. } => *file = Some(data.clone()),
            _ => bail!("--data is for specs whose data.kind is text"),
        }
    }
    if let Some(steps) = arguments.steps {
        spec.steps = steps as u64;
    }
    if global.seed != 0 {
        spec.seed = global.seed;
    }
    let device = loading::device(global)?;
    let finished = lapidary_train::run(&spec, &arguments.out, arguments.resume, &device)?;
    if global.json {
        return output::print_json(&json!({
            "steps": finished.steps,
            "loss": finished.loss,
            "validation_loss": finished.validation_loss,
            "validation_perplexity": finished.validation_loss.exp(),
            "tokens_per_second": finished.tokens_per_second,
            "model": finished.model,
            "seed": spec.seed,
        }));
    }
    output::print(&format!(
        "{} steps, validation loss {:.4} (perplexity {:.3}), {:.0} tokens/s; the model is in {}\n",
        finished.steps,
        finished.validation_loss,
        finished.validation_loss.exp(),
        finished.tokens_per_second,
        finished.model.display()
    ))
}
