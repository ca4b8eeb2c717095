//! Steps of training: gradients, projection, Adam, unit rows.
//!
//! The authors normalise the rows of the decoder between the backward pass and the optimiser's
//! step, which leaves them slightly off length one. Here the order is: project the gradient,
//! step, normalise.

use super::Autoencoder;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{
    AdamW, AdamWOptions, AutoencoderWeights, Tensor, Var, autoencoder_gradients, reject_rows,
    unit_rows,
};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Where the decoder's bias starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Centre {
    /// At zero.
    #[default]
    Zero,
    /// At the geometric median of the first batches.
    GeometricMedian,
}

/// How an autoencoder is trained; the defaults are the authors' for GPT-2 small.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainingOptions {
    /// `λ`.
    pub sparsity: f64,
    /// Learning rate after the warm-up.
    pub rate: f64,
    /// Adam's decay of the mean of the gradient.
    pub beta1: f64,
    /// Adam's decay of the mean of its square.
    pub beta2: f64,
    /// Activations of a step.
    pub batch: usize,
    /// Steps.
    pub steps: u64,
    /// Steps of warm-up from a tenth of the rate, at the start and after each resampling.
    pub warm_up: u64,
    /// Batches that the buffer holds.
    pub buffer_batches: usize,
    /// Steps between resamplings of dead features.
    pub resample_every: u64,
    /// Most resamplings.
    pub resamplings: u32,
    /// A feature is dead when it is active in at most this share of activations, counted over
    /// the second half of the steps between resamplings.
    pub dead_frequency: f64,
    /// Batches among which resampled features find their example.
    pub resample_batches: usize,
    /// Where the decoder's bias starts.
    pub centre: Centre,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        Self {
            sparsity: 1.0,
            rate: 1.2e-3,
            beta1: 0.0,
            beta2: 0.9999,
            batch: 4096,
            steps: 100_000,
            warm_up: 1000,
            buffer_batches: 384,
            resample_every: 25_000,
            resamplings: 4,
            dead_frequency: 1e-6,
            resample_batches: 100,
            centre: Centre::Zero,
        }
    }
}

impl TrainingOptions {
    /// Refuses what cannot train.
    pub fn validate(&self) -> Result<()> {
        let positive =
            |what: &str, value: f64, least: f64| match value.is_finite() && value >= least {
                true => Ok(()),
                false => Err(Error::invalid(
                    what,
                    value,
                    format!("a number of at least {least}"),
                )),
            };
        positive("sparsity", self.sparsity, 0.0)?;
        positive("rate", self.rate, 0.0)?;
        positive("dead frequency", self.dead_frequency, 0.0)?;
        for (what, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::invalid(what, beta, "at least 0 and below 1"));
            }
        }
        for (what, count, most) in [
            ("batch", self.batch, 1 << 24),
            ("buffer batches", self.buffer_batches, 1 << 20),
            ("resample batches", self.resample_batches, 1 << 20),
        ] {
            if count == 0 || count > most {
                return Err(Error::invalid(what, count, format!("between 1 and {most}")));
            }
        }
        if self.resample_every == 0 {
            return Err(Error::invalid("steps between resamplings", 0, "at least 1"));
        }
        Ok(())
    }

    /// The rate of a step, `since` steps after the start or the last resampling: from a tenth,
    /// along half a cosine.
    pub fn rate_after(&self, since: u64) -> f64 {
        if since >= self.warm_up {
            return self.rate;
        }
        let way = since as f64 / self.warm_up as f64;
        self.rate * (0.1 + 0.9 * 0.5 * (1.0 - (PI * way).cos()))
    }
}

/// What one step found, before it changed anything.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Step {
    /// `‖x̂ − x‖²`, mean over the batch.
    pub squared_error: f64,
    /// `Σ f`, mean over the batch.
    pub activation: f64,
    /// Active features, mean over the batch.
    pub active: f64,
    /// The learning rate.
    pub rate: f64,
}

/// An autoencoder in training.
#[derive(Debug)]
pub struct Training {
    site: String,
    pub(super) variables: Variables,
    pub(super) optimiser: AdamW,
    options: TrainingOptions,
    step: u64,
    /// Step at which the warm-up last started.
    pub(super) warm_since: u64,
    pub(super) resampled: u32,
    /// Activations seen since the counts were last cleared, and in how many of them each feature
    /// was active.
    pub(super) counted: u64,
    pub(super) active: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Variables {
    pub(super) encoder: Var,
    pub(super) encoder_bias: Var,
    pub(super) decoder: Var,
    pub(super) decoder_bias: Var,
}

impl Variables {
    /// In the order in which the optimiser has them, and whether each has a row for each feature.
    pub(super) fn in_order(&self) -> [(&Var, bool); 4] {
        [
            (&self.encoder, true),
            (&self.encoder_bias, true),
            (&self.decoder, true),
            (&self.decoder_bias, false),
        ]
    }

    fn weights(&self) -> AutoencoderWeights<'_> {
        AutoencoderWeights {
            encoder: &self.encoder,
            encoder_bias: &self.encoder_bias,
            decoder: &self.decoder,
            decoder_bias: &self.decoder_bias,
        }
    }
}

impl Training {
    /// Starts from an autoencoder, whose decoder's rows are brought to length one.
    ///
    /// # Errors
    /// When the options cannot train.
    pub fn new(autoencoder: &Autoencoder, options: TrainingOptions) -> Result<Self> {
        options.validate()?;
        // A variable of a tensor that is one already would share its storage.
        let variable = |tensor: &Tensor| engine(Var::from_tensor(&engine(tensor.copy())?.detach()));
        let weights = autoencoder.weights();
        let variables = Variables {
            encoder: variable(weights.encoder)?,
            encoder_bias: variable(weights.encoder_bias)?,
            decoder: variable(&unit_rows(weights.decoder)?)?,
            decoder_bias: variable(weights.decoder_bias)?,
        };
        let adam = AdamWOptions {
            learning_rate: options.rate,
            beta1: options.beta1,
            beta2: options.beta2,
            epsilon: 1e-8,
            weight_decay: 0.0,
        };
        let parameters = variables.in_order().map(|(variable, _)| variable.clone());
        Ok(Self {
            site: autoencoder.site().to_owned(),
            optimiser: AdamW::new(parameters.to_vec(), adam)?,
            active: vec![0; autoencoder.features()],
            variables,
            options,
            step: 0,
            warm_since: 0,
            resampled: 0,
            counted: 0,
        })
    }

    /// The options.
    pub fn options(&self) -> &TrainingOptions {
        &self.options
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// One step on `x` `[rows, width]`.
    ///
    /// # Errors
    /// When the shape does not fit, or the loss is not a number.
    pub fn step(&mut self, x: &Tensor) -> Result<Step> {
        if self
            .step
            .is_multiple_of((self.options.resample_every / 2).max(1))
        {
            self.forget_counts();
        }
        let x = engine(x.to_dtype(self.variables.encoder.dtype()))?;
        let found = autoencoder_gradients(&x, self.variables.weights(), self.options.sparsity)?;
        let loss = found.squared_error + self.options.sparsity * found.activation;
        if !loss.is_finite() {
            let what = format!("loss of step {}", self.step);
            return Err(Error::invalid(what, loss, "finite; lower the rate"));
        }
        let rate = self.options.rate_after(self.step - self.warm_since);
        let decoder = reject_rows(&found.decoder, &self.variables.decoder)?;
        let gradients = [
            found.encoder,
            found.encoder_bias,
            decoder,
            found.decoder_bias,
        ];
        self.optimiser.step_with(&gradients, rate)?;
        let decoder = unit_rows(&self.variables.decoder)?;
        engine(self.variables.decoder.set(&decoder))?;
        self.step += 1;
        let rows = x.dims().first().copied().unwrap_or(0);
        self.counted += rows as u64;
        let mut active = 0u64;
        for (total, count) in self.active.iter_mut().zip(&found.active) {
            *total += u64::from(*count);
            active += u64::from(*count);
        }
        Ok(Step {
            squared_error: found.squared_error,
            activation: found.activation,
            active: active as f64 / rows.max(1) as f64,
            rate,
        })
    }

    /// Features that were active in at most [`TrainingOptions::dead_frequency`] of the
    /// activations counted.
    pub fn dead(&self) -> Vec<usize> {
        let most = self.options.dead_frequency * self.counted as f64;
        let each = self.active.iter().enumerate();
        each.filter(|(_, count)| **count as f64 <= most)
            .map(|(feature, _)| feature)
            .collect()
    }

    /// Whether dead features are to be resampled before the next step.
    pub fn resampling_is_due(&self) -> bool {
        let every = self.options.resample_every;
        // Resampled features need time to learn before the end.
        let time_left = self.step + every / 2 < self.options.steps;
        self.step > 0
            && self.step.is_multiple_of(every)
            && self.resampled < self.options.resamplings
            && time_left
    }

    pub(super) fn forget_counts(&mut self) {
        self.counted = 0;
        self.active.fill(0);
    }

    /// The autoencoder as it is now.
    pub fn autoencoder(&self) -> Result<Autoencoder> {
        let copy = |variable: &Var| Ok::<_, Error>(engine(variable.as_tensor().copy())?.detach());
        Autoencoder::new(
            self.site.clone(),
            copy(&self.variables.encoder)?,
            copy(&self.variables.encoder_bias)?,
            copy(&self.variables.decoder)?,
            copy(&self.variables.decoder_bias)?,
        )
    }

    /// Moves the decoder's bias.
    pub fn set_centre(&mut self, centre: &Tensor) -> Result<()> {
        let centre = engine(centre.to_dtype(self.variables.decoder_bias.dtype()))?;
        engine(self.variables.decoder_bias.set(&centre))
    }
}
