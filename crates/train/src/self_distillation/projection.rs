//! From a feature vector to logits over prototypes.
//!
//! ```text
//! h = W₃ gelu(W₂ gelu(W₁ x + b₁) + b₂) + b₃,     g_k = v_k · h / (‖v_k‖ ‖h‖)
//! ```
//!
//! The last layer is weight-normalised (Salimans & Kingma 2016, arXiv 1602.07868) with all lengths 1, so that
//! logits are cosines: no output can win by its length.

use std::collections::BTreeMap;

use lapidary_kernels::{Activation, D, Tensor, Var, linear, linear_activation};
use lapidary_parts::parameters::{Init, ParameterSource};

use crate::error::engine;
use crate::{Error, Result};

/// The sizes of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectionSizes {
    /// Features that it reads.
    pub width: usize,
    /// Of both hidden layers.
    pub hidden: usize,
    /// Of the vector that is compared with prototypes.
    pub bottleneck: usize,
    /// Prototypes.
    pub outputs: usize,
}

/// Added to squared lengths, so that a vector of zeros has a gradient.
const LEAST: f64 = 1e-12;

/// Gives a parameter of a name and a shape.
type Make<'a> = dyn FnMut(&str, &[usize], Init) -> Result<Tensor> + 'a;

/// The layers.
#[derive(Clone, Debug)]
pub struct Projection {
    /// `W` and `b` of each layer.
    layers: Vec<(Tensor, Tensor)>,
    /// `v`, `[outputs, bottleneck]`.
    directions: Tensor,
}

/// The name of the prototypes' parameter.
pub(super) const DIRECTIONS: &str = "projection.prototypes.direction";

impl Projection {
    /// Layers whose parameters come from `source`, as `projection.…`.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    pub fn new(sizes: ProjectionSizes, source: &mut dyn ParameterSource) -> Result<Self> {
        Self::build(sizes, &mut |name, shape, init| {
            Ok(source
                .parameter(name, shape, init)
                .map_err(lapidary_model::Error::from)?)
        })
    }

    /// As [`Projection::new`], each parameter a variable, which are handed out by name.
    ///
    /// # Errors
    /// As there.
    pub fn trainable(
        sizes: ProjectionSizes,
        source: &mut dyn ParameterSource,
    ) -> Result<(Self, BTreeMap<String, Var>)> {
        let mut variables = BTreeMap::new();
        let built = Self::build(sizes, &mut |name, shape, init| {
            let start = source
                .parameter(name, shape, init)
                .map_err(lapidary_model::Error::from)?;
            let variable = engine(Var::from_tensor(&start))?;
            let tensor = variable.as_tensor().clone();
            variables.insert(name.to_owned(), variable);
            Ok(tensor)
        })?;
        Ok((built, variables))
    }

    fn build(sizes: ProjectionSizes, parameter: &mut Make<'_>) -> Result<Self> {
        let widths = [sizes.width, sizes.hidden, sizes.hidden, sizes.bottleneck];
        let mut layers = Vec::new();
        for (index, pair) in widths.windows(2).enumerate() {
            let [input, output] = [pair[0], pair[1]];
            let init = Init::Normal {
                deviation: 1.0 / (input.max(1) as f64).sqrt(),
            };
            let name = |part: &str| format!("projection.layers.{index}.{part}");
            let weight = parameter(&name("weight"), &[output, input], init)?;
            let bias = parameter(&name("bias"), &[output], Init::Zeros)?;
            layers.push((weight, bias));
        }
        let init = Init::Normal { deviation: 0.02 };
        let directions = parameter(DIRECTIONS, &[sizes.outputs, sizes.bottleneck], init)?;
        Ok(Self { layers, directions })
    }

    /// Logits `[rows, outputs]`, between −1 and 1, of features `[rows, width]`.
    ///
    /// # Errors
    /// When the features are not as wide as it reads.
    pub fn forward(&self, features: &Tensor) -> Result<Tensor> {
        if features.rank() != 2 {
            return Err(Error::Tensor {
                name: "features".to_owned(),
                detail: format!("shape {:?} has to be [rows, width]", features.dims()),
            });
        }
        let mut x = features.clone();
        for (index, (weight, bias)) in self.layers.iter().enumerate() {
            let activation = match index + 1 < self.layers.len() {
                true => Activation::Gelu,
                false => Activation::Identity,
            };
            x = linear_activation(&x, weight, Some(bias), activation)?;
        }
        Ok(linear(&unit(&x)?, &unit(&self.directions)?, None)?)
    }
}

/// Rows divided by their lengths.
fn unit(x: &Tensor) -> Result<Tensor> {
    let squares = engine(engine(x.sqr())?.sum_keepdim(D::Minus1))?;
    let lengths = engine(engine(squares + LEAST)?.sqrt())?;
    engine(x.broadcast_div(&lengths))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::check::gradient_error;
    use lapidary_kernels::{DType, Device};
    use lapidary_model::Initialiser;

    const SIZES: ProjectionSizes = ProjectionSizes {
        width: 5,
        hidden: 7,
        bottleneck: 3,
        outputs: 4,
    };

    fn source(seed: u64) -> Initialiser {
        Initialiser::new(seed, DType::F64, Device::Cpu)
    }

    fn features() -> Tensor {
        let numbers = (0..3 * 5).map(|i| f64::from(i * 7 % 11) / 5.0 - 1.0);
        Tensor::from_vec(numbers.collect(), (3, 5), &Device::Cpu).unwrap()
    }

    fn parameters() -> BTreeMap<String, Tensor> {
        let (_, variables) = Projection::trainable(SIZES, &mut source(3)).unwrap();
        let detached = |(name, variable): (String, Var)| (name, variable.as_tensor().detach());
        variables.into_iter().map(detached).collect()
    }

    fn logits(parameters: &mut BTreeMap<String, Tensor>) -> Vec<f64> {
        let projection = Projection::new(SIZES, parameters).unwrap();
        let logits = projection.forward(&features()).unwrap();
        assert_eq!(logits.dims(), [3, 4]);
        logits.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn logits_are_cosines_and_know_nothing_of_the_prototypes_lengths() {
        let mut parameters = parameters();
        let plain = logits(&mut parameters);
        assert!(plain.iter().all(|logit| logit.abs() <= 1.0 + 1e-9));
        let lengths = Tensor::new(&[[2.0f64], [0.5], [30.0], [7.0]], &Device::Cpu).unwrap();
        let longer = parameters[DIRECTIONS].broadcast_mul(&lengths).unwrap();
        parameters.insert(DIRECTIONS.to_owned(), longer);
        // But for what keeps a length of 0 from dividing.
        for (a, b) in plain.iter().zip(logits(&mut parameters)) {
            assert!((a - b).abs() < 1e-6);
        }
    }

    /// What does not depend on a length has no slope along it.
    #[test]
    fn the_gradient_of_a_prototype_stands_upright_on_it() {
        let (projection, variables) = Projection::trainable(SIZES, &mut source(4)).unwrap();
        let loss = projection.forward(&features()).unwrap();
        let gradients = loss.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let directions = variables[DIRECTIONS].as_tensor();
        let gradient = gradients.get(directions).unwrap();
        let along = (gradient * directions).unwrap().sum(1).unwrap();
        let size = gradient.sqr().unwrap().sum_all().unwrap().sqrt().unwrap();
        assert!(size.to_scalar::<f64>().unwrap() > 1e-3);
        for slope in along.to_vec1::<f64>().unwrap() {
            assert!(slope.abs() < 1e-6, "{slope}");
        }
    }

    #[test]
    fn gradients_equal_central_differences() {
        let parameters = parameters();
        let names: Vec<String> = parameters.keys().cloned().collect();
        // Prototypes far from zeros, where differences would be coarse.
        let scaled = |(name, tensor): (&String, &Tensor)| match name == DIRECTIONS {
            true => (tensor * 50.0).unwrap(),
            false => tensor.clone(),
        };
        let mut inputs: Vec<Tensor> = parameters.iter().map(scaled).collect();
        inputs.push(features());
        let forward = |x: &[Tensor]| {
            let (features, parameters) = x.split_last().unwrap();
            let named = names.iter().cloned().zip(parameters.iter().cloned());
            let mut named: BTreeMap<String, Tensor> = named.collect();
            let projection = Projection::new(SIZES, &mut named).unwrap();
            Ok(projection.forward(features).unwrap())
        };
        assert!(gradient_error(forward, &inputs).unwrap() < 1e-6);
    }
}
