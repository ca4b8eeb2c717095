//! Pruning and training that take turns.

use lapidary_model::Model;

use super::{HealData, HealReport, HealSettings, heal, zeros};
use crate::method::{Method, Settings, Task};
use crate::plan::{Budget, Change};
use crate::report::Compressed;
use crate::{Calibration, CalibrationData, CalibrationOptions, Error, Pattern, Result};

/// `s_f + (s_0 − s_f)(1 − t)³`, the sparsity at a share `t` of the way from `first` to `last` (Zhu &
/// Gupta 2017, arXiv 1710.01878): most goes while there is most to spare.
///
/// ```
/// use lapidary_compress::cubic_sparsity;
/// assert_eq!(cubic_sparsity(0.0, 0.8, 0.0), 0.0);
/// assert!((cubic_sparsity(0.0, 0.8, 0.5) - 0.7).abs() < 1e-12);
/// assert_eq!(cubic_sparsity(0.0, 0.8, 1.0), 0.8);
/// ```
pub fn cubic_sparsity(first: f64, last: f64, progress: f64) -> f64 {
    last + (first - last) * (1.0 - progress.clamp(0.0, 1.0)).powi(3)
}

/// What pruning in rounds is told.
#[derive(Clone, Copy, Debug)]
pub struct PruneAndHeal<'a> {
    /// The method.
    pub method: &'static Method,
    /// Its settings.
    pub settings: &'a Settings,
    /// What it is calibrated on, anew in each round.
    pub calibration: &'a CalibrationData,
    /// The share of weights that stays in the end.
    pub keep: f64,
    /// Rounds, which follow the cubic ramp and share the steps of healing; 1 is one shot.
    pub rounds: usize,
    /// A model of the same shape, such as the original early in its training, whose weights are put in
    /// the place of those that are left before each round heals (Frankle et al. 2019, arXiv 1903.01611).
    /// The rate is rewound in any case: each round has the whole schedule.
    pub rewind: Option<&'a Model>,
    /// How each round heals; no steps for none.
    pub healing: &'a HealSettings,
}

/// Prunes `model` and heals it, in one shot or in rounds. Gives the last round's report about the
/// healed model, and each round's healing.
///
/// # Errors
/// Those of the method and of [`heal`]; when weights are to be rewound that the method gave another
/// shape; and when zeros are to change places that a pattern holds.
pub fn prune_and_heal(
    model: &Model,
    data: &HealData<'_>,
    told: &PruneAndHeal<'_>,
) -> Result<(Compressed, Vec<HealReport>)> {
    if told.healing.regrow > 0.0 && told.settings.pruning.pattern != Pattern::Unstructured {
        return Err(Error::invalid(
            "share that regrows",
            told.healing.regrow,
            "0 with a pattern of zeros, which what grows would break",
        ));
    }
    let rounds = told.rounds.max(1);
    let goal = 1.0 - told.keep;
    let mut healings = Vec::new();
    let mut current: Option<Compressed> = None;
    for round in 1..=rounds {
        let at = |round: usize| cubic_sparsity(0.0, goal, round as f64 / rounds as f64);
        let before = current
            .as_ref()
            .map_or(model, |compressed| &compressed.model);
        // What was set to zero is still there, and counts; what was taken out does not.
        let masks = current.as_ref().is_none_or(sets_zeros);
        let keep = match masks {
            true => 1.0 - at(round),
            false => (1.0 - at(round)) / (1.0 - at(round - 1)),
        };
        let mut compressed = pruned(before, told, keep)?;
        if let Some(early) = told.rewind {
            compressed.model = rewound(&compressed, early)?;
        }
        let steps = told.healing.steps;
        let share = steps / rounds as u64;
        let settings = HealSettings {
            steps: match round == rounds {
                true => steps - share * (rounds as u64 - 1),
                false => share,
            },
            seed: told.healing.seed.wrapping_add(round as u64),
            ..told.healing.clone()
        };
        if settings.steps > 0 {
            let (healed, report) = heal(&compressed.model, data, &settings, |_, _| ())?;
            compressed.set_healed(healed);
            healings.push(report);
        }
        current = Some(compressed);
    }
    let compressed = current.ok_or_else(|| Error::invalid("rounds", 0, "at least 1"))?;
    Ok((compressed, healings))
}

fn sets_zeros(compressed: &Compressed) -> bool {
    let mut modules = compressed.report.modules.iter();
    modules.any(|module| matches!(module.change, Change::Prune { .. }))
}

fn pruned(model: &Model, told: &PruneAndHeal<'_>, keep: f64) -> Result<Compressed> {
    let requirements = told.method.requirements(model, told.settings)?;
    let calibration = match requirements.is_empty() {
        true => None,
        false => Some(Calibration::collect(
            model,
            told.calibration,
            &requirements,
            CalibrationOptions::default(),
        )?),
    };
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data: Some(told.calibration),
        settings: Some(told.settings),
    };
    Ok(told.method.cut(&task, &Budget::Keep(keep))?.1)
}

/// The weights of `early` with the zeros of the pruned model.
fn rewound(compressed: &Compressed, early: &Model) -> Result<Model> {
    let model = &compressed.model;
    if early.spec() != model.spec() {
        let shapes = |model: &Model| -> Vec<(String, Vec<usize>)> {
            let parameters = model.parameters().iter();
            parameters
                .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
                .collect()
        };
        if shapes(early) != shapes(model) {
            return Err(Error::invalid(
                "the model whose weights are rewound to",
                "of another shape",
                "of the shape of the pruned one: rewind only what is set to zero, not what is taken out",
            ));
        }
    }
    let masks = zeros(model)?;
    let mut parameters = early.parameters().clone();
    for (name, tensor) in &mut parameters {
        *tensor = masks.masked(name, &tensor.detach())?;
    }
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}
