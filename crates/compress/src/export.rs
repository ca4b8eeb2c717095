//! Other forms of a factorised model.

use std::collections::BTreeMap;

use lapidary_kernels::Tensor;
use lapidary_model::{HeadSpec, InputSpec, Model, ModelSpec, Projected};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, OutputProjection, QueryKeySharing};
use lapidary_parts::block::BlockSpec;
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::recurrent::{Mamba2Spec, MambaSpec};

use crate::error::engine;
use crate::factorisation::merged;
use crate::{Error, Result};

/// The model with every quantised matrix as numbers and every factorised layer multiplied out (in
/// `f64`, rounded once): equal outputs but for rounding, and nothing saved, for programs that know
/// dense layers only.
///
/// A table of embeddings that is narrower than the model and read by no language-model head is
/// multiplied with the map that follows it. Attention that was left out comes back with an output
/// projection of zero (or, where it has none of its own, values of zero), where another block shows
/// what attention is like here; a recurrence without its scan comes back with one that passes its
/// input on.
pub fn export_dense(model: &Model) -> Result<Model> {
    if !model.spec().quantised.is_empty() {
        return export_dense(&model.dequantised()?);
    }
    let mut spec = ModelSpec {
        blocks: model.spec().expanded_blocks(),
        ..model.spec().clone()
    };
    let mut parameters: BTreeMap<String, Tensor> = model
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.detach()))
        .collect();
    for path in std::mem::take(&mut spec.low_rank).into_keys() {
        let down = take(&mut parameters, &format!("{path}.down"))?;
        let up = take(&mut parameters, &format!("{path}.up"))?;
        let weight = merged(&up, &down, up.dtype())?;
        parameters.insert(format!("{path}.weight"), weight);
    }
    restore_attention(&mut spec, &mut parameters)?;
    restore_scans(&mut spec, &mut parameters)?;
    if spec.blocks == model.spec().expanded_blocks() {
        // Repetitions stay as they were written.
        spec.blocks.clone_from(&model.spec().blocks);
    }
    let language_model = matches!(spec.head, HeadSpec::LanguageModel { .. });
    if let InputSpec::Tokens(tokens) = &mut spec.input
        && tokens
            .embedding_width
            .is_some_and(|width| width < spec.width)
        && tokens.projected == Projected::Token
        && !language_model
    {
        tokens.embedding_width = None;
        let table = take(&mut parameters, "embeddings.tokens.weight")?;
        let projection = take(&mut parameters, "embeddings.projection.weight")?;
        let whole = merged(&table, &engine(projection.t())?, table.dtype())?;
        parameters.insert("embeddings.tokens.weight".to_owned(), whole);
    }
    Ok(Model::new(spec, &mut parameters)?)
}

/// Gives blocks without a mixer the attention of the nearest earlier block that has one, or the
/// first later one, with what silences it zero: the residual passes as before.
fn restore_attention(
    spec: &mut ModelSpec,
    parameters: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let whole = spec.blocks.clone();
    let whole: Vec<(usize, &BlockSpec, &str)> = whole
        .iter()
        .enumerate()
        .filter_map(|(index, block)| Some((index, block, silencing(&block.attention)?)))
        .collect();
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        if block.attention != MixerSpec::Absent {
            continue;
        }
        // A linear map stands for a whole block, which no attention beside it makes one again.
        if matches!(block.feedforward, Some(FeedforwardSpec::Linear(_))) {
            continue;
        }
        let alike = |(_, other, _): &&(usize, &BlockSpec, &str)| {
            other.norm == block.norm && other.layer_scale == block.layer_scale
        };
        let before = whole.iter().rev().filter(|(from, _, _)| *from < index);
        let template = before.chain(whole.iter()).find(alike);
        let Some((from, other, silencing)) = template else {
            continue;
        };
        block.attention = other.attention.clone();
        let mut copies = Vec::new();
        for (name, tensor) in parameters.iter() {
            for part in ["attention.", "attention_norm.", "attention_scale."] {
                let Some(rest) = name.strip_prefix(&format!("blocks.{from}.{part}")) else {
                    continue;
                };
                let tensor = match part == "attention." && rest.starts_with(silencing) {
                    true => engine(tensor.zeros_like())?,
                    false => tensor.clone(),
                };
                copies.push((format!("blocks.{index}.{part}{rest}"), tensor));
            }
        }
        parameters.extend(copies);
    }
    Ok(())
}

/// What the names of those parameters of attention begin with that silence it as zeros: those of its output, or
/// where it has none of its own those of its values. None of what is no such attention, nor of mechanisms for which
/// queries of zero may be none.
fn silencing(mixer: &MixerSpec) -> Option<&'static str> {
    let MixerSpec::MultiHead(MultiHeadSpec {
        output,
        sharing,
        mechanism,
        ..
    }) = mixer
    else {
        return None;
    };
    match (output, sharing) {
        (OutputProjection::Own, _) => Some("output."),
        (_, QueryKeySharing::All) => mechanism.is_softmax().then_some("query."),
        (_, QueryKeySharing::None | QueryKeySharing::QueryKey) => Some("value."),
    }
}

/// Gives recurrences without a scan one of no entry, no exit and a skip of 1: `y = 0 + 1 ⊙ u`.
fn restore_scans(spec: &mut ModelSpec, parameters: &mut BTreeMap<String, Tensor>) -> Result<()> {
    let width = spec.width;
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let path = format!("blocks.{index}.attention");
        match &mut block.attention {
            MixerSpec::Mamba(mamba) if !mamba.scan => {
                mamba.scan = true;
                restore_selection(mamba, width, &path, parameters)?;
            }
            MixerSpec::Mamba2(mamba) if !mamba.scan => {
                mamba.scan = true;
                restore_steps(mamba, width, &path, parameters)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Puts a Mamba mixer's selection of nothing under `path`.
fn restore_selection(
    mamba: &MambaSpec,
    width: usize,
    path: &str,
    parameters: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let (inner, state) = (mamba.inner(width), mamba.state);
    let rank = mamba.step_rank(width);
    let like = parameters.get(&format!("{path}.convolution.weight"));
    let Some((dtype, device)) = like.map(|like| (like.dtype(), like.device().clone())) else {
        return Ok(());
    };
    let zeros = |shape: &[usize]| engine(Tensor::zeros(shape, dtype, &device));
    for (name, tensor) in [
        ("selection.weight", zeros(&[rank + 2 * state, inner])?),
        ("step.weight", zeros(&[inner, rank])?),
        ("step.bias", zeros(&[inner])?),
        ("decay_log", zeros(&[inner, state])?),
        ("skip", engine(Tensor::ones(inner, dtype, &device))?),
    ] {
        parameters.insert(format!("{path}.{name}"), tensor);
    }
    Ok(())
}

/// Puts a Mamba-2 mixer's rows of zeros behind those that are left under `path`, and steps that enter
/// nothing.
fn restore_steps(
    mamba: &Mamba2Spec,
    width: usize,
    path: &str,
    parameters: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    for (name, rows) in [
        ("input.weight", mamba.projected(width)),
        ("input.bias", mamba.projected(width)),
        ("convolution.weight", mamba.convolved(width)),
        ("convolution.bias", mamba.convolved(width)),
    ] {
        if let Some(tensor) = parameters.get_mut(&format!("{path}.{name}")) {
            let missing = rows.saturating_sub(engine(tensor.dim(0))?);
            *tensor = engine(tensor.pad_with_zeros(0, 0, missing))?;
        }
    }
    let like = parameters.get(&format!("{path}.convolution.weight"));
    let Some((dtype, device)) = like.map(|like| (like.dtype(), like.device().clone())) else {
        return Ok(());
    };
    let heads = mamba.heads(width);
    for name in ["step_bias", "decay_log"] {
        let zeros = engine(Tensor::zeros(heads, dtype, &device))?;
        parameters.insert(format!("{path}.{name}"), zeros);
    }
    let ones = engine(Tensor::ones(heads, dtype, &device))?;
    parameters.insert(format!("{path}.skip"), ones);
    Ok(())
}

/// Every parameter, each factorised layer as two linear layers one after the other:
/// `{path}.lin0.weight` `[rank, input]`, then `{path}.lin1.weight` `[output, rank]` with
/// `{path}.lin1.bias`.
pub fn two_layer_parameters(model: &Model) -> Result<BTreeMap<String, Tensor>> {
    let mut parameters = model.parameters().clone();
    for path in model.spec().low_rank.keys() {
        let down = take(&mut parameters, &format!("{path}.down"))?;
        let up = take(&mut parameters, &format!("{path}.up"))?;
        parameters.insert(format!("{path}.lin0.weight"), down);
        parameters.insert(format!("{path}.lin1.weight"), up);
        if let Some(bias) = parameters.remove(&format!("{path}.bias")) {
            parameters.insert(format!("{path}.lin1.bias"), bias);
        }
    }
    Ok(parameters)
}

fn take(parameters: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    parameters.remove(name).ok_or_else(|| {
        Error::Model(lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason: "is missing".to_owned(),
        })
    })
}
