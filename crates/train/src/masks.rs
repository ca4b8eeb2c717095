//! Weights that stay zero while others are trained.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Tensor};

use crate::error::engine;
use crate::{Error, Result};

/// For some parameters, which of their entries are trained: 1 keeps, 0 is zero and stays zero, in
/// whatever an optimiser, its decay and its moments do.
///
/// ```
/// use lapidary_kernels::{Device, Tensor};
/// use lapidary_train::Masks;
/// let weight = Tensor::new(&[[0f32, 2.0], [3.0, 0.0]], &Device::Cpu)?;
/// let masks = Masks::of_zeros([("layer.weight", &weight)])?;
/// assert_eq!((masks.len(), masks.zeros()), (1, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Masks {
    /// By parameter, `u8` of its shape.
    tensors: BTreeMap<String, Tensor>,
    zeros: usize,
}

impl Masks {
    /// Masks by the names of parameters: `u8` tensors of ones and zeros.
    ///
    /// # Errors
    /// When one is of another type or holds another number.
    pub fn new(tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let mut zeros = 0;
        for (name, tensor) in &tensors {
            let wrong = |detail: &str| Error::Tensor {
                name: name.clone(),
                detail: detail.to_owned(),
            };
            if tensor.dtype() != DType::U8 {
                return Err(wrong("a mask has to be of u8"));
            }
            let entries = flat::<u8>(tensor)?;
            if entries.iter().any(|entry| *entry > 1) {
                return Err(wrong("a mask has to hold zeros and ones"));
            }
            zeros += entries.iter().filter(|entry| **entry == 0).count();
        }
        Ok(Self { tensors, zeros })
    }

    /// The masks that keep zero what is exactly zero in these parameters; those without a zero have
    /// none.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn of_zeros<'a>(
        parameters: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    ) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (name, tensor) in parameters {
            let mask = engine(tensor.detach().ne(0.0))?;
            if flat::<u8>(&mask)?.contains(&0) {
                tensors.insert(name.to_owned(), mask);
            }
        }
        Self::new(tensors)
    }

    /// Parameters that have a mask.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether no parameter has one.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Entries that stay zero.
    pub fn zeros(&self) -> usize {
        self.zeros
    }

    /// The masks by parameter.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// `tensor` with zeros where the mask of this parameter has them; as it is where it has none.
    ///
    /// # Errors
    /// When the mask has another shape.
    pub fn masked(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        let Some(mask) = self.tensors.get(name) else {
            return Ok(tensor.clone());
        };
        if mask.dims() != tensor.dims() {
            return Err(Error::Tensor {
                name: name.to_owned(),
                detail: format!(
                    "the mask is {:?}, but the parameter {:?}",
                    mask.dims(),
                    tensor.dims()
                ),
            });
        }
        // Not a product: whatever stood there, it is zero now.
        let zeros = engine(tensor.zeros_like())?;
        engine(mask.where_cond(tensor, &zeros))
    }
}

fn flat<T: lapidary_kernels::WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    engine(engine(tensor.flatten_all())?.to_vec1::<T>())
}

/// Lifts an error of the tensor engine.
#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    #[test]
    fn what_is_masked_is_zero_whatever_it_was() {
        let mask = Tensor::new(&[1u8, 0, 0], &Device::Cpu).unwrap();
        let masks = Masks::new([("w".to_owned(), mask)].into()).unwrap();
        let found = Tensor::new(&[-2f32, f32::NAN, -1.0], &Device::Cpu).unwrap();
        let masked = masks.masked("w", &found).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(masked, [-2.0, 0.0, 0.0]);
        assert!(masked[1].is_sign_positive() && masked[2].is_sign_positive());
        let other = masks.masked("b", &found).unwrap();
        assert!(other.to_vec1::<f32>().unwrap()[1].is_nan());
        let wide = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let error = masks.masked("w", &wide).unwrap_err().to_string();
        assert!(error.contains("[3]") && error.contains("[1]"), "{error}");
    }

    #[test]
    fn masks_are_zeros_and_ones() {
        let two = Tensor::new(&[2u8], &Device::Cpu).unwrap();
        assert!(Masks::new([("w".to_owned(), two)].into()).is_err());
        let float = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        assert!(Masks::new([("w".to_owned(), float.clone())].into()).is_err());
        assert!(Masks::of_zeros([("w", &float)]).unwrap().is_empty());
    }
}
