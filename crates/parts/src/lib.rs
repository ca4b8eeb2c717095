//! The published parts of a Transformer, each written once against
//! [`Signal`](lapidary_signal::Signal).
//!
//! A part has a *spec* (plain data that serialises) and a module built from the spec and a
//! source of parameters. Kinds of one family are the variants of one enum, so that the compiler
//! lists what a new part must provide: [`attention::MixerSpec`], [`feedforward::FeedforwardSpec`],
//! [`norm::NormSpec`], [`position::PositionSpec`], [`block::Wiring`] and
//! [`organisation::OrganisationSpec`].
//!
//! ```
//! use std::collections::BTreeMap;
//! use lapidary_kernels::{Device, Tensor};
//! use lapidary_parts::feedforward::{Feedforward, FeedforwardSpec};
//! use lapidary_parts::{Context, parameters::Parameters};
//! use lapidary_signal::{Signal, Trace};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let spec: FeedforwardSpec =
//!     toml::from_str("kind = 'dense'\nhidden = 3\nactivation = 'relu'\nbias = false")?;
//! spec.validate("feedforward")?;
//! let mut weights = BTreeMap::from([
//!     ("mlp.up.weight".to_owned(), Tensor::new(&[[1f32, 0.], [0., 1.], [1., 1.]], &Device::Cpu)?),
//!     ("mlp.down.weight".to_owned(), Tensor::new(&[[1f32, 1., 1.], [0., 0., 1.]], &Device::Cpu)?),
//! ]);
//! let (low_ranks, mut linears) = (BTreeMap::new(), Vec::new());
//! let mut parameters = Parameters::new(&mut weights, &low_ranks, &mut linears);
//! let part = Feedforward::new(&spec, 2, parameters.at("mlp"))?;
//!
//! let trace = Trace::new().capture("mlp.hidden")?;
//! let x = Signal::from(Tensor::new(&[[[2f32, -3.]]], &Device::Cpu)?); // [batch, length, width]
//! let y = part.forward(&x, &Context::new(&trace))?;
//! assert_eq!(y.value().to_vec3::<f32>()?, [[[2., 0.]]]);
//! assert_eq!(trace.signal("mlp.hidden")?.value().to_vec3::<f32>()?, [[[2., 0., 0.]]]);
//! # Ok(()) }
//! ```
//!
//! Modules hold no files, devices or global state; every module writes what it computes to
//! named sites of the [`Trace`](lapidary_signal::Trace) in its [`Context`].

pub mod activation;
pub mod attention;
pub mod block;
pub mod coding_step;
mod context;
pub mod decisions;
mod draws;
pub mod dropout;
mod error;
pub mod feedforward;
pub mod fields;
pub mod norm;
pub mod organisation;
pub mod parameters;
pub mod position;
pub mod recomputed;
pub mod recurrent;
pub mod state;

pub use context::Context;
pub use draws::Draws;
pub use error::{Error, Result};
