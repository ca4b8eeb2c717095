//! A spec becomes a model, a directory becomes a model, and back.
//!
//! A file from a stranger is hostile until it is proven otherwise. Every reader here checks what
//! a file claims against [`Limits`] before it allocates, and answers with an error of one
//! sentence that names the file, the thing in it, what was found and what would be valid. A
//! writer writes beside its target and renames, so that no reader ever meets half a file.
//!
//! - [`ModelSpec`] and [`Model`]: a model as data, and the modules built from it.
//! - [`Package`]: a directory with a model and its tokenizer.
//! - [`checkpoint`]: safetensors files, sharded or not, memory-mapped; and writing them.
//! - [`huggingface`]: `config.json` and tensor names of the families that load as they are.
//! - [`tokenizer`]: text to token ids and back.
//! - [`generation`]: from a model to text.

pub mod checkpoint;
mod ensemble;
mod error;
pub mod files;
pub mod generation;
pub mod gguf;
mod grids;
mod head;
pub mod huggingface;
mod initial;
mod input;
mod limits;
mod model;
mod package;
mod position;
mod replace;
mod resized;
mod shared;
mod size;
mod source;
mod spec;
pub mod tokenizer;
mod vips;

pub use checkpoint::Checkpoint;
pub use ensemble::{Averaged, Ensemble, self_ensemble};
pub use error::{Error, Result};
pub use head::Scorer;
pub use huggingface::Config;
pub use initial::InitialValues;
pub use input::Input;
pub use limits::Limits;
pub use model::{Model, Output, Pass};
pub use package::{OpenOptions, Origin, Package, SPEC_FILE, SavedAs, TowerModel};
pub use source::Initialiser;
pub use spec::{
    AbsolutePosition, HeadSpec, HeadTransform, InputSpec, ModelSpec, PatchInput, PatchNorms,
    PatchPosition, Pool, Projected, TokenInput,
};
pub use tokenizer::Tokenizer;
