//! From a model and windows of tokens to a trained autoencoder.

use super::training::{Centre, Step, Training, TrainingOptions};
use super::{ActivationBuffer, Autoencoder, geometric_median};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_model::Model;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Batches that the geometric median is taken of.
const CENTRE_BATCHES: usize = 4;

/// How far a training is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// What the last one found.
    pub last: Step,
    /// Features resampled just before this step.
    pub resampled: usize,
    /// Activations read so far, resampling's included.
    pub activations: u64,
}

/// A trained autoencoder and how it came about.
#[derive(Clone, Debug)]
pub struct TrainedAutoencoder {
    /// The autoencoder.
    pub autoencoder: Autoencoder,
    /// What each step found.
    pub history: Vec<Step>,
    /// Activations read, resampling's included.
    pub activations: u64,
    /// Features resampled, at each resampling.
    pub resampled: Vec<usize>,
}

/// Trains an autoencoder of `features` features on what `model` writes at `site` while it reads
/// `windows`. `progress` hears of every step. Training ends early when the windows do.
///
/// # Errors
/// When the options cannot train, the site is not there, there are no windows, or the loss is not
/// a number.
pub fn train(
    model: &Model,
    site: &str,
    features: usize,
    windows: impl Iterator<Item = Vec<u32>>,
    options: &TrainingOptions,
    generator: &mut ChaCha8Rng,
    mut progress: impl FnMut(&Progress),
) -> Result<TrainedAutoencoder> {
    options.validate()?;
    let capacity = options.batch.saturating_mul(options.buffer_batches);
    let shuffles = ChaCha8Rng::seed_from_u64(generator.next_u64());
    let mut buffer = ActivationBuffer::new(model, site, windows, capacity, shuffles)?;
    let initial = Autoencoder::initialised(site, buffer.width(), features, generator)?;
    let mut training = Training::new(&initial, options.clone())?;
    let (mut history, mut resampled, mut activations) = (Vec::new(), Vec::new(), 0u64);
    if options.centre == Centre::GeometricMedian {
        let first = several(&mut buffer, options.batch, CENTRE_BATCHES, &mut activations)?;
        training.set_centre(&geometric_median(&first)?)?;
    }
    while training.steps() < options.steps {
        let mut changed = 0;
        let dead = match training.resampling_is_due() {
            true => training.dead(),
            false => Vec::new(),
        };
        if !dead.is_empty() {
            let count = options.resample_batches;
            let examples = several(&mut buffer, options.batch, count, &mut activations)?;
            changed = training.resample(&examples, &dead, generator)?.len();
            resampled.push(changed);
        }
        let Some(batch) = buffer.next_batch(options.batch)? else {
            break;
        };
        activations += engine(batch.dim(0))? as u64;
        let last = training.step(&batch)?;
        history.push(last);
        progress(&Progress {
            step: training.steps(),
            steps: options.steps,
            last,
            resampled: changed,
            activations,
        });
    }
    if history.is_empty() {
        return Err(Error::invalid("windows to train on", "none", "at least 1"));
    }
    Ok(TrainedAutoencoder {
        autoencoder: training.autoencoder()?,
        history,
        activations,
        resampled,
    })
}

/// Several batches as one.
fn several<W: Iterator<Item = Vec<u32>>>(
    buffer: &mut ActivationBuffer<'_, W>,
    batch: usize,
    count: usize,
    activations: &mut u64,
) -> Result<Tensor> {
    let mut batches = Vec::new();
    for _ in 0..count {
        match buffer.next_batch(batch)? {
            Some(more) => batches.push(more),
            None => break,
        }
    }
    if batches.is_empty() {
        return Err(Error::invalid("windows to train on", "none", "at least 1"));
    }
    let all = engine(Tensor::cat(&batches, 0))?;
    *activations += engine(all.dim(0))? as u64;
    Ok(all)
}
