//! Words that mean the opposite after another word.

use crate::experiments::classifier::{self, Course, Encoder, Labelled, Masking, Narrow};
use crate::experiments::mean;
use crate::experiments::polarity::{self, CLS, Sentence};
use crate::{Plot, Result, Series};
use lapidary_explain::contextual::decompose;
use lapidary_explain::faithfulness::masking::{Curve, Example, Masks, RATIOS, curve, most_likely};
use lapidary_explain::{Question, Target, decompx};
use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, Model};
use lapidary_signal::contextual::ContextualRules;
use lapidary_signal::streams::StreamRules;
use lapidary_train::generator;

/// As published for encoders: frozen attention, with the stabiliser.
const RULES: ContextualRules = ContextualRules {
    attention: lapidary_signal::contextual::AttentionSplit::Frozen,
    stabilise: true,
};

/// What was found of phrases and tokens.
pub struct Phrases {
    /// Accuracy on held-out sentences.
    pub accuracy: f64,
    /// Number of phrases.
    pub count: usize,
    /// Share of phrases that speak against positive when scored as one.
    pub negative: f64,
    /// The same of their first words alone.
    pub negators: f64,
    /// The same of their second words alone.
    pub words: f64,
    /// AOPC of token scores.
    pub aopc: f64,
    /// AOPC of DecompX's.
    pub decompx_aopc: f64,
    curves: [Curve; 2],
}

/// Trains the classifier and scores its words.
pub fn run(examples: usize, steps: u64, tests: usize, seed: u64) -> Result<Phrases> {
    let mut generator = generator(seed);
    let training = polarity::sentences(examples, &mut generator);
    let tests = polarity::sentences(tests, &mut generator);
    let spec = Encoder {
        vocabulary: polarity::VOCABULARY,
        length: 32,
        width: 64,
        heads: 4,
        blocks: 3,
        labels: 2,
    }
    .spec();
    let mut initial = Narrow(Initialiser::new(seed, DType::F32, Device::Cpu));
    let model = classifier::train(
        &Model::trainable(spec, &mut initial)?,
        &training.iter().map(Sentence::labelled).collect::<Vec<_>>(),
        &Course {
            steps,
            batch: 64,
            rate: 1e-3,
            masking: Some(Masking {
                token: polarity::MASK,
                probability: 0.15,
                from: steps * 7 / 10,
            }),
            seed,
        },
    )?;
    evaluate(&model, &tests)
}

fn evaluate(model: &Model, tests: &[Sentence]) -> Result<Phrases> {
    let labelled: Vec<Labelled> = tests.iter().map(Sentence::labelled).collect();
    let mut signs: [Vec<f64>; 3] = Default::default();
    for test in tests {
        for [phrase, negator, word] in phrase_scores(model, test)? {
            for (signs, score) in signs.iter_mut().zip([phrase, negator, word]) {
                signs.push(f64::from(u8::from(score < 0.0)));
            }
        }
    }
    let tokens: Vec<&[u32]> = tests.iter().map(|test| test.tokens.as_slice()).collect();
    let predicted = classifier::probabilities(model, &tokens)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (test, said) in tests.iter().zip(&predicted) {
        let (input, _) = classifier::batch(&[&test.tokens])?;
        let target = Target::class(most_likely(said));
        let each: Vec<Vec<usize>> = (0..test.tokens.len()).map(|at| vec![at]).collect();
        let question = Question::new(model, &input);
        let (scores, _) = decompose(&question, &[target], &each, RULES)?;
        ours.extend(scores);
        let rules = StreamRules::default();
        theirs.push(decompx(model, &input, None, target, rules)?.scores);
    }
    let masks = Masks {
        token: polarity::MASK,
        is_special: &polarity::is_special,
    };
    let curve_of = |scores: &[Vec<f64>]| {
        let predict = |sequences: &[Vec<u32>]| classifier::probabilities(model, sequences);
        let example = |(labelled, scores): (_, _)| example(labelled, scores);
        let examples: Vec<Example<'_>> = labelled.iter().zip(scores).map(example).collect();
        curve(&examples, masks, &RATIOS, predict)
    };
    let curves = [curve_of(&ours)?, curve_of(&theirs)?];
    let [negative, negators, words] = &signs;
    let share = |signs: &[f64]| mean(signs.iter().copied());
    Ok(Phrases {
        accuracy: classifier::accuracy(model, &labelled)?,
        count: negative.len(),
        negative: share(negative),
        negators: share(negators),
        words: share(words),
        aopc: curves[0].aopc.mean,
        decompx_aopc: curves[1].aopc.mean,
        curves,
    })
}

fn example<'a>(labelled: &'a Labelled, scores: &'a Vec<f64>) -> Example<'a> {
    Example {
        tokens: &labelled.tokens,
        scores,
        label: Some(labelled.label as usize),
    }
}

/// Scores for positive rather than negative of each phrase of a sentence that negates a positive
/// word right after it, of its negator alone, and of its word alone.
fn phrase_scores(model: &Model, test: &Sentence) -> Result<Vec<[f64; 3]>> {
    let pairs = test.tokens.windows(2).enumerate();
    let is_negated = |pair: &[u32], effect: i32| {
        let alone = polarity::effects(&[CLS, pair[0], pair[1]]);
        effect == -1 && alone == [0, 0, -1] && polarity::effects(&pair[1..]) == [1]
    };
    let places: Vec<usize> = pairs
        .filter(|(at, pair)| {
            test.effects
                .get(at + 1)
                .is_some_and(|e| is_negated(pair, *e))
        })
        .map(|(at, _)| at)
        .collect();
    let sources: Vec<Vec<usize>> = places
        .iter()
        .flat_map(|&at| [vec![at, at + 1], vec![at], vec![at + 1]])
        .collect();
    let (input, _) = classifier::batch(&[&test.tokens])?;
    let target = Target::Score {
        class: 1,
        foil: Some(0),
        position: None,
    };
    let (scores, _) = decompose(&Question::new(model, &input), &[target], &sources, RULES)?;
    let scores = scores.into_iter().next().unwrap_or_default();
    Ok(scores.as_chunks::<3>().0.to_vec())
}

impl Phrases {
    /// The loss of the predicted class as tokens are masked.
    pub fn plot(&self) -> Plot {
        let line = |name: &str, curve: &Curve| Series {
            name: name.to_owned(),
            points: curve
                .points
                .iter()
                .map(|point| (point.ratio as f64, point.comprehensiveness.mean))
                .collect(),
        };
        Plot {
            title: "Loss of the predicted class as tokens are masked".to_owned(),
            x: "masked words, %".to_owned(),
            y: "AOPC(r)".to_owned(),
            series: vec![
                line("contextual decomposition", &self.curves[0]),
                line("DecompX", &self.curves[1]),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens 43 to 46 negate, 3 to 22 are positive, 23 to 42 negative.
    #[test]
    fn phrases_are_negated_positive_words() {
        let spec = Encoder {
            vocabulary: polarity::VOCABULARY,
            length: 32,
            width: 8,
            heads: 2,
            blocks: 1,
            labels: 2,
        }
        .spec();
        let model = Model::initialised(spec, 1, DType::F64, &Device::Cpu).unwrap();
        let tokens = vec![CLS, 43, 3, 60, 43, 23, 44, 60, 5, 45, 9];
        let effects = polarity::effects(&tokens);
        let test = Sentence {
            tokens,
            effects,
            label: 0,
        };
        let scores = phrase_scores(&model, &test).unwrap();
        assert_eq!(scores.len(), 2, "43 3 and 45 9");
    }
}
