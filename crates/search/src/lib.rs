//! Search for a low value of an expensive function of many variables, with no model in it.
//!
//! Paper: *Are Random Decompositions all we need in High Dimensional Bayesian Optimisation?*
//! (RDUCB), Juliusz Ziomek, Haitham Bou-Ammar, 2023, arXiv 2301.12844.
//!
//! A function on a grid ([`Domain`]) is taken for a sum of functions of one or two variables each
//! ([`AdditiveProcess`]). Which variables go together is not learned: each step draws a new
//! [`Forest`], so that no wrong decomposition, learned where the search happened to be, can hold
//! it there. On a forest the lower confidence bound has an exact minimum, found by passing messages
//! ([`minimise`]).
//!
//! - [`Rducb`]: the search, as a stepper whose state is plain data.
//! - [`Ensemble`]: the random forest in another search, by several acquisitions.
//! - [`RandomSearch`], [`LearnedTree`], [`GlobalProcess`], [`Rembo`]: what it is compared with.
//! - [`TestFunction`]: functions with known minima; [`Lasso`]: the penalties of a regression.
//! - [`AdditiveProcess::information_gain`], [`AdditiveProcess::expected_errors`]: what a decomposition
//!   lets observations say, and what it costs where another one is true.
//!
//! ```
//! use lapidary_search::{Domain, Optimiser, Rducb, RducbSettings};
//!
//! # fn main() -> Result<(), lapidary_search::Error> {
//! let domain = Domain::uniform(6, -1.0, 1.0, 21)?;
//! let mut search = Rducb::new(domain.clone(), RducbSettings::default(), 7)?;
//! for _ in 0..40 {
//!     let point = search.suggest()?;
//!     let value = domain.values(&point)?.iter().map(|x| (x - 0.5) * (x - 0.5)).sum();
//!     search.observe(point, value)?;
//! }
//! let (_, least) = search.history().best().unwrap_or_default();
//! assert!(least < 0.5);
//! # Ok(()) }
//! ```

mod acquisition;
mod baselines;
mod cholesky;
mod domain;
mod ensemble;
mod error;
mod fit;
mod forest;
mod functions;
mod gaussian;
mod history;
mod information;
mod kernel;
mod lasso;
mod messages;
mod process;
mod rducb;
mod stepper;
mod warp;
mod zoom;

pub use acquisition::lower_confidence_bound;
pub use baselines::global::{GlobalProcess, GlobalSettings};
pub use baselines::random::RandomSearch;
pub use baselines::rembo::Rembo;
pub use baselines::tree::{LearnedTree, TreeSettings};
pub use domain::{Domain, Point};
pub use ensemble::{Decomposition, Ensemble, EnsembleSettings};
pub use error::{Error, Result};
pub use fit::{Fit, fitted};
pub use forest::{Forest, edge_probabilities, spanning_trees};
pub use functions::TestFunction;
pub use history::{History, Scale};
pub use information::{missed_pairs, random_partition};
pub use kernel::Hyperparameters;
pub use lasso::{Lasso, LassoSettings};
pub use messages::{Costs, Minimum, minimise};
pub use process::{AdditiveProcess, Marginal};
pub use rducb::{Rducb, RducbSettings};
pub use stepper::Optimiser;
pub use zoom::zoom;
