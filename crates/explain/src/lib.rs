//! Decompositions of a prediction.
//!
//! An [`Explainer`](explainer::explain) gets a model, an input and a [`Target`], and gives
//! scores over tokens or components together with an account of what it leaves out. All of them
//! go through the lenses and sites of [`lapidary_signal`]; none reaches into a model by another
//! way.

mod decompx;
mod error;
mod explanation;
mod gradient;
mod logit_attribution;
mod target;

pub use decompx::decompx;
pub use error::{Error, Result};
pub use explanation::{Account, Explanation, Unit};
pub use gradient::{gradient_times_input, integrated_gradients, relevance};
pub use logit_attribution::direct_logit_attribution;
pub use target::Target;
