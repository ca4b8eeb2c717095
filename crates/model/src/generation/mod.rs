//! From logits to the next token, and from tokens to text as it comes.

mod decode;
mod error;
pub mod sampling;
pub mod stream;

pub use decode::{GenerationOptions, generate};
pub use error::GenerationError;
pub use sampling::{Sampler, SamplingOptions};
pub use stream::{StopStrings, TextStream};
