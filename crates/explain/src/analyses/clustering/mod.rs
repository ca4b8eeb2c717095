//! Tokens as particles that attention gathers into clusters (Geshkovski, Letrouit, Polyanskiy &
//! Rigollet, A mathematical perspective on Transformers, 2023, arXiv 2312.10794).
//!
//! [`Particles`] on the unit sphere move under [`Dynamics`]; an [`Ensemble`] runs many systems;
//! [`equal_angle`], [`wendel`], [`circle_velocity`] and others are what is known in closed form;
//! [`FreeDynamics`] is the flow without a norm; [`layers`] takes the same statistics of a model's
//! tokens, layer by layer.

mod dynamics;
mod ensemble;
mod film;
mod free;
mod particles;
mod states;
mod theory;

pub use dynamics::{Dynamics, Flow, Matrices, Scheme};
pub use ensemble::{Course, Courses, Ensemble};
pub use film::Film;
pub use free::FreeDynamics;
pub use particles::Particles;
pub use states::{BINS, CLOSE, Layer, deepened, iterated, layers, layers_without_skip, shuffled};
pub use theory::{
    angle_of_two, circle_velocity, equal_angle, equal_angle_rate, line, merging_time, wendel,
};

use crate::report::{Cell, Map, Plot, Report, Series, Table};
use crate::{Error, Question, Result};
use rand::Rng;

/// Most lines of a figure.
const MOST_SHOWN: usize = 12;

/// Most columns of a map.
const MOST_COLUMNS: usize = 60;

/// How a text's tokens gather from layer to layer, beside the same tokens in random order and the
/// same model without the residual around attention.
///
/// # Errors
/// As [`layers`].
pub fn report(question: &Question<'_>, generator: &mut impl Rng) -> Result<Report> {
    let own = layers(question)?;
    let mut notes = vec![format!(
        "states after the norm before each mixer; close: cosine above {CLOSE}"
    )];
    let other = |found: Result<Vec<Layer>>, what: &str, notes: &mut Vec<String>| match found {
        Ok(layers) => layers,
        Err(error) => {
            notes.push(format!("{what}: not measured ({error})"));
            Vec::new()
        }
    };
    let shuffled = shuffled(question.input, generator).and_then(|input| {
        layers(&Question {
            input: &input,
            ..*question
        })
    });
    let shuffled = other(shuffled, "in random order", &mut notes);
    let without = other(
        layers_without_skip(question),
        "without the residual around attention",
        &mut notes,
    );
    let mut table = Table::new(
        "Before each layer",
        &[
            "site",
            "mean cosine",
            "in random order",
            "without residual",
            "close pairs",
            "clusters",
            "effective rank",
        ],
    );
    let of = |layers: &[Layer], index: usize| layers.get(index).map_or(f64::NAN, |l| l.mean_cosine);
    for (index, layer) in own.iter().enumerate() {
        table.push([
            layer.site.as_str().into(),
            layer.mean_cosine.into(),
            of(&shuffled, index).into(),
            of(&without, index).into(),
            layer.close_pairs.into(),
            layer.clusters.into(),
            layer.effective_rank.into(),
        ]);
    }
    let series = |name: &str, layers: &[Layer]| Series {
        name: name.to_owned(),
        points: (0..)
            .zip(layers)
            .map(|(i, l)| (f64::from(i), l.mean_cosine))
            .collect(),
    };
    let lines = [
        ("this text", &own),
        ("in random order", &shuffled),
        ("without the residual around attention", &without),
    ];
    Ok(Report {
        title: "How tokens gather".to_owned(),
        notes,
        tables: vec![table],
        maps: vec![Map {
            title: "cosines of pairs: layers by parts of [−1, 1]".to_owned(),
            rows: own.iter().map(|layer| layer.site.clone()).collect(),
            columns: bins(),
            values: own.iter().map(|layer| shares(&layer.histogram)).collect(),
        }],
        plots: vec![Plot {
            title: "Mean cosine of tokens".to_owned(),
            x: "layer".to_owned(),
            y: "mean cosine".to_owned(),
            series: lines
                .into_iter()
                .filter(|(_, layers)| !layers.is_empty())
                .map(|(name, layers)| series(name, layers))
                .collect(),
        }],
        ..Report::default()
    })
}

fn bins() -> Vec<String> {
    let left = |bin: usize| -1.0 + 2.0 * bin as f64 / BINS as f64;
    (0..BINS).map(|bin| format!("{:.1}", left(bin))).collect()
}

fn shares(histogram: &[usize]) -> Vec<f64> {
    let sum = histogram.iter().sum::<usize>().max(1) as f64;
    histogram.iter().map(|count| *count as f64 / sum).collect()
}

/// Random particles under a flow: one system followed closely, and medians over `ensemble`.
///
/// # Errors
/// As [`Ensemble::run`].
///
/// ```
/// use lapidary_explain::analyses::clustering::{Dynamics, Ensemble, Flow, particles_report};
/// let dynamics = Dynamics::new(Flow::SelfAttention, 1.0)?;
/// let ensemble = Ensemble { count: 8, dimension: 3, systems: 4, ..Ensemble::default() };
/// let report = particles_report(&dynamics, Flow::SelfAttention, &ensemble)?;
/// assert_eq!(report.tables[0].rows.len(), 11);
/// # Ok::<(), lapidary_explain::Error>(())
/// ```
pub fn particles_report(dynamics: &Dynamics, flow: Flow, ensemble: &Ensemble) -> Result<Report> {
    let medians = ensemble.run(dynamics)?;
    let records = medians.times.len();
    let mut table = Table::new(
        "One system",
        &[
            "time",
            "clusters",
            "close pairs",
            "mean cosine",
            "effective rank",
            "energy",
            "median close pairs",
        ],
    );
    let mut histograms = Vec::new();
    let mut angles: Vec<Vec<(f64, f64)>> = vec![Vec::new(); ensemble.count.min(MOST_SHOWN)];
    let mut particles = ensemble.start(0)?;
    let within = (ensemble.step / dynamics.careful_step(ensemble.step))
        .ceil()
        .max(1.0) as usize;
    let rows = 10.min(records.saturating_sub(1)).max(1);
    let mut next_row = 0;
    for (index, time) in medians.times.iter().enumerate() {
        if index > 0 {
            let step = ensemble.step / within as f64;
            particles = dynamics.run(particles, step, within, ensemble.scheme)?;
        }
        for (line, point) in angles.iter_mut().zip(particles.iter()) {
            let angle = match point {
                [x, y] => y.atan2(*x),
                _ => point.first().copied().unwrap_or(0.0),
            };
            line.push((*time, angle));
        }
        if index * rows < next_row * records.saturating_sub(1) {
            continue;
        }
        next_row += 1;
        histograms.push((format!("{time:.1}"), shares(&particles.histogram(BINS))));
        table.push([
            (*time).into(),
            particles.clusters(ensemble.threshold).into(),
            particles.close_pairs(ensemble.threshold).into(),
            particles.mean_cosine().into(),
            particles.effective_rank()?.into(),
            dynamics.energy(&particles)?.into(),
            medians
                .close_pairs
                .get(index)
                .copied()
                .unwrap_or(f64::NAN)
                .into(),
        ]);
    }
    let start = [0.0, ensemble.threshold];
    let scalar = match ensemble.threshold > 0.0 && ensemble.threshold < 1.0 {
        true => merging_time(flow, dynamics.beta(), ensemble.count, start, ensemble.time)?,
        false => {
            return Err(Error::invalid(
                "threshold",
                ensemble.threshold,
                "between 0 and 1",
            ));
        }
    };
    let told =
        |time: Option<f64>| time.map_or("not within the time".to_owned(), |t| format!("{t:.2}"));
    let (names, histograms): (Vec<_>, Vec<_>) = histograms.into_iter().unzip();
    Ok(Report {
        title: "Particles under attention".to_owned(),
        notes: vec![
            format!(
                "{} particles in {} dimensions, beta {}, {} systems",
                ensemble.count,
                ensemble.dimension,
                dynamics.beta(),
                ensemble.systems
            ),
            format!(
                "half of the pairs close (median): {}",
                told(medians.reaches(0.5))
            ),
            format!(
                "if all angles stayed equal from a right angle on: {}",
                told(scalar)
            ),
            format!("median clusters at the end: {}", medians.clusters),
            format!(
                "probability that a random start lies in an open hemisphere: {:.4}",
                wendel(ensemble.count, ensemble.dimension)
            ),
        ],
        tables: vec![table],
        maps: vec![Map {
            title: "inner products of pairs: times by parts of [−1, 1]".to_owned(),
            rows: names,
            columns: bins(),
            values: histograms,
        }],
        plots: vec![
            Plot {
                title: "Share of close pairs, median over systems".to_owned(),
                x: "time".to_owned(),
                y: "share".to_owned(),
                series: vec![Series {
                    name: format!("beta {}", dynamics.beta()),
                    points: medians
                        .times
                        .iter()
                        .copied()
                        .zip(medians.close_pairs)
                        .collect(),
                }],
            },
            Plot {
                title: "Each particle of one system".to_owned(),
                x: "time".to_owned(),
                y: if ensemble.dimension == 2 {
                    "angle"
                } else {
                    "first coordinate"
                }
                .to_owned(),
                series: angles
                    .into_iter()
                    .enumerate()
                    .map(|(index, points)| Series {
                        name: format!("{index}"),
                        points,
                    })
                    .collect(),
            },
        ],
        ..Report::default()
    })
}

/// A phase diagram: the median share of close pairs over time for each of `betas`, beside the time
/// at which equal angles would have closed.
///
/// # Errors
/// As [`Ensemble::run`].
pub fn phases_report(
    dynamics: impl Fn(f64) -> Result<Dynamics>,
    flow: Flow,
    betas: &[f64],
    ensemble: &Ensemble,
) -> Result<Report> {
    let phases = ensemble.phases(dynamics, betas)?;
    let mut table = Table::new(
        "Half of the pairs close",
        &[
            "beta",
            "time",
            "if angles stayed equal",
            "median clusters at the end",
        ],
    );
    let mut lines = [Vec::new(), Vec::new()];
    for (beta, courses) in betas.iter().zip(&phases) {
        let levels = [0.0, ensemble.threshold];
        let scalar = merging_time(flow, *beta, ensemble.count, levels, ensemble.time)?;
        let times = [courses.reaches(0.5), scalar];
        for (line, time) in lines.iter_mut().zip(times) {
            line.extend(time.map(|time| (*beta, time)));
        }
        let [found, scalar] = times.map(|time| time.map_or("later".into(), Cell::from));
        table.push([(*beta).into(), found, scalar, courses.clusters.into()]);
    }
    let times = phases.first().map_or(&[][..], |courses| &courses.times);
    let every = times.len().div_ceil(MOST_COLUMNS).max(1);
    let [found, scalar] = lines;
    let series = |name: &str, points| Series {
        name: name.to_owned(),
        points,
    };
    Ok(Report {
        title: "Phases of particles under attention".to_owned(),
        notes: vec![format!(
            "{} particles in {} dimensions, {} systems; close: inner product above {}",
            ensemble.count, ensemble.dimension, ensemble.systems, ensemble.threshold
        )],
        tables: vec![table],
        maps: vec![Map {
            title: "median share of close pairs: beta by time".to_owned(),
            rows: betas.iter().map(|beta| format!("{beta:.2}")).collect(),
            columns: times
                .iter()
                .step_by(every)
                .map(|time| format!("{time:.1}"))
                .collect(),
            values: phases
                .iter()
                .map(|courses| courses.close_pairs.iter().step_by(every).copied().collect())
                .collect(),
        }],
        plots: vec![Plot {
            title: "When half of the pairs are close".to_owned(),
            x: "beta".to_owned(),
            y: "time".to_owned(),
            series: vec![series("particles", found), series("equal angles", scalar)],
        }],
        ..Report::default()
    })
}
