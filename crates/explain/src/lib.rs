//! Decompositions of a prediction.
//!
//! An [`Explainer`] gets a [`Question`] (a model and an input) and [`Target`]s, and gives scores
//! over tokens or parts of the model, together with an account of what it leaves out. All of them
//! go through the lenses and sites of [`lapidary_signal`]; none reaches into a model by another
//! way. To add one, write a file in `explainers/` and its line in `explainer.rs`.
//!
//! [`faithfulness`] measures scores against the model or a known truth.
//! [`contextual`] finds the circuits of heads behind a behaviour.
//!
//! What looks at a model as a whole, or at many inputs, is in [`analyses`] and gives a
//! [`report::Report`]. Units that no part of a model is, the features of a site, are learned by
//! an [`autoencoder`].

pub mod analyses;
pub mod autoencoder;
pub mod clip;
pub mod contextual;
mod difference;
mod error;
pub mod evaluation;
mod explainer;
mod explainers;
mod explanation;
pub mod faithfulness;
mod latent;
mod leaks;
pub mod mixing;
pub mod report;
mod target;
pub mod tasks;

pub use difference::{Difference, Moved, OutputDifference, SiteDifference, difference};
pub use error::{Error, Result};
pub use explainer::{Explain, Explainer, Options, Question, explainer, explainers};
pub use explainers::alti::mixings;
pub use explainers::alti_logit::{BlockUpdates, LogitUpdates, logit_updates};
pub use explainers::attention_gradcam::attention_gradcam;
pub use explainers::attention_rollout::attention_rollout;
pub use explainers::chefer::{Evidence, Relevancy, chefer, patch_heat, relevancy_of_batch};
pub use explainers::decompx::decompx;
pub use explainers::full_lrp::{full_lrp, full_lrp_pixels};
pub use explainers::gradient::{gradient_times_input, integrated_gradients, relevance};
pub use explainers::logit_attribution::direct_logit_attribution;
pub use explainers::partial_lrp::partial_lrp;
pub use explainers::raw_attention::raw_attention;
pub use explanation::{Account, Explanation, Unit, over_words};
pub use latent::{LatentRelevance, latent_relevance};
pub use leaks::Leak;
pub use target::Target;
