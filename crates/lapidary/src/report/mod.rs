//! Pages that a browser shows without a network, and colours for the terminal.

mod analysis;
mod attention;
mod coloured;
mod explained;
mod graph;
mod page;

pub use analysis::{analysis_page, analysis_text, map};

pub use coloured::Coloured;
pub use explained::explanation_page;
pub use page::{bar_chart, page, table};

use lapidary_explain::{Explanation, Unit};
use maud::{Markup, html};

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
            @for (name, amount) in &account.elsewhere {
                " + " (name) " " b { (format!("{amount:.4}")) }
            }
            " + left out " b { (format!("{:.2e}", account.unattributed)) } "."
            @if let Some(error) = account.largest_site_error {
                " Largest conservation error at any site " b { (format!("{error:.1e}")) } "."
            }
            @if !account.left_out.is_empty() {
                " This method leaves out: " (account.left_out.join("; ")) "."
            }
        }
        @if !account.leaks.is_empty() {
            details {
                summary { "Relevance that each part of the model keeps, from the output down" }
                table {
                    tr { th { "part" } th { "arrived" } th { "passed on" } th { "kept" } }
                    @for leak in &account.leaks {
                        tr {
                            td { (leak.part) }
                            td { (format!("{:.4}", leak.arrived)) }
                            td { (format!("{:.4}", leak.passed)) }
                            td { (format!("{:.4}", leak.lost())) }
                        }
                    }
                }
            }
        }
    }
}
