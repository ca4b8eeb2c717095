//! What is looked at: pictures, the directions of texts, and what a model's heads say of both.

use crate::Result;
use crate::error::engine;
use crate::experiments::attributes::{self, Draw, PROPERTIES, Picture, SHAPE, Scene};
use crate::experiments::mini_clip::{MiniClip, pixels};
use lapidary_explain::clip::{Component, HeadName, HeadOutputs, ImageTower, Survey, ZeroShot};
use lapidary_kernels::Tensor;
use lapidary_train::generator;

/// Texts for each head, as the claims have it.
pub const TEXTS: usize = 5;

/// Share of those that must be of one property for a head to be pure.
const PURE: f64 = 0.8;

/// Pictures that run at one time.
pub const AT_ONCE: usize = 64;

/// Scenes with their pictures.
pub struct Pictures {
    pub scenes: Vec<Scene>,
    pub pictures: Vec<Picture>,
    pub side: usize,
}

impl Pictures {
    pub fn draw(count: usize, side: usize, seed: u64) -> Self {
        let mut generator = generator(seed);
        let draw = Draw::balanced();
        let scenes: Vec<Scene> = (0..count).map(|_| draw.scene(&mut generator)).collect();
        let pictures = scenes
            .iter()
            .map(|scene| attributes::draw(*scene, side, &mut generator))
            .collect();
        Self {
            scenes,
            pictures,
            side,
        }
    }

    pub fn batches(&self) -> impl Iterator<Item = Result<Tensor>> + '_ {
        self.pictures
            .chunks(AT_ONCE)
            .map(|chunk| pixels(chunk, self.side))
    }

    pub fn values(&self, property: usize) -> Vec<usize> {
        let value = |scene: &Scene| scene.values.get(property).copied().unwrap_or(0);
        self.scenes.iter().map(value).collect()
    }
}

/// The directions of all captions, and what is made of them.
pub struct Texts {
    pub scenes: Vec<Scene>,
    /// `[scenes, features]`.
    pub captions: Tensor,
}

impl Texts {
    pub fn of(clip: &MiniClip) -> Result<Self> {
        let scenes = Scene::all();
        let captions = clip.captions(&scenes)?;
        Ok(Self { scenes, captions })
    }

    /// One class for each value of a property: the ensemble of all captions that have it.
    pub fn classes(&self, property: usize) -> Result<ZeroShot> {
        let groups = (0..attributes::values(property).len())
            .map(|value| {
                let has = |scene: &Scene| scene.values.get(property) == Some(&value);
                let rows: Vec<u32> = (0u32..)
                    .zip(&self.scenes)
                    .filter(|(_, scene)| has(scene))
                    .map(|(row, _)| row)
                    .collect();
                let count = rows.len();
                let rows = engine(Tensor::from_vec(rows, count, self.captions.device()))?;
                engine(self.captions.index_select(&rows, 0))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(ZeroShot::from_groups(&groups)?)
    }

    /// The pool that heads are named by: every value of every property. Beside the directions,
    /// the property of each.
    fn pool(&self) -> Result<(Tensor, Vec<usize>)> {
        let mut all = Vec::new();
        let mut properties = Vec::new();
        for property in 0..PROPERTIES.len() {
            let classes = self.classes(property)?;
            properties.extend(vec![property; engine(classes.vectors().dim(0))?]);
            all.push(classes.vectors().clone());
        }
        Ok((engine(Tensor::cat(&all, 0))?, properties))
    }
}

/// What a head's texts are about.
pub struct About {
    pub head: Component,
    /// The property that most of its texts are of, and which share of them.
    pub property: usize,
    pub agreement: f64,
    /// The property with most of the variance in its texts.
    pub strongest: usize,
}

fn about(name: &HeadName, properties: &[usize]) -> About {
    let mut counts = [0.0; 4];
    let mut shares = [0.0; 4];
    for (text, share) in name.span.texts.iter().zip(&name.span.shares) {
        let property = properties.get(*text).copied().unwrap_or(0);
        for (list, weight) in [(&mut counts, 1.0), (&mut shares, *share)] {
            if let Some(sum) = list.get_mut(property) {
                *sum += weight;
            }
        }
    }
    let most = |list: &[f64; 4]| {
        let all = list.iter().copied().enumerate();
        all.fold(
            (0, f64::MIN),
            |best, one| if one.1 > best.1 { one } else { best },
        )
    };
    let (property, count) = most(&counts);
    About {
        head: name.component,
        property,
        agreement: count / name.span.texts.len().max(1) as f64,
        strongest: most(&shares).0,
    }
}

impl About {
    /// Pure, and of a property that the claim speaks of: colour, place or texture.
    pub fn is_pure(&self) -> bool {
        self.agreement >= PURE && self.property != SHAPE
    }
}

/// What is found in a model by looking at pictures that are not tested on.
pub struct Found {
    pub heads: Vec<HeadName>,
    pub about: Vec<About>,
    /// `[components, features]`.
    pub means: Tensor,
    /// Share of what differs between pictures, for each part.
    pub effects: Vec<(String, f64)>,
}

pub fn survey(clip: &MiniClip, texts: &Texts, pictures: &Pictures) -> Result<Found> {
    let tower = ImageTower::new(&clip.image)?;
    let is_head = |component: &&Component| matches!(component, Component::Head { .. });
    let heads: Vec<Component> = tower.components().iter().filter(is_head).copied().collect();
    let mut survey = Survey::new(&tower, HeadOutputs::in_memory(&tower, &heads)?);
    for batch in pictures.batches() {
        survey.add(&batch?)?;
    }
    let (pool, properties) = texts.pool()?;
    let heads = survey.name_heads(&pool, TEXTS)?;
    Ok(Found {
        about: heads.iter().map(|name| about(name, &properties)).collect(),
        heads,
        means: survey.means()?,
        effects: survey
            .layer_effects()?
            .into_iter()
            .map(|effect| (effect.part, effect.variance))
            .collect(),
    })
}
