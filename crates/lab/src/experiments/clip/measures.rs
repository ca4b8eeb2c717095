//! What is measured on pictures that nothing was fitted to.

use super::study::{AT_ONCE, Pictures, Texts};
use crate::error::engine;
use crate::experiments::attributes::{self, Picture, SHAPE, TEXTURE};
use crate::experiments::mini_clip::MiniClip;
use crate::experiments::{mean, number, numbers};
use crate::{Error, Result};
use lapidary_explain::clip::{Component, HeatMap, ImageTower, ZeroShot, heat_maps, mean_ablated};
use lapidary_kernels::{D, Tensor};
use lapidary_model::{Input, Pass};
use lapidary_signal::Trace;

/// What is measured on the test pictures.
pub struct Tested {
    /// Largest `|Σ entries − embedding|`.
    pub error: f64,
    /// `[pictures, components, features]`.
    pub components: Tensor,
    /// Intersection over union, of shape and background, of heat maps and of rollout.
    pub heat: f64,
    pub rollout: f64,
}

pub fn test(clip: &MiniClip, shapes: &ZeroShot, pictures: &Pictures) -> Result<Tested> {
    let tower = ImageTower::new(&clip.image)?;
    let (mut error, mut all) = (0f64, Vec::new());
    let (mut heat, mut rolled) = (Vec::new(), Vec::new());
    for (batch, shown) in pictures.batches().zip(pictures.pictures.chunks(AT_ONCE)) {
        let batch = batch?;
        let decomposition = tower.decompose(&batch)?;
        let components = decomposition.components()?;
        let embeddings = decomposition.embeddings();
        for sum in [
            engine(components.sum(1))?,
            engine(direct_sum(&tower, &components)? + engine(decomposition.tokens()?.sum(1))?)?,
        ] {
            let difference = engine(engine(sum - embeddings)?.abs())?;
            error = error.max(number(&engine(difference.max_all())?)?);
        }
        let said = shapes.classify(embeddings)?;
        let maps = heat_maps(&decomposition, shapes, &said)?;
        let others = rollout(clip, &tower, &batch)?;
        for ((picture, map), other) in shown.iter().zip(&maps).zip(&others) {
            heat.push(overlap(map, picture, pictures.side));
            rolled.push(overlap(other, picture, pictures.side));
        }
        all.push(components);
    }
    Ok(Tested {
        error,
        components: engine(Tensor::cat(&all, 0))?,
        heat: mean(heat),
        rollout: mean(rolled),
    })
}

/// Start and feed-forward parts of each picture, summed: `[pictures, features]`.
fn direct_sum(tower: &ImageTower<'_>, components: &Tensor) -> Result<Tensor> {
    let zero = engine(engine(components.mean(0))?.zeros_like())?;
    let heads = marks(tower, |component| {
        matches!(component, Component::Head { .. })
    });
    Ok(mean_ablated(components, &zero, &heads)?)
}

pub fn marks(tower: &ImageTower<'_>, ablated: impl Fn(&Component) -> bool) -> Vec<bool> {
    tower.components().iter().map(ablated).collect()
}

/// Mean of the intersections over unions of shape and background, after upsampling,
/// normalisation and a threshold at the mean.
fn overlap(map: &HeatMap, picture: &Picture, side: usize) -> f64 {
    let found = map.upsampled(side, side).normalised().mask();
    let pairs = || found.iter().zip(&picture.mask);
    let of = |wanted: bool| {
        let both = pairs()
            .filter(|(a, b)| **a == wanted && **b == wanted)
            .count();
        let either = pairs()
            .filter(|(a, b)| **a == wanted || **b == wanted)
            .count();
        both as f64 / either.max(1) as f64
    };
    (of(true) + of(false)) / 2.0
}

/// Attention rollout (Abnar & Zuidema, arXiv 2005.00928): the class token's row of
/// `Π_l (A_l + 1) / 2`, attention averaged over heads.
fn rollout(clip: &MiniClip, tower: &ImageTower<'_>, batch: &Tensor) -> Result<Vec<HeatMap>> {
    let trace = Trace::new().capture("blocks.*.attention.weights")?;
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    clip.image.forward(&Input::Pixels(batch.clone()), pass)?;
    // The class token's row, from the last block down: `[images, 1, tokens]`.
    let mut row: Option<Tensor> = None;
    for layer in (0..tower.depth()).rev() {
        let weights = trace.signal(&format!("blocks.{layer}.attention.weights"))?;
        let averaged = engine(weights.value().mean(1))?;
        let before = match row.take() {
            Some(row) => row,
            None => {
                let tokens = engine(averaged.dim(2))?;
                let first = (0..tokens).map(|token| if token == 0 { 1f32 } else { 0.0 });
                let first = Tensor::from_vec(first.collect(), (1, 1, tokens), averaged.device());
                let images = engine(averaged.dim(0))?;
                let first = engine(engine(first)?.broadcast_as((images, 1, tokens)))?;
                engine(first.contiguous())?
            }
        };
        let passed = engine(before.matmul(&averaged))?;
        row = Some(engine(engine(before + passed)? * 0.5)?);
    }
    let row = row.ok_or_else(|| Error::Experiment("the model has no blocks".to_owned()))?;
    let tokens = engine(row.dim(D::Minus1))?;
    let [rows, columns] = tower.grid();
    let each = numbers(&row)?;
    let map = |weights: &[f64]| HeatMap {
        rows,
        columns,
        values: weights.iter().skip(tower.class_tokens()).copied().collect(),
    };
    Ok(each.chunks(tokens).map(map).collect())
}

/// Share of the pictures that are of the shape that they are said to be.
pub fn accuracy(said: &[usize], pictures: &Pictures) -> f64 {
    let truth = pictures.values(SHAPE);
    let right = said
        .iter()
        .zip(&truth)
        .map(|(a, b)| f64::from(u8::from(a == b)));
    mean(right)
}

/// Accuracy of the least accurate pairing of shape and texture.
pub fn worst_group(said: &[usize], pictures: &Pictures) -> f64 {
    let (shapes, textures) = (pictures.values(SHAPE), pictures.values(TEXTURE));
    let groups = attributes::values(TEXTURE).len();
    let mut right = vec![(0.0, 0.0); attributes::values(SHAPE).len() * groups];
    for ((said, shape), texture) in said.iter().zip(&shapes).zip(&textures) {
        if let Some((right, count)) = right.get_mut(shape * groups + texture) {
            *right += f64::from(u8::from(said == shape));
            *count += 1.0;
        }
    }
    let met = right.into_iter().filter(|(_, count)| *count > 0.0);
    met.map(|(right, count)| right / count).fold(1.0, f64::min)
}

/// Share of the pictures whose own caption is the nearest of all.
pub fn retrieval(texts: &Texts, embeddings: &Tensor, pictures: &Pictures) -> Result<f64> {
    let products = engine(embeddings.matmul(&engine(engine(texts.captions.t())?.contiguous())?))?;
    let nearest = engine(engine(products.argmax(1))?.to_vec1::<u32>())?;
    let right = nearest
        .iter()
        .zip(&pictures.scenes)
        .map(|(row, scene)| f64::from(u8::from(texts.scenes.get(*row as usize) == Some(scene))));
    Ok(mean(right))
}
