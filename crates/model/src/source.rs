//! Sources of parameters: seeded initial values, and ready tensors.

use std::collections::BTreeMap;
use std::hash::Hasher;

use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::Result;
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_signal::DroppedPart;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Makes parameters from a seed. The values of one depend on the seed and its name alone, not
/// on which others are made before it.
#[derive(Clone, Debug)]
pub struct Initialiser {
    seed: u64,
    dtype: DType,
    device: Device,
}

impl Initialiser {
    /// A source of parameters of `dtype` on `device`.
    pub fn new(seed: u64, dtype: DType, device: Device) -> Self {
        Self {
            seed,
            dtype,
            device,
        }
    }
}

/// FNV-1a, so that the seed of a name never changes with the compiler.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

impl ParameterSource for Initialiser {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
        hasher.write(&self.seed.to_le_bytes());
        hasher.write(name.as_bytes());
        let mut rng = ChaCha8Rng::seed_from_u64(hasher.finish());
        let count = shape.iter().product();
        let values: Vec<f64> = match init {
            Init::Zeros => vec![0.0; count],
            Init::Ones => vec![1.0; count],
            Init::Constant(number) => vec![number; count],
            Init::Normal { deviation } => {
                (0..count).map(|_| deviation * normal(&mut rng)).collect()
            }
            Init::Uniform { low, high } => (0..count)
                .map(|_| low + (high - low) * rng.random::<f64>())
                .collect(),
            Init::Spaced { first, last } => {
                let width = shape.last().copied().unwrap_or(1).max(1);
                let step = (last - first) / (width.max(2) - 1) as f64;
                (0..count)
                    .map(|i| first + step * (i % width) as f64)
                    .collect()
            }
            Init::LogRange => {
                let last = shape.last().copied().unwrap_or(1).max(1);
                (0..count).map(|i| ((i % last + 1) as f64).ln()).collect()
            }
            Init::InverseSoftplusLogUniform { low, high } => (0..count)
                .map(|_| {
                    let step = (low.ln() + rng.random::<f64>() * (high / low).ln()).exp();
                    // softplus⁻¹(y) = y + ln(1 − e^{−y})
                    step + (-(-step).exp_m1()).ln()
                })
                .collect(),
        };
        let values = match self.dtype {
            DType::F64 => Tensor::from_vec(values, shape, &self.device),
            dtype => {
                let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
                Tensor::from_vec(values, shape, &self.device).and_then(|t| t.to_dtype(dtype))
            }
        };
        Ok(values.map_err(lapidary_kernels::Error::from)?)
    }
}

/// A standard normal number by the Box–Muller transform.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * rng.random::<f64>()).cos()
}

/// Gives each parameter of another source once, and keeps it.
pub(crate) struct Recorder<'a> {
    source: &'a mut dyn ParameterSource,
    trainable: bool,
    dtype: Option<DType>,
    pub(crate) parameters: BTreeMap<String, Tensor>,
    pub(crate) variables: BTreeMap<String, Var>,
}

impl<'a> Recorder<'a> {
    pub(crate) fn new(source: &'a mut dyn ParameterSource, trainable: bool) -> Self {
        Self {
            source,
            trainable,
            dtype: None,
            parameters: BTreeMap::new(),
            variables: BTreeMap::new(),
        }
    }
}

impl ParameterSource for Recorder<'_> {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        if let Some(known) = self.parameters.get(name) {
            return Ok(known.clone());
        }
        let mut tensor = self.source.parameter(name, shape, init)?;
        self.dtype.get_or_insert(tensor.dtype());
        if self.trainable {
            let variable = Var::from_tensor(&tensor).map_err(lapidary_kernels::Error::from)?;
            tensor = variable.as_tensor().clone();
            self.variables.insert(name.to_owned(), variable);
        }
        self.parameters.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    }

    /// Integers are constants of a trainable model as well.
    fn packed(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let tensor = self.source.packed(name, shape, dtype)?;
        self.parameters.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    }

    fn dropped(&mut self, stored: &str, path: &str) -> Result<Option<DroppedPart>> {
        self.source.dropped(stored, path)
    }

    /// That of the first parameter, which is a table or a filter of the input.
    fn dtype(&self) -> DType {
        self.dtype.unwrap_or(DType::F32)
    }
}
