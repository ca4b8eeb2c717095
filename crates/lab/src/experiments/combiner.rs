//! Combiner: sparse patterns and the forms that see everything, on recall, on pixels and on text.

use super::attending;
use super::decoder::{self, Recipe};
use super::sequences::{LEVELS, SIDE, digits};
use super::{after_training, numbers};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Error, Reproduction, Result, Scale, Setting, Verdict};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_parts::attention::mechanism::{Heads, MechanismSpec};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::Trace;
use lapidary_train::Generator;
use lapidary_train::data::{Batch, IGNORE, Task};
use rand::RngExt;
use rand::seq::SliceRandom;
use std::collections::BTreeMap;

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Size {
    width: usize,
    length: usize,
    columns: usize,
    recall_steps: u64,
    pixel_steps: u64,
    text_steps: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                length: 64,
                columns: 8,
                recall_steps: 2,
                pixel_steps: 2,
                text_steps: 2,
            },
            Scale::Small => Self {
                width: 64,
                length: 128,
                columns: 12,
                recall_steps: 600,
                pixel_steps: 600,
                text_steps: 200,
            },
            Scale::Full => Self {
                width: 64,
                length: 256,
                columns: 16,
                recall_steps: 3000,
                pixel_steps: 3000,
                text_steps: 3000,
            },
        }
    }
}

/// Ways to attend, sparse ones beside those that see everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Dense,
    Fixed,
    CombinerFixed,
    LogSparse,
    CombinerLogSparse,
    Axial,
    CombinerAxial,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Fixed => "fixed",
            Self::CombinerFixed => "Combiner-fixed",
            Self::LogSparse => "log-sparse",
            Self::CombinerLogSparse => "Combiner-log-sparse",
            Self::Axial => "axial",
            Self::CombinerAxial => "Combiner-axial",
        }
    }

    fn mechanism(self, columns: usize) -> MechanismSpec {
        let sparse = |pattern| {
            MechanismSpec::Sparse(SparseSpec {
                pattern,
                steps: Steps::Merged,
            })
        };
        let combiner = |form| MechanismSpec::Combiner(CombinerSpec::new(form));
        match self {
            Self::Dense => MechanismSpec::Softmax,
            Self::Fixed => sparse(SparsePattern::Fixed {
                stride: columns,
                summaries: 1,
                groups: 1,
            }),
            Self::CombinerFixed => combiner(CombinerForm::Fixed { segment: columns }),
            Self::LogSparse => sparse(SparsePattern::LogSparse),
            Self::CombinerLogSparse => combiner(CombinerForm::LogSparse),
            Self::Axial => sparse(SparsePattern::Axial { stride: columns }),
            Self::CombinerAxial => combiner(CombinerForm::Vertical { columns }),
        }
    }

    fn spec(self, vocabulary: usize, size: Size, blocks: usize) -> ModelSpec {
        let heads = (size.width / 16).max(1);
        let attention = attending::causal(heads, self.mechanism(size.columns));
        attending::spec(
            vocabulary,
            size.width,
            size.length,
            &vec![attention; blocks],
        )
    }
}

/// Eight pairs of a key and its value among tokens that mean nothing, and one of the keys at the end,
/// to be answered with its value.
#[derive(Clone, Copy, Debug)]
struct Recall;

const PAIRS: usize = 8;
const KEYS: usize = 31;
const VOCABULARY: usize = 64;

impl Task for Recall {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        let mut keys: Vec<u32> = (1..=KEYS as u32).collect();
        let mut places: Vec<usize> = (0..(length - 1) / 2).collect();
        for _ in 0..rows {
            keys.shuffle(generator);
            places.shuffle(generator);
            let mut tokens = vec![0; length];
            let mut pairs = Vec::new();
            for (key, place) in keys.iter().zip(&places).take(PAIRS) {
                let value = generator.random_range(KEYS as u32 + 1..VOCABULARY as u32);
                for (at, token) in [(2 * place, *key), (2 * place + 1, value)] {
                    if let Some(slot) = tokens.get_mut(at) {
                        *slot = token;
                    }
                }
                pairs.push((*key, value));
            }
            let (key, value) = pairs
                .get(generator.random_range(0..pairs.len().max(1)))
                .copied()
                .unwrap_or_default();
            if let Some(last) = tokens.last_mut() {
                *last = key;
            }
            batch.inputs.extend_from_slice(&tokens);
            batch.targets.extend(vec![IGNORE; length - 1]);
            batch.targets.push(value);
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// Printed digits as pixels row by row behind a first token, each to be foretold from those before it.
#[derive(Clone, Copy, Debug)]
struct Pixels;

impl Task for Pixels {
    fn vocabulary(&self) -> usize {
        LEVELS + 1
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for digit in digits(rows, generator.random()) {
            let before = digit.tokens.iter().take(length.saturating_sub(1));
            batch.inputs.push(LEVELS as u32);
            batch.inputs.extend(before);
            batch.targets.extend(digit.tokens.iter().take(length));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = exact(size, setting)?;
    claims.extend(recall(size, setting)?);
    claims.push(pixels(size, setting)?);
    claims.extend(text(size, setting)?);
    Ok(Reproduction {
        setting: format!(
            "decoders of 2 blocks, width {}, {} tokens in rows of {}; {} steps of 16 on recall of one \
             of {PAIRS} pairs, {} steps of 16 on printed digits as {} pixels, {} steps of 8 on the bytes of \
             tiny Shakespeare; one seed",
            size.width,
            size.length,
            size.columns,
            size.recall_steps,
            size.pixel_steps,
            SIDE * SIDE,
            size.text_steps
        ),
        claims,
        ..Reproduction::default()
    })
}

/// What holds of any model: weights and work.
fn exact(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let length = size.length;
    let mut worst: f64 = 0.0;
    let (mut outside, mut missing) = (0, 0);
    let mut growths = Vec::new();
    for way in [
        Way::CombinerFixed,
        Way::CombinerLogSparse,
        Way::CombinerAxial,
    ] {
        let spec = way.spec(VOCABULARY, size, 1);
        let model = Model::initialised(spec, setting.seed, DType::F32, &Device::Cpu)?;
        let ids: Vec<u32> = (0..length as u32)
            .map(|i| i * i % VOCABULARY as u32)
            .collect();
        let input = Input::tokens(engine(Tensor::from_vec(ids, (1, length), &Device::Cpu))?);
        let trace = Trace::new().capture("*.attention.weights")?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&input, pass)?;
        let weights = numbers(trace.signal("blocks.0.attention.weights")?.value())?;
        for (row, weights) in weights.chunks(length).enumerate() {
            worst = worst.max((weights.iter().sum::<f64>() - 1.0).abs());
            let (seen, hidden) = weights.split_at(row % length + 1);
            missing += seen.iter().filter(|weight| **weight <= 0.0).count();
            outside += hidden.iter().filter(|weight| **weight != 0.0).count();
        }
        let (short, long) = (256, 1024);
        let growth = operations(way, long)? / operations(way, short)?;
        growths.push((way, growth.ln() / 4f64.ln()));
    }
    let listed: Vec<String> = growths
        .iter()
        .map(|(way, growth)| format!("{} {growth:.2}", way.name()))
        .collect();
    Ok(vec![
        Claim::new(
            "every token gives some weight to every earlier one and none to later ones, in all 1",
            "by construction",
            format!("{missing} missing, {outside} outside, sums within {worst:.1e}"),
            Verdict::of(missing == 0 && outside == 0 && worst < 1e-5),
        ),
        Claim::new(
            "operations of attention grow at most as the length to the power 1.5, within 0.05",
            "L √L, and L log L for log-sparse",
            format!("exponents without projections: {}", listed.join(", ")),
            Verdict::of(growths.iter().all(|(_, growth)| *growth < 1.55)),
        ),
    ])
}

/// What one head of 16 features takes to mix so many tokens, in rows of the length's root. What a block has
/// beside that grows linearly and would hide it.
fn operations(way: Way, length: usize) -> Result<f64> {
    const WIDTH: usize = 16;
    let heads = Heads {
        width: WIDTH,
        heads: 1,
        head_width: WIDTH,
        value_width: WIDTH,
        causal: true,
        scale: 1.0 / (WIDTH as f64).sqrt(),
        sharing: QueryKeySharing::None,
    };
    let mechanism = way.mechanism(length.isqrt());
    let spec = mechanism
        .spec()
        .ok_or_else(|| Error::Experiment(format!("{} has no mechanism", way.name())))?;
    let mut source = Initialiser::new(1, DType::F32, Device::Cpu);
    let shape = [1, 1, length, WIDTH];
    let x = source.parameter("x", &shape, Init::Normal { deviation: 1.0 })?;
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let module = spec.build(&heads, Parameters::new(&mut source, &ranks, &mut linears))?;
    let mixing = mixing_alone(module.as_ref(), [&x, &x], &engine(x.squeeze(1))?, None)?;
    Ok(mixing.operations(WIDTH) as f64)
}

fn recall(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let recipe = Recipe {
        batch: 16,
        length: size.length,
        narrow: true,
        ..Recipe::default()
    };
    let pairs = [
        (Way::LogSparse, Way::CombinerLogSparse),
        (Way::Axial, Way::CombinerAxial),
    ];
    let accuracy = |way: Way| -> Result<f64> {
        let spec = way.spec(VOCABULARY, size, 2);
        let steps = size.recall_steps;
        let model = decoder::train_by(recipe, spec, Box::new(Recall), steps, setting.seed)?;
        Ok(100.0 * attending::measure(&model, &mut Recall, recipe, 16)?.accuracy)
    };
    let mut claims = Vec::new();
    for (sparse, whole) in pairs {
        let (a, b) = (accuracy(sparse)?, accuracy(whole)?);
        claims.push(Claim::new(
            &format!(
                "{} recalls at most 60 %, {} at least 20 points more",
                sparse.name(),
                whole.name()
            ),
            "none",
            format!("{a:.1} % and {b:.1} %"),
            after_training(setting.scale, a <= 60.0 && b >= a + 20.0),
        ));
    }
    Ok(claims)
}

fn pixels(size: Size, setting: &Setting) -> Result<Claim> {
    let size = Size {
        length: SIDE * SIDE,
        columns: SIDE,
        ..size
    };
    let recipe = Recipe {
        batch: 16,
        length: size.length,
        narrow: true,
        ..Recipe::default()
    };
    let bits = |way: Way| -> Result<f64> {
        let spec = way.spec(Pixels.vocabulary(), size, 2);
        let steps = size.pixel_steps;
        let model = decoder::train_by(recipe, spec, Box::new(Pixels), steps, setting.seed)?;
        let loss = attending::measure(&model, &mut Pixels, recipe, 16)?.loss;
        Ok(loss / std::f64::consts::LN_2)
    };
    let (axial, combiner) = (bits(Way::Axial)?, bits(Way::CombinerAxial)?);
    Ok(Claim::new(
        "digits as pixels: Combiner-axial needs at least 0.05 bits a pixel less than axial",
        "CIFAR-10: axial 3.666, Combiner-axial 3.050 bits a dimension",
        format!("{axial:.3} and {combiner:.3} bits a pixel"),
        after_training(setting.scale, axial - combiner >= 0.05),
    ))
}

fn text(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let claim = "on text, fixed is worse than Combiner-fixed, which is no better than dense";
    let published = "perplexity 18.04, 17.70, 17.26 (Wiki-40B at 2k)";
    let Some([training, mut test]) = attending::shakespeare(setting)? else {
        let measured = "no data set at hand";
        return Ok(vec![Claim::new(
            claim,
            published,
            measured,
            Verdict::NotMeasured,
        )]);
    };
    let recipe = Recipe {
        batch: 8,
        length: size.length,
        narrow: true,
        ..Recipe::default()
    };
    let mut loss = |way: Way| -> Result<f64> {
        let spec = way.spec(256, size, 2);
        let task = Box::new(training.clone());
        let model = decoder::train_by(recipe, spec, task, size.text_steps, setting.seed)?;
        Ok(attending::measure(&model, &mut test, recipe, 16)?.loss)
    };
    let (fixed, combiner, dense) = (
        loss(Way::Fixed)?,
        loss(Way::CombinerFixed)?,
        loss(Way::Dense)?,
    );
    Ok(vec![Claim::new(
        claim,
        published,
        format!("held-out nats a byte {fixed:.4}, {combiner:.4}, {dense:.4}"),
        after_training(setting.scale, fixed > combiner && combiner >= dense),
    )])
}
