//! Stored bytes become a tensor of the asked type, with every value checked to be finite.

use std::path::Path;

use half::{bf16, f16};
use lapidary_kernels::{DType, Device, Tensor, WithDType};

use super::{CheckpointError, StoredType, TensorInfo};

/// One tensor in its file.
pub(super) struct Stored<'file> {
    pub path: &'file Path,
    pub name: &'file str,
    pub info: &'file TensorInfo,
    /// Exactly `elements * bytes per element`, little-endian, of any alignment.
    pub bytes: &'file [u8],
}

impl Stored<'_> {
    /// The tensor in `dtype`. It is first made in its own type, which loses nothing.
    pub fn read(&self, dtype: DType) -> Result<Tensor, CheckpointError> {
        let own = match self.info.dtype {
            StoredType::F64 => self.floats(self.decode(f64::from_le_bytes))?,
            StoredType::F32 => self.floats(self.decode(f32::from_le_bytes))?,
            StoredType::F16 => {
                self.floats(self.decode(|bytes| f16::from_le_bytes(bytes).to_f32()))?
            }
            StoredType::BF16 => {
                self.floats(self.decode(|bytes| bf16::from_le_bytes(bytes).to_f32()))?
            }
            StoredType::I64 => self.tensor(self.decode(i64::from_le_bytes))?,
            StoredType::I32 => {
                self.tensor(self.decode(|bytes| i64::from(i32::from_le_bytes(bytes))))?
            }
            StoredType::U32 => self.tensor(self.decode(u32::from_le_bytes))?,
            StoredType::U8 | StoredType::BOOL => self.tensor(self.bytes.to_vec())?,
            found => {
                return Err(CheckpointError::Type {
                    path: self.path.to_path_buf(),
                    tensor: self.name.to_string(),
                    found,
                    expected: dtype,
                });
            }
        };
        if own.dtype() == dtype {
            return Ok(own);
        }
        let converted = own
            .to_dtype(dtype)
            .map_err(|error| self.engine_error(error.into()))?;
        let narrower =
            own.dtype().is_float() && dtype.size_in_bytes() < own.dtype().size_in_bytes();
        if narrower && dtype.is_float() {
            self.check_narrowed(&converted)?;
        }
        Ok(converted)
    }

    fn decode<const N: usize, T>(&self, element: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (elements, _) = self.bytes.as_chunks::<N>();
        elements.iter().map(|&bytes| element(bytes)).collect()
    }

    fn floats<T: WithDType + Copy + Into<f64>>(
        &self,
        values: Vec<T>,
    ) -> Result<Tensor, CheckpointError> {
        self.check_finite(&values, || "as stored".to_string())?;
        self.tensor(values)
    }

    fn tensor<T: WithDType>(&self, values: Vec<T>) -> Result<Tensor, CheckpointError> {
        Tensor::from_vec(values, self.info.shape.as_slice(), &Device::Cpu)
            .map_err(|error| self.engine_error(error.into()))
    }

    fn check_narrowed(&self, converted: &Tensor) -> Result<(), CheckpointError> {
        let values: Vec<f32> = converted
            .flatten_all()
            .and_then(|flat| flat.to_dtype(DType::F32)?.to_vec1())
            .map_err(|error| self.engine_error(error.into()))?;
        self.check_finite(&values, || {
            format!("once converted to {:?}", converted.dtype())
        })
    }

    fn check_finite<T: Copy + Into<f64>>(
        &self,
        values: &[T],
        when: impl Fn() -> String,
    ) -> Result<(), CheckpointError> {
        // Without early exit, so that the common case is vectorised.
        if values
            .iter()
            .fold(true, |finite, &value| finite & value.into().is_finite())
        {
            return Ok(());
        }
        let nan = values
            .iter()
            .filter(|&&value| value.into().is_nan())
            .count();
        let infinite = values
            .iter()
            .filter(|&&value| value.into().is_infinite())
            .count();
        Err(CheckpointError::NotFinite {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            nan,
            infinite,
            total: values.len(),
            when: when(),
        })
    }

    fn engine_error(&self, reason: lapidary_kernels::Error) -> CheckpointError {
        CheckpointError::Tensor {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            reason: Box::new(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(dtype: StoredType, bytes: &[u8], asked: DType) -> Result<Tensor, CheckpointError> {
        let info = TensorInfo {
            dtype,
            shape: vec![bytes.len() / dtype.bytes()],
        };
        let stored = Stored {
            path: Path::new("x.safetensors"),
            name: "w",
            info: &info,
            bytes,
        };
        stored.read(asked)
    }

    fn values(dtype: StoredType, bytes: &[u8]) -> Vec<f64> {
        let tensor = read(dtype, bytes, DType::F64).unwrap();
        tensor.to_vec1().unwrap()
    }

    #[test]
    fn every_type_is_read_exactly() {
        let floats = [1.5f64, -0.25, 3.0];
        let bytes = |encode: &dyn Fn(f64) -> Vec<u8>| {
            floats.iter().flat_map(|&x| encode(x)).collect::<Vec<_>>()
        };
        assert_eq!(
            values(StoredType::F64, &bytes(&|x| x.to_le_bytes().to_vec())),
            floats
        );
        assert_eq!(
            values(
                StoredType::F32,
                &bytes(&|x| (x as f32).to_le_bytes().to_vec())
            ),
            floats
        );
        assert_eq!(
            values(
                StoredType::F16,
                &bytes(&|x| f16::from_f64(x).to_le_bytes().to_vec())
            ),
            floats
        );
        assert_eq!(
            values(
                StoredType::BF16,
                &bytes(&|x| bf16::from_f64(x).to_le_bytes().to_vec())
            ),
            floats
        );
        assert_eq!(values(StoredType::I64, &(-7i64).to_le_bytes()), [-7.0]);
        assert_eq!(values(StoredType::I32, &(-7i32).to_le_bytes()), [-7.0]);
        assert_eq!(values(StoredType::U32, &7u32.to_le_bytes()), [7.0]);
        assert_eq!(values(StoredType::U8, &[255, 0]), [255.0, 0.0]);
        assert_eq!(values(StoredType::BOOL, &[1, 0]), [1.0, 0.0]);
    }

    #[test]
    fn positions_are_read_as_integers() {
        let bytes: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
        let tensor = read(StoredType::I64, &bytes, DType::U32).unwrap();
        assert_eq!(tensor.to_vec1::<u32>().unwrap(), [0, 1, 2, 3]);
    }

    #[test]
    fn unreadable_types_are_named() {
        let message = read(StoredType::F8_E4M3, &[0], DType::F32)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("tensor `w` is stored as F8_E4M3"),
            "{message}"
        );
    }

    #[test]
    fn not_finite_values_are_counted() {
        let values = [1.0, f32::NAN, f32::INFINITY, f32::NAN];
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let message = read(StoredType::F32, &bytes, DType::F32)
            .unwrap_err()
            .to_string();
        assert_eq!(
            message,
            "x.safetensors: tensor `w` has 2 NaN and 1 infinite values among 4 as stored; \
             every weight must be finite"
        );
        let message = read(StoredType::F32, &1e30f32.to_le_bytes(), DType::F16)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("1 infinite values among 1 once converted to F16"),
            "{message}"
        );
    }
}
