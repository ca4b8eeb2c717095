//! Putting a map into what a block writes last.

use lapidary_factor::{AffineMap, matrix_to_tensor};
use lapidary_kernels::{DType, Device};
use lapidary_model::Model;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::feedforward::FeedforwardSpec;

use crate::edit::Edit;
use crate::error::engine;
use crate::{Error, Result};

/// The site of what block `index` adds last to the stream: what its last part writes, behind the
/// block's scale of features where it has one.
pub(super) fn written(model: &Model, index: usize) -> Result<String> {
    let blocks = model.spec().expanded_blocks();
    match blocks.get(index) {
        Some(block) => {
            let site = match block.layer_scale {
                Some(_) => "scaled",
                None => "out",
            };
            Ok(format!("blocks.{index}.{}.{site}", part(block)))
        }
        None => Err(Error::invalid(
            "block",
            index,
            format!("below {}", blocks.len()),
        )),
    }
}

fn part(block: &BlockSpec) -> &'static str {
    match block.feedforward {
        Some(_) => "feedforward",
        None => "attention",
    }
}

/// The linear layers, below the part, whose outputs sum to what it writes.
pub(super) fn outputs(block: &BlockSpec) -> Result<Vec<String>> {
    Ok(match &block.feedforward {
        None => vec!["output".to_owned()],
        Some(FeedforwardSpec::Dense(_) | FeedforwardSpec::Gated(_)) => vec!["down".to_owned()],
        Some(FeedforwardSpec::Linear(_)) => vec!["map".to_owned()],
        Some(FeedforwardSpec::Mixture(mixture)) => (0..mixture.experts)
            .map(|expert| format!("experts.{expert}.down"))
            .collect(),
        Some(FeedforwardSpec::SparseCode(_)) => {
            return Err(Error::invalid(
                "the feed-forward part of the block before",
                "a sparse code, which is written by no linear layer",
                "another, since its last layer takes the map in; delete-linear and linearise take these",
            ));
        }
    })
}

/// `W ← Tᵀ W`, `b ← Tᵀ b` in what block `index` adds last. A scale `γ` of the features behind it
/// goes in first, `W ← Tᵀ diag(γ) W`, and is one from then on: `T` does not commute with it.
pub(super) fn merge(edit: &mut Edit, index: usize, map: &AffineMap) -> Result<()> {
    let mut turned = matrix_to_tensor(map.weight.transpose(), DType::F64, &Device::Cpu)?;
    let block = edit.block(index)?;
    let (part, outputs) = (part(block), outputs(block)?);
    let name = format!("blocks.{index}.{part}_scale.weight");
    if let Some(scale) = edit.find(&name)? {
        let columns = engine(scale.to_device(&Device::Cpu))?;
        turned = engine(turned.broadcast_mul(&columns))?;
        edit.put(name, &engine(scale.ones_like())?)?;
    }
    for layer in outputs {
        let path = format!("blocks.{index}.{part}.{layer}");
        // Of a factorised layer the second factor carries the outputs.
        let name = match edit.find(&format!("{path}.up"))? {
            Some(_) => format!("{path}.up"),
            None => format!("{path}.weight"),
        };
        let weight = edit.get(&name)?;
        let here = engine(turned.to_device(weight.device()))?;
        edit.put(name, &engine(here.matmul(&weight))?)?;
        let name = format!("{path}.bias");
        if let Some(bias) = edit.find(&name)? {
            let column = engine(bias.unsqueeze(1))?;
            edit.put(name, &engine(engine(here.matmul(&column))?.squeeze(1))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_factor::Matrix;
    use lapidary_kernels::Tensor;
    use lapidary_model::{Input, Pass};
    use lapidary_signal::{Signal, Trace};

    const FIRST: [&str; 8] = [
        "attention = { kind = \"multi-head\", heads = 2, causal = true }\nfeedforward = { kind = \"dense\", hidden = 12 }",
        "attention = { kind = \"multi-head\", heads = 2, causal = true }\nfeedforward = { kind = \"gated\", hidden = 12 }",
        "wiring = \"parallel\"\nattention = { kind = \"multi-head\", heads = 2, causal = true }\nfeedforward = { kind = \"dense\", hidden = 12 }",
        "attention = { kind = \"multi-head\", heads = 2, causal = true }\nfeedforward = { kind = \"mixture\", hidden = 6, experts = 3, active = 2, activation = \"silu\", normalise = true }",
        "attention = { kind = \"mamba\", state = 3 }",
        "norm = { kind = \"none\" }\nattention = { kind = \"absent\" }\nfeedforward = { kind = \"linear\" }",
        "layer_scale = 0.5\nattention = { kind = \"multi-head\", heads = 2, causal = true }\nfeedforward = { kind = \"dense\", hidden = 12 }",
        "layer_scale = 0.5\nattention = { kind = \"mamba\", state = 3 }",
    ];

    fn model(first: &str) -> Model {
        let text = format!(
            r#"
            width = 8
            final_norm = {{ kind = "rms" }}
            [input]
            kind = "tokens"
            vocabulary = 10
            length = 8
            [[blocks]]
            {first}
            [[blocks]]
            attention = {{ kind = "multi-head", heads = 2, causal = true }}
            feedforward = {{ kind = "dense", hidden = 12 }}
            [head]
            kind = "language-model"
            "#
        );
        let mut edit = Edit::of(
            &Model::initialised(toml::from_str(&text).unwrap(), 1, DType::F64, &Device::Cpu)
                .unwrap(),
        );
        // Biases start at zero, and other weights small.
        for (index, (name, tensor)) in edit.parameters.clone().into_iter().enumerate() {
            if name.starts_with("blocks.") && !name.contains("decay_log") {
                let count = tensor.elem_count();
                let extra = (0..count).map(|i| ((i * 7 + index * 3) % 11) as f64 / 20.0 - 0.25);
                let extra: Vec<f64> = extra.collect();
                let extra = Tensor::from_vec(extra, tensor.dims(), &Device::Cpu).unwrap();
                edit.put(name, &(tensor + extra).unwrap()).unwrap();
            }
        }
        edit.finish().unwrap()
    }

    /// The merged model is the unmerged one with the map in what the block writes, all at once
    /// and token by token.
    #[test]
    fn merging_is_mapping_what_the_block_writes() {
        let entry = |i: usize, j: usize| ((i * 5 + j * 3) % 7) as f64 / 7.0 - 0.4;
        let map = AffineMap {
            weight: Matrix::from_fn(8, 8, entry),
            bias: vec![0.0; 8],
        };
        let matrix = matrix_to_tensor(map.weight.as_ref(), DType::F64, &Device::Cpu).unwrap();
        for first in FIRST {
            let model = model(first);
            let mut edit = Edit::of(&model);
            merge(&mut edit, 0, &map).unwrap();
            let merged = edit.finish().unwrap();

            let site = written(&model, 0).unwrap();
            let matrix = matrix.clone();
            let trace = Trace::new()
                .replace(&site, move |_, signal| {
                    let value = signal.into_value().broadcast_matmul(&matrix);
                    Ok(Signal::from(value.map_err(lapidary_kernels::Error::from)?))
                })
                .unwrap();
            let ids = Tensor::new(&[[1u32, 4, 2, 9, 3]], &Device::Cpu).unwrap();
            let pass = Pass {
                trace: Some(&trace),
                ..Pass::default()
            };
            let logits = |model: &Model, ids: &Tensor, pass: Pass<'_>| -> Tensor {
                let output = model.forward(&Input::tokens(ids.clone()), pass).unwrap();
                output.into_logits().unwrap().into_value()
            };
            let largest = |a: &Tensor, b: &Tensor| -> f64 {
                let gap = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
                gap.max(0).unwrap().to_scalar().unwrap()
            };
            let expected = logits(&model, &ids, pass);
            let found = logits(&merged, &ids, Pass::default());
            assert!(largest(&found, &expected) < 1e-10, "{first}");
            let plain = logits(&model, &ids, Pass::default());
            assert!(largest(&plain, &expected) > 1e-3, "{first}");

            let mut state = merged.decode_state();
            for token in 0..5 {
                let here = ids.narrow(1, token, 1).unwrap();
                let pass = Pass {
                    state: Some(&mut state),
                    ..Pass::default()
                };
                let step = logits(&merged, &here, pass);
                let whole = expected.narrow(1, token, 1).unwrap();
                assert!(largest(&step, &whole) < 1e-10, "{first} at {token}");
            }
        }
    }
}
