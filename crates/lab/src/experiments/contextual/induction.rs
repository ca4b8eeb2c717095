//! A circuit that is known: what attention alone must do to continue a pattern it has seen.

use crate::Result;
use crate::experiments::decoder::{self, Recipe};
use crate::experiments::logit_attribution::rank_correlation;
use crate::experiments::{mean, numbers};
use lapidary_explain::analyses::attention::head_patterns;
use lapidary_explain::contextual::{
    Ablation, Case, Control, Endpoint, Means, Method, Metric, Node, NodeScore, Outliers, Place,
    Scorer, Search, decompose, discover, heads,
};
use lapidary_explain::{Question, Target};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{HeadSpec, Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};
use lapidary_train::data::{IGNORE, Induction, Task};
use lapidary_train::{Generator, generator};
use rand::RngExt;
use std::collections::BTreeMap;
use std::time::Instant;

use crate::error::engine;

const SYMBOLS: usize = 32;
const LENGTH: usize = 32;
/// Tokens of a prompt, whose last one has been seen before.
const PROMPT: usize = 28;

/// What was found of the planted circuit.
pub struct Planted {
    /// Share of the prompts that the model continues rightly.
    pub accuracy: f64,
    /// Largest error of what is exact, relative to the largest score.
    pub error: f64,
    /// The circuit that was found.
    pub circuit: Vec<Node>,
    /// Its faithfulness.
    pub faithfulness: f64,
    /// The most faithful three (or fewer) of its heads.
    pub best: (Vec<Node>, f64),
    /// The head of block 0 that puts most weight on the token before, and how much.
    pub previous: (Node, f64),
    /// The head of block 1 that puts most weight on what followed, and how much.
    pub induction: (Node, f64),
    /// Rank correlation of contributions and ablation, split and frozen.
    pub agreement: [f64; 2],
    /// Random circuits.
    pub controls: Vec<Control>,
}

/// A prompt with where its last token stood before.
struct Prompt {
    case: Case,
    /// Position of the token that followed it.
    followed: usize,
}

/// Trains the decoder and takes it apart.
pub fn run(steps: u64, prompts: usize, seed: u64) -> Result<Planted> {
    let model = trained(steps, seed)?;
    let mut generator = generator(seed ^ 0x1d0c);
    let reference = draw(2 * prompts, &mut generator)?;
    let prompts = draw(prompts, &mut generator)?;
    let cases: Vec<Case> = prompts.iter().map(|prompt| prompt.case.clone()).collect();
    let inputs: Vec<&Input> = reference.iter().map(|prompt| &prompt.case.input).collect();
    let means = Means::by_position(&model, &inputs)?;
    let all = heads(&model)?;

    let scorer = |rules| {
        let method = Method::Contextual(rules, NodeScore::Share);
        Scorer::new(&model, &cases, means.clone(), method)
    };
    let split = scorer(rules(AttentionSplit::Split))?;
    let circuit = discover(&split, &search(), &all)?.nodes;
    let ablation = Ablation::new(&model, &cases, means.clone(), Metric::ScoreDifference)?;
    let faithfulness = first(&ablation.faithfulness(std::slice::from_ref(&circuit))?);
    let costs = costs(&ablation, &all)?;
    let mut agreement = [0.0; 2];
    let frozen = scorer(rules(AttentionSplit::Frozen))?;
    for (agreement, scorer) in agreement.iter_mut().zip([&split, &frozen]) {
        let scores = scorer.scores(&all, &[Endpoint::Scores])?;
        let scores: Vec<f64> = scores.iter().map(|row| first(row)).collect();
        *agreement = rank_correlation(&scores, &costs);
    }
    let (previous, induction) = roles(&model, &prompts)?;
    Ok(Planted {
        accuracy: accuracy(&model, &cases)?,
        error: largest_error(&model, &cases)?,
        best: best_three(&ablation, &circuit)?,
        controls: ablation.controls(faithfulness, &all, 10, &mut generator)?,
        circuit,
        faithfulness,
        previous,
        induction,
        agreement,
    })
}

fn rules(attention: AttentionSplit) -> ContextualRules {
    ContextualRules {
        attention,
        stabilise: true,
    }
}

/// Two heads a round, as published; what a head reads is looked at in all three ways.
fn search() -> Search {
    Search {
        places: vec![Place::Query, Place::Key, Place::Value],
        outliers: Outliers::Top(2),
        ..Search::default()
    }
}

fn first(values: &[f64]) -> f64 {
    values.first().copied().unwrap_or(f64::NAN)
}

/// How much the metric falls when each head alone is set to its mean.
fn costs(ablation: &Ablation<'_>, all: &[Node]) -> Result<Vec<f64>> {
    let without = |node: &Node| all.iter().copied().filter(|one| one != node).collect();
    let circuits: Vec<Vec<Node>> = all.iter().map(without).collect();
    let values = ablation.values(&circuits)?;
    Ok(values.iter().map(|value| ablation.full() - value).collect())
}

/// The most faithful of a circuit's subsets of three, or the circuit if it is no larger.
fn best_three(ablation: &Ablation<'_>, circuit: &[Node]) -> Result<(Vec<Node>, f64)> {
    let mut subsets = vec![Vec::new()];
    for node in circuit {
        let with = subsets
            .iter()
            .filter(|subset| subset.len() < 3)
            .map(|subset| {
                let mut with = subset.clone();
                with.push(*node);
                with
            });
        let with: Vec<Vec<Node>> = with.collect();
        subsets.extend(with);
    }
    let faithfulness = ablation.faithfulness(&subsets)?;
    let each = subsets.into_iter().zip(faithfulness);
    let best = each.max_by(|a, b| a.1.total_cmp(&b.1));
    Ok(best.unwrap_or_default())
}

/// Prompts `[1, PROMPT]` whose last token has been seen with a successor, which is the answer;
/// the wrong answer is another token that has been seen.
fn draw(count: usize, generator: &mut Generator) -> Result<Vec<Prompt>> {
    let mut task = Induction::new(SYMBOLS)?;
    let mut prompts = Vec::with_capacity(count);
    while prompts.len() < count {
        let batch = task.batch(generator, 16, LENGTH)?;
        let rows = batch
            .inputs
            .chunks(LENGTH)
            .zip(batch.targets.chunks(LENGTH));
        for (tokens, targets) in rows {
            let (Some(tokens), Some(&answer)) = (tokens.get(..PROMPT), targets.get(PROMPT - 1))
            else {
                continue;
            };
            let seen = &tokens[..LENGTH / 2];
            let position = seen.iter().position(|token| *token == answer);
            let Some(followed) = position.filter(|_| answer != IGNORE && prompts.len() < count)
            else {
                continue;
            };
            let others: Vec<u32> = seen.iter().copied().filter(|t| *t != answer).collect();
            let foil = others[generator.random_range(0..others.len())];
            let ids = engine(Tensor::from_slice(tokens, (1, PROMPT), &Device::Cpu))?;
            prompts.push(Prompt {
                case: Case {
                    input: Input::tokens(ids),
                    target: Target::Score {
                        class: answer as usize,
                        foil: Some(foil as usize),
                        position: None,
                    },
                    contrast: None,
                },
                followed,
            });
        }
    }
    Ok(prompts)
}

/// The head of block 0 that looks back by one most, and the head of block 1 that looks most from
/// the last token at what followed it.
fn roles(model: &Model, prompts: &[Prompt]) -> Result<((Node, f64), (Node, f64))> {
    let mut back: BTreeMap<Node, f64> = BTreeMap::new();
    let mut followed: BTreeMap<Node, f64> = BTreeMap::new();
    for prompt in prompts {
        for pattern in head_patterns(&Question::new(model, &prompt.case.input))? {
            let node = Node {
                block: pattern.block,
                head: pattern.head,
                position: None,
            };
            if node.block == 0 {
                *back.entry(node).or_default() += pattern.previous;
            } else {
                let row = pattern.weights.last();
                let weight = row.and_then(|row| row.get(prompt.followed)).copied();
                *followed.entry(node).or_default() += weight.unwrap_or(0.0);
            }
        }
    }
    let most = |weights: BTreeMap<Node, f64>| {
        let best = weights.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let nobody = Node {
            block: 0,
            head: 0,
            position: None,
        };
        let (node, sum) = best.unwrap_or((nobody, f64::NAN));
        (node, sum / prompts.len().max(1) as f64)
    };
    Ok((most(back), most(followed)))
}

fn accuracy(model: &Model, cases: &[Case]) -> Result<f64> {
    let mut right = Vec::with_capacity(cases.len());
    for case in cases {
        let pass = Pass {
            only_last: true,
            ..Pass::default()
        };
        let logits = numbers(model.forward(&case.input, pass)?.into_logits()?.value())?;
        let said = lapidary_explain::faithfulness::masking::most_likely(&logits);
        let Target::Score { class, .. } = case.target else {
            continue;
        };
        right.push(f64::from(u8::from(said == class)));
    }
    Ok(mean(right))
}

/// What everything gives less the score, and what nothing gives, relative to the largest score.
fn largest_error(model: &Model, cases: &[Case]) -> Result<f64> {
    let (mut error, mut largest) = (0f64, f64::MIN_POSITIVE);
    for case in cases.iter().take(8) {
        for attention in [AttentionSplit::Frozen, AttentionSplit::Split] {
            for stabilise in [false, true] {
                let rules = ContextualRules {
                    attention,
                    stabilise,
                };
                let question = Question::new(model, &case.input);
                let sources = [(0..PROMPT).collect(), Vec::new()];
                let (scores, explained) = decompose(&question, &[case.target], &sources, rules)?;
                if let ([scores], [explained]) = (scores.as_slice(), explained.as_slice())
                    && let [all, none] = scores.as_slice()
                {
                    error = error.max((all - explained).abs()).max(none.abs());
                    largest = largest.max(explained.abs());
                }
            }
        }
    }
    Ok(error / largest)
}

/// A decoder whose output is not tied to its embeddings.
fn spec(blocks: usize, heads: usize, width: usize) -> ModelSpec {
    let mut spec = decoder::spec(SYMBOLS, width, blocks);
    for block in &mut spec.blocks {
        if let MixerSpec::MultiHead(attention) = &mut block.attention {
            attention.heads = heads;
        }
    }
    if let HeadSpec::LanguageModel { tied, .. } = &mut spec.head {
        *tied = false;
    }
    spec
}

/// Two blocks of attention alone.
fn trained(steps: u64, seed: u64) -> Result<Model> {
    let mut spec = spec(2, 4, 64);
    for block in &mut spec.blocks {
        block.feedforward = None;
    }
    let recipe = Recipe {
        batch: 64,
        length: LENGTH,
        ..Recipe::default()
    };
    let task = Box::new(Induction::new(SYMBOLS)?);
    decoder::train_by(recipe, spec, task, steps, seed)
}

/// Seconds that the same scores take.
pub struct Times {
    pub sources: usize,
    pub contextual: f64,
    pub patching: f64,
}

/// Times the scores of every head to the model's scores and to each head of the last block, in
/// an untrained decoder with feed-forward parts: what the weights are makes no difference.
pub fn times(
    [blocks, heads_of_block, width]: [usize; 3],
    prompts: usize,
    seed: u64,
) -> Result<Times> {
    let spec = spec(blocks, heads_of_block, width);
    let initial = &mut Initialiser::new(seed, DType::F32, Device::Cpu);
    let model = Model::new(spec, initial)?;
    let cases: Vec<Case> = draw(prompts, &mut generator(seed))?
        .into_iter()
        .map(|prompt| prompt.case)
        .collect();
    let inputs: Vec<&Input> = cases.iter().map(|case| &case.input).collect();
    let means = Means::by_position(&model, &inputs)?;
    let all = heads(&model)?;
    let last = all.iter().filter(|node| node.block + 1 == blocks);
    let mut ends: Vec<Endpoint> = last
        .map(|node| Endpoint::Head(*node, Place::Mixed))
        .collect();
    ends.push(Endpoint::Scores);
    let rules = rules(AttentionSplit::Split);
    let seconds = |method| -> Result<f64> {
        let scorer = Scorer::new(&model, &cases, means.clone(), method)?;
        // Once for the caches.
        scorer.scores(all.get(..1).unwrap_or_default(), &ends)?;
        let started = Instant::now();
        scorer.scores(&all, &ends)?;
        Ok(started.elapsed().as_secs_f64())
    };
    Ok(Times {
        sources: all.len(),
        contextual: seconds(Method::Contextual(rules, NodeScore::Share))?,
        patching: seconds(Method::PathPatching)?,
    })
}
