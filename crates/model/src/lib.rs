//! x
pub mod checkpoint;
pub mod files;
pub mod huggingface;
mod limits;
pub use checkpoint::Checkpoint;
pub use limits::Limits;
mod error;
pub use error::{Error, Result};
