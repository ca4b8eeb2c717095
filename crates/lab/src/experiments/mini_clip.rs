//! A small CLIP (Radford et al., arXiv 2103.00020), trained on the pictures of [`attributes`]
//! and their captions by the symmetric InfoNCE loss.

use std::collections::BTreeMap;

use super::attributes::{self, CAPTION, Draw, Picture, Scene};
use crate::Result;
use crate::error::engine;
use lapidary_explain::clip::{embed_texts, unit_rows};
use lapidary_kernels::{
    AdamW, AdamWOptions, CrossEntropyOptions, DType, Device, Parameter, Tensor, Var, backward,
    cross_entropy, global_gradient_norm,
};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput,
    Pool, TokenInput,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_train::{Decay, Generator, Schedule, generator};
use rand::RngExt;

/// The measures of a small CLIP and how it is trained.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Height and width of a picture.
    pub side: usize,
    /// Height and width of a patch.
    pub patch: usize,
    /// Features of a token, in both towers, and of the common space.
    pub width: usize,
    /// Heads of a block.
    pub heads: usize,
    /// Blocks of the image tower.
    pub blocks: usize,
    /// Blocks of the text tower.
    pub text_blocks: usize,
    /// Hidden features of a feed-forward part, in widths.
    pub expansion: usize,
    /// Steps.
    pub steps: u64,
    /// Pictures with captions in a step.
    pub batch: usize,
    /// The highest learning rate; it rises over a tenth of the steps and falls as a cosine.
    pub rate: f64,
    /// How often a texture is that of its shape.
    pub correlation: f64,
    /// Seed of everything random.
    pub seed: u64,
}

/// The two towers.
#[derive(Debug)]
pub struct MiniClip {
    /// Reads pictures.
    pub image: Model,
    /// Reads captions.
    pub text: Model,
}

/// Colours and places in a batch: few, so that pictures which differ in shape and texture alone
/// meet as each other's negatives.
const COLOURS_AT_ONCE: usize = 3;
const PLACES_AT_ONCE: usize = 3;

/// Logits of pairs whose captions are the same though the pictures are not.
const NO_NEGATIVE: f32 = -1e4;

impl Course {
    fn block(&self, repeat: usize, causal: bool) -> BlockSpec {
        BlockSpec {
            repeat,
            wiring: Wiring::PreNorm,
            norm: NormSpec::default(),
            attention: MixerSpec::MultiHead(MultiHeadSpec {
                causal,
                ..MultiHeadSpec::new(self.heads)
            }),
            cross_attention: None,
            shared: false,
            layer_scale: None,
            drop_path: 0.0,
            dropout_by_feature: false,
            coding_step: None,
            shortcuts: false,
            feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                hidden: self.expansion * self.width,
                activation: ActivationSpec::QuickGelu,
                bias: true,
            })),
            dropout: 0.0,
        }
    }

    /// The image tower, as CLIP's.
    pub fn image_spec(&self) -> ModelSpec {
        ModelSpec {
            width: self.width,
            input: InputSpec::Patches(PatchInput {
                image: [self.side, self.side],
                patch: self.patch,
                channels: 3,
                class_tokens: 1,
                bias: false,
                around: None,
                norm: Some(NormSpec::default()),
                deviation: PatchInput::DEVIATION,
                position: Default::default(),
                mask_token: false,
                resized: false,
            }),
            blocks: vec![self.block(self.blocks, false)],
            final_norm: None,
            head: HeadSpec::Pooled {
                pool: Pool::First,
                norm: Some(NormSpec::default()),
                hidden: None,
                labels: Some(self.width),
                bias: false,
            },
            low_rank: BTreeMap::new(),
            quantised: BTreeMap::new(),
            organisation: None,
            initial: Default::default(),
        }
    }

    /// The text tower, as CLIP's.
    pub fn text_spec(&self) -> ModelSpec {
        ModelSpec {
            width: self.width,
            input: InputSpec::Tokens(TokenInput {
                vocabulary: attributes::vocabulary(),
                length: CAPTION,
                position: AbsolutePosition::Learned {
                    offset: 0,
                    skip_padding: false,
                },
                token_types: 0,
                norm: None,
                embedding_width: None,
                projected: Default::default(),
                dropout: 0.0,
                dropout_by_feature: false,
            }),
            blocks: vec![self.block(self.text_blocks, true)],
            final_norm: Some(NormSpec::default()),
            head: HeadSpec::Pooled {
                pool: Pool::AtToken(attributes::end()),
                norm: None,
                hidden: None,
                labels: Some(self.width),
                bias: false,
            },
            low_rank: BTreeMap::new(),
            quantised: BTreeMap::new(),
            organisation: None,
            initial: Default::default(),
        }
    }

    /// Both towers with their first values, to be trained.
    pub fn untrained(&self) -> Result<MiniClip> {
        Ok(MiniClip {
            image: Model::trainable(self.image_spec(), &mut Start::new(self.seed))?,
            text: Model::trainable(self.text_spec(), &mut Start::new(self.seed + 1))?,
        })
    }

    /// Trains both towers.
    pub fn train(&self) -> Result<MiniClip> {
        let clip = self.untrained()?;
        // ln of what similarities are multiplied by, CLIP's 1/0.07 at first.
        let scale = engine(Var::new(14.3f32.ln(), &Device::Cpu))?;
        let variables = || {
            clip.image
                .variables()
                .values()
                .chain(clip.text.variables().values())
        };
        let mut parameters: Vec<Parameter> = variables()
            .map(|variable| Parameter {
                variable: variable.clone(),
                weight_decay: Some(if variable.rank() < 2 { 0.0 } else { 0.05 }),
                rate_factor: 1.0,
            })
            .collect();
        parameters.push(Parameter {
            variable: scale.clone(),
            weight_decay: Some(0.0),
            rate_factor: 1.0,
        });
        let mut optimiser = AdamW::new(
            parameters,
            AdamWOptions {
                beta2: 0.98,
                ..AdamWOptions::default()
            },
        )?;
        let schedule = Schedule {
            peak: self.rate,
            floor: 0.0,
            warm_up: self.steps / 10,
            steps: self.steps,
            decay: Decay::Cosine,
        };
        let mut generator = generator(self.seed);
        for step in 0..self.steps {
            let (scenes, pixels) = self.batch(&mut generator)?;
            let loss = clip.loss(&scenes, &pixels, &scale)?;
            let gradients = engine(backward(&loss))?;
            let all: Vec<&Tensor> = variables()
                .filter_map(|variable| gradients.get(variable.as_tensor()))
                .collect();
            let norm = global_gradient_norm(&all)?;
            optimiser.step(&gradients, schedule.rate(step), 1.0 / norm.max(1.0))?;
        }
        clip.frozen()
    }

    fn batch(&self, generator: &mut Generator) -> Result<(Vec<Scene>, Tensor)> {
        let whole = Draw::balanced();
        let draw = Draw {
            colours: some_of(&whole.colours, COLOURS_AT_ONCE, generator),
            places: some_of(&whole.places, PLACES_AT_ONCE, generator),
            correlation: self.correlation,
        };
        let scenes: Vec<Scene> = (0..self.batch).map(|_| draw.scene(generator)).collect();
        let pictures: Vec<Picture> = scenes
            .iter()
            .map(|scene| attributes::draw(*scene, self.side, generator))
            .collect();
        let pixels = pixels(&pictures, self.side)?;
        Ok((scenes, pixels))
    }
}

impl MiniClip {
    /// Half the sum of both cross-entropies: captions of pictures, pictures of captions.
    fn loss(&self, scenes: &[Scene], pixels: &Tensor, scale: &Var) -> Result<Tensor> {
        let count = scenes.len();
        let input = Input::Pixels(pixels.clone());
        let images = self.image.forward(&input, Pass::default())?;
        let images = unit_rows(images.into_logits()?.value())?;
        let captions: Vec<u32> = scenes.iter().flat_map(Scene::caption).collect();
        let ids = engine(Tensor::from_vec(captions, (count, CAPTION), &Device::Cpu))?;
        let texts = self.text.forward(&Input::tokens(ids), Pass::default())?;
        let texts = unit_rows(texts.into_logits()?.value())?;
        // Above a hundred, as in CLIP, the scale has no say.
        let scale = engine(engine(scale.as_tensor().minimum(100f64.ln()))?.exp())?;
        let products = engine(images.matmul(&engine(engine(texts.t())?.contiguous())?))?;
        let logits = engine(products.broadcast_mul(&scale))?;
        let mut mask = vec![0f32; count * count];
        for (index, entry) in mask.iter_mut().enumerate() {
            let (image, text) = (index / count, index % count);
            if image != text && scenes.get(image) == scenes.get(text) {
                *entry = NO_NEGATIVE;
            }
        }
        let logits =
            engine(logits + engine(Tensor::from_vec(mask, (count, count), &Device::Cpu))?)?;
        let own: Vec<u32> = (0..count as u32).collect();
        let own = engine(Tensor::from_vec(own, count, &Device::Cpu))?;
        let options = CrossEntropyOptions::default();
        let of_images = cross_entropy(&logits, &own, &options)?;
        let turned = engine(engine(logits.t())?.contiguous())?;
        let of_texts = cross_entropy(&turned, &own, &options)?;
        engine(engine(of_images + of_texts)? * 0.5)
    }

    /// The same with parameters that nothing changes any more.
    pub fn frozen(&self) -> Result<Self> {
        let frozen = |model: &Model| -> Result<Model> {
            let mut parameters = BTreeMap::new();
            for (name, variable) in model.variables() {
                parameters.insert(name.clone(), engine(variable.as_tensor().copy())?.detach());
            }
            Ok(Model::new(model.spec().clone(), &mut parameters)?)
        };
        Ok(Self {
            image: frozen(&self.image)?,
            text: frozen(&self.text)?,
        })
    }

    /// One direction for the caption of each scene, `[scenes, features]`.
    pub fn captions(&self, scenes: &[Scene]) -> Result<Tensor> {
        let captions: Vec<Vec<u32>> = scenes.iter().map(Scene::caption).collect();
        Ok(embed_texts(&self.text, &captions)?)
    }
}

/// Pictures as a tensor `[pictures, 3, side, side]`.
pub fn pixels(pictures: &[Picture], side: usize) -> Result<Tensor> {
    let values: Vec<f32> = pictures
        .iter()
        .flat_map(|p| p.pixels.iter().copied())
        .collect();
    engine(Tensor::from_vec(
        values,
        (pictures.len(), 3, side, side),
        &Device::Cpu,
    ))
}

/// `count` different ones of a list.
fn some_of(list: &[usize], count: usize, generator: &mut Generator) -> Vec<usize> {
    let mut left = list.to_vec();
    let mut chosen = Vec::new();
    while chosen.len() < count && !left.is_empty() {
        chosen.push(left.swap_remove(generator.random_range(0..left.len())));
    }
    chosen
}

/// Deviation of the positions at first: beside patches of deviation one, smaller ones are not
/// seen for most of a short training.
const POSITIONS: f64 = 0.5;

/// First values that keep the size of what flows: matrices of deviation `1 / √input`.
struct Start(Initialiser);

impl Start {
    fn new(seed: u64) -> Self {
        Self(Initialiser::new(seed, DType::F32, Device::Cpu))
    }
}

impl ParameterSource for Start {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match (init, shape) {
            (Init::Normal { .. }, _) if name == "embeddings.positions.weight" => Init::Normal {
                deviation: POSITIONS,
            },
            (Init::Normal { .. }, [_, input]) => Init::Normal {
                deviation: 1.0 / (*input as f64).sqrt(),
            },
            (other, _) => other,
        };
        self.0.parameter(name, shape, init)
    }
}
