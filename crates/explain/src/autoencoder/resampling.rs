//! New directions for dead features, and the geometric median.

use super::numbers;
use super::training::Training;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{OptimiserState, Tensor, Var};
use rand::Rng;
use rand::seq::index::sample_weighted;

/// The encoder of a resampled feature is this much shorter than those of living ones.
const ENCODER_SCALE: f64 = 0.2;

impl Training {
    /// Gives `dead` features new directions (Bricken et al. 2023, as the authors do): examples are
    /// drawn from `x` `[rows, width]` without replacement, with probability in proportion to the
    /// square of their squared error; a feature's decoder row becomes the direction of
    /// `x − b_d`, its encoder the same at 0.2 of the mean length of living encoders, its bias and
    /// its entries in the optimiser's memory zero. The warm-up starts again.
    ///
    /// Gives the features that got an example: all, unless there are more features than examples
    /// with an error.
    ///
    /// # Errors
    /// When shapes do not fit, or an error is not a number.
    pub fn resample(
        &mut self,
        x: &Tensor,
        dead: &[usize],
        generator: &mut impl Rng,
    ) -> Result<Vec<usize>> {
        self.resampled += 1;
        self.warm_since = self.steps();
        let autoencoder = self.autoencoder()?;
        let error = engine(
            autoencoder.reconstruct(x)? - engine(x.to_dtype(self.variables.encoder.dtype()))?,
        )?;
        let losses = numbers(&engine(engine(error.sqr())?.sum(1))?)?;
        let possible = losses.iter().filter(|loss| **loss > 0.0).count();
        let drawn = sample_weighted(
            generator,
            losses.len(),
            |row| losses.get(row).map_or(0.0, |loss| loss * loss),
            dead.len().min(possible),
        )
        .map_err(|error| Error::invalid("errors to draw examples by", error, "finite numbers"))?;
        let (width, values) = (autoencoder.width(), numbers(x)?);
        let centre = numbers(&self.variables.decoder_bias)?;
        let length = self.living_length(dead)? * ENCODER_SCALE;
        let mut changes = Vec::new();
        for (feature, row) in dead.iter().zip(drawn) {
            let example = values.get(row * width..(row + 1) * width).unwrap_or(&[]);
            let centred: Vec<f64> = example.iter().zip(&centre).map(|(x, b)| x - b).collect();
            let norm = centred.iter().map(|v| v * v).sum::<f64>().sqrt();
            if norm > 0.0 {
                changes.push((
                    *feature,
                    centred.iter().map(|v| v / norm).collect::<Vec<_>>(),
                ));
            }
        }
        set_rows(&self.variables.decoder, &changes)?;
        let scaled = |(feature, row): &(usize, Vec<f64>)| {
            (
                *feature,
                row.iter().map(|v| v * length).collect::<Vec<f64>>(),
            )
        };
        set_rows(
            &self.variables.encoder,
            &changes.iter().map(scaled).collect::<Vec<_>>(),
        )?;
        let features: Vec<usize> = changes.iter().map(|(feature, _)| *feature).collect();
        let zeros: Vec<(usize, Vec<f64>)> = features.iter().map(|f| (*f, vec![0.0])).collect();
        set_rows(&self.variables.encoder_bias, &zeros)?;
        self.forget_moments(&features)?;
        self.forget_counts();
        Ok(features)
    }

    /// Mean length of the encoder rows that are not among `dead`; 1 when there are none.
    fn living_length(&self, dead: &[usize]) -> Result<f64> {
        let squares = engine(engine(self.variables.encoder.sqr())?.sum(1))?;
        let mut is_dead = vec![false; self.active.len()];
        for feature in dead {
            if let Some(flag) = is_dead.get_mut(*feature) {
                *flag = true;
            }
        }
        let lengths: Vec<f64> = numbers(&squares)?
            .into_iter()
            .zip(is_dead)
            .filter(|(_, dead)| !dead)
            .map(|(square, _)| square.sqrt())
            .collect();
        match lengths.len() {
            0 => Ok(1.0),
            count => Ok(lengths.iter().sum::<f64>() / count as f64),
        }
    }

    /// Zeroes what the optimiser remembers of these features.
    fn forget_moments(&mut self, features: &[usize]) -> Result<()> {
        let OptimiserState { step, moments } = self.optimiser.state()?;
        let mut cleared = Vec::with_capacity(moments.len());
        for ((_, per_feature), moments) in self.variables.in_order().into_iter().zip(moments) {
            if !per_feature {
                cleared.push(moments);
                continue;
            }
            let clear = |moment: Tensor| {
                let width =
                    moment.elem_count() / moment.dims().first().copied().unwrap_or(1).max(1);
                let zeros: Vec<_> = features.iter().map(|f| (*f, vec![0.0; width])).collect();
                with_rows(&moment, &zeros)
            };
            cleared.push(moments.into_iter().map(clear).collect::<Result<_>>()?);
        }
        Ok(self.optimiser.load_state(&OptimiserState {
            step,
            moments: cleared,
        })?)
    }
}

/// A copy of `tensor` `[rows, ..]` with some rows replaced.
fn with_rows(tensor: &Tensor, rows: &[(usize, Vec<f64>)]) -> Result<Tensor> {
    let mut values = numbers(tensor)?;
    for (row, new) in rows {
        if let Some(place) = values.get_mut(row * new.len()..(row + 1) * new.len()) {
            place.copy_from_slice(new);
        }
    }
    let changed = engine(Tensor::from_vec(values, tensor.shape(), tensor.device()))?;
    engine(changed.to_dtype(tensor.dtype()))
}

fn set_rows(variable: &Var, rows: &[(usize, Vec<f64>)]) -> Result<()> {
    engine(variable.set(&with_rows(variable, rows)?))
}

/// The point whose distances to the rows of `x` `[rows, width]` have the least sum, `[width]`, by
/// Weiszfeld's iteration `m ← Σ x_i / d_i / Σ 1 / d_i` from the mean.
pub fn geometric_median(x: &Tensor) -> Result<Tensor> {
    const ITERATIONS: usize = 100;
    const TOLERANCE: f64 = 1e-6;
    let dims = x.dims().to_vec();
    let [rows, _] = dims.as_slice() else {
        let found = format!("{dims:?}");
        return Err(Error::invalid(
            "shape of the points",
            found,
            "[rows, width]",
        ));
    };
    if *rows == 0 {
        return Err(Error::invalid("number of points", 0, "at least 1"));
    }
    let mut median = engine(x.mean_keepdim(0))?;
    for _ in 0..ITERATIONS {
        let squares = engine(engine(engine(x.broadcast_sub(&median))?.sqr())?.sum_keepdim(1))?;
        // A point that is met has the weight of one very close by.
        let closeness = engine(engine(engine(squares.maximum(1e-12))?.sqrt())?.recip())?;
        let total = engine(closeness.sum_keepdim(0))?;
        let sum = engine(engine(x.broadcast_mul(&closeness))?.sum_keepdim(0))?;
        let next = engine(sum.broadcast_div(&total))?;
        let moved = numbers(&engine(&next - &median)?)?;
        let scale = numbers(&next)?.iter().map(|v| v * v).sum::<f64>().sqrt();
        median = next;
        if moved.iter().map(|v| v * v).sum::<f64>().sqrt() <= TOLERANCE * scale {
            break;
        }
    }
    engine(median.squeeze(0))
}
