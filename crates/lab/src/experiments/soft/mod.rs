//! SOFT: how well landmarks stand for a Gaussian kernel, a small pyramid on images of digits, and what the
//! normalisation is worth where there are more tokens than in training.
//!
//! The paper trains on ImageNet. Here printed digits are enlarged, and a backbone of two stages names them.

mod pyramid;

use super::jobs::by_seed;
use super::sequences::{self, SIDE, exponent, quickest};
use super::{after_learning, after_training, mean, numbers};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_factor::{Matrix, frobenius_norm, thin_svd};
use lapidary_kernels::{DType, Device, Tensor, backward};
use lapidary_model::Initialiser;
use lapidary_parts::attention::mechanism::soft::{Landmarks, SoftSpec, regularised_inverse};
use lapidary_parts::attention::mechanism::{Describe, Heads, Mechanism};
use lapidary_parts::attention::{LocalFilter, MechanismSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::Mixing;
use lapidary_train::generator;
use pyramid::{HEADS, Images, Pyramid};
use rand::RngExt;
use std::collections::BTreeMap;

/// How much is done.
struct Size {
    images: usize,
    epochs: usize,
    seeds: u64,
    longest: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                images: 40,
                epochs: 1,
                seeds: 1,
                longest: 2048,
            },
            Scale::Small => Self {
                images: 1000,
                epochs: 40,
                seeds: 1,
                longest: 16_384,
            },
            Scale::Full => Self {
                images: 8000,
                epochs: 20,
                seeds: 3,
                longest: 65_536,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    setting.tell(|| "how far the factored kernel is from the whole".to_owned());
    let mut claims = approximation(setting)?;
    claims.push(gradient(setting)?);
    setting.tell(|| "operations and time by length".to_owned());
    let (growth, plot) = growth(&size)?;
    claims.push(growth);
    claims.extend(on_images(setting, &size)?);
    Ok(Reproduction {
        setting: format!(
            "kernels of 1024 tokens of 32 smooth features with 64 landmarks; {} images of printed digits of 32 \
             by 32 pixels, {} epochs, a pyramid of two stages of width 32 and 64, {} seeds",
            size.images, size.epochs, size.seeds
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

/// Tokens of a square grid, each feature a sum of eight slow cosines of the place and a twentieth of noise.
fn smooth_tokens(side: usize, width: usize, seed: u64) -> Result<Vec<Vec<f64>>> {
    let mut random = generator(seed);
    let waves: Vec<Vec<[f64; 3]>> = (0..width)
        .map(|_| {
            let wave = |_| {
                let slope = |random: &mut lapidary_train::Generator| random.random_range(-2.0..2.0);
                [
                    slope(&mut random),
                    slope(&mut random),
                    random.random_range(0.0..std::f64::consts::TAU),
                ]
            };
            (0..8).map(wave).collect()
        })
        .collect();
    let shape = [side * side, width];
    let mut source = Initialiser::new(seed, DType::F64, Device::Cpu);
    let noise = numbers(&source.parameter("noise", &shape, Init::Normal { deviation: 0.05 })?)?;
    let token = |at: usize| -> Vec<f64> {
        let place = [
            (at / side) as f64 / side as f64,
            (at % side) as f64 / side as f64,
        ];
        let feature = |(feature, waves): (usize, &Vec<[f64; 3]>)| {
            let sum: f64 = waves
                .iter()
                .map(|[a, b, phase]| {
                    let [y, x] = place;
                    (std::f64::consts::TAU * (a * y + b * x) / 2.0 + phase).cos()
                })
                .sum();
            // Eight cosines have the variance 4.
            sum / 2.0 + noise.get(at * width + feature).copied().unwrap_or(0.0)
        };
        waves.iter().enumerate().map(feature).collect()
    };
    Ok((0..side * side).map(token).collect())
}

fn heads(heads: usize, head_width: usize) -> Heads {
    Heads {
        width: heads * head_width,
        heads,
        head_width,
        value_width: head_width,
        causal: false,
        scale: 1.0 / (head_width as f64).sqrt(),
        sharing: QueryKeySharing::QueryKey,
    }
}

fn module(spec: &SoftSpec, heads: &Heads) -> Result<Box<dyn Mechanism>> {
    let mut source = Initialiser::new(1, DType::F32, Device::Cpu);
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    Ok(spec.build(heads, Parameters::new(&mut source, &ranks, &mut linears))?)
}

fn mixing(spec: &SoftSpec, heads: &Heads, q: &Tensor) -> Result<Box<dyn Mixing>> {
    let tokens = engine(q.narrow(1, 0, 1))?;
    mixing_alone(
        module(spec, heads)?.as_ref(),
        [q, q],
        &engine(tokens.squeeze(1))?,
        None,
    )
}

fn relative(found: &Matrix, exact: &Matrix) -> f64 {
    frobenius_norm((found - exact).as_ref()) / frobenius_norm(exact.as_ref())
}

/// Rows of exponentials of products, divided by their sums.
fn softmax(q: &Matrix, k: &Matrix, scale: f64) -> Matrix {
    let scores = q * k.transpose();
    let (rows, columns) = (scores.nrows(), scores.ncols());
    let most = |i: usize| {
        (0..columns)
            .map(|j| scores[(i, j)])
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let most: Vec<f64> = (0..rows).map(most).collect();
    let raised = |i: usize, j: usize| {
        let most = most.get(i).copied().unwrap_or(0.0);
        (scale * (scores[(i, j)] - most)).exp()
    };
    let sum = |i: usize| (0..columns).map(|j| raised(i, j)).sum::<f64>();
    let sums: Vec<f64> = (0..rows).map(sum).collect();
    Matrix::from_fn(rows, columns, |i, j| {
        raised(i, j) / sums.get(i).copied().unwrap_or(1.0)
    })
}

/// The matrix `a⁺` with `a a⁺ a = a`, singular values below a millionth of the largest left out.
fn pseudo_inverse(a: &Matrix) -> Result<Matrix> {
    let found = thin_svd(a.as_ref())?;
    let largest = found.s.first().copied().unwrap_or(0.0);
    let inverse = |value: f64| {
        if value > 1e-6 * largest {
            1.0 / value
        } else {
            0.0
        }
    };
    let (size, rank) = (a.nrows(), found.s.len());
    let scaled = Matrix::from_fn(size, rank, |i, r| {
        found.vt[(r, i)] * found.s.get(r).copied().map_or(0.0, inverse)
    });
    Ok(scaled * found.u.transpose())
}

/// How far the factored kernel is from the whole, beside softmax with the same landmarks.
fn approximation(setting: &Setting) -> Result<Vec<Claim>> {
    const GRID: usize = 32;
    const WIDTH: usize = 32;
    const RATIO: usize = 4;
    let scale = 1.0 / (WIDTH as f64).sqrt();
    let tokens = smooth_tokens(GRID, WIDTH, setting.seed)?;
    let count = tokens.len();
    let entry = |i: usize, j: usize| {
        let row = tokens.get(i).map_or(&[][..], Vec::as_slice);
        row.get(j).copied().unwrap_or(0.0)
    };
    let q = Matrix::from_fn(count, WIDTH, entry);
    let gaussian = |i: usize, j: usize| {
        let squares: f64 = (0..WIDTH).map(|f| (q[(i, f)] - q[(j, f)]).powi(2)).sum();
        (-0.5 * scale * squares).exp()
    };
    let exact = Matrix::from_fn(count, count, gaussian);
    let flat = tokens.concat();
    let laid = engine(Tensor::from_vec(flat, (1, 1, count, WIDTH), &Device::Cpu))?;
    let spec = SoftSpec {
        columns: Some(GRID),
        normalised: false,
        ..SoftSpec::new(Landmarks::Mean { ratio: RATIO })
    };
    let weights = numbers(&mixing(&spec, &heads(1, WIDTH), &laid)?.weights(&laid)?)?;
    let found = Matrix::from_fn(count, count, |i, j| {
        weights.get(i * count + j).copied().unwrap_or(f64::NAN)
    });
    let own = relative(&found, &exact);
    // The same windows for softmax.
    let across = GRID / RATIO;
    let pooled = Matrix::from_fn(across * across, WIDTH, |window, f| {
        let (top, left) = (window / across * RATIO, window % across * RATIO);
        let place = |at: usize| (top + at / RATIO) * GRID + left + at % RATIO;
        let sum: f64 = (0..RATIO * RATIO).map(|at| q[(place(at), f)]).sum();
        sum / (RATIO * RATIO) as f64
    });
    let dense = softmax(&q, &q, scale);
    let (left, middle) = (
        softmax(&q, &pooled, scale),
        softmax(&pooled, &pooled, scale),
    );
    let right = softmax(&pooled, &q, scale);
    let nystrom = left * pseudo_inverse(&middle)? * right;
    let other = relative(&nystrom, &dense);
    let told = format!("{own:.3}, softmax by the same landmarks {other:.3}");
    Ok(vec![
        Claim::new(
            "64 landmarks give the Gaussian kernel of 1024 smooth tokens within 0.2 of its norm",
            "estimate",
            told.clone(),
            Verdict::of(own < 0.2),
        )
        .noted("means of 4 by 4 windows, 20 steps of Newton's iteration with ε = 0.01"),
        Claim::new(
            "and are strictly closer than a Nyström approximation of softmax with as many",
            "estimate",
            told,
            Verdict::of(own < other),
        ),
    ])
}

/// Of the closed form, against the exact inverse's.
fn gradient(setting: &Setting) -> Result<Claim> {
    let mut source = Initialiser::new(setting.seed, DType::F64, Device::Cpu);
    let points = source.parameter("points", &[1, 1, 12, 6], Init::Normal { deviation: 1.0 })?;
    let kernel = |x: &Tensor| -> Result<Tensor> {
        let apart = engine(engine(x.unsqueeze(3))?.broadcast_sub(&engine(x.unsqueeze(2))?))?;
        let squares = engine(engine(apart.sqr())?.sum(4))?;
        engine(engine(squares * -0.5)?.exp())
    };
    let a = kernel(&points)?;
    let at = |i: usize, j: usize, by: f64| -> Result<f64> {
        let mut entries = numbers(&a)?;
        if let Some(entry) = entries.get_mut(i * 12 + j) {
            *entry += by;
        }
        let moved = engine(Tensor::from_vec(entries, (1, 1, 12, 12), &Device::Cpu))?;
        let inverse = regularised_inverse(&moved, 0.01, 40)?;
        super::number(&engine(engine(inverse.sqr())?.sum_all())?)
    };
    let variable = engine(lapidary_kernels::Var::from_tensor(&a))?;
    let inverse = regularised_inverse(variable.as_tensor(), 0.01, 40)?;
    let gradients = engine(backward(&engine(engine(inverse.sqr())?.sum_all())?))?;
    let found = match gradients.get(variable.as_tensor()) {
        Some(found) => numbers(found)?,
        None => Vec::new(),
    };
    let mut worst = 0f64;
    for (i, j) in [(0, 0), (1, 4), (7, 7), (3, 11)] {
        let numeric = (at(i, j, 1e-5)? - at(i, j, -1e-5)?) / 2e-5;
        let analytic = found.get(i * 12 + j).copied().unwrap_or(f64::NAN);
        worst = worst.max((analytic - numeric).abs() / numeric.abs().max(1.0));
    }
    Ok(Claim::new(
        "the gradient in closed form is that of finite differences, within 10⁻³",
        "exact for a converged inverse",
        format!("largest relative difference {worst:.1e}"),
        Verdict::of(worst < 1e-3),
    ))
}

/// Operations and time by length, with as many landmarks at each.
fn growth(size: &Size) -> Result<(Claim, Plot)> {
    const WIDTH: usize = 32;
    let heads = heads(1, WIDTH);
    let spec = SoftSpec::new(Landmarks::Segments { count: 32 });
    let queries = |length: usize| -> Result<Tensor> {
        let mut source = Initialiser::new(1, DType::F32, Device::Cpu);
        let shape = [1, 1, length, WIDTH];
        Ok(source.parameter("q", &shape, Init::Normal { deviation: 0.5 })?)
    };
    // Lengths at which the landmarks' inverse, which is the same at each, no longer counts.
    let mut operations = Vec::new();
    for length in [4096, 8192, 16_384] {
        let counted = mixing(&spec, &heads, &queries(length)?)?.operations(WIDTH);
        operations.push((length as f64, counted as f64));
    }
    let mut seconds = Vec::new();
    let lengths = std::iter::successors(Some(size.longest / 4), |length| Some(2 * length));
    for length in lengths.take_while(|length| *length <= size.longest) {
        let q = queries(length)?;
        let best = quickest(3, || {
            mixing(&spec, &heads, &q)?.mix(&q)?;
            Ok(())
        })?;
        seconds.push((length as f64, 1e3 * best));
    }
    let (slope, time) = (exponent(&operations), exponent(&seconds));
    let claim = Claim::new(
        "operations grow linearly with the length for as many landmarks: exponent within 0.15 of 1",
        "linear",
        format!(
            "exponent {slope:.3} of operations from 4096 tokens on, {time:.2} of time to {}, 32 landmarks",
            size.longest
        ),
        Verdict::of((slope - 1.0).abs() < 0.15),
    );
    let plot = Plot {
        title: "Time of SOFT, one head of 32 features, 32 landmarks".to_owned(),
        x: "tokens".to_owned(),
        y: "milliseconds".to_owned(),
        series: vec![Series {
            name: "soft".to_owned(),
            points: seconds,
        }],
    };
    Ok((claim, plot))
}

/// Printed digits of 8 by 8 pixels.
fn images(count: usize, seed: u64) -> Images {
    let examples = sequences::digits(count, seed);
    let level = |token: &u32| *token as f32 / (sequences::LEVELS - 1) as f32;
    Images {
        side: SIDE,
        pixels: examples
            .iter()
            .map(|e| e.tokens.iter().map(level).collect())
            .collect(),
        labels: examples.iter().map(|e| e.label).collect(),
    }
}

/// Height and width of the filter that each head of the first stage has beside its attention, whatever that is.
const FILTER: usize = 5;

/// The first stage's attention by name, for a grid of so many columns.
fn ways(columns: usize) -> [(&'static str, MultiHeadSpec); 3] {
    let [count, _] = HEADS;
    let softmax = MultiHeadSpec {
        local: Some(LocalFilter {
            side: FILTER,
            columns: Some(columns),
        }),
        ..MultiHeadSpec::new(count)
    };
    let soft = |normalised| MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        mechanism: MechanismSpec::Soft(SoftSpec {
            columns: Some(columns),
            local: Some(FILTER),
            normalised,
            ..SoftSpec::new(Landmarks::Convolution { ratio: 4 })
        }),
        ..MultiHeadSpec::new(count)
    };
    [
        ("softmax", softmax),
        ("normalised", soft(true)),
        ("as it comes", soft(false)),
    ]
}

/// What a way did.
struct Row {
    right: f64,
    larger: f64,
    growth: f64,
    peak: f64,
}

impl Row {
    fn mean(rows: &[Self]) -> Self {
        let of = |number: fn(&Self) -> f64| mean(rows.iter().map(number));
        Self {
            right: of(|row| row.right),
            larger: of(|row| row.larger),
            growth: of(|row| row.growth),
            peak: of(|row| row.peak),
        }
    }
}

fn on_images(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    const TIMES: usize = 4;
    let steps = (size.images * size.epochs).div_ceil(32) as u64;
    // The second one with the same weights; columns are of the grid, and no parameter.
    let both: Vec<_> = ways(16)
        .into_iter()
        .zip(ways(32))
        .map(|((name, usual), (_, wide))| (name, [usual, wide]))
        .collect();
    let rows = by_seed(
        setting,
        "digits",
        &both,
        size.seeds,
        |[usual, wide], seed| {
            let training = images(size.images, seed).enlarged(TIMES);
            let held_out = images((size.images / 2).max(20), seed ^ 0xd161);
            let model = Pyramid::new(training.side, usual, seed)?;
            model.train(&training, steps, 2e-3, seed)?;
            let seen = held_out.enlarged(TIMES);
            let [right, length] = model.measure(&seen)?;
            let wide = model.on_another_grid(wide)?;
            let [larger, further] = wide.measure(&held_out.enlarged(2 * TIMES))?;
            Ok(Row {
                right,
                larger,
                growth: further / length,
                peak: model.peak(&seen)? as f64,
            })
        },
    )?;
    let of = |name: &str| {
        let found = rows.iter().find(|(known, _)| *known == name);
        Row::mean(found.map_or(&[], |(_, rows)| rows.as_slice()))
    };
    let (dense, soft, bare) = (of("softmax"), of("normalised"), of("as it comes"));
    let saved = dense.peak / soft.peak;
    // Three times what guessing gives.
    let learned = dense.right >= 30.0;
    Ok(vec![
        Claim::new(
            "digits of 32 by 32 pixels: SOFT comes within a point of softmax in the same pyramid",
            "ImageNet: SOFT-Tiny 79.4 of its kind of backbone",
            format!(
                "{:.1} % normalised, {:.1} % not, {:.1} % softmax",
                soft.right, bare.right, dense.right
            ),
            after_learning(setting.scale, learned, soft.right >= dense.right - 1.0),
        )
        .noted("each has a filter of 5 by 5 tokens for each head beside it"),
        Claim::new(
            "and holds at least 1.5 times less at once",
            "memory linear in the length",
            format!(
                "{:.2} MiB, softmax {:.2} MiB: {saved:.2} times less",
                soft.peak / (1 << 20) as f64,
                dense.peak / (1 << 20) as f64
            ),
            after_training(setting.scale, saved >= 1.5),
        )
        .noted("softmax here never holds its weights"),
        Claim::new(
            "trained at 32 by 32 and asked at 64 by 64, what attention mixes grows without the normalisation",
            "features blow up",
            format!(
                "{:.2} times as long, {:.2} with it",
                bare.growth, soft.growth
            ),
            after_training(
                setting.scale,
                bare.growth > 1.5 && soft.growth < bare.growth,
            ),
        ),
        Claim::new(
            "and the normalised form loses less of what it names",
            "dense prediction works with it alone",
            format!(
                "{:.1} → {:.1} % normalised, {:.1} → {:.1} % not, {:.1} → {:.1} % softmax",
                soft.right, soft.larger, bare.right, bare.larger, dense.right, dense.larger
            ),
            after_learning(
                setting.scale,
                learned,
                soft.right - soft.larger < bare.right - bare.larger,
            ),
        ),
    ])
}
