//! Images as patches.

use super::{bounded, validate_norm};
use crate::input::engine;
use lapidary_kernels::Tensor;
use lapidary_parts::norm::NormSpec;
use lapidary_parts::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Embedding of image patches by one linear map of each patch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchInput {
    /// Height and width of the image, in pixels.
    pub image: [usize; 2],
    /// Height and width of a patch.
    pub patch: usize,
    /// Colour channels.
    #[serde(default = "three")]
    pub channels: usize,
    /// Learned tokens before the patches: a class token, and in DeiT a distillation token.
    #[serde(default = "super::one")]
    pub class_tokens: usize,
    /// Whether the patch map has a bias.
    #[serde(default = "super::yes")]
    pub bias: bool,
    /// Norms before and behind the patch map, `N₂(W N₁(p) + b)` of a patch `p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub around: Option<PatchNorms>,
    /// Norm of the embeddings, positions added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<NormSpec>,
    /// Standard deviation with which class tokens and learned positions begin.
    #[serde(default = "small", skip_serializing_if = "is_small")]
    pub deviation: f64,
    /// Positions added to the patches.
    #[serde(default, skip_serializing_if = "PatchPosition::is_default")]
    pub position: PatchPosition,
    /// Whether there is a learned token that stands for patches which a pass hides.
    #[serde(default, skip_serializing_if = "super::is_not")]
    pub mask_token: bool,
    /// Whether images of other sizes are read too, of any number of whole patches: their positions lie between those of
    /// `image` (Caron et al., DINO, arXiv 2104.14294).
    #[serde(default, skip_serializing_if = "super::is_not")]
    pub resized: bool,
}

/// Norms around the map of patches (Yu et al., CRATE, arXiv 2306.01129, whose class token and positions begin with
/// deviation 1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PatchNorms {
    /// Of a patch's pixels.
    pub pixels: NormSpec,
    /// Of what the map gives for a patch.
    pub patches: NormSpec,
}

/// Positions added to patches and the tokens before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PatchPosition {
    /// A table with a row for each.
    #[default]
    Learned,
    /// `sin(c θ_i), cos(c θ_i)` of the column `c` in the first half of the features and of the row in
    /// the second, `θ_i = 10000^{−4i/width}`; nothing for the tokens before the patches (He et al.,
    /// Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377).
    SineCosine,
}

impl PatchPosition {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn three() -> usize {
    3
}

fn small() -> f64 {
    PatchInput::DEVIATION
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_small(deviation: &f64) -> bool {
    *deviation == small()
}

impl PatchInput {
    /// Standard deviation that class tokens and learned positions begin with unless told otherwise.
    pub const DEVIATION: f64 = 0.02;

    /// Number of patches.
    pub fn patches(&self) -> usize {
        let side = |pixels: usize| pixels / self.patch.max(1);
        side(self.image[0]).saturating_mul(side(self.image[1]))
    }

    /// Numbers of a patch, `channels · patch²`.
    pub fn pixels(&self) -> usize {
        self.patch
            .saturating_mul(self.patch)
            .saturating_mul(self.channels)
    }

    /// Rows and columns of patches of images `[batch, channels, height, width]`.
    ///
    /// # Errors
    /// For images of another size, unless they may be [`resized`](Self::resized); for other channels, and parts of
    /// patches.
    pub fn grid(&self, images: &Tensor) -> Result<[usize; 2]> {
        let [height, width] = self.image;
        let (channels, patch) = (self.channels, self.patch.max(1));
        let whole = |side: usize| side > 0 && side.is_multiple_of(patch);
        match *images.dims() {
            [_, c, h, w]
                if c == channels
                    && ([h, w] == self.image || (self.resized && whole(h) && whole(w))) =>
            {
                Ok([h / patch, w / patch])
            }
            ref found => {
                let expected = match self.resized {
                    false => format!("[batch, {channels}, {height}, {width}]"),
                    true => format!(
                        "[batch, {channels}, height, width], of whole patches of {patch} by {patch}"
                    ),
                };
                Err(Error::spec("pixel_values shape", found, expected))
            }
        }
    }

    /// Images `[batch, channels, height, width]` as patches `[batch, patches, pixels]`, row by row, the
    /// numbers of each in the order of a convolution: channels, rows, columns.
    ///
    /// # Errors
    /// As [`PatchInput::grid`].
    pub fn cut(&self, images: &Tensor) -> Result<Tensor> {
        let [rows, columns] = self.grid(images)?;
        let (channels, patch) = (self.channels, self.patch);
        let batch = images.dims().first().copied().unwrap_or(0);
        // [batch, channels, rows, patch, columns, patch] -> [batch, rows, columns, channels, patch, patch]
        let cut = engine(images.reshape(vec![batch, channels, rows, patch, columns, patch]))?;
        let cut = engine(cut.permute(vec![0, 2, 4, 1, 3, 5]))?;
        engine(cut.reshape((batch, rows * columns, self.pixels())))
    }

    /// Checks its fields for a stream of `width`.
    pub(super) fn validate(&self, width: usize) -> Result<()> {
        if self.position == PatchPosition::SineCosine && !width.is_multiple_of(4) {
            let expected = "a multiple of 4 for sines and cosines of rows and columns";
            return Err(Error::spec("width", width, expected));
        }
        bounded("input.patch", self.patch, 4096)?;
        bounded("input.channels", self.channels, 4096)?;
        for side in self.image {
            bounded("input.image", side, 1 << 16)?;
            if !side.is_multiple_of(self.patch) {
                return Err(Error::spec(
                    "input.image",
                    self.image,
                    format!("multiples of the patch size {}", self.patch),
                ));
            }
        }
        if self.class_tokens > 1024 {
            return Err(Error::spec(
                "input.class_tokens",
                self.class_tokens,
                "at most 1024",
            ));
        }
        if let Some(around) = &self.around {
            around.pixels.validate("input.around.pixels")?;
            around.patches.validate("input.around.patches")?;
        }
        if !(self.deviation.is_finite() && self.deviation >= 0.0) {
            let expected = "a number of at least 0";
            return Err(Error::spec("input.deviation", self.deviation, expected));
        }
        let learned = self.class_tokens > 0 || self.position == PatchPosition::Learned;
        if !learned && self.deviation != Self::DEVIATION {
            let expected = "absent without class tokens and learned positions, which begin with it";
            return Err(Error::spec("input.deviation", self.deviation, expected));
        }
        validate_norm(&self.norm, "input.norm")
    }
}
