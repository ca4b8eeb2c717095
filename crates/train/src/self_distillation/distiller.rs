//! The training loop of a student and its teacher, a step at a time.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Device, Tensor, backward};
use lapidary_model::{Initialiser, Input, InputSpec, Model, Pass};
use lapidary_parts::parameters::ParameterSource;
use rand::{Rng, RngExt};

use super::projection::DIRECTIONS;
use super::{
    GLOBAL, Image, Projection, ProjectionSizes, SelfDistillationSpec, Spread, distillation_loss,
    moved_centre, teacher_probabilities,
};
use crate::error::engine;
use crate::state::TrainingState;
use crate::{
    Error, Generator, GeneratorState, MovingAverage, Result, Schedule, Step, TrainSpec,
    UpdateOptions, Updates, generator,
};

/// What a distiller learns from, and what it is asked about.
#[derive(Clone, Debug)]
pub struct Images {
    /// Images that are drawn, the same ones again and again.
    pub training: Vec<Image>,
    /// Images that are not.
    pub validation: Vec<Image>,
}

/// A student, its teacher, and what they learn from.
pub struct Distiller {
    spec: TrainSpec,
    own: SelfDistillationSpec,
    schedule: Schedule,
    student: Model,
    projection: Projection,
    updates: Updates,
    teacher: MovingAverage,
    /// `[outputs]`.
    centre: Tensor,
    images: Images,
    /// Height and width of the model's images.
    size: [usize; 2],
    generator: Generator,
    step: u64,
    spread: Option<Spread>,
}

impl Distiller {
    /// A new student, and a teacher that begins as it.
    ///
    /// # Errors
    /// When the spec is invalid, or the images have other channels than the model's, or there are none.
    pub fn new(spec: TrainSpec, images: Images, device: &Device) -> Result<Self> {
        let mut source = Initialiser::new(spec.seed, DType::F32, device.clone());
        Self::with_source(spec, &mut source, images)
    }

    /// As [`Distiller::new`], from the parameters that `source` gives, those of the projection
    /// (`projection.…`) among them.
    ///
    /// # Errors
    /// As there.
    pub fn with_source(
        spec: TrainSpec,
        source: &mut dyn ParameterSource,
        images: Images,
    ) -> Result<Self> {
        spec.validate()?;
        let (Some(own), InputSpec::Patches(input)) = (&spec.self_distillation, &spec.model.input)
        else {
            return Err(Error::Setting {
                name: "self_distillation",
                found: "absent".into(),
                expected: "given",
            });
        };
        let (own, size, channels) = (own.clone(), input.image, input.channels);
        for (name, images) in [
            ("training images", &images.training),
            ("validation images", &images.validation),
        ] {
            if images.is_empty() || images.iter().any(|image| image.shape()[0] != channels) {
                return Err(Error::Setting {
                    name,
                    found: format!("{} images", images.len()),
                    expected: "at least 1, all with as many channels as the model reads",
                });
            }
        }
        let student =
            Model::trainable(spec.model.clone(), source).map_err(lapidary_model::Error::from)?;
        let (projection, added) = Projection::trainable(sizes(&spec, &own), source)?;
        let options = UpdateOptions {
            optimiser: spec.optimiser,
            peak: spec.schedule.peak,
            clip: spec.clip,
            average: None,
            groups: spec.groups.clone(),
        };
        let mut variables = student.variables().clone();
        variables.extend(added);
        let updates = Updates::of(&variables, &options)?;
        let teacher = MovingAverage::new(updates.variables(), 0.0, false)?;
        let centre = engine(Tensor::zeros(
            own.outputs,
            student.dtype(),
            &student.device(),
        ))?;
        Ok(Self {
            schedule: spec.schedule(),
            generator: generator(spec.seed),
            spec,
            own,
            student,
            projection,
            updates,
            teacher,
            centre,
            images,
            size,
            step: 0,
            spread: None,
        })
    }

    /// The student as it is.
    pub fn student(&self) -> &Model {
        &self.student
    }

    /// What is taken off the teacher's logits, `[outputs]`.
    pub fn centre(&self) -> &Tensor {
        &self.centre
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// What the run was told.
    pub fn spec(&self) -> &TrainSpec {
        &self.spec
    }

    /// What the teacher said of the last step's images.
    pub fn spread(&self) -> Option<Spread> {
        self.spread
    }

    /// Does one step.
    ///
    /// # Errors
    /// When the loss is not a number: the parameters are then those before the step.
    pub fn step(&mut self) -> Result<Step> {
        let rate = self.schedule.rate(self.step);
        let seed = self.generator.next_u64();
        let chosen: Vec<&Image> = (0..self.spec.batch)
            .filter_map(|_| {
                let among = &self.images.training;
                among.get(self.generator.random_range(0..among.len()))
            })
            .collect();
        let views = self
            .own
            .crops
            .views(&chosen, self.size, &mut self.generator)?;
        let temperatures = self.own.temperatures_at(self.step);
        let (model, projection) = self.teacher()?;
        let global = large(&views)?;
        let told = logits(&model, &projection, &global, Pass::default())?.detach();
        let probabilities = teacher_probabilities(&told, &self.centre, temperatures.teacher)?;
        let said = self.said(&views, |size| {
            // Views of another size draw for themselves.
            let seed = seed.wrapping_add(size);
            Pass {
                dropout_seed: Some(seed),
                draw: Some(seed),
                step: Some(self.step),
                ..Pass::default()
            }
        })?;
        let loss = distillation_loss(&said, &probabilities, temperatures.student)?;
        let value = number(&loss)?;
        if !value.is_finite() {
            return Err(Error::Setting {
                name: "loss",
                found: format!("{value} at step {}", self.step + 1),
                expected: "finite; lower the learning rate, or clip",
            });
        }
        let mut gradients = engine(backward(&loss))?;
        if self.step < self.own.frozen_steps
            && let Some(directions) = self.updates.variable(DIRECTIONS)
        {
            gradients.remove(directions.as_tensor());
        }
        let norm = self.updates.step(&mut gradients, rate, 1.0)?;
        let momentum = self.own.momentum_at(self.step, self.spec.steps);
        self.teacher.update_by(self.updates.variables(), momentum)?;
        self.centre = moved_centre(&self.centre, &told, self.own.centre_momentum)?;
        self.spread = Some(Spread::of(&probabilities)?);
        self.step += 1;
        Ok(Step {
            step: self.step,
            loss: value,
            gradient_norm: norm,
            rate,
            tokens: (self.spec.batch * self.tokens_of_views()) as u64,
        })
    }

    /// Tokens of all views of an image.
    fn tokens_of_views(&self) -> usize {
        let whole = self.spec.model.length();
        let local = match (&self.spec.model.input, self.own.crops.local_size) {
            (InputSpec::Patches(input), Some(size)) => {
                let [rows, columns] = size.map(|side| side / input.patch.max(1));
                rows * columns + input.class_tokens
            }
            _ => whole,
        };
        GLOBAL * whole + self.own.crops.locals * local
    }

    /// The student's logits `[views, images, outputs]` of views of one or two sizes, each in the pass that it gets.
    fn said(&self, views: &[Tensor], pass: impl Fn(u64) -> Pass<'static>) -> Result<Tensor> {
        let each = (0..).zip(views);
        let each =
            each.map(|(size, views)| logits(&self.student, &self.projection, views, pass(size)));
        engine(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0))
    }

    /// The mean loss on validation images, always in the same views, and what the teacher says of them.
    ///
    /// # Errors
    /// What the model refuses.
    pub fn validate(&self) -> Result<(f64, Spread)> {
        let temperatures = self.own.temperatures_at(self.step);
        let (mut sum, mut seen, mut all) = (0.0, 0, Vec::new());
        self.told(|views, told| {
            let probabilities = teacher_probabilities(told, &self.centre, temperatures.teacher)?;
            let said = self.said(views, |_| Pass::default())?;
            let loss = distillation_loss(&said, &probabilities, temperatures.student)?;
            let images = engine(said.dim(1))?;
            sum += number(&loss.detach())? * images as f64;
            seen += images;
            all.push(probabilities);
            Ok(())
        })?;
        Ok((sum / seen.max(1) as f64, self.spread_of(&all)?))
    }

    /// What the teacher says of validation images at a temperature that need not be its own, in the views of
    /// [`Distiller::validate`]. The same logits tell more at a lower temperature, so that teachers of different ones
    /// can be compared at one alone.
    ///
    /// # Errors
    /// For a temperature that no spec may have, and what the model refuses.
    pub fn spread_at(&self, temperature: f64) -> Result<Spread> {
        SelfDistillationSpec {
            first_teacher_temperature: temperature,
            teacher_temperature: temperature,
            ..self.own.clone()
        }
        .validate()?;
        let mut all = Vec::new();
        self.told(|_, told| {
            all.push(teacher_probabilities(told, &self.centre, temperature)?);
            Ok(())
        })?;
        self.spread_of(&all)
    }

    /// Hands over, batch by batch, views of validation images, those of one size together
    /// `[views, images, channels, height, width]`, and the teacher's logits of the large ones, `[views, images, outputs]`.
    fn told(&self, mut each: impl FnMut(&[Tensor], &Tensor) -> Result<()>) -> Result<()> {
        let mut generator = generator(self.spec.seed ^ VALIDATION_SEED);
        let (model, projection) = self.teacher()?;
        let batches = self.images.validation.chunks(self.spec.batch);
        for images in batches.take(self.spec.validation.batches) {
            let images: Vec<&Image> = images.iter().collect();
            let views = self.own.crops.views(&images, self.size, &mut generator)?;
            let global = large(&views)?;
            let told = logits(&model, &projection, &global, Pass::default())?;
            each(&views, &told)?;
        }
        Ok(())
    }

    /// Of probabilities `[views, images, outputs]` of several batches.
    fn spread_of(&self, probabilities: &[Tensor]) -> Result<Spread> {
        let outputs = self.own.outputs;
        let rows: Result<Vec<Tensor>> = probabilities
            .iter()
            .map(|each| engine(each.reshape(((), outputs))))
            .collect();
        Spread::of(&engine(Tensor::cat(&rows?, 0))?)
    }

    /// The teacher as a model: it is what is used afterwards.
    ///
    /// # Errors
    /// What building a model gives cause for.
    pub fn finished(&self) -> Result<Model> {
        Ok(self.teacher()?.0)
    }

    /// The teacher with its projection.
    fn teacher(&self) -> Result<(Model, Projection)> {
        let names = self.updates.names().iter().cloned();
        let shadow = self.teacher.shadow().iter().cloned();
        let mut parameters: BTreeMap<String, Tensor> = names.zip(shadow).collect();
        let projection = Projection::new(sizes(&self.spec, &self.own), &mut parameters)?;
        let model = Model::new(self.spec.model.clone(), &mut parameters)
            .map_err(lapidary_model::Error::from)?;
        Ok((model, projection))
    }

    /// Everything that is needed to go on from here bit for bit.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn state(&self) -> Result<TrainingState> {
        let (mut tensors, mut positions) = (BTreeMap::new(), BTreeMap::new());
        self.updates.save(&mut tensors, &mut positions)?;
        for (name, shadow) in self.updates.names().iter().zip(self.teacher.shadow()) {
            tensors.insert(format!("{TEACHER}{name}"), shadow.clone());
        }
        tensors.insert(CENTRE.to_owned(), self.centre.clone());
        positions.insert(UPDATES.to_owned(), self.teacher.updates());
        Ok(TrainingState {
            step: self.step,
            generators: BTreeMap::from([(
                GENERATOR.to_owned(),
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
        let take = |name: &str| {
            state.tensors.get(name).cloned().ok_or(Error::Setting {
                name: "tensor of the saved run",
                found: format!("no {name}"),
                expected: "one for each parameter of the teacher, and the centre",
            })
        };
        let names = self.updates.names().iter();
        let shadow: Result<Vec<Tensor>> = names
            .map(|name| take(&format!("{TEACHER}{name}")))
            .collect();
        let (shadow, centre) = (shadow?, take(CENTRE)?);
        if centre.dims() != self.centre.dims() || centre.dtype() != self.centre.dtype() {
            return Err(Error::Tensor {
                name: CENTRE.to_owned(),
                detail: format!(
                    "has shape {:?}, not {:?}",
                    centre.dims(),
                    self.centre.dims()
                ),
            });
        }
        self.updates
            .restore(&state.tensors, &state.positions, state.step)?;
        let updates = state.positions.get(UPDATES).copied().unwrap_or(state.step);
        self.teacher.resume(shadow, updates)?;
        self.centre = centre;
        if let Some(generator) = state.generators.get(GENERATOR) {
            self.generator = generator.restore();
        }
        self.step = state.step;
        Ok(())
    }
}

/// Names in a saved state.
const TEACHER: &str = "teacher.";
const CENTRE: &str = "centre";
const UPDATES: &str = "teacher";
const GENERATOR: &str = "training";

/// Keeps the draws of validation apart from those of training.
const VALIDATION_SEED: u64 = 0x5eed_d150_0f7a_1e00;

fn sizes(spec: &TrainSpec, own: &SelfDistillationSpec) -> ProjectionSizes {
    ProjectionSizes {
        width: spec.model.read_width(),
        hidden: own.hidden,
        bottleneck: own.bottleneck,
        outputs: own.outputs,
    }
}

/// The views that teacher and student both see, of those that begin with them.
fn large(views: &[Tensor]) -> Result<Tensor> {
    let first = views.first().ok_or_else(|| Error::Tensor {
        name: "views".to_owned(),
        detail: "one at least is needed".to_owned(),
    })?;
    engine(first.narrow(0, 0, GLOBAL))
}

/// Logits `[views, images, outputs]` of views `[views, images, channels, height, width]`.
fn logits(
    model: &Model,
    projection: &Projection,
    views: &Tensor,
    pass: Pass<'_>,
) -> Result<Tensor> {
    let [count, images, channels, height, width] = *views.dims() else {
        return Err(Error::Tensor {
            name: "views".to_owned(),
            detail: format!(
                "shape {:?} has to be [views, images, channels, height, width]",
                views.dims()
            ),
        });
    };
    let rows = engine(views.reshape((count * images, channels, height, width)))?;
    let rows = engine(engine(rows.to_device(&model.device()))?.to_dtype(model.dtype()))?;
    let output = model
        .forward(&Input::Pixels(rows), pass)
        .map_err(lapidary_model::Error::from)?;
    let pooled = output.pooled.ok_or(Error::Setting {
        name: "model.head",
        found: "one without a pooled vector".into(),
        expected: "pooled, without labels",
    })?;
    let logits = projection.forward(pooled.value())?;
    engine(logits.reshape((count, images, ())))
}

fn number(scalar: &Tensor) -> Result<f64> {
    engine(engine(scalar.to_dtype(DType::F64))?.to_scalar::<f64>())
}
