//! One method after another, each calibrated on what the one before it left.

use std::time::Instant;

use anyhow::{Result, ensure};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Method, Plan,
    Settings, Task,
};
use lapidary_model::Model;
use serde::Serialize;

/// A method and the share of weights that it takes away.
#[derive(Clone, Copy)]
pub(super) struct Stage {
    pub(super) method: &'static Method,
    pub(super) ratio: f64,
}

/// The stages of `a+b` at `0.2` or `0.1+0.2`: one ratio is shared, so that together they take
/// as much away.
pub(super) fn stages(methods: &str, ratios: &str) -> Result<Vec<Stage>> {
    let methods = methods
        .split('+')
        .map(|name| method(name.trim()))
        .collect::<Result<Vec<_>>>()?;
    let found = ratios
        .split('+')
        .map(|text| {
            let ratio = text.trim().parse::<f64>();
            ratio.map_err(|_| anyhow::anyhow!("ratio is {text:?}, but must be a number"))
        })
        .collect::<Result<Vec<_>>>()?;
    for ratio in &found {
        ensure!(
            *ratio > 0.0 && *ratio < 1.0,
            "ratio is {ratio}, but must be above 0 and below 1: the share of weights to remove"
        );
    }
    let ratios = match found.as_slice() {
        [one] => vec![1.0 - (1.0 - one).powf(1.0 / methods.len() as f64); methods.len()],
        several => several.to_vec(),
    };
    ensure!(
        ratios.len() == methods.len(),
        "there are {} ratios for {} methods, but must be one, or one for each",
        ratios.len(),
        methods.len()
    );
    let stages = methods.into_iter().zip(ratios);
    Ok(stages
        .map(|(method, ratio)| Stage { method, ratio })
        .collect())
}

/// The method of that name; short forms are allowed.
pub(super) fn method(name: &str) -> Result<&'static Method> {
    Ok(Method::find(match name {
        "activation" => "activation-weighted",
        "row-column" => "row-column-fisher",
        "generalised" => "generalised-fisher",
        other => other,
    })?)
}

/// Where a stage's time went, in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Seconds {
    pub(super) calibration: f64,
    pub(super) cut: f64,
}

impl Stage {
    /// Calibrates the model, plans and cuts.
    pub(super) fn run(
        self,
        model: &Model,
        data: Option<&CalibrationData>,
        settings: &Settings,
    ) -> Result<(Compressed, Plan, Seconds)> {
        let started = Instant::now();
        let requirements = self.method.requirements(model, settings)?;
        let calibration = match data {
            Some(data) if !requirements.is_empty() => {
                let options = CalibrationOptions::default();
                Some(Calibration::collect(model, data, &requirements, options)?)
            }
            _ => None,
        };
        let mut seconds = Seconds {
            calibration: started.elapsed().as_secs_f64(),
            cut: 0.0,
        };
        let (compressed, plan) = self.cut(model, calibration.as_ref(), data, settings)?;
        seconds.cut = started.elapsed().as_secs_f64() - seconds.calibration;
        Ok((compressed, plan, seconds))
    }

    /// Plans and cuts what was calibrated already.
    pub(super) fn cut(
        self,
        model: &Model,
        calibration: Option<&Calibration>,
        data: Option<&CalibrationData>,
        settings: &Settings,
    ) -> Result<(Compressed, Plan)> {
        let task = Task {
            model,
            calibration,
            data,
            settings: Some(settings),
        };
        let plan = self.method.plan(&task, &Budget::Keep(1.0 - self.ratio))?;
        for module in &plan.modules {
            if let Change::Leave { reason } = &module.change {
                tracing::info!("{} stays as it is: {reason}", module.path);
            }
        }
        let compressed = self.method.apply(&task, &plan)?;
        Ok((compressed, plan))
    }
}

/// What became of a module, in a word or two.
pub(super) fn changed(change: &Change) -> String {
    match change {
        Change::Factorise { rank } => format!("rank {rank}"),
        Change::Narrow { features } => format!("{features} features"),
        Change::NarrowHeads { query_key, value } => format!("heads of {query_key} and {value}"),
        Change::Slice { width } => format!("width {width}"),
        Change::Remove => "left out".to_owned(),
        Change::Linearise { blocks: 1 } => "a linear map".to_owned(),
        Change::Linearise { blocks } => format!("a linear map for {blocks} blocks"),
        Change::Fuse { from } => format!("takes over from blocks.{from}"),
        Change::Prune { share } => format!("{:.1} % zero", 100.0 * share),
        Change::Edit { mass } => format!("{:.1} % kept", 100.0 * mass),
        Change::Quantise { bits, group } => format!("{bits} bits, groups of {group}"),
        Change::Leave { .. } => "as it was".to_owned(),
    }
}
