//! The config of a family for a model of fewer blocks than the one it was read with.

use std::collections::BTreeMap;
use std::path::Path;

use super::config::{CONFIG_FILE, Config, Family};
use super::families::{NameTable, towers};
use crate::{Limits, Model, Result};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::MixerSpec;
use serde_json::Value;

/// A config that describes `model`, which has fewer blocks than `config` says, and the tensors
/// under the names of its family; nothing when no such config exists. `table` is that of the
/// whole model, whose names for a block depend on nothing but its index.
#[allow(clippy::type_complexity, reason = "a config beside its tensors")]
pub(crate) fn shortened(
    config: &Config,
    table: &NameTable,
    model: &Model,
) -> Result<Option<(Config, Vec<(String, Tensor)>)>> {
    let blocks = model.spec().expanded_blocks();
    let table = table.of_blocks(blocks.len());
    let mut named: Vec<&String> = table
        .tensors()
        .iter()
        .flat_map(|stored| &stored.parameters)
        .collect();
    named.sort();
    named.dedup();
    if !named.into_iter().eq(model.parameters().keys()) {
        return Ok(None);
    }
    let Some(config) = described(config, model) else {
        return Ok(None);
    };
    let tensors = table.write(model.parameters())?;
    let shapes: BTreeMap<String, Vec<usize>> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
        .collect();
    // What the new config means is what is read back from it.
    let Ok(read) = towers(&config, &shapes) else {
        return Ok(None);
    };
    let [tower] = read.as_slice() else {
        return Ok(None);
    };
    let same = tower.table.tensors() == table.tensors()
        && written_out(&tower.spec) == written_out(model.spec());
    Ok(same.then_some((config, tensors)))
}

fn written_out(spec: &crate::ModelSpec) -> crate::ModelSpec {
    crate::ModelSpec {
        blocks: spec.expanded_blocks(),
        ..spec.clone()
    }
}

/// The config with as many layers as the model has, where its fields can be had.
fn described(config: &Config, model: &Model) -> Option<Config> {
    let blocks = model.spec().expanded_blocks();
    let mut fields = config.fields().clone();
    let count = match config.family {
        // The other name is an alias that yields to it.
        Family::Gpt2(_) => "n_layer",
        Family::Clip(_) => return None,
        _ => "num_hidden_layers",
    };
    fields.remove("num_hidden_layers");
    fields.insert(count.to_owned(), Value::from(blocks.len()));
    if fields.get("layer_types").is_some_and(Value::is_array) {
        let windowed = |mixer: &MixerSpec| match mixer {
            MixerSpec::MultiHead(attention) => attention.window.is_some(),
            MixerSpec::Mamba(_) | MixerSpec::Absent => false,
        };
        let types = blocks.iter().map(|block| match windowed(&block.attention) {
            true => "sliding_attention",
            false => "full_attention",
        });
        fields.insert("layer_types".to_owned(), types.collect());
    }
    Config::from_fields(Path::new(CONFIG_FILE), fields, &Limits::default()).ok()
}
