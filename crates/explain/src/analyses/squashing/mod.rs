//! Over-squashing: what the last token's vector can still tell of a sequence (Barbero et al.,
//! Transformers need glasses! Information over-squashing in language tasks, 2024,
//! arXiv 2406.04267).
//!
//! * [`Emulated`] runs a model as it computes in a format; [`Emulated::distances`] follows a
//!   [`Family`] of growing sequences, [`collapse_length`] says from where neighbours look alike,
//!   and [`Emulated::row_spread`] whether rows of equal tokens are equal.
//! * [`paths`] has the sums over paths and the dilution of attention as formulas, [`path_bound`]
//!   the bound for a real model, [`jacobian_norms`] what it bounds.
//! * Remedies: separators ([`Alphabet::separator`]), sharper attention ([`Emulated::sharpened`]),
//!   a wider format.
//!
//! ```
//! use lapidary_explain::analyses::squashing::{Alphabet, Emulated, Family, decline};
//! use lapidary_kernels::{DType, Device};
//! use lapidary_model::{Model, ModelSpec};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let spec: ModelSpec = toml::from_str(r#"
//! width = 8
//! [input]
//! kind = "tokens"
//! vocabulary = 2
//! length = 65
//! [[blocks]]
//! attention = { kind = "multi-head", heads = 2, causal = true }
//! [head]
//! kind = "language-model"
//! "#)?;
//! let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
//! let exact = Emulated::new(&model, None)?;
//! let alphabet = Alphabet { one: 1, zero: 0, ..Alphabet::default() };
//! let found = exact.distances(Family::OnesThenZero, &alphabet, &[16, 24, 32, 48, 64])?;
//! // Without positions, what one more repetition changes falls as 1/n − 1/(n + 1).
//! let law = decline(&found).ok_or("no two lengths")?;
//! assert!((law.exponent + 2.0).abs() < 0.1);
//! # Ok(()) }
//! ```

mod collapse;
mod families;
pub mod paths;
mod report;
mod sensitivity;

pub use collapse::{Distance, Emulated, check_fits, collapse_length, decline};
pub use families::{Alphabet, Family, Probe, Prompt, Separator, lengths};
pub use report::{Inquiry, report};
pub use sensitivity::{Directions, Flow, JacobianNorms, jacobian_norms, path_bound};
