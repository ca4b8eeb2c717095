//! The config of a family for a model of another shape than the one it was read with: fewer blocks,
//! a narrower stream, narrower parts.

use std::path::Path;

use super::config::{CONFIG_FILE, Config, Family, LlamaKind};
use super::families::{NameTable, towers};
use crate::spec::{HeadSpec, InputSpec, ModelSpec};
use crate::{Limits, Model, Result};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::norm::NormSpec;
use serde_json::{Map, Value};

/// A config that describes `model`, which is of another shape than `config` says, and the tensors
/// under the names of its family; nothing when no such config exists. `original` is what `config`
/// describes, and `table` where that is stored.
#[allow(clippy::type_complexity, reason = "a config beside its tensors")]
pub(crate) fn reshaped(
    config: &Config,
    original: &ModelSpec,
    table: &NameTable,
    model: &Model,
) -> Result<Option<(Config, Vec<(String, Tensor)>)>> {
    let Some(config) = described(config, original, model.spec()) else {
        return Ok(None);
    };
    // Which optional heads there are, and how many classes a classifier has.
    let stored = table.tensors().iter().filter_map(|stored| {
        let held = stored.parameters.first()?;
        let shape = model.parameters().get(held)?.dims().to_vec();
        Some((stored.key.clone(), shape))
    });
    // What the new config means is what is read back from it.
    let Ok(read) = towers(&config, &stored.collect()) else {
        return Ok(None);
    };
    let [tower] = read.as_slice() else {
        return Ok(None);
    };
    let named = tower.table.tensors().iter();
    let mut named: Vec<&String> = named.flat_map(|stored| &stored.parameters).collect();
    named.sort();
    named.dedup();
    if !named.into_iter().eq(model.parameters().keys())
        || resolved(&tower.spec) != resolved(model.spec())
    {
        return Ok(None);
    }
    let tensors = tower.table.write(model.parameters())?;
    Ok(Some((config, tensors)))
}

/// The spec with its blocks written out one by one and everything that has a default given.
fn resolved(spec: &ModelSpec) -> ModelSpec {
    let width = spec.width;
    let mut blocks = spec.expanded_blocks();
    for block in &mut blocks {
        match &mut block.attention {
            MixerSpec::MultiHead(attention) => {
                attention.scale = Some(attention.scale(width));
                attention.value_width = Some(attention.value_width(width));
                attention.head_width = Some(attention.head_width(width));
                attention.groups = Some(attention.groups());
                attention.output_bias = Some(attention.output_bias.unwrap_or(attention.bias));
            }
            MixerSpec::Mamba(mamba) => {
                mamba.inner = Some(mamba.inner(width));
                mamba.step_rank = Some(mamba.step_rank(width));
            }
            MixerSpec::Mamba2(mamba) => mamba.inner = Some(mamba.inner(width)),
            MixerSpec::Wavelet(_) | MixerSpec::Absent => {}
        }
    }
    ModelSpec {
        blocks,
        // The parameters are there.
        initial: Default::default(),
        ..spec.clone()
    }
}

/// The config with the fields changed in which the two specs differ.
fn described(config: &Config, original: &ModelSpec, spec: &ModelSpec) -> Option<Config> {
    let mut fields = config.fields().clone();
    let before = said(&config.family, original)?;
    let after = said(&config.family, spec)?;
    let names = |said: &[(&'static str, Value)]| said.iter().map(|(name, _)| *name).collect();
    let (asked, answered): (Vec<_>, Vec<_>) = (names(&before), names(&after));
    if asked != answered {
        return None;
    }
    for ((name, old), (_, new)) in before.into_iter().zip(after) {
        if new.is_null() {
            fields.remove(name);
        } else if new != old {
            if let Some(alias) = alias(&config.family, name) {
                fields.remove(alias);
            }
            fields.insert(name.to_owned(), new);
        }
    }
    rotation(&mut fields, original, spec);
    windows(&mut fields, spec);
    // As a reader will find it, digits and all.
    let text = Value::Object(fields).to_string();
    Config::parse(Path::new(CONFIG_FILE), &text, &Limits::default()).ok()
}

/// What a family's config says of a spec whose blocks are as wide as its first: always the same
/// fields, null where the reader's default is meant.
fn said(family: &Family, spec: &ModelSpec) -> Option<Vec<(&'static str, Value)>> {
    let width = spec.width;
    let first = spec.blocks.first()?;
    let unless = |usual: bool, value: usize| match usual {
        true => Value::Null,
        false => Value::from(value),
    };
    let [layers, wide, heads, inner, epsilon] = match family {
        Family::Gpt2(_) => [
            "n_layer",
            "n_embd",
            "n_head",
            "n_inner",
            "layer_norm_epsilon",
        ],
        Family::Opt(_) => [
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_dim",
            "",
        ],
        Family::Llama(_) => [
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "rms_norm_eps",
        ],
        Family::Mamba(_) | Family::Mamba2(_) => [
            "num_hidden_layers",
            "hidden_size",
            "",
            "",
            "layer_norm_epsilon",
        ],
        Family::Albert(_) | Family::Bert(_) | Family::Vit(_) => [
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "layer_norm_eps",
        ],
        Family::Clip(_) => return None,
    };
    let mut said = vec![
        (layers, Value::from(spec.expanded_blocks().len())),
        (wide, Value::from(width)),
    ];
    match &first.attention {
        MixerSpec::MultiHead(attention) => {
            said.push((heads, Value::from(attention.heads)));
            if let Family::Llama(config) = family {
                let head_width = attention.head_width(width);
                let usual = head_width * attention.heads == width;
                // OLMoE's norms of all heads together are as wide as its stream.
                if config.kind == LlamaKind::Olmoe && !usual {
                    return None;
                }
                said.push(("num_key_value_heads", Value::from(attention.groups())));
                said.push(("head_dim", unless(usual, head_width)));
            }
        }
        MixerSpec::Mamba(mamba) => {
            let rank = mamba.step_rank(width);
            said.push(("expand", Value::from(expansion(mamba.inner(width), width)?)));
            said.push(("time_step_rank", unless(rank == width.div_ceil(16), rank)));
        }
        MixerSpec::Mamba2(mamba) => {
            said.push(("expand", Value::from(expansion(mamba.inner(width), width)?)));
            said.push(("num_heads", Value::from(mamba.heads(width))));
            said.push(("head_dim", Value::from(mamba.head_width)));
        }
        MixerSpec::Wavelet(_) | MixerSpec::Absent => return None,
    }
    if let Some(feedforward) = &first.feedforward {
        let hidden = feedforward.hidden();
        let usual = matches!(family, Family::Gpt2(_)) && hidden == 4 * width;
        said.push((inner, unless(usual, hidden)));
    }
    match first.norm {
        NormSpec::Layer { epsilon: value } | NormSpec::Rms { epsilon: value }
            if !epsilon.is_empty() =>
        {
            said.push((epsilon, Value::from(value)));
        }
        _ => {}
    }
    if let (Family::Opt(_), InputSpec::Tokens(tokens)) = (family, &spec.input) {
        let table = tokens.embedding_width.unwrap_or(width);
        said.push(("word_embed_proj_dim", Value::from(table)));
    }
    if let HeadSpec::LanguageModel { tied, .. } = spec.head {
        said.push(("tie_word_embeddings", Value::from(tied)));
    }
    Some(said)
}

/// How many times as wide as the stream a recurrence is: `transformers` takes a whole number.
fn expansion(inner: usize, width: usize) -> Option<usize> {
    let times = inner.checked_div(width)?;
    (times * width == inner).then_some(times)
}

/// The other name of a field, which yields to it.
fn alias(family: &Family, field: &str) -> Option<&'static str> {
    match (family, field) {
        (Family::Gpt2(_), "n_layer") => Some("num_hidden_layers"),
        (Family::Gpt2(_), "n_embd") => Some("hidden_size"),
        (Family::Gpt2(_), "n_head") => Some("num_attention_heads"),
        _ => None,
    }
}

/// The base of the rotation, where a reader looks for it: in the object that says how frequencies are
/// stretched, if it is in there, else beside it.
fn rotation(fields: &mut Map<String, Value>, before: &ModelSpec, after: &ModelSpec) {
    let base = |spec: &ModelSpec| match &spec.blocks.first()?.attention {
        MixerSpec::MultiHead(attention) => Some(attention.position.rotary()?.theta),
        MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) | MixerSpec::Wavelet(_) | MixerSpec::Absent => {
            None
        }
    };
    let Some(theta) = base(after).filter(|_| base(before) != base(after)) else {
        return;
    };
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(Value::Object(inside)) = fields.get_mut(name) else {
            continue;
        };
        if inside.contains_key("rope_theta") {
            inside.insert("rope_theta".to_owned(), Value::from(theta));
            return;
        }
        // The first that says anything is the one that is read.
        if !inside.is_empty() {
            break;
        }
    }
    fields.insert("rope_theta".to_owned(), Value::from(theta));
}

/// One type for each layer, where the config lists them.
fn windows(fields: &mut Map<String, Value>, spec: &ModelSpec) {
    if !fields.get("layer_types").is_some_and(Value::is_array) {
        return;
    }
    let windowed = |mixer: &MixerSpec| match mixer {
        MixerSpec::MultiHead(attention) => attention.window.is_some(),
        MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) | MixerSpec::Wavelet(_) | MixerSpec::Absent => {
            false
        }
    };
    let blocks = spec.expanded_blocks();
    let types = blocks.iter().map(|block| match windowed(&block.attention) {
        true => "sliding_attention",
        false => "full_attention",
    });
    fields.insert("layer_types".to_owned(), types.collect());
}
