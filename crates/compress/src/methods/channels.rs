//! Feed-forward parts with fewer hidden features, for every method that takes some out.

use lapidary_kernels::{D, DType, Device, Tensor};
use lapidary_model::Model;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::feedforward::FeedforwardSpec;

use crate::edit::Edit;
use crate::error::engine;
use crate::plan::{Change, ModulePlan};
use crate::{Error, Result};

/// The dense or gated part that hidden features belong to: a whole feed-forward part, or an expert
/// of a mixture.
pub(crate) struct Unit {
    /// Path of its layers: `{path}.up`.
    pub(crate) path: String,
    /// Hidden features.
    pub(crate) hidden: usize,
    gated: bool,
}

impl Unit {
    /// The units of a block's feed-forward part: none where it has none, one for each expert of
    /// a mixture.
    pub(crate) fn of(index: usize, block: &BlockSpec) -> Vec<Self> {
        let path = feedforward(index);
        let unit = |path: String, hidden: usize, gated: bool| Self {
            path,
            hidden,
            gated,
        };
        match &block.feedforward {
            None | Some(FeedforwardSpec::Linear(_) | FeedforwardSpec::SparseCode(_)) => Vec::new(),
            Some(FeedforwardSpec::Dense(spec)) => vec![unit(path, spec.hidden, false)],
            Some(FeedforwardSpec::Gated(spec)) => vec![unit(path, spec.hidden, true)],
            Some(FeedforwardSpec::Mixture(spec)) => (0..spec.experts)
                .map(|expert| unit(format!("{path}.experts.{expert}"), spec.hidden, true))
                .collect(),
        }
    }

    /// The site of the hidden features.
    pub(crate) fn hidden_site(&self) -> String {
        format!("{}.hidden", self.path)
    }

    /// The site that the unit reads.
    pub(crate) fn input_site(&self) -> String {
        format!("{}.in", self.path)
    }

    /// Paths of the layers that write the hidden features.
    pub(crate) fn writers(&self) -> Vec<String> {
        let names: &[&str] = if self.gated { &["gate", "up"] } else { &["up"] };
        let path = |name: &&str| format!("{}.{name}", self.path);
        names.iter().map(path).collect()
    }

    /// Path of the layer that writes what is gated, in a gated part.
    pub(crate) fn content(&self) -> Option<String> {
        self.gated.then(|| format!("{}.up", self.path))
    }

    /// Path of the layer that reads the hidden features.
    pub(crate) fn reader(&self) -> String {
        format!("{}.down", self.path)
    }

    /// Leaves the `kept` features, in this order; the reader keeps their weights as they are.
    pub(crate) fn keep(&self, edit: &mut Edit, kept: &[usize]) -> Result<()> {
        for writer in self.writers() {
            select_outputs(edit, &writer, kept)?;
        }
        select_inputs(edit, &self.reader(), kept)
    }
}

/// Path of a block's feed-forward part.
pub(crate) fn feedforward(index: usize) -> String {
    format!("blocks.{index}.feedforward")
}

/// Path of a block's attention.
pub(crate) fn attention(index: usize) -> String {
    format!("blocks.{index}.attention")
}

/// Hidden features that can be taken out of a block's feed-forward part: nothing where there is no part, and
/// where it has none of its own, as one linear map has none.
pub(crate) fn hidden(index: usize, block: &BlockSpec) -> Option<usize> {
    let units = Unit::of(index, block);
    let hidden = units.first().map(|unit| unit.hidden);
    hidden.filter(|hidden| *hidden > 0)
}

/// Features of a mixture's experts that stay together: eight numbers of 16 bits take 16 bytes.
const TOGETHER: usize = 8;

/// The number of `features` of `hidden` that a block whose experts all have as many should keep. Programs that
/// multiply the experts of a mixture in one product, as `transformers` does, need rows that begin at multiples
/// of 16 bytes, and refuse to run others: where the original's do, so do the narrower ones.
pub(crate) fn aligned(block: &BlockSpec, features: usize, hidden: usize) -> usize {
    let mixture = matches!(block.feedforward, Some(FeedforwardSpec::Mixture(_)));
    let apart = features >= hidden || !hidden.is_multiple_of(TOGETHER) || hidden == TOGETHER;
    match mixture && !apart {
        true => {
            let nearest = (features + TOGETHER / 2) / TOGETHER * TOGETHER;
            nearest.clamp(TOGETHER, hidden - TOGETHER)
        }
        false => features,
    }
}

/// Writes a block's new number of hidden features into its spec.
pub(crate) fn set_hidden(edit: &mut Edit, index: usize, features: usize) -> Result<()> {
    match &mut edit.block(index)?.feedforward {
        None | Some(FeedforwardSpec::Linear(_) | FeedforwardSpec::SparseCode(_)) => {}
        Some(FeedforwardSpec::Dense(spec)) => spec.hidden = features,
        Some(FeedforwardSpec::Gated(spec)) => spec.hidden = features,
        Some(FeedforwardSpec::Mixture(spec)) => spec.hidden = features,
    }
    Ok(())
}

/// Leaves some outputs of a linear layer.
pub(crate) fn select_outputs(edit: &mut Edit, path: &str, kept: &[usize]) -> Result<()> {
    let weight = format!("{path}.weight");
    let rows = select(&edit.get(&weight)?, 0, kept)?;
    edit.put(weight, &rows)?;
    let bias = format!("{path}.bias");
    if let Some(values) = edit.find(&bias)? {
        edit.put(bias, &select(&values, 0, kept)?)?;
    }
    Ok(())
}

/// Leaves some inputs of a linear layer.
pub(crate) fn select_inputs(edit: &mut Edit, path: &str, kept: &[usize]) -> Result<()> {
    let weight = format!("{path}.weight");
    let columns = select(&edit.get(&weight)?, 1, kept)?;
    edit.put(weight, &columns)
}

/// Leaves some indices of a dimension.
pub(crate) fn select(tensor: &Tensor, dimension: usize, kept: &[usize]) -> Result<Tensor> {
    let indices: Vec<u32> = kept.iter().map(|index| *index as u32).collect();
    let indices = engine(Tensor::from_vec(indices, kept.len(), tensor.device()))?;
    engine(tensor.index_select(&indices, dimension))
}

/// `‖gate row‖ + ‖up row‖ + ‖down column‖` of each hidden feature, every weight multiplied by
/// what `scales` gives for the input that it reads: first those of the unit's input, then those
/// of its hidden features.
pub(crate) fn magnitudes(
    edit: &Edit,
    unit: &Unit,
    scales: Option<(&[f64], &[f64])>,
) -> Result<Vec<f64>> {
    let scaled = |path: &str, scale: Option<&[f64]>| -> Result<Tensor> {
        let weight = edit.get(&format!("{path}.weight"))?;
        let weight = engine(weight.to_device(&Device::Cpu))?;
        let Some(scale) = scale else {
            return Ok(weight);
        };
        let row = engine(Tensor::from_slice(scale, (1, scale.len()), &Device::Cpu))?;
        engine(weight.broadcast_mul(&row))
    };
    let norms = |weight: Tensor, summed: usize| -> Result<Tensor> {
        engine(engine(engine(weight.sqr())?.sum(summed))?.sqrt())
    };
    let mut total = norms(scaled(&unit.reader(), scales.map(|(_, hidden)| hidden))?, 0)?;
    for writer in unit.writers() {
        let rows = norms(scaled(&writer, scales.map(|(input, _)| input))?, 1)?;
        total = engine(total + rows)?;
    }
    debug_assert_eq!(total.dtype(), DType::F64);
    engine(engine(total.flatten(0, D::Minus1))?.to_vec1::<f64>())
}

/// The block that a planned module is a part of, when it is `part` of a block of this model.
pub(crate) fn block_of(model: &Model, planned: &ModulePlan, part: &str) -> Result<usize> {
    let found = crate::edit::block_of(&planned.path).filter(|(index, rest)| {
        *rest == part
            && *index < model.spec().expanded_blocks().len()
            && planned.input == model.spec().width
    });
    found
        .map(|(index, _)| index)
        .ok_or_else(|| planned.of_another_model())
}

/// Hidden features that a plan asks for, within what there is.
pub(crate) fn planned_features(planned: &ModulePlan, hidden: usize) -> Result<Option<usize>> {
    match planned.change {
        Change::Leave { .. } => Ok(None),
        Change::Narrow { features } if (1..=hidden).contains(&features) => Ok(Some(features)),
        ref other => Err(Error::invalid(
            format!("change of {}", planned.path),
            format!("{other:?}"),
            format!("leave, or narrow to between 1 and {hidden} features"),
        )),
    }
}

/// Weights of the linear layers of a module, biases left out.
pub(crate) fn weights(model: &Model, path: &str) -> usize {
    let inside = |layer: &str| {
        layer
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let linears = model.linears().iter();
    linears
        .filter(|linear| inside(&linear.path))
        .map(|linear| match linear.rank {
            Some(rank) => lapidary_factor::rank::parameters(linear.input, linear.output, rank),
            None => linear.input * linear.output,
        })
        .sum()
}

/// Indices of the `count` largest scores, rising; of equal ones the first.
pub(crate) fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<(usize, f64)> = scores.iter().copied().enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut kept: Vec<usize> = order.into_iter().take(count).map(|(i, _)| i).collect();
    kept.sort_unstable();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of features that is left of so many when so many were wanted.
    fn left(kind: &str, features: usize, hidden: usize) -> usize {
        let more = match kind {
            "mixture" => ", experts = 3, active = 2",
            _ => "",
        };
        let block = format!(
            "attention = {{ kind = \"absent\" }}\nfeedforward = {{ kind = \"{kind}\", hidden = {hidden}{more} }}"
        );
        aligned(&toml::from_str(&block).unwrap(), features, hidden)
    }

    #[test]
    fn experts_keep_eights_where_they_had_them() {
        for (features, hidden, expected) in [
            (67, 96, 64),
            (68, 96, 72),
            (96, 96, 96),
            // Something goes and something stays.
            (95, 96, 88),
            (1, 96, 8),
            (3, 8, 3),
            (7, 10, 7),
        ] {
            assert_eq!(left("mixture", features, hidden), expected, "{features}");
            assert_eq!(left("gated", features, hidden), features);
        }
    }
}
