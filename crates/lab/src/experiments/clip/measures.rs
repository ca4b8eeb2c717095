//! What is measured on pictures that nothing was fitted to.

use super::study::{AT_ONCE, Pictures, Texts};
use crate::Result;
use crate::error::engine;
use crate::experiments::attributes::{self, Picture, SHAPE, TEXTURE};
use crate::experiments::mini_clip::MiniClip;
use crate::experiments::{mean, number};
use lapidary_explain::clip::{Component, HeatMap, ImageTower, ZeroShot, heat_maps, mean_ablated};
use lapidary_explain::faithfulness::image::Segmentation;
use lapidary_explain::{Question, Target, attention_rollout, patch_heat};
use lapidary_kernels::Tensor;
use lapidary_model::Input;

/// What is measured on the test pictures.
pub struct Tested {
    /// Largest `|Σ entries − embedding|`.
    pub error: f64,
    /// `[pictures, components, features]`.
    pub components: Tensor,
    /// How heat maps and rollout tell shape from background.
    pub heat: Segmentation,
    pub rollout: Segmentation,
}

pub fn test(clip: &MiniClip, shapes: &ZeroShot, pictures: &Pictures) -> Result<Tested> {
    let tower = ImageTower::new(&clip.image)?;
    let (mut error, mut all) = (0f64, Vec::new());
    let (mut heat, mut rollout) = (Segmentation::new(), Segmentation::new());
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
        let others = rollouts(clip, &tower, &batch)?;
        for ((picture, map), other) in shown.iter().zip(&maps).zip(&others) {
            add(map, picture, pictures.side, &mut heat)?;
            add(other, picture, pictures.side, &mut rollout)?;
        }
        all.push(components);
    }
    Ok(Tested {
        error,
        components: engine(Tensor::cat(&all, 0))?,
        heat,
        rollout,
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

/// Adds how a map segments a picture, negative heat counting as none.
fn add(map: &HeatMap, picture: &Picture, side: usize, to: &mut Segmentation) -> Result<()> {
    let heat = map.upsampled(side, side).normalised().values;
    Ok(to.add(&heat, &picture.mask)?)
}

/// Attention rollout's map of each picture.
fn rollouts(clip: &MiniClip, tower: &ImageTower<'_>, batch: &Tensor) -> Result<Vec<HeatMap>> {
    let [rows, columns] = tower.grid();
    let mut maps = Vec::new();
    for index in 0..engine(batch.dim(0))? {
        let input = Input::Pixels(engine(batch.narrow(0, index, 1))?);
        let question = Question::new(&clip.image, &input);
        let scores = attention_rollout(&question, Target::class(0), 0)?.scores;
        maps.push(HeatMap {
            rows,
            columns,
            values: patch_heat(&clip.image, &scores)?,
        });
    }
    Ok(maps)
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
