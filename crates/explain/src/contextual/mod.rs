//! Contextual decomposition and the circuits found by it: Hsu, Zhou, Cherapanamjeri, Huang,
//! Odisho, Carroll, Yu, Efficient Automated Circuit Discovery in Transformers using Contextual
//! Decomposition, 2024, arXiv 2407.00886.
//!
//! One pass under the contextual lens follows many sources at once, each of which is a relevant
//! part of the value: what tokens carry ([`decompose`]), or what heads write ([`Scorer`]). Read
//! at the scores or at other heads, the relevant part is the source's contribution. From the
//! scores backwards, [`discover`] asks which heads stand out, then which heads stand out for
//! those, until nothing new is found. How much of the behaviour the found heads carry is measured
//! by mean ablation ([`Ablation`]), beside random circuits of every size; path patching (Wang,
//! Variengien, Conmy, Shlegeris, Steinhardt, Interpretability in the Wild, 2022, arXiv
//! 2211.00593) is the baseline, on the same sites and with the same means.

mod ablation;
mod batch;
mod discovery;
mod follow;
mod means;
mod node;
mod patching;
mod phrases;
mod scorer;

pub use ablation::{Ablation, Control, Metric};
pub use batch::{Case, Contrast, against_closest};
pub use discovery::{Circuit, Edge, Outliers, Round, Search, discover};
pub use means::Means;
pub use node::{Node, Place, heads, heads_by_position};
pub use phrases::{Phrase, decompose, phrases};
pub use scorer::{Endpoint, Method, NodeScore, Scorer, normalise_by_layer};

/// Sequences that run at one time.
const AT_ONCE: usize = 64;
