//! Position vectors of decoders that add numbers, with carries and without: an answer's digit is
//! read at two places of its own, and with carries also at those before it.

use super::{decoder, reading};
use crate::experiments::{after_training, mean};
use crate::{Claim, Result, Scale, Setting};
use lapidary_explain::analyses::geometry::{Bounds, Layer, layers};
use lapidary_kernels::{D, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_train::data::{Addition, Batch, IGNORE, Task};
use lapidary_train::generator;

struct Size {
    width: usize,
    blocks: usize,
    /// Least and most digits.
    digits: (usize, usize),
    steps: u64,
    contexts: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 1,
                digits: (2, 3),
                steps: 2,
                contexts: 16,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 2,
                digits: (2, 3),
                steps: 1000,
                contexts: 400,
            },
            Scale::Full => Self {
                width: 512,
                blocks: 8,
                digits: (5, 10),
                steps: 100_000,
                contexts: 2000,
            },
        }
    }
}

/// A decoder that was trained to add.
pub(super) struct Sums {
    carry: bool,
    what: String,
    accuracy: Accuracy,
    pub(super) layers: Vec<Layer>,
}

/// What of new problems is right.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Accuracy {
    digits: f64,
    /// Whole answers.
    answers: f64,
}

impl Sums {
    fn mean_of(&self, of: fn(&Layer) -> f64) -> f64 {
        mean(self.layers.iter().skip(1).map(of))
    }

    fn smoothness(&self) -> f64 {
        self.mean_of(|layer| layer.diagnostics.smoothness)
    }

    fn stable_rank(&self) -> f64 {
        self.mean_of(|layer| layer.diagnostics.stable_rank)
    }
}

/// Trains with carries and without, and takes both apart on new problems.
pub(super) fn run(setting: &Setting) -> Result<Vec<Sums>> {
    let size = Size::of(setting.scale);
    let (least, most) = size.digits;
    let mut found = Vec::new();
    for carry in [true, false] {
        let mut task = Addition::new(least, most, carry)?;
        let spec = decoder::spec(task.vocabulary(), size.width, size.blocks);
        let model = decoder::train(spec, Box::new(task), size.steps, setting.seed)?;
        let mut drawn = generator(setting.seed ^ 0xadd);
        let batch = task.batch(&mut drawn, size.contexts, decoder::LENGTH)?;
        let windows = batch.inputs.chunks(decoder::LENGTH);
        let windows: Vec<Vec<u32>> = windows.map(<[u32]>::to_vec).collect();
        found.push(Sums {
            carry,
            what: format!(
                "numbers of {least} to {most} digits, {} blocks, width {}, {} steps",
                size.blocks, size.width, size.steps
            ),
            accuracy: accuracy(&model, &batch)?,
            layers: layers(&model, &windows, reading(), Bounds::default())?,
        });
    }
    Ok(found)
}

/// What the model says to problems. Each digit is asked for behind the true ones before it, which
/// for an answer that is right as a whole is the same as being asked for all of it.
fn accuracy(model: &Model, batch: &Batch) -> Result<Accuracy> {
    let mut tally = Tally::default();
    let targets = batch.targets.chunks(batch.length);
    for (inputs, targets) in batch.inputs.chunks(batch.length).zip(targets) {
        let ids = Tensor::from_slice(inputs, (1, inputs.len()), &Device::Cpu)
            .map_err(lapidary_kernels::Error::from)?;
        let output = model.forward(&Input::tokens(ids), Pass::default())?;
        let logits = output.into_logits()?.into_value();
        let said = logits
            .argmax(D::Minus1)
            .and_then(|said| said.flatten_all()?.to_vec1::<u32>())
            .map_err(lapidary_kernels::Error::from)?;
        tally.read(&said, targets);
    }
    Ok(tally.accuracy())
}

/// Digits and answers, all and right.
#[derive(Default)]
struct Tally {
    digits: usize,
    right_digits: usize,
    answers: usize,
    right_answers: usize,
}

impl Tally {
    /// A row; an answer that is cut off at its end counts digit by digit.
    fn read(&mut self, said: &[u32], targets: &[u32]) {
        let mut right_so_far = true;
        for (said, target) in said.iter().zip(targets) {
            if *target == IGNORE {
                right_so_far = true;
                continue;
            }
            right_so_far &= said == target;
            self.digits += 1;
            self.right_digits += usize::from(said == target);
            if *target == Addition::END {
                self.answers += 1;
                self.right_answers += usize::from(right_so_far);
            }
        }
    }

    fn accuracy(&self) -> Accuracy {
        let share = |part: usize, of: usize| part as f64 / of.max(1) as f64;
        Accuracy {
            digits: share(self.right_digits, self.digits),
            answers: share(self.right_answers, self.answers),
        }
    }
}

/// What is said of them; `text` is the smoothness of a decoder of text.
pub(super) fn claims(scale: Scale, sums: &[Sums], text: f64) -> Vec<Claim> {
    let told = |of: &dyn Fn(&Sums) -> String| -> String {
        let each = sums.iter().map(|sum| {
            let kind = if sum.carry { "with carries" } else { "without" };
            format!("{kind}: {}", of(sum))
        });
        each.collect::<Vec<_>>().join("; ")
    };
    let what = sums.first().map_or("", |sum| sum.what.as_str());
    let learned = sums.iter().all(|sum| sum.accuracy.answers >= 0.9);
    vec![
        Claim::new(
            "a decoder learns to add, with carries and without, when answers begin with their lowest \
             digit: at least 0.9 of new answers are right",
            "no figure; 8 layers, width 512, 100 000 steps, 5 to 10 digits",
            told(&|sum| {
                let Accuracy { digits, answers } = sum.accuracy;
                format!("{digits:.3} of digits, {answers:.3} of whole answers")
            }),
            after_training(scale, learned),
        )
        .noted(what),
        Claim::new(
            "position vectors of decoders that add are less smooth than those of a decoder of text, \
             by at least 0.15 of the share of low frequencies",
            "no figure: smoothness is said to come with natural language",
            format!(
                "{}; text: share {text:.3}",
                told(&|sum| format!(
                    "share {:.3}, stable rank {:.2}",
                    sum.smoothness(),
                    sum.stable_rank()
                ))
            ),
            after_training(
                scale,
                sums.iter().all(|sum| text - sum.smoothness() >= 0.15),
            ),
        )
        .noted("means over blocks; the decoder of text has other blocks and width"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_where_every_digit_of_it_is() {
        let mut tally = Tally::default();
        let none = IGNORE;
        // "7 ;", then "4 2 ;" of which one digit is wrong, then one that is cut off.
        let targets = [
            none,
            7,
            Addition::END,
            none,
            none,
            4,
            2,
            Addition::END,
            none,
            3,
        ];
        let said = [0, 7, Addition::END, 9, 9, 4, 1, Addition::END, 0, 3];
        tally.read(&said, &targets);
        let found = tally.accuracy();
        assert_eq!(found.digits, 5.0 / 6.0);
        assert_eq!(found.answers, 0.5);
    }
}
