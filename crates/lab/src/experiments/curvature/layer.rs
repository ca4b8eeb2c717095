//! The weights that are edited, and the ways to take as much of each away.

use crate::Result;
use crate::error::engine;
use lapidary_compress::curvature::{Curved, Keep, Spectrum};
use lapidary_factor::{Svd, matrix_from_tensor, matrix_to_tensor, thin_svd};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Model;
use lapidary_train::Generator;
use rand::seq::SliceRandom;

/// One weight, in the basis of its curvature and by its singular values.
pub(super) struct Layer<'a> {
    pub(super) path: String,
    pub(super) weight: Tensor,
    pub(super) curved: &'a Curved,
    svd: Svd,
}

/// The weights that are edited.
pub(super) fn layers<'a>(model: &Model, spectrum: &'a Spectrum) -> Result<Vec<Layer<'a>>> {
    let mut layers = Vec::new();
    for (path, curved) in spectrum.layers() {
        let Some(weight) = model.parameters().get(&format!("{path}.weight")) else {
            continue;
        };
        let weight = engine(weight.detach().to_dtype(DType::F64))?;
        layers.push(Layer {
            curved,
            svd: thin_svd(matrix_from_tensor("weight", &weight)?.as_ref())?,
            path: path.clone(),
            weight,
        });
    }
    Ok(layers)
}

impl Layer<'_> {
    pub(super) fn curved(&self, mass: f64, keep: Keep) -> Result<Tensor> {
        Ok(self.curved.edited(&self.curved.kept(mass, keep))?)
    }

    /// `‖W − W'‖²` of the edit.
    pub(super) fn removed(&self, mass: f64) -> f64 {
        self.curved
            .removed(&self.curved.kept(mass, Keep::Staircase))
    }

    /// The truncation whose removed part is nearest to the edit's in size.
    pub(super) fn truncated(&self, mass: f64) -> Result<Tensor> {
        let wanted = self.removed(mass);
        let off = |rank: &usize| (self.svd.discarded_energy(*rank) - wanted).abs();
        let rank = (0..=self.svd.s.len()).min_by(|a, b| off(a).total_cmp(&off(b)));
        let product = self.svd.truncated_product(rank.unwrap_or(0));
        Ok(matrix_to_tensor(
            product.as_ref(),
            DType::F64,
            &Device::Cpu,
        )?)
    }

    /// Random directions of the same basis, until as much is removed.
    pub(super) fn scattered(&self, mass: f64, generator: &mut Generator) -> Result<Tensor> {
        let mut energies = self.curved.energies();
        energies.shuffle(generator);
        let removed = filling(&energies, self.removed(mass));
        Ok(self.curved.without(&removed)?)
    }
}

/// Pairs of directions in their order as long as their energies sum to at most `wanted`; one that is
/// too large for what is left is passed over, so that large ones early do not end the filling.
fn filling(energies: &[(usize, usize, f64)], wanted: f64) -> Vec<(usize, usize)> {
    let mut sum = 0.0;
    let mut filled = Vec::new();
    for &(row, column, energy) in energies {
        if sum + energy <= wanted {
            sum += energy;
            filled.push((row, column));
        }
    }
    filled
}

/// The model with each layer's weight replaced.
pub(super) fn with(
    model: &Model,
    layers: &[Layer<'_>],
    mut weight: impl FnMut(&Layer<'_>) -> Result<Tensor>,
) -> Result<Model> {
    let mut parameters = model.parameters().clone();
    for layer in layers {
        let weight = engine(weight(layer)?.to_dtype(model.dtype()))?;
        parameters.insert(format!("{}.weight", layer.path), weight);
    }
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_is_passed_over() {
        let energies = [(0, 0, 1.0), (0, 1, 5.0), (1, 0, 1.0), (1, 1, 0.5)];
        assert_eq!(filling(&energies, 3.0), [(0, 0), (1, 0), (1, 1)]);
        assert_eq!(filling(&energies, 7.5).len(), 4);
        assert!(filling(&energies, 0.0).is_empty());
    }
}
