//! Linformer: what softmax's weights have of rank, random projections, and how many slots an encoder
//! needs.
//!
//! The paper trains RoBERTa. Here a small encoder names hidden tokens, at equal steps for every number
//! of slots and way of sharing.

use super::masked::{self, Study, text};
use super::sequences::{Course, LEVELS, Measures, SIDE, digits, percent_right, quickest, train};
use super::{after_learning, after_training, mean, numbers};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_factor::{Matrix, frobenius_norm, thin_svd};
use lapidary_kernels::{
    AdamW, AdamWOptions, AttentionOptions, DType, Device, Tensor, Var, attention, backward,
};
use lapidary_model::{HeadSpec, Initialiser, Input, Pass};
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::linformer::{LinformerSpec, Sharing};
use lapidary_parts::attention::mechanism::{Describe, Heads};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::Trace;
use std::collections::BTreeMap;

/// How much is done.
struct Size {
    masked: masked::Course,
    slots: &'static [usize],
    sharings: &'static [Sharing],
    digits: usize,
    digit_steps: u64,
    draws: usize,
    /// Lengths that projections are fitted at, and steps of each fit.
    fitted: &'static [usize],
    fit_steps: usize,
    longest: usize,
}

impl Size {
    fn of(setting: &Setting) -> Self {
        let masked = masked::Course {
            steps: 300,
            batch: 4,
            length: 128,
            hidden: 0.15,
            rate: 3e-3,
            questions: 20,
            seed: setting.seed,
        };
        const ALL: &[Sharing] = &[
            Sharing::None,
            Sharing::Headwise,
            Sharing::KeyValue,
            Sharing::Layerwise,
        ];
        match setting.scale {
            Scale::Smoke => Self {
                masked: masked::Course {
                    steps: 1,
                    batch: 2,
                    length: 32,
                    questions: 1,
                    ..masked
                },
                slots: &[8],
                sharings: &[Sharing::Headwise],
                digits: 40,
                digit_steps: 2,
                draws: 20,
                fitted: &[64, 128],
                fit_steps: 5,
                longest: 512,
            },
            Scale::Small => Self {
                masked,
                slots: &[8, 16, 32, 64],
                sharings: ALL,
                digits: 4000,
                digit_steps: 400,
                draws: 40,
                fitted: &[128, 512, 2048],
                fit_steps: 300,
                longest: 4096,
            },
            Scale::Full => Self {
                masked: masked::Course {
                    steps: 10_000,
                    batch: 16,
                    length: 256,
                    ..masked
                },
                slots: &[16, 32, 64, 128],
                sharings: ALL,
                digits: 20_000,
                digit_steps: 4000,
                draws: 200,
                fitted: &[128, 512, 2048, 8192],
                fit_steps: 2000,
                longest: 16_384,
            },
        }
    }
}

fn mechanism(slots: usize, longest: usize, sharing: Sharing) -> MechanismSpec {
    MechanismSpec::Linformer(LinformerSpec {
        sharing,
        ..LinformerSpec::new(slots, longest)
    })
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting);
    let mut claims = projections(setting, &size)?;
    let (fitted, fits) = fitted(setting, &size)?;
    claims.push(fitted);
    let (what, more, mut plots) = on_hidden_tokens(setting, &size)?;
    plots.push(fits);
    claims.extend(more);
    claims.push(on_digits(setting, &size)?);
    claims.push(speed(setting, &size)?);
    Ok(Reproduction {
        setting: format!(
            "hidden tokens of {what}, 2 blocks of width 48 with 4 heads, {} steps of {} windows of {}; \
             printed digits as {} pixels, {} steps of 32; one seed",
            size.masked.steps,
            size.masked.batch,
            size.masked.length,
            SIDE * SIDE,
            size.digit_steps
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

/// Normal numbers with this deviation.
fn normal(rows: usize, columns: usize, deviation: f64, seed: u64) -> Result<Matrix> {
    let mut source = Initialiser::new(seed, DType::F64, Device::Cpu);
    let drawn = source.parameter("draw", &[rows, columns], Init::Normal { deviation })?;
    Ok(lapidary_factor::matrix_from_tensor("draw", &drawn)?)
}

fn softmax_rows(scores: &Matrix) -> Matrix {
    let mut weights = scores.clone();
    for i in 0..weights.nrows() {
        let most = (0..weights.ncols())
            .map(|j| weights[(i, j)])
            .fold(f64::NEG_INFINITY, f64::max);
        let mut sum = 0.0;
        for j in 0..weights.ncols() {
            weights[(i, j)] = (weights[(i, j)] - most).exp();
            sum += weights[(i, j)];
        }
        for j in 0..weights.ncols() {
            weights[(i, j)] /= sum;
        }
    }
    weights
}

/// `‖P Rᵀ R V − P V‖` of one row of a softmax, relative to `‖P‖ ‖V‖₂`, and what the paper's random
/// construction for its second theorem gives, relative to what zeros would.
fn projections(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    const WIDTH: usize = 16;
    let one = |length: usize, slots: usize, seed: u64| -> Result<[f64; 2]> {
        let q = normal(1, WIDTH, 1.0, seed)?;
        let k = normal(length, WIDTH, 1.0, seed + 1)?;
        let v = normal(length, WIDTH, 1.0, seed + 2)?;
        let r = normal(slots, length, 1.0 / (slots as f64).sqrt(), seed + 3)?;
        let scores = &q * k.transpose();
        let scores = Matrix::from_fn(1, length, |i, j| scores[(i, j)] / (WIDTH as f64).sqrt());
        let p = softmax_rows(&scores);
        let norm = |m: &Matrix| frobenius_norm(m.as_ref());
        let exact = &p * &v;
        let spectral = thin_svd(v.as_ref())?.s.first().copied().unwrap_or(1.0);
        let projected = (&p * r.transpose()) * (&r * &v);
        let first = norm(&(projected - &exact)) / (norm(&p) * spectral);
        // E = δ R and F = e^{−δ} R, as the theorem's construction has them.
        let delta = 0.1;
        let slots_scores = &scores * r.transpose();
        let slots_scores = Matrix::from_fn(1, slots, |i, j| delta * slots_scores[(i, j)]);
        let values = &r * &v;
        let weights = softmax_rows(&slots_scores);
        let constructed = weights * values;
        let constructed = Matrix::from_fn(1, WIDTH, |i, j| (-delta).exp() * constructed[(i, j)]);
        Ok([first, norm(&(constructed - &exact)) / norm(&exact)])
    };
    let average = |length: usize, slots: usize| -> Result<[f64; 2]> {
        let mut each = [Vec::new(), Vec::new()];
        for draw in 0..size.draws as u64 {
            let seed = setting.seed.wrapping_add(1000 * draw);
            for (all, found) in each.iter_mut().zip(one(length, slots, seed)?) {
                all.push(found);
            }
        }
        Ok(each.map(mean))
    };
    let [few, _] = average(512, 64)?;
    let [many, constructed] = average(512, 256)?;
    let [longer, _] = average(2048, 64)?;
    let halves = (few / many / 2.0 - 1.0).abs() < 0.15;
    let steady = longer < 1.15 * few;
    Ok(vec![
        Claim::new(
            "random projections of a softmax's rows err by 1/√k, whatever the length",
            "theorem (Johnson–Lindenstrauss); 0.43 at k = 64 and 0.22 at 256 computed for width 16",
            format!("{few:.3} at k = 64, {many:.3} at 256; {longer:.3} at k = 64 of 2048 tokens"),
            Verdict::of(halves && steady),
        )
        .noted("relative to ‖P‖ ‖V‖₂; rows of softmax on normal queries and keys of width 16, 512 tokens"),
        Claim::new(
            "the random construction behind the second theorem, E = δR and F = e^{−δ}R, is itself no \
             approximation: it errs by more than zeros would",
            "the theorem says that projections exist; the construction is of its proof",
            format!("{constructed:.1} times the norm of the output, k = 256, δ = 0.1"),
            Verdict::of(constructed > 1.0),
        )
        .noted("the layer learns its projections"),
    ])
}

/// The second theorem by search in place of its construction: `E` and `F` fitted to one softmax. Any
/// projected keys and values are those of some `E` and `F`, so that they are fitted themselves.
fn fitted(setting: &Setting, size: &Size) -> Result<(Claim, Plot)> {
    const WIDTH: usize = 16;
    const SLOTS: [usize; 5] = [4, 8, 16, 32, 64];
    const ENOUGH: f64 = 0.25;
    let drawn = |rows: usize, deviation: f64, seed: u64| -> Result<Tensor> {
        let mut source = Initialiser::new(seed, DType::F64, Device::Cpu);
        let shape = [1, 1, rows, WIDTH];
        Ok(source.parameter("draw", &shape, Init::Normal { deviation })?)
    };
    let options = AttentionOptions::new(WIDTH);
    let error_of = |length: usize, slots: usize| -> Result<f64> {
        let seed = setting.seed.wrapping_add(length as u64);
        let [q, k, v] = [
            drawn(length, 1.0, seed)?,
            drawn(length, 1.0, seed + 1)?,
            drawn(length, 1.0, seed + 2)?,
        ];
        let exact = attention(&q, &k, &v, &options)?;
        let power = engine(engine(exact.sqr())?.mean_all())?;
        let [keys, values] = [drawn(slots, 1.0, seed + 3)?, drawn(slots, 0.1, seed + 4)?];
        let [keys, values] = [
            engine(Var::from_tensor(&keys))?,
            engine(Var::from_tensor(&values))?,
        ];
        let mut optimiser =
            AdamW::new(vec![keys.clone(), values.clone()], AdamWOptions::default())?;
        let mut best = f64::INFINITY;
        for step in 0..size.fit_steps {
            let mixed = attention(&q, keys.as_tensor(), values.as_tensor(), &options)?;
            let apart = engine(engine(engine(mixed - &exact)?.sqr())?.mean_all())?;
            let share = engine(apart / &power)?;
            best = best.min(engine(share.to_scalar::<f64>())?.sqrt());
            // Down to nothing at the end.
            let left = 1.0 - step as f64 / size.fit_steps as f64;
            optimiser.step(&engine(backward(&share))?, 0.05 * left, 1.0)?;
        }
        Ok(best)
    };
    let (mut needed, mut series, mut told) = (Vec::new(), Vec::new(), Vec::new());
    for &length in size.fitted {
        let errors = SLOTS.iter().map(|slots| error_of(length, *slots));
        let errors = errors.collect::<Result<Vec<_>>>()?;
        let first = SLOTS
            .iter()
            .zip(&errors)
            .find(|(_, error)| **error <= ENOUGH);
        needed.push(first.map(|(slots, _)| *slots));
        let each: Vec<String> = errors.iter().map(|error| format!("{error:.2}")).collect();
        told.push(format!("{length} tokens {}", each.join(", ")));
        series.push(Series {
            name: format!("{length} tokens"),
            points: SLOTS
                .iter()
                .map(|slots| *slots as f64)
                .zip(errors)
                .collect(),
        });
    }
    let few = match (needed.first(), needed.last()) {
        (Some(Some(short)), Some(Some(long))) => long <= &(2 * short),
        _ => false,
    };
    let claim = Claim::new(
        "with projections that are fitted, the slots that an error needs hardly grow with the length",
        "theorem: k of order min(d ln d, ln n) / ε², whatever the length",
        format!("relative errors at {SLOTS:?} slots: {}", told.join("; ")),
        after_training(setting.scale, few),
    )
    .noted("slots for an error of 0.25 at most doubled from the shortest to the longest; normal queries, keys and values of width 16");
    let plot = Plot {
        title: "Error of fitted projections of one softmax".to_owned(),
        x: "slots".to_owned(),
        y: "relative error".to_owned(),
        series,
    };
    Ok((claim, plot))
}

fn on_hidden_tokens(setting: &Setting, size: &Size) -> Result<(String, Vec<Claim>, Vec<Plot>)> {
    let mut text = text(setting)?;
    let measures = Measures {
        vocabulary: text.vocabulary + 1,
        length: size.masked.length,
        labels: 1,
        width: 48,
        heads: 4,
        blocks: 2,
    };
    let mut study = |mechanism: MechanismSpec| -> Result<Study> {
        let mut spec = measures.spec(mechanism, true);
        spec.head = HeadSpec::LanguageModel {
            tied: true,
            bias: true,
            transform: None,
        };
        text.study(spec, &size.masked)
    };
    let dense = study(MechanismSpec::Softmax)?;
    let mut losses: BTreeMap<(Sharing, usize), f64> = BTreeMap::new();
    for &sharing in size.sharings {
        for &slots in size.slots {
            let of = study(mechanism(slots, size.masked.length, sharing))?;
            losses.insert((sharing, slots), of.loss);
        }
    }
    let of = |sharing, slots| losses.get(&(sharing, slots)).copied().unwrap_or(f64::NAN);
    let row = |sharing: Sharing| {
        let each: Vec<String> = size
            .slots
            .iter()
            .map(|&k| format!("{:.3}", of(sharing, k)))
            .collect();
        format!("{sharing:?} {}", each.join(" "))
    };
    let table: Vec<String> = size.sharings.iter().map(|&sharing| row(sharing)).collect();
    let told = format!(
        "dense {:.3}; slots {:?}: {}",
        dense.loss,
        size.slots,
        table.join("; ")
    );
    let falls = size.sharings.iter().all(|&sharing| {
        size.slots
            .windows(2)
            .all(|w| matches!(w, [a, b] if of(sharing, *b) <= of(sharing, *a)))
    });
    let quarter = of(Sharing::Headwise, size.masked.length / 4);
    let apart = size
        .slots
        .iter()
        .map(|&k| (of(Sharing::Layerwise, k) - of(Sharing::Headwise, k)).abs());
    let apart = apart.fold(0.0, f64::max);
    let (spectrum, plot) = spectrum(&dense, text.windows(4, size.masked.length, setting.seed)?)?;
    let first = spectrum.first().copied().unwrap_or(f64::NAN);
    let last = spectrum.last().copied().unwrap_or(f64::NAN);
    let shares: Vec<String> = spectrum.iter().map(|share| format!("{share:.2}")).collect();
    let what = text.what.clone();
    // Slots cost nothing where there is nothing that they could.
    let learned = dense.has_learned();
    let after = |holds: bool| after_learning(setting.scale, learned, holds);
    let claims = [
        Claim::new(
            "the loss falls with the number of slots, for every way of sharing",
            "pre-training curves",
            told.clone(),
            after(falls),
        ),
        Claim::new(
            "with a quarter as many slots as tokens it is within 0.1 nats of dense attention",
            "k = 128 and 256 of 512: 91.75 and 92.08 against 92.25 on average (RoBERTa)",
            format!("{quarter:.3}, dense {:.3}", dense.loss),
            after(quarter <= dense.loss + 0.1),
        ),
        Claim::new(
            "one projection for all layers costs at most 0.03 nats",
            "layerwise 91.83 and 92.30 on average, as good as the others",
            format!("largest difference from headwise {apart:.3}"),
            after(apart <= 0.03),
        ),
        Claim::new(
            "a quarter of the singular values of dense attention's weights has at least 80 % of their sum, \
             and more in higher layers",
            "figure: long-tailed spectra, more so in higher layers",
            format!("by block: {}", shares.join(", ")),
            after(mean(spectrum.clone()) >= 0.8 && last > first),
        ),
    ];
    let note =
        "not measured unless dense attention names five points more than the most frequent token";
    let claims = claims.map(|claim| claim.noted(note));
    Ok((what, claims.into(), vec![plot]))
}

/// The share that the first quarter of singular values has of their sum, block by block, and the whole
/// curve.
fn spectrum(dense: &Study, windows: Tensor) -> Result<(Vec<f64>, Plot)> {
    let trace = Trace::new().capture("blocks.*.attention.weights")?;
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    dense.model.forward(&Input::tokens(windows), pass)?;
    let (mut shares, mut series) = (Vec::new(), Vec::new());
    for block in 0..dense.model.spec().expanded_blocks().len() {
        let weights = trace.signal(&format!("blocks.{block}.attention.weights"))?;
        let (batch, heads, length, _) = engine(weights.value().dims4())?;
        let values = numbers(weights.value())?;
        let mut curve = vec![0.0; length];
        for matrix in values.chunks_exact((length * length).max(1)) {
            let matrix = Matrix::from_fn(length, length, |i, j| matrix[i * length + j]);
            let singular = thin_svd(matrix.as_ref())?.s;
            let sum: f64 = singular.iter().sum();
            let mut so_far = 0.0;
            for (point, value) in curve.iter_mut().zip(&singular) {
                so_far += value / sum;
                *point += so_far / (batch * heads) as f64;
            }
        }
        shares.push(
            curve
                .get((length / 4).saturating_sub(1))
                .copied()
                .unwrap_or(f64::NAN),
        );
        series.push(Series {
            name: format!("block {block}"),
            points: (1..)
                .zip(&curve)
                .map(|(i, share)| (f64::from(i), *share))
                .collect(),
        });
    }
    Ok((
        shares,
        Plot {
            title: "Cumulative singular values of attention's weights".to_owned(),
            x: "singular values".to_owned(),
            y: "share of their sum".to_owned(),
            series,
        },
    ))
}

fn on_digits(setting: &Setting, size: &Size) -> Result<Claim> {
    let measures = Measures {
        vocabulary: LEVELS,
        length: SIDE * SIDE,
        labels: 10,
        width: 32,
        heads: 4,
        blocks: 2,
    };
    let training = digits(size.digits, setting.seed);
    let held_out = digits(size.digits / 4, setting.seed ^ 0xd161);
    let course = Course {
        steps: size.digit_steps,
        batch: 32,
        rate: 3e-3,
        seed: setting.seed,
    };
    let mut right = Vec::new();
    for mechanism in [
        MechanismSpec::Softmax,
        mechanism(16, SIDE * SIDE, Sharing::Headwise),
    ] {
        let model = train(measures.spec(mechanism, true), &training, &course)?;
        right.push(percent_right(&model, &held_out)?);
    }
    let (dense, own) = match right.as_slice() {
        [dense, own] => (*dense, *own),
        _ => (f64::NAN, f64::NAN),
    };
    Ok(Claim::new(
        "16 slots for 64 pixels come within 1.5 points of dense attention on digits",
        "estimate for this task",
        format!("{own:.1} %, dense {dense:.1} %"),
        after_training(setting.scale, own >= dense - 1.5),
    ))
}

fn speed(setting: &Setting, size: &Size) -> Result<Claim> {
    const WIDTH: usize = 64;
    let heads = Heads {
        width: 4 * WIDTH,
        heads: 4,
        head_width: WIDTH,
        value_width: WIDTH,
        causal: false,
        scale: 0.125,
        sharing: QueryKeySharing::None,
    };
    let spec = LinformerSpec::new(128, size.longest);
    let mut source = Initialiser::new(setting.seed, DType::F32, Device::Cpu);
    let shape = [1, 4, size.longest, WIDTH];
    let mut draw = |name: &str| source.parameter(name, &shape, Init::Normal { deviation: 1.0 });
    let (q, k, v) = (draw("q")?, draw("k")?, draw("v")?);
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let module = spec.build(&heads, Parameters::new(&mut source, &ranks, &mut linears))?;
    let own = quickest(3, || {
        mixing_alone(module.as_ref(), [&q, &k], &q, None)?.mix(&v)?;
        Ok(())
    })?;
    let dense = quickest(3, || {
        attention(&q, &k, &v, &AttentionOptions::new(WIDTH))?;
        Ok(())
    })?;
    let ratio = dense / own;
    Ok(Claim::new(
        "at 4096 tokens and 128 slots it is at least three times as fast as dense attention",
        "3.4 times at 4096, 20 times at 65536 (GPU)",
        format!(
            "{ratio:.1} times at {} tokens, of this program's own dense attention",
            size.longest
        ),
        after_training(setting.scale, ratio >= 3.0),
    )
    .noted("on a machine that may do other things besides"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_singular_value_of_a_stochastic_matrix_is_at_least_one() {
        let scores = normal(20, 20, 2.0, 3).unwrap();
        let p = softmax_rows(&scores);
        let singular = thin_svd(p.as_ref()).unwrap().s;
        assert!(singular[0] >= 1.0 - 1e-12);
        let squares: f64 = singular.iter().map(|s| s * s).sum();
        assert!((squares - frobenius_norm(p.as_ref()).powi(2)).abs() < 1e-10);
    }
}
