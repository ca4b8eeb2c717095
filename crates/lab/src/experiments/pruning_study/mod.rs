//! Pruning of weights: criteria, schedules and healing beside each other, and beside heads and
//! channels taken out.
//!
//! The study asks which criterion, schedule and training afterwards make models smaller at little
//! loss, and when a pruned model generalises better. Here a small decoder of characters is pruned by
//! five criteria at shares up to 95 %, in one shot and in rounds, with and without training
//! afterwards, by a sixth that is learned in that training, and with zeros that change places in it; and a classifier that has learned wrong labels by heart, beside the same one trained on
//! for as many steps.

mod exact;
mod language;
mod noise;

use super::after_training;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use language::{Curves, MOVEMENT, STRUCTURED, Way};

/// Criteria, by the names of their methods.
const CRITERIA: [&str; 5] = [
    "random-weights",
    "magnitude",
    "first-order",
    "wanda",
    "second-order",
];

/// Shares at which nothing is trained afterwards.
const PLAIN: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95];
/// Shares that are healed.
const HEALED: [f64; 3] = [0.5, 0.7, 0.9];
/// Shares that are healed in rounds as well.
const IN_ROUNDS: [f64; 2] = [0.7, 0.9];
/// Shares of weights beyond which the smallest are claimed to cost less than random ones.
const BEYOND: f64 = 0.3;
/// Rise of the loss at which a model counts as hurt.
const HURT: f64 = 1.05;

/// How much is trained and measured.
#[derive(Clone, Copy, Debug)]
struct Size {
    blocks: usize,
    width: usize,
    steps: u64,
    healing: u64,
    rounds: usize,
    calibration: usize,
    tests: usize,
    seeds: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                blocks: 2,
                width: 16,
                steps: 3,
                healing: 2,
                rounds: 2,
                calibration: 4,
                tests: 4,
                seeds: 1,
            },
            Scale::Small => Self {
                blocks: 4,
                width: 64,
                steps: 300,
                healing: 40,
                rounds: 4,
                calibration: 16,
                tests: 32,
                seeds: 3,
            },
            Scale::Full => Self {
                blocks: 4,
                width: 128,
                steps: 3000,
                healing: 300,
                rounds: 6,
                calibration: 128,
                tests: 200,
                seeds: 5,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let seeds = (0..size.seeds).map(|seed| setting.seed.wrapping_add(seed));
    let mut curves = Curves::default();
    for seed in seeds.clone() {
        curves.add(language::curves(size, setting, seed)?);
    }
    let noisy = seeds
        .map(|seed| noise::curve(setting.scale, seed))
        .collect::<Result<Vec<_>>>()?;
    let exact = exact::measured(setting.seed)?;
    Ok(Reproduction {
        setting: format!(
            "{}; decoder of {} blocks, width {}, {} steps; {} windows to calibrate on; {} steps of \
             healing at rate {}, {} rounds; {} seeds; dense {:.4} nats, with {} further steps {:.4}; {}",
            curves.text,
            size.blocks,
            size.width,
            size.steps,
            size.calibration,
            size.healing,
            language::RATE,
            size.rounds,
            size.seeds,
            curves.dense(),
            size.healing,
            curves.control(),
            noise::describe(setting.scale),
        ),
        claims: claims(setting.scale, &curves, &noisy, &exact),
        plots: plots(&curves, &noisy),
        ..Reproduction::default()
    })
}

fn claims(
    scale: Scale,
    curves: &Curves,
    noisy: &[noise::Curve],
    exact: &exact::Exact,
) -> Vec<Claim> {
    let [one, rows] = exact.rows;
    let mut claims = vec![
        Claim::new(
            "weights that were pruned are exactly zero after training with momentum and decay",
            "exact",
            format!(
                "{} of {} zeros changed over {} steps, and {} other weights",
                exact.changed, exact.zeros, exact.steps, exact.trained
            ),
            Verdict::of(exact.changed == 0 && exact.zeros > 0 && exact.trained > 0),
        ),
        Claim::new(
            "the rise of the error when one weight is taken out is w² / [H⁻¹]_qq, and no other weights \
             of its row do better",
            "exact",
            format!(
                "one weight out of {one} of {rows} rows; relative difference {:.1e}; largest gradient of what is \
                 left {:.1e}",
                exact.rise, exact.gradient
            ),
            Verdict::of(exact.rise < 1e-9 && exact.gradient < 1e-9 && one == rows && rows > 0),
        ),
    ];
    claims.extend([
        beats_random(scale, curves),
        healing_moves_the_point(scale, curves),
        rounds_do_no_worse(scale, curves),
        rounds_alone(scale, curves),
        movement_wins_where_little_is_left(scale, curves),
        regrowth_does_no_worse(scale, curves),
        single_weights_cost_less(scale, curves),
        aware_beats_magnitude(scale, curves),
        generalises(scale, noisy),
    ]);
    claims
}

fn beats_random(scale: Scale, curves: &Curves) -> Claim {
    let beyond: Vec<f64> = PLAIN.into_iter().filter(|share| *share > BEYOND).collect();
    let loss = |criterion: &str, share: f64| curves.loss(criterion, Way::Plain, share);
    let less = |share: &&f64| loss("magnitude", **share) < loss("random-weights", **share);
    let count = beyond.iter().filter(less).count();
    let dense = curves.dense();
    let half = (loss("magnitude", 0.5) - dense) / (loss("random-weights", 0.5) - dense);
    Claim::new(
        "the smallest weights cost far less than random ones at every share beyond 30 %",
        "magnitude ≪ random (estimate)",
        format!(
            "less at {count} of {} shares; at 50 % {:.1} % of what random ones cost",
            beyond.len(),
            100.0 * half
        ),
        after_training(scale, count == beyond.len() && half < 0.5),
    )
    .noted("without training afterwards; far less is counted as less than half at 50 %")
}

fn healing_moves_the_point(scale: Scale, curves: &Curves) -> Claim {
    let point = |way: Way, dense: f64| curves.hurt("magnitude", way, dense);
    let before = point(Way::Plain, curves.dense());
    let after = point(Way::Healed, curves.control());
    let own = point(Way::Healed, curves.dense());
    let told = |(share, hurt): (f64, bool)| {
        let beyond = if hurt { "" } else { "beyond " };
        format!("{beyond}{:.0} %", 100.0 * share)
    };
    let within =
        |(share, hurt): (f64, bool), low: f64, high: f64| hurt && (low..=high).contains(&share);
    Claim::new(
        "training afterwards moves the share at which the loss has risen by 5 % from 30–50 % to 70–80 %",
        "from about 30–50 % to about 70–80 % (estimate)",
        format!(
            "magnitude: from {} to {}, against a dense model trained on for as long",
            told(before),
            told(after)
        ),
        after_training(
            scale,
            within(before, 0.3, 0.5) && within(after, 0.7, 0.8),
        ),
    )
    .noted(format!(
        "against the dense model before its further steps {}",
        told(own)
    ))
}

fn rounds_do_no_worse(scale: Scale, curves: &Curves) -> Claim {
    let pairs = CRITERIA
        .iter()
        .flat_map(|criterion| IN_ROUNDS.map(|share| (*criterion, share)));
    let no_worse = |pair: &(&str, f64)| {
        let (criterion, share) = *pair;
        curves.loss(criterion, Way::Rounds, share) <= curves.loss(criterion, Way::Healed, share)
    };
    let all = pairs.clone().count();
    let count = pairs.filter(no_worse).count();
    let [one, many, rewound] =
        [Way::Healed, Way::Rounds, Way::Rewound].map(|way| curves.loss("magnitude", way, 0.9));
    Claim::new(
        "rounds are no worse than one shot with as many steps at 70 % and more",
        "iterative ≥ one-shot at ≥ 70 % (estimate)",
        format!(
            "at {count} of {all} pairs of criterion and share; magnitude at 90 %: one shot {one:.3}, \
             rounds {many:.3}"
        ),
        after_training(scale, count == all),
    )
    .noted(format!(
        "rounds whose weights go back to those of a tenth of the training: {rewound:.3}"
    ))
}

fn rounds_alone(scale: Scale, curves: &Curves) -> Claim {
    let pairs = CRITERIA
        .iter()
        .flat_map(|criterion| IN_ROUNDS.map(|share| (*criterion, share)));
    let losses = pairs.map(|(criterion, share)| {
        let [once, rounds] = [Way::Plain, Way::Alone].map(|way| curves.loss(criterion, way, share));
        (criterion, share, once, rounds)
    });
    let losses: Vec<_> = losses.collect();
    let no_worse = losses.iter().filter(|(.., once, rounds)| rounds <= once);
    let count = no_worse.count();
    let listed = losses.iter().filter(|(_, share, ..)| *share == 0.7);
    let listed = listed.map(|(criterion, _, once, rounds)| {
        format!("{criterion} {once:.3} in one shot, {rounds:.3} in rounds")
    });
    Claim::new(
        "rounds are no worse than one shot at 70 % and more, also without training in between",
        "iterative ≥ one-shot at ≥ 70 % (estimate)",
        format!(
            "at {count} of {} pairs of criterion and share; at 70 %: {}",
            losses.len(),
            listed.collect::<Vec<_>>().join("; ")
        ),
        after_training(scale, count == losses.len()),
    )
    .noted("scores that need no text are the same in every round")
}

fn movement_wins_where_little_is_left(scale: Scale, curves: &Curves) -> Claim {
    let losses = HEALED.map(|share| {
        let [moved, magnitude] =
            [MOVEMENT, "magnitude"].map(|name| curves.loss(name, Way::Healed, share));
        format!("{:.0} %: {moved:.3} against {magnitude:.3}", 100.0 * share)
    });
    let [moved, magnitude] =
        [MOVEMENT, "magnitude"].map(|name| curves.loss(name, Way::Healed, 0.9));
    Claim::new(
        "at 90 %, weights that training moves towards zero are better ones to prune than small ones that \
         are pruned first and trained around for as many steps",
        "movement above magnitude at high sparsity when a pretrained model is fine-tuned (Sanh et al. 2020)",
        losses.join("; "),
        after_training(scale, moved < magnitude),
    )
    .noted("the training goes on with the text of the training before; nothing new is to be learned")
}

fn regrowth_does_no_worse(scale: Scale, curves: &Curves) -> Claim {
    let losses = HEALED.map(|share| {
        let [fixed, turned] =
            [Way::Healed, Way::Regrown].map(|way| curves.loss("magnitude", way, share));
        (share, fixed, turned)
    });
    let count = losses
        .iter()
        .filter(|(_, fixed, turned)| turned <= fixed)
        .count();
    let listed = losses.map(|(share, fixed, turned)| {
        format!("{:.0} %: {turned:.3} against {fixed:.3}", 100.0 * share)
    });
    Claim::new(
        "zeros that change places by gradient in the training afterwards are no worse than fixed ones",
        "dynamic above static sparse training (Evci et al. 2020)",
        listed.join("; "),
        after_training(scale, count == losses.len()),
    )
}

/// Losses at as many operations, those of single weights between measured points by a straight line.
fn single_weights_cost_less(scale: Scale, curves: &Curves) -> Claim {
    let all = curves.by_operations();
    let of = |name: &str| all.iter().find(|series| series.name == name);
    let single = of("magnitude").map_or(&[][..], |series| series.points.as_slice());
    let whole = STRUCTURED.iter().filter_map(|name| of(name));
    // The first point is the dense model's.
    let pairs = whole.flat_map(|series| {
        let points = series.points.iter().skip(1);
        points.filter_map(|(place, loss)| Some((*loss, between(single, *place)?)))
    });
    let pairs: Vec<(f64, f64)> = pairs.collect();
    let count = pairs
        .iter()
        .filter(|(whole, single)| single < whole)
        .count();
    let means = |of: fn(&(f64, f64)) -> f64| super::mean(pairs.iter().map(of));
    Claim::new(
        "at as many multiply-adds, zeros being left out, single weights cost less than whole heads and \
         channels",
        "estimate",
        format!(
            "at {count} of {} points; mean loss {:.3} against {:.3}",
            pairs.len(),
            means(|pair| pair.1),
            means(|pair| pair.0)
        ),
        after_training(scale, count == pairs.len() && count > 0),
    )
    .noted(
        "operations are counted, as a stand-in for energy; `lapidary bench sparse` measures from which share \
         on zeros save time",
    )
}

/// The height at `place` of a line through points whose places fall; nothing beyond them.
fn between(points: &[(f64, f64)], place: f64) -> Option<f64> {
    points.windows(2).find_map(|pair| match pair {
        [a, b] if a.0 >= place && place >= b.0 && a.0 > b.0 => {
            Some(a.1 + (a.0 - place) / (a.0 - b.0) * (b.1 - a.1))
        }
        _ => None,
    })
}

fn aware_beats_magnitude(scale: Scale, curves: &Curves) -> Claim {
    let loss = |criterion: &str, share: f64| curves.loss(criterion, Way::Plain, share);
    let less = |share: &&f64| loss("wanda", **share) < loss("magnitude", **share);
    let count = PLAIN.iter().filter(less).count();
    Claim::new(
        "magnitude in units of what a weight reads loses less than magnitude, without training",
        "activation-aware > magnitude without training (estimate)",
        format!(
            "at {count} of {} shares; at 50 %: wanda {:.3}, magnitude {:.3}",
            PLAIN.len(),
            loss("wanda", 0.5),
            loss("magnitude", 0.5)
        ),
        after_training(scale, count == PLAIN.len()),
    )
    .noted(format!(
        "second order with compensation {:.3}, first order {:.3}, random {:.3}",
        loss("second-order", 0.5),
        loss("first-order", 0.5),
        loss("random-weights", 0.5)
    ))
}

fn generalises(scale: Scale, noisy: &[noise::Curve]) -> Claim {
    let mean = |of: &dyn Fn(&noise::Curve) -> f64| super::mean(noisy.iter().map(of));
    let control = mean(&|curve| curve.control);
    let shares: Vec<f64> = noise::SHARES
        .into_iter()
        .filter(|share| (0.2..=0.6).contains(share))
        .collect();
    // What is chosen on the examples that it is measured on wins by chance alone.
    let chosen = shares
        .iter()
        .map(|share| (*share, mean(&|curve: &noise::Curve| curve.held_out(*share))));
    let share = chosen
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(f64::NAN, |(share, _)| share);
    let loss = mean(&|curve: &noise::Curve| curve.at(share));
    let wins = noisy.iter().filter(|curve| curve.at(share) < curve.control);
    Claim::new(
        "on few examples with wrong labels some share between 20 % and 60 %, trained afterwards, has a \
         lower test loss than the dense model trained for as many steps",
        "some pruned and fine-tuned models generalise better (abstract)",
        format!(
            "{loss:.4} at {:.0} %, dense {control:.4}; lower with {} of {} seeds",
            100.0 * share,
            wins.count(),
            noisy.len()
        ),
        after_training(scale, loss < control),
    )
    .noted(format!(
        "dense before its further steps {:.4}; the share is the best of {} on held-out examples, a tenth of them \
         with wrong labels too, which also decide when training is best",
        mean(&|curve| curve.dense),
        shares.len()
    ))
}

fn plots(curves: &Curves, noisy: &[noise::Curve]) -> Vec<Plot> {
    let against_sparsity = |title: &str, way: Way, dense: f64| Plot {
        title: title.to_owned(),
        x: "share of weights pruned".to_owned(),
        y: "held-out loss, nats".to_owned(),
        series: CRITERIA
            .iter()
            .map(|criterion| Series {
                name: (*criterion).to_owned(),
                points: std::iter::once((0.0, dense))
                    .chain(curves.curve(criterion, way))
                    .collect(),
            })
            .collect(),
    };
    let seeds = noisy.len() as f64;
    let of_noise = noise::SHARES.map(|share| {
        let sum: f64 = noisy.iter().map(|curve| curve.at(share)).sum();
        (share, sum / seeds)
    });
    let control: f64 = noisy.iter().map(|curve| curve.control).sum();
    let mut healed = against_sparsity(
        "One shot, trained afterwards",
        Way::Healed,
        curves.control(),
    );
    for (name, method, way) in [
        ("movement", MOVEMENT, Way::Healed),
        (
            "magnitude, zeros changing places",
            "magnitude",
            Way::Regrown,
        ),
    ] {
        healed.series.push(Series {
            name: name.to_owned(),
            points: std::iter::once((0.0, curves.control()))
                .chain(curves.curve(method, way))
                .collect(),
        });
    }
    vec![
        against_sparsity("One shot, no training", Way::Plain, curves.dense()),
        healed,
        Plot {
            title: "Loss against operations, zeros left out, no training".to_owned(),
            x: "operations of a token, a multiply-add being two".to_owned(),
            y: "held-out loss, nats".to_owned(),
            series: curves.by_operations(),
        },
        against_sparsity(
            "In rounds, trained in between",
            Way::Rounds,
            curves.control(),
        ),
        Plot {
            title: "Loss against bytes, each matrix stored as is smallest, no training".to_owned(),
            x: "bytes".to_owned(),
            y: "held-out loss, nats".to_owned(),
            series: curves.by_bytes(),
        },
        Plot {
            title: "Classifier with a tenth of its labels wrong".to_owned(),
            x: "share of weights pruned".to_owned(),
            y: "test loss, nats".to_owned(),
            series: vec![
                Series {
                    name: "pruned and trained".to_owned(),
                    points: of_noise.to_vec(),
                },
                Series {
                    name: "dense, trained for as long".to_owned(),
                    points: vec![(0.0, control / seeds), (0.95, control / seeds)],
                },
            ],
        },
    ]
}
