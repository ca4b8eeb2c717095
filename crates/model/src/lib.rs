//! A spec becomes a model.

mod head;
mod input;
mod model;
mod source;
mod spec;

pub use input::Input;
pub use model::{Model, Output, Pass};
pub use source::Initialiser;
pub use spec::{
    AbsolutePosition, HeadSpec, HeadTransform, InputSpec, ModelSpec, PatchInput, Pool, TokenInput,
};
