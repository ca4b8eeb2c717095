//! `--heal`: the compressed model trained further.

use anyhow::{Context, Result, ensure};
use lapidary_compress::{
    AdapterSettings, CalibrationData, Example, HealData, HealReport, HealSettings, RoundingGoal,
    heal,
};
use lapidary_model::{Model, Package};
use lapidary_train::log::Progress;

use super::data;
use crate::cli::{Compress, Global};

/// Of so many examples one is held out.
const HELD_OUT: usize = 10;

/// Most examples that are held out.
const MOST_HELD_OUT: usize = 64;

/// Refuses before the work what nothing can be healed by or on.
pub(super) fn check(arguments: &Compress, global: &Global) -> Result<()> {
    let Some(steps) = arguments.heal else {
        return Ok(());
    };
    ensure!(
        steps > 0,
        "--heal is 0 steps, but must be at least 1; leave it out to have the model as it was cut"
    );
    ensure!(
        arguments.calibrate.is_some() || arguments.model == "embedded",
        "--heal needs --calibrate FILE: what to train on"
    );
    Ok(settings(steps, arguments, global).check()?)
}

fn settings(steps: u64, arguments: &Compress, global: &Global) -> HealSettings {
    HealSettings {
        steps,
        rate: arguments.heal_rate,
        distil: arguments.distil,
        hints: arguments.hints,
        regrow: arguments.regrow,
        adapters: adapters(arguments),
        seed: global.seed,
        ..HealSettings::default()
    }
}

/// What `--heal` trains on and how, made ready before the work: what cannot be healed is told then.
pub(super) struct Prepared {
    settings: HealSettings,
    training: CalibrationData,
    validation: CalibrationData,
}

impl Prepared {
    /// Of `--heal`, where it is given.
    pub(super) fn of(
        package: &Package,
        original: &Model,
        arguments: &Compress,
        global: &Global,
    ) -> Result<Option<Self>> {
        let Some(steps) = arguments.heal else {
            return Ok(None);
        };
        let settings = settings(steps, arguments, global);
        let (training, validation) = examples(&settings, package, original, arguments, global)?;
        settings
            .objective(original, &training)
            .context("--heal has nothing to learn")?;
        Ok(Some(Self {
            settings,
            training,
            validation,
        }))
    }

    /// Trains `model`, cut from `original`, and gives what it became.
    pub(super) fn run(
        &self,
        model: &Model,
        original: &Model,
        rounding: Option<RoundingGoal>,
    ) -> Result<(Model, HealReport)> {
        let settings = HealSettings {
            rounding,
            ..self.settings.clone()
        };
        let data = HealData {
            training: &self.training,
            validation: &self.validation,
            teacher: Some(original),
        };
        let tokens = (self.training.tokens() / self.training.len() * settings.batch) as u64;
        let mut progress = Progress::new(0, settings.steps);
        let healed = heal(model, &data, &settings, |step, loss| {
            progress.step(step, loss, tokens);
        });
        progress.finish();
        let (model, report) = healed?;
        if settings.regrow > 0.0 && report.zeros == 0 {
            tracing::warn!("--regrow changes nothing: no weight of the model is zero");
        }
        Ok((model, report))
    }
}

/// What `--adapters` has trained, where it is given.
fn adapters(arguments: &Compress) -> Option<AdapterSettings> {
    let defaults = AdapterSettings::default();
    let layers = arguments.adapter_layers.as_ref();
    Some(AdapterSettings {
        rank: arguments.adapters?,
        alpha: arguments.adapter_alpha,
        dropout: arguments.adapter_dropout,
        layers: match layers {
            Some(globs) => globs
                .split(',')
                .map(|glob| glob.trim().to_owned())
                .collect(),
            None => defaults.layers,
        },
    })
}

/// As many examples as the steps read, if there are as many, and those that are held out: every
/// tenth.
fn examples(
    settings: &HealSettings,
    package: &Package,
    model: &Model,
    arguments: &Compress,
    global: &Global,
) -> Result<(CalibrationData, CalibrationData)> {
    let read = (settings.steps as usize).saturating_mul(settings.batch);
    let wanted = read.saturating_add(read / (HELD_OUT - 1) + 1);
    let arguments = Compress {
        windows: wanted.clamp(2, super::MOST_WINDOWS),
        ..arguments.clone()
    };
    let all = data::calibration(package, model, None, &arguments, global)?
        .context("--heal needs --calibrate FILE: what to train on")?;
    let (mut training, mut validation): (Vec<Example>, Vec<Example>) = (Vec::new(), Vec::new());
    for (index, example) in all.examples().iter().enumerate() {
        match index % HELD_OUT == 1 && validation.len() < MOST_HELD_OUT {
            true => validation.push(example.clone()),
            false => training.push(example.clone()),
        }
    }
    ensure!(
        !validation.is_empty(),
        "--heal has {} example, but needs at least 2: one to train on and one held out",
        all.len()
    );
    Ok((
        CalibrationData::new(training)?,
        CalibrationData::new(validation)?,
    ))
}
