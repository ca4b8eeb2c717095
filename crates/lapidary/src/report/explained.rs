//! One input explained, as a page: a switch between methods and targets, scores token by token,
//! the methods side by side, and where each head looks.

use super::attention::attention_patterns;
use super::{Coloured, account, bar_chart, map, page};
use crate::commands::explain::{Answer, Explained};
use anyhow::Result;
use lapidary_explain::report::Map;
use lapidary_explain::{Question, Target, latent_relevance};
use lapidary_signal::relevance::RelevanceRules;
use maud::{Markup, PreEscaped, html};

/// Shows the panel of the chosen method and target; without scripts every panel is shown.
const SWITCH: &str = r"
for (const box of document.querySelectorAll('.switch')) {
  const show = () => {
    const chosen = name => box.querySelector(`input[name=${name}]:checked`)?.value;
    for (const panel of box.querySelectorAll('.panel')) {
      panel.hidden = panel.dataset.method !== chosen('method') || panel.dataset.target !== chosen('target');
    }
  };
  box.addEventListener('change', show);
  show();
}
";

/// The page.
pub fn explanation_page(
    explained: &Explained,
    question: &Question<'_>,
    target: Option<Target>,
) -> Result<String> {
    let of_the_text = |answer: &&Answer| answer.explanation.unit.is_of_the_text();
    let by_token: Vec<_> = explained.explanations.iter().filter(of_the_text).collect();
    let body = html! {
        section {
            h2 { "What the model says" }
            @if explained.predictions.is_empty() {
                p { "This model has no scores; its representation is explained." }
            } @else {
                (bar_chart(
                    &explained.predictions.iter().map(|p| p.name.clone()).collect::<Vec<_>>(),
                    &explained.predictions.iter().map(|p| p.probability).collect::<Vec<_>>(),
                    "probability",
                ))
            }
        }
        (switch(explained))
        @if by_token.len() > 1 && explained.patches.is_none() {
            section {
                h2 { "Methods side by side" }
                p.legend { "Each column in shares of its own largest score." }
                (map(&side_by_side(explained, &by_token)))
            }
        }
        @if let Some(target) = target { (inside(explained, question, target)) }
        @if !explained.refused.is_empty() {
            section {
                h2 { "Methods that are not defined for this model" }
                ul { @for one in &explained.refused { li { b { (one.method) } ": " (one.reason) } } }
            }
        }
        (attention_patterns(question, &explained.tokens)?)
        script { (PreEscaped(SWITCH)) }
    };
    let tokens = explained.tokens.len();
    let title = format!("Explanation of {}", explained.model);
    Ok(page(&title, &format!("{tokens} tokens"), body))
}

/// Relevance of each head of each layer, and of each token on its way through the layers; nothing
/// for models that the relevance lens has no rules for.
fn inside(explained: &Explained, question: &Question<'_>, target: Target) -> Markup {
    let Ok(found) = latent_relevance(question, target, RelevanceRules::value_only()) else {
        return html! {};
    };
    let heads = found.heads.iter().map(Vec::len).max().unwrap_or(0);
    let layers = Map {
        title: String::new(),
        rows: (0..found.heads.len())
            .map(|layer| format!("layer {layer}"))
            .collect(),
        columns: (0..heads).map(|head| format!("head {head}")).collect(),
        values: found.heads,
    };
    let way = Map {
        title: String::new(),
        rows: (0..found.tokens.len())
            .map(|layer| format!("before layer {layer}"))
            .collect(),
        columns: explained.tokens.clone(),
        values: found.tokens,
    };
    html! {
        section {
            h2 { "Inside: relevance of heads and of tokens, layer by layer" }
            p.legend { "For the first target, with attention weights held fixed (CP-LRP). The last row is what leaves the last layer." }
            @if heads > 0 { (map(&layers)) }
            @if explained.patches.is_none() && explained.tokens.len() <= 64 { (map(&way)) }
        }
    }
}

/// A panel for each explanation, and what chooses between them.
fn switch(explained: &Explained) -> Markup {
    let mut methods: Vec<&str> = Vec::new();
    let mut targets: Vec<String> = Vec::new();
    for answer in &explained.explanations {
        if !methods.contains(&answer.explanation.method.as_str()) {
            methods.push(&answer.explanation.method);
        }
        if !targets.contains(&target(answer)) {
            targets.push(target(answer));
        }
    }
    html! {
        section.switch {
            h2 { "Why" }
            div.choices {
                (choices("target", "Target", targets.iter().map(String::as_str)))
                (choices("method", "Method", methods.iter().copied()))
            }
            @for answer in &explained.explanations {
                div.panel data-method=(answer.explanation.method) data-target=(target(answer)) {
                    h3 { q { (answer.target.trim()) }
                        @if let Some(foil) = &answer.foil { " rather than " q { (foil.trim()) } }
                        ", by " (answer.explanation.method) }
                    (panel(explained, answer))
                }
            }
        }
    }
}

fn target(answer: &Answer) -> String {
    match &answer.foil {
        Some(foil) => format!("{} rather than {}", answer.target.trim(), foil.trim()),
        None => answer.target.trim().to_owned(),
    }
}

/// Radio buttons, which the keyboard reaches.
fn choices<'a>(name: &str, legend: &str, values: impl Iterator<Item = &'a str>) -> Markup {
    html! {
        fieldset {
            legend { (legend) }
            @for (index, value) in values.enumerate() {
                label { input type="radio" name=(name) value=(value) checked[index == 0]; " " (value) }
            }
        }
    }
}

/// Coloured tokens or patches, bars, and the account.
fn panel(explained: &Explained, answer: &Answer) -> Markup {
    let explanation = &answer.explanation;
    let names = explained.names(explanation);
    html! {
        @if explanation.unit.is_of_the_text() {
            @match explained.patches {
                Some(grid) => (map(&patches(grid, &explanation.scores))),
                None => (Coloured::new(names, &explanation.scores).as_html()),
            }
            p.legend { span.token.for style="--strength:.8" { "for" } " " span.token.against style="--strength:.8" { "against" } }
        }
        details open[names.len() <= 64] {
            summary { "Every score" }
            (bar_chart(names, &explanation.scores, "contribution"))
        }
        (account(explanation))
    }
}

/// Scores of the patches where they lie; class tokens, which come first, are not shown.
fn patches((rows, columns): (usize, usize), scores: &[f64]) -> Map {
    let class_tokens = scores.len().saturating_sub(rows * columns);
    let of_patches = scores.get(class_tokens..).unwrap_or_default();
    Map {
        title: String::new(),
        rows: (0..rows).map(|row| row.to_string()).collect(),
        columns: (0..columns).map(|column| column.to_string()).collect(),
        values: of_patches
            .chunks(columns.max(1))
            .map(<[f64]>::to_vec)
            .collect(),
    }
}

/// Tokens or words by explanations.
fn side_by_side(explained: &Explained, answers: &[&Answer]) -> Map {
    let several_targets = answers
        .iter()
        .any(|answer| target(answer) != target(answers[0]));
    let column = |answer: &&Answer| match several_targets {
        true => format!("{} · {}", answer.explanation.method, target(answer)),
        false => answer.explanation.method.clone(),
    };
    let share = |answer: &&Answer, token: usize| {
        let scores = &answer.explanation.scores;
        let largest = scores.iter().fold(0.0f64, |m, score| m.max(score.abs()));
        let score = scores.get(token).copied().unwrap_or(0.0);
        if largest > 0.0 { score / largest } else { 0.0 }
    };
    let names = answers
        .first()
        .map_or(explained.tokens.as_slice(), |answer| {
            explained.names(&answer.explanation)
        });
    Map {
        title: String::new(),
        rows: names.to_vec(),
        columns: answers.iter().map(column).collect(),
        values: (0..names.len())
            .map(|token| answers.iter().map(|answer| share(answer, token)).collect())
            .collect(),
    }
}
