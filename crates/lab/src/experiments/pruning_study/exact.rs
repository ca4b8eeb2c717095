//! What holds at any scale.

use crate::error::engine;
use crate::experiments::{decoder, numbers};
use crate::{Error, Result};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, HealData, HealSettings, Method,
    PruneAndHeal, PruneSettings, Requirements, Scope, Selection, Settings, Statistic, Task,
    prune_and_heal,
};
use lapidary_kernels::{DType, Device};
use lapidary_model::Model;
use lapidary_train::generator;
use rand::RngExt;

/// What was measured.
#[derive(Default)]
pub(super) struct Exact {
    /// Pruned weights.
    pub(super) zeros: usize,
    /// How many of them are not zero after training.
    pub(super) changed: usize,
    /// How many of the others are not what they were.
    pub(super) trained: usize,
    /// Steps of training.
    pub(super) steps: u64,
    /// Rows of which exactly one weight was taken out, and all rows.
    pub(super) rows: [usize; 2],
    /// `|δᵀ H δ − w² / [H⁻¹]_qq|`, relative, the most of a row.
    pub(super) rise: f64,
    /// Largest `|H δ|` of a weight that is left.
    pub(super) gradient: f64,
}

const VOCABULARY: usize = 24;
const WIDTH: usize = 16;
const DAMPING: f64 = 0.01;

pub(super) fn measured(seed: u64) -> Result<Exact> {
    let spec = decoder::spec(VOCABULARY, WIDTH, 2);
    let mut random = generator(seed);
    let windows = (0..12).map(|_| {
        let window = (0..12).map(|_| random.random_range(0..VOCABULARY as u32));
        window.collect::<Vec<u32>>()
    });
    let data = CalibrationData::windows(windows.collect::<Vec<_>>())?;
    let model = Model::initialised(spec.clone(), seed, DType::F32, &Device::Cpu)?;
    let mut exact = zeros(&model, &data)?;
    let model = Model::initialised(spec, seed, DType::F64, &Device::Cpu)?;
    one_weight(&model, &data, &mut exact)?;
    Ok(exact)
}

/// What becomes of weights that were pruned, and of the others, in training.
fn zeros(model: &Model, data: &CalibrationData) -> Result<Exact> {
    let healing = |steps: u64| HealSettings {
        steps,
        rate: 1e-2,
        weight_decay: 0.1,
        patience: 0,
        ..HealSettings::default()
    };
    let settings = Settings::default();
    let pruned = |healing: &HealSettings| -> Result<_> {
        let told = PruneAndHeal {
            method: Method::find("magnitude")?,
            settings: &settings,
            calibration: data,
            keep: 0.3,
            rounds: 1,
            rewind: None,
            healing,
        };
        let learned = HealData {
            training: data,
            validation: data,
            teacher: None,
        };
        Ok(prune_and_heal(model, &learned, &told)?)
    };
    let (before, _) = pruned(&healing(0))?;
    let (after, reports) = pruned(&healing(20))?;
    let mut exact = Exact {
        steps: reports.iter().map(|report| report.steps).sum(),
        ..Exact::default()
    };
    for module in &before.report.modules {
        let weights = |model: &Model| -> Result<Vec<f64>> {
            let weight = model.parameters().get(&format!("{}.weight", module.path));
            weight.map_or(Ok(Vec::new()), numbers)
        };
        let pairs = weights(&before.model)?
            .into_iter()
            .zip(weights(&after.model)?);
        for (before, after) in pairs {
            let moved = usize::from(after != before);
            match before == 0.0 {
                true => {
                    exact.zeros += 1;
                    exact.changed += moved;
                }
                false => exact.trained += moved,
            }
        }
    }
    Ok(exact)
}

/// One weight of each row of a layer goes: the difference between the error and its formula, and the
/// largest gradient of what is left.
fn one_weight(model: &Model, data: &CalibrationData, exact: &mut Exact) -> Result<()> {
    let path = "blocks.0.attention.query";
    let statistic = Statistic::Covariance {
        site: "blocks.0.attention.in".to_owned(),
    };
    let needed = Requirements {
        statistics: [statistic.clone()].into(),
    };
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, data, &needed, options)?;
    let mut hessian = numbers(&calibration.tensor(&statistic)?)?;
    let mean = (0..WIDTH)
        .filter_map(|i| hessian.get(i * WIDTH + i))
        .sum::<f64>()
        / WIDTH as f64;
    for i in 0..WIDTH {
        if let Some(entry) = hessian.get_mut(i * WIDTH + i) {
            *entry += DAMPING * mean;
        }
    }
    let shape = (WIDTH, WIDTH);
    let square = lapidary_kernels::Tensor::from_vec(hessian.clone(), shape, &Device::Cpu);
    let square = lapidary_factor::matrix_from_tensor("second moment", &engine(square)?)
        .map_err(|error| Error::Experiment(error.to_string()))?;
    let inverse = lapidary_factor::cholesky("second moment", square.as_ref())
        .map_err(|error| Error::Experiment(error.to_string()))?
        .inverse_diagonal();
    let settings = Settings {
        selection: Selection::layers([path]),
        pruning: PruneSettings {
            scope: Some(Scope::Row),
            damping: DAMPING,
            block: WIDTH,
            ..PruneSettings::default()
        },
        ..Settings::default()
    };
    let method = Method::find("second-order")?;
    let task = Task {
        data: Some(data),
        settings: Some(&settings),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(1.0 - 1.0 / WIDTH as f64))?;
    let pruned = method.apply(&task, &plan)?;
    let weights = |model: &Model| -> Result<Vec<f64>> {
        let weight = model.parameters().get(&format!("{path}.weight"));
        weight.map_or(Ok(Vec::new()), numbers)
    };
    let (before, after) = (weights(model)?, weights(&pruned.model)?);
    for (before, after) in before.chunks(WIDTH).zip(after.chunks(WIDTH)) {
        let delta: Vec<f64> = after.iter().zip(before).map(|(a, b)| a - b).collect();
        let slope = hessian
            .chunks(WIDTH)
            .map(|row| -> f64 { row.iter().zip(&delta).map(|(h, d)| h * d).sum() });
        let slope: Vec<f64> = slope.collect();
        let error: f64 = slope.iter().zip(&delta).map(|(s, d)| s * d).sum();
        let gone = after.iter().zip(before).zip(&inverse);
        let gone = gone.filter(|((after, _), _)| **after == 0.0);
        let formulas: Vec<f64> = gone.map(|((_, w), diagonal)| w * w / diagonal).collect();
        exact.rows[1] += 1;
        if let [formula] = formulas.as_slice() {
            exact.rows[0] += 1;
            exact.rise = exact.rise.max((error - formula).abs() / formula);
        }
        let left = slope.iter().zip(after).filter(|(_, after)| **after != 0.0);
        exact.gradient = left.fold(exact.gradient, |most, (slope, _)| most.max(slope.abs()));
    }
    Ok(())
}
