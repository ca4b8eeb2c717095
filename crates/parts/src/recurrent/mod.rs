//! Mixers that carry a state from token to token instead of looking back at all of them.

mod mamba;
mod mamba2;
mod short_convolution;

pub use mamba::{Mamba, MambaSpec};
pub use mamba2::{Mamba2, Mamba2Spec};
