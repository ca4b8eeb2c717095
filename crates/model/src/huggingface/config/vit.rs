//! ViT and DeiT.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, overlay};

/// ViT, or DeiT with its distillation token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum VitKind {
    #[default]
    Vit,
    Deit,
}

/// Height and width in pixels, written as one number where they are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a size or [height, width]")]
pub enum ImageSize {
    /// Height and width.
    Square(usize),
    /// Height, then width.
    Rectangle([usize; 2]),
}

impl ImageSize {
    /// `[height, width]`.
    pub fn sides(self) -> [usize; 2] {
        match self {
            Self::Square(side) => [side, side],
            Self::Rectangle(sides) => sides,
        }
    }
}

/// Rows and columns of patches, once both sizes are checked.
pub(super) fn patch_grid(
    image: ImageSize,
    patch: ImageSize,
    channels: usize,
    check: &Check,
) -> Result<[usize; 2], ConfigError> {
    check.between("num_channels", channels, 1..=1 << 10)?;
    let mut grid = [0; 2];
    for ((rows, image), patch) in grid.iter_mut().zip(image.sides()).zip(patch.sides()) {
        check.between("image_size", image, 1..=1 << 14)?;
        check.between("patch_size", patch, 1..=image)?;
        *rows = image / patch;
    }
    Ok(grid)
}

/// ViT's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VitConfig {
    #[serde(skip)]
    pub kind: VitKind,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    #[serde(with = "check::activation")]
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
    pub image_size: ImageSize,
    pub patch_size: ImageSize,
    pub num_channels: usize,
    pub qkv_bias: bool,
    /// Width of the pooler's output; `hidden_size` when absent.
    pub pooler_output_size: Option<usize>,
    #[serde(with = "check::activation")]
    pub pooler_act: Activation,
}

impl VitConfig {
    fn defaults(kind: VitKind) -> Self {
        Self {
            kind,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            image_size: ImageSize::Square(224),
            patch_size: ImageSize::Square(16),
            num_channels: 3,
            qkv_bias: true,
            pooler_output_size: None,
            pooler_act: Activation::Tanh,
        }
    }

    pub(super) fn new(
        kind: VitKind,
        fields: &Map<String, Value>,
        check: &Check,
    ) -> Result<Self, ConfigError> {
        let mut config = Self {
            kind,
            ..overlay(Self::defaults(kind), &[], fields, check)?
        };
        config.pooler_output_size.get_or_insert(config.hidden_size);
        check.between("hidden_size", config.hidden_size, check::WIDTH)?;
        check.between("num_hidden_layers", config.num_hidden_layers, check::LAYERS)?;
        check.between(
            "num_attention_heads",
            config.num_attention_heads,
            check::HEADS,
        )?;
        check.divides(
            "num_attention_heads",
            config.num_attention_heads,
            "hidden_size",
            config.hidden_size,
        )?;
        check.between(
            "intermediate_size",
            config.intermediate_size,
            check::INNER_WIDTH,
        )?;
        check.between("pooler_output_size", config.pooler_width(), check::WIDTH)?;
        check.epsilon("layer_norm_eps", config.layer_norm_eps)?;
        patch_grid(
            config.image_size,
            config.patch_size,
            config.num_channels,
            check,
        )?;
        Ok(config)
    }

    /// Width of the pooler's output.
    pub fn pooler_width(&self) -> usize {
        self.pooler_output_size.unwrap_or(self.hidden_size)
    }

    /// Rows and columns of patches.
    pub fn patch_grid(&self) -> [usize; 2] {
        let ([height, width], [patch_height, patch_width]) =
            (self.image_size.sides(), self.patch_size.sides());
        [height / patch_height, width / patch_width]
    }

    /// Tokens before the patches: the class token, and DeiT's distillation token.
    pub fn prefix_tokens(&self) -> usize {
        match self.kind {
            VitKind::Vit => 1,
            VitKind::Deit => 2,
        }
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [rows, columns] = self.patch_grid();
        let [patch_height, patch_width] = self.patch_size.sides();
        let [tokens, pixels, width, layers, inner] = [
            rows * columns + self.prefix_tokens(),
            self.num_channels * patch_height * patch_width,
            self.hidden_size,
            self.num_hidden_layers,
            self.intermediate_size,
        ]
        .map(|size| size as u128);
        (tokens + pixels) * width + layers * (4 * width * width + 2 * width * inner)
    }
}
