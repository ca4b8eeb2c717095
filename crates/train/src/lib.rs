//! Training: data, schedules, gradients, logs and a state that resumes bit for bit.
//!
//! - [`language`]: a small English-like language with known evidence for every prediction.
//! - [`data`]: text and token files, windows over them, and generated [`data::Task`]s.
//!
//! Everything random is drawn from a [`Generator`] that is passed in.

pub mod data;
mod error;
mod files;
pub mod language;
mod random;

pub use error::{Error, Result};
pub use random::{Generator, GeneratorState, generator};
