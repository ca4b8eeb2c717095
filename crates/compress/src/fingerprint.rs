//! A short name for a model's weights.

use std::fmt;

use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::error::engine;
use crate::{CalibrationData, Content, Result};

/// A 128-bit hash (XXH3) of the names, shapes, types and values of a model's parameters: the
/// same on every machine, and different as soon as one weight is. It guards against mistakes,
/// not against forgery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint([u64; 2]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}

impl Fingerprint {
    /// The fingerprint of a model's parameters as they are now.
    pub fn of(model: &Model) -> Result<Self> {
        let mut hash = Xxh3::new();
        for (name, tensor) in model.parameters() {
            hash.update(&(name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update(tensor.dtype().as_str().as_bytes());
            for size in tensor.dims() {
                hash.update(&(*size as u64).to_le_bytes());
            }
            values(&mut hash, tensor)?;
        }
        Ok(Self::digest(&hash))
    }

    /// The fingerprint of data: of its tokens or images, and of what should have been said.
    pub(crate) fn of_data(data: &CalibrationData) -> Result<Self> {
        let mut hash = Xxh3::new();
        for example in data.examples() {
            match &example.content {
                Content::Tokens { ids, types } => {
                    hash.update(format!("{ids:?} {types:?}").as_bytes());
                }
                Content::Pixels(tensor) => {
                    hash.update(format!("{:?}", tensor.dims()).as_bytes());
                    values(&mut hash, tensor)?;
                }
            }
            hash.update(format!("{:?}", example.target).as_bytes());
        }
        Ok(Self::digest(&hash))
    }

    fn digest(hash: &Xxh3) -> Self {
        let digest = hash.digest128();
        Self([(digest >> 64) as u64, digest as u64])
    }
}

/// A hash of one tensor's values.
pub(crate) fn of_values(tensor: &Tensor) -> Result<u128> {
    let mut hash = Xxh3::new();
    values(&mut hash, tensor)?;
    Ok(hash.digest128())
}

fn values(hash: &mut Xxh3, tensor: &Tensor) -> Result<()> {
    let flat = engine(tensor.flatten_all())?;
    let mut bytes = Vec::with_capacity(flat.elem_count() * 8);
    if flat.dtype() == DType::F64 {
        for value in engine(flat.to_vec1::<f64>())? {
            bytes.extend(value.to_le_bytes());
        }
    } else {
        // Every narrower type of a parameter is a subset of `f32`.
        let flat = engine(flat.to_dtype(DType::F32))?;
        for value in engine(flat.to_vec1::<f32>())? {
            bytes.extend(value.to_le_bytes());
        }
    }
    hash.update(&bytes);
    Ok(())
}
