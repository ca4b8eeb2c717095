//! `--heal`: the compressed model trained further.

use anyhow::{Context, Result, ensure};
use lapidary_compress::{
    AdapterSettings, CalibrationData, Example, HealData, HealReport, HealSettings, heal,
};
use lapidary_model::{Model, Package};
use lapidary_train::log::Progress;

use super::{Healing, data};
use crate::cli::{Compress, Global};

/// Of so many examples one is held out.
const HELD_OUT: usize = 10;

/// Most examples that are held out.
const MOST_HELD_OUT: usize = 64;

/// Trains `model` for `steps` and gives what it became.
pub(super) fn run(
    steps: u64,
    model: &Model,
    told: Healing<'_>,
    arguments: &Compress,
    global: &Global,
) -> Result<(Model, HealReport)> {
    let Healing {
        package,
        original,
        rounding,
    } = told;
    let settings = HealSettings {
        steps,
        rate: arguments.heal_rate,
        distil: arguments.distil,
        hints: arguments.hints,
        regrow: arguments.regrow,
        adapters: adapters(arguments),
        rounding,
        seed: global.seed,
        ..HealSettings::default()
    };
    let (training, validation) = examples(&settings, package, original, arguments, global)?;
    let data = HealData {
        training: &training,
        validation: &validation,
        teacher: Some(original),
    };
    let tokens = (training.tokens() / training.len() * settings.batch) as u64;
    let mut progress = Progress::new(0, steps);
    let healed = heal(model, &data, &settings, |step, loss| {
        progress.step(step, loss, tokens);
    });
    progress.finish();
    Ok(healed?)
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
