//! What the training loss levels at, by width and depth, beside the entropy of what is read.

use super::grammar::{Text, VOCABULARY, Windows};
use crate::experiments::{after_training, decoder, mean};
use crate::{Claim, Plot, Result, Scale, Series, Setting};
use lapidary_train::generator;

struct Size {
    widths: &'static [usize],
    depths: &'static [usize],
    steps: u64,
    /// Windows over which the entropy is taken.
    windows: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                widths: &[16, 32],
                depths: &[1],
                steps: 2,
                windows: 100,
            },
            Scale::Small => Self {
                widths: &[16, 32, 64],
                depths: &[1, 2],
                steps: 400,
                windows: 20_000,
            },
            // Two million tokens, each once.
            Scale::Full => Self {
                widths: &[32, 64, 128],
                depths: &[2, 4, 6],
                steps: 1953,
                windows: 100_000,
            },
        }
    }
}

/// The plateau of one size.
struct Entry {
    width: usize,
    depth: usize,
    plateau: f64,
}

/// Plateaus by size, and what they are compared with.
pub(super) struct Grid {
    entropy: f64,
    steps: u64,
    entries: Vec<Entry>,
}

/// Trains a decoder of each size on new windows.
pub(super) fn run(setting: &Setting) -> Result<Grid> {
    let size = Size::of(setting.scale);
    let mut drawn = generator(setting.seed ^ 0x961d);
    // Of every token but the first of a window, which nothing predicts.
    let surprise = (0..size.windows).flat_map(|_| {
        let text = Text::window(decoder::LENGTH, &mut drawn);
        text.surprise.into_iter().skip(1)
    });
    let entropy = mean(surprise);
    let mut entries = Vec::new();
    for width in size.widths {
        for depth in size.depths {
            let mut losses = Vec::new();
            decoder::train_watched(
                decoder::Recipe::default(),
                decoder::spec(VOCABULARY, *width, *depth),
                Box::new(Windows::New),
                size.steps,
                setting.seed,
                |step, _| {
                    losses.push(step.loss);
                    Ok(())
                },
            )?;
            entries.push(Entry {
                width: *width,
                depth: *depth,
                plateau: plateau(&losses),
            });
        }
    }
    Ok(Grid {
        entropy,
        steps: size.steps,
        entries,
    })
}

/// The mean loss of the last tenth of the steps, the last one at least. Every window is new, so that
/// it is no lower than the entropy but by chance.
fn plateau(losses: &[f64]) -> f64 {
    let count = (losses.len() / 10).max(1);
    mean(losses.iter().rev().take(count).copied())
}

impl Grid {
    pub(super) fn setting(&self) -> String {
        let largest = self.entries.last().map_or((0, 0), |e| (e.width, e.depth));
        format!(
            "{} sizes of up to {} blocks and width {}, {} steps each",
            self.entries.len(),
            largest.1,
            largest.0,
            self.steps
        )
    }

    pub(super) fn claims(&self, scale: Scale) -> Vec<Claim> {
        let each: Vec<String> = self
            .entries
            .iter()
            .map(|e| format!("{}x{}: {:.3}", e.width, e.depth, e.plateau))
            .collect();
        let found = format!(
            "entropy {:.4} nats for each token; width x blocks: {}",
            self.entropy,
            each.join(", ")
        );
        let plateaus = || self.entries.iter().map(|entry| entry.plateau);
        let least = plateaus().fold(f64::INFINITY, f64::min);
        let largest = self.entries.last().map_or(f64::NAN, |entry| entry.plateau);
        vec![
            Claim::new(
                "no size of model levels below the entropy of the grammar (by more than 1 %), and \
                 the largest within 10 % of it",
                "vanilla Transformers of 6 and 10 layers level off near 1",
                found,
                after_training(
                    scale,
                    least >= 0.99 * self.entropy && largest <= 1.1 * self.entropy,
                ),
            )
            .noted("mean training loss of the last tenth of the steps, on windows not seen before"),
            Claim::new(
                "larger models level lower: at each depth the loss falls with the width, and at each \
                 width with the depth",
                "no figure",
                format!(
                    "{} of {} neighbours",
                    self.lower(),
                    self.neighbours().count()
                ),
                after_training(scale, self.lower() == self.neighbours().count()),
            ),
        ]
    }

    /// Pairs of sizes of which the second has the next larger width or depth.
    fn neighbours(&self) -> impl Iterator<Item = (&Entry, &Entry)> {
        let next = |of: fn(&Entry) -> usize, than: usize| {
            let larger = self.entries.iter().map(of).filter(move |size| *size > than);
            larger.min()
        };
        self.entries.iter().flat_map(move |small| {
            let wider = next(|entry| entry.width, small.width);
            let deeper = next(|entry| entry.depth, small.depth);
            let follows = move |large: &&Entry| {
                (Some(large.width) == wider && large.depth == small.depth)
                    || (Some(large.depth) == deeper && large.width == small.width)
            };
            let found = self.entries.iter().filter(follows);
            found.map(move |large| (small, large))
        })
    }

    fn lower(&self) -> usize {
        let lower = |(small, large): &(&Entry, &Entry)| large.plateau < small.plateau;
        self.neighbours().filter(lower).count()
    }

    pub(super) fn plot(&self) -> Plot {
        let mut depths: Vec<usize> = self.entries.iter().map(|entry| entry.depth).collect();
        depths.sort_unstable();
        depths.dedup();
        let of_depth = |depth: usize| -> Vec<(f64, f64)> {
            let entries = self.entries.iter().filter(|entry| entry.depth == depth);
            entries.map(|e| (e.width as f64, e.plateau)).collect()
        };
        let mut series: Vec<Series> = depths
            .into_iter()
            .map(|depth| Series {
                name: format!("{depth} blocks"),
                points: of_depth(depth),
            })
            .collect();
        let widths = self.entries.first().into_iter().chain(self.entries.last());
        series.push(Series {
            name: "entropy".to_owned(),
            points: widths.map(|e| (e.width as f64, self.entropy)).collect(),
        });
        Plot {
            title: "What the training loss levels at".to_owned(),
            x: "width".to_owned(),
            y: "nats for each token".to_owned(),
            series,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_differ_in_one_of_two_sizes() {
        let entry = |width: usize, depth: usize| Entry {
            width,
            depth,
            plateau: 1.0 / (width * depth) as f64,
        };
        let sizes = [(16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 2)];
        let mut grid = Grid {
            entropy: 0.0,
            steps: 1,
            entries: sizes.map(|(width, depth)| entry(width, depth)).into(),
        };
        // Three steps in depth, and two in width at each of two depths.
        assert_eq!(grid.neighbours().count(), 7);
        assert_eq!(grid.lower(), 7);
        grid.entries[5].plateau = 1.0;
        assert_eq!(grid.lower(), 5);
        assert_eq!(plateau(&[9.0; 30]), 9.0);
        assert_eq!(plateau(&[[9.0; 18].as_slice(), &[1.0, 2.0]].concat()), 1.5);
        assert_eq!(plateau(&[9.0, 3.0]), 3.0);
    }
}
