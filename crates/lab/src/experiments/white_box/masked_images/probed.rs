//! What the masked autoencoder's encoder tells of digits that it was never told: a linear map of its frozen features
//! names them, beside the same of an encoder that has learned nothing and of the pixels.

use super::{DEPTH, Images, input};
use crate::error::engine;
use crate::experiments::probe::{Row, percent_by_ridge};
use crate::experiments::{after_learning, mean, numbers};
use crate::{Claim, Result, Setting};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;

const DIGITS: usize = 10;
/// Images run at one time.
const AT_ONCE: usize = 64;
/// Times the error of the mean patch that hidden patches are drawn with at most by a model that has learned to.
pub(super) const LEARNED: f64 = 0.95;

/// Percent of held-out digits that a linear map, fitted to those trained on, names.
pub(super) struct Probed {
    /// From features of the trained encoder.
    trained: f64,
    /// From those of the encoder that it began as.
    untrained: f64,
    /// From pixels.
    pixels: f64,
}

impl Probed {
    pub(super) fn of(
        trained: &Model,
        untrained: &Model,
        known: &Images,
        asked: &Images,
    ) -> Result<Self> {
        let by = |model: &Model| -> Result<f64> {
            percent_by_ridge(&features(model, known)?, &features(model, asked)?, DIGITS)
        };
        Ok(Self {
            trained: by(trained)?,
            untrained: by(untrained)?,
            pixels: percent_by_ridge(&of_pixels(known), &of_pixels(asked), DIGITS)?,
        })
    }
}

/// What is claimed of the features of models that have learned to draw what is hidden.
pub(super) fn claims(setting: &Setting, found: &[Probed], learned: bool) -> [Claim; 2] {
    let of = |of: fn(&Probed) -> f64| mean(found.iter().map(of));
    let trained = of(|found| found.trained);
    let claim = |beside: &str, published: &str, name: &str, other: f64| {
        Claim::new(
            &format!(
                "masked autoencoder: a linear map of the frozen encoder's features names more digits than one of \
                 {beside}"
            ),
            published,
            format!("{trained:.1} %; {name} {other:.1} %"),
            after_learning(setting.scale, learned, trained > other),
        )
        .noted(format!(
            "features: the mean of the patches behind the encoder's last block, nothing hidden; ridge regression whose \
             ridge known digits choose; not measured unless hidden patches are drawn with at most {LEARNED} times the \
             error of the mean patch"
        ))
    };
    [
        claim(
            "an encoder that has learned nothing",
            "CIFAR-10 by a linear probe: CRATE-MAE-S 79.4 %, B 80.9 %; ViT-MAE-S 79.9 %, B 87.9 %",
            "untrained",
            of(|found| found.untrained),
        ),
        claim(
            "the pixels",
            "no figure",
            "pixels",
            of(|found| found.pixels),
        ),
    ]
}

/// The digit of each image and the encoder's features of it, of which no patch is hidden.
fn features(model: &Model, images: &Images) -> Result<Vec<Row>> {
    let site = format!("blocks.{}.out", DEPTH - 1);
    let places: Vec<usize> = (0..images.count()).collect();
    let mut rows = Vec::with_capacity(places.len());
    for places in places.chunks(AT_ONCE) {
        let trace = Trace::new().capture(&site)?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let pixels = images.tensor(places.iter().copied())?;
        model.forward(&Input::Pixels(pixels), pass)?;
        let written = trace.signal(&site)?;
        let (_, length, width) = engine(written.value().dims3())?;
        let values = numbers(written.value())?;
        let each = values.chunks((length * width).max(1));
        let labels = places.iter().filter_map(|place| images.labels.get(*place));
        rows.extend(
            labels
                .copied()
                .zip(each.map(|tokens| mean_of_patches(tokens, width))),
        );
    }
    Ok(rows)
}

/// The mean of `tokens` `[tokens, width]` that stand for patches: those behind the class token.
fn mean_of_patches(tokens: &[f64], width: usize) -> Vec<f64> {
    let patches = tokens.chunks_exact(width.max(1)).skip(input().class_tokens);
    let count = patches.len().max(1) as f64;
    let mut mean = vec![0.0; width];
    for patch in patches {
        for (mean, x) in mean.iter_mut().zip(patch) {
            *mean += x / count;
        }
    }
    mean
}

fn of_pixels(images: &Images) -> Vec<Row> {
    let each = images.labels.iter().zip(&images.pixels);
    each.map(|(label, pixels)| (*label, pixels.iter().map(|x| f64::from(*x)).collect()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::spec;
    use super::*;
    use crate::experiments::sequences::digits;
    use crate::{Scale, Verdict};
    use lapidary_kernels::{DType, Device};
    use lapidary_model::ModelSpec;

    fn model(spec: ModelSpec) -> Model {
        Model::initialised(spec, 0, DType::F32, &Device::Cpu).unwrap()
    }

    fn near(a: &Row, b: &Row) {
        assert_eq!((a.0, a.1.len()), (b.0, b.1.len()));
        for (a, b) in a.1.iter().zip(&b.1) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }

    #[test]
    fn the_class_token_is_no_patch() {
        let tokens = [9.0, 9.0, 1.0, 2.0, 3.0, 6.0];
        assert_eq!(mean_of_patches(&tokens, 2), [2.0, 4.0]);
    }

    /// A model without the decoder has the same features; so does an image that is run alone.
    #[test]
    fn features_are_the_encoders_and_each_images_own() {
        const WIDTH: usize = 16;
        let examples = digits(AT_ONCE + 6, 3);
        let images = Images::new(&examples).unwrap();
        let whole = model(spec(WIDTH));
        let found = features(&whole, &images).unwrap();
        assert_eq!(found.len(), examples.len());
        for (example, (label, row)) in examples.iter().zip(&found) {
            assert_eq!((example.label as usize, WIDTH), (*label, row.len()));
        }
        let mut encoder = spec(WIDTH);
        encoder.blocks.truncate(1);
        let alone = features(&model(encoder), &images).unwrap();
        for (a, b) in found.iter().zip(&alone) {
            near(a, b);
        }
        for place in [0, AT_ONCE + 5] {
            let one = Images::new(&examples[place..=place]).unwrap();
            near(&features(&whole, &one).unwrap()[0], &found[place]);
        }
    }

    #[test]
    fn a_model_that_draws_nothing_is_not_measured() {
        let setting = Setting {
            scale: Scale::Small,
            ..Setting::default()
        };
        let found = [Probed {
            trained: 80.0,
            untrained: 60.0,
            pixels: 90.0,
        }];
        let verdicts = |learned| claims(&setting, &found, learned).map(|claim| claim.verdict);
        assert_eq!(verdicts(false), [Verdict::NotMeasured; 2]);
        assert_eq!(verdicts(true), [Verdict::Holds, Verdict::DoesNotHold]);
    }
}
