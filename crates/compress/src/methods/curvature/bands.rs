//! How much of what a layer does with a text lies along directions of which curvature.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_factor::{Matrix, matrix_from_tensor};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Model;

use super::{Curved, Factors, Keep, select};
use crate::edit::{Edit, block_of};
use crate::error::engine;
use crate::observe::observe;
use crate::{CalibrationData, Error, Result};

impl Curved {
    /// Of inputs with the second moment `E[x xᵀ]`, `[input, input]`, the share of what the weight
    /// makes of them that each band of its directions makes:
    ///
    /// ```text
    /// E‖W_b x‖² / E‖W x‖²,     W_b = U (C ⊙ 1_b) Vᵀ
    /// ```
    ///
    /// `masses` rise between 0 and 1 and cut the directions, most curvature first, into one band
    /// more: the first has those that [`Keep::Staircase`] keeps of the first mass, the last those
    /// that it takes away of the last mass. On the inputs that the factors were taken from, the
    /// shares sum to 1; on others what bands make of an input need not be orthogonal.
    ///
    /// # Errors
    /// When masses do not rise within 0 and 1, or the moment is of another size.
    pub fn band_shares(&self, inputs: &Tensor, masses: &[f64]) -> Result<Vec<f64>> {
        check_masses(masses)?;
        let moment = matrix_from_tensor("second moment of the inputs", inputs)?;
        let (rows, columns) = (self.coefficients.nrows(), self.coefficients.ncols());
        if (moment.nrows(), moment.ncols()) != (columns, columns) {
            return Err(Error::invalid(
                "second moment of the inputs",
                format!("{} by {}", moment.nrows(), moment.ncols()),
                format!("{columns} by {columns}, as the layer reads"),
            ));
        }
        // In the eigenbasis of the inputs; that of the outputs keeps lengths.
        let moment = self.inputs.transpose() * &moment * &self.inputs;
        let energy = |coefficients: &Matrix| -> f64 {
            let mapped = coefficients * &moment;
            let row = |i: usize| {
                (0..columns)
                    .map(|j| coefficients[(i, j)] * mapped[(i, j)])
                    .sum::<f64>()
            };
            (0..rows).map(row).sum()
        };
        let whole = energy(&self.coefficients).max(f64::MIN_POSITIVE);
        let ends = masses.iter().copied().chain([1.0]);
        let mut from = vec![0; rows];
        let mut shares = Vec::with_capacity(masses.len() + 1);
        for mass in ends {
            let to = select::staircase(&self.output_curvature, &self.input_curvature, mass);
            let band = Matrix::from_fn(rows, columns, |i, j| match (from[i]..to[i]).contains(&j) {
                true => self.coefficients[(i, j)],
                false => 0.0,
            });
            shares.push(energy(&band) / whole);
            from = to;
        }
        Ok(shares)
    }
}

fn check_masses(masses: &[f64]) -> Result<()> {
    let rise = masses.is_sorted_by(|a, b| a < b);
    let inside = masses.iter().all(|mass| 0.0 < *mass && *mass < 1.0);
    match rise && inside {
        true => Ok(()),
        false => Err(Error::invalid(
            "masses between bands",
            format!("{masses:?}"),
            "rising, each above 0 and below 1",
        )),
    }
}

/// The weights of a model's feed-forward parts in the bases of their curvature.
pub struct Spectrum {
    layers: BTreeMap<String, Curved>,
}

impl Spectrum {
    /// Decomposes the weight of each layer that there are factors of, once for any number of edits
    /// and texts.
    ///
    /// # Errors
    /// When a layer has no dense weight, or its factors do not fit.
    pub fn of(model: &Model, factors: &BTreeMap<String, Factors>) -> Result<Self> {
        let edit = Edit::of(model);
        let mut layers = BTreeMap::new();
        for (path, factors) in factors {
            let weight = edit.get(&format!("{path}.weight"))?;
            layers.insert(path.clone(), Curved::new(&weight, factors)?);
        }
        Ok(Self { layers })
    }

    /// The layers, by their paths.
    pub fn layers(&self) -> &BTreeMap<String, Curved> {
        &self.layers
    }

    /// The model with what `keep` keeps of each layer's curvature.
    ///
    /// # Errors
    /// When the model is not the one that was decomposed.
    pub fn edited(&self, model: &Model, mass: f64, keep: Keep) -> Result<Model> {
        let mut edit = Edit::of(model);
        for (path, curved) in &self.layers {
            let weight = curved.edited(&curved.kept(mass, keep))?;
            edit.put(
                format!("{path}.weight"),
                &engine(weight.to_device(&model.device()))?,
            )?;
        }
        edit.finish()
    }

    /// How much of each layer's squared norm such an edit takes away, by paths: what a
    /// [`Subnet`](super::Subnet) of the same size may clear.
    pub fn removed(&self, mass: f64, keep: Keep) -> BTreeMap<String, f64> {
        let each = self.layers.iter();
        each.map(|(path, curved)| (path.clone(), curved.removed(&curved.kept(mass, keep))))
            .collect()
    }

    /// The shares of bands ([`Curved::band_shares`]) of each layer, on what it reads at every real
    /// token of a text.
    ///
    /// # Errors
    /// Those of [`Curved::band_shares`], and of running the model.
    pub fn shares(
        &self,
        model: &Model,
        data: &CalibrationData,
        batch: usize,
        masses: &[f64],
    ) -> Result<BTreeMap<String, Vec<f64>>> {
        check_masses(masses)?;
        let moments = self.moments(model, data, batch)?;
        let mut shares = BTreeMap::new();
        for (path, curved) in &self.layers {
            if let Some(moment) = moments.get(&site(path)) {
                shares.insert(path.clone(), curved.band_shares(moment, masses)?);
            }
        }
        Ok(shares)
    }

    /// `E[x xᵀ]` at the sites that the layers read.
    fn moments(
        &self,
        model: &Model,
        data: &CalibrationData,
        batch: usize,
    ) -> Result<BTreeMap<String, Tensor>> {
        let sites: BTreeSet<String> = self.layers.keys().map(|path| site(path)).collect();
        let sites: Vec<String> = sites.into_iter().collect();
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut tokens = 0usize;
        observe(model, data, batch, &sites, |seen| {
            for (index, site) in sites.iter().enumerate() {
                let rows = engine(seen.rows(site)?.to_dtype(DType::F64))?;
                tokens += if index == 0 { engine(rows.dim(0))? } else { 0 };
                let gram = engine(engine(rows.t())?.matmul(&rows))?;
                let sum = match sums.remove(site) {
                    Some(before) => engine(before + gram)?,
                    None => gram,
                };
                sums.insert(site.clone(), sum);
            }
            Ok(())
        })?;
        let scale = 1.0 / tokens.max(1) as f64;
        let mean = |(site, sum): (String, Tensor)| {
            let moment = engine(sum.affine(scale, 0.0))?;
            Ok((site, engine(moment.to_device(&Device::Cpu))?))
        };
        sums.into_iter().map(mean).collect()
    }
}

/// The site that the layer at `path` of a feed-forward part reads.
fn site(path: &str) -> String {
    let (part, name) = path.rsplit_once('.').unwrap_or((path, ""));
    match name {
        "down" => format!("{part}.hidden"),
        _ => format!("{part}.in"),
    }
}

/// The blocks of some layers, each once.
pub(super) fn blocks<'a>(paths: impl Iterator<Item = &'a String>) -> Vec<usize> {
    let blocks: BTreeSet<usize> = paths
        .filter_map(|path| block_of(path).map(|(block, _)| block))
        .collect();
    blocks.into_iter().collect()
}

/// Pearson's correlation of numbers in pairs; nothing for fewer than two pairs, or where either
/// side does not vary.
///
/// ```
/// use lapidary_compress::curvature::correlation;
/// assert_eq!(correlation(&[1.0, 2.0, 4.0], &[3.0, 5.0, 9.0]), Some(1.0));
/// assert_eq!(correlation(&[1.0, 1.0], &[3.0, 5.0]), None);
/// ```
pub fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let count = a.len().min(b.len());
    if count < 2 {
        return None;
    }
    let mean = |x: &[f64]| x.iter().take(count).sum::<f64>() / count as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut both, mut only_a, mut only_b) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        both += a * b;
        only_a += a * a;
        only_b += b * b;
    }
    let spread = (only_a * only_b).sqrt();
    (spread > 0.0).then(|| (both / spread).clamp(-1.0, 1.0))
}
