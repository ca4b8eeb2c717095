//! Maps by how many tokens they were fitted to.

use super::{REMOVED, Way};
use crate::experiments::depth::{BATCH, Size, Subject};
use crate::experiments::{after_training, decoder};
use crate::{Claim, Plot, Result, Scale, Series, Setting};
use lapidary_compress::{Budget, CalibrationData, Change, Method, RunInput, Task, run_regression};
use lapidary_factor::Regression;

/// The least-squares maps from some number of calibration tokens.
pub(super) struct Fit {
    pub(super) per_feature: f64,
    /// Of the map that is merged.
    added: Errors,
    /// Of the affine map of the whole stream.
    stream: Errors,
    /// Of the decoder with the merged map.
    pub(super) loss: f64,
}

/// Root mean square errors, relative to what is missed without a map.
#[derive(Clone, Copy)]
struct Errors {
    /// On the tokens that the map was fitted to.
    fitted: f64,
    /// On tokens that it was not.
    held_out: f64,
}

/// Fits the maps to ever more tokens of one cut, so that only they differ.
pub(super) fn by_tokens(subject: &Subject, size: Size, setting: &Setting) -> Result<Vec<Fit>> {
    let method = Method::find("replaceme")?;
    let settings = Way::LeastSquares.settings(setting.scale);
    let task = Task {
        data: Some(&subject.data),
        settings: Some(&settings),
        ..Task::new(&subject.model)
    };
    let keep = 1.0 - REMOVED as f64 / size.blocks as f64;
    let plan = method.plan(&task, &Budget::Keep(keep))?;
    let run = plan
        .modules
        .iter()
        .zip(0usize..)
        .find_map(|(module, index)| {
            let Change::Linearise { blocks } = module.change else {
                return None;
            };
            Some((index.checked_sub(1)?, blocks))
        });
    let Some(run) = run else {
        return Ok(Vec::new());
    };
    let sums = |data: &CalibrationData, input| -> Result<Regression> {
        Ok(run_regression(&subject.model, data, BATCH, run, input)?)
    };
    let held_out = [
        sums(&subject.held_out, RunInput::Added)?,
        sums(&subject.held_out, RunInput::Stream)?,
    ];
    let [missed, _] = &held_out;
    let missed = missed.total();
    let mut fits = Vec::new();
    for count in [64, 32, 16, 4, 1].map(|share| size.calibration / share) {
        if count == 0 {
            continue;
        }
        let data = CalibrationData::windows(subject.text.training.fixed_windows(count)?)?;
        let added = sums(&data, RunInput::Added)?;
        let here = added.total();
        let errors = |sums: &Regression, other: &Regression| -> Result<Errors> {
            let map = sums.solve(0.0)?;
            let relative = |error: f64, missed: f64| (error / missed.max(f64::MIN_POSITIVE)).sqrt();
            Ok(Errors {
                fitted: relative(sums.squared_error(&map), here),
                held_out: relative(other.squared_error(&map), missed),
            })
        };
        let [other_added, other_stream] = &held_out;
        let cut = method.apply(
            &Task {
                data: Some(&data),
                ..task
            },
            &plan,
        )?;
        fits.push(Fit {
            per_feature: (count as usize * decoder::LENGTH) as f64 / size.width as f64,
            stream: errors(&sums(&data, RunInput::Stream)?, other_stream)?,
            added: errors(&added, other_added)?,
            loss: subject.loss(&cut.model)?,
        });
    }
    Ok(fits)
}

/// Errors of both maps by tokens.
pub(super) fn plot(fits: &[Fit]) -> Plot {
    let line = |name: &str, of: fn(&Fit) -> f64| Series {
        name: name.to_owned(),
        points: fits
            .iter()
            .map(|fit| (fit.per_feature.log2(), of(fit)))
            .collect(),
    };
    Plot {
        title: "Error by calibration tokens, two blocks removed".to_owned(),
        x: "calibration tokens for each feature, log2".to_owned(),
        y: "error relative to no map".to_owned(),
        series: vec![
            line("merged map, calibration", |fit| fit.added.fitted),
            line("merged map, held out", |fit| fit.added.held_out),
            line("whole stream, calibration", |fit| fit.stream.fitted),
            line("whole stream, held out", |fit| fit.stream.held_out),
        ],
    }
}

/// What more tokens are worth.
pub(super) fn claims(scale: Scale, fits: &[Fit]) -> Vec<Claim> {
    let (fewest, most) = (fits.first(), fits.last());
    let perplexity = |fit: Option<&Fit>| fit.map_or(f64::NAN, |fit| fit.loss.exp());
    let errors = |fit: Option<&Fit>, of: fn(&Fit) -> f64| fit.map_or(f64::NAN, of);
    let fitted = |fit| errors(fit, |fit| fit.added.fitted);
    let gaps: Vec<f64> = fits
        .iter()
        .map(|fit| fit.added.held_out - fit.added.fitted)
        .collect();
    let listed = |of: fn(&Fit) -> Errors| {
        let each = fits.iter().map(|fit| {
            let Errors { fitted, held_out } = of(fit);
            format!("{}: {fitted:.3} and {held_out:.3}", fit.per_feature)
        });
        each.collect::<Vec<_>>().join(", ")
    };
    let (merged, whole) = (
        errors(most, |fit| fit.added.held_out),
        errors(most, |fit| fit.stream.held_out),
    );
    vec![
        Claim::new(
            "with about one token for each feature the map learns its sample: a smaller error there \
             and a larger perplexity elsewhere",
            "d (d + 1) numbers from fewer than 4 d tokens",
            format!(
                "error {:.3} and perplexity {:.3}, against {:.3} and {:.3} with all tokens",
                fitted(fewest),
                perplexity(fewest),
                fitted(most),
                perplexity(most)
            ),
            after_training(
                scale,
                fitted(fewest) < fitted(most) && perplexity(fewest) > perplexity(most),
            ),
        ),
        Claim::new(
            "the error on held-out tokens comes nearer to that on calibration tokens with every more of them",
            "below 4 d tokens they are far apart",
            listed(|fit| fit.added),
            after_training(scale, gaps.is_sorted_by(|a, b| a > b) && gaps.len() > 1),
        )
        .noted("tokens for each feature: error on them and on held-out tokens, relative to no map"),
        Claim::new(
            "with all tokens, an affine map of the whole stream errs less on held-out tokens than the map that is merged",
            "estimate; it cannot be merged",
            format!("{whole:.3} against {merged:.3}; whole stream {}", listed(|fit| fit.stream)),
            after_training(scale, whole < merged),
        ),
    ]
}
