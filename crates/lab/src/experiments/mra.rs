//! MRA: how far blocks of two sizes are from softmax for as much work, beside other ways to save it; an
//! encoder of hidden tokens that is given them without and with further training; nested lists.
//!
//! The paper converts RoBERTa. Here a small encoder is trained with softmax first.

use super::jobs::means_by_seed;
use super::masked::{self, text};
use super::sequences::Measures;
use super::sequences::{exponent, list_operations, listed, of, on_lists_by};
use super::{after_learning, after_training, mean, numbers};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_factor::{Matrix, frobenius_norm, matrix_from_tensor, thin_svd};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{HeadSpec, Initialiser};
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::mra::MraSpec;
use lapidary_parts::attention::mechanism::{Describe, Heads, MechanismSpec};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::Mixing;
use std::collections::BTreeMap;

const HEAD_WIDTH: usize = 32;

/// How much is done.
struct Size {
    length: usize,
    block: usize,
    draws: u64,
    masked: masked::Course,
    /// Steps after the swap.
    further: u64,
    lists: (usize, u64),
    longest: usize,
}

impl Size {
    fn of(setting: &Setting) -> Self {
        let masked = masked::Course {
            steps: 600,
            batch: 4,
            length: 128,
            hidden: 0.15,
            rate: 3e-3,
            questions: 40,
            seed: setting.seed,
        };
        match setting.scale {
            Scale::Smoke => Self {
                length: 128,
                block: 8,
                draws: 1,
                masked: masked::Course {
                    steps: 1,
                    batch: 2,
                    length: 32,
                    questions: 1,
                    ..masked
                },
                further: 1,
                lists: (40, 1),
                longest: 2048,
            },
            Scale::Small => Self {
                length: 512,
                block: 32,
                draws: 4,
                masked,
                further: 200,
                lists: (8000, 500),
                longest: 8192,
            },
            Scale::Full => Self {
                length: 512,
                block: 32,
                draws: 16,
                masked: masked::Course {
                    steps: 20_000,
                    batch: 16,
                    length: 512,
                    ..masked
                },
                further: 200,
                lists: (90_000, 10_000),
                longest: 65_536,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting);
    let (mut claims, plot) = budgets(setting, &size)?;
    claims.push(exact(setting)?);
    claims.push(growth(&size)?);
    let (what, swapped) = on_hidden_tokens(setting, &size)?;
    claims.extend(swapped);
    claims.push(on_lists(setting, &size)?);
    Ok(Reproduction {
        setting: format!(
            "queries and keys of {} tokens that know their place and a few that all look at, blocks of {}, {} \
             draws; hidden tokens of {what}, 2 blocks of width 48 with 4 heads, {} steps of {} windows of {}, {} \
             further; {} nested lists, {} steps; one seed",
            size.length,
            size.block,
            size.draws,
            size.masked.steps,
            size.masked.batch,
            size.masked.length,
            size.further,
            size.lists.0,
            size.lists.1
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

fn heads() -> Heads {
    Heads {
        width: HEAD_WIDTH,
        heads: 1,
        head_width: HEAD_WIDTH,
        value_width: HEAD_WIDTH,
        causal: false,
        scale: 1.0 / (HEAD_WIDTH as f64).sqrt(),
        sharing: QueryKeySharing::None,
    }
}

fn mixing(spec: &MraSpec, q: &Tensor, k: &Tensor) -> Result<Box<dyn Mixing>> {
    let mut none: BTreeMap<String, Tensor> = BTreeMap::new();
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let module = spec.build(&heads(), Parameters::new(&mut none, &ranks, &mut linears))?;
    mixing_alone(module.as_ref(), [q, k], &engine(q.squeeze(1))?, None)
}

/// The keys that all queries look at.
fn all_look_at(token: usize) -> bool {
    token % 64 == 17
}

/// How much of `‖A‖²` is in the columns of the keys that all look at.
fn share_of_common(exact: &Matrix) -> f64 {
    let squares = |j: usize| {
        (0..exact.nrows())
            .map(|i| exact[(i, j)].powi(2))
            .sum::<f64>()
    };
    let common = (0..exact.ncols()).filter(|j| all_look_at(*j));
    common.map(squares).sum::<f64>() / frobenius_norm(exact.as_ref()).powi(2)
}

/// Queries and keys `[1, 1, length, width]`: slow waves of the place, noise, and for one key of 64 a direction
/// that all queries have something of.
fn tokens(length: usize, seed: u64) -> Result<[Tensor; 2]> {
    let mut source = Initialiser::new(seed, DType::F64, Device::Cpu);
    let shape = [length, HEAD_WIDTH];
    let mut draw = |name: &str, shape: &[usize], deviation: f64| -> Result<Vec<f64>> {
        numbers(&source.parameter(name, shape, Init::Normal { deviation })?)
    };
    let noise = [draw("q", &shape, 0.3)?, draw("k", &shape, 0.3)?];
    let direction = draw("direction", &[HEAD_WIDTH], 1.0)?;
    let made = |side: usize, noise: &[f64]| -> Result<Tensor> {
        let entry = |(at, noise): (usize, &f64)| {
            let (token, feature) = (at / HEAD_WIDTH, at % HEAD_WIDTH);
            let speed = 64f64.powf(-((feature / 2) as f64) / (HEAD_WIDTH / 2) as f64);
            let phase = token as f64 * speed;
            let wave = if feature % 2 == 0 {
                phase.cos()
            } else {
                phase.sin()
            };
            let common = match (side, all_look_at(token)) {
                (0, _) => 0.5,
                (_, true) => 3.0,
                (_, false) => 0.0,
            };
            let common = common * direction.get(feature).copied().unwrap_or(0.0);
            1.3 * wave + noise + common
        };
        let values: Vec<f64> = noise.iter().enumerate().map(entry).collect();
        engine(Tensor::from_vec(
            values,
            (1, 1, length, HEAD_WIDTH),
            &Device::Cpu,
        ))
    };
    let [q, k] = &noise;
    Ok([made(0, q)?, made(1, k)?])
}

fn weights(spec: &MraSpec, [q, k]: &[Tensor; 2]) -> Result<Matrix> {
    let weights = mixing(spec, q, k)?.weights(q)?;
    let length = engine(weights.dim(3))?;
    let weights = engine(weights.reshape((length, length)))?;
    Ok(matrix_from_tensor("weights", &weights)?)
}

/// `A = exp(scale · Q Kᵀ)`.
fn exponentials([q, k]: &[Tensor; 2]) -> Result<Matrix> {
    let across = engine(engine(k.transpose(2, 3))?.contiguous())?;
    let scores = engine(engine(q.matmul(&across))? * heads().scale)?;
    let length = engine(scores.dim(3))?;
    let raised = engine(engine(scores.exp())?.reshape((length, length)))?;
    Ok(matrix_from_tensor("exponentials", &raised)?)
}

/// Rows divided by their sums.
fn normalised(a: &Matrix) -> Matrix {
    let sum = |i: usize| (0..a.ncols()).map(|j| a[(i, j)]).sum::<f64>();
    let sums: Vec<f64> = (0..a.nrows()).map(sum).collect();
    Matrix::from_fn(a.nrows(), a.ncols(), |i, j| {
        a[(i, j)] / sums.get(i).copied().unwrap_or(f64::NAN)
    })
}

/// `Â` of weights whose diagonal is refined, and `A`.
fn before_division(weights: &Matrix, exact: &Matrix) -> Matrix {
    Matrix::from_fn(weights.nrows(), weights.ncols(), |i, j| {
        weights[(i, j)] * exact[(i, i)] / weights[(i, i)]
    })
}

fn relative(found: &Matrix, exact: &Matrix) -> f64 {
    frobenius_norm((found - exact).as_ref()) / frobenius_norm(exact.as_ref())
}

/// What the best matrix of a rank leaves, for every rank, relative to the whole.
fn left_by_rank(exact: &Matrix) -> Result<Vec<f64>> {
    let singular = thin_svd(exact.as_ref())?.s;
    let all: f64 = singular.iter().map(|s| s * s).sum();
    let mut rest = all;
    let mut left = vec![1.0];
    for value in singular {
        rest -= value * value;
        left.push((rest.max(0.0) / all).sqrt());
    }
    Ok(left)
}

/// Errors by budget: MRA-2, MRA-2-s, the best low rank and a band of as much work.
fn budgets(setting: &Setting, size: &Size) -> Result<(Vec<Claim>, Plot)> {
    const NAMES: [&str; 4] = ["MRA-2", "MRA-2-s", "best low rank", "band"];
    let (length, block) = (size.length, size.block);
    let rows = length / block;
    // From 5 to 30 % of the blocks.
    let budgets: Vec<usize> = (1..=rows)
        .filter(|count| 20 * count >= rows && 10 * count <= 3 * rows + 1)
        .collect();
    let mut errors: Vec<[Vec<f64>; 4]> = budgets.iter().map(|_| Default::default()).collect();
    let mut rows_err: Vec<Vec<f64>> = vec![Vec::new(); budgets.len()];
    let mut common = Vec::new();
    for draw in 0..size.draws {
        setting.tell(|| format!("errors by budget, draw {} of {}", draw + 1, size.draws));
        let both = tokens(length, setting.seed.wrapping_add(1000 * draw))?;
        let exact = exponentials(&both)?;
        let of_rows = normalised(&exact);
        let left = left_by_rank(&exact)?;
        common.push(share_of_common(&exact));
        for ((&per_row, errors), rows_err) in budgets.iter().zip(&mut errors).zip(&mut rows_err) {
            let full = MraSpec {
                diagonal: 1,
                ..MraSpec::new(block, per_row)
            };
            let sparse = MraSpec {
                sparse: true,
                ..full.clone()
            };
            // Scores of blocks and of entries, for as many of which a product of rank r takes 2 n r.
            let entries = rows * rows + per_row * rows * block * block;
            let rank = entries / length;
            // As many blocks in a row as are refined, around the diagonal.
            let band = Matrix::from_fn(length, length, |i, j| {
                let (x, y) = ((i / block) as f64, (j / block) as f64);
                let near = (y - x + 0.25).abs() < per_row as f64 / 2.0;
                if near { exact[(i, j)] } else { 0.0 }
            });
            let by_blocks = weights(&full, &both)?;
            rows_err.push(relative(&by_blocks, &of_rows));
            let alone = before_division(&weights(&sparse, &both)?, &exact);
            let found = [
                relative(&before_division(&by_blocks, &exact), &exact),
                relative(&alone, &exact),
                left.get(rank).copied().unwrap_or(0.0),
                relative(&band, &exact),
            ];
            for (errors, found) in errors.iter_mut().zip(found) {
                errors.push(found);
            }
        }
    }
    let means: Vec<[f64; 4]> = errors
        .iter()
        .map(|of| [0, 1, 2, 3].map(|way| mean(of.get(way).into_iter().flatten().copied())))
        .collect();
    let least = means
        .iter()
        .all(|[own, others @ ..]| others.iter().all(|other| own < other));
    let falls = means
        .windows(2)
        .all(|pair| matches!(pair, [[a, ..], [b, ..]] if b <= a));
    let beats_sparse = means.iter().all(|[full, sparse, ..]| full <= sparse);
    let percent = |per_row: &usize| format!("{:.0} %", 100.0 * *per_row as f64 / rows as f64);
    let told: Vec<String> = budgets
        .iter()
        .zip(&means)
        .map(|(per_row, row)| {
            let each: Vec<String> = row.iter().map(|error| format!("{error:.3}")).collect();
            format!("{}: {}", percent(per_row), each.join(" / "))
        })
        .collect();
    let divided: Vec<String> = rows_err
        .iter()
        .map(|errors| format!("{:.3}", mean(errors.iter().copied())))
        .collect();
    let told = format!("{}; {}", NAMES.join(" / "), told.join("; "));
    let series = |way: usize| Series {
        name: NAMES.get(way).copied().unwrap_or_default().to_owned(),
        points: budgets
            .iter()
            .zip(&means)
            .map(|(per_row, row)| {
                let share = 100.0 * *per_row as f64 / rows as f64;
                (share, row.get(way).copied().unwrap_or(f64::NAN))
            })
            .collect(),
    };
    let claims = vec![
        Claim::new(
            "MRA-2 errs least for 5 to 30 % of the blocks, beside MRA-2-s, the best low rank and a band of as \
             much work",
            "plots: the lowest error at equal work",
            told.clone(),
            after_training(setting.scale, least),
        )
        .noted(format!(
            "‖Â − A‖ / ‖A‖ of exponentials, the diagonal refined first; the best low rank is of the matrix itself, \
             which no method of that cost knows. The few columns that all look at have {:.1} % of ‖A‖², and a \
             matrix of columns alone is of low rank. Of rows divided by their sums MRA-2 errs by {}",
            100.0 * mean(common),
            divided.join(", ")
        )),
        Claim::new(
            "its error falls with the number of refined blocks, and leaving out the rest errs no less",
            "figure",
            told,
            Verdict::of(falls && beats_sparse),
        ),
    ];
    let plot = Plot {
        title: "Error of the weights against the share of blocks refined".to_owned(),
        x: "% of blocks".to_owned(),
        y: "relative error".to_owned(),
        series: (0..NAMES.len()).map(series).collect(),
    };
    Ok((claims, plot))
}

fn exact(setting: &Setting) -> Result<Claim> {
    let both = tokens(128, setting.seed)?;
    let dense = normalised(&exponentials(&both)?);
    let two = relative(&weights(&MraSpec::new(16, 8), &both)?, &dense);
    let three = MraSpec {
        scales: vec![16, 4, 1],
        per_row: vec![8, 32],
        ..MraSpec::new(16, 8)
    };
    let three = relative(&weights(&three, &both)?, &dense);
    Ok(Claim::new(
        "with every block refined it is softmax, at two scales and at three",
        "exact",
        format!("differs by {two:.1e} and {three:.1e} of the norm"),
        Verdict::of(two < 1e-5 && three < 1e-5),
    ))
}

fn growth(size: &Size) -> Result<Claim> {
    let spec = MraSpec::new(32, 4);
    let mut points = Vec::new();
    for length in [size.longest / 4, size.longest] {
        let [q, k] = tokens(length, 1)?;
        points.push((
            length as f64,
            mixing(&spec, &q, &k)?.operations(HEAD_WIDTH) as f64,
        ));
    }
    let slope = exponent(&points);
    Ok(Claim::new(
        "with four blocks of 32 in a row, operations grow nearly linearly: exponent below 1.1",
        "O(n b d) beside (n / b)² blocks",
        format!("exponent {slope:.3} up to {} tokens", size.longest),
        Verdict::of(slope < 1.1),
    ))
}

/// An encoder trained with softmax, then with blocks, before and after further training.
fn on_hidden_tokens(setting: &Setting, size: &Size) -> Result<(String, Vec<Claim>)> {
    let mut text = text(setting)?;
    let measures = Measures {
        vocabulary: text.vocabulary + 1,
        length: size.masked.length,
        labels: 1,
        width: 48,
        heads: 4,
        blocks: 2,
    };
    let mut spec = measures.spec(MechanismSpec::Softmax, true);
    spec.head = HeadSpec::LanguageModel {
        tied: true,
        bias: true,
        transform: None,
    };
    setting.tell(|| "hidden tokens, softmax".to_owned());
    let dense = text.study(spec, &size.masked)?;
    // A quarter of the blocks.
    let block = size.masked.length / 16;
    let mra = MechanismSpec::Mra(MraSpec::new(block, 4));
    let swapped = dense.model.with_mechanism(&mra, setting.seed)?;
    let at_once = text.ask(swapped, &size.masked)?;
    let further = masked::Course {
        steps: size.further,
        rate: 1e-3,
        ..size.masked
    };
    let both = [("blocks", &at_once.model), ("softmax", &dense.model)];
    let task = "hidden tokens, trained further";
    let found = means_by_seed(setting, task, &both, 1, |model, _| {
        let (spec, mut parameters) = (model.spec().clone(), model.parameters().clone());
        let study = masked::text(setting)?.study_from(spec, &mut parameters, &further)?;
        Ok(study.accuracy)
    })?;
    let (tuned, longer) = (of(&found, "blocks"), of(&found, "softmax"));
    let learned = dense.has_learned();
    let told = format!(
        "softmax {:.2} %, blocks at once {:.2} %, after {} steps {:.2} % (softmax after as many {:.2} %); the most \
         frequent {:.2} %",
        dense.accuracy, at_once.accuracy, size.further, tuned, longer, dense.commonest
    );
    let claims = vec![
        Claim::new(
            "a quarter of the blocks in the place of softmax costs at most a point of hidden tokens at once",
            "RoBERTa: closest to the original of all efficient methods",
            told.clone(),
            after_learning(
                setting.scale,
                learned,
                at_once.accuracy >= dense.accuracy - 1.0,
            ),
        ),
        Claim::new(
            "and at most 0.3 points after 200 steps",
            "nearly equal after short training",
            told,
            after_learning(setting.scale, learned, tuned >= longer - 0.3),
        )
        .noted("against softmax after as many steps"),
    ];
    Ok((text.what, claims))
}

fn on_lists(setting: &Setting, size: &Size) -> Result<Claim> {
    let full = MraSpec::new(8, 4);
    let sparse = MraSpec {
        sparse: true,
        ..full.clone()
    };
    let ways = [
        ("softmax", MechanismSpec::Softmax),
        ("MRA-2", MechanismSpec::Mra(full)),
        ("MRA-2-s", MechanismSpec::Mra(sparse)),
    ];
    let found = on_lists_by(setting, &ways, 32, size.lists)?;
    let (own, softmax) = (
        of(&found, "MRA-2").min(of(&found, "MRA-2-s")),
        of(&found, "softmax"),
    );
    let commonest = commonest_value(size.lists.0, setting.seed);
    let learned = softmax >= commonest + 5.0;
    Ok(Claim::new(
        "nested lists: both come within two points of softmax",
        "Long Range Arena: 59.0 and 59.4 on average, softmax 58.7",
        format!("{}; the most frequent {commonest:.1} %", listed(&found)),
        after_learning(setting.scale, learned, own >= softmax - 2.0),
    ))
}

/// Percent of lists that have the most frequent value.
fn commonest_value(count: usize, seed: u64) -> f64 {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for list in list_operations(count, seed) {
        *counts.entry(list.label).or_default() += 1;
    }
    let most = counts.into_values().max().unwrap_or(0);
    100.0 * most as f64 / count.max(1) as f64
}
