//! The value that flows through a model, and the lenses it can be looked at through.
//!
//! Every part of a model is written once, against the operations of [`Signal`]. A plain signal
//! is a tensor and goes straight to the fused kernels. With a lens on, the same operations do
//! more:
//!
//! * [`streams`]: the value is carried as a sum of contributions, each pushed unmixed through
//!   every operation by a chosen rule;
//! * [`contextual`]: the value is carried as a relevant part and the rest, for several sources
//!   at once;
//! * [`relevance`]: the backward pass follows propagation rules instead of the derivative;
//! * [`meter`]: operations, bytes and live memory are counted;
//! * [`rounding`]: every result is rounded to a narrower format;
//! * [`integers`]: softmax, GELU and norms are computed by integers.
//!
//! A lens is put on at a named *site* of the model by a [`Trace`], which also captures,
//! replaces and taps sites. There is no other hook mechanism.
//!
//! ```
//! use lapidary_kernels::{Device, Tensor};
//! use lapidary_signal::{Linear, Signal, streams::{Partition, StreamRules}};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let x = Tensor::new(&[[[1f32, 2.0], [3.0, 5.0]]], &Device::Cpu)?; // [batch, token, width]
//! let layer = Linear::new(Tensor::new(&[[1f32, 1.0]], &Device::Cpu)?, None)?;
//! // Token 0 and token 1 become two streams that travel side by side.
//! let x = Signal::from(x).into_streams(Partition::positions(2), StreamRules::default())?;
//! let y = x.linear(&layer)?.mean(1)?;
//! assert_eq!(y.value().to_vec2::<f32>()?, [[5.5]]);
//! assert_eq!(y.contributions()?.flatten_all()?.to_vec1::<f32>()?, [1.5, 4.0]);
//! # Ok(()) }
//! ```

pub mod contextual;
mod counted_attention;
mod error;
mod head_recurrence;
pub mod integers;
mod linear;
pub mod meter;
mod mixing;
mod operations;
mod recurrence;
pub mod relevance;
pub mod rounding;
mod rows;
mod shape;
mod signal;
pub mod streams;
#[cfg(test)]
mod tests;
mod trace;
mod wavelet;

pub use error::{Error, Result};
pub use head_recurrence::HeadScan;
pub use linear::{DroppedPart, KeptColumns, Linear, Matrix, Weight};
pub use mixing::Mixing;
pub use recurrence::SelectiveScan;
pub use signal::{Lens, Signal};
pub use trace::{SiteRecord, Trace};
