//! The parameters that are rounded, and what is put in their place.

use lapidary_kernels::{DType, Device, QuantisedMatrix, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, OutputProjection};
use lapidary_parts::parameters::Quantisation;

use crate::edit::{Edit, block_of};
use crate::error::engine;
use crate::selection::Layer;
use crate::{Error, Result};

/// A matrix of a layer: the layer's own, or one of two factors.
pub(super) struct Target {
    /// The parameter.
    pub(super) name: String,
    pub(super) dims: [usize; 2],
    /// The parameter that is applied before it, for a second factor.
    pub(super) after: Option<String>,
}

impl Target {
    pub(super) fn of(layer: &Layer) -> Vec<Self> {
        let Layer {
            path,
            input,
            output,
            rank,
            ..
        } = layer;
        match *rank {
            None => vec![Self {
                name: format!("{path}.weight"),
                dims: [*output, *input],
                after: None,
            }],
            Some(rank) => vec![
                Self {
                    name: format!("{path}.down"),
                    dims: [rank, *input],
                    after: None,
                },
                Self {
                    name: format!("{path}.up"),
                    dims: [*output, rank],
                    after: Some(format!("{path}.down")),
                },
            ],
        }
    }
}

/// Whether a layer of the blocks' queries is what their attention writes by too, transposed, which integers are not.
pub(super) fn writes_too(model: &Model, layer: &Layer) -> bool {
    let Some((index, rest)) = block_of(&layer.path) else {
        return false;
    };
    let blocks = model.spec().expanded_blocks();
    let tied = blocks
        .get(index)
        .is_some_and(|block| is_tied(&block.attention));
    tied && rest.starts_with("attention.") && rest.ends_with(".query")
}

fn is_tied(mixer: &MixerSpec) -> bool {
    match mixer {
        MixerSpec::MultiHead(attention) => attention.output == OutputProjection::Tied,
        MixerSpec::Wavelet(wavelet) => is_tied(&wavelet.inner),
        MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) | MixerSpec::Absent => false,
    }
}

/// A parameter that is still made of numbers, in `f64`.
pub(super) fn original(model: &Model, name: &str) -> Result<Tensor> {
    match model.parameters().get(name) {
        Some(tensor) => engine(tensor.detach().to_dtype(DType::F64)),
        None => Err(Error::invalid(
            format!("matrix {name}"),
            "quantised already, or absent",
            "made of numbers",
        )),
    }
}

/// Puts integers in the place of a parameter, and beside them what they lose in `columns`, row by row.
pub(super) fn put(
    edit: &mut Edit,
    name: &str,
    matrix: &QuantisedMatrix,
    input_scale: Option<Vec<f64>>,
    columns: &[usize],
    lost: Vec<f64>,
) -> Result<()> {
    edit.parameters.remove(name);
    let mut keep = |part: &str, tensor: &Tensor| {
        edit.parameters
            .insert(format!("{name}.{part}"), tensor.clone());
    };
    keep("codes", matrix.codes());
    keep("scales", matrix.scales());
    if let Some(minima) = matrix.minima() {
        keep("minima", minima);
    }
    let form = Quantisation {
        bits: matrix.bits(),
        group: matrix.group(),
        minima: matrix.minima().is_some(),
        input_scale: input_scale.is_some(),
        columns: columns.len(),
    };
    if !columns.is_empty() {
        let index: Vec<u32> = columns.iter().map(|column| *column as u32).collect();
        let index = engine(Tensor::from_vec(index, columns.len(), &Device::Cpu))?;
        keep("columns", &index);
        let shape = (matrix.output(), columns.len());
        let lost = engine(Tensor::from_vec(lost, shape, &Device::Cpu))?;
        edit.put(format!("{name}.kept"), &lost)?;
    }
    if let Some(scale) = input_scale {
        let width = scale.len();
        let scale = engine(Tensor::from_vec(scale, width, &Device::Cpu))?;
        edit.put(format!("{name}.input_scale"), &scale)?;
    }
    edit.spec.quantised.insert(name.to_owned(), form);
    Ok(())
}
