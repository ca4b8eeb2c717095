//! Direct logit attribution beside what happens when parts are taken out.
//!
//! On sentences whose right word and wrong alternative are known, each part's direct
//! contribution to the difference of the two logits is compared with how much the difference
//! falls when the part's write at the last position is replaced by its mean over the other
//! sentences. The first leaves out what a part does through later parts, the second does not, so
//! they need not agree.

use super::{after_training, decoder, mean, numbers};
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::{Target, direct_logit_attribution};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::{Signal, Trace};
use lapidary_train::language::{Language, Split};
use std::collections::BTreeMap;

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    sentences: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 3,
                steps: 0,
                sentences: 6,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 3,
                steps: 800,
                sentences: 60,
            },
            Scale::Full => Self {
                width: 128,
                blocks: 4,
                steps: 3000,
                sentences: 400,
            },
        }
    }
}

/// A sentence up to its target.
struct Question {
    input: Input,
    target: usize,
    foil: usize,
}

/// Direct attribution and effect of ablation of each part, for one sentence.
struct Answer {
    difference: f64,
    attribution: Vec<f64>,
    effect: Vec<f64>,
    /// `|Σ scores − difference|`, relative to the largest score.
    error: f64,
    site_error: f64,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let model = decoder::train_on_language(size.width, size.blocks, size.steps, setting.seed)?;
    let questions = questions(size.sentences, setting.seed)?;
    let parts = parts(&model);
    let writes = questions
        .iter()
        .map(|question| writes(&model, &parts, question))
        .collect::<Result<Vec<_>>>()?;
    let answers = questions
        .iter()
        .enumerate()
        .map(|(index, question)| answer(&model, &parts, question, &means(&writes, index)?))
        .collect::<Result<Vec<_>>>()?;
    Ok(Reproduction {
        setting: format!(
            "decoder of {} blocks, width {}, after {} steps on the generated language; {} \
             held-out sentences with a wrong alternative, of which it gets {:.0} % right",
            size.blocks,
            size.width,
            size.steps,
            size.sentences,
            100.0
                * mean(
                    answers
                        .iter()
                        .map(|a| f64::from(u8::from(a.difference > 0.0)))
                ),
        ),
        claims: claims(setting.scale, &answers),
        plots: vec![plot(&parts, &answers)],
        ..Reproduction::default()
    })
}

fn questions(count: usize, seed: u64) -> Result<Vec<Question>> {
    let language = Language::new(seed);
    let corpus = decoder::corpus(Split::HeldOut, seed)?;
    let vocabulary = language.vocabulary();
    let mut questions = Vec::new();
    for sentence in corpus.sentences(0).take(count) {
        let tokens = sentence.tokens(vocabulary)?;
        // Token 0 is the start, so that the target is token `target + 1`.
        let prefix: Vec<u32> = tokens.into_iter().take(sentence.target + 1).collect();
        let shape = (1, prefix.len());
        questions.push(Question {
            input: Input::tokens(engine(Tensor::from_vec(prefix, shape, &Device::Cpu))?),
            target: vocabulary.identifier(sentence.target_word())? as usize,
            foil: vocabulary.identifier(sentence.foil)? as usize,
        });
    }
    Ok(questions)
}

/// The parts that write to the residual stream, in order.
fn parts(model: &Model) -> Vec<String> {
    (0..model.spec().expanded_blocks().len())
        .flat_map(|index| ["attention", "feedforward"].map(|part| format!("blocks.{index}.{part}")))
        .collect()
}

/// What each part writes at the last position: `[1, 1, width]` by part.
fn writes(
    model: &Model,
    parts: &[String],
    question: &Question,
) -> Result<BTreeMap<String, Tensor>> {
    let trace = Trace::new().capture("blocks.*.{attention,feedforward}.out")?;
    model.forward(
        &question.input,
        Pass {
            trace: Some(&trace),
            ..Pass::default()
        },
    )?;
    let mut writes = BTreeMap::new();
    for part in parts {
        let written = trace.signal(&format!("{part}.out"))?.into_value();
        let last = engine(written.dim(1))?.saturating_sub(1);
        writes.insert(part.clone(), engine(written.narrow(1, last, 1))?);
    }
    Ok(writes)
}

/// The mean of each part's write over all sentences but one.
fn means(writes: &[BTreeMap<String, Tensor>], but: usize) -> Result<BTreeMap<String, Tensor>> {
    let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
    for (_, others) in writes.iter().enumerate().filter(|(index, _)| *index != but) {
        for (part, write) in others {
            let sum = match sums.remove(part) {
                Some(sum) => engine(sum + write)?,
                None => write.clone(),
            };
            sums.insert(part.clone(), sum);
        }
    }
    let count = writes.len().saturating_sub(1).max(1) as f64;
    sums.into_iter()
        .map(|(part, sum)| Ok((part, engine(sum / count)?)))
        .collect()
}

fn answer(
    model: &Model,
    parts: &[String],
    question: &Question,
    means: &BTreeMap<String, Tensor>,
) -> Result<Answer> {
    let target = Target::Score {
        class: question.target,
        foil: Some(question.foil),
        position: None,
    };
    let explanation = direct_logit_attribution(model, &question.input, None, target)?;
    let account = &explanation.account;
    let scale = explanation
        .scores
        .iter()
        .fold(f64::MIN_POSITIVE, |m, s| m.max(s.abs()));
    let (mut attribution, mut effect) = (Vec::new(), Vec::new());
    for part in parts {
        let direct = explanation.labels.iter().zip(&explanation.scores);
        attribution.push(
            direct
                .filter(|(label, _)| *label == part)
                .map(|(_, s)| *s)
                .sum(),
        );
        let Some(mean) = means.get(part).cloned() else {
            continue;
        };
        let trace = Trace::new().replace(&format!("{part}.out"), move |_, signal| {
            replace_last(signal, &mean)
        })?;
        effect.push(account.explained - difference_of(model, question, &trace)?);
    }
    Ok(Answer {
        difference: account.explained,
        error: account.unattributed.abs() / scale,
        site_error: account.largest_site_error.unwrap_or(f64::NAN),
        attribution,
        effect,
    })
}

/// `signal` `[1, length, width]` with `vector` at the last position.
fn replace_last(signal: Signal, vector: &Tensor) -> lapidary_signal::Result<Signal> {
    let value = signal.into_value();
    let last = value.dims().get(1).map_or(0, |length| length - 1);
    let joined = value
        .narrow(1, 0, last)
        .and_then(|before| Tensor::cat(&[&before, vector], 1))
        .map_err(lapidary_kernels::Error::from)?;
    Ok(Signal::from(joined))
}

/// Logit of the target less that of the foil, at the last position.
fn difference_of(model: &Model, question: &Question, trace: &Trace) -> Result<f64> {
    let pass = Pass {
        trace: Some(trace),
        only_last: true,
        ..Pass::default()
    };
    let logits = numbers(model.forward(&question.input, pass)?.into_logits()?.value())?;
    let at = |token: usize| logits.get(token).copied().unwrap_or(f64::NAN);
    Ok(at(question.target) - at(question.foil))
}

/// Spearman's rank correlation, for values without ties; 0 for fewer than two.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| -> Vec<f64> {
        let below = |value: &f64| values.iter().filter(|other| *other < value).count() as f64;
        values.iter().map(below).collect()
    };
    let n = a.len().min(b.len()) as f64;
    if n < 2.0 {
        return 0.0;
    }
    let squares: f64 = ranks(a)
        .iter()
        .zip(ranks(b))
        .map(|(a, b)| (a - b).powi(2))
        .sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

/// Mean over the sentences, part by part.
fn by_part(answers: &[Answer], of: impl Fn(&Answer) -> &Vec<f64>) -> Vec<f64> {
    let parts = answers.first().map_or(0, |answer| of(answer).len());
    (0..parts)
        .map(|part| mean(answers.iter().filter_map(|a| of(a).get(part)).copied()))
        .collect()
}

fn claims(scale: Scale, answers: &[Answer]) -> Vec<Claim> {
    let error = answers
        .iter()
        .fold(0.0, |m: f64, answer| m.max(answer.error));
    let site_error = answers
        .iter()
        .fold(0.0, |m: f64, answer| m.max(answer.site_error));
    let each = mean(
        answers
            .iter()
            .map(|a| rank_correlation(&a.attribution, &a.effect)),
    );
    let overall = rank_correlation(
        &by_part(answers, |a| &a.attribution),
        &by_part(answers, |a| &a.effect),
    );
    let top = |values: &[f64]| (0..values.len()).max_by(|a, b| values[*a].total_cmp(&values[*b]));
    let same = mean(
        answers
            .iter()
            .map(|a| f64::from(u8::from(top(&a.attribution) == top(&a.effect)))),
    );
    vec![
        Claim::new(
            "the parts' contributions and the biases sum to the difference of the logits",
            "exact",
            format!("largest relative error {error:.1e}, at any site {site_error:.1e}, in f32"),
            Verdict::of(error < 1e-4 && site_error < 1e-4),
        ),
        Claim::new(
            "parts with more direct attribution cost more when their write is replaced by its \
             mean over other sentences: rank correlation of at least 0.5, sentence by sentence",
            "none published",
            format!("{each:.2} on average over sentences; {overall:.2} for the parts' means"),
            after_training(scale, each >= 0.5),
        )
        .noted("attribution leaves out what a part does through later parts; ablation does not"),
        Claim::new(
            "the part with the highest attribution is the one whose ablation costs most in at \
             least half of the sentences",
            "none published",
            format!("{:.0} % of {} sentences", 100.0 * same, answers.len()),
            after_training(scale, same >= 0.5),
        ),
    ]
}

fn plot(parts: &[String], answers: &[Answer]) -> Plot {
    let line = |name: &str, values: Vec<f64>| Series {
        name: name.to_owned(),
        points: values
            .into_iter()
            .enumerate()
            .map(|(x, y)| (x as f64, y))
            .collect(),
    };
    Plot {
        title: "Direct attribution and ablation, mean over sentences".to_owned(),
        x: format!(
            "part, from {} on",
            parts.first().map_or("none", String::as_str)
        ),
        y: "logit difference".to_owned(),
        series: vec![
            line("direct attribution", by_part(answers, |a| &a.attribution)),
            line("fall under mean-ablation", by_part(answers, |a| &a.effect)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::rank_correlation;

    #[test]
    fn rank_correlations_by_hand() {
        assert_eq!(rank_correlation(&[1.0, 2.0, 30.0], &[-5.0, 0.0, 0.5]), 1.0);
        assert_eq!(rank_correlation(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), -1.0);
        // Ranks 0 1 2 3 and 1 0 3 2: 1 − 6 · 4 / 60.
        assert!((rank_correlation(&[1., 2., 3., 4.], &[2., 1., 4., 3.]) - 0.6).abs() < 1e-12);
    }
}
