//! Entropy measured on other text than the model's.

use super::ESTIMATORS;
use super::ways::settings;
use crate::experiments::decoder::LENGTH;
use crate::experiments::depth::{Size, Subject};
use crate::experiments::{after_training, mean};
use crate::{Claim, Result, Scale, Verdict};
use lapidary_compress::{CalibrationData, Change};
use lapidary_train::generator;
use lapidary_train::language::{Corpus, Language, Mixture, Split};
use rand::RngExt;

/// Attention that goes.
const MOST: usize = 3;

/// What entropy on one kind of text chose.
pub(super) struct Domain {
    name: &'static str,
    /// Blocks whose attention goes, of the largest number of removals.
    chosen: Vec<String>,
    /// Mean rise of the loss over the numbers of removals.
    rise: f64,
}

/// The model's own text first.
pub(super) fn run(subject: &Subject, size: Size, seed: u64) -> Result<Vec<Domain>> {
    let whole = subject.loss(&subject.model)?;
    let [(_, neighbours), ..] = ESTIMATORS;
    let settings = settings(neighbours);
    let texts = [
        ("its own text", subject.data.clone()),
        (
            "facts of another language alone",
            facts(subject, size, seed)?,
        ),
        ("words drawn evenly", noise(subject, size, seed)?),
    ];
    let mut domains = Vec::new();
    for (name, data) in texts {
        let (mut rises, mut chosen) = (Vec::new(), Vec::new());
        for removed in 1..=MOST.min(size.blocks.saturating_sub(super::FIRST + super::LAST)) {
            let method = "entropy-attention";
            let cut = subject.on(&data, method, removed, size.blocks, &settings)?;
            rises.push(subject.loss(&cut.model)? - whole);
            let gone = cut.report.modules.iter();
            let gone = gone.filter(|module| module.change == Change::Remove);
            chosen = gone.map(|module| module.path.clone()).collect();
        }
        domains.push(Domain {
            name,
            chosen,
            rise: mean(rises),
        });
    }
    Ok(domains)
}

fn facts(subject: &Subject, size: Size, seed: u64) -> Result<CalibrationData> {
    let facts = Mixture {
        number_agreement: 0.0,
        reflexive_agreement: 0.0,
        learned_fact: 1.0,
        context_fact: 0.0,
        name_copy: 0.0,
        brackets: 0.0,
    };
    let other = seed.wrapping_add(1);
    let corpus = Corpus::new(Language::new(other), Split::Training, facts, other)?;
    let text = subject.text.training.likewise(corpus);
    let windows = text.fixed_windows(size.calibration)?;
    Ok(CalibrationData::windows(windows)?)
}

fn noise(subject: &Subject, size: Size, seed: u64) -> Result<CalibrationData> {
    let vocabulary = subject.model.spec().vocabulary().unwrap_or(1) as u32;
    let mut generator = generator(seed);
    let windows = (0..size.calibration).map(|_| {
        let window = (0..LENGTH).map(|_| generator.random_range(0..vocabulary));
        window.collect::<Vec<u32>>()
    });
    Ok(CalibrationData::windows(windows.collect::<Vec<_>>())?)
}

pub(super) fn claim(scale: Scale, domains: &[Domain]) -> Claim {
    let own = domains.first().map_or(f64::NAN, |own| own.rise);
    let listed = domains.iter().map(|domain| {
        format!(
            "{}: {:+.3} nats, without {}",
            domain.name,
            domain.rise,
            domain.chosen.join(" ")
        )
    });
    let as_good = |domain: &Domain| domain.rise <= 1.2 * own;
    // A rise has multiples only where there is one.
    let verdict = match own > 0.0 {
        true => after_training(scale, domains.iter().all(as_good)),
        false => Verdict::NotMeasured,
    };
    Claim::new(
        "attention chosen by entropy on other text costs at most 1.2 times what it does by entropy on the \
         model's own",
        "general, law, medicine and finance text are calibrated on",
        listed.collect::<Vec<_>>().join("; "),
        verdict,
    )
    .noted(format!("mean over 1 to {MOST} removals, losses on the model's own held-out text"))
}
