//! Small sequence tasks that mixers are compared on: digits as sequences of pixels, nested lists of
//! operators, and how a comparison is run.

use super::classifier::{Labelled, Narrow, batch, fit, probabilities};
use super::jobs::means_by_seed;
use crate::error::engine;
use crate::{Result, Setting};
use lapidary_explain::faithfulness::masking::most_likely;
use lapidary_kernels::{CrossEntropyOptions, DType, Device, Tensor, cross_entropy};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, InputSpec, Model, ModelSpec, Pass, Pool, TokenInput,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::parameters::ParameterSource;
use lapidary_train::{Generator, generator};
use rand::RngExt;
use std::collections::BTreeMap;
use std::time::Instant;

/// Height and width of an image of a digit.
pub const SIDE: usize = 8;
/// Brightnesses of a pixel.
pub const LEVELS: usize = 17;

/// Five columns of seven rows for each digit, the leftmost the highest bit.
const FONT: [[u8; 7]; 10] = [
    [0x0e, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0e],
    [0x04, 0x0c, 0x04, 0x04, 0x04, 0x04, 0x0e],
    [0x0e, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1f],
    [0x1f, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0e],
    [0x02, 0x06, 0x0a, 0x12, 0x1f, 0x02, 0x02],
    [0x1f, 0x10, 0x1e, 0x01, 0x01, 0x11, 0x0e],
    [0x06, 0x08, 0x10, 0x1e, 0x11, 0x11, 0x0e],
    [0x1f, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08],
    [0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e],
    [0x0e, 0x11, 0x11, 0x0f, 0x01, 0x02, 0x0c],
];

/// Printed digits as 64 pixels row by row, at one of eight places and with pixels that are turned
/// over now and then, so that how many are lit hardly tells a digit.
pub fn digits(count: usize, seed: u64) -> Vec<Labelled> {
    let mut generator = generator(seed);
    (0..count)
        .map(|_| {
            let label = generator.random_range(0..FONT.len());
            let (top, left) = (generator.random_range(0..2), generator.random_range(0..4));
            let rows = FONT.get(label).copied().unwrap_or_default();
            let pixel = |at: usize| {
                let (row, column) = ((at / SIDE).checked_sub(top), (at % SIDE).checked_sub(left));
                let bits = row.and_then(|row| rows.get(row)).copied().unwrap_or(0);
                column.is_some_and(|column| column < 5 && bits >> (4 - column) & 1 == 1)
            };
            let tokens = (0..SIDE * SIDE)
                .map(|at| match pixel(at) != generator.random_bool(0.05) {
                    true => generator.random_range(9..LEVELS as u32),
                    false => generator.random_range(0..8),
                })
                .collect();
            Labelled {
                tokens,
                label: label as u32,
            }
        })
        .collect()
}

/// Tokens of [`list_operations`]: ten digits, four operators that open a list, its end, and a first
/// token that is nothing else.
pub const LIST_TOKENS: usize = 16;
const OPERATORS: u32 = 10;
const END: u32 = 14;
const FIRST: u32 = 15;

/// Nested lists as `[MAX 2 9 [MIN 4 7] 0]` of one digit each, labelled with their value (Nangia &
/// Bowman, ListOps, arXiv 1804.06028; with the sizes of Long Range Arena's generator made small:
/// at most four arguments, four levels, 20 to 120 tokens).
pub fn list_operations(count: usize, seed: u64) -> Vec<Labelled> {
    lists_up_to(120, count, seed)
}

/// The same of 20 to `longest` tokens.
pub fn lists_up_to(longest: usize, count: usize, seed: u64) -> Vec<Labelled> {
    const SHORTEST: usize = 20;
    let lengths = SHORTEST..=longest.max(SHORTEST);
    let mut generator = generator(seed);
    let mut examples = Vec::with_capacity(count);
    while examples.len() < count {
        let mut tokens = vec![FIRST];
        let label = expression(&mut generator, 4, &mut tokens);
        if lengths.contains(&tokens.len()) {
            examples.push(Labelled { tokens, label });
        }
    }
    examples
}

/// Writes an expression of at most `depth` levels and gives its value.
fn expression(
    generator: &mut lapidary_train::Generator,
    depth: usize,
    tokens: &mut Vec<u32>,
) -> u32 {
    // The outermost is a list; deeper down, three of four are digits.
    if depth == 0 || (tokens.len() > 1 && generator.random_bool(0.75)) {
        let digit = generator.random_range(0..10);
        tokens.push(digit);
        return digit;
    }
    let operator = generator.random_range(0..4);
    tokens.push(OPERATORS + operator);
    let count = generator.random_range(2..=4);
    let mut values: Vec<u32> = (0..count)
        .map(|_| expression(generator, depth - 1, tokens))
        .collect();
    tokens.push(END);
    values.sort_unstable();
    let value = match operator {
        0 => values.first().copied(),
        1 => values.last().copied(),
        2 => values.get(values.len() / 2).copied(),
        _ => Some(values.iter().sum::<u32>() % 10),
    };
    value.unwrap_or(0)
}

/// The measures of a classifier whose mixers are compared.
#[derive(Clone, Copy, Debug)]
pub struct Measures {
    /// Number of token ids.
    pub vocabulary: usize,
    /// Most tokens.
    pub length: usize,
    /// Classes.
    pub labels: usize,
    /// Features of a token.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Blocks.
    pub blocks: usize,
}

impl Measures {
    /// A pre-norm encoder with the mean over tokens as its reading, with or without a table of
    /// positions.
    pub fn spec(&self, mechanism: MechanismSpec, positions: bool) -> ModelSpec {
        ModelSpec {
            width: self.width,
            input: InputSpec::Tokens(TokenInput {
                vocabulary: self.vocabulary,
                length: self.length,
                position: match positions {
                    true => AbsolutePosition::Learned {
                        offset: 0,
                        skip_padding: false,
                    },
                    false => AbsolutePosition::None,
                },
                token_types: 0,
                norm: None,
                embedding_width: None,
                projected: Default::default(),
                dropout: 0.0,
                dropout_by_feature: false,
            }),
            blocks: vec![BlockSpec {
                repeat: self.blocks,
                wiring: Wiring::PreNorm,
                norm: NormSpec::default(),
                attention: MixerSpec::MultiHead(MultiHeadSpec {
                    mechanism,
                    ..MultiHeadSpec::new(self.heads)
                }),
                cross_attention: None,
                shared: false,
                layer_scale: None,
                drop_path: 0.0,
                dropout_by_feature: false,
                coding_step: None,
                shortcuts: false,
                feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                    hidden: 2 * self.width,
                    activation: ActivationSpec::Gelu,
                    bias: true,
                })),
                dropout: 0.0,
            }],
            final_norm: Some(NormSpec::default()),
            head: HeadSpec::Pooled {
                pool: Pool::Mean,
                norm: None,
                hidden: None,
                labels: Some(self.labels),
                bias: true,
            },
            low_rank: BTreeMap::new(),
            quantised: BTreeMap::new(),
            organisation: None,
            initial: Default::default(),
        }
    }
}

/// How a classifier is trained.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Steps.
    pub steps: u64,
    /// Examples in a step.
    pub batch: usize,
    /// The highest learning rate.
    pub rate: f64,
    /// Seed of initial values and of the order of examples.
    pub seed: u64,
}

/// Trains a narrow model on random batches, with a draw of its own for each step.
pub fn train(spec: ModelSpec, examples: &[Labelled], course: &Course) -> Result<Model> {
    let mut source = Narrow(Initialiser::new(course.seed, DType::F32, Device::Cpu));
    train_from(spec, &mut source, examples, course)
}

/// [`train`] from other initial values.
pub fn train_from(
    spec: ModelSpec,
    source: &mut dyn ParameterSource,
    examples: &[Labelled],
    course: &Course,
) -> Result<Model> {
    let model = Model::trainable(spec, source)?;
    let mut draws = generator(course.seed);
    fit(&model, course.steps, course.rate, |step| {
        loss(&model, examples, course.batch, step, &mut draws)
    })
}

/// Mean cross-entropy of `count` random examples.
fn loss(
    model: &Model,
    examples: &[Labelled],
    count: usize,
    step: u64,
    draws: &mut Generator,
) -> Result<Tensor> {
    let chosen: Vec<&Labelled> = (0..count)
        .filter_map(|_| examples.get(draws.random_range(0..examples.len().max(1))))
        .collect();
    let sequences: Vec<&[u32]> = chosen.iter().map(|e| e.tokens.as_slice()).collect();
    let labels: Vec<u32> = chosen.iter().map(|e| e.label).collect();
    let (input, padding) = batch(&sequences)?;
    let pass = Pass {
        padding: Some(&padding),
        dropout_seed: Some(step),
        draw: Some(step),
        ..Pass::default()
    };
    let logits = model.forward(&input, pass)?.into_logits()?.into_value();
    let labels = engine(Tensor::from_vec(labels, chosen.len(), &Device::Cpu))?;
    Ok(cross_entropy(
        &logits,
        &labels,
        &CrossEntropyOptions::default(),
    )?)
}

/// Milliseconds of a training step: the median of five, behind two that warm up.
pub fn milliseconds_a_step(model: &Model, examples: &[Labelled], course: &Course) -> Result<f64> {
    const WARM: usize = 2;
    const TIMED: usize = 5;
    let mut draws = generator(course.seed);
    let mut starts = Vec::new();
    // A step ends where the next one starts.
    fit(model, (WARM + TIMED + 1) as u64, course.rate, |step| {
        starts.push(Instant::now());
        loss(model, examples, course.batch, step, &mut draws)
    })?;
    let mut took: Vec<f64> = starts
        .iter()
        .zip(starts.iter().skip(1))
        .skip(WARM)
        .map(|(start, end)| 1e3 * end.duration_since(*start).as_secs_f64())
        .collect();
    took.sort_by(f64::total_cmp);
    Ok(took.get(TIMED / 2).copied().unwrap_or(f64::NAN))
}

/// The share of examples that a model gets right, in percent; not a number where its scores are not.
pub fn percent_right(model: &Model, examples: &[Labelled]) -> Result<f64> {
    let sequences: Vec<&[u32]> = examples.iter().map(|e| e.tokens.as_slice()).collect();
    let said = probabilities(model, &sequences)?;
    if said.iter().flatten().any(|p| !p.is_finite()) {
        return Ok(f64::NAN);
    }
    let right = said
        .iter()
        .zip(examples)
        .filter(|(said, example)| most_likely(said) == example.label as usize)
        .count();
    Ok(100.0 * right as f64 / examples.len().max(1) as f64)
}

/// Means of accuracies in percent, listed.
pub fn listed(found: &[(&str, f64)]) -> String {
    let each = found
        .iter()
        .map(|(name, right)| format!("{name} {right:.1} %"));
    each.collect::<Vec<_>>().join(", ")
}

/// What was found under a name; not a number where nothing was.
pub fn of(found: &[(&str, f64)], name: &str) -> f64 {
    let found = found.iter().find(|(known, _)| *known == name);
    found.map_or(f64::NAN, |(_, value)| *value)
}

/// Percent of held-out lists that classifiers of this width get right, by mechanism: `(count, steps)`
/// examples to learn from and steps of 32.
pub fn on_lists_by(
    setting: &Setting,
    ways: &[(&'static str, MechanismSpec)],
    width: usize,
    (count, steps): (usize, u64),
) -> Result<Vec<(&'static str, f64)>> {
    let training = list_operations(count, setting.seed);
    let held_out = list_operations(count / 8, setting.seed ^ 0x1157);
    let measures = Measures {
        vocabulary: LIST_TOKENS,
        length: 120,
        labels: 10,
        width,
        heads: 4,
        blocks: 2,
    };
    means_by_seed(setting, "nested lists", ways, 1, |mechanism, seed| {
        let course = Course {
            steps,
            batch: 32,
            rate: 3e-3,
            seed,
        };
        let model = train(measures.spec(mechanism.clone(), true), &training, &course)?;
        percent_right(&model, &held_out)
    })
}

/// Seconds of the quickest of some calls.
pub fn quickest(times: usize, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let started = Instant::now();
        call()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// The exponent between the first and last of some points, `(length, amount)`.
pub fn exponent(points: &[(f64, f64)]) -> f64 {
    match (points.first(), points.last()) {
        (Some(first), Some(last)) => (last.1 / first.1).ln() / (last.0 / first.0).ln(),
        _ => f64::NAN,
    }
}

/// The first length from which on `other` takes more than `ours`, where it is among the points.
pub fn crossover(ours: &[(f64, f64)], other: &[(f64, f64)]) -> Option<f64> {
    let mut pairs = ours.iter().zip(other);
    let later = |(ours, other): &(&(f64, f64), &(f64, f64))| ours.1 < other.1;
    pairs.find(later).map(|(ours, _)| ours.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_the_value_of_their_operators() {
        fn value(tokens: &[u32], at: &mut usize) -> u32 {
            let token = tokens[*at];
            *at += 1;
            if token < OPERATORS {
                return token;
            }
            let mut values = Vec::new();
            while tokens[*at] != END {
                values.push(value(tokens, at));
            }
            *at += 1;
            values.sort_unstable();
            match token - OPERATORS {
                0 => values[0],
                1 => values[values.len() - 1],
                2 => values[values.len() / 2],
                _ => values.iter().sum::<u32>() % 10,
            }
        }
        for longest in [20, 48, 120] {
            let lists = lists_up_to(longest, 200, 3);
            assert_eq!(lists.len(), 200);
            for example in lists {
                let mut at = 1;
                assert_eq!(value(&example.tokens, &mut at), example.label);
                assert_eq!(at, example.tokens.len());
                assert!((20..=longest).contains(&at), "{at}");
            }
        }
    }

    #[test]
    fn digits_are_balanced_and_reproducible() {
        let examples = digits(1000, 1);
        assert_eq!(examples, digits(1000, 1));
        for label in 0..10 {
            let count = examples.iter().filter(|e| e.label == label).count();
            assert!((60..140).contains(&count));
        }
    }
}
