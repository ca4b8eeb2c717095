//! Blocks that become linear maps or go, and what training afterwards makes of it.

use crate::experiments::after_training;
use crate::experiments::decoder;
use crate::experiments::depth::{BATCH, Size, Subject};
use crate::{Claim, Result, Scale};
use lapidary_compress::{CalibrationData, Change, HealData, HealSettings, Settings, heal};
use lapidary_model::Model;

/// Weight of the streams behind blocks, whose errors are relative, beside the loss in nats.
const STREAMS: f64 = 1.0;
/// Windows that decide when healing was best.
const VALIDATION: u64 = 16;

/// Losses when blocks are replaced or go.
pub(super) struct Cost {
    pub(super) what: &'static str,
    pub(super) blocks: Vec<usize>,
    pub(super) deleted: f64,
    pub(super) replaced: f64,
    /// Replaced and trained further on the language.
    pub(super) tuned: f64,
    /// Replaced and trained further on the language and the streams of the whole model.
    pub(super) distilled: f64,
}

pub(super) fn cost(
    subject: &Subject,
    what: &'static str,
    blocks: Vec<usize>,
    steps: u64,
    seed: u64,
) -> Result<Cost> {
    let changed = |method: &str, change: Change| -> Result<_> {
        let mut plan = subject.empty_plan(method)?;
        for block in &blocks {
            if let Some(module) = plan.modules.get_mut(*block) {
                module.change = change.clone();
            }
        }
        Ok(subject.apply(&plan)?.model)
    };
    let replaced = changed("linearise", Change::Linearise { blocks: 1 })?;
    let lesson = Lesson::new(subject, steps, seed)?;
    Ok(Cost {
        what,
        deleted: subject.loss(&changed("delete-linear", Change::Remove)?)?,
        tuned: subject.loss(&subject.tuned(&replaced, steps)?)?,
        distilled: subject.loss(&lesson.distilled(&replaced)?)?,
        replaced: subject.loss(&replaced)?,
        blocks,
    })
}

/// What replaced models learn from the whole one.
pub(super) struct Lesson<'a> {
    whole: &'a Model,
    training: CalibrationData,
    validation: CalibrationData,
    settings: HealSettings,
}

impl<'a> Lesson<'a> {
    pub(super) fn new(subject: &'a Subject, steps: u64, seed: u64) -> Result<Self> {
        let settings = HealSettings {
            steps: steps.max(1),
            rate: 1e-3,
            batch: decoder::BATCH,
            hints: STREAMS,
            patience: 0,
            every: (steps / 2).max(1),
            seed,
            ..HealSettings::default()
        };
        let read = settings.steps * decoder::BATCH as u64;
        let windows = subject.text.training.fixed_windows(read + VALIDATION)?;
        let (validation, training) = windows.split_at(VALIDATION as usize);
        Ok(Self {
            whole: &subject.model,
            training: CalibrationData::windows(training.to_vec())?,
            validation: CalibrationData::windows(validation.to_vec())?,
            settings,
        })
    }

    /// The model trained on the language and on the streams of the whole one.
    pub(super) fn distilled(&self, model: &Model) -> Result<Model> {
        let data = HealData {
            training: &self.training,
            validation: &self.validation,
            teacher: Some(self.whole),
        };
        Ok(heal(model, &data, &self.settings, |_, _| ())?.0)
    }
}

/// Ways to be rid of blocks, each choosing by itself and trained further.
const WAYS: [(&str, &str); 3] = [
    ("left out", "delete-linear"),
    ("linear maps", "linearise"),
    ("ReplaceMe", "replaceme"),
];

/// What one way leaves.
pub(super) struct Cut {
    way: &'static str,
    gone: usize,
    /// Loss as it was cut.
    cut: f64,
    /// Loss when trained further on the language.
    tuned: f64,
}

/// One and two blocks gone, each way.
pub(super) fn cuts(subject: &Subject, size: Size, steps: u64) -> Result<Vec<Cut>> {
    let settings = Settings {
        batch: BATCH,
        ..Settings::default()
    };
    let mut cuts = Vec::new();
    for gone in [1, 2] {
        for (way, method) in WAYS {
            let model = subject.without(method, gone, size.blocks, &settings)?.model;
            cuts.push(Cut {
                way,
                gone,
                cut: subject.loss(&model)?,
                tuned: subject.loss(&subject.tuned(&model, steps)?)?,
            });
        }
    }
    Ok(cuts)
}

pub(super) fn claim(scale: Scale, cuts: &[Cut]) -> Claim {
    let tuned = |way: &str, gone: usize| {
        let found = cuts.iter().find(|cut| (cut.way, cut.gone) == (way, gone));
        found.map_or(f64::NAN, |cut| cut.tuned)
    };
    let best = [1, 2].into_iter().all(|gone| {
        let maps = tuned("linear maps", gone);
        maps <= tuned("left out", gone) && maps <= tuned("ReplaceMe", gone)
    });
    let listed = cuts.iter().map(|cut| {
        let Cut {
            way,
            gone,
            cut,
            tuned,
        } = cut;
        format!("{gone} gone, {way}: {cut:.4}, trained further {tuned:.4} nats")
    });
    Claim::new(
        "trained further, linear maps for the most linear blocks lose no more than those blocks left out, or \
         as many cut by ReplaceMe",
        "maps are proposed in place of blocks; not compared with ReplaceMe",
        listed.collect::<Vec<_>>().join("; "),
        after_training(scale, best),
    )
    .noted("a map of its own has width² weights; what is left out or merged has none")
}
