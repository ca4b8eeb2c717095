//! From files to models: checkpoints, Hugging Face configs, tokenizers and generation.
//!
//! A file from a stranger is hostile until it is proven otherwise. Every reader here checks what
//! a file claims against [`Limits`] before it allocates, and answers with an error of one
//! sentence that names the file, the thing in it, what was found and what would be valid. A
//! writer writes beside its target and renames, so that no reader ever meets half a file.
//!
//! - [`checkpoint`]: safetensors files, sharded or not, memory-mapped; and writing them.
//! - [`huggingface`]: `config.json` of the families that Lapidary loads.
//! - [`tokenizer`]: text to token ids and back.
//! - [`generation`]: from logits to the next token.

pub mod checkpoint;
mod error;
pub mod files;
pub mod generation;
pub mod huggingface;
mod limits;
pub mod tokenizer;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use huggingface::Config;
pub use limits::Limits;
pub use tokenizer::Tokenizer;
