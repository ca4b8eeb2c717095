//! Digits classified pixel by pixel, and what is behind each block of a classifier.

use super::audit::{averaged, of_sequences};
use super::{BLOCKS, HEADS, Job, Size, Trained, beside, in_blocks, learned, white_box};
use crate::experiments::classifier::{Labelled, Narrow};
use crate::experiments::sequences::{Course, LEVELS, Measures, SIDE, digits, percent_right, train};
use crate::experiments::{after_training, mean};
use crate::{Claim, Plot, Result, Setting};
use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, Model, ModelSpec};
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};

const USUAL: &str = "Transformer";
const OWN: &str = "CRATE";

/// A trained classifier.
pub(super) struct Classifier {
    name: &'static str,
    /// Percent of held-out digits that it names.
    right: f64,
    model: Model,
}

fn usual(size: &Size) -> ModelSpec {
    let measures = Measures {
        vocabulary: LEVELS,
        length: SIDE * SIDE,
        labels: 10,
        width: size.width,
        heads: HEADS,
        blocks: BLOCKS,
    };
    let mut usual = measures.spec(MechanismSpec::Softmax, true);
    for block in &mut usual.blocks {
        block.feedforward = Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 4 * size.width,
            activation: Default::default(),
            bias: true,
        }));
    }
    usual
}

/// Held-out digits.
fn asked(size: &Size, seed: u64) -> Vec<Labelled> {
    digits(size.digits / 4, seed ^ 0xd161)
}

/// A training for each classifier and seed.
pub(super) fn jobs<'a>(setting: &Setting, size: &'a Size) -> Vec<(String, Job<'a>)> {
    let own = white_box(&usual(size), None);
    let mut jobs = Vec::new();
    for (name, spec) in [(USUAL, usual(size)), (OWN, own)] {
        for seed in (setting.seed..).take(size.seeds as usize) {
            let spec = spec.clone();
            let job = move || -> Result<Trained> {
                let course = Course {
                    steps: size.steps,
                    batch: size.batch,
                    rate: 3e-3,
                    seed,
                };
                let model = train(spec, &digits(size.digits, seed), &course)?;
                let right = percent_right(&model, &asked(size, seed))?;
                Ok(Trained::Classifier(Box::new(Classifier {
                    name,
                    right,
                    model,
                })))
            };
            jobs.push((
                format!("digits: {name}, seed {seed}"),
                Box::new(job) as Job<'a>,
            ));
        }
    }
    jobs
}

/// Measures what was learned.
pub(super) fn claimed(
    setting: &Setting,
    size: &Size,
    found: &[Classifier],
) -> Result<(Vec<Claim>, Vec<Plot>)> {
    let of = |name: &'static str| found.iter().filter(move |found| found.name == name);
    let [usual_right, own_right] = [USUAL, OWN].map(|name| mean(of(name).map(|found| found.right)));
    let [usual_parameters, own_parameters] =
        [USUAL, OWN].map(|name| of(name).next().map_or(0, |found| in_blocks(&found.model)));
    let share = own_parameters as f64 / usual_parameters as f64;
    let (mut audits, mut initial) = (Vec::new(), Vec::new());
    let own = white_box(&usual(size), None);
    for (seed, found) in (setting.seed..).zip(of(OWN)) {
        let held_out = asked(size, seed);
        let sequences: Vec<&[u32]> = held_out
            .iter()
            .take(32)
            .map(|e| e.tokens.as_slice())
            .collect();
        audits.push(of_sequences(&found.model, &sequences)?);
        let mut source = Narrow(Initialiser::new(seed, DType::F32, Device::Cpu));
        initial.push(of_sequences(
            &Model::new(own.clone(), &mut source)?,
            &sequences,
        )?);
    }
    let (trained, untrained) = (averaged(&audits), averaged(&initial));
    let claims = vec![
        Claim::new(
            "with less than 40 % of the blocks' parameters it comes within 2 points of a Transformer of \
             the same width, heads and blocks",
            "ImageNet: CRATE-B 70.8 % with 22.8 M parameters, ViT-S 72.4 % with 22.1 M",
            format!(
                "{own_right:.1} % with {:.0} % of the parameters; {usual_right:.1} %",
                100.0 * share
            ),
            after_training(setting.scale, own_right >= usual_right - 2.0 && share < 0.4),
        ),
        Claim::new(
            "after training the coding rate falls from block to block, at least twice of three times, and by \
             more than before training",
            "figure: it falls through the layers, the last one or two aside",
            beside("rates", &trained.rates, &untrained.rates),
            after_training(setting.scale, learned(&trained.rates, &untrained.rates)),
        ),
        Claim::new(
            "and so does the share of entries that are not zero",
            "figure",
            beside("shares", &trained.active, &untrained.active),
            after_training(setting.scale, learned(&trained.active, &untrained.active)),
        ),
    ];
    let plots = vec![
        Plot {
            title: "Coding rate of tokens against each block's subspaces".to_owned(),
            x: "block".to_owned(),
            y: "mean over heads".to_owned(),
            series: vec![
                trained.rates.series("trained"),
                untrained.rates.series("untrained"),
            ],
        },
        Plot {
            title: "Entries of each block's code that are not zero".to_owned(),
            x: "block".to_owned(),
            y: "share".to_owned(),
            series: vec![
                trained.active.series("trained"),
                untrained.active.series("untrained"),
            ],
        },
    ];
    Ok((claims, plots))
}
