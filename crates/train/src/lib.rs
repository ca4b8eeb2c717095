//! Training: data, schedules, gradients, logs and a state that resumes bit for bit.
//!
//! - [`language`]: a small English-like language with known evidence for every prediction.
//! - [`data`]: text and token files, windows over them, and generated [`data::Task`]s.
//! - [`Schedule`], [`Gradients`], [`MovingAverage`], [`Masks`]: what surrounds an optimiser step;
//!   [`Updates`]: the step itself, whatever the loss.
//! - [`self_distillation`]: a student of images and its teacher, without labels.
//! - [`masked_patches`]: images with most patches hidden, and the loss of drawing them again.
//! - [`log`]: JSON lines, TensorBoard event files, and a progress line on a terminal.
//! - [`TrainSpec`], [`Trainer`], [`run`]: a run as data, a step at a time, and in a directory.
//! - [`state`]: the training state on disk.
//!
//! Everything random is drawn from a [`Generator`] that is passed in.

mod alignment;
mod best;
mod claim;
pub mod data;
mod ema;
mod error;
mod fit;
mod gradients;
pub mod language;
pub mod log;
mod loss;
pub mod masked_patches;
mod masks;
mod random;
mod run;
mod schedule;
pub mod self_distillation;
mod settings;
pub mod spec;
pub mod state;
mod trainer;
mod updates;

pub use alignment::{AlignmentKind, AlignmentSpec};
pub use claim::check_directory;
pub use ema::MovingAverage;
pub use error::{Error, Result};
pub use gradients::Gradients;
pub use loss::{batch_loss, batch_loss_in_chunks};
pub use masks::Masks;
pub use random::{Generator, GeneratorState, generator};
pub use run::{Finished, run, run_on_images};
pub use schedule::{Decay, Schedule};
pub use spec::TrainSpec;
pub use trainer::{Step, Trainer};
pub use updates::{UpdateOptions, Updates};
