//! Over-squashing: from which length small decoders can no longer tell sequences apart.
//!
//! The paper looks at Gemini 1.5 and Gemma 7B. Here decoders that know positions by rotation, by
//! ALiBi or not at all learn to say the first digit, the last digit, and the number of ones of a
//! sequence, and are then followed to lengths they have not seen, in emulated formats.

use super::decoder::{self, Positions};
use super::{after_training, mean};
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::Question;
use lapidary_explain::analyses::power_law::PowerLaw;
use lapidary_explain::analyses::squashing::paths::{mixing, path_sums, uniform};
use lapidary_explain::analyses::squashing::{
    Alphabet, Directions, Distance, Emulated, Family, Flow, Probe, Separator, collapse_length,
    decline, jacobian_norms, lengths, path_bound,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, InputSpec, Model, ModelSpec};
use lapidary_signal::rounding::{Format, Rounding, SoftmaxPrecision};
use lapidary_train::Generator;
use lapidary_train::data::{Batch, IGNORE, Task};
use rand::RngExt;

/// The digits are the first ten tokens; then one question for each probe, and the separator.
const DIGITS: u32 = 10;
const QUESTIONS: u32 = DIGITS;
const SEPARATOR: u32 = QUESTIONS + 3;
const VOCABULARY: usize = SEPARATOR as usize + 1;
const ONE: u32 = 1;
const EVERY: usize = 4;
/// Digits that stand in for the odd one out of a probe.
const ODD_ONES: [u32; 3] = [0, 4, 7];

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    longest: usize,
    points: usize,
    probes: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 2,
                steps: 3,
                longest: 48,
                points: 8,
                probes: 3,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 4,
                steps: 700,
                longest: 512,
                points: 18,
                probes: 9,
            },
            Scale::Full => Self {
                width: 64,
                blocks: 4,
                steps: 6000,
                longest: 1024,
                points: 32,
                probes: 16,
            },
        }
    }
}

/// Rows of digits in which questions stand now and then, each to be answered where it stands.
struct Questions;

impl Task for Questions {
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
        for _ in 0..rows {
            row(generator, length, &mut batch);
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// Half of the rows are random digits, half are mostly ones; a third have separators.
fn row(generator: &mut Generator, length: usize, batch: &mut Batch) {
    let ones = if generator.random_bool(0.5) { 0.1 } else { 0.9 };
    let separated = generator.random_bool(0.33);
    let (mut first, mut last, mut count, mut seen) = (None, 0, 0, 0usize);
    let start = batch.inputs.len();
    while batch.inputs.len() < start + length {
        if let Some(first) = first
            && generator.random_bool(0.15)
        {
            let question = generator.random_range(0..3);
            batch.inputs.push(QUESTIONS + question);
            batch.targets.push(match question {
                0 => first,
                1 => last,
                _ => count % DIGITS,
            });
            continue;
        }
        if separated && seen > 0 && seen.is_multiple_of(EVERY) {
            batch.inputs.push(SEPARATOR);
            batch.targets.push(IGNORE);
        }
        last = match generator.random_bool(ones) {
            true => ONE,
            false => generator.random_range(0..DIGITS),
        };
        first = first.or(Some(last));
        count += u32::from(last == ONE);
        seen += 1;
        batch.inputs.push(last);
        batch.targets.push(IGNORE);
    }
    batch.inputs.truncate(start + length);
    batch.targets.truncate(start + length);
}

fn question(probe: Probe) -> u32 {
    QUESTIONS
        + match probe {
            Probe::CopyFirst => 0,
            Probe::CopyLast => 1,
            Probe::Count => 2,
        }
}

fn alphabet() -> Alphabet {
    Alphabet {
        one: ONE,
        zero: 0,
        digits: (0..DIGITS).collect(),
        ..Alphabet::default()
    }
}

const POSITIONS: [Positions; 3] = [Positions::None, Positions::Rotary, Positions::Alibi];

/// A decoder that is asked about longer sequences than it is trained on.
fn spec(positions: Positions, size: &Size) -> ModelSpec {
    let mut spec = positions.spec(VOCABULARY, size.width, size.blocks);
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        tokens.length = 2 * size.longest;
    }
    spec
}

const ROUNDED: [Format; 2] = [Format::Bf16, Format::F32];

fn emulated(model: &Model, format: Option<Format>) -> Result<Emulated> {
    let rounding = format.map(|format| Rounding {
        format,
        softmax: SoftmaxPrecision::Wide,
    });
    Ok(Emulated::new(model, rounding)?)
}

/// Lengths with the share of answers that are right.
type Curve = Vec<(usize, f64)>;

/// What one model shows.
struct Run {
    positions: Positions,
    /// Distances of `1ⁿ⁻¹ 0` and `1ⁿ 0`, exact.
    exact: Vec<Distance>,
    /// The same in each of [`ROUNDED`].
    rounded: Vec<Vec<Distance>>,
    /// In bf16, with separators, and with sharper attention from the longest training length on.
    separated: Vec<Distance>,
    sharpened: Vec<Distance>,
    /// For each of [`ROUNDED`], accuracy at each length.
    copy_first: Vec<Curve>,
    copy_last: Vec<Curve>,
    count: Vec<Curve>,
    /// Of the trained model on a row of 32: tokens whose Jacobian with attention and norms held
    /// fixed is within the bound over paths, and all.
    bounded: (usize, usize),
}

impl Run {
    fn of(positions: Positions, size: &Size, seed: u64) -> Result<Self> {
        let spec = spec(positions, size);
        let model = decoder::train(spec, Box::new(Questions), size.steps, seed)?;
        let lengths_asked = lengths(8, size.longest, size.points);
        let far = |emulated: &Emulated, alphabet: &Alphabet| {
            emulated.distances(Family::OnesThenZero, alphabet, &lengths_asked)
        };
        let separated = Alphabet {
            separator: Some(Separator {
                token: SEPARATOR,
                every: EVERY,
            }),
            ..alphabet()
        };
        let exact = far(&emulated(&model, None)?, &alphabet())?;
        let (mut rounded, mut copy_first, mut copy_last, mut count) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for format in ROUNDED {
            let emulated = emulated(&model, Some(format))?;
            rounded.push(far(&emulated, &alphabet())?);
            copy_first.push(accuracies(&emulated, Probe::CopyFirst, size)?);
            copy_last.push(accuracies(&emulated, Probe::CopyLast, size)?);
            count.push(accuracies(&emulated, Probe::Count, size)?);
        }
        let narrow = emulated(&model, Some(Format::Bf16))?;
        let separated = far(&narrow, &separated)?;
        let sharpened = far(&narrow.sharpened(decoder::LENGTH)?, &alphabet())?;
        Ok(Self {
            positions,
            exact,
            rounded,
            separated,
            sharpened,
            copy_first,
            copy_last,
            count,
            bounded: bounded(&model)?,
        })
    }

    fn collapse(&self, format: usize) -> Option<usize> {
        let distances = self.rounded.get(format)?;
        collapse_length(distances, *ROUNDED.get(format)?)
    }
}

/// Accuracy at each length; for the copies, over several digits that stand out.
fn accuracies(emulated: &Emulated, probe: Probe, size: &Size) -> Result<Vec<(usize, f64)>> {
    let mut all = Vec::new();
    for n in lengths(4, size.longest, size.probes) {
        let mut prompts = Vec::new();
        for zero in ODD_ONES {
            let alphabet = Alphabet {
                zero,
                suffix: vec![question(probe)],
                ..alphabet()
            };
            prompts.push(probe.prompt(n, &alphabet)?);
        }
        prompts.dedup();
        let right = emulated.answers(&prompts)?;
        let share = mean(right.iter().map(|right| f64::from(u8::from(*right))));
        all.push((n, share));
    }
    Ok(all)
}

fn bounded(model: &Model) -> Result<(usize, usize)> {
    let ids: Vec<u32> = (0..32).map(|i| (i * 7 + i * i / 3) % DIGITS).collect();
    let ids = engine(Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu))?;
    let input = Input::tokens(ids);
    let question = Question::new(model, &input);
    let bound = path_bound(&question)?;
    let norms = jacobian_norms(&question, Flow::Frozen, Directions::Every)?;
    let operator = norms.operator.unwrap_or_default();
    let within = bound
        .iter()
        .zip(&operator)
        .filter(|(b, j)| **j <= **b * 1.001);
    Ok((within.count(), bound.len()))
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let runs = POSITIONS
        .into_iter()
        .map(|positions| Run::of(positions, &size, setting.seed))
        .collect::<Result<Vec<Run>>>()?;
    let mut claims = exact_claims(&size, setting.seed, &runs)?;
    claims.extend(
        runs.iter()
            .flat_map(|run| distance_claims(setting.scale, run, &size)),
    );
    claims.extend(runs.iter().flat_map(|run| task_claims(setting.scale, run)));
    Ok(Reproduction {
        setting: format!(
            "decoders of {} blocks, width {}, heads of 16, {} steps of {} rows of {} tokens; \
             families to n = {}, formats emulated after every operation (softmax wide between \
             rounded scores and weights), one seed",
            size.blocks,
            size.width,
            size.steps,
            decoder::BATCH,
            decoder::LENGTH,
            size.longest,
        ),
        claims,
        plots: plots(&runs),
        ..Reproduction::default()
    })
}

/// What holds for any weights.
fn exact_claims(size: &Size, seed: u64, runs: &[Run]) -> Result<Vec<Claim>> {
    let spec = spec(Positions::None, size);
    let model = Model::initialised(spec, seed, DType::F32, &Device::Cpu)?;
    let ones = vec![ONE; 24];
    let fused = Rounding {
        format: Format::Bf16,
        softmax: SoftmaxPrecision::Fused,
    };
    let narrow = Emulated::new(&model, Some(fused))?.row_spread(&ones)?;
    let wide = Emulated::new(&model, None)?.row_spread(&ones)?;
    let most = |spreads: &[f64]| spreads.iter().copied().fold(0.0, f64::max);
    let (narrow, wide) = (most(&narrow), most(&wide));
    let sums = path_sums(&vec![mixing(&uniform(64), 1.0); size.blocks]);
    let falls = sums.windows(2).rev().skip(1).all(|pair| pair[0] > pair[1]);
    let (within, all) = runs.iter().fold((0, 0), |(within, all), run| {
        (within + run.bounded.0, all + run.bounded.1)
    });
    Ok(vec![
        Claim::new(
            "equal tokens without positions have equal rows at every layer",
            "exact",
            format!("largest relative spread {narrow} in bf16, {wide:.1e} in f64"),
            Verdict::of(narrow == 0.0 && wide < 1e-12),
        )
        .noted("with weights that are not rounded before they mix; untrained"),
        Claim::new(
            "under uniform attention, paths to the last token grow fewer from the first token on",
            "exact",
            format!(
                "{:.2} at the first, {:.2} at the last but one",
                first(&sums),
                before_last(&sums)
            ),
            Verdict::of(falls),
        ),
        Claim::new(
            "the sum over paths bounds the Jacobian in which attention and norms are held fixed",
            "exact",
            format!("{within} of {all} tokens of the trained models"),
            Verdict::of(within == all),
        ),
    ])
}

fn first(values: &[f64]) -> f64 {
    values.first().copied().unwrap_or(f64::NAN)
}

fn before_last(values: &[f64]) -> f64 {
    values.iter().rev().nth(1).copied().unwrap_or(f64::NAN)
}

fn distance_claims(scale: Scale, run: &Run, size: &Size) -> Vec<Claim> {
    let name = run.positions.name();
    let law = decline(&run.exact).unwrap_or(PowerLaw {
        exponent: f64::NAN,
        factor: f64::NAN,
        r_squared: f64::NAN,
    });
    let (narrow, wide) = (run.collapse(0), run.collapse(1));
    let separated = collapse_length(&run.separated, Format::Bf16);
    let sharpened = collapse_length(&run.sharpened, Format::Bf16);
    // A length beyond the longest measured one is at least that.
    let at_least = |n: Option<usize>| n.unwrap_or(size.longest) as f64;
    let apart = |longer: Option<usize>, factor: f64| {
        narrow.is_some_and(|narrow| at_least(longer) >= factor * narrow as f64)
    };
    let say = |n: Option<usize>| match n {
        Some(n) => n.to_string(),
        None => format!("none to {}", size.longest),
    };
    vec![
        Claim::new(
            &format!(
                "{name}: the last vectors of 1ⁿ⁻¹ 0 and 1ⁿ 0 approach each other as a power of n"
            ),
            "n^-1 to n^-2; here asked: exponent at most -0.8, R² at least 0.95",
            format!("exponent {:.2}, R² {:.3}", law.exponent, law.r_squared),
            after_training(scale, law.exponent <= -0.8 && law.r_squared >= 0.95),
        ),
        Claim::new(
            &format!("{name}: f32 tells them apart for at least 8 times as long as bf16"),
            "Gemma 7B in bf16: near 50-300 tokens",
            format!("collapse at {} in bf16, {} in f32", say(narrow), say(wide)),
            after_training(scale, apart(wide, 8.0)),
        ),
        Claim::new(
            &format!(
                "{name}: a separator every {EVERY} tokens doubles the collapse length in bf16"
            ),
            "commas every third digit restore copying",
            format!(
                "{} without, {} with; {} with sharper attention",
                say(narrow),
                say(separated),
                say(sharpened)
            ),
            after_training(scale, apart(separated, 2.0)),
        ),
    ]
}

fn task_claims(scale: Scale, run: &Run) -> Vec<Claim> {
    let name = run.positions.name();
    let at = |curves: &[Vec<(usize, f64)>], format: usize| -> Vec<(usize, f64)> {
        curves.get(format).cloned().unwrap_or_default()
    };
    let fails = |curve: &[(usize, f64)]| {
        let failed = curve.iter().find(|(_, share)| *share < 0.5);
        failed.map(|(n, _)| *n)
    };
    let (last_narrow, last_wide) = (at(&run.copy_last, 0), at(&run.copy_last, 1));
    let collapse = run.collapse(0);
    let (narrow_fails, wide_fails) = (fails(&last_narrow), fails(&last_wide));
    let near = match (narrow_fails, collapse) {
        (Some(fails), Some(collapse)) => {
            let ratio = fails as f64 / collapse as f64;
            (0.5..=2.0).contains(&ratio) && wide_fails.is_none()
        }
        _ => false,
    };
    let overall = |curve: &[(usize, f64)]| mean(curve.iter().map(|(_, share)| *share));
    let first = [at(&run.copy_first, 0), at(&run.copy_first, 1)];
    let count = at(&run.count, 1);
    let say = |n: Option<usize>| n.map_or("never".to_owned(), |n| n.to_string());
    vec![
        Claim::new(
            &format!("{name}: copying the last digit fails in bf16 near the collapse length, and not in f32"),
            "Gemini: fails around 300 digits",
            format!(
                "below half at {} in bf16 and {} in f32; collapse at {}",
                say(narrow_fails),
                say(wide_fails),
                say(collapse)
            ),
            after_training(scale, near),
        )
        .noted(format!(
            "accuracy to the training length {:.2} in f32",
            overall(&within_training(&last_wide))
        )),
        Claim::new(
            &format!("{name}: copying the first digit keeps working"),
            "at least 95 %",
            format!(
                "{:.0} % in bf16, {:.0} % in f32 over all lengths",
                100.0 * overall(&first[0]),
                100.0 * overall(&first[1])
            ),
            after_training(scale, first.iter().all(|curve| overall(curve) >= 0.95)),
        ),
        Claim::new(
            &format!("{name}: counting fails as sequences grow"),
            "errors grow with n",
            format!(
                "{:.0} % right to {} tokens, {:.0} % beyond, in f32",
                100.0 * overall(&within_training(&count)),
                decoder::LENGTH,
                100.0 * overall(&beyond_training(&count))
            ),
            after_training(
                scale,
                overall(&beyond_training(&count)) < overall(&within_training(&count)),
            ),
        ),
    ]
}

fn within_training(curve: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let short = curve.iter().filter(|(n, _)| *n < decoder::LENGTH);
    short.copied().collect()
}

fn beyond_training(curve: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let long = curve.iter().filter(|(n, _)| *n >= decoder::LENGTH);
    long.copied().collect()
}

fn plots(runs: &[Run]) -> Vec<Plot> {
    let curve = |name: String, distances: &[Distance]| Series {
        name,
        points: distances
            .iter()
            .filter(|distance| distance.largest > 0.0)
            .map(|distance| ((distance.n as f64).log10(), distance.largest.log10()))
            .collect(),
    };
    let mut series = Vec::new();
    for run in runs {
        let name = run.positions.name();
        series.push(curve(format!("{name}, f64"), &run.exact));
        if let Some(narrow) = run.rounded.first() {
            series.push(curve(format!("{name}, bf16"), narrow));
        }
    }
    let accuracy = |title: &str, of: fn(&Run) -> &Vec<Curve>| Plot {
        title: title.to_owned(),
        x: "log10 n".to_owned(),
        y: "share right".to_owned(),
        series: runs
            .iter()
            .flat_map(|run| {
                let curves = ROUNDED.iter().zip(of(run));
                curves.map(|(format, curve)| Series {
                    name: format!("{}, {}", run.positions.name(), format.name()),
                    points: curve
                        .iter()
                        .map(|(n, share)| ((*n as f64).log10(), *share))
                        .collect(),
                })
            })
            .collect(),
    };
    vec![
        Plot {
            title: "Distance of the last vectors of 1ⁿ⁻¹ 0 and 1ⁿ 0".to_owned(),
            x: "log10 n".to_owned(),
            y: "log10 of the largest difference".to_owned(),
            series,
        },
        accuracy("Copying the last digit", |run| &run.copy_last),
        accuracy("Copying the first digit", |run| &run.copy_first),
        accuracy("Counting ones", |run| &run.count),
    ]
}
