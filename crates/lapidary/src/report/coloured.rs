//! Tokens coloured by their scores: blue for, orange against.

use maud::{Markup, html};

/// Tokens with scores scaled to `[-1, 1]`.
pub struct Coloured<'a> {
    tokens: &'a [String],
    strengths: Vec<f64>,
    scores: &'a [f64],
}

impl<'a> Coloured<'a> {
    /// Scales by the largest score; tokens beyond the scores are left plain.
    pub fn new(tokens: &'a [String], scores: &'a [f64]) -> Self {
        let largest = scores
            .iter()
            .fold(0.0f64, |largest, score| largest.max(score.abs()));
        let scale = if largest > 0.0 { largest } else { 1.0 };
        let strengths = scores.iter().map(|score| score / scale).collect();
        Self {
            tokens,
            strengths,
            scores,
        }
    }

    /// The text on coloured ground; without colours plain.
    pub fn in_terminal(&self, coloured: bool) -> String {
        let mut text = String::new();
        for (index, token) in self.tokens.iter().enumerate() {
            let strength = self.strengths.get(index).copied().unwrap_or(0.0);
            let token = token.trim();
            if !coloured {
                text += token;
            } else {
                let level =
                    |weak: f64, strong: f64| (weak + (strong - weak) * strength.abs()) as u8;
                let (red, green, blue) = if strength >= 0.0 {
                    (level(245.0, 60.0), level(245.0, 130.0), level(245.0, 220.0))
                } else {
                    (level(245.0, 225.0), level(245.0, 120.0), level(245.0, 40.0))
                };
                text += &format!("\x1b[38;2;20;20;20;48;2;{red};{green};{blue}m{token}\x1b[0m");
            }
            text.push(' ');
        }
        text
    }

    /// The text as HTML; the score of each token shows on hover and to a screen reader.
    pub fn as_html(&self) -> Markup {
        html! {
            p.tokens {
                @for (index, token) in self.tokens.iter().enumerate() {
                    @let strength = self.strengths.get(index).copied().unwrap_or(0.0);
                    @let score = self.scores.get(index).copied().unwrap_or(0.0);
                    @let side = if strength >= 0.0 { "for" } else { "against" };
                    span.token.(side) tabindex="0" style=(format!("--strength:{:.3}", strength.abs()))
                        title=(format!("{score:+.4}")) aria-label=(format!("{} {score:+.4}", token.trim())) {
                        (token.trim())
                    }
                    " "
                }
            }
        }
    }
}
