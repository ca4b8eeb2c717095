//! Images of glyphs on noise, with what each pixel belongs to, and classifiers of them.
//!
//! A glyph fills 8×8 pixels of a 32×32 canvas at a place whose coordinates are multiples of 4.
//! The models see one glyph in training; tests have two, and ask for either.

use crate::Result;
use crate::error::engine;
use crate::experiments::numbers;
use lapidary_kernels::{
    CrossEntropyOptions, DType, Device, SoftmaxMask, Tensor, cross_entropy, softmax,
};
use lapidary_model::{
    HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput, Pool,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_train::{Generator, generator};
use rand::RngExt;
use std::collections::BTreeMap;

/// Height and width of an image.
pub const CANVAS: usize = 32;
/// Height and width of a glyph.
pub const GLYPH: usize = 8;
/// Height and width of a patch, and the step between places.
pub const PATCH: usize = 4;
/// Number of glyphs.
pub const CLASSES: usize = 10;

/// Mean and deviation that images are normalised with.
const NORMALISATION: (f32, f32) = (0.2, 0.25);

/// The shapes: 4×4 cells of 2×2 pixels, half of them lit, any two shapes far from each other.
#[derive(Clone, Debug)]
pub struct Alphabet {
    shapes: Vec<[bool; 16]>,
}

impl Alphabet {
    /// An alphabet from a seed.
    pub fn new(seed: u64) -> Self {
        let mut generator = generator(seed);
        let mut shapes: Vec<[bool; 16]> = Vec::new();
        while shapes.len() < CLASSES {
            let mut cells: [usize; 16] = std::array::from_fn(|cell| cell);
            for last in (1..cells.len()).rev() {
                cells.swap(last, generator.random_range(0..=last));
            }
            let mut shape = [false; 16];
            for lit in cells.iter().take(8) {
                if let Some(cell) = shape.get_mut(*lit) {
                    *cell = true;
                }
            }
            let differs =
                |other: &[bool; 16]| other.iter().zip(&shape).filter(|(a, b)| a != b).count() >= 6;
            if shapes.iter().all(differs) {
                shapes.push(shape);
            }
        }
        Self { shapes }
    }

    /// Which pixels of a glyph are lit, row by row; none of a class that there isn't.
    pub fn pixels(&self, class: usize) -> Vec<bool> {
        let shape = self.shapes.get(class).copied().unwrap_or_default();
        let cell = |pixel: usize| pixel / GLYPH / 2 * 4 + pixel % GLYPH / 2;
        let lit = |pixel: usize| shape.get(cell(pixel)).copied().unwrap_or(false);
        (0..GLYPH * GLYPH).map(lit).collect()
    }
}

/// A glyph on the canvas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Which glyph.
    pub class: usize,
    /// Its upper edge.
    pub top: usize,
    /// Its left edge.
    pub left: usize,
}

impl Placed {
    /// Whether each pixel of the canvas lies in the glyph's square.
    pub fn mask(&self) -> Vec<bool> {
        let inside = |pixel: usize| {
            let within = |at: usize, from: usize| (from..from + GLYPH).contains(&at);
            within(pixel / CANVAS, self.top) && within(pixel % CANVAS, self.left)
        };
        (0..CANVAS * CANVAS).map(inside).collect()
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.top.abs_diff(other.top) < GLYPH && self.left.abs_diff(other.left) < GLYPH
    }
}

/// An image with its glyphs.
#[derive(Clone, Debug)]
pub struct Scene {
    /// `height · width` brightnesses in `[0, 1]`.
    pub image: Vec<f32>,
    /// What is on it.
    pub glyphs: Vec<Placed>,
}

/// A scene of `count` different glyphs that do not overlap.
pub fn scene(alphabet: &Alphabet, count: usize, generator: &mut Generator) -> Scene {
    let places = (CANVAS - GLYPH) / PATCH + 1;
    let mut glyphs: Vec<Placed> = Vec::new();
    while glyphs.len() < count {
        let placed = Placed {
            class: generator.random_range(0..CLASSES),
            top: PATCH * generator.random_range(0..places),
            left: PATCH * generator.random_range(0..places),
        };
        let free = |other: &Placed| other.class != placed.class && !other.overlaps(&placed);
        if glyphs.iter().all(free) {
            glyphs.push(placed);
        }
    }
    let mut image: Vec<f32> = (0..CANVAS * CANVAS)
        .map(|_| generator.random_range(0.0..0.3))
        .collect();
    for placed in &glyphs {
        let Some(shape) = alphabet.shapes.get(placed.class) else {
            continue;
        };
        let lit = shape.iter().enumerate().filter(|(_, lit)| **lit);
        for (cell, _) in lit {
            for pixel in 0..4 {
                let row = placed.top + cell / 4 * 2 + pixel / 2;
                let column = placed.left + cell % 4 * 2 + pixel % 2;
                if let Some(value) = image.get_mut(row * CANVAS + column) {
                    *value = generator.random_range(0.7..1.0);
                }
            }
        }
    }
    Scene { image, glyphs }
}

/// Images as the input of a model, normalised.
pub fn input<T: AsRef<[f32]>>(images: &[T]) -> Result<Input> {
    let (mean, deviation) = NORMALISATION;
    let mut pixels = Vec::with_capacity(images.len() * CANVAS * CANVAS);
    for image in images {
        pixels.extend(
            image
                .as_ref()
                .iter()
                .map(|value| (value - mean) / deviation),
        );
    }
    let shape = (images.len(), 1, CANVAS, CANVAS);
    Ok(Input::Pixels(engine(Tensor::from_vec(
        pixels,
        shape,
        &Device::Cpu,
    ))?))
}

/// Class probabilities of each image.
pub fn probabilities<T: AsRef<[f32]>>(model: &Model, images: &[T]) -> Result<Vec<Vec<f64>>> {
    let mut all = Vec::with_capacity(images.len());
    for chunk in images.chunks(64) {
        let logits = model.forward(&input(chunk)?, Pass::default())?;
        let logits = logits.into_logits()?.into_value();
        let each = numbers(&softmax(&logits, &SoftmaxMask::default())?)?;
        all.extend(each.chunks(CLASSES).map(<[f64]>::to_vec));
    }
    Ok(all)
}

/// A vision transformer's measures and how it is trained.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Features of a token.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Blocks.
    pub blocks: usize,
    /// Steps.
    pub steps: u64,
    /// Images in a step, each new.
    pub batch: usize,
    /// The highest learning rate.
    pub rate: f64,
}

fn spec(course: &Course) -> ModelSpec {
    ModelSpec {
        width: course.width,
        input: InputSpec::Patches(PatchInput {
            image: [CANVAS, CANVAS],
            patch: PATCH,
            channels: 1,
            class_tokens: 1,
            bias: true,
            around: None,
            norm: None,
            deviation: PatchInput::DEVIATION,
            position: Default::default(),
            mask_token: false,
            resized: false,
        }),
        blocks: vec![BlockSpec {
            repeat: course.blocks,
            wiring: Wiring::PreNorm,
            norm: NormSpec::default(),
            attention: MixerSpec::MultiHead(MultiHeadSpec::new(course.heads)),
            cross_attention: None,
            shared: false,
            layer_scale: None,
            drop_path: 0.0,
            dropout_by_feature: false,
            coding_step: None,
            shortcuts: false,
            feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                hidden: 4 * course.width,
                activation: ActivationSpec::Gelu,
                bias: true,
            })),
            dropout: 0.0,
        }],
        final_norm: Some(NormSpec::default()),
        head: HeadSpec::Pooled {
            pool: Pool::First,
            norm: None,
            hidden: None,
            labels: Some(CLASSES),
            bias: true,
        },
        low_rank: BTreeMap::new(),
        quantised: BTreeMap::new(),
        organisation: None,
        initial: Default::default(),
    }
}

/// Trains a vision transformer to name the one glyph of an image.
pub fn train(alphabet: &Alphabet, course: &Course, seed: u64) -> Result<Model> {
    let mut generator = generator(seed ^ 0x61f7);
    train_by(course, seed, |model| {
        let scenes: Vec<Scene> = (0..course.batch)
            .map(|_| scene(alphabet, 1, &mut generator))
            .collect();
        let images: Vec<&[f32]> = scenes.iter().map(|scene| scene.image.as_slice()).collect();
        let labels = scenes.iter().filter_map(|scene| scene.glyphs.first());
        let labels = labels.map(|placed| placed.class as u32).collect();
        loss(model, &images, labels)
    })
}

/// Trains a vision transformer on the same images with their labels, drawn again and again.
pub fn train_on(examples: &[(&[f32], u32)], course: &Course, seed: u64) -> Result<Model> {
    let mut generator = generator(seed ^ 0x61f7);
    train_by(course, seed, |model| {
        let places = 0..examples.len().max(1);
        let drawn =
            (0..course.batch).filter_map(|_| examples.get(generator.random_range(places.clone())));
        let (images, labels): (Vec<&[f32]>, Vec<u32>) = drawn.copied().unzip();
        loss(model, &images, labels)
    })
}

fn train_by(
    course: &Course,
    seed: u64,
    mut loss: impl FnMut(&Model) -> Result<Tensor>,
) -> Result<Model> {
    let mut source = Initialiser::new(seed, DType::F32, Device::Cpu);
    let model = Model::trainable(spec(course), &mut source)?;
    super::classifier::fit(&model, course.steps, course.rate, |_| loss(&model))
}

/// The cross-entropy of images with their labels.
fn loss(model: &Model, images: &[&[f32]], labels: Vec<u32>) -> Result<Tensor> {
    let labels = engine(Tensor::from_vec(labels, images.len(), &Device::Cpu))?;
    let logits = model.forward(&input(images)?, Pass::default())?;
    Ok(cross_entropy(
        &logits.into_logits()?.into_value(),
        &labels,
        &CrossEntropyOptions::default(),
    )?)
}

/// The share of one-glyph scenes that the model names.
pub fn accuracy(model: &Model, scenes: &[Scene]) -> Result<f64> {
    let images: Vec<&[f32]> = scenes.iter().map(|scene| scene.image.as_slice()).collect();
    let right = probabilities(model, &images)?
        .iter()
        .zip(scenes)
        .filter(|(said, scene)| {
            let class = scene.glyphs.first().map(|placed| placed.class);
            Some(lapidary_explain::faithfulness::masking::most_likely(said)) == class
        })
        .count();
    Ok(right as f64 / scenes.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glyphs_are_distinct_and_apart() {
        let alphabet = Alphabet::new(3);
        let mut generator = generator(5);
        for _ in 0..50 {
            let scene = scene(&alphabet, 2, &mut generator);
            let [a, b] = scene.glyphs.as_slice() else {
                unreachable!()
            };
            assert!(a.class != b.class && !a.overlaps(b));
            let (first, second) = (a.mask(), b.mask());
            assert!(!first.iter().zip(&second).any(|(a, b)| *a && *b));
            let bright = scene.image.iter().zip(first.iter().zip(&second));
            for (value, (in_a, in_b)) in bright {
                assert!(*value < 0.3 || *in_a || *in_b);
            }
            let lit = scene.image.iter().filter(|value| **value >= 0.7).count();
            assert_eq!(lit, 2 * 8 * 4);
        }
    }
}
