//! Every method that scores tokens, held to subjects that are known to cause the number of a
//! verb, on a decoder trained on the sentences of [`grammar`].
//!
//! What is explained is the logit of the right verb less that of the same verb in the other
//! number, at the last token before the verb; the evidence is the subject. Sentences that the
//! model gets wrong are left out, as in the paper, whose figures are of BERT, GPT-2 and Llama-3 on
//! natural sentences.

use super::decoder::Recipe;
use super::grammar::{self, MOST_PHRASES, SUBJECT};
use super::{after_training, decoder, mean};
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::faithfulness::Summary;
use lapidary_explain::faithfulness::agreement::Agreement;
use lapidary_explain::{Explainer, Options, Question, Target, Unit, explainers};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_train::generator;
use std::time::Instant;

/// Steps of integrated gradients.
const STEPS: usize = 20;
/// Sentences whose predictions are counted, for each number of attractors.
const COUNTED: usize = 100;

/// Sentences of a training step.
const BATCH: usize = 48;

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    /// Sentences explained, for each number of attractors.
    samples: usize,
    seeds: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 2,
                steps: 10,
                samples: 2,
                seeds: 1,
            },
            Scale::Small => Self {
                width: 96,
                blocks: 4,
                steps: 1800,
                samples: 40,
                seeds: 1,
            },
            Scale::Full => Self {
                width: 96,
                blocks: 4,
                steps: 4000,
                samples: 400,
                seeds: 3,
            },
        }
    }
}

/// A sentence that is explained.
struct Sample {
    input: Input,
    target: Target,
}

/// What one method's scores are like.
struct Scored {
    method: &'static Explainer,
    /// One for each sentence, by number of attractors.
    agreements: Vec<Vec<Agreement>>,
    /// Seconds of each explanation.
    seconds: Vec<f64>,
    /// Largest `|unattributed| / |explained|`.
    unattributed: f64,
}

impl Scored {
    /// Mean of one measure at a number of attractors.
    fn at(&self, attractors: usize, measure: usize) -> Summary {
        let all = self
            .agreements
            .get(attractors)
            .map_or(&[][..], Vec::as_slice);
        let values = all.iter().map(|agreement| agreement.values());
        Summary::of(values.filter_map(|values| values.get(measure).copied()))
    }

    fn reciprocal_rank(&self, attractors: usize) -> f64 {
        self.at(attractors, 0).mean
    }

    /// Mean over all sentences.
    fn overall(&self, measure: usize) -> f64 {
        let all = self.agreements.iter().flatten();
        mean(all.filter_map(|agreement| agreement.values().get(measure).copied()))
    }

    fn seconds(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// What all seeds give.
#[derive(Default)]
struct Found {
    /// Share of right verbs, by number of attractors, one entry for each seed.
    accuracy: Vec<Vec<f64>>,
    scored: Vec<Scored>,
    /// Methods that do not apply to this decoder.
    refused: Vec<&'static str>,
    /// Sentences that were explained, by number of attractors.
    explained: Vec<usize>,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut found = Found {
        explained: vec![0; MOST_PHRASES + 1],
        ..Found::default()
    };
    for seed in (0..size.seeds).map(|index| setting.seed + index) {
        one_seed(&size, seed, &mut found)?;
    }
    Ok(Reproduction {
        setting: format!(
            "generated sentences of {} tokens' vocabulary with 0 to {MOST_PHRASES} attractors \
             between subject and verb; pre-norm decoder of {} blocks, width {}, trained for {} \
             steps of {} sentences; explained: {} sentences by number of attractors, those \
             that the model gets right of as many as were needed; seeds: {}; not applicable to \
             it: {}. The published figures are of BERT, GPT-2 and Llama-3, which need models of \
             your own",
            grammar::VOCABULARY,
            size.blocks,
            size.width,
            size.steps,
            BATCH,
            listed(found.explained.iter()),
            size.seeds,
            listed(found.refused.iter()),
        ),
        claims: claims(setting.scale, &found),
        plots: plots(&found),
        ..Reproduction::default()
    })
}

fn listed(items: impl Iterator<Item = impl std::fmt::Display>) -> String {
    let each: Vec<String> = items.map(|item| item.to_string()).collect();
    each.join(", ")
}

fn one_seed(size: &Size, seed: u64, found: &mut Found) -> Result<()> {
    let spec = decoder::spec(grammar::VOCABULARY, size.width, size.blocks);
    let recipe = Recipe {
        batch: BATCH,
        length: grammar::LONGEST,
        peak: 1e-3,
        narrow: true,
        ..Recipe::default()
    };
    let task = Box::new(grammar::Sentences);
    let model = decoder::train_by(recipe, spec, task, size.steps, seed)?;
    let mut generator = generator(seed ^ 0x6167_7265);
    let mut accuracy = Vec::new();
    let mut samples = Vec::new();
    for attractors in 0..=MOST_PHRASES {
        let (mut right, mut kept) = (0usize, Vec::new());
        // A model that gets nothing right, as after a smoke run, still ends.
        for drawn in 0.. {
            let enough = kept.len() >= size.samples || drawn >= 4 * COUNTED;
            if drawn >= COUNTED.min(10 * size.samples) && enough {
                accuracy.push(right as f64 / drawn as f64);
                break;
            }
            let sample = sample(grammar::attracted(attractors, &mut generator))?;
            if preference(&model, &sample)? > 0.0 {
                right += 1;
                if kept.len() < size.samples {
                    kept.push(sample);
                }
            }
        }
        if let Some(explained) = found.explained.get_mut(attractors) {
            *explained += kept.len();
        }
        samples.push(kept);
    }
    found.accuracy.push(accuracy);
    for method in explainers().iter().filter(|one| one.unit == Unit::Token) {
        let Some(scored) = score(method, &model, &samples, seed)? else {
            if !found.refused.contains(&method.name) {
                found.refused.push(method.name);
            }
            continue;
        };
        match found
            .scored
            .iter_mut()
            .find(|one| one.method.name == method.name)
        {
            None => found.scored.push(scored),
            Some(earlier) => {
                earlier.seconds.extend(scored.seconds);
                earlier.unattributed = earlier.unattributed.max(scored.unattributed);
                for (all, new) in earlier.agreements.iter_mut().zip(scored.agreements) {
                    all.extend(new);
                }
            }
        }
    }
    Ok(())
}

fn sample(sentence: grammar::Agreement) -> Result<Sample> {
    let length = sentence.prefix.len();
    let ids = engine(Tensor::from_vec(sentence.prefix, (1, length), &Device::Cpu))?;
    Ok(Sample {
        input: Input::tokens(ids),
        target: Target::Score {
            class: sentence.verb as usize,
            foil: Some(sentence.wrong as usize),
            position: None,
        },
    })
}

/// The right verb's logit less the wrong one's.
fn preference(model: &Model, sample: &Sample) -> Result<f64> {
    let Target::Score {
        class,
        foil: Some(foil),
        ..
    } = sample.target
    else {
        return Ok(0.0);
    };
    let pass = Pass {
        only_last: true,
        ..Pass::default()
    };
    let logits = model.forward(&sample.input, pass)?.into_logits()?;
    let logits = super::numbers(logits.value())?;
    let of = |token: usize| logits.get(token).copied().unwrap_or(f64::NAN);
    Ok(of(class) - of(foil))
}

/// Scores every sentence; nothing when the method does not apply to the model.
fn score(
    method: &'static Explainer,
    model: &Model,
    samples: &[Vec<Sample>],
    seed: u64,
) -> Result<Option<Scored>> {
    let mut scored = Scored {
        method,
        agreements: Vec::new(),
        seconds: Vec::new(),
        unattributed: 0.0,
    };
    let mut drawn = seed << 32;
    for samples in samples {
        let mut agreements = Vec::new();
        for sample in samples {
            drawn += 1;
            let options = Options {
                steps: STEPS,
                seed: drawn,
                ..Options::default()
            };
            let question = Question::new(model, &sample.input);
            let started = Instant::now();
            let explanation = match method.explain(&question, sample.target, &options) {
                Ok(explanation) => explanation,
                // What the method says does not suit it, as opposed to what fails.
                Err(lapidary_explain::Error::Invalid { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            scored.seconds.push(started.elapsed().as_secs_f64());
            let account = &explanation.account;
            let left = account.unattributed.abs() / account.explained.abs();
            scored.unattributed = scored.unattributed.max(left);
            agreements.push(Agreement::of(&explanation.scores, &[SUBJECT])?);
        }
        scored.agreements.push(agreements);
    }
    Ok(Some(scored))
}

/// Measures of the pointing of gradient norms, by index in [`Agreement::NAMES`].
const RANK: usize = 0;
const POSITIVE: usize = 5;

const DECOMPOSITIONS: [&str; 3] = ["attnlrp", "cp-lrp", "alti-logit"];
const NORMS: [&str; 2] = ["gradient-l1", "gradient-l2"];

fn claims(scale: Scale, found: &Found) -> Vec<Claim> {
    let of = |name: &str| found.scored.iter().find(|one| one.method.name == name);
    let rank = |name: &str, attractors: usize| {
        of(name).map_or(f64::NAN, |one| one.reciprocal_rank(attractors))
    };
    let overall = |name: &str, measure| of(name).map_or(f64::NAN, |one| one.overall(measure));
    let seconds = |name: &str| of(name).map_or(f64::NAN, Scored::seconds);
    let each = |of: &dyn Fn(&Scored) -> String| {
        let each = found.scored.iter();
        each.map(|one| format!("{} {}", one.method.name, of(one)))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let accuracy: Vec<f64> = (0..=MOST_PHRASES)
        .map(|attractors| {
            mean(
                found
                    .accuracy
                    .iter()
                    .filter_map(|a| a.get(attractors))
                    .copied(),
            )
        })
        .collect();
    let alti = of("alti-logit").map_or(f64::NAN, |one| one.unattributed);
    let between = NORMS.iter().all(|norm| {
        let of_norm = rank(norm, 1);
        of_norm > rank("random", 1) && DECOMPOSITIONS.iter().all(|one| of_norm < rank(one, 1))
    });
    let falling = |one: &Scored| one.reciprocal_rank(MOST_PHRASES) < one.reciprocal_rank(0);
    let ranking = [
        "alti-logit",
        "gradient-l1",
        "gradient-l2",
        "gradient-x-input",
        "erasure",
    ];
    let best_positive = found
        .scored
        .iter()
        .map(|one| one.overall(POSITIVE))
        .fold(f64::NEG_INFINITY, f64::max);
    let ratio = |name: &str| seconds(name) / seconds("gradient-x-input");
    let trained = |holds: bool| after_training(scale, holds);
    vec![
        Claim::new(
            "ALTI-Logit accounts for the whole score: embedding, attention by token, feed-forward \
             parts and every bias sum to it",
            "exact",
            format!("largest relative difference {alti:.1e} in f32"),
            Verdict::of(alti < 1e-3),
        )
        .noted("relative to the difference of two logits, which is smaller than either"),
        Claim::new(
            "the decoder prefers the right verb in more than 99 % of sentences",
            "a condition of the experiment",
            listed(
                accuracy
                    .iter()
                    .enumerate()
                    .map(|(attractors, share)| format!("{:.1} % with {attractors}", 100.0 * share)),
            ) + " attractors",
            trained(accuracy.iter().all(|share| *share > 0.99)),
        ),
        Claim::new(
            "AttnLRP, value-only LRP and ALTI-Logit have an MRR of at least 0.8 at one attractor",
            "estimate for this task",
            listed(
                DECOMPOSITIONS
                    .iter()
                    .map(|name| format!("{name} {:.3}", rank(name, 1))),
            ),
            trained(DECOMPOSITIONS.iter().all(|name| rank(name, 1) >= 0.8)),
        ),
        Claim::new(
            "gradient norms lie between them and random scores, which have about 0.35",
            "estimate for this task",
            format!(
                "random {:.3}, gradient-l1 {:.3}, gradient-l2 {:.3}",
                rank("random", 1),
                rank("gradient-l1", 1),
                rank("gradient-l2", 1)
            ),
            trained(between && (rank("random", 1) - 0.35).abs() < 0.1),
        ),
        Claim::new(
            "with three attractors every method has a lower MRR than with none",
            "every method falls",
            each(&|one| {
                let (none, most) = (one.at(0, RANK), one.at(MOST_PHRASES, RANK));
                format!("{none:.2} to {most:.2}")
            }),
            trained(found.scored.iter().all(falling)),
        )
        .noted("random scores fall because there are more tokens to choose from"),
        Claim::new(
            "ALTI-Logit has a higher MRR than gradients and erasure",
            "so in the paper of ALTI-Logit, for GPT-2",
            listed(
                ranking
                    .iter()
                    .map(|name| format!("{name} {:.3}", overall(name, RANK))),
            ),
            trained(
                ranking
                    .iter()
                    .skip(1)
                    .all(|name| overall("alti-logit", RANK) > overall(name, RANK)),
            ),
        ),
        Claim::new(
            "gradient norms win PTA",
            "so in the paper's summary",
            each(&|one| format!("{:.2}", one.overall(POSITIVE))),
            trained(
                NORMS
                    .iter()
                    .all(|name| overall(name, POSITIVE) >= best_positive),
            ),
        )
        .noted(
            "we have not seen the definition of PTA; in our reading, every token of the evidence \
             has a positive score, scores that are never negative win it by being so",
        ),
        Claim::new(
            "LRP as a modified gradient costs at most 1.5 times gradient × input",
            "much faster than explicit rules",
            format!(
                "cp-lrp {:.2}, attnlrp {:.2} times; milliseconds: {}",
                ratio("cp-lrp"),
                ratio("attnlrp"),
                each(&|one| format!("{:.1}", 1000.0 * one.seconds()))
            ),
            trained(ratio("cp-lrp") <= 1.5 && ratio("attnlrp") <= 1.5),
        )
        .noted("median of single explanations, on a machine that may do other things besides"),
    ]
}

/// A figure for each measure.
fn plots(found: &Found) -> Vec<Plot> {
    let figure = |(measure, name): (usize, &&str)| Plot {
        title: format!("{name} by number of attractors"),
        x: "attractors".to_owned(),
        y: (*name).to_owned(),
        series: found
            .scored
            .iter()
            .map(|one| Series {
                name: one.method.name.to_owned(),
                points: (0..=MOST_PHRASES)
                    .map(|attractors| (attractors as f64, one.at(attractors, measure).mean))
                    .collect(),
            })
            .collect(),
    };
    Agreement::NAMES.iter().enumerate().map(figure).collect()
}
