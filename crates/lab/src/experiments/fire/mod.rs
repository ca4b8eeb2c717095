//! FIRE beside the other ways that scores know positions: loss at the length of training and beyond,
//! words copied, reversed and counted that are longer than those of training, and what the heads
//! learn.
//!
//! The paper trains on 2 048 tokens of C4 and evaluates up to 8 192. Here small decoders read bytes in
//! windows of 128 and are asked about longer ones.

mod curves;
mod words;

use super::attending;
use super::decoder::{Recipe, train_by};
use super::jobs::by_seed;
use super::{after_training, mean, numbers};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{AbsolutePosition, Initialiser, InputSpec, ModelSpec};
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_parts::position::fire::FireTransform;
use lapidary_parts::position::{FireSpec, Position, PositionSpec, Span};
use std::collections::BTreeMap;

const HEADS: usize = 4;

/// How much is done.
struct Size {
    width: usize,
    blocks: usize,
    recipe: Recipe,
    steps: u64,
    seeds: u64,
    batches: usize,
    lengths: Vec<usize>,
}

impl Size {
    fn of(scale: Scale) -> Self {
        let recipe = Recipe {
            batch: 8,
            length: 128,
            peak: 2e-3,
            alignment: None,
            narrow: true,
            dense_steps: 0,
        };
        match scale {
            Scale::Smoke => Self {
                width: 16,
                blocks: 1,
                recipe: Recipe {
                    batch: 1,
                    length: 16,
                    ..recipe
                },
                steps: 1,
                seeds: 1,
                batches: 1,
                lengths: vec![16, 32],
            },
            Scale::Small => Self {
                width: 64,
                blocks: 3,
                recipe,
                steps: 300,
                seeds: 1,
                batches: 8,
                lengths: vec![128, 256, 512, 1024],
            },
            Scale::Full => Self {
                width: 128,
                blocks: 4,
                recipe: Recipe {
                    batch: 32,
                    ..recipe
                },
                steps: 5000,
                seeds: 3,
                batches: 64,
                lengths: vec![128, 256, 512, 1024],
            },
        }
    }
}

/// How a decoder knows positions.
fn ways() -> Vec<(&'static str, PositionSpec, bool)> {
    // L begins at half the length of training; the paper's 512 is a quarter of its own.
    let fire = FireSpec {
        initial_length: 64,
        ..FireSpec::default()
    };
    vec![
        ("none", PositionSpec::None, false),
        ("learned table", PositionSpec::None, true),
        ("rotary", PositionSpec::Rotary(Default::default()), false),
        ("ALiBi", PositionSpec::Alibi, false),
        (
            "T5 buckets",
            PositionSpec::RelativeBuckets {
                buckets: 32,
                max_distance: 128,
            },
            false,
        ),
        ("Kerple", PositionSpec::KerpleLogarithmic, false),
        ("Sandwich", PositionSpec::Sandwich { width: 32 }, false),
        ("FIRE", PositionSpec::Fire(fire), false),
    ]
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = exact()?;
    let (what, more, mut plots) = on_text(setting, &size)?;
    claims.extend(more);
    let on_words = words::run(setting)?;
    claims.extend(on_words.claims);
    plots.extend(on_words.plots);
    Ok(Reproduction {
        setting: format!(
            "{what}; decoders of {} blocks of width {} with {HEADS} heads, {} steps of {} windows of {}, \
             {} seed(s); {}",
            size.blocks,
            size.width,
            size.steps,
            size.recipe.batch,
            size.recipe.length,
            size.seeds,
            on_words.setting
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

/// Ready parameters for one network.
struct Given(BTreeMap<String, Vec<f64>>);

impl ParameterSource for Given {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        match self.0.get(name) {
            Some(values) => Ok(Tensor::from_vec(values.clone(), shape, &Device::Cpu)
                .map_err(lapidary_kernels::Error::from)?),
            None => Initialiser::new(0, DType::F64, Device::Cpu).parameter(name, shape, init),
        }
    }
}

fn bias(spec: &PositionSpec, given: &mut Given, length: usize) -> Result<Vec<f64>> {
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let parameters = Parameters::new(given, &ranks, &mut linears);
    let position = Position::new(spec, (1, 1), 4, true, parameters)?;
    let span = Span {
        queries: length,
        keys: length,
        offset: 0,
        draw: None,
    };
    match position.bias(span, DType::F64, &Device::Cpu)? {
        Some(bias) => numbers(&bias.laid_out(length, length)?),
        None => Ok(Vec::new()),
    }
}

/// That FIRE can be Kerple and ALiBi, by the weights that the theorem names.
fn exact() -> Result<Vec<Claim>> {
    const LENGTH: usize = 200;
    const LONGEST: f64 = 256.0;
    let network = |stretch: f64, slope: f64| {
        Given(BTreeMap::from([
            ("stretch".to_owned(), vec![stretch]),
            ("length".to_owned(), vec![1.0]),
            ("layers.0.weight".to_owned(), vec![1.0]),
            ("layers.0.bias".to_owned(), vec![0.0]),
            ("layers.1.weight".to_owned(), vec![slope]),
            ("layers.1.bias".to_owned(), vec![0.0]),
        ]))
    };
    let one = |transform: FireTransform| {
        PositionSpec::Fire(FireSpec {
            hidden: 1,
            layers: 1,
            transform,
            initial_length: LONGEST as usize,
            ..FireSpec::default()
        })
    };
    let (r1, r2) = (1.3, 0.4);
    let whole = (r2 * LONGEST + 1.0).ln();
    let kerple = bias(
        &one(FireTransform::Logarithm),
        &mut network(r2, -r1 * whole),
        LENGTH,
    )?;
    let slope = 2f64.powi(-8);
    let alibi = bias(
        &one(FireTransform::Linear),
        &mut network(0.1, -slope * LONGEST),
        LENGTH,
    )?;
    let mut worst = 0f64;
    for i in 0..LENGTH {
        for j in 0..=i {
            let distance = (i - j) as f64;
            let at = |all: &[f64]| all.get(i * LENGTH + j).copied().unwrap_or(f64::NAN);
            let expected = -r1 * (1.0 + r2 * distance).ln();
            worst = worst.max((at(&kerple) - expected).abs() / 10.0);
            worst = worst.max((at(&alibi) + slope * distance).abs());
        }
    }
    Ok(vec![Claim::new(
        "with the weights that the theorem names it is Kerple, and ALiBi, at every distance",
        "theorem",
        format!("largest difference {worst:.1e} over {LENGTH} positions"),
        Verdict::of(worst < 1e-5),
    )])
}

/// The decoder with such positions.
fn decoder(size: &Size, vocabulary: usize, position: &PositionSpec, table: bool) -> ModelSpec {
    let attention = MultiHeadSpec {
        causal: true,
        position: position.clone(),
        ..MultiHeadSpec::new(HEADS)
    };
    let longest = size.lengths.last().copied().unwrap_or(size.recipe.length);
    let mut spec = attending::spec(
        vocabulary,
        size.width,
        longest,
        &vec![attention; size.blocks],
    );
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        match table {
            true => tokens.length = size.recipe.length,
            false => tokens.position = AbsolutePosition::None,
        }
    }
    spec
}

/// What one decoder does: its loss at each length, and its curves where it is asked for them.
type Found = (Vec<f64>, Vec<curves::Curve>);

fn on_text(setting: &Setting, size: &Size) -> Result<(String, Vec<Claim>, Vec<Plot>)> {
    let Some([training, held_out]) = attending::shakespeare(setting)? else {
        let claim = Claim::new(
            "beyond the length of training its loss does not rise, where that of rotary positions does",
            "C4: flat or falling to 8192 tokens, 2.28 points of perplexity below Kerple",
            "no text: give --data with tiny_shakespeare.txt",
            Verdict::NotMeasured,
        );
        return Ok(("no text".to_owned(), vec![claim], Vec::new()));
    };
    let each: Vec<(&'static str, (PositionSpec, bool))> = ways()
        .into_iter()
        .map(|(name, position, table)| (name, (position, table)))
        .collect();
    let train = |(position, table): &(PositionSpec, bool), seed: u64| -> Result<Found> {
        let spec = decoder(size, 256, position, *table);
        let task = Box::new(training.clone());
        let model = train_by(size.recipe, spec, task, size.steps, seed)?;
        let learned = match (position, seed == setting.seed) {
            (PositionSpec::Fire(_), true) => curves::of(&model, size.recipe.length)?,
            _ => Vec::new(),
        };
        let losses = size.lengths.iter().map(|&length| {
            // A table has no row for what is longer.
            if *table && length > size.recipe.length {
                return Ok(f64::NAN);
            }
            let recipe = Recipe {
                batch: 2,
                length,
                ..size.recipe
            };
            let batches = (size.batches * size.recipe.length / length).max(1);
            let mut task = held_out.clone();
            Ok(attending::measure(&model, &mut task, recipe, batches)?.loss)
        });
        Ok((losses.collect::<Result<_>>()?, learned))
    };
    let found = by_seed(setting, "text", &each, size.seeds, train)?;
    let losses: BTreeMap<&str, Vec<f64>> = found
        .iter()
        .map(|(name, runs)| {
            let at = |index: usize| {
                mean(
                    runs.iter()
                        .filter_map(|(losses, _)| losses.get(index).copied()),
                )
            };
            (*name, (0..size.lengths.len()).map(at).collect())
        })
        .collect();
    let learned: Vec<curves::Curve> = found
        .into_iter()
        .flat_map(|(_, runs)| runs)
        .flat_map(|(_, learned)| learned)
        .collect();
    let of = |name: &str, index: usize| {
        let found = losses.get(name).and_then(|all| all.get(index));
        found.copied().unwrap_or(f64::NAN)
    };
    // Four times the length of training.
    let far = size.lengths.len().saturating_sub(2).max(1);
    let rise = |name: &str| of(name, far) - of(name, 0);
    let told: Vec<String> = ways()
        .iter()
        .map(|(name, ..)| {
            let each: Vec<String> = losses
                .get(name)
                .into_iter()
                .flatten()
                .map(|loss| {
                    if loss.is_nan() {
                        "–".to_owned()
                    } else {
                        format!("{loss:.3}")
                    }
                })
                .collect();
            format!("{name} {}", each.join(" "))
        })
        .collect();
    let told = format!("nats a byte at {:?}: {}", size.lengths, told.join("; "));
    let claims = vec![
        curves::claim(
            &learned,
            "text",
            after_training(setting.scale, curves::both_kinds(&learned)),
        ),
        Claim::new(
            "at four times the length of training its loss is at most 0.03 nats above that at it",
            "C4: flat or falling to four times the length",
            told.clone(),
            after_training(setting.scale, rise("FIRE") <= 0.03),
        ),
        Claim::new(
            "and at most 0.02 above ALiBi's there",
            "C4: 2.28 points of perplexity below Kerple, the best of the others",
            format!("FIRE {:.3}, ALiBi {:.3}", of("FIRE", far), of("ALiBi", far)),
            after_training(setting.scale, of("FIRE", far) <= of("ALiBi", far) + 0.02),
        ),
        Claim::new(
            "at the length of training it is no worse than ALiBi",
            "C4: the best of all at the length of training too",
            format!("FIRE {:.3}, ALiBi {:.3}", of("FIRE", 0), of("ALiBi", 0)),
            after_training(setting.scale, of("FIRE", 0) <= of("ALiBi", 0)),
        ),
        Claim::new(
            "without positions and with rotary ones the loss rises by 0.2 nats at least",
            "C4: rotary positions and T5's bias degrade beyond the length of training",
            format!("none {:+.3}, rotary {:+.3}", rise("none"), rise("rotary")),
            after_training(setting.scale, rise("none") >= 0.2 && rise("rotary") >= 0.2),
        ),
    ];
    let plot = Plot {
        title: "Held-out loss by length".to_owned(),
        x: "tokens".to_owned(),
        y: "nats a byte".to_owned(),
        series: losses
            .iter()
            .map(|(name, losses)| Series {
                name: (*name).to_owned(),
                points: size
                    .lengths
                    .iter()
                    .zip(losses)
                    .filter(|(_, loss)| loss.is_finite())
                    .map(|(length, loss)| (*length as f64, *loss))
                    .collect(),
            })
            .collect(),
    };
    Ok((
        "the bytes of Tiny Shakespeare".to_owned(),
        claims,
        vec![plot, curves::plot(learned, "text")],
    ))
}
