//! Words that are copied, reversed and counted, longer ones than in training.

use super::super::attending;
use super::super::decoder::{Recipe, train_by};
use super::super::jobs::by_seed;
use super::super::{after_learning, mean, numbers};
use super::{HEADS, curves};
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting};
use lapidary_kernels::{D, Device};
use lapidary_model::{AbsolutePosition, Input, InputSpec, Model, ModelSpec, Pass};
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::position::{FireSpec, PositionSpec};
use lapidary_train::data::{Batch, IGNORE, Task};
use lapidary_train::{Generator, generator};
use rand::RngExt;

/// Symbols of a word; then the mark before the answer, and the one that ends it.
const SYMBOLS: u32 = 8;
const ANSWER: u32 = SYMBOLS;
const END: u32 = SYMBOLS + 1;
const VOCABULARY: usize = END as usize + 1;
/// What is counted is counted modulo this.
const MODULUS: u32 = 5;
/// Of words as long as those of training, the share that is right where an answer has been learned.
const LEARNED: f64 = 0.5;

/// What is asked about a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// The word.
    Copy,
    /// The word from its end.
    Reverse,
    /// How many of its symbols are the first one, modulo [`MODULUS`].
    Count,
}

const QUESTIONS: [Question; 3] = [Question::Copy, Question::Reverse, Question::Count];

impl Question {
    fn name(self) -> &'static str {
        match self {
            Self::Copy => "copying",
            Self::Reverse => "reversing",
            Self::Count => "counting",
        }
    }

    fn answer(self, word: &[u32]) -> Vec<u32> {
        match self {
            Self::Copy => word.to_vec(),
            Self::Reverse => word.iter().rev().copied().collect(),
            Self::Count => {
                let count = word.iter().filter(|symbol| **symbol == 0).count();
                vec![count as u32 % MODULUS]
            }
        }
    }
}

/// A word of random length, the mark, and the answer, which counts with the mark that ends it.
#[derive(Clone, Copy, Debug)]
struct Words {
    question: Question,
    least: usize,
    most: usize,
}

impl Words {
    /// Tokens that are enough for the longest word and its answer.
    fn tokens(most: usize) -> usize {
        2 * most + 1
    }

    /// A word, the mark, the answer and the end, and where the answer starts.
    fn example(&self, generator: &mut Generator) -> (Vec<u32>, usize) {
        let count = generator.random_range(self.least..=self.most);
        let word: Vec<u32> = match self.question {
            // Half are the counted one, so that counts are spread over the word's length.
            Question::Count => {
                let other = |generator: &mut Generator| generator.random_range(1..SYMBOLS);
                let one = |generator: &mut Generator| match generator.random_bool(0.5) {
                    true => 0,
                    false => other(generator),
                };
                (0..count).map(|_| one(generator)).collect()
            }
            Question::Copy | Question::Reverse => (0..count)
                .map(|_| generator.random_range(0..SYMBOLS))
                .collect(),
        };
        let answer = self.question.answer(&word);
        let start = word.len() + 1;
        let tokens = word.into_iter().chain([ANSWER]).chain(answer).chain([END]);
        (tokens.collect(), start)
    }
}

impl Task for Words {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let (tokens, start) = self.example(generator);
            let from = batch.inputs.len();
            batch.inputs.extend(tokens.iter().take(length));
            let next = tokens.iter().enumerate().skip(1).take(length);
            let target = |(place, token): (usize, &u32)| match place >= start {
                true => *token,
                false => IGNORE,
            };
            batch.targets.extend(next.map(target));
            batch.inputs.resize(from + length, END);
            batch.targets.resize(from + length, IGNORE);
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// How much is done.
struct Size {
    width: usize,
    blocks: usize,
    /// The longest word of training.
    most: usize,
    steps: u64,
    batch: usize,
    seeds: u64,
    asked: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 16,
                blocks: 1,
                most: 3,
                steps: 1,
                batch: 2,
                seeds: 1,
                asked: 2,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 2,
                most: 16,
                steps: 600,
                batch: 16,
                seeds: 1,
                asked: 64,
            },
            Scale::Full => Self {
                width: 128,
                blocks: 4,
                most: 40,
                steps: 10_000,
                batch: 64,
                seeds: 3,
                asked: 256,
            },
        }
    }

    /// Lengths of the words that are asked about: the longest of training, twice and four times that.
    fn lengths(&self) -> [usize; 3] {
        [1, 2, 4].map(|times| times * self.most)
    }

    /// How a decoder knows positions, and whether it has a table of them.
    fn ways(&self) -> [(&'static str, (PositionSpec, bool)); 4] {
        let fire = FireSpec {
            initial_length: self.most.max(2),
            ..FireSpec::default()
        };
        let drawn = FireSpec {
            randomised: Some(Words::tokens(4 * self.most)),
            ..fire.clone()
        };
        [
            ("learned table", (PositionSpec::None, true)),
            ("rotary", (PositionSpec::Rotary(Default::default()), false)),
            (FIRE, (PositionSpec::Fire(fire), false)),
            (RANDOMISED, (PositionSpec::Fire(drawn), false)),
        ]
    }

    fn spec(&self, (position, table): &(PositionSpec, bool)) -> ModelSpec {
        let attention = MultiHeadSpec {
            causal: true,
            position: position.clone(),
            ..MultiHeadSpec::new(HEADS)
        };
        let longest = Words::tokens(4 * self.most);
        let attentions = vec![attention; self.blocks];
        let mut spec = attending::spec(VOCABULARY, self.width, longest, &attentions);
        if let InputSpec::Tokens(tokens) = &mut spec.input
            && !table
        {
            tokens.position = AbsolutePosition::None;
        }
        spec
    }
}

const FIRE: &str = "FIRE";
const RANDOMISED: &str = "FIRE, random positions";

/// The share of words of one length whose answer is right to the end.
fn exact_matches(model: &Model, question: Question, length: usize, asked: usize) -> Result<f64> {
    let mut task = Words {
        question,
        least: length,
        most: length,
    };
    let tokens = Words::tokens(length);
    let mut draws = generator(0x0f19e);
    let batch = task.batch(&mut draws, asked, tokens)?;
    let (inputs, _) = batch.tensors(&Device::Cpu)?;
    let logits = model
        .forward(&Input::tokens(inputs), Pass::default())?
        .into_logits()?
        .into_value();
    // An answer that is right where each token follows the right ones before it is the greedy one.
    let said = numbers(&engine(logits.argmax(D::Minus1))?)?;
    let rows = said
        .chunks(tokens)
        .zip(batch.targets.chunks(tokens))
        .map(|(said, targets)| {
            let mut pairs = said.iter().zip(targets);
            pairs.all(|(said, target)| *target == IGNORE || *said == f64::from(*target))
        });
    Ok(mean(rows.map(|right| f64::from(u8::from(right)))))
}

/// What one decoder does: exact matches at each length, and its curves where it is asked for them.
type Found = (Vec<f64>, Vec<curves::Curve>);

/// Runs this part of the experiment.
pub(super) fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let recipe = Recipe {
        batch: size.batch,
        length: Words::tokens(size.most),
        peak: 2e-3,
        narrow: true,
        ..Recipe::default()
    };
    let (mut claims, mut plots) = (Vec::new(), Vec::new());
    for question in QUESTIONS {
        let task = Words {
            question,
            least: 1,
            most: size.most,
        };
        let train = |way: &(PositionSpec, bool), seed: u64| -> Result<Found> {
            let spec = size.spec(way);
            let model = train_by(recipe, spec, Box::new(task), size.steps, seed)?;
            let each = size
                .lengths()
                .map(|length| exact_matches(&model, question, length, size.asked));
            let learned = match (&way.0, seed == setting.seed) {
                (PositionSpec::Fire(fire), true) if fire.randomised.is_none() => {
                    curves::of(&model, Words::tokens(size.most))?
                }
                _ => Vec::new(),
            };
            Ok((each.into_iter().collect::<Result<_>>()?, learned))
        };
        let found = by_seed(setting, question.name(), &size.ways(), size.seeds, train)?;
        let averaged: Vec<(&str, Vec<f64>)> = found
            .iter()
            .map(|(name, runs)| (*name, averages(runs, size.lengths().len())))
            .collect();
        claims.push(claim(setting.scale, &size, question, &averaged));
        plots.push(plot(&size, question, &averaged));
        if question == Question::Copy {
            let copies = is_learned(averaged.iter().filter(|(name, _)| *name == FIRE));
            let runs = found.into_iter().flat_map(|(_, runs)| runs);
            let learned: Vec<curves::Curve> = runs.flat_map(|(_, learned)| learned).collect();
            let verdict = after_learning(setting.scale, copies, curves::both_kinds(&learned));
            let claim = curves::claim(&learned, question.name(), verdict);
            claims
                .push(claim.noted("not measured unless FIRE copies half of the words of training"));
            plots.push(curves::plot(learned, question.name()));
        }
    }
    Ok(Reproduction {
        setting: format!(
            "words of 1 to {} of {SYMBOLS} symbols, decoders of {} blocks of width {}, {} steps of {}, \
             {} asked of each length, {} seed(s)",
            size.most, size.blocks, size.width, size.steps, size.batch, size.asked, size.seeds
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

/// Over seeds, at each length.
fn averages(runs: &[Found], lengths: usize) -> Vec<f64> {
    let at = |index: usize| mean(runs.iter().filter_map(|(each, _)| each.get(index).copied()));
    (0..lengths).map(at).collect()
}

/// Whether one of them is right about half of the words that are as long as those of training.
fn is_learned<'a>(mut found: impl Iterator<Item = &'a (&'a str, Vec<f64>)>) -> bool {
    found.any(|(_, each)| each.first().is_some_and(|share| *share >= LEARNED))
}

fn claim(scale: Scale, size: &Size, question: Question, found: &[(&str, Vec<f64>)]) -> Claim {
    // Mean over the lengths beyond training.
    let beyond = |name: &str| {
        let found = found.iter().find(|(known, _)| *known == name);
        mean(
            found
                .into_iter()
                .flat_map(|(_, each)| each.iter().skip(1).copied()),
        )
    };
    let others = beyond("rotary").max(beyond("learned table"));
    let listed = found.iter().map(|(name, each)| {
        let each: Vec<String> = each
            .iter()
            .map(|share| format!("{:.0}", 100.0 * share))
            .collect();
        format!("{name} {}", each.join(" "))
    });
    let listed: Vec<String> = listed.collect();
    Claim::new(
        &format!(
            "{} words longer than in training, FIRE with and without random positions is right more often \
             than rotary positions and a learned table",
            question.name()
        ),
        "expected of length generalisation; the paper has no such task",
        format!(
            "% exactly right at lengths {:?}: {}",
            size.lengths(),
            listed.join("; ")
        ),
        after_learning(
            scale,
            is_learned(found.iter()),
            beyond(FIRE) > others && beyond(RANDOMISED) > others,
        ),
    )
    .noted("not measured unless one of them is right about half of the words of training")
}

fn plot(size: &Size, question: Question, found: &[(&str, Vec<f64>)]) -> Plot {
    let series = found.iter().map(|(name, each)| Series {
        name: (*name).to_owned(),
        points: size
            .lengths()
            .iter()
            .zip(each)
            .map(|(length, share)| (*length as f64, 100.0 * share))
            .collect(),
    });
    Plot {
        title: format!("Exactly right when {}", question.name()),
        x: "symbols of the word".to_owned(),
        y: "% of words".to_owned(),
        series: series.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_what_is_asked() {
        assert_eq!(Question::Copy.answer(&[3, 0, 1]), [3, 0, 1]);
        assert_eq!(Question::Reverse.answer(&[3, 0, 1]), [1, 0, 3]);
        assert_eq!(Question::Count.answer(&[0, 2, 0, 0, 0, 0, 0, 4]), [1]);
    }

    #[test]
    fn rows_ask_for_the_answer_and_its_end_alone() {
        for question in QUESTIONS {
            let mut task = Words {
                question,
                least: 1,
                most: 6,
            };
            let length = Words::tokens(6);
            let batch = task.batch(&mut generator(3), 20, length).unwrap();
            let rows = batch
                .inputs
                .chunks(length)
                .zip(batch.targets.chunks(length));
            for (tokens, targets) in rows {
                let mark = tokens.iter().position(|token| *token == ANSWER).unwrap();
                let answer = question.answer(&tokens[..mark]);
                let mut expected = vec![IGNORE; mark];
                expected.extend(answer);
                expected.push(END);
                expected.resize(length, IGNORE);
                assert_eq!(targets, expected);
            }
        }
    }
}
