//! A spec becomes a model, a directory becomes a model, and back.
//!
//! * [`ModelSpec`] and [`Model`]: a model as data, and the modules built from it;
//! * [`checkpoint`]: named tensors in safetensors files, which may lie;
//! * [`huggingface`]: `config.json` and the names of the families that load as they are.

pub mod checkpoint;
mod error;
pub mod files;
mod head;
pub mod huggingface;
mod input;
mod limits;
mod model;
mod source;
mod spec;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use input::Input;
pub use limits::Limits;
pub use model::{Model, Output, Pass};
pub use source::Initialiser;
pub use spec::{
    AbsolutePosition, HeadSpec, HeadTransform, InputSpec, ModelSpec, PatchInput, Pool, TokenInput,
};
