//! Pages that a browser shows without a network, and colours for the terminal.

mod analysis;
mod coloured;
mod graph;
mod page;

pub use analysis::analysis_page;

pub use coloured::Coloured;
pub use page::{bar_chart, page, table};

use crate::commands::explain::Explained;
use lapidary_explain::{Explanation, Unit};
use maud::{Markup, html};

/// One explanation as a page.
pub fn explanation_page(model: &str, explained: &Explained) -> String {
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
        section {
            h2 {
                "Why " q { (explained.target.trim()) }
                @if let Some(foil) = &explained.foil { " rather than " q { (foil.trim()) } }
            }
            (explanation(&explained.tokens, &explained.explanation))
        }
    };
    page(
        &format!("Explanation of {model}"),
        &explained.explanation.method,
        body,
    )
}

/// Coloured tokens, bars, and the account.
pub fn explanation(tokens: &[String], explanation: &Explanation) -> Markup {
    let names = if explanation.labels.is_empty() {
        tokens
    } else {
        &explanation.labels
    };
    html! {
        @if explanation.unit == Unit::Token {
            (Coloured::new(tokens, &explanation.scores).as_html())
            p.legend { span.token.for style="--strength:.8" { "for" } " " span.token.against style="--strength:.8" { "against" } }
        }
        (bar_chart(names, &explanation.scores, "contribution"))
        (account(explanation))
    }
}

/// What adds up and what is left out.
pub fn account(explanation: &Explanation) -> Markup {
    let account = &explanation.account;
    html! {
        p.account {
            "Score " b { (format!("{:.4}", account.explained)) }
            " = attributed " b { (format!("{:.4}", account.attributed)) }
            " + left out " b { (format!("{:.2e}", account.unattributed)) } "."
            @if let Some(error) = account.largest_site_error {
                " Largest conservation error at any site " b { (format!("{error:.1e}")) } "."
            }
            @if !account.left_out.is_empty() {
                " This method leaves out: " (account.left_out.join("; ")) "."
            }
        }
    }
}
