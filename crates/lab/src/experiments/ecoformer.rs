//! EcoFormer: a classifier of digits with softmax becomes one with codes, its hashes learned block by block from
//! what its queries have in common, and is trained a little further.
//!
//! The paper converts PVTv2 on ImageNet. Here every block is converted, the last too.

use super::classifier::{Labelled, batch};
use super::jobs::{by_seed, in_parallel};
use super::sequences::{
    Course, LEVELS, Measures, SIDE, digits, exponent, percent_right, train, train_from,
};
use super::{after_training, mean, numbers};
use crate::error::engine;
use crate::{Claim, Error, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_parts::attention::mechanism::Heads;
use lapidary_parts::attention::mechanism::ecoformer::{EcoformerSpec, Fit, PackedCodes, Tally};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::parameters::Parameters;
use lapidary_parts::position::PositionSpec;
use lapidary_signal::Trace;
use std::collections::BTreeMap;

const HEADS: usize = 4;
const HEAD_WIDTH: usize = 16;
const LENGTH: usize = SIDE * SIDE;

/// How much is done.
struct Size {
    blocks: usize,
    examples: usize,
    /// Steps with softmax.
    steps: u64,
    /// Steps with codes.
    further: u64,
    /// Sequences that hashes are learned from.
    calibration: usize,
    /// Steps of gradient descent for each bit.
    iterations: usize,
    seeds: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                blocks: 2,
                examples: 40,
                steps: 2,
                further: 1,
                calibration: 2,
                iterations: 10,
                seeds: 1,
            },
            Scale::Small => Self {
                blocks: 3,
                examples: 1500,
                steps: 940,
                further: 470,
                calibration: 32,
                iterations: 100,
                seeds: 1,
            },
            Scale::Full => Self {
                blocks: 3,
                examples: 15_000,
                steps: 9400,
                further: 4700,
                calibration: 32,
                iterations: 100,
                seeds: 3,
            },
        }
    }
}

/// A model whose attention, which shares queries and keys, is by codes: block by block, hashes are learned from
/// the queries that blocks converted before leave for it on some sequences. Attention neither normalises nor
/// rotates them.
///
/// # Errors
/// When attention has keys of its own, or turns or normalises queries.
pub fn hashed(
    model: &Model,
    ecoformer: &EcoformerSpec,
    sequences: &[&[u32]],
    fit: &Fit,
) -> Result<Model> {
    let mut spec = model.spec().clone();
    spec.blocks = model.spec().expanded_blocks();
    let mut parameters = model.parameters().clone();
    let (input, padding) = batch(sequences)?;
    for block in 0..spec.blocks.len() {
        let so_far = Model::new(spec.clone(), &mut parameters)?;
        let attention = spec.blocks.get_mut(block).map(|block| &mut block.attention);
        let Some(MixerSpec::MultiHead(attention)) = attention else {
            continue;
        };
        let path = format!("blocks.{block}.attention");
        as_projected(attention, &path)?;
        let queries = queries(&so_far, (&input, &padding), &path, attention.heads)?;
        let fitted = ecoformer.fit(&queries, Some(&padding), fit)?;
        for (name, value) in fitted.parameters {
            let value = engine(value.to_dtype(model.dtype()))?;
            parameters.insert(format!("{path}.mechanism.{name}"), value);
        }
        attention.mechanism = MechanismSpec::Ecoformer(ecoformer.clone());
    }
    Ok(Model::new(spec, &mut parameters)?)
}

/// Refuses attention whose queries meet otherwise than they are projected, which hashes would be learned for.
fn as_projected(attention: &MultiHeadSpec, path: &str) -> Result<()> {
    let refuse = |name: &str, found: &str, expected: &str| -> Result<()> {
        let field = format!("{path}.{name}");
        Err(lapidary_parts::Error::spec(field, found, expected).into())
    };
    if attention.position != PositionSpec::None {
        return refuse("position.kind", attention.position.kind(), "none");
    }
    match attention.query_key_norm {
        Some(_) => refuse("query_key_norm", "given", "absent"),
        None => Ok(()),
    }
}

/// Queries of the attention at `path`, `[batch, heads, length, head_width]`.
fn queries(
    model: &Model,
    (input, padding): (&Input, &Tensor),
    path: &str,
    heads: usize,
) -> Result<Tensor> {
    let site = format!("{path}.query");
    let trace = Trace::new().capture(&site)?;
    let pass = Pass {
        padding: Some(padding),
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(input, pass)?;
    let queries = trace.signal(&site)?.into_value();
    let (batch, length, width) = engine(queries.dims3())?;
    let split = engine(queries.reshape((batch, length, heads, width / heads)))?;
    engine(engine(split.transpose(1, 2))?.contiguous())
}

fn spec(blocks: usize) -> ModelSpec {
    let measures = Measures {
        vocabulary: LEVELS,
        length: LENGTH,
        labels: 10,
        width: HEADS * HEAD_WIDTH,
        heads: HEADS,
        blocks,
    };
    let mut spec = measures.spec(MechanismSpec::Softmax, true);
    spec.blocks = spec.expanded_blocks();
    for block in &mut spec.blocks {
        if let MixerSpec::MultiHead(attention) = &mut block.attention {
            attention.sharing = QueryKeySharing::QueryKey;
        }
    }
    spec
}

/// What a seed found.
struct Found {
    /// Percent right with softmax, with learned hashes, and with hashes as drawn.
    right: [f64; 3],
    /// The same with codes, before training further.
    at_once: [f64; 2],
    /// Spearman's correlation of codes and queries, learned and as drawn.
    follows: [f64; 2],
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let found = study(setting, &size)?;
    let average = |of: &dyn Fn(&Found) -> f64| mean(found.iter().map(of));
    let right =
        [0, 1, 2].map(|way| average(&|found| found.right.get(way).copied().unwrap_or(f64::NAN)));
    let [at_once, drawn_at_once] =
        [0, 1].map(|way| average(&|found| found.at_once.get(way).copied().unwrap_or(f64::NAN)));
    let follows =
        [0, 1].map(|way| average(&|found| found.follows.get(way).copied().unwrap_or(f64::NAN)));
    let ([dense, learned, drawn], [by_learned, by_drawn]) = (right, follows);
    let ecoformer = EcoformerSpec::default();
    let own = ecoformer.tally(HEADS, LENGTH, HEAD_WIDTH);
    let softmax = Tally::of_softmax(HEADS, LENGTH, HEAD_WIDTH);
    let share = own.picojoules() / softmax.picojoules();
    let (slope, plot) = energy(&ecoformer);
    Ok(Reproduction {
        setting: format!(
            "printed digits as {LENGTH} pixels, {} blocks of {HEADS} heads of {HEAD_WIDTH}, {} examples, {} steps \
             of 32 with softmax and {} with codes of 16 bits; hashes from {} sequences; {} seeds",
            size.blocks, size.examples, size.steps, size.further, size.calibration, size.seeds
        ),
        claims: vec![
            Claim::new(
                "attention takes at most 35 % of softmax's energy",
                "73 % less on a chip (PVTv2-B0, the whole network)",
                format!(
                    "{:.1} %: {} multiplications and {} additions a block, softmax {} and {}",
                    100.0 * share,
                    own.multiplications,
                    own.additions,
                    softmax.multiplications,
                    softmax.additions
                ),
                Verdict::of(share <= 0.35),
            )
            .noted(
                "counted by the formulas for 45 nm, 3.7 pJ a multiplication and 0.9 pJ an addition",
            ),
            Claim::new(
                "energy grows linearly with the length, softmax's with its square",
                "linear",
                format!("exponents {:.3} and {:.3}", slope[0], slope[1]),
                Verdict::of((slope[0] - 1.0).abs() < 0.01 && (slope[1] - 2.0).abs() < 0.01),
            ),
            products(setting.seed)?,
            Claim::new(
                "converted and trained further, at most 1.5 points are lost",
                "0.33 points (PVTv2-B0 on ImageNet)",
                format!("softmax {dense:.1} %, codes {learned:.1} % ({at_once:.1} % before)"),
                after_training(setting.scale, learned >= dense - 1.5),
            ),
            Claim::new(
                "learned hashes beat those that were drawn, by half a point of what is named or by 0.1 of \
                 Spearman's correlation of codes with queries",
                "ablation: self-supervised hashes beat random ones",
                format!(
                    "{learned:.1} % and {drawn:.1} % ({at_once:.1} % and {drawn_at_once:.1} % before training \
                     further); correlation {by_learned:.3} and {by_drawn:.3}"
                ),
                after_training(
                    setting.scale,
                    learned >= drawn + 0.5 || by_learned >= by_drawn + 0.1,
                ),
            ),
        ],
        plots: vec![plot],
        ..Reproduction::default()
    })
}

/// Digits to learn from and others to be asked about.
fn examples(size: &Size, seed: u64) -> [Vec<Labelled>; 2] {
    [
        digits(size.examples, seed),
        digits(size.examples / 3, seed ^ 0xd161),
    ]
}

/// A model with softmax and what it gets right, seed by seed; then the same with hashes that were learned and
/// with such that were drawn.
fn study(setting: &Setting, size: &Size) -> Result<Vec<Found>> {
    let course = |seed| Course {
        steps: size.steps,
        batch: 32,
        rate: 3e-3,
        seed,
    };
    let softmax = by_seed(
        setting,
        "digits",
        &[("softmax", ())],
        size.seeds,
        |(), seed| {
            let [training, held_out] = examples(size, seed);
            let dense = train(spec(size.blocks), &training, &course(seed))?;
            let right = percent_right(&dense, &held_out)?;
            Ok((seed, dense, right))
        },
    )?;
    let dense: Vec<_> = softmax.into_iter().flat_map(|(_, dense)| dense).collect();
    let ways = [("learned", size.iterations), ("drawn", 0)];
    let jobs = dense.iter().flat_map(|dense| {
        ways.map(|(name, iterations)| {
            let name = format!("digits: hashes as {name}, seed {}", dense.0);
            (name, (dense, iterations))
        })
    });
    let hashed = in_parallel(setting, jobs.collect(), |((seed, dense, _), iterations)| {
        with_hashes(size, dense, iterations, &course(*seed))
    })?;
    let both = dense.iter().zip(hashed.chunks(2));
    both.map(|((_, _, softmax), ways)| match ways {
        [learned, drawn] => Ok(Found {
            right: [*softmax, learned.right, drawn.right],
            at_once: [learned.at_once, drawn.at_once],
            follows: [learned.follows, drawn.follows],
        }),
        others => Err(Error::Experiment(format!(
            "{} ways instead of two",
            others.len()
        ))),
    })
    .collect()
}

/// What a model with hashes does.
struct Hashed {
    right: f64,
    at_once: f64,
    follows: f64,
}

/// Codes in the place of softmax, their hashes learned in so many iterations, before and after further training.
fn with_hashes(size: &Size, dense: &Model, iterations: usize, course: &Course) -> Result<Hashed> {
    let [training, held_out] = examples(size, course.seed);
    let sequences: Vec<&[u32]> = training
        .iter()
        .take(size.calibration)
        .map(|example| example.tokens.as_slice())
        .collect();
    let ecoformer = EcoformerSpec::default();
    let fit = Fit {
        // Ten and ten would be a third of the 64 tokens.
        top: 5,
        iterations,
        seed: course.seed,
        ..Fit::default()
    };
    let converted = hashed(dense, &ecoformer, &sequences, &fit)?;
    let further = Course {
        steps: size.further,
        rate: 1e-3,
        ..*course
    };
    let spec = converted.spec().clone();
    let mut parameters = converted.parameters().clone();
    let tuned = train_from(spec, &mut parameters, &training, &further)?;
    Ok(Hashed {
        right: percent_right(&tuned, &held_out)?,
        at_once: percent_right(&converted, &held_out)?,
        follows: correlation_of(&converted, &ecoformer, &held_out)?,
    })
}

/// How the inner products of codes and those of queries rank pairs of tokens alike, over heads and blocks of
/// some examples.
fn correlation_of(model: &Model, ecoformer: &EcoformerSpec, examples: &[Labelled]) -> Result<f64> {
    let sequences: Vec<&[u32]> = examples
        .iter()
        .take(4)
        .map(|e| e.tokens.as_slice())
        .collect();
    let (input, padding) = batch(&sequences)?;
    let heads = Heads {
        width: HEADS * HEAD_WIDTH,
        heads: HEADS,
        head_width: HEAD_WIDTH,
        value_width: HEAD_WIDTH,
        causal: false,
        scale: 1.0,
        sharing: QueryKeySharing::QueryKey,
    };
    let mut all = Vec::new();
    for block in 0..model.spec().blocks.len() {
        let path = format!("blocks.{block}.attention");
        let queries = queries(model, (&input, &padding), &path, HEADS)?;
        let mut known: BTreeMap<String, Tensor> = model.parameters().clone();
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let mut parameters = Parameters::new(&mut known, &ranks, &mut linears);
        let hashing = ecoformer.hashing(&heads, parameters.at(format!("{path}.mechanism")))?;
        let packed = PackedCodes::new(&hashing.codes(&queries, None)?)?;
        let rows = numbers(&queries)?;
        let rows: Vec<Vec<f64>> = rows.chunks(HEAD_WIDTH).map(unit).collect();
        for (rows, words) in rows.chunks(LENGTH).zip(packed.words().chunks(LENGTH)) {
            let pairs = || (0..LENGTH).flat_map(|i| (0..i).map(move |j| (i, j)));
            let by_codes = pairs()
                .filter_map(|(i, j)| Some(packed.product(*words.get(i)?, *words.get(j)?) as f64));
            let by_queries = pairs().filter_map(|(i, j)| Some(dot(rows.get(i)?, rows.get(j)?)));
            all.push(spearman(
                &by_codes.collect::<Vec<_>>(),
                &by_queries.collect::<Vec<_>>(),
            ));
        }
    }
    Ok(mean(all))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn unit(row: &[f64]) -> Vec<f64> {
    let length = dot(row, row).sqrt().max(f64::MIN_POSITIVE);
    row.iter().map(|x| x / length).collect()
}

/// The rank of each number, equal ones at the mean of theirs.
fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> = x.iter().copied().enumerate().collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut ranks = vec![0.0; x.len()];
    let mut before = 0;
    for equal in order.chunk_by(|a, b| a.1 == b.1) {
        let rank = before as f64 + (equal.len() as f64 - 1.0) / 2.0;
        for (at, _) in equal {
            if let Some(place) = ranks.get_mut(*at) {
                *place = rank;
            }
        }
        before += equal.len();
    }
    ranks
}

/// Spearman's correlation; nothing where either side is all alike.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let centred = |x: &[f64]| -> Vec<f64> {
        let ranks = ranks(x);
        let mean = mean(ranks.iter().copied());
        ranks.iter().map(|rank| rank - mean).collect()
    };
    let (a, b) = (centred(a), centred(b));
    let sizes = (dot(&a, &a) * dot(&b, &b)).sqrt();
    if sizes > 0.0 {
        dot(&a, &b) / sizes
    } else {
        0.0
    }
}

/// Counting bits against products.
fn products(seed: u64) -> Result<Claim> {
    use rand::RngExt;
    let mut random = lapidary_train::generator(seed);
    let (count, bits) = (200, 16);
    let entries: Vec<f64> = (0..count * bits)
        .map(|_| if random.random_bool(0.5) { 1.0 } else { -1.0 })
        .collect();
    let codes = Tensor::from_vec(
        entries.clone(),
        (count, bits),
        &lapidary_kernels::Device::Cpu,
    );
    let packed = PackedCodes::new(&engine(codes)?)?;
    let rows: Vec<&[f64]> = entries.chunks(bits).collect();
    let mut differ = 0;
    for (row, &word) in rows.iter().zip(packed.words()) {
        for (other, &second) in rows.iter().zip(packed.words()) {
            differ += usize::from(packed.product(word, second) as f64 != dot(row, other));
        }
    }
    Ok(Claim::new(
        "inner products of codes are the bits less twice those that differ",
        "exact",
        format!(
            "{differ} of {} pairs differ from a product of numbers",
            count * count
        ),
        Verdict::of(differ == 0),
    ))
}

/// Exponents of the energy of codes and of softmax, and its curves.
fn energy(ecoformer: &EcoformerSpec) -> ([f64; 2], Plot) {
    let lengths = || std::iter::successors(Some(64usize), |n| Some(4 * n)).take(5);
    let point = |n: usize, tally: Tally| (n as f64, 1e-6 * tally.picojoules());
    let own: Vec<(f64, f64)> = lengths()
        .map(|n| point(n, ecoformer.tally(HEADS, n, HEAD_WIDTH)))
        .collect();
    let softmax: Vec<(f64, f64)> = lengths()
        .map(|n| point(n, Tally::of_softmax(HEADS, n, HEAD_WIDTH)))
        .collect();
    let slopes = [exponent(&own), exponent(&softmax)];
    let series = |name: &str, points| Series {
        name: name.to_owned(),
        points,
    };
    let plot = Plot {
        title: "Energy of attention, 4 heads of 16 features, 16 bits, 25 anchors".to_owned(),
        x: "tokens".to_owned(),
        y: "microjoules".to_owned(),
        series: vec![series("codes", own), series("softmax", softmax)],
    };
    (slopes, plot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::{DType, Device};

    /// Their codes would be of queries that attention never compares.
    #[test]
    fn queries_that_are_turned_are_refused() {
        let mut turned = spec(1);
        for block in &mut turned.blocks {
            if let MixerSpec::MultiHead(attention) = &mut block.attention {
                attention.position = PositionSpec::Rotary(Default::default());
            }
        }
        let model = Model::initialised(turned, 1, DType::F32, &Device::Cpu).unwrap();
        let tokens = [1u32; LENGTH];
        let ecoformer = EcoformerSpec::default();
        let said = hashed(&model, &ecoformer, &[&tokens[..]], &Fit::default()).unwrap_err();
        let expected = "blocks.0.attention.position.kind is \"rotary\", but must be none";
        assert_eq!(said.to_string(), expected);
    }

    #[test]
    fn ranks_are_shared_by_equals_and_the_correlation_is_of_order_alone() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0]);
        let a = [0.1, 0.4, 0.2, 0.9];
        assert!((spearman(&a, &a.map(f64::exp)) - 1.0).abs() < 1e-12);
        assert!((spearman(&a, &a.map(|x| -x)) + 1.0).abs() < 1e-12);
        assert_eq!(spearman(&a, &[1.0; 4]), 0.0);
    }
}
