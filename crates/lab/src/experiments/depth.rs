//! What experiments share that make decoders shallower: a trained decoder, text to calibrate on
//! and to measure on, and what is left of the model.

use super::decoder::{self, Recipe};
use super::texts::Sides;
use crate::{Result, Scale};
use lapidary_compress::quality::{Window, agreement, perplexity};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Compressed, Method, Plan, Settings,
    Task,
};
use lapidary_model::Model;

/// Sequences of a forward pass.
pub const BATCH: usize = 16;

/// How much is trained and measured.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Blocks of the decoder.
    pub blocks: usize,
    /// Its width.
    pub width: usize,
    /// Steps of training.
    pub steps: u64,
    /// Windows to calibrate on.
    pub calibration: u64,
    /// Windows to measure on.
    pub tests: u64,
    /// Draws of what is random.
    pub draws: u64,
}

impl Size {
    /// The size of a scale.
    pub fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                blocks: 4,
                width: 16,
                steps: 3,
                calibration: 6,
                tests: 4,
                draws: 2,
            },
            Scale::Small => Self {
                blocks: 8,
                width: 64,
                steps: 300,
                calibration: 64,
                tests: 48,
                draws: 5,
            },
            Scale::Full => Self {
                blocks: 12,
                width: 128,
                steps: 3000,
                calibration: 256,
                tests: 200,
                draws: 5,
            },
        }
    }

    /// In words, on some text.
    pub fn describe_on(self, text: &str) -> String {
        format!(
            "decoder of {} blocks, width {}, on {text}, {} steps of {} windows of \
             {}; {} windows to calibrate on, {} held out to measure on",
            self.blocks,
            self.width,
            self.steps,
            decoder::BATCH,
            decoder::LENGTH,
            self.calibration,
            self.tests,
        )
    }
}

/// A trained decoder with text for it.
pub struct Subject {
    /// The decoder.
    pub model: Model,
    /// Text of its training side.
    pub data: CalibrationData,
    /// Text that it has not seen.
    pub tests: Vec<Window>,
    /// The same as data.
    pub held_out: CalibrationData,
    /// Where both are from.
    pub text: Sides,
    seed: u64,
}

impl Subject {
    /// Trains a decoder of a size on a text.
    pub fn trained(text: Sides, size: Size, seed: u64) -> Result<Self> {
        let spec = decoder::spec(text.training.vocabulary(), size.width, size.blocks);
        let model = decoder::train(spec, text.training.task(), size.steps, seed)?;
        Self::reading(model, text, size, seed)
    }

    /// A model of the language with text for it.
    pub fn of(model: Model, size: Size, seed: u64) -> Result<Self> {
        Self::reading(model, Sides::language(seed)?, size, seed)
    }

    /// A model of some text.
    pub fn reading(model: Model, text: Sides, size: Size, seed: u64) -> Result<Self> {
        let tests = text.tests(size.tests)?;
        Ok(Self {
            model,
            data: CalibrationData::windows(text.training.fixed_windows(size.calibration)?)?,
            held_out: CalibrationData::windows(tests.iter().map(|test| test.tokens.clone()))?,
            tests,
            text,
            seed,
        })
    }

    /// Mean loss of a model per held-out token, in nats.
    pub fn loss(&self, model: &Model) -> Result<f64> {
        Ok(perplexity(model, &self.tests, BATCH)?.value.ln())
    }

    /// Share of held-out tokens whose most likely next one is the decoder's.
    pub fn same(&self, model: &Model) -> Result<f64> {
        Ok(agreement(&self.model, model, &self.held_out, BATCH)?.top1)
    }

    /// What a method leaves when it takes out `removed` of `candidates`.
    pub fn without(
        &self,
        method: &str,
        removed: usize,
        candidates: usize,
        settings: &Settings,
    ) -> Result<Compressed> {
        self.on(&self.data, method, removed, candidates, settings)
    }

    /// The same with other text to calibrate on.
    pub fn on(
        &self,
        data: &CalibrationData,
        method: &str,
        removed: usize,
        candidates: usize,
        settings: &Settings,
    ) -> Result<Compressed> {
        let method = Method::find(method)?;
        let requirements = method.requirements(&self.model, settings)?;
        let options = CalibrationOptions::default();
        let calibration = match requirements.is_empty() {
            true => None,
            false => Some(Calibration::collect(
                &self.model,
                data,
                &requirements,
                options,
            )?),
        };
        let task = Task {
            model: &self.model,
            calibration: calibration.as_ref(),
            data: Some(data),
            settings: Some(settings),
        };
        let keep = 1.0 - removed as f64 / candidates.max(1) as f64;
        Ok(method.cut(&task, &Budget::Keep(keep))?.1)
    }

    /// A plan of a method that takes out nothing, to be written into.
    pub fn empty_plan(&self, method: &str) -> Result<Plan> {
        Ok(Method::find(method)?.plan(&Task::new(&self.model), &Budget::Keep(1.0))?)
    }

    /// Carries out a plan.
    pub fn apply(&self, plan: &Plan) -> Result<Compressed> {
        let task = Task {
            data: Some(&self.data),
            ..Task::new(&self.model)
        };
        Ok(Method::find(&plan.method)?.apply(&task, plan)?)
    }

    /// A model trained further on the text of the decoder's training.
    pub fn tuned(&self, model: &Model, steps: u64) -> Result<Model> {
        let recipe = Recipe {
            peak: 1e-3,
            ..Recipe::default()
        };
        let task = self.text.training.task();
        decoder::train_further(model, recipe, task, steps, self.seed + 1)
    }
}

/// Seeded choices of `count` of `candidates`.
pub fn draws(candidates: &[usize], count: usize, draws: u64, seed: u64) -> Vec<Vec<usize>> {
    use rand::seq::SliceRandom;
    (0..draws)
        .map(|draw| {
            let mut generator = lapidary_train::generator(seed.wrapping_add(1000 + draw));
            let mut order = candidates.to_vec();
            order.shuffle(&mut generator);
            order.truncate(count);
            order.sort_unstable();
            order
        })
        .collect()
}
