//! A trained decoder, texts to choose directions by, and texts to measure on: what experiments on
//! narrower residual streams share.

use super::decoder::{self, Positions};
use super::texts::Sides;
use crate::error::engine;
use crate::{Error, Result, Scale};
use lapidary_compress::quality::{Window, perplexity, sliding_windows};
use lapidary_compress::slicing::{Directions, Sliced, slice};
use lapidary_compress::{
    AdapterSettings, CalibrationData, HealData, HealSettings, Recipe, Settings, Stage, heal,
};
use lapidary_kernels::{D, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_parts::norm::NormSpec;

/// Sequences in a forward pass.
pub const BATCH: usize = 16;

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Models trained.
    pub seeds: u64,
    /// Blocks of the decoder.
    pub blocks: usize,
    /// Width of its stream.
    pub width: usize,
    /// Steps of training.
    pub steps: u64,
    /// Texts that directions are chosen by.
    pub calibration: u64,
    /// Texts that are measured on.
    pub tests: u64,
    /// Steps of training that a narrowed decoder recovers by.
    pub recovery: u64,
}

impl Size {
    /// What each scale does.
    pub fn of(scale: Scale) -> Self {
        let full = Self {
            seeds: 3,
            blocks: 6,
            width: 192,
            steps: 3000,
            calibration: 128,
            tests: 200,
            recovery: 500,
        };
        match scale {
            Scale::Smoke => Self {
                seeds: 1,
                blocks: 1,
                width: 32,
                steps: 3,
                calibration: 4,
                tests: 4,
                recovery: 2,
            },
            Scale::Small => Self {
                seeds: 1,
                blocks: 3,
                width: 64,
                steps: 400,
                calibration: 48,
                tests: 48,
                recovery: 60,
            },
            Scale::Full => full,
        }
    }
}

/// A decoder with RMS norms and rotary positions, and its texts.
pub struct Setup {
    /// The decoder.
    pub model: Model,
    /// Texts to choose directions by.
    pub calibration: CalibrationData,
    /// Texts to measure on.
    pub tests: CalibrationData,
    windows: Vec<Window>,
}

impl Setup {
    /// Trains the decoder on a text.
    pub fn new(text: &Sides, size: &Size, seed: u64) -> Result<Self> {
        let vocabulary = text.training.vocabulary();
        let mut spec = Positions::Rotary.spec(vocabulary, size.width, size.blocks);
        let norm = NormSpec::Rms { epsilon: 1e-6 };
        spec.final_norm = Some(norm);
        for block in &mut spec.blocks {
            block.norm = norm;
        }
        let calibration = CalibrationData::windows(text.training.fixed_windows(size.calibration)?)?;
        let held_out = text.held_out.fixed_windows(size.tests)?;
        let mut windows = Vec::new();
        for tokens in &held_out {
            windows.extend(sliding_windows(
                tokens,
                decoder::LENGTH,
                decoder::LENGTH / 2,
            )?);
        }
        Ok(Self {
            model: decoder::train(spec, text.training.task(), size.steps, seed)?,
            calibration,
            tests: CalibrationData::windows(held_out)?,
            windows,
        })
    }

    /// Its stream cut to `width`.
    pub fn cut(&self, width: usize, shared: bool, by: &dyn Directions) -> Result<Sliced> {
        Ok(slice(
            &self.model,
            &self.calibration,
            width,
            shared,
            by,
            BATCH,
        )?)
    }

    /// The decoder compressed by a method that takes away `ratio` of what it works on.
    pub fn compress(&self, method: &str, ratio: f64, settings: &Settings) -> Result<Model> {
        let recipe = Recipe {
            stages: vec![Stage {
                method: method.to_owned(),
                ratio: Some(ratio),
                settings: None,
            }],
        };
        let mut done = recipe.run(&self.model, Some(&self.calibration), settings)?;
        match done.pop() {
            Some(last) => Ok(last.compressed.model),
            None => Err(Error::Experiment(format!("{method} did nothing"))),
        }
    }

    /// A narrowed decoder with adapters taken in that were trained for `steps` on the texts that
    /// directions were chosen by.
    pub fn recovered(
        &self,
        model: &Model,
        adapters: AdapterSettings,
        steps: u64,
        seed: u64,
    ) -> Result<Model> {
        let data = HealData {
            training: &self.calibration,
            validation: &self.calibration,
            teacher: None,
        };
        let settings = HealSettings {
            steps,
            rate: 1e-3,
            adapters: Some(adapters),
            seed,
            ..HealSettings::default()
        };
        Ok(heal(model, &data, &settings, |_, _| ())?.0)
    }

    /// Perplexity on texts that nothing was trained or chosen by.
    pub fn perplexity(&self, model: &Model) -> Result<f64> {
        Ok(perplexity(model, &self.windows, BATCH)?.value)
    }

    /// Share of next tokens that come first.
    pub fn accuracy(&self, model: &Model) -> Result<f64> {
        let (mut right, mut all) = (0, 0);
        for window in &self.windows {
            let tokens = &window.tokens;
            let ids = engine(Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu))?;
            let output = model.forward(&Input::tokens(ids), Pass::default())?;
            let logits = output.into_logits()?.into_value();
            let first: Vec<u32> =
                engine(engine(engine(logits.argmax(D::Minus1))?.squeeze(0))?.to_vec1())?;
            let pairs = first
                .iter()
                .zip(tokens.iter().skip(1))
                .skip(window.context - 1);
            for (found, expected) in pairs {
                right += usize::from(found == expected);
                all += 1;
            }
        }
        Ok(right as f64 / all.max(1) as f64)
    }
}

/// The width that is left of `width` when the share `sparsity` is cut.
pub fn left(width: usize, sparsity: f64) -> usize {
    ((1.0 - sparsity) * width as f64).round() as usize
}
