//! A tensor as GGUF stores it.

use half::f16;
use lapidary_kernels::{DType, QuantisedMatrix, Tensor};
use lapidary_parts::parameters::Quantisation;

use super::GgufFloat;
use super::architecture::{Named, Order};
use crate::{Error, Model, Result};

/// Weights of one GGUF block.
const BLOCK: usize = 32;

/// A type of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q8_0,
}

impl Kind {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// The type with the same form as a quantised matrix, if there is one.
    fn like(form: &Quantisation) -> Option<Self> {
        if form.input_scale || form.columns > 0 {
            return None;
        }
        match (form.bits, form.minima) {
            (4, false) => Some(Self::Q4_0),
            (4, true) => Some(Self::Q4_1),
            (8, false) => Some(Self::Q8_0),
            _ => None,
        }
    }
}

/// How a tensor is stored, known before its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) kind: Kind,
    /// `[output, input]` or `[width]`.
    pub(super) dims: Vec<usize>,
    /// Whether it was quantised in a form that no type has.
    pub(super) written_out: bool,
}

impl Form {
    /// That of the parameters of `named`, one after another along the first dimension.
    pub(super) fn of(model: &Model, named: &Named, float: GgufFloat) -> Result<Self> {
        let forms = forms(model, named);
        let mut dims: Vec<usize> = Vec::new();
        for (name, form) in named.parameters.iter().zip(&forms) {
            let here = match form {
                Some(form) => {
                    let matrix = matrix(model, name, form)?;
                    vec![matrix.output(), matrix.input()]
                }
                None => parameter(model, name)?.dims().to_vec(),
            };
            match dims.first_mut().zip(here.first()) {
                Some((rows, more)) => *rows += more,
                None => dims = here,
            }
        }
        let kind = match forms.first() {
            Some(Some(form)) if forms.iter().all(|other| *other == Some(form)) => Kind::like(form),
            _ => None,
        };
        if let Some(kind) = kind {
            return Ok(Self {
                kind,
                dims,
                written_out: false,
            });
        }
        let written_out = forms.iter().any(Option::is_some);
        let half = dims.len() > 1 && (written_out || float == GgufFloat::F16);
        Ok(Self {
            kind: if half { Kind::F16 } else { Kind::F32 },
            dims,
            written_out,
        })
    }

    /// Bytes of the tensor.
    pub(super) fn bytes(&self) -> usize {
        let count: usize = self.dims.iter().product();
        match self.kind {
            Kind::F32 => 4 * count,
            Kind::F16 => 2 * count,
            // A scale, perhaps a minimum, and half a byte or one for each of 32.
            Kind::Q4_0 => count / BLOCK * 18,
            Kind::Q4_1 => count / BLOCK * 20,
            Kind::Q8_0 => count / BLOCK * 34,
        }
    }

    /// The tensor in its bytes.
    pub(super) fn write(&self, model: &Model, named: &Named) -> Result<Vec<u8>> {
        match self.kind {
            Kind::F32 | Kind::F16 => numbers(model, named, self),
            kind => quantised(model, named, kind),
        }
    }
}

fn forms<'a>(model: &'a Model, named: &Named) -> Vec<Option<&'a Quantisation>> {
    let forms = named.parameters.iter();
    forms.map(|name| model.spec().quantised.get(name)).collect()
}

/// Numbers of single or half precision.
fn numbers(model: &Model, named: &Named, form: &Form) -> Result<Vec<u8>> {
    let mut rows = Vec::new();
    for (name, form) in named.parameters.iter().zip(forms(model, named)) {
        rows.push(match form {
            Some(form) => written_out(model, name, form)?,
            None => parameter(model, name)?
                .to_dtype(DType::F32)
                .map_err(engine)?,
        });
    }
    let whole = match rows.as_slice() {
        [one] => one.clone(),
        several => Tensor::cat(several, 0).map_err(engine)?,
    };
    let values = whole.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
    let values = values.map_err(engine)?;
    let width = form.dims.get(1).copied().unwrap_or(1);
    let order = named
        .order
        .rows(form.dims.first().copied().unwrap_or_default());
    let ordered = order
        .iter()
        .flat_map(|row| values.get(row * width..(row + 1) * width).unwrap_or(&[]));
    let mut bytes = Vec::with_capacity(form.bytes());
    match form.kind {
        Kind::F16 => bytes.extend(ordered.flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        _ => bytes.extend(ordered.flat_map(|v| v.to_le_bytes())),
    }
    Ok(bytes)
}

/// A quantised matrix as numbers.
fn written_out(model: &Model, name: &str, form: &Quantisation) -> Result<Tensor> {
    let part = |part: &str| -> Result<Tensor> {
        let part = parameter(model, &format!("{name}.{part}"))?;
        part.to_dtype(DType::F32).map_err(engine)
    };
    let mut weight = matrix(model, name, form)?.dequantised(DType::F32)?;
    if form.input_scale {
        weight = weight
            .broadcast_mul(&part("input_scale")?)
            .map_err(engine)?;
    }
    if form.columns > 0 {
        let index = parameter(model, &format!("{name}.columns"))?;
        weight = weight
            .index_add(&index, &part("kept")?, 1)
            .map_err(engine)?;
    }
    Ok(weight)
}

/// Blocks of a scale, a minimum where there is one, and 32 integers, with the bits as they are.
fn quantised(model: &Model, named: &Named, kind: Kind) -> Result<Vec<u8>> {
    let mut rows: Vec<Vec<u8>> = Vec::new();
    for name in &named.parameters {
        let Some(form) = model.spec().quantised.get(name) else {
            continue;
        };
        let matrix = matrix(model, name, form)?;
        let codes = matrix.codes().to_vec2::<u8>().map_err(engine)?;
        let scales = matrix.scales().to_vec2::<f16>().map_err(engine)?;
        let minima = match matrix.minima() {
            Some(minima) => Some(minima.to_vec2::<f16>().map_err(engine)?),
            None => None,
        };
        let bytes_per_block = BLOCK * form.bits as usize / 8;
        for (row, (codes, scales)) in codes.iter().zip(&scales).enumerate() {
            let mut bytes = Vec::with_capacity(codes.len() + 4 * matrix.input() / BLOCK);
            for (block, codes) in codes.chunks_exact(bytes_per_block).enumerate() {
                let group = block * BLOCK / form.group;
                let at = |values: &[f16]| values.get(group).copied().unwrap_or(f16::ZERO);
                bytes.extend(at(scales).to_le_bytes());
                if let Some(minima) = minima.as_ref().and_then(|minima| minima.get(row)) {
                    bytes.extend(at(minima).to_le_bytes());
                }
                match kind {
                    // Eight bits are signed there.
                    Kind::Q8_0 => bytes.extend(codes.iter().map(|code| code.wrapping_sub(128))),
                    _ => bytes.extend(codes),
                }
            }
            rows.push(bytes);
        }
    }
    let order = named.order.rows(rows.len());
    let ordered = order.iter().filter_map(|row| rows.get(*row));
    Ok(ordered.flatten().copied().collect())
}

impl Order {
    /// Which stored row each row of the file is.
    fn rows(self, count: usize) -> Vec<usize> {
        match self {
            Self::AsStored => (0..count).collect(),
            // llama.cpp turns neighbours where these models turn halves.
            Self::NeighbouringPairs { head } => (0..count)
                .map(|row| {
                    let (start, within) = (row / head * head, row % head);
                    start + within / 2 + within % 2 * (head / 2)
                })
                .collect(),
        }
    }
}

fn parameter(model: &Model, name: &str) -> Result<Tensor> {
    model
        .parameters()
        .get(name)
        .map(Tensor::detach)
        .ok_or_else(|| {
            let expected =
                "a parameter of the model; factorised layers have to be multiplied out first";
            lapidary_parts::Error::spec(format!("parameter {name}"), "absent", expected).into()
        })
}

fn matrix(model: &Model, name: &str, form: &Quantisation) -> Result<QuantisedMatrix> {
    let part = |part: &str| parameter(model, &format!("{name}.{part}"));
    let minima = match form.minima {
        true => Some(part("minima")?),
        false => None,
    };
    let (codes, scales) = (part("codes")?, part("scales")?);
    Ok(QuantisedMatrix::new(
        form.bits, form.group, codes, scales, minima,
    )?)
}

fn engine(error: impl Into<lapidary_kernels::Error>) -> Error {
    Error::Kernel(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_become_neighbours() {
        let order = Order::NeighbouringPairs { head: 4 };
        assert_eq!(order.rows(8), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
