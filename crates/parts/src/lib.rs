//! The published parts of a Transformer, each written once against
//! [`Signal`](lapidary_signal::Signal).
//!
//! A part has a *spec* (plain data that serialises) and a module built from the spec and a
//! source of parameters. Kinds of one family are the variants of one enum, so that the compiler
//! lists what a new part must provide: [`attention::MixerSpec`], [`feedforward::FeedforwardSpec`],
//! [`norm::NormSpec`], [`position::PositionSpec`] and [`block::Wiring`].
//!
//! Modules hold no files, devices or global state; every module writes what it computes to
//! named sites of the [`Trace`](lapidary_signal::Trace) in its [`Context`].

pub mod activation;
pub mod attention;
pub mod block;
mod context;
mod dropout;
mod error;
pub mod feedforward;
pub mod norm;
pub mod parameters;
pub mod position;
pub mod recurrent;
pub mod state;

pub use context::Context;
pub use error::{Error, Result};
