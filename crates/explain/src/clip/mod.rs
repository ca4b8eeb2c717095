//! What the image embedding of a CLIP model is made of, in words (Gandelsman et al.,
//! Interpreting CLIP's Image Representation via Text-Based Decomposition, 2023, arXiv
//! 2310.05916).
//!
//! The class token of a pre-norm vision tower is a sum of what was written to it, so the
//! normalised embedding is one too: of the token's start, the feed-forward parts, and every head
//! of every layer at every token ([`ImageTower::decompose`]). With the sum in hand
//!
//! - [`text_span`] names a head by the few texts that span its outputs,
//! - [`mean_ablated`] replaces entries by their mean over a data set, and [`EditedClassifier`]
//!   classifies without heads that carry what it shouldn't look at,
//! - [`heat_maps`] segment images for a text,
//! - [`nearest`] ranks images or texts by what one head says.
//!
//! ```
//! use lapidary_explain::clip::ImageTower;
//! use lapidary_kernels::{DType, Device, Tensor};
//! use lapidary_model::{Model, ModelSpec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let spec: ModelSpec = toml::from_str(r#"
//!     width = 16
//!     [input]
//!     kind = "patches"
//!     image = [8, 8]
//!     patch = 4
//!     [[blocks]]
//!     repeat = 2
//!     attention = { kind = "multi-head", heads = 4 }
//!     feedforward = { kind = "dense", hidden = 32 }
//!     [head]
//!     kind = "pooled"
//!     norm = { kind = "layer" }
//!     labels = 6
//!     bias = false
//! "#)?;
//! let model = Model::initialised(spec, 1, DType::F64, &Device::Cpu)?;
//! let tower = ImageTower::new(&model)?;
//! let pixels = Tensor::randn(0.0, 1.0, (2, 3, 8, 8), &Device::Cpu)?;
//! let decomposition = tower.decompose(&pixels)?;
//! // One start, two feed-forward parts, and eight heads: they sum to the embedding.
//! let components = decomposition.components()?;
//! assert_eq!(components.dims(), [2, 11, 6]);
//! let difference = (components.sum(1)? - decomposition.embeddings())?.abs()?.max_all()?;
//! assert!(difference.to_scalar::<f64>()? < 1e-12);
//! # Ok(()) }
//! ```

mod ablation;
mod decomposition;
mod image_tower;
mod nearest;
mod outputs;
mod segmentation;
mod survey;
mod text_span;
mod zero_shot;

pub use ablation::{EditedClassifier, StreamingMean, mean_ablated, spurious_edit};
pub use decomposition::Decomposition;
pub use image_tower::{Component, ImageTower};
pub use nearest::{most_similar, nearest};
pub use outputs::HeadOutputs;
pub use segmentation::{HeatMap, heat_maps};
pub use survey::{HeadName, LayerEffect, Survey};
pub use text_span::{TextSpan, text_span};
pub use zero_shot::{ZeroShot, embed_texts, unit_rows};
