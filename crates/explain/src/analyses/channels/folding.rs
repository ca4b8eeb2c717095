//! The model whose norms before attention only normalise.

use super::heads::{Heads, dense, is_centred, multi_head};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{Model, ModelSpec};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::norm::NormSpec;
use std::collections::BTreeMap;

/// The same function with `γ` and `β` of the norm before attention moved into the queries, keys
/// and values, which lose what a layer norm hides from them; where every norm is a layer norm,
/// the mean of what heads write is taken out as well. Scores stay what they were.
///
/// # Errors
/// As [`Heads::of`].
pub fn fold_norms(model: &Model) -> Result<Model> {
    Heads::of(model)?;
    let centred = is_centred(model.spec());
    let mut spec = ModelSpec {
        blocks: model.spec().expanded_blocks(),
        ..model.spec().clone()
    };
    let mut parameters = model.parameters().clone();
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let norm = block.norm;
        let MixerSpec::MultiHead(attention) = &mut block.attention else {
            continue;
        };
        let path = |name: &str| format!("blocks.{index}.{name}");
        if matches!(norm, NormSpec::Layer { .. }) && !attention.bias {
            attention.output_bias = Some(attention.output_bias.unwrap_or(attention.bias));
            attention.bias = true;
        }
        for name in ["query", "key", "value"] {
            fold_reader(
                &mut parameters,
                &path("attention_norm"),
                &path(&format!("attention.{name}")),
                norm,
            )?;
        }
        if centred {
            centre_writer(&mut parameters, &path("attention.output"))?;
        }
        let gamma = path("attention_norm.weight");
        let beta = path("attention_norm.bias");
        if let Some(tensor) = parameters.get_mut(&gamma) {
            *tensor = engine(tensor.ones_like())?;
        }
        if let Some(tensor) = parameters.get_mut(&beta) {
            *tensor = engine(tensor.zeros_like())?;
        }
    }
    Ok(Model::new(spec, &mut parameters)?)
}

type Parameters = BTreeMap<String, Tensor>;

fn missing(name: &str) -> Error {
    Error::invalid(name, "no parameter", "a parameter of the model")
}

/// `W ← (W diag γ) C`, `b ← b + W β`, of a layer `[output, input]` or of its first factor.
fn fold_reader(parameters: &mut Parameters, norm: &str, path: &str, kind: NormSpec) -> Result<()> {
    let factor = ["weight", "down"].map(|name| format!("{path}.{name}"));
    let name = factor.iter().find(|name| parameters.contains_key(*name));
    let name = name.ok_or_else(|| missing(path))?;
    let mut weight = parameters.get(name).cloned().ok_or_else(|| missing(name))?;
    if let Some(beta) = parameters.get(&format!("{norm}.bias")) {
        let mut shift = engine(engine(weight.matmul(&engine(beta.unsqueeze(1))?))?.squeeze(1))?;
        if let Some(up) = parameters.get(&format!("{path}.up")) {
            shift = engine(engine(up.matmul(&engine(shift.unsqueeze(1))?))?.squeeze(1))?;
        }
        let bias = format!("{path}.bias");
        let bias_then = match parameters.get(&bias) {
            Some(before) => engine(before + shift)?,
            None => shift,
        };
        parameters.insert(bias, bias_then);
    }
    if let Some(gamma) = parameters.get(&format!("{norm}.weight")) {
        weight = engine(weight.broadcast_mul(gamma))?;
    }
    if matches!(kind, NormSpec::Layer { .. }) {
        weight = engine(weight.broadcast_sub(&engine(weight.mean_keepdim(1))?))?;
    }
    parameters.insert(name.clone(), weight);
    Ok(())
}

/// Takes the mean over outputs out of a layer `[output, input]`, or its second factor, and its
/// bias.
fn centre_writer(parameters: &mut Parameters, path: &str) -> Result<()> {
    for name in ["weight", "up", "bias"].map(|name| format!("{path}.{name}")) {
        if let Some(tensor) = parameters.get_mut(&name) {
            *tensor = engine(tensor.broadcast_sub(&engine(tensor.mean_keepdim(0))?))?;
        }
    }
    Ok(())
}

/// A model whose attention output layer of one block is this dense `weight` `[width, inner]`, and
/// whose bias is moved by `shift` `[width]`.
pub(super) fn with_output(
    spec: &mut ModelSpec,
    parameters: &mut Parameters,
    block: usize,
    weight: Tensor,
    shift: &Tensor,
) -> Result<()> {
    let path = format!("blocks.{block}.attention.output");
    spec.low_rank.remove(&path);
    for factor in ["up", "down"] {
        parameters.remove(&format!("{path}.{factor}"));
    }
    parameters.insert(format!("{path}.weight"), weight);
    let moves = engine(engine(shift.abs())?.max_all())?;
    let moves = engine(moves.to_dtype(lapidary_kernels::DType::F64))?;
    if engine(moves.to_scalar::<f64>())? == 0.0 {
        return Ok(());
    }
    let bias = format!("{path}.bias");
    let moved = match parameters.get(&bias) {
        Some(before) => engine(before + shift)?,
        None => shift.clone(),
    };
    parameters.insert(bias, moved);
    if let Some(MixerSpec::MultiHead(attention)) =
        spec.blocks.get_mut(block).map(|block| &mut block.attention)
    {
        attention.output_bias = Some(true);
    }
    Ok(())
}

/// The output layer of a block's attention `[width, heads · value_width]`, and `value_width`.
pub(super) fn output_layer(model: &Model, block: usize) -> Result<(Tensor, usize)> {
    let weight = dense(model, &format!("blocks.{block}.attention.output"))?;
    let blocks = model.spec().expanded_blocks();
    let width = blocks
        .get(block)
        .and_then(multi_head)
        .map(|spec| spec.value_width(model.spec().width));
    width
        .map(|width| (weight, width))
        .ok_or_else(|| Error::invalid("block", block, "a block with heads"))
}
