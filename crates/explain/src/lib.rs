//! Decompositions of a prediction.
//!
//! An [`Explainer`] gets a [`Question`] (a model and an input) and [`Target`]s, and gives scores
//! over tokens or parts of the model, together with an account of what it leaves out. All of them
//! go through the lenses and sites of [`lapidary_signal`]; none reaches into a model by another
//! way. To add one, write a file in `explainers/` and its line in `explainer.rs`.
//!
//! [`contextual`] finds the circuits of heads behind a behaviour.
//!
//! What looks at a model as a whole, or at many inputs, is in [`analyses`] and gives a
//! [`report::Report`].

pub mod analyses;
pub mod contextual;
mod error;
mod explainer;
mod explainers;
mod explanation;
pub mod report;
mod target;

pub use error::{Error, Result};
pub use explainer::{Explain, Explainer, Options, Question, explainer, explainers};
pub use explainers::decompx::decompx;
pub use explainers::gradient::{gradient_times_input, integrated_gradients, relevance};
pub use explainers::logit_attribution::direct_logit_attribution;
pub use explanation::{Account, Explanation, Unit};
pub use target::Target;
