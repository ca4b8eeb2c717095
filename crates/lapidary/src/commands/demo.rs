//! `lapidary demo`: the whole journey on the embedded model.
//!
//! Predict, explain, score the explanations against known evidence, compress, measure what that
//! cost, explain again, and show it all on one page.

use std::time::Instant;

use crate::cli::{Demo, Global};
use crate::commands::explain::readable;
use crate::report::{self, Coloured};
use crate::{loading, output};
use anyhow::{Context, Result};
use lapidary_compress::quality::{Window, perplexity};
use lapidary_compress::{Budget, Calibration, CalibrationOptions, Factorisation, Selection, Size};
use lapidary_explain::{Explanation, Target, decompx, direct_logit_attribution};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::streams::StreamRules;
use lapidary_train::generator;
use lapidary_train::language::{Kind, Language, Sentence, Split, Vocabulary};
use maud::{Markup, html};
use serde::Serialize;
use serde_json::json;

/// Sentences that explanations are scored on.
const SENTENCES: usize = 200;
/// Windows and tokens that perplexity is measured on.
const WINDOWS: u64 = 64;
const WINDOW: usize = 64;
/// Share of the blocks' weights that is cut.
const RATIO: f64 = 0.3;
/// Windows that the compression is calibrated on.
const CALIBRATION: usize = 64;

/// How a model does.
#[derive(Clone, Serialize)]
struct Quality {
    size: Size,
    perplexity: f64,
    scored_tokens: usize,
    /// Share of sentences of each kind where the target beats the foil.
    accuracy: Vec<(&'static str, f64)>,
    /// Tokens per second when a batch of windows is read.
    tokens_per_second: f64,
    evidence: Evidence,
}

/// How often explanations point at the words that decide.
#[derive(Clone, Copy, Default, Serialize)]
struct Evidence {
    /// Share of sentences whose highest score is on an evidence word.
    first: f64,
    /// What a random ranking would reach.
    chance: f64,
    /// Mean of one over the rank of the best evidence word.
    reciprocal_rank: f64,
    /// Largest conservation error at any site of any sentence.
    conservation_error: f64,
}

/// One sentence, explained.
struct Shown {
    sentence: Sentence,
    tokens: Vec<String>,
    predictions: Vec<(String, f64)>,
    explanation: Explanation,
    components: Explanation,
}

pub fn run(arguments: &Demo, global: &Global) -> Result<()> {
    output::check_writable(&arguments.out)?;
    let started = Instant::now();
    let package = lapidary::embedded()?;
    let model = package.single_model()?;
    let language = Language::new(loading::LANGUAGE_SEED);
    let say = |text: &str| {
        if global.json {
            Ok(())
        } else {
            output::print(text)
        }
    };

    let mut random = generator(global.seed.wrapping_add(1));
    let sentences: Vec<Sentence> = (0..SENTENCES)
        .map(|index| {
            let kind = Kind::ALL[index % Kind::ALL.len()];
            language.sentence(kind, Split::HeldOut, &mut random)
        })
        .collect();
    say(&format!(
        "A decoder of {} parameters, trained on a small language with known grammar and facts.\n\n",
        output::grouped(model.parameter_count())
    ))?;

    let examples: Vec<&Sentence> = Kind::ALL
        .iter()
        .filter_map(|kind| sentences.iter().find(|s| s.kind == *kind))
        .collect();
    let mut shown = Vec::new();
    for sentence in examples {
        shown.push(show(model, language.vocabulary(), sentence)?);
    }
    say(
        "What it predicts, on sentences it has never seen, and the words that decided (blue for, orange against):\n\n",
    )?;
    for example in &shown {
        say(&in_terminal(example))?;
    }

    let before = quality(model, &language, &sentences)?;
    say(&evidence_text(&before.evidence))?;

    let (compressed, method) = compress(model)?;
    let after = quality(&compressed, &language, &sentences)?;
    say(&comparison(&before, &after, method))?;
    let after_shown = show(
        &compressed,
        language.vocabulary(),
        &shown.first().context("no example")?.sentence,
    )?;
    say("The first sentence, explained in the compressed model:\n\n")?;
    say(&in_terminal(&after_shown))?;

    let page = page(&shown, &after_shown, &before, &after, method);
    output::write_text(&arguments.out, &page)?;
    let seconds = started.elapsed().as_secs_f64();
    if global.json {
        return output::print_json(&json!({
            "before": before,
            "after": after,
            "method": method.name(),
            "ratio": RATIO,
            "sentences": SENTENCES,
            "seed": global.seed,
            "report": arguments.out,
            "seconds": seconds,
        }));
    }
    say(&format!(
        "The report is in {} ({seconds:.1} s).\n",
        arguments.out.display()
    ))
}

/// Tokens of the sentence up to its target, and the ids of target and foil.
pub(crate) fn question(
    sentence: &Sentence,
    vocabulary: &Vocabulary,
) -> Result<(Vec<u32>, usize, usize)> {
    let mut ids = sentence.tokens(vocabulary)?;
    ids.truncate(sentence.target + 1);
    let target = vocabulary.identifier(sentence.target_word())? as usize;
    let foil = vocabulary.identifier(sentence.foil)? as usize;
    Ok((ids, target, foil))
}

fn input(ids: &[u32], model: &Model) -> Result<Input> {
    Ok(Input::tokens(loading::row(ids, model)?))
}

/// Scores of every word after `ids`.
pub(crate) fn scores(model: &Model, ids: &[u32]) -> Result<Vec<f64>> {
    let pass = Pass {
        only_last: true,
        ..Pass::default()
    };
    let logits = model
        .forward(&input(ids, model)?, pass)?
        .into_logits()?
        .into_value();
    Ok(logits.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

fn show(model: &Model, vocabulary: &Vocabulary, sentence: &Sentence) -> Result<Shown> {
    let (ids, target, foil) = question(sentence, vocabulary)?;
    let scores = scores(model, &ids)?;
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let predictions = order
        .into_iter()
        .take(3)
        .map(|index| {
            Ok((
                vocabulary.word(index as u32)?.to_owned(),
                (scores[index] - largest).exp() / total,
            ))
        })
        .collect::<Result<_>>()?;
    let tokens = ids
        .iter()
        .map(|id| Ok(readable(vocabulary.word(*id)?)))
        .collect::<Result<_>>()?;
    let target = Target::Score {
        class: target,
        foil: Some(foil),
        position: None,
    };
    let input = input(&ids, model)?;
    Ok(Shown {
        sentence: sentence.clone(),
        tokens,
        predictions,
        explanation: decompx(model, &input, None, target, StreamRules::default())?,
        components: direct_logit_attribution(model, &input, None, target)?,
    })
}

fn quality(model: &Model, language: &Language, sentences: &[Sentence]) -> Result<Quality> {
    let corpus = loading::language_corpus(Split::HeldOut)?;
    let windows: Vec<Window> = (0..WINDOWS)
        .map(|index| {
            Ok(Window {
                tokens: corpus.window(index, WINDOW)?,
                context: 1,
            })
        })
        .collect::<Result<_>>()?;
    let measured = perplexity(model, &windows, 16)?;
    let mut accuracy = Vec::new();
    for kind in Kind::ALL {
        let (mut right, mut all) = (0, 0);
        for sentence in sentences.iter().filter(|sentence| sentence.kind == kind) {
            let (ids, target, foil) = question(sentence, language.vocabulary())?;
            let scores = scores(model, &ids)?;
            right += usize::from(scores[target] > scores[foil]);
            all += 1;
        }
        accuracy.push((kind.name(), right as f64 / all.max(1) as f64));
    }
    Ok(Quality {
        size: Size::of(model),
        perplexity: measured.value,
        scored_tokens: measured.tokens,
        accuracy,
        tokens_per_second: speed(model, &windows)?,
        evidence: evidence(model, language.vocabulary(), sentences)?,
    })
}

/// Median tokens per second of reading all windows at once.
fn speed(model: &Model, windows: &[Window]) -> Result<f64> {
    let tokens: Vec<u32> = windows
        .iter()
        .flat_map(|window| window.tokens.iter().copied())
        .collect();
    let count = tokens.len();
    let rows = Tensor::from_vec(tokens, (windows.len(), WINDOW), &model.device())?;
    let input = Input::tokens(rows);
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let started = Instant::now();
            model.forward(&input, Pass::default())?;
            Ok(started.elapsed().as_secs_f64())
        })
        .collect::<Result<_>>()?;
    times.sort_by(f64::total_cmp);
    Ok(count as f64 / times[times.len() / 2])
}

/// Explains every sentence and looks where the scores point.
fn evidence(model: &Model, vocabulary: &Vocabulary, sentences: &[Sentence]) -> Result<Evidence> {
    let mut sum = Evidence::default();
    for sentence in sentences {
        let (ids, target, foil) = question(sentence, vocabulary)?;
        let target = Target::Score {
            class: target,
            foil: Some(foil),
            position: None,
        };
        let explanation = decompx(
            model,
            &input(&ids, model)?,
            None,
            target,
            StreamRules::default(),
        )?;
        // Word `i` is token `i + 1`.
        let is_evidence = |token: &usize| {
            token
                .checked_sub(1)
                .is_some_and(|word| sentence.evidence.contains(&word))
        };
        let rank = explanation
            .ranking()
            .iter()
            .position(is_evidence)
            .unwrap_or(ids.len());
        sum.first += f64::from(u8::from(rank == 0));
        sum.chance += sentence.evidence.len() as f64 / ids.len() as f64;
        sum.reciprocal_rank += 1.0 / (rank + 1) as f64;
        let error = explanation.account.largest_site_error.unwrap_or(0.0);
        sum.conservation_error = sum.conservation_error.max(error);
    }
    let count = sentences.len().max(1) as f64;
    Ok(Evidence {
        first: sum.first / count,
        chance: sum.chance / count,
        reciprocal_rank: sum.reciprocal_rank / count,
        conservation_error: sum.conservation_error,
    })
}

/// Cuts the blocks' weights by [`RATIO`], least output error first.
fn compress(model: &Model) -> Result<(Model, Factorisation)> {
    let method = Factorisation::Whitened;
    let selection = Selection::default();
    let data = loading::embedded_windows(CALIBRATION, WINDOW)?;
    let requirements = method.requirements(model, &selection)?;
    let calibration =
        Calibration::collect(model, &data, &requirements, CalibrationOptions::default())?;
    let plan = method.plan(model, &selection, &Budget::Keep(1.0 - RATIO))?;
    Ok((plan.apply(model, Some(&calibration))?.model, method))
}

fn in_terminal(shown: &Shown) -> String {
    let predictions: Vec<String> = shown
        .predictions
        .iter()
        .map(|(word, p)| format!("{word} {:.0}%", 100.0 * p))
        .collect();
    let coloured = Coloured::new(&shown.tokens, &shown.explanation.scores);
    let best = shown
        .explanation
        .ranking()
        .into_iter()
        .take(3)
        .filter_map(|index| shown.tokens.get(index));
    let best: Vec<&str> = best.map(String::as_str).collect();
    format!(
        "  {}{}\n    next: {}   because of: {}   (rather than {})\n\n",
        coloured.in_terminal(output::is_coloured()),
        shown.sentence.target_word(),
        predictions.join(", "),
        best.join(", "),
        shown.sentence.foil,
    )
}

fn evidence_text(evidence: &Evidence) -> String {
    format!(
        "Over {SENTENCES} sentences the highest score is on a word that truly decides in {:.1} % (chance {:.1} %),\nmean reciprocal rank {:.3}. Contributions add up: largest conservation error {:.1e}.\n\n",
        100.0 * evidence.first,
        100.0 * evidence.chance,
        evidence.reciprocal_rank,
        evidence.conservation_error,
    )
}

fn rows(before: &Quality, after: &Quality) -> Vec<Vec<String>> {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let row = |name: &str, before: String, after: String| vec![name.to_owned(), before, after];
    let mut rows = vec![
        row(
            "parameters",
            output::grouped(before.size.parameters),
            output::grouped(after.size.parameters),
        ),
        row(
            "size",
            output::bytes(before.size.bytes as u64),
            output::bytes(after.size.bytes as u64),
        ),
        row(
            "FLOPs per token",
            output::grouped(before.size.flops_per_token),
            output::grouped(after.size.flops_per_token),
        ),
        row(
            "perplexity",
            format!("{:.3}", before.perplexity),
            format!("{:.3}", after.perplexity),
        ),
        row(
            "tokens/s (reading)",
            format!("{:.0}", before.tokens_per_second),
            format!("{:.0}", after.tokens_per_second),
        ),
    ];
    for ((name, one), (_, other)) in before.accuracy.iter().zip(&after.accuracy) {
        rows.push(row(&name.replace('_', " "), percent(*one), percent(*other)));
    }
    rows.push(row(
        "explanations on evidence",
        percent(before.evidence.first),
        percent(after.evidence.first),
    ));
    rows
}

fn comparison(before: &Quality, after: &Quality, method: Factorisation) -> String {
    let mut text = format!(
        "Cutting {:.0} % of the blocks' weights ({method}), measured on {} held-out tokens:\n\n  {:<26}{:>14}{:>14}\n",
        100.0 * RATIO,
        output::grouped(before.scored_tokens),
        "",
        "before",
        "after"
    );
    for row in rows(before, after) {
        if let [name, before, after] = row.as_slice() {
            text += &format!("  {name:<26}{before:>14}{after:>14}\n");
        }
    }
    text + "\n"
}

fn page(
    shown: &[Shown],
    after_shown: &Shown,
    before: &Quality,
    after: &Quality,
    method: Factorisation,
) -> String {
    let example = |shown: &Shown| -> Markup {
        let names: Vec<String> = shown
            .predictions
            .iter()
            .map(|(word, _)| word.clone())
            .collect();
        let values: Vec<f64> = shown.predictions.iter().map(|(_, p)| *p).collect();
        html! {
            h3 { (shown.sentence.kind.name().replace('_', " ")) }
            (Coloured::new(&shown.tokens, &shown.explanation.scores).as_html())
            p { "Explained: " b { (shown.sentence.target_word()) } " rather than " b { (shown.sentence.foil) } "." }
            details {
                summary { "Predictions, every contribution, and the account" }
                (report::bar_chart(&names, &values, "probability"))
                (report::explanation(&shown.tokens, &shown.explanation))
                h3 { "Which parts of the model write it" }
                (report::explanation(&shown.tokens, &shown.components))
            }
        }
    };
    let body = html! {
        section {
            h2 { "Predictions, explained" }
            p { "Sentences that the model has never seen. Blue words speak for the prediction, orange ones against it; every vector in the model is split into what each word contributed, and the parts add up." }
            @for one in shown { (example(one)) }
        }
        section {
            h2 { "Are the explanations right?" }
            p {
                "The language is made by a generator that knows which words decide. Over " (SENTENCES)
                " sentences the highest score is on such a word in " b { (format!("{:.1} %", 100.0 * before.evidence.first)) }
                "; a random ranking would reach " (format!("{:.1} %", 100.0 * before.evidence.chance))
                ". Mean reciprocal rank " (format!("{:.3}", before.evidence.reciprocal_rank))
                ". The largest conservation error at any site is " (format!("{:.1e}", before.evidence.conservation_error)) "."
            }
        }
        section {
            h2 { "Cut by " (format!("{:.0} %", 100.0 * RATIO)) " (" (method.name()) ")" }
            (report::table(&["", "before", "after"], &rows(before, after)))
        }
        section {
            h2 { "The compressed model, explained" }
            (example(after_shown))
        }
    };
    report::page(
        "A model taken apart",
        "The embedded decoder: predicted, explained, cut, measured.",
        body,
    )
}
