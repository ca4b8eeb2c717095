//! The training loop, a step at a time.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Device, Recomputation, Tensor, backward};
use lapidary_model::{Initialiser, Model, Pass};
use lapidary_parts::parameters::ParameterSource;
use lapidary_signal::Trace;
use rand::Rng;

use crate::data::{Batch, Masked, Task};
use crate::loss::{batch_loss, batch_loss_in_chunks};
use crate::state::TrainingState;
use crate::{
    Error, Generator, GeneratorState, Gradients, Masks, Result, Schedule, TrainSpec, UpdateOptions,
    Updates, generator,
};

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss over the step's counted tokens, in nats.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Tokens read.
    pub tokens: u64,
}

/// A model under training.
pub struct Trainer {
    spec: TrainSpec,
    schedule: Schedule,
    model: Model,
    updates: Updates,
    training: Box<dyn Task>,
    validation: Box<dyn Task>,
    generator: Generator,
    step: u64,
}

impl Trainer {
    /// A new model, with initial values from the spec's seed.
    ///
    /// # Errors
    /// When the spec is invalid or the tasks have tokens that the model does not.
    pub fn new(
        spec: TrainSpec,
        training: Box<dyn Task>,
        validation: Box<dyn Task>,
        device: &Device,
    ) -> Result<Self> {
        let mut source = Initialiser::new(spec.seed, DType::F32, device.clone());
        Self::with_source(spec, &mut source, training, validation)
    }

    /// A model whose training starts from the parameters that `source` gives.
    pub fn with_source(
        spec: TrainSpec,
        source: &mut dyn ParameterSource,
        training: Box<dyn Task>,
        validation: Box<dyn Task>,
    ) -> Result<Self> {
        spec.validate()?;
        if spec.self_distillation.is_some() {
            return Err(Error::Setting {
                name: "self_distillation",
                found: "given".into(),
                expected: "absent where tokens are named; a Distiller takes images",
            });
        }
        for task in [&training, &validation] {
            spec.check_vocabulary(task.vocabulary())?;
        }
        let hiding = |task: Box<dyn Task>| -> Box<dyn Task> {
            match spec.masking {
                Some(masking) => Box::new(Masked::new(task, masking)),
                None => task,
            }
        };
        let (training, validation) = (hiding(training), hiding(validation));
        let model =
            Model::trainable(spec.model.clone(), source).map_err(lapidary_model::Error::from)?;
        let options = UpdateOptions {
            optimiser: spec.optimiser,
            peak: spec.schedule.peak,
            clip: spec.clip,
            average: spec.average,
            groups: spec.groups.clone(),
        };
        let updates = Updates::new(&model, &options)?;
        Ok(Self {
            schedule: spec.schedule(),
            generator: generator(spec.seed),
            spec,
            model,
            updates,
            training,
            validation,
            step: 0,
        })
    }

    /// The model as it is; with a moving average, the parameters of the last step.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// What the run was told.
    pub fn spec(&self) -> &TrainSpec {
        &self.spec
    }

    /// Sets what is masked to zero and keeps it there in all further steps, through momentum and
    /// decay; see [`Updates::set_masks`].
    ///
    /// # Errors
    /// When a mask is of no parameter, or of another shape.
    pub fn set_masks(&mut self, masks: Masks) -> Result<()> {
        self.updates.set_masks(masks)
    }

    /// Does one step.
    ///
    /// # Errors
    /// When the loss is not a number: the parameters are then those before the step.
    pub fn step(&mut self) -> Result<Step> {
        let rate = self.schedule.rate(self.step);
        let rows = self.spec.batch / self.spec.accumulate;
        let dropout_seed = self.generator.next_u64();
        let (draws, annealing) = self.spec.draws(self.step);
        let (mut loss, mut tokens, mut store) = (0.0, 0, None);
        let mut sum = Gradients::default();
        for part in 0..self.spec.accumulate {
            let batch = self
                .training
                .batch(&mut self.generator, rows, self.spec.length)?;
            tokens += (batch.rows * batch.length) as u64;
            let variables = self.updates.variables();
            let recomputes = self.spec.recompute || self.spec.loss_chunk.is_some();
            let recomputation = recomputes.then(|| Recomputation::of(variables));
            let alignment = self.spec.alignment.filter(|term| term.weight > 0.0);
            let streams = match alignment {
                Some(_) => Some(Trace::new().capture("blocks.*.{in,out}")?),
                None => None,
            };
            let pass = Pass {
                dropout_seed: Some(dropout_seed.wrapping_add(part as u64)),
                draw: draws.then(|| dropout_seed.wrapping_add(part as u64)),
                step: Some(self.step),
                annealing,
                recomputation: recomputation.as_ref().filter(|_| self.spec.recompute),
                trace: streams.as_ref(),
                ..Pass::default()
            };
            let mut value = self.loss(&batch, pass, recomputation.as_ref())?;
            // What is reported is the loss of the task alone.
            loss += number(&value)? / self.spec.accumulate as f64;
            if let (Some(term), Some(streams)) = (alignment, &streams) {
                value = term.added(value, streams, &self.model)?;
            }
            let mut gradients = backward(&value)?;
            if let Some(recomputation) = &recomputation {
                recomputation.add_to(&mut gradients)?;
            }
            if self.spec.accumulate > 1 {
                sum.accumulate(Gradients::take(&mut gradients, self.updates.variables()))?;
            }
            store = Some(gradients);
        }
        let mut store = store.ok_or(Error::Setting {
            name: "accumulate",
            found: "0".into(),
            expected: "at least 1",
        })?;
        if self.spec.accumulate > 1 {
            for (variable, gradient) in self.updates.variables().iter().zip(sum.tensors()) {
                if let Some(gradient) = gradient {
                    store.insert(variable.as_tensor(), gradient.clone());
                }
            }
        }
        if !loss.is_finite() {
            return Err(Error::Setting {
                name: "loss",
                found: format!("{loss} at step {}", self.step + 1),
                expected: match self.step {
                    0 => {
                        "finite before any step: what training begins with, or a number of the model's spec, is too \
                         large or too small"
                    }
                    _ => "finite; lower the learning rate, or clip",
                },
            });
        }
        let scale = 1.0 / self.spec.accumulate as f64;
        let norm = self.updates.step(&mut store, rate, scale)?;
        self.step += 1;
        Ok(Step {
            step: self.step,
            loss,
            gradient_norm: norm,
            rate,
            tokens,
        })
    }

    /// The loss of a batch, in chunks where the spec says so.
    fn loss(
        &self,
        batch: &Batch,
        pass: Pass<'_>,
        recomputation: Option<&Recomputation>,
    ) -> Result<Tensor> {
        match self.spec.loss_chunk.zip(recomputation) {
            Some((chunk, recomputation)) => {
                batch_loss_in_chunks(&self.model, batch, pass, chunk, recomputation)
            }
            None => batch_loss(&self.model, batch, pass),
        }
    }

    /// Mean loss on the validation task, in nats, always on the same batches; with a moving
    /// average, that of the averaged parameters.
    pub fn validate(&mut self) -> Result<f64> {
        self.updates.swap_average()?;
        let result = self.validation_loss();
        self.updates.swap_average()?;
        result
    }

    fn validation_loss(&mut self) -> Result<f64> {
        let mut generator = generator(self.spec.seed ^ VALIDATION_SEED);
        self.validation.seek(0);
        let (mut sum, mut counted) = (0.0, 0);
        for _ in 0..self.spec.validation.batches {
            let rows = self.spec.batch / self.spec.accumulate;
            let batch = self
                .validation
                .batch(&mut generator, rows, self.spec.length)?;
            let chunks = self.spec.loss_chunk.map(|_| Recomputation::of([]));
            let loss = self.loss(&batch, Pass::default(), chunks.as_ref())?;
            let loss = number(&loss.detach())?;
            sum += loss * batch.counted() as f64;
            counted += batch.counted();
        }
        Ok(sum / counted.max(1) as f64)
    }

    /// The trained parameters, averaged where the spec says so, as a model that is no longer
    /// trainable.
    pub fn finished(&mut self) -> Result<Model> {
        self.updates.swap_average()?;
        let parameters = self.updates.parameters();
        self.updates.swap_average()?;
        let mut parameters = parameters?;
        Ok(Model::new(self.spec.model.clone(), &mut parameters)
            .map_err(lapidary_model::Error::from)?)
    }

    /// Everything that is needed to go on from here bit for bit.
    pub fn state(&self) -> Result<TrainingState> {
        let mut tensors = BTreeMap::new();
        let mut positions = BTreeMap::from([("training".to_owned(), self.training.position())]);
        self.updates.save(&mut tensors, &mut positions)?;
        Ok(TrainingState {
            step: self.step,
            generators: BTreeMap::from([(
                "training".to_owned(),
                GeneratorState::of(&self.generator),
            )]),
            positions,
            settings: self.spec.settings()?,
            tensors,
        })
    }

    /// Goes on from a state of the same run.
    ///
    /// # Errors
    /// When the state is of a run with other settings, or does not fit the model.
    pub fn resume(&mut self, state: &TrainingState) -> Result<()> {
        self.spec.check_settings(&state.settings)?;
        self.updates
            .restore(&state.tensors, &state.positions, state.step)?;
        if let Some(generator) = state.generators.get("training") {
            self.generator = generator.restore();
        }
        self.training
            .seek(state.positions.get("training").copied().unwrap_or(0));
        self.step = state.step;
        Ok(())
    }
}

/// Keeps the draws of validation apart from those of training.
const VALIDATION_SEED: u64 = 0x5eed_0f7a_11da_7e00;

fn number(scalar: &Tensor) -> Result<f64> {
    let scalar = scalar
        .to_dtype(DType::F64)
        .and_then(|scalar| scalar.to_scalar::<f64>());
    Ok(scalar.map_err(lapidary_kernels::Error::from)?)
}
