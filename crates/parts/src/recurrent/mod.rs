//! Mixers that carry a state from token to token instead of looking back at all of them.

mod mamba;

pub use mamba::{Mamba, MambaSpec};
