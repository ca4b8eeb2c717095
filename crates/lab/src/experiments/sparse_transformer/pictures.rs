//! Pictures of digits pixel by pixel, whose rows are the period that strided attention is for.

use super::{Size, Way};
use crate::experiments::attending;
use crate::experiments::decoder::{self, Recipe};
use crate::experiments::sequences::{LEVELS, SIDE, digits};
use crate::experiments::{after_learning, jobs::in_parallel};
use crate::{Claim, Result, Setting};
use lapidary_model::{AbsolutePosition, InputSpec, ModelSpec};
use lapidary_train::Generator;
use lapidary_train::data::{Batch, Task};
use rand::RngExt;

const PIXELS: usize = SIDE * SIDE;
/// The token that stands before the first pixel.
const START: u32 = LEVELS as u32;
/// Pictures of a step.
pub(super) const BATCH: usize = 32;

/// Every pixel from those before it: place `i` has pixel `i − 1` as its input and `i` as its target.
struct Pictures;

impl Task for Pictures {
    fn vocabulary(&self) -> usize {
        LEVELS + 1
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for picture in digits(rows, generator.random_range(0..u64::MAX)) {
            let before = std::iter::once(&START).chain(&picture.tokens);
            batch.inputs.extend(before.take(length).copied());
            batch.targets.extend(picture.tokens.iter().take(length));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// A decoder with a table for rows and one for columns, its stride a row.
fn spec(way: Way, size: Size) -> ModelSpec {
    let size = Size {
        length: PIXELS,
        stride: SIDE,
        ..size
    };
    let mut spec = way.spec(size, LEVELS + 1);
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        tokens.position = AbsolutePosition::Axial {
            columns: SIDE,
            channels: 1,
            row_width: None,
        };
    }
    spec
}

/// Bits of a pixel of which nothing is known but how often each brightness is.
fn without_context(seed: u64) -> f64 {
    let mut counts = [0usize; LEVELS];
    let pixels = digits(1000, seed).into_iter();
    for pixel in pixels.flat_map(|picture| picture.tokens) {
        if let Some(count) = counts.get_mut(pixel as usize) {
            *count += 1;
        }
    }
    let all = counts.iter().sum::<usize>() as f64;
    let shares = counts.iter().map(|count| *count as f64 / all);
    let seen = shares.filter(|share| *share > 0.0);
    seen.map(|share| -share * share.log2()).sum()
}

/// Pictures by each way.
pub(super) fn pictures(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let recipe = Recipe {
        batch: BATCH,
        length: PIXELS,
        narrow: true,
        ..Recipe::default()
    };
    let jobs = Way::ALL.map(|way| (format!("pictures, {}", way.name()), way));
    let bits = in_parallel(setting, jobs.into(), |way| {
        let task = Box::new(Pictures);
        let model = decoder::train_by(recipe, spec(way, size), task, size.steps, setting.seed)?;
        let measure = attending::measure(&model, &mut Pictures, recipe, 16)?;
        Ok(measure.loss / std::f64::consts::LN_2)
    })?;
    let [dense, fixed, strided] = [0, 1, 2].map(|way| bits.get(way).copied().unwrap_or(f64::NAN));
    let nothing = without_context(setting.seed);
    let found = format!(
        "bits a pixel: dense {dense:.3}, fixed {fixed:.3}, strided {strided:.3}; without those before it {nothing:.3}"
    );
    let verdict = |holds| after_learning(setting.scale, dense <= nothing - 0.1, holds);
    Ok(vec![
        Claim::new(
            "on pictures, strided is within 0.02 bits of dense",
            "2.80 bits strided, 2.82 dense (CIFAR-10)",
            found.clone(),
            verdict(strided <= dense + 0.02),
        ),
        Claim::new(
            "on pictures, fixed is worse than strided",
            "2.85 bits fixed, 2.80 strided (CIFAR-10)",
            found,
            verdict(fixed > strided),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pixel_is_asked_for_behind_those_before_it() {
        let mut random = lapidary_train::generator(3);
        let batch = Pictures.batch(&mut random, 4, PIXELS).unwrap();
        assert_eq!((batch.rows, batch.inputs.len()), (4, 4 * PIXELS));
        for (inputs, targets) in batch
            .inputs
            .chunks(PIXELS)
            .zip(batch.targets.chunks(PIXELS))
        {
            assert_eq!(inputs[0], START);
            assert_eq!(inputs[1..], targets[..PIXELS - 1]);
            assert!(targets.iter().all(|pixel| *pixel < START));
        }
        // Others each time.
        assert_ne!(batch, Pictures.batch(&mut random, 4, PIXELS).unwrap());
    }

    /// Three bits are noise whatever is known; whether a pixel is lit is less than one.
    #[test]
    fn what_is_known_without_context_is_between_three_bits_and_four() {
        let bits = without_context(1);
        assert!((3.2..4.0).contains(&bits), "{bits}");
    }
}
