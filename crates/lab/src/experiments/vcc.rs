//! Vcc: a needle in a long sequence that a question asks for, with most of the sequence compressed.
//!
//! The paper continues the pre-training of RoBERTa and T5 on texts of up to 128 thousand tokens. Here a
//! small encoder is trained from nothing: the first tokens name a key, a token somewhere in the noise is that key with
//! a value, and the value is the class.
//!
//! Trained from nothing, dense attention has to learn the task before anything can be compared with it. A key with its
//! value behind it would be two tasks, of which the first, that each token knows the one before it, is learned
//! place by place from a table of positions; so they are one token, and there is no table. The class is read
//! from the first token, which asks: in the mean over a long sequence the answer hardly counts. And most of the training
//! is on short sequences, where one token in some dozens is looked for and not one in hundreds.

use super::classifier::Labelled;
use super::jobs::means_by_seed;
use super::sequences::{
    Course, Measures, exponent, listed, of, percent_right, quickest, train, train_from,
};
use super::{after_learning, difference};
use crate::catalogue::metered;
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{HeadSpec, Initialiser, Input, Model, ModelSpec, Pass, Pool};
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::vcc::{Selection, VccSpec};
use lapidary_train::generator;
use rand::RngExt;

/// How much is done.
struct Size {
    needles: Needles,
    length: usize,
    width: usize,
    blocks: usize,
    /// Tokens of a segment of the first block.
    segment: usize,
    /// Blocks of 16 tokens that are seen in full.
    fine: usize,
    examples: usize,
    /// Tokens of the short sequences that are trained on first.
    short: usize,
    /// Steps with short sequences, and with those of full length.
    steps: [u64; 2],
    seeds: u64,
    longest: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        let few = Needles {
            keys: 4,
            classes: 4,
            noise: 8,
        };
        match scale {
            Scale::Smoke => Self {
                needles: few,
                length: 128,
                width: 16,
                blocks: 2,
                segment: 32,
                fine: 2,
                examples: 40,
                short: 64,
                steps: [1, 1],
                seeds: 1,
                longest: 2048,
            },
            Scale::Small => Self {
                needles: few,
                length: 256,
                width: 32,
                blocks: 2,
                segment: 32,
                fine: 4,
                examples: 8000,
                short: 64,
                steps: [300, 200],
                seeds: 1,
                longest: 16_384,
            },
            Scale::Full => Self {
                needles: MANY,
                length: 2048,
                width: 128,
                blocks: 4,
                segment: 128,
                fine: 8,
                examples: 100_000,
                short: 256,
                steps: [10_000, 5000],
                seeds: 3,
                longest: 32_768,
            },
        }
    }

    fn measures(&self, length: usize) -> Measures {
        Measures {
            vocabulary: self.needles.vocabulary(),
            length,
            labels: self.needles.classes as usize,
            width: self.width,
            heads: 4,
            blocks: self.blocks,
        }
    }

    /// An encoder that is read at its first token and knows no positions.
    fn plain(&self) -> ModelSpec {
        let mut spec = self
            .measures(self.length)
            .spec(MechanismSpec::Softmax, false);
        if let HeadSpec::Pooled { pool, .. } = &mut spec.head {
            *pool = Pool::First;
        }
        spec
    }

    /// One block on segments, the others on blocks of 16 of which a few are seen in full.
    fn vcc(&self) -> VccSpec {
        VccSpec {
            segment_blocks: 1,
            segment: self.segment,
            ..VccSpec::new(QUESTION, self.fine)
        }
    }

    /// Blocks of 16 behind the question.
    fn compressed(&self) -> usize {
        (self.length - QUESTION).div_ceil(16)
    }

    /// A model that was trained on short sequences, and then on long ones.
    fn train(&self, spec: &ModelSpec, seed: u64) -> Result<Model> {
        let course = |steps| Course {
            steps,
            batch: 16,
            rate: 2e-3,
            seed,
        };
        let [first, then] = self.steps;
        let short = self.needles.examples(self.short, self.examples, !seed);
        let long = self.needles.examples(self.length, self.examples, seed);
        let model = train(spec.clone(), &short, &course(first))?;
        let mut parameters = model.parameters().clone();
        train_from(spec.clone(), &mut parameters, &long, &course(then))
    }
}

fn with(mut spec: ModelSpec, vcc: VccSpec) -> ModelSpec {
    spec.organisation = Some(OrganisationSpec::VipCentric(vcc));
    spec
}

/// Tokens of a question, the VIPs.
const QUESTION: usize = 16;

/// What is looked for.
#[derive(Clone, Copy, Debug)]
struct Needles {
    keys: u32,
    classes: u32,
    /// Different tokens of noise.
    noise: u32,
}

const MANY: Needles = Needles {
    keys: 8,
    classes: 8,
    noise: 16,
};

impl Needles {
    fn vocabulary(self) -> usize {
        (self.question(self.keys) + self.noise) as usize
    }

    /// The token of a key with a value.
    fn needle(self, key: u32, value: u32) -> u32 {
        key * self.classes + value
    }

    /// The token that asks for a key.
    fn question(self, key: u32) -> u32 {
        self.needle(self.keys, 0) + key
    }

    /// A question, and noise in which every key stands once with a value: the class is the value of the key that
    /// is asked for.
    fn examples(self, length: usize, count: usize, seed: u64) -> Vec<Labelled> {
        let mut generator = generator(seed);
        let mut example = || {
            let first = self.question(self.keys);
            let mut tokens: Vec<u32> = (0..length)
                .map(|_| first + generator.random_range(0..self.noise))
                .collect();
            let asked = generator.random_range(0..self.keys);
            let mut label = 0;
            // Each key has a stretch of its own, so that none stands on another.
            let stretch = (length - QUESTION) / self.keys as usize;
            let turn = generator.random_range(0..self.keys);
            for key in 0..self.keys {
                let value = generator.random_range(0..self.classes);
                let start = QUESTION + ((key + turn) % self.keys) as usize * stretch;
                let place = start + generator.random_range(0..stretch);
                if let Some(token) = tokens.get_mut(place) {
                    *token = self.needle(key, value);
                }
                if key == asked {
                    label = value;
                }
            }
            for token in tokens.iter_mut().take(QUESTION) {
                *token = self.question(asked);
            }
            Labelled { tokens, label }
        };
        (0..count).map(|_| example()).collect()
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = exact(setting.seed)?;
    claims.extend(on_needles(setting, &size)?);
    let (more, plot) = costs(setting, &size)?;
    claims.extend(more);
    Ok(Reproduction {
        setting: format!(
            "{} keys with {} values in {} tokens, {QUESTION} VIP tokens, {} blocks of width {}, of 16 sequences \
             {} steps with {} tokens and {} with all, {} seed(s)",
            size.needles.keys,
            size.needles.classes,
            size.length,
            size.blocks,
            size.width,
            size.steps[0],
            size.short,
            size.steps[1],
            size.seeds
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

fn on_needles(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    let (plain, vcc) = (size.plain(), size.vcc());
    let random = VccSpec {
        selection: Selection::Random,
        ..vcc.clone()
    };
    let uncorrected = VccSpec {
        scale_correction: false,
        ..vcc.clone()
    };
    let ways = [
        ("dense", plain.clone()),
        ("Vcc", with(plain.clone(), vcc)),
        ("random blocks", with(plain.clone(), random)),
        ("no scale correction", with(plain, uncorrected)),
    ];
    let found = means_by_seed(setting, "needles", &ways, size.seeds, |spec, seed| {
        let count = (size.examples / 16).max(16);
        let held_out = size.needles.examples(size.length, count, seed ^ 0x0bcc);
        let model = size.train(spec, seed)?;
        percent_right(&model, &held_out)
    })?;
    let right = |name: &str| of(&found, name);
    // Half of the way from guessing to never being wrong.
    let learned = right("dense") >= 50.0 * (1.0 + 1.0 / f64::from(size.needles.classes));
    let verdict = |holds: bool| after_learning(setting.scale, learned, holds);
    Ok(vec![
        Claim::new(
            "with a few blocks in full it is right as often as 95 % of dense attention's",
            "equal or better scores at 4 and 16 thousand tokens; this figure an estimate for this task",
            format!(
                "{}; {} of {} blocks in full",
                listed(&found),
                size.fine,
                size.compressed()
            ),
            verdict(right("Vcc") >= 0.95 * right("dense")),
        ),
        Claim::new(
            "blocks chosen at random are at least 20 points worse",
            "estimate for this task",
            listed(&found),
            verdict(right("random blocks") <= right("Vcc") - 20.0),
        ),
        Claim::new(
            "without the scale correction it is no better",
            "estimate for this task",
            listed(&found),
            verdict(right("no scale correction") <= right("Vcc")),
        ),
    ])
}

/// Scores of a model of 64 tokens in f64.
fn scores(spec: &ModelSpec, seed: u64) -> Result<Tensor> {
    let mut source = super::classifier::Narrow(Initialiser::new(seed, DType::F64, Device::Cpu));
    let model = Model::new(spec.clone(), &mut source)?;
    let ids: Vec<u32> = (0..128)
        .map(|i| i * 13 % MANY.vocabulary() as u32)
        .collect();
    let ids = engine(Tensor::from_vec(ids, (2, 64), &Device::Cpu))?;
    let output = model.forward(&Input::tokens(ids), Pass::default())?;
    Ok(output.into_logits()?.into_value())
}

/// What holds of any parameters.
fn exact(seed: u64) -> Result<Vec<Claim>> {
    let measures = Measures {
        vocabulary: MANY.vocabulary(),
        length: 64,
        labels: MANY.classes as usize,
        width: 32,
        heads: 4,
        blocks: 3,
    };
    let plain = measures.spec(MechanismSpec::Softmax, true);
    let vcc = |fine| VccSpec {
        size: 8,
        ..VccSpec::new(8, fine)
    };
    let dense = scores(&plain, seed)?;
    let all = difference(&scores(&with(plain.clone(), vcc(7)), seed)?, &dense)?;
    let few = difference(&scores(&with(plain, vcc(2)), seed)?, &dense)?;
    Ok(vec![Claim::new(
        "with every block in full it is the plain encoder",
        "exact",
        format!("scores differ by {all:.1e}; by {few:.1e} with 2 of 7 blocks in full"),
        Verdict::of(all < 1e-10 && few > 1e-9),
    )])
}

fn costs(setting: &Setting, size: &Size) -> Result<(Vec<Claim>, Plot)> {
    let seed = setting.seed;
    let vocabulary = MANY.vocabulary();
    // One block on segments of 128, three on blocks of 16 of which eight are seen in full.
    let vcc = VccSpec {
        segment_blocks: 1,
        segment: 128,
        ..VccSpec::new(QUESTION, 8)
    };
    let model = |length: usize, compresses: bool| -> Result<Model> {
        let measures = Measures {
            vocabulary,
            blocks: 4,
            ..size.measures(length)
        };
        let plain = measures.spec(MechanismSpec::Softmax, true);
        let spec = match compresses {
            true => with(plain, vcc.clone()),
            false => plain,
        };
        Ok(Model::initialised(spec, seed, DType::F32, &Device::Cpu)?)
    };
    // What depends on pairs of a query and a key: everything at the sites behind attention.
    let attention = |length: usize, compresses: bool| -> Result<f64> {
        let meter = metered(&model(length, compresses)?, length)?;
        let sites = meter.sites();
        let pairs = sites
            .iter()
            .filter(|(site, _)| site.ends_with("attention.mixed") || site.ends_with(".importance"));
        Ok(pairs.map(|(_, cost)| cost.flops as f64).sum())
    };
    let share = attention(2048, true)? / attention(2048, false)?;
    let (mut counted, mut timed) = (Vec::new(), [Vec::new(), Vec::new()]);
    let lengths = std::iter::successors(Some(1024usize), |length| Some(2 * length));
    for length in lengths.take_while(|length| *length <= size.longest) {
        setting.tell(|| format!("operations and time of {length} tokens"));
        counted.push((
            length as f64,
            metered(&model(length, true)?, length)?.total().flops as f64,
        ));
        for (points, compresses) in timed.iter_mut().zip([true, false]) {
            // Dense attention takes minutes where this takes seconds.
            if !compresses && length > 8192 {
                continue;
            }
            let model = model(length, compresses)?;
            let ids: Vec<u32> = (0..length as u32)
                .map(|i| i * 7 % vocabulary as u32)
                .collect();
            let input = Input::tokens(engine(Tensor::from_vec(ids, (1, length), &Device::Cpu))?);
            let seconds = quickest(2, || {
                Ok(model.forward(&input, Pass::default()).map(|_| ())?)
            })?;
            points.push((length as f64, seconds * 1e3));
        }
    }
    let growth = exponent(&counted);
    let [own, dense] = timed;
    let claims = vec![
        Claim::new(
            "at 2048 tokens attention and selection take at most 20 % of dense attention's operations",
            "more than three times as efficient at 4 and 16 thousand tokens; this figure an estimate",
            format!("{:.1} %", 100.0 * share),
            Verdict::of(share <= 0.2),
        )
        .noted("selections counted with the projections and means that stand before them"),
        Claim::new(
            "operations grow with an exponent below 1.2",
            "cost nearly independent of the length per layer",
            format!(
                "{growth:.2}; time {:.2}, dense {:.2}, from 1024 tokens on",
                exponent(&own),
                exponent(&dense)
            ),
            Verdict::of(growth < 1.2),
        ),
    ];
    let plot = Plot {
        title: "Time of four blocks".to_owned(),
        x: "tokens".to_owned(),
        y: "milliseconds".to_owned(),
        series: vec![
            Series {
                name: "Vcc".to_owned(),
                points: own,
            },
            Series {
                name: "dense".to_owned(),
                points: dense,
            },
        ],
    };
    Ok((claims, plot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_the_value_of_the_key_that_is_asked_for() {
        for needles in [MANY, Size::of(Scale::Small).needles] {
            for example in needles.examples(256, 100, 3) {
                let asked = example.tokens[0] - needles.question(0);
                assert!(
                    example.tokens[..QUESTION]
                        .iter()
                        .all(|t| *t == needles.question(asked))
                );
                let found = |key: u32| -> Vec<u32> {
                    let own = needles.needle(key, 0)..needles.needle(key + 1, 0);
                    let all = example.tokens[QUESTION..].iter().copied();
                    all.filter(|token| own.contains(token)).collect()
                };
                for key in 0..needles.keys {
                    assert_eq!(found(key).len(), 1, "every key stands once");
                }
                assert_eq!(found(asked), [needles.needle(asked, example.label)]);
                let most = needles.vocabulary() as u32;
                assert!(example.tokens.iter().all(|token| *token < most));
            }
        }
    }
}
