//! SliceGPT, and whether the width of what it leaves says what the model is worth.
//!
//! The paper has one law for Llama-3-8B and Phi-3-mini: `ln PPL₀ / ln PPL = 1 − s`. Here a decoder
//! of a few blocks is cut by 5 to 40 % in its principal directions, in random ones and in its
//! worst ones, and the law is laid beside each.

use super::jobs::over_seeds;
use super::narrow::{BATCH, Setup, Size, left};
use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::dimension::{AccuracyLaw, Law, MapChange, Scores, map_changes, scores};
use lapidary_compress::slicing::{Directions, Principal, Random, Trailing, slice};
use lapidary_compress::{AdapterSettings, CalibrationData};
use lapidary_train::generator;
use rand::RngExt;

/// Shares of the width that are cut.
const CUTS: [f64; 8] = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4];
/// The cut at which directions are compared.
const MIDDLE: f64 = 0.2;
/// Where the law is read, and how far off in `ln PPL` it may be.
const RANGE: (f64, f64) = (0.1, 0.3);
const TOLERANCE: f64 = 0.1;

/// One way to choose directions: perplexity at each cut, by actual sparsity.
struct Way {
    name: &'static str,
    points: Vec<(f64, f64)>,
}

struct Run {
    whole: f64,
    /// Largest relative change of perplexity by a change of basis alone.
    rotated: f64,
    ways: Vec<Way>,
    accuracy: AccuracyLaw,
    /// At the middle cut: the mean change of linear maps, and scores before and after.
    maps: MapChange,
    before: Scores,
    after: Scores,
    /// Length and cosine of the last site's stream, of the whole model's.
    drift: (f64, f64),
    /// Share of the stream's squared length that the middle cut keeps, the mean over sites.
    kept: f64,
    /// Perplexity at the middle cut once adapters were trained and taken in.
    recovered: f64,
    /// Parameters whole, with shortcuts and with shared directions, at the middle cut.
    parameters: [usize; 3],
}

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
             perplexity of the whole model {:.2}",
            text.what,
            size.blocks,
            size.width,
            size.steps,
            size.calibration,
            size.tests,
            size.seeds,
            mean(runs.iter().map(|run| run.whole)),
        ),
        claims: claims(setting, &runs)?,
        plots: runs.first().map(plot).into_iter().collect(),
        ..Reproduction::default()
    })
}

fn one_seed(text: &Sides, size: &Size, seed: u64) -> Result<Run> {
    let setup = Setup::new(text, size, seed)?;
    let whole = setup.perplexity(&setup.model)?;
    let same = setup.cut(size.width, false, &Principal)?.model;
    let random = Random::new(seed);
    let principal: (&'static str, bool, &dyn Directions) = ("principal", false, &Principal);
    let ways = [
        principal,
        ("principal, shared", true, &Principal),
        ("random", false, &random),
        ("worst", false, &Trailing),
    ];
    let mut found = Vec::new();
    for (name, shared, by) in ways {
        let mut points = Vec::new();
        for cut in CUTS {
            let width = left(size.width, cut);
            let model = setup.cut(width, shared, by)?.model;
            points.push((sparsity(size, width), setup.perplexity(&model)?));
        }
        found.push(Way { name, points });
    }
    found.push(Way {
        name: "principal of noise",
        points: by_noise(size, &setup, seed)?,
    });
    let mut accuracies = Vec::new();
    for cut in CUTS {
        let width = left(size.width, cut);
        let model = setup.cut(width, false, &Principal)?.model;
        accuracies.push((sparsity(size, width), setup.accuracy(&model)?));
    }
    let width = left(size.width, MIDDLE);
    let sliced = setup.cut(width, false, &Principal)?;
    let drifts = sliced.drift(&setup.model, &setup.tests, BATCH)?;
    let drift = drifts
        .last()
        .map_or((f64::NAN, f64::NAN), |d| (d.length, d.cosine));
    let kept = mean(sliced.kept.iter().copied());
    let middle = sliced.model;
    let shared = setup.cut(width, true, &Principal)?.model;
    let healed = setup.recovered(&middle, recovery(size), size.recovery, seed)?;
    let changes: Vec<MapChange> = map_changes(&same, &middle)?.into_values().collect();
    Ok(Run {
        whole,
        rotated: (setup.perplexity(&same)? / whole - 1.0).abs(),
        ways: found,
        accuracy: AccuracyLaw::new(setup.accuracy(&setup.model)?, &accuracies)?,
        maps: MapChange {
            spectral: mean(changes.iter().map(|change| change.spectral)),
            frobenius: mean(changes.iter().map(|change| change.frobenius)),
        },
        before: scores(&setup.model, &setup.model, &setup.tests, BATCH)?,
        after: scores(&setup.model, &middle, &setup.tests, BATCH)?,
        drift,
        kept,
        recovered: setup.perplexity(&healed)?,
        parameters: [
            setup.model.parameter_count(),
            middle.parameter_count(),
            shared.parameter_count(),
        ],
    })
}

/// The adapters that published code recovers a sliced model with: rank 32 at a width of 4096, here a sixth of
/// the width; alpha 10, dropout 0.05.
fn recovery(size: &Size) -> AdapterSettings {
    AdapterSettings {
        rank: (size.width / 6).max(1),
        alpha: 10.0,
        dropout: 0.05,
        ..AdapterSettings::default()
    }
}

fn sparsity(size: &Size, width: usize) -> f64 {
    1.0 - width as f64 / size.width as f64
}

/// Another calibration set: tokens drawn evenly.
fn by_noise(size: &Size, setup: &Setup, seed: u64) -> Result<Vec<(f64, f64)>> {
    let mut generator = generator(seed);
    let vocabulary = setup.model.spec().vocabulary().unwrap_or(1) as u32;
    let texts = (0..size.calibration).map(|_| {
        let tokens = 0..super::decoder::LENGTH;
        tokens
            .map(|_| generator.random_range(0..vocabulary))
            .collect()
    });
    let data = CalibrationData::windows(texts)?;
    let mut points = Vec::new();
    for cut in CUTS {
        let width = left(size.width, cut);
        let sliced = slice(&setup.model, &data, width, false, &Principal, BATCH)?;
        points.push((sparsity(size, width), setup.perplexity(&sliced.model)?));
    }
    Ok(points)
}

impl Run {
    fn law(&self, name: &str) -> Result<Law> {
        let way = self.ways.iter().find(|way| way.name == name);
        let points = way.map_or(&[][..], |way| way.points.as_slice());
        Ok(Law::new(self.whole, points)?)
    }

    /// Perplexity at the middle cut.
    fn middle(&self, name: &str) -> f64 {
        let way = self.ways.iter().find(|way| way.name == name);
        let index = CUTS.iter().position(|cut| *cut == MIDDLE);
        let point = way
            .zip(index)
            .and_then(|(way, index)| way.points.get(index));
        point.map_or(f64::NAN, |(_, perplexity)| *perplexity)
    }
}

fn claims(setting: &Setting, runs: &[Run]) -> Result<Vec<Claim>> {
    let scale = setting.scale;
    let average = |of: &dyn Fn(&Run) -> f64| mean(runs.iter().map(of));
    let middle = |name: &str| average(&|run| run.middle(name));
    let rotated = runs.iter().fold(0.0, |m: f64, run| m.max(run.rotated));
    let mut claims = vec![Claim::new(
        "another basis of the same width changes nothing",
        "exact",
        format!("perplexity changes by {rotated:.1e} of itself in f32"),
        Verdict::of(rotated < 1e-4),
    )];
    for (name, set) in [
        ("principal", "text"),
        ("principal of noise", "evenly drawn tokens"),
    ] {
        claims.push(law_claim(setting, runs, name, set)?);
    }
    let (best, random, worst) = (middle("principal"), middle("random"), middle("worst"));
    let apart = random.ln() / best.ln() - 1.0;
    claims.push(
        Claim::new(
            "the width that is left decides, not the directions: at 20 %, ln PPL in random \
             directions is within 10 % of that in principal ones",
            "representation dimension dominates",
            format!("principal {best:.2}, random {random:.2}, worst {worst:.2}"),
            after_training(scale, apart.abs() <= TOLERANCE),
        )
        .noted(format!("ln PPL is {:+.0} % off", 100.0 * apart)),
    );
    let (before, after) = (
        |of: fn(&Scores) -> f64| average(&|run| of(&run.before)),
        |of: fn(&Scores) -> f64| average(&|run| of(&run.after)),
    );
    let cosine = after(|s| s.cosine);
    let lengths = (before(|s| s.length), after(|s| s.length));
    claims.push(
        Claim::new(
        "scores become a shrunken version of themselves: at 20 % shorter, and at a cosine of at \
         least 0.9",
        "qualitative",
        format!(
            "length {:.2} to {:.2}, cosine {cosine:.3}, entropy {:.2} to {:.2} nats, log-probabilities {:.3} \
             times what they were (the law: {:.3}); maps keep {:.0} % of their Frobenius norm and {:.0} % of \
             their largest singular value",
            lengths.0,
            lengths.1,
            before(|s| s.entropy),
            after(|s| s.entropy),
            after(|s| s.log_ratio),
            1.0 / (1.0 - MIDDLE),
            100.0 * average(&|run| run.maps.frobenius),
            100.0 * average(&|run| run.maps.spectral),
        ),
        after_training(scale, lengths.1 < lengths.0 && cosine >= 0.9),
    )
    .noted(format!(
        "principal directions keep {:.2} % of the stream's squared length, the mean over \
                 sites; before the head it keeps {:.0} % of its length, at a cosine of {:.3}",
            100.0 * average(&|run| run.kept),
        100.0 * average(&|run| run.drift.0),
        average(&|run| run.drift.1)
    )),
    );
    let accuracy = average(&|run| run.accuracy.largest_error);
    claims.push(
        Claim::new(
            "ln(acc/acc₀) = κ s, at no cut more than 0.1 off",
            "given as proportional to 1 − s, which cannot hold at s = 0",
            format!(
                "κ = {:.2}, largest error {accuracy:.3}",
                average(&|run| run.accuracy.kappa)
            ),
            accuracy_verdict(scale, runs, accuracy),
        )
        .noted(format!(
            "as printed, with an intercept: {:.2} + {:.2} (1 − s), R² {:.3}; accuracy of the next \
             token",
            average(&|run| run.accuracy.line.intercept),
            average(&|run| run.accuracy.line.slope),
            average(&|run| run.accuracy.line.r_squared),
        )),
    );
    let shared = middle("principal, shared");
    let [whole, sliced, stock] = runs.first().map_or([0; 3], |run| run.parameters);
    claims.push(
        Claim::new(
            "directions of its own for each site leave a lower perplexity at 20 % than shared ones",
            "not compared in the paper",
            format!(
                "{best:.2} beside {shared:.2}; whole {:.2}",
                average(&|run| run.whole)
            ),
            after_training(scale, best < shared),
        )
        .noted(format!(
            "parameters: whole {whole}, with shortcuts {sliced}, shared {stock}"
        )),
    );
    let recovered = average(&|run| run.recovered);
    claims.push(
        Claim::new(
            "adapters of low rank, trained on the texts that directions were chosen by and taken in, lower \
             the perplexity at 20 %",
            "recovery by LoRA (rank 32, 8000 samples); figures not at hand",
            format!(
                "{best:.2} sliced, {recovered:.2} recovered; whole {:.2}",
                average(&|run| run.whole)
            ),
            after_training(scale, recovered < best),
        )
        .noted("shortcuts are linear layers and have adapters too; tables and norms stay as they were sliced"),
    );
    Ok(claims)
}

/// Where no cut costs accuracy, any law of its fall fits, and none is confirmed.
fn accuracy_verdict(scale: Scale, runs: &[Run], error: f64) -> Verdict {
    const LEAST: f64 = 0.05;
    let falls = runs
        .iter()
        .map(|run| run.accuracy.kappa * CUTS[CUTS.len() - 1]);
    match falls.fold(0.0, |m: f64, fall| m.max(fall.abs())) < LEAST {
        true => Verdict::NotMeasured,
        false => after_training(scale, error <= 0.1),
    }
}

fn law_claim(setting: &Setting, runs: &[Run], name: &str, set: &str) -> Result<Claim> {
    let laws = runs
        .iter()
        .map(|run| run.law(name))
        .collect::<Result<Vec<_>>>()?;
    let errors = laws
        .iter()
        .filter_map(|law| law.largest_error(RANGE.0, RANGE.1));
    let largest = errors.fold(0.0, f64::max);
    let rows = laws
        .first()
        .map(|law| law.rows.as_slice())
        .unwrap_or_default();
    let table: Vec<String> = rows
        .iter()
        .map(|row| {
            format!(
                "{:.0} %: {:.2} for {:.2}",
                100.0 * row.sparsity,
                row.predicted,
                row.measured
            )
        })
        .collect();
    let of = |part: &dyn Fn(&Law) -> f64| mean(laws.iter().map(part));
    Ok(Claim::new(
        &format!(
            "ln PPL = ln PPL₀ / (1 − s), within 10 % from s = 10 to 30 %; directions chosen on {set}"
        ),
        "small errors on Llama-3-8B-Instruct and Phi-3-mini",
        format!("at most {:.1} % off in ln PPL", 100.0 * largest),
        after_training(setting.scale, largest <= TOLERANCE),
    )
    .noted(format!(
        "ln PPL₀ / ln PPL is {:.2} {:+.2} s, R² {:.3}; predicted for measured, first seed: {}",
        of(&|law| law.line.intercept),
        of(&|law| law.line.slope),
        of(&|law| law.line.r_squared),
        table.join(", ")
    )))
}

fn plot(run: &Run) -> Plot {
    let logarithm = |&(sparsity, perplexity): &(f64, f64)| (sparsity, perplexity.ln());
    let mut series: Vec<Series> = run
        .ways
        .iter()
        .map(|way| Series {
            name: way.name.to_owned(),
            points: way.points.iter().map(logarithm).collect(),
        })
        .collect();
    let expected = |sparsity: &f64| (*sparsity, run.whole.ln() / (1.0 - sparsity));
    series.push(Series {
        name: "the law".to_owned(),
        points: CUTS.iter().map(expected).collect(),
    });
    Plot {
        title: "Perplexity over the share of the width that is cut".to_owned(),
        x: "share cut".to_owned(),
        y: "ln perplexity".to_owned(),
        series,
    }
}
