//! Attention and blocks left out by entropy, beside angles, chance and a greedy search.
//!
//! The paper prunes Llama-3.1-8B. Here a small decoder of the generated language loses attention,
//! or whole blocks, by two estimators of entropy, by the angle, by chance, and by the search that
//! measures perplexity again after each removal.

use super::depth::{BATCH, Size, Subject, draws};
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::entropy::{EntropyChoice, EntropyProfile, Estimator};
use lapidary_compress::{Change, Compressed, Search, Settings, Shed};

/// Blocks that never go, as in the published code.
const FIRST: usize = 2;
const LAST: usize = 1;

const ESTIMATORS: [(&str, Estimator); 3] = [
    ("neighbours", Estimator::Neighbours { count: 25 }),
    ("buckets", Estimator::Buckets { bins: 20 }),
    ("Rényi", Estimator::Renyi { order: 4.0 }),
];

/// How much was removed, and what is left.
#[derive(Clone, Copy)]
struct Point {
    removed: usize,
    loss: f64,
    same: f64,
}

/// The points of each way, by name.
type Ways = Vec<(&'static str, Vec<Point>)>;

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    setting.tell(|| "a decoder to be cut".to_owned());
    let subject = Subject::trained(size, setting.seed)?;
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
    setting.tell(|| "without attention".to_owned());
    let attention = attention(&subject, size, setting.seed)?;
    setting.tell(|| "without blocks".to_owned());
    let blocks = blocks(&subject, size, setting.seed)?;
    let zeroed = zeroed(&subject, size)?;
    Ok(Reproduction {
        setting: format!(
            "{}; whole model at {whole:.4} nats; the first {FIRST} blocks and the last never go; \
             {} random choices among the others",
            size.describe(),
            size.draws
        ),
        claims: claims(setting.scale, whole, &profiles, &attention, &blocks, zeroed),
        plots: vec![
            Plot {
                title: "Entropy of the stream above its least".to_owned(),
                x: "blocks behind".to_owned(),
                y: "share of the estimator's range".to_owned(),
                series: profiles
                    .iter()
                    .map(|(name, found)| ranged(name, &found.stream))
                    .collect(),
            },
            plot("Attention left out", whole, &attention),
            plot("Blocks left out", whole, &blocks),
        ],
        ..Reproduction::default()
    })
}

fn settings(estimator: Estimator) -> Settings {
    Settings {
        batch: BATCH / 4,
        entropy: EntropyChoice {
            estimator,
            first: FIRST,
            last: LAST,
            stages: false,
            ..EntropyChoice::default()
        },
        ..Settings::default()
    }
}

fn candidates(size: Size) -> Vec<usize> {
    (FIRST..size.blocks.saturating_sub(LAST)).collect()
}

fn point(subject: &Subject, removed: usize, cut: &Compressed) -> Result<Point> {
    Ok(Point {
        removed,
        loss: subject.loss(&cut.model)?,
        same: subject.same(&cut.model)?,
    })
}

/// The mean over random choices.
fn random(
    subject: &Subject,
    size: Size,
    removed: usize,
    seed: u64,
    method: &str,
    path: impl Fn(usize) -> String,
) -> Result<Point> {
    let mut points = Vec::new();
    for chosen in draws(&candidates(size), removed, size.draws, seed) {
        points.push(point(
            subject,
            removed,
            &removing(subject, method, &chosen, &path)?,
        )?);
    }
    Ok(Point {
        removed,
        loss: mean(points.iter().map(|point| point.loss)),
        same: mean(points.iter().map(|point| point.same)),
    })
}

/// What is left without these.
fn removing(
    subject: &Subject,
    method: &str,
    chosen: &[usize],
    path: impl Fn(usize) -> String,
) -> Result<Compressed> {
    let mut plan = subject.empty_plan(method)?;
    let paths: Vec<String> = chosen.iter().map(|block| path(*block)).collect();
    for module in plan
        .modules
        .iter_mut()
        .filter(|module| paths.contains(&module.path))
    {
        module.change = Change::Remove;
    }
    subject.apply(&plan)
}

fn attention(subject: &Subject, size: Size, seed: u64) -> Result<Ways> {
    let most = candidates(size).len().min(4);
    let path = |block| format!("blocks.{block}.attention");
    let method = "entropy-attention";
    let by = |method: &str, settings: Settings| -> Result<Vec<Point>> {
        let each = (1..=most).map(|removed| {
            let cut = subject.without(method, removed, size.blocks, &settings)?;
            point(subject, removed, &cut)
        });
        each.collect()
    };
    let mixers: Vec<Shed> = (0..size.blocks).map(Shed::Mixer).collect();
    let search = Search::run(&subject.model, &subject.data, BATCH, &mixers, most)?;
    let greedy = (1..=most).map(|removed| {
        let steps = search.steps.iter().take(removed);
        let chosen: Vec<usize> = steps
            .filter_map(|step| match step.shed {
                Shed::Mixer(block) => Some(block),
                Shed::Feedforward(_) | Shed::Scan(_) => None,
            })
            .collect();
        point(subject, removed, &removing(subject, method, &chosen, path)?)
    });
    let random = (1..=most).map(|removed| random(subject, size, removed, seed, method, path));
    let [(_, neighbours), (_, buckets), _] = ESTIMATORS;
    Ok(vec![
        ("neighbours", by(method, settings(neighbours))?),
        ("buckets", by(method, settings(buckets))?),
        ("angle", by("attention-cosine", settings(neighbours))?),
        ("greedy", greedy.collect::<Result<_>>()?),
        ("random", random.collect::<Result<_>>()?),
    ])
}

fn blocks(subject: &Subject, size: Size, seed: u64) -> Result<Ways> {
    let most = candidates(size).len().min(4);
    let by = |method: &str, settings: Settings| -> Result<Vec<Point>> {
        let each = (1..=most).map(|removed| {
            let cut = subject.without(method, removed, size.blocks, &settings)?;
            point(subject, removed, &cut)
        });
        each.collect()
    };
    let path = |block| format!("blocks.{block}");
    let random =
        (1..=most).map(|removed| random(subject, size, removed, seed, "entropy-blocks", path));
    let [(_, neighbours), (_, buckets), _] = ESTIMATORS;
    Ok(vec![
        ("neighbours", by("entropy-blocks", settings(neighbours))?),
        ("buckets", by("entropy-blocks", settings(buckets))?),
        ("angle", by("block-influence", settings(neighbours))?),
        ("random", random.collect::<Result<_>>()?),
    ])
}

/// Largest difference of loss between attention left out and its output set to zero.
fn zeroed(subject: &Subject, size: Size) -> Result<f64> {
    let mut largest: f64 = 0.0;
    for block in candidates(size) {
        let path = |block| format!("blocks.{block}.attention");
        let cut = removing(subject, "entropy-attention", &[block], path)?;
        let dense = lapidary_compress::export_dense(&cut.model)?;
        let apart = subject.loss(&cut.model)? - subject.loss(&dense)?;
        largest = largest.max(apart.abs());
    }
    Ok(largest)
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

fn claims(
    scale: Scale,
    whole: f64,
    profiles: &[(&str, EntropyProfile)],
    attention: &Ways,
    blocks: &Ways,
    zeroed: f64,
) -> Vec<Claim> {
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
    let margin = |ways| rise(ways, "neighbours", whole) <= 0.8 * rise(ways, "random", whole);
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
            after_training(scale, margin(attention)),
        ),
        Claim::new(
            "blocks chosen by entropy cost at most 0.8 of what chance does",
            "estimate; no random baseline is given",
            format!("mean rise in nats: {}", listed(blocks)),
            after_training(scale, margin(blocks)),
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
        ),
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
    ]
}
