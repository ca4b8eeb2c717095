//! Training: data, schedules, gradients, logs and a state that resumes bit for bit.
//!
//! - [`language`]: a small English-like language with known evidence for every prediction.
//!
//! Everything random is drawn from a [`Generator`] that is passed in.

mod error;
pub mod language;
mod random;

pub use error::{Error, Result};
pub use random::{Generator, GeneratorState, generator};
