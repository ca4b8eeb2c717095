//! Images as patches side by side, and what a model makes of them.

use super::super::numbers;
use super::super::sequences::{LEVELS, SIDE, digits};
use super::PATCH;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_explain::faithfulness::masking::most_likely;
use lapidary_kernels::{CrossEntropyOptions, Device, Tensor, cross_entropy};
use lapidary_model::{Input, InputSpec, Model, ModelSpec, Pass};

/// An image as its patches' pixels, and its class.
#[derive(Clone)]
pub(super) struct Example {
    /// `[channels, 4, 4 · patches]`.
    pub(super) pixels: Vec<f32>,
    pub(super) label: u32,
}

/// `patches` of `channels · 16` pixels side by side.
pub(super) fn in_a_row(patches: &[Vec<f32>], channels: usize) -> Vec<f32> {
    let mut pixels = Vec::new();
    for channel in 0..channels {
        for row in 0..PATCH {
            for patch in patches {
                let start = channel * PATCH * PATCH + row * PATCH;
                pixels.extend_from_slice(patch.get(start..start + PATCH).unwrap_or_default());
            }
        }
    }
    pixels
}

/// Printed digits, cut in stripes of two rows that overlap.
pub(super) fn stripes(count: usize, seed: u64) -> Vec<Example> {
    let brightness = |token: &u32| *token as f32 / (LEVELS - 1) as f32 - 0.5;
    let each = digits(count, seed).into_iter().map(|digit| {
        let pixels: Vec<f32> = digit.tokens.iter().map(brightness).collect();
        let stripes: Vec<Vec<f32>> = (0..SIDE - 1)
            .map(|row| {
                pixels
                    .get(row * SIDE..(row + 2) * SIDE)
                    .unwrap_or_default()
                    .to_vec()
            })
            .collect();
        Example {
            pixels: in_a_row(&stripes, 1),
            label: digit.label,
        }
    });
    each.collect()
}

pub(super) fn input(examples: &[Example], spec: &ModelSpec) -> Result<Input> {
    let InputSpec::Patches(patches) = &spec.input else {
        return Err(Error::Experiment("a model of patches".to_owned()));
    };
    let pixels: Vec<f32> = examples.iter().flat_map(|e| e.pixels.clone()).collect();
    let [height, width] = patches.image;
    let shape = (examples.len(), patches.channels, height, width);
    Ok(Input::Pixels(engine(Tensor::from_vec(
        pixels,
        shape,
        &Device::Cpu,
    ))?))
}

pub(super) fn logits(model: &Model, examples: &[Example]) -> Result<Tensor> {
    let input = input(examples, model.spec())?;
    Ok(model
        .forward(&input, Pass::default())?
        .into_logits()?
        .into_value())
}

pub(super) fn loss(model: &Model, examples: &[Example]) -> Result<Tensor> {
    let labels: Vec<u32> = examples.iter().map(|example| example.label).collect();
    let labels = engine(Tensor::from_vec(labels, examples.len(), &Device::Cpu))?;
    let options = CrossEntropyOptions::default();
    Ok(cross_entropy(&logits(model, examples)?, &labels, &options)?)
}

pub(super) fn percent_right(model: &Model, examples: &[Example]) -> Result<f64> {
    let mut right = 0;
    for chunk in examples.chunks(100) {
        let all = numbers(&logits(model, chunk)?)?;
        let rows = all.chunks(10).zip(chunk);
        right += rows
            .filter(|(row, example)| most_likely(row) == example.label as usize)
            .count();
    }
    Ok(100.0 * right as f64 / examples.len().max(1) as f64)
}
