//! What a small decoder recites, before and after directions of little curvature are taken out.
//!
//! The paper edits OLMo-2 7B and asks for windows of its training text. Here a decoder is trained
//! on the generated language mixed with canaries, sequences of random words that come again and
//! again; factors are taken on the language alone. Asked for by its first words, a canary is
//! recited or not. The other ways to take as much of the same weights away are truncated SVD,
//! random directions of the same basis, the truncation of both sides by themselves, and a mask of
//! single weights that learns from half of the canaries to forget them. What the edit costs kinds of
//! text goes beside how they lean on what it takes out, and a vision Transformer has learned wrong
//! labels instead.

mod layer;
mod recited;
mod texts;
mod vision;

use self::layer::{Layer, layers, with};
use super::{after_learning, after_training, decoder, mean};
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::CalibrationData;
use lapidary_compress::curvature::{Keep, Spectrum, factors};
use lapidary_compress::quality::{Window, perplexity};
use lapidary_factor::{frobenius_norm, matrix_from_tensor};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::generation::{GenerationOptions, generate};
use lapidary_model::{Input, Model, Pass};
use lapidary_train::data::{Batch, Task};
use lapidary_train::language::{Corpus, Kind, Split};
use lapidary_train::{Generator, generator};
use rand::RngExt;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// Words of a canary.
const CANARY: usize = 48;
/// Words that are shown; the rest has to follow.
const SHOWN: usize = 16;
/// Share of the training sequences that hold a canary.
const SHARE: f64 = 0.2;
/// Shares of the curvature that stay.
const MASSES: [f64; 8] = [0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.4];

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    canaries: usize,
    windows: u64,
    sentences: usize,
    /// Steps of the learned mask.
    masking: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 2,
                steps: 3,
                canaries: 4,
                windows: 4,
                sentences: 4,
                masking: 2,
            },
            Scale::Small => Self {
                width: 128,
                blocks: 4,
                steps: 1200,
                canaries: 64,
                windows: 96,
                sentences: 60,
                masking: 60,
            },
            Scale::Full => Self {
                width: 256,
                blocks: 6,
                steps: 6000,
                canaries: 256,
                windows: 512,
                sentences: 400,
                masking: 500,
            },
        }
    }
}

/// Where one edit leaves the model.
#[derive(Clone, Copy, Debug)]
struct Point {
    perplexity: f64,
    /// Share of canaries that are recited to the last word.
    recited: f64,
    /// Share of their words that are right in their place.
    words: f64,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let corpus = decoder::corpus(Split::Training, setting.seed)?;
    let vocabulary = corpus.language().vocabulary().size();
    let mut random = generator(setting.seed ^ 0xca9a);
    let canaries: Vec<Vec<u32>> = (0..size.canaries)
        .map(|_| {
            let words = 1..vocabulary as u32;
            (0..CANARY)
                .map(|_| random.random_range(words.clone()))
                .collect()
        })
        .collect();
    let task = Box::new(Recurring {
        corpus: decoder::corpus(Split::Training, setting.seed)?,
        canaries: canaries.clone(),
        next: 0,
    });
    let spec = decoder::spec(vocabulary, size.width, size.blocks);
    setting.tell(|| "a decoder that learns canaries".to_owned());
    let model = decoder::train(spec, task, size.steps, setting.seed)?;
    setting.tell(|| "curvature and edits".to_owned());

    let windows = |corpus: &Corpus| -> Result<Vec<Vec<u32>>> {
        Ok((0..size.windows)
            .map(|index| corpus.window(index + (1 << 40), decoder::LENGTH))
            .collect::<lapidary_train::Result<_>>()?)
    };
    let held_out = decoder::corpus(Split::HeldOut, setting.seed)?;
    let measure = Measure {
        canaries: &canaries,
        windows: windows(&held_out)?
            .into_iter()
            .map(|tokens| Window { tokens, context: 1 })
            .collect(),
    };
    let blocks: Vec<usize> = (size.blocks / 2..size.blocks).collect();
    let data = CalibrationData::windows(windows(&corpus)?)?;
    let found = factors(&model, &data, &blocks, 8, setting.seed)?;
    let spectrum = Spectrum::of(&model, &found)?;
    let layers = layers(&model, &spectrum)?;

    let before = measure.of(&model)?;
    let mut curves: BTreeMap<&str, Vec<Point>> = BTreeMap::new();
    let mut edited = Vec::new();
    for mass in MASSES {
        let staircase = with(&model, &layers, |layer| layer.curved(mass, Keep::Staircase))?;
        let point = measure.of(&staircase)?;
        edited.push((mass, point, staircase));
        let mut add = |name, model: Model| -> Result<()> {
            curves.entry(name).or_default().push(measure.of(&model)?);
            Ok(())
        };
        curves_of(&model, &layers, mass, setting.seed, &mut add)?;
    }
    let own: Vec<Point> = edited.iter().map(|(_, point, _)| *point).collect();
    // The strongest edit that costs at most a tenth of perplexity.
    let limit = 1.1 * before.perplexity;
    let chosen = edited
        .iter()
        .filter(|(_, point, _)| point.perplexity <= limit)
        .min_by(|a, b| {
            a.1.recited
                .total_cmp(&b.1.recited)
                .then(a.0.total_cmp(&b.0))
        });

    let chosen = chosen.map(|(mass, point, model)| Chosen {
        mass: *mass,
        point: *point,
        model,
    });
    let clean = windows(&held_out)?;
    let mut claims = vec![
        projection(&layers)?,
        halved(setting.scale, before, chosen.as_ref()),
        recited::told(setting.scale, (&model, chosen.as_ref()), &canaries, &clean)?,
        below(setting.scale, &own, &curves),
        recited::untold(
            (setting, &size),
            (&model, before, chosen.as_ref()),
            (&canaries, &data, &measure.windows),
            &spectrum,
        )?,
        sensitive(
            setting,
            &size,
            &held_out,
            &model,
            chosen.as_ref().map(|chosen| chosen.model),
        )?,
    ];
    let (leaning, by_text) = texts::claims(
        setting,
        &size,
        (&canaries, clean, &held_out),
        (&model, &spectrum),
        chosen.as_ref().map(|chosen| (chosen.mass, chosen.model)),
    )?;
    claims.extend(leaning);
    let (labels, by_mass) = vision::run(setting)?;
    claims.push(labels);
    let mut plots = vec![plot(before, &own, &curves)];
    plots.extend(by_text);
    plots.push(by_mass);
    Ok(Reproduction {
        setting: format!(
            "decoder of {} blocks and width {}, {} steps; {} canaries of {CANARY} words in {:.0} % of the sequences; feed-forward weights of blocks {blocks:?}; before the edit perplexity {:.2}, {:.0} % recited; masks of {} steps; {}",
            size.blocks,
            size.width,
            size.steps,
            size.canaries,
            100.0 * SHARE,
            before.perplexity,
            100.0 * before.recited,
            size.masking,
            vision::describe(setting.scale),
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

/// The strongest edit that costs little.
struct Chosen<'a> {
    mass: f64,
    point: Point,
    model: &'a Model,
}

/// Adds what the other ways leave when they take as much of each weight away.
fn curves_of(
    model: &Model,
    layers: &[Layer<'_>],
    mass: f64,
    seed: u64,
    add: &mut impl FnMut(&'static str, Model) -> Result<()>,
) -> Result<()> {
    add(
        "truncated SVD",
        with(model, layers, |layer| layer.truncated(mass))?,
    )?;
    let mut random = generator(seed ^ 0x7a9d);
    let scattered = with(model, layers, |layer| layer.scattered(mass, &mut random))?;
    add("random directions", scattered)?;
    let rectangle = with(model, layers, |layer| layer.curved(mass, Keep::Rectangle))?;
    add("both sides alone", rectangle)
}

/// What stays and what goes are orthogonal, whatever the mass.
fn projection(layers: &[Layer<'_>]) -> Result<Claim> {
    let energy = |tensor: &Tensor| -> Result<f64> {
        Ok(frobenius_norm(matrix_from_tensor("weight", tensor)?.as_ref()).powi(2))
    };
    let mut largest: f64 = 0.0;
    for layer in layers {
        let whole = energy(&layer.weight)?;
        for mass in MASSES {
            let edited = layer.curved(mass, Keep::Staircase)?;
            let sum = energy(&edited)? + energy(&engine(&layer.weight - &edited)?)?;
            largest = largest.max((sum - whole).abs() / whole.max(f64::MIN_POSITIVE));
        }
    }
    Ok(Claim::new(
        "The edit is a projection: ‖W‖² = ‖W'‖² + ‖W − W'‖²",
        "exact",
        format!("largest relative error {largest:.1e}"),
        Verdict::of(largest < 1e-10),
    ))
}

fn halved(scale: Scale, before: Point, chosen: Option<&Chosen<'_>>) -> Claim {
    let holds = chosen.is_some_and(|chosen| chosen.point.recited <= 0.5 * before.recited);
    let measured = match chosen {
        None => "no edit costs so little".to_owned(),
        Some(Chosen { mass, point, .. }) => format!(
            "{:.0} % -> {:.0} % recited (words in place {:.0} % -> {:.0} %), perplexity {:.2} -> {:.2} at mass {mass}",
            100.0 * before.recited,
            100.0 * point.recited,
            100.0 * before.words,
            100.0 * point.words,
            before.perplexity,
            point.perplexity,
        ),
    };
    let claim = Claim::new(
        "At most a tenth more perplexity takes away half of what is recited",
        "strict match about 100 % -> 3.4 %",
        measured,
        match before.recited > 0.0 {
            true => after_training(scale, holds),
            false => Verdict::NotMeasured,
        },
    );
    match before.recited > 0.0 {
        true => claim,
        false => claim.noted("the model recites nothing"),
    }
}

/// At equal perplexity fewer canaries are left than by the baselines, at most points.
fn below(scale: Scale, own: &[Point], curves: &BTreeMap<&str, Vec<Point>>) -> Claim {
    let mut measured = Vec::new();
    let (mut holds, mut comparable) = (true, true);
    for name in ["truncated SVD", "random directions"] {
        let curve = curves.get(name).map_or(&[][..], Vec::as_slice);
        let compared: Vec<bool> = own
            .iter()
            .filter_map(|point| Some(point.words <= words_at(curve, point.perplexity)?))
            .collect();
        let fewer = compared.iter().filter(|fewer| **fewer).count();
        holds &= 2 * fewer > compared.len();
        comparable &= !compared.is_empty();
        measured.push(format!(
            "{fewer} of {} points against {name}",
            compared.len()
        ));
    }
    Claim::new(
        "At equal perplexity fewer of the canaries' words are left than by SVD or random directions",
        "16.1 % of quotes recited after the edit, 60 % by a learned mask",
        measured.join(", "),
        after_learning(scale, comparable, holds),
    )
}

/// The words that a curve leaves at a perplexity, between its points; nothing outside of them.
fn words_at(curve: &[Point], perplexity: f64) -> Option<f64> {
    let mut sorted: Vec<Point> = curve.to_vec();
    sorted.sort_by(|a, b| a.perplexity.total_cmp(&b.perplexity));
    sorted.windows(2).find_map(|pair| {
        let [a, b] = *pair else { return None };
        let inside = (a.perplexity..=b.perplexity).contains(&perplexity);
        let span = b.perplexity.ln() - a.perplexity.ln();
        let share = match span > 0.0 {
            true => (perplexity.ln() - a.perplexity.ln()) / span,
            false => 0.0,
        };
        inside.then_some(a.words + share * (b.words - a.words))
    })
}

/// Facts that are nowhere in the text fall more than what the sentence itself decides.
fn sensitive(
    setting: &Setting,
    size: &Size,
    held_out: &Corpus,
    model: &Model,
    edited: Option<&Model>,
) -> Result<Claim> {
    let accuracy = |model: &Model, kind: Kind| -> Result<f64> {
        let mut random = generator(setting.seed ^ 0xacc);
        let language = held_out.language();
        let mut right = Vec::new();
        for _ in 0..size.sentences {
            let sentence = language.sentence(kind, Split::HeldOut, &mut random);
            let mut ids = sentence.tokens(language.vocabulary())?;
            ids.truncate(sentence.target + 1);
            let target = language.vocabulary().identifier(sentence.target_word())? as usize;
            let foil = language.vocabulary().identifier(sentence.foil)? as usize;
            let scores = last_scores(model, &ids)?;
            right.push(f64::from(u8::from(scores.get(target) > scores.get(foil))));
        }
        Ok(mean(right))
    };
    let statement = "Facts from memory fall more than agreement, which the sentence decides";
    let published = "open-book tasks keep 95-106 %, arithmetic 66-86 %";
    let Some(edited) = edited else {
        let measured = "no edit costs so little";
        return Ok(Claim::new(
            statement,
            published,
            measured,
            Verdict::NotMeasured,
        ));
    };
    let mut measured = Vec::new();
    let mut falls = BTreeMap::new();
    for kind in Kind::ALL {
        let before = accuracy(model, kind)?;
        let after = accuracy(edited, kind)?;
        falls.insert(kind.name(), before - after);
        measured.push(format!(
            "{} {:.0} -> {:.0} %",
            kind.name(),
            100.0 * before,
            100.0 * after
        ));
    }
    let of = |kind: Kind| falls.get(kind.name()).copied().unwrap_or(f64::NAN);
    let holds = of(Kind::LearnedFact) > of(Kind::NumberAgreement);
    Ok(Claim::new(
        statement,
        published,
        measured.join(", "),
        after_training(setting.scale, holds),
    ))
}

fn last_scores(model: &Model, ids: &[u32]) -> Result<Vec<f64>> {
    let input = engine(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu))?;
    let pass = Pass {
        only_last: true,
        ..Pass::default()
    };
    let logits = model.forward(&Input::tokens(input), pass)?.into_logits()?;
    super::numbers(logits.value())
}

fn plot(before: Point, own: &[Point], curves: &BTreeMap<&str, Vec<Point>>) -> Plot {
    let line = |name: &str, points: &[Point]| Series {
        name: name.to_owned(),
        points: std::iter::once(&before)
            .chain(points)
            .map(|point| (point.perplexity.ln(), point.words))
            .collect(),
    };
    let mut series = vec![line("least curvature", own)];
    series.extend(curves.iter().map(|(name, points)| line(name, points)));
    Plot {
        title: "What is left of the canaries".to_owned(),
        x: "nats per held-out word".to_owned(),
        y: "canaries' words in place".to_owned(),
        series,
    }
}

struct Measure<'a> {
    canaries: &'a [Vec<u32>],
    windows: Vec<Window>,
}

impl Measure<'_> {
    fn of(&self, model: &Model) -> Result<Point> {
        let prompts: Vec<Vec<u32>> = self
            .canaries
            .iter()
            .map(|canary| canary.iter().take(SHOWN).copied().collect())
            .collect();
        let options = GenerationOptions {
            new_tokens: CANARY - SHOWN,
            ..GenerationOptions::default()
        };
        let said = generate(model, &prompts, &options, |_, _| ControlFlow::Continue(()))?;
        let right: Vec<f64> = said
            .iter()
            .zip(self.canaries)
            .map(|(said, canary)| {
                let rest = canary.iter().skip(SHOWN);
                mean(rest.zip(said).map(|(a, b)| f64::from(u8::from(a == b))))
            })
            .collect();
        Ok(Point {
            perplexity: perplexity(model, &self.windows, 16)?.value,
            recited: mean(right.iter().map(|share| f64::from(u8::from(*share == 1.0)))),
            words: mean(right),
        })
    }
}

/// The language, with canaries in some sequences, each in its turn.
struct Recurring {
    corpus: Corpus,
    canaries: Vec<Vec<u32>>,
    next: usize,
}

impl Task for Recurring {
    fn vocabulary(&self) -> usize {
        self.corpus.language().vocabulary().size()
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let mut window = self.corpus.window(generator.random(), length + 1)?;
            if generator.random_bool(SHARE)
                && let Some(canary) = self.canaries.get(self.next % self.canaries.len().max(1))
            {
                self.next += 1;
                for (token, word) in window.iter_mut().zip(canary) {
                    *token = *word;
                }
            }
            batch.inputs.extend(window.iter().take(length));
            batch.targets.extend(window.iter().skip(1));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_between_the_points_of_a_curve() {
        let point = |perplexity: f64, words: f64| Point {
            perplexity,
            recited: 0.0,
            words,
        };
        let curve = [point(4.0, 0.2), point(1.0, 0.8)];
        assert!((words_at(&curve, 2.0).unwrap() - 0.5).abs() < 1e-12);
        assert_eq!(words_at(&curve, 5.0), None);
        assert_eq!(words_at(&[], 2.0), None);
    }

    /// A curve whose perplexities none of the edit's points share is nothing to compare with.
    #[test]
    fn curves_that_do_not_meet_are_not_compared() {
        let point = |perplexity: f64, words: f64| Point {
            perplexity,
            recited: 0.0,
            words,
        };
        let baseline = vec![point(1.0, 0.8), point(4.0, 0.2)];
        let curves = BTreeMap::from([
            ("truncated SVD", baseline.clone()),
            ("random directions", baseline),
        ]);
        let verdict = |own: &[Point]| below(Scale::Small, own, &curves).verdict;
        assert_eq!(verdict(&[point(9.0, 0.1)]), Verdict::NotMeasured);
        assert_eq!(verdict(&[point(2.0, 0.1)]), Verdict::Holds);
        assert_eq!(verdict(&[point(2.0, 0.9)]), Verdict::DoesNotHold);
    }
}
