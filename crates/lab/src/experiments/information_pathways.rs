//! Information pathways: training on random subsets of keys, on text and on digits, dense and as an
//! ensemble of what was drawn.
//!
//! The paper trains on enwik8, CIFAR-10, ImageNet and molecules. Here a small decoder reads text and an
//! encoder printed digits as 64 pixels; a tenth of the steps at the end is dense.

use super::attending;
use super::classifier::{self, Labelled};
use super::decoder::{self, Recipe};
use super::jobs::by_seed;
use super::masked::{Text, text};
use super::sequences::{
    Course, LEVELS, Measures, SIDE, digits, percent_right, quickest, train, train_from,
};
use super::{after_training, difference, mean, numbers};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::faithfulness::masking::most_likely;
use lapidary_kernels::{
    AttentionOptions, DType, Device, SoftmaxMask, Tensor, Var, attention, backward, softmax,
};
use lapidary_model::{Averaged, Initialiser, Input, Model, ModelSpec, Pass, self_ensemble};
use lapidary_parts::attention::mechanism::subsampled::{Selection, SubsampledSpec};
use lapidary_parts::attention::mechanism::{Describe, Heads};
use lapidary_parts::attention::{MechanismSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::{Mixing, Trace};
use lapidary_train::data::{Batch, IGNORE, Task};
use lapidary_train::generator;
use std::collections::BTreeMap;

/// Members of an ensemble.
const MEMBERS: usize = 16;

/// How much is done.
#[derive(Clone, Copy)]
struct Size {
    blocks: usize,
    width: usize,
    length: usize,
    steps: u64,
    batches: usize,
    digits: (usize, u64),
    seeds: u64,
    timed: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                blocks: 1,
                width: 16,
                length: 32,
                steps: 4,
                batches: 1,
                digits: (20, 2),
                seeds: 1,
                timed: 256,
            },
            Scale::Small => Self {
                blocks: 4,
                width: 64,
                length: 128,
                steps: 500,
                batches: 6,
                digits: (500, 400),
                seeds: 3,
                timed: 2048,
            },
            Scale::Full => Self {
                blocks: 4,
                width: 128,
                length: 256,
                steps: 8000,
                batches: 32,
                digits: (500, 4000),
                seeds: 5,
                timed: 2048,
            },
        }
    }

    fn decoder(self, vocabulary: usize, mechanism: MechanismSpec) -> ModelSpec {
        let attention = MultiHeadSpec {
            causal: true,
            mechanism,
            ..MultiHeadSpec::new((self.width / 16).max(1))
        };
        let attentions = vec![attention; self.blocks];
        attending::spec(vocabulary, self.width, self.length, &attentions)
    }
}

/// A quarter of the keys.
fn quarter(selection: Selection) -> MechanismSpec {
    MechanismSpec::Subsampled(SubsampledSpec {
        selection,
        ..SubsampledSpec::default()
    })
}

fn local(length: usize) -> Selection {
    Selection::Local {
        radius: length as f64 / 8.0,
        columns: None,
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = exact(setting)?;
    let (what, more, plot) = on_text(setting, size)?;
    claims.extend(more);
    claims.extend(on_digits(setting, size)?);
    setting.tell(|| "time".to_owned());
    claims.push(in_time(setting, size)?);
    Ok(Reproduction {
        setting: format!(
            "a decoder of {} blocks of width {} on {what}, {} steps of 8 windows of {}, one seed; {} \
             printed digits as {} pixels, 3 blocks, {} steps of 32, {} seed(s); a quarter of the keys, the \
             last tenth of the steps dense at a tenth of the rate",
            size.blocks,
            size.width,
            size.steps,
            size.length,
            size.digits.0,
            SIDE * SIDE,
            size.digits.1,
            size.seeds
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

/// What holds of any model.
fn exact(setting: &Setting) -> Result<Vec<Claim>> {
    let size = Size {
        length: 32,
        ..Size::of(Scale::Smoke)
    };
    let vocabulary = 50;
    let ids: Vec<u32> = (0..64).map(|i| i * 7 % vocabulary).collect();
    let input = Input::tokens(engine(Tensor::from_vec(
        ids.clone(),
        (2, 32),
        &Device::Cpu,
    ))?);
    // Wide enough that members disagree.
    let mut source = Wide(Initialiser::new(setting.seed, DType::F64, Device::Cpu));
    let dense = Model::new(
        size.decoder(vocabulary as usize, MechanismSpec::Softmax),
        &mut source,
    )?;
    let with = |mechanism| -> Result<Model> {
        let spec = size.decoder(vocabulary as usize, mechanism);
        Ok(Model::new(spec, &mut dense.parameters().clone())?)
    };
    let scores = |model: &Model, draw: Option<u64>| -> Result<Tensor> {
        let pass = Pass {
            draw,
            ..Pass::default()
        };
        Ok(model.forward(&input, pass)?.into_logits()?.into_value())
    };
    let sampled = with(quarter(Selection::Unbiased))?;
    let undrawn = difference(&scores(&sampled, None)?, &scores(&dense, None)?)?;
    let all = with(MechanismSpec::Subsampled(SubsampledSpec {
        keep: 1.0,
        ..SubsampledSpec::default()
    }))?;
    let everything = difference(&scores(&all, Some(1))?, &scores(&dense, None)?)?;

    let together = self_ensemble(
        &sampled,
        &input,
        (MEMBERS, 1),
        Averaged::Probabilities,
        Pass::default,
    )?;
    let loss = |probabilities: &Tensor| -> Result<f64> {
        let all = numbers(probabilities)?;
        let rows = all.chunks(vocabulary as usize).zip(&ids);
        Ok(mean(rows.map(|(row, id)| {
            -row.get(*id as usize).copied().unwrap_or(f64::NAN).ln()
        })))
    };
    let mut members = Vec::new();
    for member in 1..=MEMBERS as u64 {
        let one = self_ensemble(
            &sampled,
            &input,
            (1, member),
            Averaged::Probabilities,
            Pass::default,
        )?;
        members.push(loss(&one.mean)?);
    }
    let (ensemble, member) = (loss(&together.mean)?, mean(members));
    let disagreement = numbers(&together.variance)?.into_iter().fold(0.0, f64::max);

    let all = variables(256, setting.seed)?;
    let counted =
        |keep: f64| -> Result<u64> { Ok(alone(keep, &all, setting.seed)?.operations(16)) };
    let (full, quarter) = (counted(1.0)?, counted(0.25)?);
    Ok(vec![
        Claim::new(
            "without draws, and with all keys kept, it is dense attention with the same parameters",
            "by construction",
            format!(
                "largest relative difference {undrawn:.1e} without draws, {everything:.1e} with all keys"
            ),
            Verdict::of(undrawn == 0.0 && everything < 1e-12),
        ),
        Claim::new(
            "scores and mixing take exactly the share of operations that is kept",
            "by construction",
            format!("{quarter} of {full} operations with a quarter of 256 keys"),
            Verdict::of(4 * quarter == full),
        ),
        Claim::new(
            "an ensemble's cross-entropy is at most the mean of its members'",
            "Jensen's inequality",
            format!(
                "{ensemble:.4} against {member:.4} nats, {MEMBERS} members of an untrained model"
            ),
            Verdict::of(ensemble <= member && disagreement > 0.0),
        ),
    ])
}

/// Initial values wide enough that heads attend to something.
struct Wide(Initialiser);

impl ParameterSource for Wide {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match init {
            Init::Normal { .. } => Init::Normal { deviation: 0.5 },
            other => other,
        };
        self.0.parameter(name, shape, init)
    }
}

/// The probabilities that a model gives to the targets of a batch; those that count.
fn of_targets(model: &Model, batch: &Batch, draw: Option<u64>) -> Result<Vec<f64>> {
    let (inputs, _) = batch.tensors(&Device::Cpu)?;
    let input = Input::tokens(inputs);
    let said = match draw {
        Some(draw) => {
            self_ensemble(
                model,
                &input,
                (1, draw),
                Averaged::Probabilities,
                Pass::default,
            )?
            .mean
        }
        None => {
            let scores = model
                .forward(&input, Pass::default())?
                .into_logits()?
                .into_value();
            softmax(&scores, &SoftmaxMask::default())?
        }
    };
    let classes = said.dims().last().copied().unwrap_or(1).max(1);
    let all = numbers(&said)?;
    let rows = all.chunks(classes).zip(&batch.targets);
    let of = |(row, target): (&[f64], &u32)| row.get(*target as usize).copied();
    Ok(rows
        .filter(|(_, target)| **target != IGNORE)
        .filter_map(of)
        .collect())
}

fn loss(probabilities: &[f64]) -> f64 {
    mean(probabilities.iter().map(|p| -p.max(f64::MIN_POSITIVE).ln()))
}

/// Losses of a dense pass, of ensembles of 1, 2, … members, and the mean of the members'.
struct Losses {
    dense: f64,
    ensembles: Vec<f64>,
    member: f64,
}

fn losses(
    model: &Model,
    task: &mut dyn Task,
    recipe: Recipe,
    (batches, members): (usize, usize),
) -> Result<Losses> {
    let mut random = generator(0x55a);
    let (mut dense, mut single) = (Vec::new(), Vec::new());
    let mut ensembles = vec![Vec::new(); members];
    for place in 0..batches as u64 {
        let batch = task.batch(&mut random, recipe.batch, recipe.length)?;
        dense.push(loss(&of_targets(model, &batch, None)?));
        let mut sum: Vec<f64> = Vec::new();
        for (member, losses) in ensembles.iter_mut().enumerate() {
            let one = of_targets(model, &batch, Some(place * 1000 + member as u64))?;
            single.push(loss(&one));
            sum.resize(one.len(), 0.0);
            for (sum, one) in sum.iter_mut().zip(&one) {
                *sum += one;
            }
            let averaged: Vec<f64> = sum.iter().map(|p| p / (member + 1) as f64).collect();
            losses.push(loss(&averaged));
        }
    }
    Ok(Losses {
        dense: mean(dense),
        ensembles: ensembles.into_iter().map(mean).collect(),
        member: mean(single),
    })
}

/// A model trained for nine tenths of the steps as it is told, and then dense.
struct Trained {
    name: &'static str,
    before: Model,
    after: Model,
}

fn on_text(setting: &Setting, size: Size) -> Result<(String, Vec<Claim>, Plot)> {
    let recipe = Recipe {
        batch: 8,
        length: size.length,
        narrow: true,
        ..Recipe::default()
    };
    let Text {
        what, vocabulary, ..
    } = text(setting)?;
    let dense_steps = (size.steps / 10).max(1);
    let ways = [
        ("dense", MechanismSpec::Softmax),
        ("unbiased", quarter(Selection::Unbiased)),
        ("local", quarter(local(size.length))),
    ];
    let models = by_seed(setting, "text", &ways, 1, |mechanism, seed| {
        let spec = size.decoder(vocabulary, mechanism.clone());
        let training = || -> Result<Box<dyn Task>> { Ok(text(setting)?.training) };
        let steps = size.steps - dense_steps;
        let before = decoder::train_by(recipe, spec, training()?, steps, seed)?;
        let slower = Recipe {
            peak: recipe.peak / 10.0,
            dense_steps: match mechanism.is_softmax() {
                // It draws nothing in any step.
                true => 0,
                false => dense_steps,
            },
            ..recipe
        };
        let after = decoder::train_further(&before, slower, training()?, dense_steps, seed + 1)?;
        Ok([before, after])
    })?;
    let models: Vec<Trained> = models
        .into_iter()
        .flat_map(|(name, models)| {
            let named = move |[before, after]: [Model; 2]| Trained {
                name,
                before,
                after,
            };
            models.into_iter().map(named)
        })
        .collect();
    setting.tell(|| "losses of text".to_owned());
    let mut held = Vec::new();
    let mut gaps = Vec::new();
    for trained in &models {
        let Text {
            mut training,
            mut held_out,
            ..
        } = text(setting)?;
        let of = losses(&trained.after, held_out.as_mut(), recipe, (size.batches, 0))?.dense;
        let seen = losses(&trained.after, training.as_mut(), recipe, (size.batches, 0))?.dense;
        held.push((trained.name, of));
        gaps.push((trained.name, of - seen));
    }
    let get = |all: &[(&str, f64)], name: &str| super::sequences::of(all, name);
    let told = |all: &[(&str, f64)]| {
        let each = all.iter().map(|(name, value)| format!("{name} {value:.4}"));
        each.collect::<Vec<_>>().join(", ")
    };
    let mut curves = Vec::new();
    let mut points = Vec::new();
    let drawn = models.iter().skip(1);
    let drawn: Vec<_> = drawn
        .map(|trained| (trained.name, &trained.before))
        .collect();
    for (name, found) in by_seed(setting, "ensembles", &drawn, 1, |model, _| {
        let mut held_out = text(setting)?.held_out;
        losses(model, held_out.as_mut(), recipe, (size.batches, MEMBERS))
    })? {
        let Some(found) = found.into_iter().next() else {
            continue;
        };
        let curve = (1u32..).map(f64::from).zip(found.ensembles.iter().copied());
        points.push(Series {
            name: name.to_owned(),
            points: curve.collect(),
        });
        curves.push((name, found));
    }
    let last = |found: &Losses| found.ensembles.last().copied().unwrap_or(f64::NAN);
    let best = |(name, found): &(&str, Losses)| {
        let (dense, ensemble) = (found.dense, last(found));
        format!(
            "{name}: dense {dense:.4}, ensemble {ensemble:.4}, member {:.4}",
            found.member
        )
    };
    let gains = curves
        .iter()
        .all(|(_, found)| last(found) <= found.dense - 0.002);
    let listed: Vec<String> = curves.iter().map(best).collect();
    let degraded = degradation(setting, size, recipe, vocabulary, &models)?;
    let mut claims = vec![
        Claim::new(
            "trained on local subsets, a dense decoder is within 0.01 nats of one that was dense throughout, \
             or better",
            "enwik8: 1.024 bits a character with subsets",
            told(&held),
            after_training(
                setting.scale,
                get(&held, "local") <= get(&held, "dense") + 0.01,
            ),
        ),
        Claim::new(
            "it has the smaller gap between text that was seen and text that wasn't",
            "subsets regularise",
            told(&gaps),
            after_training(setting.scale, get(&gaps, "local") < get(&gaps, "dense")),
        ),
        Claim::new(
            "unbiased subsets are worse than local ones",
            "local bias wins",
            told(&held),
            after_training(setting.scale, get(&held, "unbiased") > get(&held, "local")),
        ),
        Claim::new(
            "before the dense steps, an ensemble of 16 draws beats the dense pass of the same network by \
             0.002 nats",
            "ensembles of sub-networks beat the dense network",
            listed.join("; "),
            after_training(setting.scale, gains),
        ),
        degraded,
    ];
    claims.extend(masses(setting, size, recipe, models.first())?);
    let plot = Plot {
        title: "Loss by members of the ensemble, before the dense steps".to_owned(),
        x: "members".to_owned(),
        y: "held-out nats a token".to_owned(),
        series: points,
    };
    Ok((what, claims, plot))
}

/// What drawing a quarter of the keys costs a network that was trained so, and one that wasn't.
fn degradation(
    setting: &Setting,
    size: Size,
    recipe: Recipe,
    vocabulary: usize,
    models: &[Trained],
) -> Result<Claim> {
    let mut costs = Vec::new();
    for trained in models {
        let spec = size.decoder(vocabulary, quarter(Selection::Unbiased));
        let drawn = Model::new(spec, &mut trained.before.parameters().clone())?;
        let mut held_out = text(setting)?.held_out;
        let found = losses(&drawn, held_out.as_mut(), recipe, (size.batches, 2))?;
        costs.push((trained.name, found.member - found.dense));
    }
    let get = |name: &str| super::sequences::of(&costs, name);
    let told: Vec<String> = costs
        .iter()
        .map(|(name, cost)| format!("{name} {cost:+.3}"))
        .collect();
    Ok(Claim::new(
        "drawing a quarter of the keys costs a network that was trained dense more than one trained so",
        "hypothesis of the paper",
        format!(
            "nats lost by drawing without bias, by training: {}",
            told.join(", ")
        ),
        after_training(setting.scale, get("dense") > get("unbiased")),
    ))
}

/// How much of dense attention's weight lies on as many near keys, and on as many random ones.
fn masses(
    setting: &Setting,
    size: Size,
    recipe: Recipe,
    dense: Option<&Trained>,
) -> Result<Option<Claim>> {
    let Some(dense) = dense else {
        return Ok(None);
    };
    let mut held_out = text(setting)?.held_out;
    let batch = held_out.batch(&mut generator(0x3a55), 2, recipe.length)?;
    let trace = Trace::new().capture("blocks.*.attention.weights")?;
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    let (inputs, _) = batch.tensors(&Device::Cpu)?;
    dense.after.forward(&Input::tokens(inputs), pass)?;
    let kept = size.length / 4;
    let (mut near, mut random) = (Vec::new(), Vec::new());
    for block in 0..size.blocks {
        let weights = trace.signal(&format!("blocks.{block}.attention.weights"))?;
        for (row, weights) in numbers(weights.value())?.chunks(size.length).enumerate() {
            let i = row % size.length;
            // Where all keys would be kept there is nothing to compare.
            if i >= kept {
                let window = weights.get(i + 1 - kept..=i).unwrap_or_default();
                near.push(window.iter().sum::<f64>());
                random.push(kept as f64 / (i + 1) as f64);
            }
        }
    }
    let (near, random) = (mean(near), mean(random));
    Ok(Some(Claim::new(
        "the nearest quarter of the keys has more of dense attention's weight than a random quarter",
        "why local bias wins",
        format!("{near:.3} against {random:.3} of the weight"),
        after_training(setting.scale, near > random),
    )))
}

fn on_digits(setting: &Setting, size: Size) -> Result<Vec<Claim>> {
    let measures = Measures {
        vocabulary: LEVELS,
        length: SIDE * SIDE,
        labels: 10,
        width: 32,
        heads: 4,
        blocks: 3,
    };
    let (count, steps) = size.digits;
    let ways = [
        ("dense", MechanismSpec::Softmax),
        ("sampled", quarter(Selection::Unbiased)),
    ];
    // After the dense steps, and before them by a dense pass and by an ensemble.
    let found = by_seed(setting, "digits", &ways, size.seeds, |mechanism, seed| {
        let training = digits(count, seed);
        let held_out = digits(1000.min(4 * count), seed ^ 0xd161);
        let last = (steps / 10).max(1);
        let course = |steps: u64, rate: f64| Course {
            steps,
            batch: 32,
            rate,
            seed,
        };
        let spec = measures.spec(mechanism.clone(), true);
        let before = train(spec, &training, &course(steps - last, 3e-3))?;
        let (single, ensemble) = match mechanism.is_softmax() {
            true => (f64::NAN, f64::NAN),
            false => (
                percent_right(&before, &held_out)?,
                ensemble_right(&before, &held_out)?,
            ),
        };
        let spec = measures.spec(MechanismSpec::Softmax, true);
        let mut parameters = before.parameters().clone();
        let after = train_from(spec, &mut parameters, &training, &course(last, 3e-4))?;
        Ok([percent_right(&after, &held_out)?, single, ensemble])
    })?;
    let means = |name: &str| -> [f64; 3] {
        let rows = found.iter().filter(|(known, _)| *known == name);
        let rows: Vec<&[f64; 3]> = rows.flat_map(|(_, rows)| rows).collect();
        [0, 1, 2].map(|place| mean(rows.iter().filter_map(|row| row.get(place)).copied()))
    };
    let ([dense, ..], [sampled, single, ensemble]) = (means("dense"), means("sampled"));
    Ok(vec![
        Claim::new(
            "digits: a quarter of the pixels in training is worth at least half a point of accuracy",
            "Swin-T on ImageNet: 81.3 → 81.9 %",
            format!("{sampled:.1} %, dense throughout {dense:.1} %"),
            after_training(setting.scale, sampled >= dense + 0.5),
        ),
        Claim::new(
            "digits: an ensemble of 16 draws is at least as good as the dense pass",
            "ensembles of sub-networks beat the dense network",
            format!("{ensemble:.1} %, dense pass of the same network {single:.1} %"),
            after_training(setting.scale, ensemble >= single),
        ),
    ])
}

/// The share that an ensemble gets right, in percent.
fn ensemble_right(model: &Model, examples: &[Labelled]) -> Result<f64> {
    let mut right = 0;
    for chunk in examples.chunks(100) {
        let sequences: Vec<&[u32]> = chunk.iter().map(|e| e.tokens.as_slice()).collect();
        let (input, padding) = classifier::batch(&sequences)?;
        let pass = || Pass {
            padding: Some(&padding),
            ..Pass::default()
        };
        let said = self_ensemble(model, &input, (MEMBERS, 7), Averaged::Probabilities, pass)?;
        let said = numbers(&said.mean)?;
        let rows = said.chunks(10).zip(chunk);
        right += rows
            .filter(|(row, example)| most_likely(row) == example.label as usize)
            .count();
    }
    Ok(100.0 * right as f64 / examples.len().max(1) as f64)
}

/// Queries, keys and values of 4 heads of 16 features.
fn variables(length: usize, seed: u64) -> Result<[Var; 3]> {
    let mut source = Initialiser::new(seed, DType::F32, Device::Cpu);
    let mut variable = |name: &str| -> Result<Var> {
        let shape = [1, 4, length, 16];
        let value = source.parameter(name, &shape, Init::Normal { deviation: 1.0 })?;
        engine(Var::from_tensor(&value))
    };
    Ok([variable("q")?, variable("k")?, variable("v")?])
}

/// Their mixing where this share of the keys is kept.
fn alone(keep: f64, [q, k, _]: &[Var; 3], seed: u64) -> Result<Box<dyn Mixing>> {
    let spec = SubsampledSpec {
        keep,
        ..SubsampledSpec::default()
    };
    let heads = Heads {
        width: 64,
        heads: 4,
        head_width: 16,
        value_width: 16,
        causal: false,
        scale: 0.25,
        sharing: QueryKeySharing::None,
    };
    // It has no parameters.
    let mut none: BTreeMap<String, Tensor> = BTreeMap::new();
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let module = spec.build(&heads, Parameters::new(&mut none, &ranks, &mut linears))?;
    let (q, k) = (q.as_tensor(), k.as_tensor());
    mixing_alone(module.as_ref(), [q, k], q, Some(seed))
}

fn in_time(setting: &Setting, size: Size) -> Result<Claim> {
    let all = variables(size.timed, setting.seed)?;
    let [q, k, v] = all.each_ref().map(Var::as_tensor);
    let drawn = quickest(5, || {
        let y = alone(0.25, &all, setting.seed)?.mix(v)?;
        engine(backward(&engine(y.sum_all())?))?;
        Ok(())
    })?;
    let dense = quickest(5, || {
        let y = attention(q, k, v, &AttentionOptions::new(16))?;
        engine(backward(&engine(y.sum_all())?))?;
        Ok(())
    })?;
    let ratio = drawn / dense;
    Ok(Claim::new(
        "a step of attention with a quarter of 2048 keys takes at most 0.4 of a dense one",
        "4 times fewer products",
        format!(
            "{ratio:.2} of the time at {} tokens, forward and backward, of this program's own dense attention",
            size.timed
        ),
        after_training(setting.scale, ratio <= 0.4),
    )
    .noted("on a machine that may do other things besides"))
}
