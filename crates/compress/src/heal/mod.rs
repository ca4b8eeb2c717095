//! Training a compressed model further, so that it makes up for what was cut.
//!
//! The loss is the task's, that of the original's predictions, or both:
//!
//! ```text
//! (1 − α) L_task + α T² KL(softmax(z_original / T) ‖ softmax(z / T))
//! ```
//!
//! (Hinton et al. 2015, arXiv 1503.02531), and where wanted `β` times how far the residual stream is from
//! the original's ([`HealSettings::hints`]). Whatever shape the compression left is trained: factors,
//! narrower parts, fewer blocks; or adapters of low rank beside it, which it takes in at the end
//! ([`adapters`]). Weights that are exactly zero, which pruning leaves, stay zero, or change places
//! ([`regrowth`]). A model that is to be rounded after may be trained as it will be then
//! ([`HealSettings::rounding`]). What comes out is the best of what was validated on the way, the unhealed
//! model included.

mod adapters;
mod hints;
mod lesson;
mod projections;
mod regrowth;
mod rounded;
mod rounds;
mod student;

pub use adapters::{AdapterReport, AdapterSettings};
pub use rounds::{PruneAndHeal, cubic_sparsity, prune_and_heal};

use std::collections::BTreeMap;
use std::time::Instant;

use lapidary_kernels::{DType, Tensor, backward};
use lapidary_model::Model;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_train::spec::OptimiserSpec;
use lapidary_train::{Decay, Generator, Masks, Schedule, UpdateOptions, Updates, generator};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::data::Batch;
use crate::error::engine;
use crate::{CalibrationData, Error, Example, Layer, Objective, Result, RoundingGoal};
use lesson::Lesson;
use regrowth::Regrowth;
use student::Student;

/// How a compressed model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HealSettings {
    /// Steps, if nothing stops earlier.
    pub steps: u64,
    /// The highest learning rate: it rises over a tenth of the steps and falls to zero as a cosine.
    /// 1e-5 to 5e-4, less for larger models.
    pub rate: f64,
    /// Decay of matrices.
    pub weight_decay: f64,
    /// Examples of a step.
    pub batch: usize,
    /// `α`: the weight of the original's predictions, from 0 to 1.
    pub distil: f64,
    /// `T`: the temperature of both predictions.
    pub temperature: f64,
    /// `β`: the weight of the mean relative squared error of the residual stream after each block, beside
    /// the rest of the loss; the original's streams are not run for 0. A stream of another width is compared
    /// through maps that are trained with the model and are no part of it afterwards.
    #[serde(default)]
    pub hints: f64,
    /// Trains adapters of low rank beside the weights instead of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<AdapterSettings>,
    /// What the model is to be rounded to after: passes see its weights so, and what comes out are the
    /// weights that are best once they are rounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounding: Option<RoundingGoal>,
    /// Steps between validations; a tenth of the steps when 0.
    pub every: u64,
    /// Validations without a new best after which training stops; never when 0.
    pub patience: usize,
    /// Whether weights of linear layers and of the table of embeddings that are exactly zero stay so.
    pub keep_zeros: bool,
    /// The share of each masked matrix's weights that change places at the first turn, falling to none as
    /// a cosine over three quarters of the steps; none when 0. Each turn, the smallest weights become
    /// zero and as many zeros of the largest gradient may grow (Evci et al. 2020, arXiv 1911.11134).
    /// Patterns such as 2 of 4 are not kept.
    pub regrow: f64,
    /// Steps between two turns; a tenth of the steps when 0.
    pub regrow_every: u64,
    /// Seed of the order of examples.
    pub seed: u64,
}

impl Default for HealSettings {
    fn default() -> Self {
        Self {
            steps: 100,
            rate: 1e-4,
            weight_decay: 0.01,
            batch: 8,
            distil: 0.0,
            temperature: 1.0,
            hints: 0.0,
            adapters: None,
            rounding: None,
            every: 0,
            patience: 5,
            keep_zeros: true,
            regrow: 0.0,
            regrow_every: 0,
            seed: 0,
        }
    }
}

impl HealSettings {
    /// Refuses settings that no model heals by, as [`heal`] does.
    ///
    /// # Errors
    /// Says which and what it may be.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: &str, found: String, expected: &str| {
            Err(Error::invalid(
                format!("{what} of healing"),
                found,
                expected,
            ))
        };
        if !(self.rate > 0.0 && self.rate.is_finite()) {
            return wrong("rate", self.rate.to_string(), "above 0");
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return wrong("decay", self.weight_decay.to_string(), "at least 0");
        }
        if self.batch == 0 {
            return wrong("batch", "0".to_owned(), "at least 1");
        }
        if !(0.0..=1.0).contains(&self.distil) {
            return wrong("weight of distillation", self.distil.to_string(), "0 to 1");
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", self.temperature.to_string(), "above 0");
        }
        if !(self.hints >= 0.0 && self.hints.is_finite()) {
            return wrong("weight of hints", self.hints.to_string(), "at least 0");
        }
        if !(0.0..1.0).contains(&self.regrow) {
            let expected = "at least 0 and below 1";
            return wrong("share that regrows", self.regrow.to_string(), expected);
        }
        if self.regrow > 0.0 && !self.keep_zeros {
            let expected = "0 where zeros are not kept: then every weight grows";
            return wrong("share that regrows", self.regrow.to_string(), expected);
        }
        if self.regrow > 0.0 && self.adapters.is_some() {
            let expected = "0 with adapters: weights that do not move cannot change places";
            return wrong("share that regrows", self.regrow.to_string(), expected);
        }
        self.adapters
            .as_ref()
            .map_or(Ok(()), AdapterSettings::check)
    }

    /// What is learned of such examples, by a model or by what is cut from it: no cut changes the head.
    ///
    /// # Errors
    /// When the examples do not fit the model, or have no task and the original is not learned from alone.
    pub fn objective(&self, model: &Model, data: &CalibrationData) -> Result<Objective> {
        if self.hints > 0.0
            && let Some(OrganisationSpec::Reversible(_)) = &model.spec().organisation
        {
            let expected = "0 where the organisation of tokens is reversible: behind a block there are two streams";
            return Err(Error::invalid("weight of hints", self.hints, expected));
        }
        let objective = Objective::of(model, data)?;
        if objective == Objective::Representation && self.distil < 1.0 {
            return Err(Error::invalid(
                "weight of distillation",
                self.distil,
                "1 for a model and examples without a task, which can only learn what the original \
                 says of them",
            ));
        }
        Ok(objective)
    }
}

/// What a model is healed on.
#[derive(Clone, Copy, Debug)]
pub struct HealData<'a> {
    /// What it is trained on.
    pub training: &'a CalibrationData,
    /// What decides when it is best.
    pub validation: &'a CalibrationData,
    /// The original, whose predictions it learns.
    pub teacher: Option<&'a Model>,
}

/// How a model healed. Losses are those that were trained, in nats per example where it is the task's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HealReport {
    /// What the task's loss is.
    pub objective: Objective,
    /// The weight of the original's predictions.
    pub distil: f64,
    /// The weight of the original's residual stream.
    pub hints: f64,
    /// The adapters that were trained, where it was not the weights. What came out has taken them in, unless
    /// `best` is 0.
    pub adapters: Option<AdapterReport>,
    /// Bits of the weights that it was trained to be rounded to.
    pub bits: Option<u32>,
    /// Steps done.
    pub steps: u64,
    /// Steps after which the model was best, which is what came out; 0 when it was best unhealed.
    pub best: u64,
    /// Loss on the validation examples before, that is at step 0.
    pub before: f64,
    /// Loss on the validation examples of what came out.
    pub after: f64,
    /// Step and loss on its batch, each step.
    pub training: Vec<(u64, f64)>,
    /// Step and loss on the validation examples.
    pub validation: Vec<(u64, f64)>,
    /// Weights that were kept at zero.
    pub zeros: usize,
    /// Of those that were zero at first, how many have another's place in what came out.
    pub regrown: usize,
    /// Examples trained on, each counted once.
    pub examples: usize,
    /// How long it took.
    pub seconds: f64,
}

/// Trains a copy of `model`, telling `progress` each step and its loss, and gives the best of what
/// was validated, in the type that the model has.
///
/// ```
/// use lapidary_compress::{CalibrationData, HealData, HealSettings, heal};
/// use lapidary_kernels::{DType, Device};
/// use lapidary_model::{Model, ModelSpec};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let spec: ModelSpec = toml::from_str(r#"
///     width = 8
///     input = { kind = "tokens", vocabulary = 16, length = 8 }
///     head = { kind = "language-model" }
///     [[blocks]]
///     attention = { kind = "multi-head", heads = 2, causal = true }
/// "#)?;
/// let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
/// let windows = CalibrationData::windows([vec![1, 2, 3, 1, 2, 3], vec![2, 3, 1, 2, 3, 1]])?;
/// let data = HealData { training: &windows, validation: &windows, teacher: None };
/// let settings = HealSettings { steps: 20, rate: 1e-2, ..HealSettings::default() };
/// let (_, report) = heal(&model, &data, &settings, |_, _| ())?;
/// assert!(report.after < report.before);
/// # Ok(()) }
/// ```
///
/// # Errors
/// When the data does not fit the model, a model without a task has no teacher, adapters fit no layer or not
/// what else is asked for, the loss or its gradient is not finite, or the model is neither in floating point
/// nor on the CPU.
pub fn heal(
    model: &Model,
    data: &HealData<'_>,
    settings: &HealSettings,
    mut progress: impl FnMut(u64, f64),
) -> Result<(Model, HealReport)> {
    settings.check()?;
    if !model.spec().quantised.is_empty() {
        return Err(Error::invalid(
            "the model to be healed",
            "quantised",
            "made of numbers: healing comes before rounding",
        ));
    }
    let started = Instant::now();
    let lesson = Lesson::of(model, data, settings)?;
    let masks = match settings.keep_zeros {
        true => zeros(model)?,
        false => Masks::default(),
    };
    let zeros = masks.zeros();
    let student = Student::new(model, settings, &masks)?;
    let validate = || -> Result<f64> {
        let acting = student.acting(None)?;
        lesson.mean(&acting, data.validation, settings.batch)
    };
    let mut updates = Updates::of(
        student.variables(),
        &UpdateOptions {
            optimiser: adam(settings.weight_decay),
            peak: settings.rate,
            clip: Some(1.0),
            ..UpdateOptions::default()
        },
    )?;
    let mut beside = lesson.optimiser(settings.rate)?;
    let regrowth = Regrowth::new(settings, &masks);
    updates.set_masks(student.masks(masks))?;
    let schedule = Schedule {
        peak: settings.rate,
        floor: 0.0,
        warm_up: settings.steps / 10,
        steps: settings.steps,
        decay: Decay::Cosine,
    };
    let every = match settings.every {
        0 => (settings.steps / 10).max(1),
        every => every,
    };
    let mut order = Order::new(data.training, settings.seed);
    let mut best = Best {
        step: 0,
        loss: validate()?,
        parameters: None,
        regrown: 0,
        since: 0,
    };
    let before = best.loss;
    let mut training = Vec::new();
    let mut validation = vec![(0, before)];
    for step in 1..=settings.steps {
        let examples = order.next(settings.batch);
        let batch = Batch::new(&examples, &model.device())?;
        let acting = student.acting(Some(step))?;
        let value = lesson.loss(&acting, &batch)?;
        let loss = number(&value)?;
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                what: format!(
                    "the loss of step {step} of healing, at rate {}",
                    settings.rate
                ),
            });
        }
        let mut gradients = engine(backward(&value))?;
        if let Some(masks) =
            regrowth.turn(step, student.variables(), &gradients, updates.masks())?
        {
            updates.set_masks(masks)?;
        }
        let rate = schedule.rate(step - 1);
        updates.step(&mut gradients, rate, 1.0)?;
        if let Some(beside) = &mut beside {
            beside.step(&gradients, rate, 1.0)?;
        }
        training.push((step, loss));
        progress(step, loss);
        if step.is_multiple_of(every) || step == settings.steps {
            let loss = validate()?;
            validation.push((step, loss));
            best.see(step, loss, || {
                Ok((updates.parameters()?, regrowth.regrown(updates.masks())?))
            })?;
            if settings.patience > 0 && best.since >= settings.patience {
                break;
            }
        }
    }
    let report = HealReport {
        objective: lesson.objective,
        distil: settings.distil,
        hints: settings.hints,
        adapters: student.adapters(),
        bits: settings.rounding.as_ref().map(|goal| goal.quantise.bits),
        steps: training.len() as u64,
        best: best.step,
        before,
        after: best.loss,
        training,
        validation,
        zeros,
        regrown: best.regrown,
        examples: data.training.len(),
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok((student.finished(best.parameters, model)?, report))
}

pub(crate) fn adam(weight_decay: f64) -> OptimiserSpec {
    OptimiserSpec::Adamw {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay,
    }
}

/// The parameters in a type that optimisers take.
pub(crate) fn trained(model: &Model) -> Result<BTreeMap<String, Tensor>> {
    let parameters = model.parameters().iter();
    parameters
        .map(|(name, tensor)| {
            let tensor = match tensor.dtype() {
                DType::F16 | DType::BF16 => engine(tensor.detach().to_dtype(DType::F32))?,
                _ => tensor.detach(),
            };
            Ok((name.clone(), tensor))
        })
        .collect()
}

/// Masks of what is exactly zero in linear layers and in the table of embeddings.
pub(crate) fn zeros(model: &Model) -> Result<Masks> {
    let parameters = model.parameters();
    let names = Layer::all(model).into_iter();
    let names = names.map(|layer| Layer::weight_name(&layer.path));
    let weights: Vec<(String, Tensor)> = names
        .filter_map(|name| {
            parameters
                .get(&name)
                .map(|tensor| (name.clone(), tensor.clone()))
        })
        .collect();
    let weights = weights.iter().map(|(name, tensor)| (name.as_str(), tensor));
    Ok(Masks::of_zeros(weights)?)
}

/// The best model so far.
struct Best {
    step: u64,
    loss: f64,
    /// Absent while it is the unhealed one.
    parameters: Option<BTreeMap<String, Tensor>>,
    /// Its weights that were zero at first and are trained.
    regrown: usize,
    /// Validations since.
    since: usize,
}

impl Best {
    fn see(
        &mut self,
        step: u64,
        loss: f64,
        found: impl FnOnce() -> Result<(BTreeMap<String, Tensor>, usize)>,
    ) -> Result<()> {
        if loss < self.loss {
            let (parameters, regrown) = found()?;
            *self = Self {
                step,
                loss,
                parameters: Some(parameters),
                regrown,
                since: 0,
            };
        } else {
            self.since += 1;
        }
        Ok(())
    }
}

/// Examples in an order drawn anew each time that all have been seen.
pub(crate) struct Order<'a> {
    examples: &'a [Example],
    left: Vec<usize>,
    random: Generator,
}

impl<'a> Order<'a> {
    pub(crate) fn new(data: &'a CalibrationData, seed: u64) -> Self {
        Self {
            examples: data.examples(),
            left: Vec::new(),
            random: generator(seed),
        }
    }

    pub(crate) fn next(&mut self, count: usize) -> Vec<Example> {
        let mut drawn = Vec::with_capacity(count);
        while drawn.len() < count.min(self.examples.len()) {
            if self.left.is_empty() {
                self.left = (0..self.examples.len()).collect();
                self.left.shuffle(&mut self.random);
            }
            let example = self.left.pop().and_then(|index| self.examples.get(index));
            drawn.extend(example.cloned());
        }
        drawn
    }
}

/// The number in a scalar.
pub(crate) fn number(scalar: &Tensor) -> Result<f64> {
    engine(engine(scalar.detach().to_dtype(DType::F64))?.to_scalar::<f64>())
}
