//! Attention and blocks left out by entropy, beside angles, chance and a greedy search.
//!
//! The paper prunes Llama-3.1-8B. Here a small decoder of a text loses attention,
//! or whole blocks, by three estimators of entropy, by the angle, from the end, by chance, and by the
//! search that measures perplexity again after each removal. What is left also writes, and entropy is
//! also measured on other text.

mod domains;
mod ways;

use super::depth::{Size, Subject};
use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use domains::Domain;
use lapidary_compress::entropy::{EntropyProfile, Estimator};
use ways::{Ways, Writer, settings};

/// Blocks that never go, as in the published code.
const FIRST: usize = 2;
const LAST: usize = 1;

const ESTIMATORS: [(&str, Estimator); 3] = [
    ("neighbours", Estimator::Neighbours { count: 25 }),
    ("buckets", Estimator::Buckets { bins: 20 }),
    ("Rényi", Estimator::Renyi { order: 4.0 }),
];

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    setting.tell(|| "a decoder to be cut".to_owned());
    let subject = Subject::trained(Sides::of(setting)?, size, setting.seed)?;
    let whole = subject.loss(&subject.model)?;
    let profiles = ESTIMATORS
        .iter()
        .map(|(name, estimator)| {
            let choice = settings(*estimator).entropy;
            // Four windows are the 256 tokens of the published samples.
            let profile = EntropyProfile::measure(&subject.model, &subject.data, 4, &choice)?;
            Ok((*name, profile))
        })
        .collect::<Result<Vec<_>>>()?;
    let writer = Writer::new(&subject)?;
    setting.tell(|| "without attention".to_owned());
    let attention = ways::attention(&subject, &writer, size, setting.seed)?;
    setting.tell(|| "without blocks".to_owned());
    let blocks = ways::blocks(&subject, &writer, size, setting.seed)?;
    setting.tell(|| "by entropy on other text".to_owned());
    let measured = Measured {
        whole,
        repeats: writer.repeats(&subject.model)?,
        zeroed: ways::zeroed(&subject, size)?,
        domains: domains::run(&subject, size, setting.seed)?,
        profiles,
        attention,
        blocks,
    };
    Ok(Reproduction {
        setting: format!(
            "{}; whole model at {whole:.4} nats; the first {FIRST} blocks and the last never go, but by \
             \"{}\"; {} random choices among the others",
            size.describe_on(&subject.text.what),
            ways::ANY_ANGLE,
            size.draws
        ),
        claims: claims(setting.scale, &measured),
        plots: vec![
            Plot {
                title: "Entropy of the stream above its least".to_owned(),
                x: "blocks behind".to_owned(),
                y: "share of the estimator's range".to_owned(),
                series: measured
                    .profiles
                    .iter()
                    .map(|(name, found)| ranged(name, &found.stream))
                    .collect(),
            },
            plot("Attention left out", whole, &measured.attention),
            plot("Blocks left out", whole, &measured.blocks),
        ],
        ..Reproduction::default()
    })
}

fn ranged(name: &str, stream: &[f64]) -> Series {
    let least = stream.iter().copied().fold(f64::INFINITY, f64::min);
    let most = stream.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let range = (most - least).max(f64::MIN_POSITIVE);
    let points = stream.iter().enumerate();
    Series {
        name: name.to_owned(),
        points: points
            .map(|(at, value)| (at as f64, (value - least) / range))
            .collect(),
    }
}

fn plot(title: &str, whole: f64, ways: &Ways) -> Plot {
    let series = ways.iter().map(|(name, points)| Series {
        name: (*name).to_owned(),
        points: std::iter::once((0.0, whole))
            .chain(
                points
                    .iter()
                    .map(|point| (point.removed as f64, point.loss)),
            )
            .collect(),
    });
    Plot {
        title: title.to_owned(),
        x: "removed".to_owned(),
        y: "held-out loss in nats".to_owned(),
        series: series.collect(),
    }
}

/// Everything that claims are made of.
struct Measured {
    /// Loss of the whole model.
    whole: f64,
    /// How much of what it writes it has written before.
    repeats: f64,
    /// Largest difference of loss between attention left out and its output set to zero.
    zeroed: f64,
    profiles: Vec<(&'static str, EntropyProfile)>,
    attention: Ways,
    blocks: Ways,
    domains: Vec<Domain>,
}

/// The mean rise of the loss of a way over all numbers of removals.
fn rise(ways: &Ways, name: &str, whole: f64) -> f64 {
    let points = ways.iter().find(|(way, _)| *way == name);
    mean(
        points
            .iter()
            .flat_map(|(_, points)| points)
            .map(|point| point.loss - whole),
    )
}

fn last(ways: &Ways, name: &str) -> f64 {
    let points = ways.iter().find(|(way, _)| *way == name);
    points
        .and_then(|(_, points)| points.last())
        .map_or(f64::NAN, |point| point.same)
}

/// The mean share of repetitions of a way over all numbers of removals.
fn repeats(ways: &Ways, name: &str) -> f64 {
    let points = ways.iter().find(|(way, _)| *way == name);
    mean(
        points
            .iter()
            .flat_map(|(_, points)| points)
            .map(|point| point.repeats),
    )
}

/// Whether values fall to an inner least and rise from there.
fn falls_then_rises(stream: &[f64]) -> bool {
    let least = stream.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
    let Some((at, _)) = least.filter(|(at, _)| (1..stream.len().saturating_sub(1)).contains(at))
    else {
        return false;
    };
    let falls = stream
        .windows(2)
        .take(at)
        .all(|pair| matches!(pair, [a, b] if b < a));
    let rises = stream
        .windows(2)
        .skip(at)
        .all(|pair| matches!(pair, [a, b] if b > a));
    falls && rises
}

fn claims(scale: Scale, measured: &Measured) -> Vec<Claim> {
    let Measured {
        whole,
        zeroed,
        profiles,
        attention,
        blocks,
        ..
    } = measured;
    let (whole, zeroed) = (*whole, *zeroed);
    let patterns = profiles.iter().map(|(name, found)| {
        let pattern = match falls_then_rises(&found.stream) {
            true => "falls, then rises".to_owned(),
            false => format!("least behind {} blocks", found.stage()),
        };
        format!("{name}: {pattern}")
    });
    let patterns: Vec<String> = patterns.collect();
    let two_stages = profiles
        .iter()
        .any(|(_, found)| falls_then_rises(&found.stream));
    let listed = |ways: &Ways| {
        let each = ways
            .iter()
            .map(|(name, _)| format!("{name} {:+.3}", rise(ways, name, whole)));
        each.collect::<Vec<_>>().join(", ")
    };
    vec![
        Claim::new(
            "attention left out is attention with an output of zero",
            "exact",
            format!("losses differ by at most {zeroed:.1e}"),
            Verdict::of(zeroed < 1e-6),
        ),
        Claim::new(
            "entropy first falls and then rises over the blocks",
            "two stages in Llama-3.1-8B and Mistral-7B",
            patterns.join("; "),
            after_training(scale, two_stages),
        )
        .noted(
            "holds when it does by at least one estimator; reviewers doubt that it is universal",
        ),
        Claim::new(
            "attention chosen by entropy costs at most 0.8 of what chance does",
            "estimate; no random baseline is given",
            format!("mean rise in nats: {}", listed(attention)),
            beside_chance(scale, attention, whole),
        ),
        Claim::new(
            "blocks chosen by entropy cost at most 0.8 of what chance does",
            "estimate; no random baseline is given",
            format!("mean rise in nats: {}", listed(blocks)),
            beside_chance(scale, blocks, whole),
        ),
        Claim::new(
            "blocks chosen by entropy cost less than those chosen by the angle",
            "accuracy 0.517 against 0.505 at 4 blocks of 32, 0.458 against 0.302 at 8",
            format!(
                "mean rise in nats: {:+.3} against {:+.3}",
                rise(blocks, "neighbours", whole),
                rise(blocks, "angle", whole)
            ),
            after_training(
                scale,
                rise(blocks, "neighbours", whole) < rise(blocks, "angle", whole),
            ),
        )
        .noted(format!(
            "the angle of the blocks that may go; of any, as published, {:+.3}",
            rise(blocks, ways::ANY_ANGLE, whole)
        )),
        Claim::new(
            "attention chosen by entropy keeps as many answers as that by the angle where most is gone",
            "accuracy 0.460 against 0.421 at 16 of 32, 0.591 against 0.593 at 8",
            format!(
                "most likely next tokens that stay, held out: {:.3} against {:.3}; greedy {:.3}",
                last(attention, "neighbours"),
                last(attention, "angle"),
                last(attention, "greedy")
            ),
            after_training(
                scale,
                last(attention, "neighbours") >= last(attention, "angle"),
            ),
        ),
        writing(scale, measured),
        domains::claim(scale, &measured.domains),
    ]
}

/// Whether what entropy chose costs at most 0.8 of what chance did; where chance costs nothing, there is no
/// share of it.
fn beside_chance(scale: Scale, ways: &Ways, whole: f64) -> Verdict {
    let [entropy, chance] = ["neighbours", "random"].map(|name| rise(ways, name, whole));
    match chance > 0.0 {
        true => after_training(scale, entropy <= 0.8 * chance),
        false => Verdict::NotMeasured,
    }
}

fn writing(scale: Scale, measured: &Measured) -> Claim {
    let listed = |ways: &Ways| {
        let each = ways
            .iter()
            .map(|(name, _)| format!("{name} {:.3}", repeats(ways, name)));
        each.collect::<Vec<_>>().join(", ")
    };
    let (attention, blocks) = (&measured.attention, &measured.blocks);
    let no_more = |ways| repeats(ways, "neighbours") <= repeats(ways, "random");
    Claim::new(
        "what is left repeats itself no more in writing where entropy chose than where chance did",
        "not tested, as reviewers say",
        format!(
            "runs of {} words that were written before, greedy: whole model {:.3}; attention gone: {}; \
             blocks gone: {}",
            ways::RUN,
            measured.repeats,
            listed(attention),
            listed(blocks)
        ),
        after_training(scale, no_more(attention) && no_more(blocks)),
    )
    .noted("means over the numbers of removals")
}
