//! Tokens as particles: do they gather when the theory says so?
//!
//! Ensembles of random particles under self-attention, for every inverse temperature and several
//! dimensions, beside the scalar equation that all angles follow when they are equal; the theorems
//! that can be checked by numbers; and the tokens of a small trained decoder.

use super::{after_training, decoder, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::Question;
use lapidary_explain::analyses::clustering::{
    Courses, Dynamics, Ensemble, Flow, Layer, Particles, Scheme, circle_velocity, equal_angle,
    layers, line, merging_time, shuffled, wendel,
};
use lapidary_kernels::Device;
use lapidary_model::Input;
use lapidary_train::generator;
use lapidary_train::language::Split;

/// Inner products above this are one cluster.
const THRESHOLD: f64 = 1.0 - 1e-3;
const DIMENSIONS: [usize; 3] = [2, 8, 128];

struct Size {
    count: usize,
    systems: usize,
    betas: usize,
    time: f64,
    trials: usize,
    steps: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                count: 8,
                systems: 4,
                betas: 2,
                time: 10.0,
                trials: 400,
                steps: 0,
            },
            Scale::Small => Self {
                count: 32,
                systems: 64,
                betas: 19,
                time: 30.0,
                trials: 4000,
                steps: 300,
            },
            Scale::Full => Self {
                count: 32,
                systems: 1024,
                betas: 37,
                time: 30.0,
                trials: 40_000,
                steps: 3000,
            },
        }
    }
}

/// The median courses of one dimension, for each `β`.
struct Diagram {
    dimension: usize,
    courses: Vec<Courses>,
}

impl Diagram {
    /// `|t − t*| / t*` where half of the pairs are close, for each `β` at which the scalar equation
    /// gets there in time; where the particles do not, the whole time stands for theirs.
    fn errors(&self, scalar: &[Option<f64>], time: f64) -> Vec<f64> {
        let both = self.courses.iter().zip(scalar);
        let timed = both.filter_map(|(courses, scalar)| Some((courses.reaches(0.5), (*scalar)?)));
        timed
            .map(|(found, scalar)| (found.unwrap_or(time) - scalar).abs() / scalar)
            .collect()
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let betas: Vec<f64> = (0..size.betas)
        .map(|index| 9.0 * index as f64 / (size.betas - 1).max(1) as f64)
        .collect();
    let attention = |beta| Dynamics::new(Flow::SelfAttention, beta);
    let diagrams = DIMENSIONS
        .iter()
        .map(|dimension| {
            let ensemble = Ensemble {
                count: size.count,
                dimension: *dimension,
                systems: size.systems,
                time: size.time,
                threshold: THRESHOLD,
                seed: setting.seed,
                ..Ensemble::default()
            };
            Ok(Diagram {
                dimension: *dimension,
                courses: ensemble.phases(attention, &betas)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let scalar = betas
        .iter()
        .map(|beta| {
            let levels = [0.0, THRESHOLD];
            Ok(merging_time(
                Flow::SelfAttention,
                *beta,
                size.count,
                levels,
                size.time,
            )?)
        })
        .collect::<Result<Vec<_>>>()?;
    let (text, random) = tokens(size.steps, setting.seed)?;

    let mut claims = theorems(size.count, size.trials, setting.seed)?;
    claims.extend(phase_claims(
        setting.scale,
        &diagrams,
        &betas,
        &scalar,
        size.time,
    ));
    claims.push(token_claim(setting.scale, &text, &random));
    Ok(Reproduction {
        setting: format!(
            "{} particles, {} systems for each of {} temperatures up to beta 9 and each of the \
             dimensions {DIMENSIONS:?}, to time {}, Euler steps of 0.1; a decoder of 4 blocks after \
             {} steps",
            size.count, size.systems, size.betas, size.time, size.steps
        ),
        claims,
        plots: vec![
            contours(&diagrams, &betas, &scalar),
            token_plot(&text, &random),
        ],
        ..Reproduction::default()
    })
}

/// What holds at any size.
fn theorems(count: usize, trials: usize, seed: u64) -> Result<Vec<Claim>> {
    let mut rng = generator(seed);
    // All angles equal.
    let mut error: f64 = 0.0;
    for flow in [Flow::SelfAttention, Flow::Unnormalised] {
        let dynamics = Dynamics::new(flow, 2.0)?;
        let start = Particles::orthonormal(count, count)?;
        let end = dynamics.run(start, 0.01, 150, Scheme::RungeKutta)?;
        let expected = equal_angle(flow, 2.0, count, 0.0, 1.5);
        for (i, row) in end.gram().iter().enumerate() {
            let others = row.iter().enumerate().filter(|(j, _)| *j != i);
            error = others.fold(error, |m, (_, product)| m.max((product - expected).abs()));
        }
    }
    // Energy along both flows, and with values that repel.
    let mut violations = 0;
    for flow in [Flow::SelfAttention, Flow::Unnormalised] {
        let dynamics = Dynamics::new(flow, 2.0)?;
        let mut particles = Particles::random(count, 4, &mut rng)?;
        for _ in 0..100 {
            let next =
                dynamics.step(&particles, dynamics.careful_step(0.05), Scheme::RungeKutta)?;
            violations +=
                usize::from(dynamics.energy(&next)? < dynamics.energy(&particles)? - 1e-12);
            particles = next;
        }
    }
    // Wendel.
    let (few, dimension) = (8, 4);
    let mut inside = 0;
    for _ in 0..trials {
        let particles = Particles::random(few, dimension, &mut rng)?;
        inside += usize::from(particles.in_open_hemisphere(100_000) == Some(true));
    }
    let (share, expected) = (inside as f64 / trials as f64, wendel(few, dimension));
    let tolerance = 4.0 * (expected * (1.0 - expected) / trials as f64).sqrt();
    // Oscillators.
    let angles: Vec<f64> = (0..count).map(|i| (i * i) as f64).collect();
    let points = angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect();
    let circle = Particles::new(2, points)?;
    let velocity = Dynamics::new(Flow::Unnormalised, 1.0)?.velocity(&circle)?;
    let turning = circle_velocity(1.0, &angles);
    let coupled = velocity
        .chunks(2)
        .zip(&angles)
        .zip(turning)
        .fold(0.0, |m: f64, ((v, a), t)| {
            let along: f64 = v.iter().zip([-a.sin(), a.cos()]).map(|(v, e)| v * e).sum();
            m.max((along - t).abs())
        });
    let (rates, lowest_fit) = gathering(count, seed)?;
    Ok(vec![
        Claim::new(
            "equal angles stay equal and follow the scalar equation",
            "theorem, both flows",
            format!("largest error {error:.1e}"),
            Verdict::of(error < 1e-6),
        ),
        Claim::new(
            "the interaction energy never falls along either flow",
            "theorem",
            format!("{violations} falls in 200 steps"),
            Verdict::of(violations == 0),
        ),
        Claim::new(
            "random points lie in a hemisphere as often as Wendel's formula says",
            "theorem",
            format!(
                "{share:.3} of {trials} starts of {few} points in {dimension} dimensions; {expected:.3}"
            ),
            Verdict::of((share - expected).abs() < tolerance),
        ),
        Claim::new(
            "on the circle the unnormalised flow is a system of coupled oscillators",
            "identity",
            format!("largest error {coupled:.1e}"),
            Verdict::of(coupled < 1e-10),
        ),
        Claim::new(
            "from a hemisphere, particles gather in one point exponentially: a line in the \
             logarithm, R² above 0.99",
            "theorem, any beta",
            format!("rates {}; R² at least {lowest_fit:.5}", rates.join(", ")),
            Verdict::of(lowest_fit > 0.99 && rates.iter().all(|rate| !rate.starts_with('-'))),
        ),
    ])
}

/// Rates at which the widest pair closes, for several temperatures, and the worst fit.
fn gathering(count: usize, seed: u64) -> Result<(Vec<String>, f64)> {
    let (mut rates, mut worst) = (Vec::new(), 1.0f64);
    for beta in [0.0, 1.0, 3.0] {
        for flow in [Flow::SelfAttention, Flow::Unnormalised] {
            let dynamics = Dynamics::new(flow, beta)?;
            // As many dimensions as particles: always in a hemisphere.
            let mut particles = Particles::random(count, count, &mut generator(seed))?;
            let mut widest = Vec::new();
            let within = (0.1 / dynamics.careful_step(0.1)).ceil() as usize;
            for index in 0..600 {
                particles =
                    dynamics.run(particles, 0.1 / within as f64, within, Scheme::RungeKutta)?;
                let lowest = particles.gram().into_iter().flatten().fold(1.0, f64::min);
                // Once all are near one point, down to where rounding shows.
                if (1e-10..1e-2).contains(&(1.0 - lowest)) {
                    widest.push((f64::from(index) * 0.1, (1.0 - lowest).ln()));
                }
            }
            let (slope, fit) = line(&widest)?;
            rates.push(format!("{:.2}", -slope));
            worst = worst.min(fit);
        }
    }
    Ok((rates, worst))
}

fn phase_claims(
    scale: Scale,
    diagrams: &[Diagram],
    betas: &[f64],
    scalar: &[Option<f64>],
    time: f64,
) -> Vec<Claim> {
    let errors: Vec<(usize, Vec<f64>)> = diagrams
        .iter()
        .map(|diagram| (diagram.dimension, diagram.errors(scalar, time)))
        .collect();
    let means: Vec<f64> = errors
        .iter()
        .map(|(_, errors)| mean(errors.iter().copied()))
        .collect();
    let highest = errors.last().map_or(f64::NAN, |(_, errors)| {
        errors.iter().copied().fold(0.0, f64::max)
    });
    let compared = errors.first().map_or(0, |(_, errors)| errors.len());
    let shown: Vec<String> = errors
        .iter()
        .zip(&means)
        .map(|((dimension, _), mean)| format!("{:.0} % at d = {dimension}", 100.0 * mean))
        .collect();
    let clusters = |beta: f64| {
        let index = betas.iter().position(|b| (b - beta).abs() < 1e-9)?;
        Some(diagrams.first()?.courses.get(index)?.clusters)
    };
    let (cold, warm) = (clusters(9.0), clusters(1.0));
    let told = |clusters: Option<f64>| clusters.map_or("not run".to_owned(), |c| c.to_string());
    vec![
        Claim::new(
            "at d = 128, half of the pairs are close within 5 % of the time that the scalar \
             equation says, for every temperature at which it gets there",
            "the transition follows the curve as d grows (figure)",
            format!(
                "largest error {:.0} %, mean {:.0} % over {compared} temperatures",
                100.0 * highest,
                100.0 * means.last().copied().unwrap_or(f64::NAN)
            ),
            after_training(scale, highest <= 0.05),
        ),
        Claim::new(
            "the error grows as the dimension falls",
            "figure",
            shown.join(", "),
            after_training(
                scale,
                means.windows(2).all(|two| matches!(two, [a, b] if a > b)),
            ),
        ),
        Claim::new(
            "at d = 2 the median number of clusters at the end is at least 3 at beta 9 and 1 at \
             beta 1",
            "metastable clusters at large beta",
            format!("{} at beta 9, {} at beta 1", told(cold), told(warm)),
            after_training(scale, cold.is_some_and(|c| c >= 3.0) && warm == Some(1.0)),
        ),
    ]
}

/// Layers of a decoder on sentences of its language, and on the same words in random order.
fn tokens(steps: u64, seed: u64) -> Result<(Vec<Layer>, Vec<Layer>)> {
    let model = decoder::train_on_language(64, 4, steps, seed)?;
    let window = decoder::corpus(Split::HeldOut, seed)?.window(0, decoder::LENGTH)?;
    let ids = lapidary_kernels::Tensor::from_slice(&window, (1, window.len()), &Device::Cpu);
    let input = Input::tokens(crate::error::engine(ids)?);
    let other = shuffled(&input, &mut generator(seed))?;
    let of = |input: &Input| layers(&Question::new(&model, input));
    Ok((of(&input)?, of(&other)?))
}

fn token_claim(scale: Scale, text: &[Layer], random: &[Layer]) -> Claim {
    let shown = |layers: &[Layer]| {
        let each: Vec<String> = layers
            .iter()
            .map(|l| format!("{:.2}", l.mean_cosine))
            .collect();
        each.join(", ")
    };
    let ends = text.first().zip(text.last());
    Claim::new(
        "the tokens of a trained decoder are closer to each other after its last layer than before \
         its first",
        "ALBERT-XL: cosines move towards 1 with depth",
        format!(
            "mean cosines {}; of shuffled words {}",
            shown(text),
            shown(random)
        ),
        after_training(
            scale,
            ends.is_some_and(|(a, b)| b.mean_cosine > a.mean_cosine),
        ),
    )
    .noted("ALBERT shares one layer's weights and is 48 layers deep; this decoder does neither")
}

fn contours(diagrams: &[Diagram], betas: &[f64], scalar: &[Option<f64>]) -> Plot {
    let line = |name: String, times: Vec<Option<f64>>| Series {
        name,
        points: betas
            .iter()
            .zip(times)
            .filter_map(|(beta, time)| Some((*beta, time?)))
            .collect(),
    };
    let mut series: Vec<Series> = diagrams
        .iter()
        .map(|diagram| {
            let times = diagram.courses.iter().map(|courses| courses.reaches(0.5));
            line(format!("d = {}", diagram.dimension), times.collect())
        })
        .collect();
    series.push(line("scalar equation".to_owned(), scalar.to_vec()));
    Plot {
        title: "When half of the pairs are one".to_owned(),
        x: "beta".to_owned(),
        y: "time".to_owned(),
        series,
    }
}

fn token_plot(text: &[Layer], random: &[Layer]) -> Plot {
    let line = |name: &str, layers: &[Layer]| Series {
        name: name.to_owned(),
        points: (0..)
            .zip(layers)
            .map(|(i, l)| (f64::from(i), l.mean_cosine))
            .collect(),
    };
    Plot {
        title: "Tokens of a trained decoder".to_owned(),
        x: "layer".to_owned(),
        y: "mean cosine".to_owned(),
        series: vec![line("text", text), line("shuffled", random)],
    }
}
