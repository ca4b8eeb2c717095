//! A text at all of its length, a tenth and a hundredth, for the same number of steps: where the
//! training loss falls below one, what is then known by heart, and what becomes of the held-out loss.

use super::Trained;
use super::byte_pairs::BytePairs;
use crate::experiments::bigram::TextTask;
use crate::experiments::{after_training, decoder};
use crate::{Claim, Error, Plot, Result, Scale, Series, Setting};
use lapidary_explain::analyses::energy::loss;
use lapidary_train::language::Split;

/// Merges of the byte-pair encoding.
const MERGES: usize = 1000;
/// Shares of the training text.
const SHARES: [f64; 3] = [1.0, 0.1, 0.01];
/// Bytes of a generated text.
const GENERATED: usize = 1 << 20;
/// A held-out loss that rises by this much of its least has turned.
const TURNED: f64 = 1.05;

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    /// Steps between measurements.
    every: u64,
    windows: usize,
    /// Bytes of the text.
    bytes: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 16,
                blocks: 1,
                steps: 2,
                every: 1,
                windows: 4,
                bytes: 40_000,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 2,
                steps: 600,
                every: 50,
                windows: 24,
                bytes: GENERATED,
            },
            Scale::Full => Self {
                width: 128,
                blocks: 4,
                steps: 20_000,
                every: 500,
                windows: 256,
                bytes: usize::MAX,
            },
        }
    }
}

/// A model of one share of the text.
struct Fraction {
    trained: Trained,
    tokens: usize,
    /// Step, training loss, held-out loss.
    curve: Vec<(f64, f64, f64)>,
}

impl Fraction {
    /// The last held-out loss over the least on the way.
    fn turn(&self) -> f64 {
        let held_out = || self.curve.iter().map(|point| point.2);
        let least = held_out().fold(f64::INFINITY, f64::min);
        held_out().next_back().unwrap_or(f64::NAN) / least
    }
}

/// All shares.
pub(super) struct Fractions {
    what: String,
    vocabulary: usize,
    size: Size,
    all: Vec<Fraction>,
}

/// Trains on each share.
pub(super) fn run(setting: &Setting) -> Result<Fractions> {
    let size = Size::of(setting.scale);
    let (training, held_out, what) = texts(setting, size.bytes)?;
    let pairs = BytePairs::learn(&training, MERGES)?;
    let (training, held_out) = (pairs.encode(&training)?, pairs.encode(&held_out)?);
    let vocabulary = pairs.vocabulary();
    let held_out = windows(&held_out, size.windows);
    let mut all = Vec::new();
    for share in SHARES {
        // One window more than its length is the least to draw from.
        let count = ((training.len() as f64 * share) as usize).max(2 * decoder::LENGTH);
        let text: Vec<u32> = training.iter().take(count).copied().collect();
        let seen = windows(&text, size.windows);
        let mut curve = Vec::new();
        let model = decoder::train_watched(
            decoder::Recipe::default(),
            decoder::spec(vocabulary, size.width, size.blocks),
            Box::new(TextTask::new(text.clone(), vocabulary)),
            size.steps,
            setting.seed,
            |step, model| {
                if step.step % size.every == 0 {
                    let losses = (loss(model, &seen)?, loss(model, &held_out)?);
                    curve.push((step.step as f64, losses.0, losses.1));
                }
                Ok(())
            },
        )?;
        let name = format!("{} %", 100.0 * share);
        all.push(Fraction {
            trained: Trained::measure(name, &model, &seen, &held_out, setting.seed)?,
            tokens: text.len(),
            curve,
        });
    }
    Ok(Fractions {
        what,
        vocabulary,
        size,
        all,
    })
}

/// A training and a held-out text: a tenth of the file at its end, or of the generated language the
/// side that is held out.
fn texts(setting: &Setting, bytes: usize) -> Result<(String, String, String)> {
    let file = setting
        .data
        .as_ref()
        .map(|data| data.join("tiny_shakespeare.txt"));
    if let Some(file) = file.filter(|file| file.is_file()) {
        let text = lapidary_model::files::read_text(&file, 1 << 28)
            .map_err(|error| Error::Experiment(error.to_string()))?;
        let cut = |at: usize| {
            let mut before = (0..=at.min(text.len())).rev();
            before.find(|at| text.is_char_boundary(*at)).unwrap_or(0)
        };
        let end = cut(bytes);
        let middle = cut(end - end / 10);
        let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default().to_owned();
        return Ok((
            part(0, middle),
            part(middle, end),
            "Tiny Shakespeare".to_owned(),
        ));
    }
    let side = |split: Split, bytes: usize| -> Result<String> {
        let corpus = decoder::corpus(split, setting.seed)?;
        let mut text = String::new();
        for sentence in corpus.sentences(0) {
            text += &sentence.text();
            text.push('\n');
            if text.len() >= bytes {
                break;
            }
        }
        Ok(text)
    };
    let bytes = bytes.min(GENERATED);
    let (training, held_out) = (bytes - bytes / 10, bytes / 10);
    let what = "sentences of the generated language".to_owned();
    Ok((
        side(Split::Training, training)?,
        side(Split::HeldOut, held_out)?,
        what,
    ))
}

/// Windows spread evenly over a text.
fn windows(tokens: &[u32], count: usize) -> Vec<Vec<u32>> {
    let room = tokens.len().saturating_sub(decoder::LENGTH);
    let start = |index: usize| index * room / count.max(1);
    let window = |index: usize| tokens.get(start(index)..start(index) + decoder::LENGTH);
    let found = (0..count).filter_map(window);
    found.map(<[u32]>::to_vec).collect()
}

impl Fractions {
    pub(super) fn setting(&self) -> String {
        let tokens: Vec<String> = self.all.iter().map(|f| f.tokens.to_string()).collect();
        format!(
            "{}, {} byte pairs, {} tokens, decoder of {} blocks and width {}, {} steps",
            self.what,
            self.vocabulary,
            tokens.join(", "),
            self.size.blocks,
            self.size.width,
            self.size.steps
        )
    }

    pub(super) fn claims(&self, scale: Scale) -> Vec<Claim> {
        let told = |of: &dyn Fn(&Fraction) -> String| -> String {
            let each = self.all.iter();
            let each: Vec<String> = each
                .map(|f| format!("{}: {}", f.trained.name, of(f)))
                .collect();
            each.join("; ")
        };
        let below = || self.all.iter().filter(|f| f.trained.training_loss < 1.0);
        let by_heart = below().all(|f| f.trained.memorised > 0.5);
        let turned = below().all(|f| f.turn() >= TURNED);
        let radius = |fraction: Option<&Fraction>| {
            fraction.map_or(f64::NAN, |fraction| fraction.trained.radius())
        };
        let ratio = radius(self.all.last()) / radius(self.all.first());
        vec![
            Claim::new(
                "at a fixed number of steps the training loss of a text falls below 1 only where more \
                 than half of it is known by heart, and there the held-out loss has turned upwards by \
                 5 %",
                "GPT-2 small at 100, 1 and 0.1 % of 9 billion tokens",
                told(&|f| {
                    format!(
                        "training {:.3}, held out {:.3} ({:.2} times its least), by heart {:.0} %",
                        f.trained.training_loss,
                        f.trained.held_out_loss,
                        f.turn(),
                        100.0 * f.trained.memorised
                    )
                }),
                after_training(scale, below().count() > 0 && by_heart && turned),
            )
            .noted("does not hold either where no share's loss falls below 1"),
            Claim::new(
                "of that text, held-out states are at least 20 % nearer to training states in the \
                 model of one hundredth than in that of all of it",
                "none published",
                format!("{}; ratio {ratio:.3}", told(&|f| format!("{:.3}", f.trained.radius()))),
                after_training(scale, ratio <= 0.8),
            ),
        ]
    }

    pub(super) fn plots(&self) -> Vec<Plot> {
        let curves = |title: &str, of: fn(&(f64, f64, f64)) -> (f64, f64)| Plot {
            title: title.to_owned(),
            x: "step".to_owned(),
            y: "nats for each token".to_owned(),
            series: self
                .all
                .iter()
                .map(|fraction| Series {
                    name: format!("{} of the text", fraction.trained.name),
                    points: fraction.curve.iter().map(of).collect(),
                })
                .collect(),
        };
        vec![
            curves("Training loss by share of the text", |point| {
                (point.0, point.1)
            }),
            curves("Held-out loss by share of the text", |point| {
                (point.0, point.2)
            }),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_over_the_text() {
        let text: Vec<u32> = (0..1000).collect();
        let found = windows(&text, 4);
        assert_eq!(found.len(), 4);
        assert!(found.iter().all(|window| window.len() == decoder::LENGTH));
        assert_eq!(found[0][0], 0);
        assert!(found[3][0] >= 600);
        assert!(windows(&text[..10], 4).is_empty());
    }
}
