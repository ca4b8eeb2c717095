//! Training: data, schedules, gradients, logs and a state that resumes bit for bit.
//!
//! - [`language`]: a small English-like language with known evidence for every prediction.
//! - [`data`]: text and token files, windows over them, and generated [`data::Task`]s.
//! - [`Schedule`], [`Gradients`], [`MovingAverage`]: what surrounds an optimiser step.
//! - [`log`]: JSON lines, TensorBoard event files, and a progress line on a terminal.
//! - [`state`]: the training state on disk.
//!
//! Everything random is drawn from a [`Generator`] that is passed in.

pub mod data;
mod ema;
mod error;
mod files;
mod gradients;
pub mod language;
pub mod log;
mod random;
mod schedule;
pub mod state;

pub use ema::MovingAverage;
pub use error::{Error, Result};
pub use gradients::Gradients;
pub use random::{Generator, GeneratorState, generator};
pub use schedule::{Decay, Schedule};
