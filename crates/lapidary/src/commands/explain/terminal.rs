//! Explanations as text.

use super::{Answer, Explained};
use crate::output;
use crate::report::Coloured;
use comfy_table::{Table, presets};
use lapidary_explain::Explanation;

pub fn in_terminal(explained: &Explained) -> String {
    let mut text = String::new();
    if !explained.predictions.is_empty() {
        text += "predictions ";
        for prediction in &explained.predictions {
            text += &format!(
                " {} {:.1}%",
                prediction.name.trim(),
                100.0 * prediction.probability
            );
        }
        text += "\n";
    }
    let several = explained.explanations.len() > 1;
    for answer in &explained.explanations {
        text += &heading(answer);
        text += &coloured(explained, answer);
        // Several explanations are read side by side, in the table below.
        if !several || !answer.explanation.unit.is_of_the_text() {
            text += &bars(
                explained.names(&answer.explanation),
                &answer.explanation.scores,
            );
            text += "\n";
        }
        text += &account(&answer.explanation);
        text += if several { "\n" } else { "" };
    }
    if several {
        text += &side_by_side(explained);
    }
    for refused in &explained.refused {
        text += &format!("{} was left out: {}\n", refused.method, refused.reason);
    }
    text
}

fn heading(answer: &Answer) -> String {
    let mut text = format!("explained    {}", answer.target.trim());
    if let Some(foil) = &answer.foil {
        text += &format!(" rather than {}", foil.trim());
    }
    let method = &answer.explanation.method;
    text + &format!(" by {method}, {:.3} s\n\n", answer.seconds)
}

/// The text on coloured ground. Patches do not read as a line of text.
fn coloured(explained: &Explained, answer: &Answer) -> String {
    if !answer.explanation.unit.is_of_the_text() || explained.patches.is_some() {
        return String::new();
    }
    let names = explained.names(&answer.explanation);
    let coloured = Coloured::new(names, &answer.explanation.scores);
    format!("{}\n\n", coloured.in_terminal(output::is_coloured()))
}

/// Scores of the tokens or words, a column for each method and target.
fn side_by_side(explained: &Explained) -> String {
    let of_the_text = |answer: &&Answer| answer.explanation.unit.is_of_the_text();
    let answers: Vec<_> = explained.explanations.iter().filter(of_the_text).collect();
    let names = answers
        .first()
        .map(|answer| explained.names(&answer.explanation));
    let mut table = Table::new();
    let head = answers.iter().map(|answer| {
        let foil = answer
            .foil
            .as_deref()
            .map(|foil| format!(" / {}", foil.trim()));
        format!(
            "{}\n{}{}",
            answer.explanation.method,
            answer.target.trim(),
            foil.unwrap_or_default()
        )
    });
    table
        .load_style(presets::NOTHING)
        .set_header(std::iter::once(String::new()).chain(head));
    for (index, token) in names.unwrap_or_default().iter().enumerate() {
        let scores = answers.iter().map(|answer| {
            let score = answer.explanation.scores.get(index);
            score.map_or_else(String::new, |score| format!("{score:+.4}"))
        });
        table.add_row(std::iter::once(token.trim().to_owned()).chain(scores));
    }
    format!("{table}\n")
}

/// Every score as a line with a bar.
fn bars(names: &[String], scores: &[f64]) -> String {
    const WIDTH: f64 = 24.0;
    let largest = scores
        .iter()
        .fold(0.0f64, |largest, score| largest.max(score.abs()));
    let wide = names
        .iter()
        .map(|name| name.chars().count())
        .max()
        .unwrap_or(0)
        .clamp(5, 32);
    let mut text = String::new();
    for (index, score) in scores.iter().enumerate() {
        let name = names.get(index).map_or("bias", String::as_str).trim();
        let length = if largest > 0.0 {
            (score.abs() / largest * WIDTH).round() as usize
        } else {
            0
        };
        let bar = if *score >= 0.0 { "█" } else { "░" }.repeat(length);
        text += &format!("{name:>wide$} {score:+10.4} {bar}\n");
    }
    text
}

/// What adds up, and what is left out.
pub fn account(explanation: &Explanation) -> String {
    let account = &explanation.account;
    let elsewhere: String = account
        .elsewhere
        .iter()
        .map(|(name, amount)| format!(" + {name} {amount:.4}"))
        .collect();
    let mut text = format!(
        "score {:.4} = attributed {:.4}{elsewhere} + left out {:.2e}\n",
        account.explained, account.attributed, account.unattributed
    );
    if let Some(error) = account.largest_site_error {
        text += &format!("largest conservation error at any site {error:.1e}\n");
    }
    if !account.left_out.is_empty() {
        text += &format!("left out by this method: {}\n", account.left_out.join("; "));
    }
    if !account.leaks.is_empty() {
        text += "relevance that each part of the model keeps, from the output down:\n";
    }
    for leak in &account.leaks {
        text += &format!(
            "  {:<24} {:+.4} of {:+.4}\n",
            leak.part,
            leak.lost(),
            leak.arrived
        );
    }
    text
}
