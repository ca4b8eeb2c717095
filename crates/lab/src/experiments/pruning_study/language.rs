//! A decoder of characters, pruned in every way.

use std::collections::BTreeMap;

use super::{CRITERIA, HEALED, HURT, IN_ROUNDS, PLAIN, Size};
use crate::experiments::bigram::{TextTask, bytes_split};
use crate::experiments::decoder::{self, LENGTH, Recipe};
use crate::experiments::mean;
use crate::{Result, Series, Setting};
use lapidary_compress::quality::{Window, perplexity, sliding_windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Compressed, HealData, HealSettings,
    Method, MovementSettings, PruneAndHeal, PruneSettings, Requirements, Settings, Task as Cut,
    Work, heal, prune_and_heal,
};
use lapidary_kernels::{SparseSizes, Tensor};
use lapidary_model::Model;
use lapidary_train::data::{BYTE_VOCABULARY, LanguageTask, Task};
use lapidary_train::generator;
use lapidary_train::language::Split;

/// The highest rate of healing, the largest that the study names.
pub(super) const RATE: f64 = 5e-4;
/// Sequences of a forward pass, and of a step of healing.
const BATCH: usize = 8;
/// Methods that take out whole heads and channels, at these shares.
pub(super) const STRUCTURED: [&str; 3] = ["prune-heads", "channel-gradient", "channel-magnitude"];
const TAKEN_OUT: [f64; 3] = [0.25, 0.5, 0.75];
/// The criterion that is learned while it prunes.
pub(super) const MOVEMENT: &str = "movement";
/// Share of the weights that change places at the first turn, as published.
const REGROWN: f64 = 0.3;

/// What happens beside pruning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Nothing.
    Plain,
    /// Training afterwards.
    Healed,
    /// Rounds of pruning and training.
    Rounds,
    /// Rounds whose weights go back to earlier ones.
    Rewound,
    /// Rounds of pruning alone.
    Alone,
    /// Training afterwards, in which zeros change places.
    Regrown,
}

struct Point {
    method: &'static str,
    way: Way,
    share: f64,
    loss: f64,
    /// Bytes of the model, each matrix stored as is smallest.
    bytes: f64,
    /// Operations of a token without those of zeros.
    operations: f64,
}

/// Every measured point, of every seed.
#[derive(Default)]
pub(super) struct Curves {
    pub(super) text: String,
    points: Vec<Point>,
    dense: Vec<f64>,
    control: Vec<f64>,
    /// Operations of a token of the dense model.
    operations: Vec<f64>,
}

impl Curves {
    pub(super) fn add(&mut self, other: Self) {
        self.text = other.text;
        self.points.extend(other.points);
        self.dense.extend(other.dense);
        self.control.extend(other.control);
        self.operations.extend(other.operations);
    }

    /// Loss of the dense model, the mean over seeds.
    pub(super) fn dense(&self) -> f64 {
        mean(self.dense.iter().copied())
    }

    /// That of the dense model trained on for as many steps as the others heal.
    pub(super) fn control(&self) -> f64 {
        mean(self.control.iter().copied())
    }

    /// The mean loss over seeds.
    pub(super) fn loss(&self, method: &str, way: Way, share: f64) -> f64 {
        let here = |point: &&Point| (point.method, point.way, point.share) == (method, way, share);
        let found: Vec<f64> = self.points.iter().filter(here).map(|p| p.loss).collect();
        match found.is_empty() {
            true => f64::NAN,
            false => mean(found),
        }
    }

    /// Shares and losses of one criterion.
    pub(super) fn curve(&self, method: &str, way: Way) -> Vec<(f64, f64)> {
        let shares = PLAIN
            .into_iter()
            .map(|share| (share, self.loss(method, way, share)));
        shares.filter(|(_, loss)| loss.is_finite()).collect()
    }

    /// The share from which on the loss is more than 5 % above `dense`, between the measured ones by a
    /// straight line; where it is so at none, the last share and `false`.
    pub(super) fn hurt(&self, method: &str, way: Way, dense: f64) -> (f64, bool) {
        let limit = HURT * dense;
        let mut last = (0.0, dense);
        for (share, loss) in self.curve(method, way) {
            if loss > limit {
                let part = (limit - last.1) / (loss - last.1);
                return (last.0 + part * (share - last.0), true);
            }
            last = (share, loss);
        }
        (last.0, false)
    }

    /// Bytes and losses of every method without training.
    pub(super) fn by_bytes(&self) -> Vec<Series> {
        self.against(&|point| point.bytes)
    }

    /// Operations of a token and losses of every method without training, the dense model first.
    pub(super) fn by_operations(&self) -> Vec<Series> {
        let dense = (mean(self.operations.iter().copied()), self.dense());
        let mut all = self.against(&|point| point.operations);
        for series in &mut all {
            series.points.insert(0, dense);
        }
        all
    }

    /// What each method's points have beside their losses, without training, by their shares.
    fn against(&self, of: &dyn Fn(&Point) -> f64) -> Vec<Series> {
        let methods = CRITERIA.into_iter().chain(STRUCTURED);
        let series = methods.map(|method| {
            let mut by_share: BTreeMap<u64, Vec<&Point>> = BTreeMap::new();
            for point in &self.points {
                if (point.method, point.way) == (method, Way::Plain) {
                    by_share
                        .entry(point.share.to_bits())
                        .or_default()
                        .push(point);
                }
            }
            let points = by_share.into_values().map(|points| {
                let place = mean(points.iter().map(|point| of(point)));
                (place, mean(points.iter().map(|point| point.loss)))
            });
            Series {
                name: method.to_owned(),
                points: points.collect(),
            }
        });
        series.collect()
    }
}

/// A training side and two held-out ones, one to stop by and one to measure on.
struct Sides {
    what: String,
    training: Box<dyn Task>,
    validation: Box<dyn Task>,
    tests: Box<dyn Task>,
}

fn sides(setting: &Setting, seed: u64) -> Result<Sides> {
    let file = setting
        .data
        .as_ref()
        .map(|data| data.join("tiny_shakespeare.txt"));
    if let Some(file) = file.filter(|file| file.is_file()) {
        let (training, mut validation) = bytes_split(&file)?;
        let tests = validation.split_off(validation.len() / 2);
        let side = |tokens| Box::new(TextTask::new(tokens, BYTE_VOCABULARY as usize));
        return Ok(Sides {
            what: "the bytes of tiny_shakespeare.txt".to_owned(),
            training: side(training),
            validation: side(validation),
            tests: side(tests),
        });
    }
    let side = |split| -> Result<Box<dyn Task>> {
        Ok(Box::new(LanguageTask::new(decoder::corpus(split, seed)?)))
    };
    Ok(Sides {
        what: "the generated language".to_owned(),
        training: side(Split::Training)?,
        validation: side(Split::HeldOut)?,
        tests: side(Split::HeldOut)?,
    })
}

fn windows(task: &mut dyn Task, count: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
    let batch = task.batch(&mut generator(seed), count, LENGTH)?;
    Ok(batch.inputs.chunks(LENGTH).map(<[u32]>::to_vec).collect())
}

/// A trained decoder with what it is pruned, healed and measured by.
struct Subject {
    model: Model,
    /// Its weights after a tenth of its training.
    early: Model,
    calibration: CalibrationData,
    training: CalibrationData,
    validation: CalibrationData,
    tests: Vec<Window>,
    size: Size,
    seed: u64,
}

/// Every point of one seed.
pub(super) fn curves(size: Size, setting: &Setting, seed: u64) -> Result<Curves> {
    let mut sides = sides(setting, seed)?;
    let read = size.healing as usize * BATCH;
    let calibration = windows(sides.training.as_mut(), size.calibration, seed ^ 1)?;
    let training = windows(sides.training.as_mut(), read, seed ^ 2)?;
    let validation = windows(sides.validation.as_mut(), size.tests, seed ^ 3)?;
    let mut tests = Vec::new();
    for window in windows(sides.tests.as_mut(), size.tests, seed ^ 4)? {
        tests.extend(sliding_windows(&window, LENGTH, LENGTH - 1)?);
    }
    let spec = decoder::spec(sides.training.vocabulary(), size.width, size.blocks);
    let (mut kept, at) = (None, (size.steps / 10).max(1));
    let watch = |step: &lapidary_train::Step, model: &Model| {
        if step.step == at {
            kept = Some(copied(model)?);
        }
        Ok(())
    };
    let model = decoder::train_watched(
        Recipe::default(),
        spec,
        sides.training,
        size.steps,
        seed,
        watch,
    )?;
    let subject = Subject {
        early: match kept {
            Some(early) => early,
            None => copied(&model)?,
        },
        calibration: CalibrationData::windows(calibration)?,
        training: CalibrationData::windows(training)?,
        validation: CalibrationData::windows(validation)?,
        model,
        tests,
        size,
        seed,
    };
    Ok(Curves {
        text: sides.what,
        dense: vec![subject.loss(&subject.model)?],
        control: vec![subject.control()?],
        operations: vec![operations(&subject.model)?],
        points: subject.points()?,
    })
}

/// A model of the same weights as they are now.
fn copied(model: &Model) -> Result<Model> {
    let mut parameters: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, tensor) in model.parameters() {
        let copy = crate::error::engine(tensor.copy())?.detach();
        parameters.insert(name.clone(), copy);
    }
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}

impl Subject {
    fn loss(&self, model: &Model) -> Result<f64> {
        Ok(perplexity(model, &self.tests, BATCH)?.value.ln())
    }

    fn healing(&self, steps: u64) -> HealSettings {
        HealSettings {
            steps,
            rate: RATE,
            batch: BATCH,
            every: (steps / 4).max(1),
            patience: 0,
            seed: self.seed,
            ..HealSettings::default()
        }
    }

    fn data(&self) -> HealData<'_> {
        HealData {
            training: &self.training,
            validation: &self.validation,
            teacher: None,
        }
    }

    /// Loss of the dense model after as many steps as the others heal.
    fn control(&self) -> Result<f64> {
        let healing = self.healing(self.size.healing);
        let (model, _) = heal(&self.model, &self.data(), &healing, |_, _| ())?;
        self.loss(&model)
    }

    fn settings(&self) -> Settings {
        Settings {
            seed: self.seed,
            pruning: PruneSettings {
                block: 32,
                ..PruneSettings::default()
            },
            ..Settings::default()
        }
    }

    fn points(&self) -> Result<Vec<Point>> {
        let settings = self.settings();
        let methods = CRITERIA.into_iter().chain(STRUCTURED);
        let mut needed = Requirements::default();
        for method in methods {
            needed = needed.union(Method::find(method)?.requirements(&self.model, &settings)?);
        }
        let options = CalibrationOptions::default();
        let calibration = Calibration::collect(&self.model, &self.calibration, &needed, options)?;
        let mut points = Vec::new();
        let mut add = |method, way, share: f64, compressed: &Compressed| -> Result<()> {
            points.push(Point {
                method,
                way,
                share,
                loss: self.loss(&compressed.model)?,
                bytes: bytes(&compressed.model)? as f64,
                operations: operations(&compressed.model)?,
            });
            Ok(())
        };
        let plain = CRITERIA
            .iter()
            .flat_map(|method| PLAIN.map(|share| (*method, share)));
        let whole = STRUCTURED
            .iter()
            .flat_map(|method| TAKEN_OUT.map(|share| (*method, share)));
        for (name, share) in plain.chain(whole) {
            let method = Method::find(name)?;
            let task = Cut {
                model: &self.model,
                calibration: Some(&calibration),
                data: Some(&self.calibration),
                settings: Some(&settings),
            };
            let plan = method.plan(&task, &Budget::Keep(1.0 - share))?;
            add(name, Way::Plain, share, &method.apply(&task, &plan)?)?;
        }
        let rounds = self.size.rounds;
        let (healing, none) = (self.healing(self.size.healing), self.healing(0));
        for name in CRITERIA {
            for share in HEALED {
                let found = self.healed(name, share, 1, None, &healing)?;
                add(name, Way::Healed, share, &found)?;
            }
            for share in IN_ROUNDS {
                let found = self.healed(name, share, rounds, None, &healing)?;
                add(name, Way::Rounds, share, &found)?;
                let found = self.healed(name, share, rounds, None, &none)?;
                add(name, Way::Alone, share, &found)?;
            }
        }
        for share in IN_ROUNDS {
            let found = self.healed("magnitude", share, rounds, Some(&self.early), &healing)?;
            add("magnitude", Way::Rewound, share, &found)?;
        }
        let regrowing = HealSettings {
            regrow: REGROWN,
            ..healing
        };
        for share in HEALED {
            add(MOVEMENT, Way::Healed, share, &self.moved(share)?)?;
            let found = self.healed("magnitude", share, 1, None, &regrowing)?;
            add("magnitude", Way::Regrown, share, &found)?;
        }
        Ok(points)
    }

    /// Pruned by movement, in a training of as many steps as the others heal. As these give the best of what they
    /// validate, it gives the best on a tenth of its text.
    fn moved(&self, share: f64) -> Result<Compressed> {
        let mut settings = self.settings();
        settings.pruning.movement = MovementSettings {
            steps: self.size.healing,
            every: (self.size.healing / 20).max(1),
            rate: RATE,
            batch: BATCH,
            held_out: 10,
            ..MovementSettings::default()
        };
        let method = Method::find(MOVEMENT)?;
        let task = Cut {
            data: Some(&self.training),
            settings: Some(&settings),
            ..Cut::new(&self.model)
        };
        let plan = method.plan(&task, &Budget::Keep(1.0 - share))?;
        Ok(method.apply(&task, &plan)?)
    }

    fn healed(
        &self,
        method: &str,
        share: f64,
        rounds: usize,
        rewind: Option<&Model>,
        healing: &HealSettings,
    ) -> Result<Compressed> {
        let settings = self.settings();
        let told = PruneAndHeal {
            method: Method::find(method)?,
            settings: &settings,
            calibration: &self.calibration,
            keep: 1.0 - share,
            rounds,
            rewind,
            healing,
        };
        Ok(prune_and_heal(&self.model, &self.data(), &told)?.0)
    }
}

/// Operations of a token of a window, those of zeros left out.
fn operations(model: &Model) -> Result<f64> {
    Ok(Work::of(model, LENGTH)?.operations as f64 / LENGTH as f64)
}

/// Bytes of a model whose linear layers are stored as is smallest: dense, as bitmaps or as CSR.
fn bytes(model: &Model) -> Result<usize> {
    let all: usize = model
        .parameters()
        .values()
        .map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes())
        .sum();
    let mut saved = 0;
    for linear in model.linears() {
        let Some(weight) = model.parameters().get(&format!("{}.weight", linear.path)) else {
            continue;
        };
        let values = crate::experiments::numbers(weight)?;
        let entries = values.iter().filter(|value| **value != 0.0).count();
        let value = weight.dtype().size_in_bytes();
        let sizes = SparseSizes::of(linear.output, linear.input, entries, value, false);
        saved += sizes.dense - sizes.dense.min(sizes.bitmap).min(sizes.csr);
    }
    Ok(all - saved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_share_hurts_the_last_one_is_told_as_not_hurt() {
        let point = |way: Way, share: f64, loss: f64| Point {
            method: "magnitude",
            way,
            share,
            loss,
            bytes: 0.0,
            operations: 0.0,
        };
        let curves = Curves {
            points: vec![
                point(Way::Plain, 0.5, 1.0),
                point(Way::Plain, 0.9, 1.1),
                point(Way::Healed, 0.5, 1.0),
                point(Way::Healed, 0.9, 1.04),
            ],
            ..Curves::default()
        };
        let (share, hurt) = curves.hurt("magnitude", Way::Plain, 1.0);
        // A rise of 5 % is half of the way from 50 % to 90 %.
        assert!(hurt && (share - 0.7).abs() < 1e-9, "{share}");
        assert_eq!(curves.hurt("magnitude", Way::Healed, 1.0), (0.9, false));
    }
}
