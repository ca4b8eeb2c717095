//! From logits to the next token, and from tokens to text as it comes.

mod error;
pub mod sampling;
pub mod stream;

pub use error::GenerationError;
pub use sampling::{Sampler, SamplingOptions};
pub use stream::{StopStrings, TextStream};
