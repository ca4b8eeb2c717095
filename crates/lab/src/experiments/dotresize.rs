//! DOTResize: features of the residual stream merged by optimal transport, beside leaving them
//! out and beside principal directions.
//!
//! The paper narrows published models. Here a decoder of a few blocks is cut to 90, 80 and 70 % of
//! its width in each way, with the same texts and the same plumbing.

use super::jobs::over_seeds;
use super::narrow::{Setup, Size, left};
use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Series, Setting, Verdict};
use lapidary_compress::Settings;
use lapidary_compress::slicing::{Coordinates, Directions, Principal, Selector, Transport};

/// Shares of the width that are cut.
const CUTS: [f64; 3] = [0.1, 0.2, 0.3];
/// The cut at which claims are read.
const MIDDLE: f64 = 0.2;

const PRUNED: &str = "pruned";
const MERGED: &str = "merged";
const MERGED_PER_SITE: &str = "merged per site";
const RANDOM_PRUNED: &str = "random subset pruned";
const RANDOM_MERGED: &str = "random subset merged";
const ROTATED: &str = "principal";
const ROTATED_PER_SITE: &str = "principal per site";
const WAYS: [&str; 7] = [
    PRUNED,
    MERGED,
    MERGED_PER_SITE,
    RANDOM_PRUNED,
    RANDOM_MERGED,
    ROTATED,
    ROTATED_PER_SITE,
];

/// One way at one cut.
struct Point {
    way: &'static str,
    cut: f64,
    perplexity: f64,
    /// Share of the stream's squared length that is lost, the mean over sites.
    lost: f64,
}

struct Run {
    whole: f64,
    points: Vec<Point>,
    /// Perplexity by method when [`MIDDLE`] of the hidden features of feed-forward parts goes.
    hidden: Vec<f64>,
}

/// Methods that narrow feed-forward parts: merged by transport, chosen by size, chosen by leverage with what
/// reads them fitted again.
const HIDDEN: [&str; 3] = ["dotresize-hidden", "channel-magnitude", "modegpt"];

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let text = Sides::of(setting)?;
    let runs = over_seeds(setting, size.seeds, |seed| {
        one_seed(&text.for_seed(seed)?, &size, seed)
    })?;
    Ok(Reproduction {
        setting: format!(
            "{}; RMS norm decoder of {} blocks, width {}, rotary positions, {} \
             steps of 16; {} calibration texts, {} held-out texts of 64 tokens, seeds: {}; \
             distances Σ|x − y| with median 1, temperature 0.1",
            text.what,
            size.blocks,
            size.width,
            size.steps,
            size.calibration,
            size.tests,
            size.seeds,
        ),
        claims: claims(setting, &runs),
        plots: vec![plot(&runs)],
        ..Reproduction::default()
    })
}

fn one_seed(text: &Sides, size: &Size, seed: u64) -> Result<Run> {
    let setup = Setup::new(text, size, seed)?;
    let magnitude = Selector::Magnitude;
    let random = Selector::Random(seed);
    let pruned = |selector| Coordinates { selector };
    let merged = |selector| Transport {
        selector,
        ..Transport::default()
    };
    let ways: [(&'static str, bool, &dyn Directions); 7] = [
        (PRUNED, true, &pruned(magnitude)),
        (MERGED, true, &merged(magnitude)),
        (MERGED_PER_SITE, false, &merged(magnitude)),
        (RANDOM_PRUNED, true, &pruned(random)),
        (RANDOM_MERGED, true, &merged(random)),
        (ROTATED, true, &Principal),
        (ROTATED_PER_SITE, false, &Principal),
    ];
    let mut points = Vec::new();
    for cut in CUTS {
        for (way, shared, by) in ways {
            let sliced = setup.cut(left(size.width, cut), shared, by)?;
            points.push(Point {
                way,
                cut,
                perplexity: setup.perplexity(&sliced.model)?,
                lost: 1.0 - mean(sliced.kept.iter().copied()),
            });
        }
    }
    let mut settings = Settings::default();
    settings.modegpt.smoothing = f64::INFINITY;
    settings.modegpt.heads = false;
    let hidden = HIDDEN.map(|method| {
        let narrowed = setup.compress(method, MIDDLE, &settings)?;
        setup.perplexity(&narrowed)
    });
    Ok(Run {
        hidden: hidden.into_iter().collect::<Result<Vec<_>>>()?,
        whole: setup.perplexity(&setup.model)?,
        points,
    })
}

/// The mean over runs of one way at one cut.
fn at(runs: &[Run], way: &str, cut: f64, of: impl Fn(&Point) -> f64) -> f64 {
    let points = runs.iter().flat_map(|run| &run.points);
    mean(
        points
            .filter(|point| point.way == way && point.cut == cut)
            .map(of),
    )
}

fn claims(setting: &Setting, runs: &[Run]) -> Vec<Claim> {
    let scale = setting.scale;
    let whole = mean(runs.iter().map(|run| run.whole));
    let perplexity = |way: &str| at(runs, way, MIDDLE, |point| point.perplexity);
    let all: Vec<String> = WAYS
        .iter()
        .map(|way| format!("{way} {:.2}", perplexity(way)))
        .collect();
    let saved = |pruned: &str, merged: &str| {
        1.0 - (perplexity(merged) - whole) / (perplexity(pruned) - whole)
    };
    let (by_size, by_chance) = (saved(PRUNED, MERGED), saved(RANDOM_PRUNED, RANDOM_MERGED));
    let lost = |way: &str| at(runs, way, MIDDLE, |point| point.lost);
    let least = CUTS.iter().all(|cut| {
        let of = |way: &str| at(runs, way, *cut, |point| point.lost);
        WAYS.iter()
            .all(|way| of(ROTATED) <= of(way) + 1e-9 || way.ends_with("per site"))
    });
    let hidden = |method: usize| {
        mean(
            runs.iter()
                .filter_map(|run| run.hidden.get(method).copied()),
        )
    };
    let narrowed: Vec<String> = HIDDEN
        .iter()
        .enumerate()
        .map(|(method, name)| format!("{name} {:.2}", hidden(method)))
        .collect();
    vec![
        Claim::new(
            "in feed-forward parts, 20 % fewer hidden features by merging leave a lower perplexity than the \
             largest ones alone",
            "the residual stream alone is published",
            format!("whole {whole:.2}, {}", narrowed.join(", ")),
            after_training(scale, hidden(0) < hidden(1)),
        )
        .noted("modegpt chooses features by leverage and fits what reads them again"),
        Claim::new(
            "at 20 %, merging into the largest features raises perplexity at least 30 % less than \
             keeping them and leaving out the others",
            "a useful add-on to pruning",
            format!(
                "{:.0} % less: whole {whole:.2}, {}",
                100.0 * by_size,
                all.join(", ")
            ),
            after_training(scale, by_size >= 0.3),
        ),
        Claim::new(
            "so it does into features drawn at random",
            "not given",
            format!("{:.0} % less", 100.0 * by_chance),
            after_training(scale, by_chance >= 0.3),
        ),
        Claim::new(
            "no directions shared by all sites lose less of the stream than its principal ones",
            "exact",
            format!(
                "at 20 %: principal {:.2} %, merged {:.2} %, pruned {:.2} % of the squared length",
                100.0 * lost(ROTATED),
                100.0 * lost(MERGED),
                100.0 * lost(PRUNED)
            ),
            Verdict::of(least),
        ),
        Claim::new(
            "merging leaves a perplexity below that of principal directions, each site its own",
            "outperforms simple and recent pruning; not compared with SliceGPT in the abstract",
            format!(
                "merged {:.2}, principal {:.2}",
                perplexity(MERGED_PER_SITE),
                perplexity(ROTATED_PER_SITE)
            ),
            after_training(
                scale,
                perplexity(MERGED_PER_SITE) < perplexity(ROTATED_PER_SITE),
            ),
        ),
    ]
}

fn plot(runs: &[Run]) -> Plot {
    let line = |way: &&str| Series {
        name: (*way).to_owned(),
        points: CUTS
            .iter()
            .map(|cut| (*cut, at(runs, way, *cut, |point| point.perplexity).ln()))
            .collect(),
    };
    Plot {
        title: "Perplexity over the share of the width that is cut".to_owned(),
        x: "share cut".to_owned(),
        y: "ln perplexity".to_owned(),
        series: WAYS.iter().map(line).collect(),
    }
}
