//! Hidden geometry: hidden states as mean, position, context and residual (Song & Zhong,
//! Uncovering hidden geometry in Transformers via disentangling position and context, 2023,
//! arXiv 2310.04861).
//!
//! ```
//! use lapidary_explain::analyses::geometry::{Bounds, Reading, layers};
//! use lapidary_kernels::{DType, Device};
//! use lapidary_model::{Model, ModelSpec};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let spec: ModelSpec = toml::from_str(r#"
//! width = 8
//! [input]
//! kind = "tokens"
//! vocabulary = 10
//! length = 6
//! position = { kind = "learned" }
//! [[blocks]]
//! attention = { kind = "multi-head", heads = 2, causal = true }
//! [head]
//! kind = "language-model"
//! "#)?;
//! let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
//! let windows: Vec<Vec<u32>> = (0..5).map(|c| (0..6).map(|t| (c * 3 + t * t) % 10).collect()).collect();
//! let found = layers(&model, &windows, Reading::default(), Bounds::default())?;
//! assert_eq!(found[0].site, "embeddings");
//! let energy = found[1].diagnostics.energy;
//! assert!(energy.positions <= energy.total);
//! # Ok(()) }
//! ```

mod decomposition;
mod diagnostics;
mod report;
mod scores;
pub mod smoothness;
pub mod spectrum;
mod survey;

pub use decomposition::{Decomposition, Energy, Sums};
pub use diagnostics::{Bounds, Diagnostics, Topics, topics};
pub use report::{Subject, layer_plots, report, spiral_plot};
pub use scores::{PARTS, ScoreBlocks, score_blocks};
pub use survey::{Control, Reading, Sites, Survey, randomised};

use crate::Result;
use lapidary_model::Model;

/// One site of a model.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its name.
    pub site: String,
    /// The vectors.
    pub decomposition: Decomposition,
    /// What they look like.
    pub diagnostics: Diagnostics,
}

/// Every layer of `model` on windows of the same length, in one pass over them.
///
/// # Errors
/// When windows differ in length, the model fails, or a factorisation does not converge.
pub fn layers(
    model: &Model,
    windows: &[Vec<u32>],
    reading: Reading,
    bounds: Bounds,
) -> Result<Vec<Layer>> {
    let mut survey = Survey::new(model, reading);
    survey.read(model, windows)?;
    let each = survey.finish()?.into_iter();
    each.map(|(site, decomposition)| {
        Ok(Layer {
            site,
            diagnostics: Diagnostics::of(&decomposition, bounds)?,
            decomposition,
        })
    })
    .collect()
}
