//! CLIP: a text tower and an image tower that meet in one space.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::vit::{ImageSize, patch_grid};
use super::{ConfigError, overlay};

/// CLIP's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// The text tower.
    pub text_config: ClipTextConfig,
    /// The image tower.
    pub vision_config: ClipVisionConfig,
    /// Width of the common space.
    pub projection_dim: usize,
}

/// The text tower's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ClipTextConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    #[serde(with = "check::activation")]
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
    /// The text is pooled at the first token with this id. Where it is 2, as in the first
    /// published configs, it is pooled at the token with the largest id instead.
    pub eos_token_id: u32,
}

/// The image tower's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ClipVisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    pub image_size: ImageSize,
    pub patch_size: ImageSize,
    #[serde(with = "check::activation")]
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
}

impl ClipTextConfig {
    fn defaults() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl ClipVisionConfig {
    fn defaults() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: ImageSize::Square(224),
            patch_size: ImageSize::Square(32),
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    /// Rows and columns of patches.
    pub fn patch_grid(&self) -> [usize; 2] {
        let ([height, width], [patch_height, patch_width]) =
            (self.image_size.sides(), self.patch_size.sides());
        [height / patch_height, width / patch_width]
    }
}

impl ClipConfig {
    pub(super) fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let text_fields = check.read(fields, "text_config")?.unwrap_or_default();
        let vision_fields = check.read(fields, "vision_config")?.unwrap_or_default();
        let in_text = check.inside("text_config.");
        let in_vision = check.inside("vision_config.");
        let text = overlay(ClipTextConfig::defaults(), &[], &text_fields, &in_text)?;
        let vision = overlay(
            ClipVisionConfig::defaults(),
            &[],
            &vision_fields,
            &in_vision,
        )?;
        let projection_dim = check.read(fields, "projection_dim")?.unwrap_or(512);

        in_text.between("vocab_size", text.vocab_size, check::VOCABULARY)?;
        in_text.between(
            "max_position_embeddings",
            text.max_position_embeddings,
            check::LENGTH,
        )?;
        check_tower(&in_text, Tower::of_text(&text))?;
        check_tower(&in_vision, Tower::of_vision(&vision))?;
        patch_grid(
            vision.image_size,
            vision.patch_size,
            vision.num_channels,
            &in_vision,
        )?;
        check.between("projection_dim", projection_dim, check::WIDTH)?;
        Ok(Self {
            text_config: text,
            vision_config: vision,
            projection_dim,
        })
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let (text, vision) = (&self.text_config, &self.vision_config);
        let [rows, columns] = vision.patch_grid();
        let [patch_height, patch_width] = vision.patch_size.sides();
        let vision_inputs = rows * columns + 1 + vision.num_channels * patch_height * patch_width;
        let text_inputs = text.vocab_size + text.max_position_embeddings;
        Tower::of_text(text).matrix_parameters(text_inputs, self.projection_dim)
            + Tower::of_vision(vision).matrix_parameters(vision_inputs, self.projection_dim)
    }
}

/// What both towers have.
struct Tower {
    width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    epsilon: f64,
}

impl Tower {
    fn of_text(config: &ClipTextConfig) -> Self {
        Self {
            width: config.hidden_size,
            inner: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            epsilon: config.layer_norm_eps,
        }
    }

    fn of_vision(config: &ClipVisionConfig) -> Self {
        Self {
            width: config.hidden_size,
            inner: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            epsilon: config.layer_norm_eps,
        }
    }

    fn matrix_parameters(&self, inputs: usize, outputs: usize) -> u128 {
        let [inputs, outputs, width, layers, inner] =
            [inputs, outputs, self.width, self.layers, self.inner].map(|size| size as u128);
        (inputs + outputs) * width + layers * (4 * width * width + 2 * width * inner)
    }
}

fn check_tower(check: &Check, tower: Tower) -> Result<(), ConfigError> {
    check.between("hidden_size", tower.width, check::WIDTH)?;
    check.between("intermediate_size", tower.inner, check::INNER_WIDTH)?;
    check.between("num_hidden_layers", tower.layers, check::LAYERS)?;
    check.between("num_attention_heads", tower.heads, check::HEADS)?;
    check.divides(
        "num_attention_heads",
        tower.heads,
        "hidden_size",
        tower.width,
    )?;
    check.epsilon("layer_norm_eps", tower.epsilon)
}
