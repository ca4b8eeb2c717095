//! A classifier with far more weights than examples, of which a tenth are labelled at random.

use crate::experiments::classifier::{Course, Encoder, Labelled, Narrow, mean_loss, train};
use crate::experiments::topics;
use crate::{Result, Scale};
use lapidary_compress::{
    CalibrationData, Example, HealData, HealSettings, Method, PruneAndHeal, Settings, heal,
    prune_and_heal,
};
use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, Model};
use lapidary_train::generator;

/// Shares that are pruned.
pub(super) const SHARES: [f64; 6] = [0.2, 0.3, 0.4, 0.5, 0.6, 0.8];

struct Size {
    examples: usize,
    tests: usize,
    steps: u64,
    healing: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                examples: 40,
                tests: 20,
                steps: 2,
                healing: 2,
            },
            Scale::Small => Self {
                examples: 1000,
                tests: 600,
                steps: 400,
                healing: 80,
            },
            Scale::Full => Self {
                examples: 1000,
                tests: 4000,
                steps: 3000,
                healing: 600,
            },
        }
    }
}

/// In words.
pub(super) fn describe(scale: Scale) -> String {
    let size = Size::of(scale);
    format!(
        "classifier of 2 blocks, width 64, on {} texts of 16 classes, {} steps and {} of healing",
        size.examples, size.steps, size.healing
    )
}

/// Test losses of one seed.
pub(super) struct Curve {
    /// Of the dense model.
    pub(super) dense: f64,
    /// Of the dense model trained on for as many steps as the others heal.
    pub(super) control: f64,
    /// Of the model pruned by magnitude and healed, by share.
    points: Vec<Point>,
}

struct Point {
    share: f64,
    tests: f64,
    held_out: f64,
}

impl Curve {
    pub(super) fn at(&self, share: f64) -> f64 {
        self.loss(share, |point| point.tests)
    }

    /// On the examples that decide when healing is best.
    pub(super) fn held_out(&self, share: f64) -> f64 {
        self.loss(share, |point| point.held_out)
    }

    fn loss(&self, share: f64, of: fn(&Point) -> f64) -> f64 {
        let found = self.points.iter().find(|point| point.share == share);
        found.map_or(f64::NAN, of)
    }
}

fn data(examples: &[Labelled]) -> Result<CalibrationData> {
    let examples = examples.iter();
    let examples = examples.map(|text| Example::labelled(text.tokens.clone(), text.label));
    Ok(CalibrationData::new(examples.collect())?)
}

/// Trains the classifier, prunes it at every share and heals it.
pub(super) fn curve(scale: Scale, seed: u64) -> Result<Curve> {
    let size = Size::of(scale);
    let mut random = generator(seed ^ 0x0015e);
    let examples = topics::noisy(size.examples, &mut random);
    let held_out = topics::noisy(size.tests, &mut random);
    let tests = topics::clean(size.tests, &mut random);
    let encoder = Encoder {
        vocabulary: topics::VOCABULARY,
        length: topics::LENGTH,
        width: 64,
        heads: 4,
        blocks: 2,
        labels: topics::LABELS,
    };
    let mut initial = Narrow(Initialiser::new(seed, DType::F32, Device::Cpu));
    let untrained = Model::trainable(encoder.spec(), &mut initial)?;
    let course = Course {
        steps: size.steps,
        batch: 32,
        rate: 1e-3,
        masking: None,
        seed,
    };
    let model = train(&untrained, &examples, &course)?;
    let (training, validation) = (data(&examples)?, data(&held_out)?);
    let learned = HealData {
        training: &training,
        validation: &validation,
        teacher: None,
    };
    let healing = HealSettings {
        steps: size.healing,
        rate: 5e-4,
        batch: 32,
        every: (size.healing / 4).max(1),
        patience: 0,
        seed,
        ..HealSettings::default()
    };
    let settings = Settings::default();
    let mut points = Vec::new();
    for share in SHARES {
        let told = PruneAndHeal {
            method: Method::find("magnitude")?,
            settings: &settings,
            calibration: &training,
            keep: 1.0 - share,
            rounds: 1,
            rewind: None,
            healing: &healing,
        };
        let (pruned, _) = prune_and_heal(&model, &learned, &told)?;
        points.push(Point {
            share,
            tests: mean_loss(&pruned.model, &tests)?,
            held_out: mean_loss(&pruned.model, &held_out)?,
        });
    }
    let (control, _) = heal(&model, &learned, &healing, |_, _| ())?;
    Ok(Curve {
        dense: mean_loss(&model, &tests)?,
        control: mean_loss(&control, &tests)?,
        points,
    })
}
