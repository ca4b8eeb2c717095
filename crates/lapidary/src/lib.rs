//! Lapidary takes Transformers apart: it explains a prediction by decomposing it, cuts a
//! checkpoint down, builds and trains models from published parts.
//!
//! This is the façade: each room of the system under its own name. The binary of the same name
//! has one verb per job.
//!
//! ```
//! use lapidary::{explain, model};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let package = lapidary::embedded()?;
//! let text = "the farmer near the dogs";
//! let encoding = package.tokenizer()?.encode(text, &Default::default())?;
//! let ids = lapidary::kernels::Tensor::from_slice(&encoding.ids, (1, encoding.ids.len()), &lapidary::kernels::Device::Cpu);
//! let input = model::Input::tokens(ids?);
//! let scores = explain::decompx(
//!     package.single_model()?,
//!     &input,
//!     None,
//!     explain::Target::class(0),
//!     Default::default(),
//! )?;
//! assert_eq!(scores.scores.len(), encoding.ids.len());
//! # Ok(()) }
//! ```

pub use lapidary_compress as compress;
pub use lapidary_explain as explain;
pub use lapidary_kernels as kernels;
pub use lapidary_lab as lab;
pub use lapidary_model as model;
pub use lapidary_parts as parts;
pub use lapidary_signal as signal;
pub use lapidary_train as train;

mod embedded;

pub use embedded::{EMBEDDED_TRAINING, embedded};
