//! Decompositions of a checkpoint: the same model with fewer parameters, and what that cost.
//!
//! Every method goes the same way:
//!
//! 1. [`Factorisation::requirements`] says which statistics it needs. Requirements unite.
//! 2. [`Calibration::collect`] finds them all in one pass over [`CalibrationData`].
//! 3. [`Plan::new`] gives each layer its share of a [`Budget`]; nothing is cut yet.
//! 4. [`Plan::apply`] makes the [`Compressed`] model with a [`Report`], and refuses statistics
//!    that belong to other weights.
//! 5. [`quality`] measures what is left; [`heal`] trains it further; [`export_dense`] multiplies the
//!    factors out again.
//!
//! ```
//! use lapidary_compress::{
//!     Budget, Calibration, CalibrationData, CalibrationOptions, Factorisation, Plan, Selection,
//! };
//! use lapidary_kernels::{DType, Device};
//! use lapidary_model::{Model, ModelSpec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let spec: ModelSpec = toml::from_str(r#"
//!     width = 16
//!     input = { kind = "tokens", vocabulary = 32, length = 8 }
//!     head = { kind = "language-model" }
//!     [[blocks]]
//!     attention = { kind = "multi-head", heads = 2, causal = true }
//!     feedforward = { kind = "dense", hidden = 64 }
//! "#)?;
//! let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
//! let data = CalibrationData::windows([vec![1, 5, 2, 7], vec![3, 3, 9, 4]])?;
//!
//! let (method, selection) = (Factorisation::Fwsvd, Selection::default());
//! let requirements = method.requirements(&model, &selection)?;
//! let calibration =
//!     Calibration::collect(&model, &data, &requirements, CalibrationOptions::default())?;
//! let plan = method.plan(&model, &selection, &Budget::Keep(0.5))?;
//! let compressed = plan.apply(&model, Some(&calibration))?;
//! assert!(compressed.report.after.parameters < compressed.report.before.parameters);
//! # Ok(()) }
//! ```

mod activations;
mod ahead;
pub mod automatic;
mod calibration;
mod data;
pub mod dimension;
mod edit;
pub mod entropy;
mod error;
mod export;
pub mod factorisation;
mod fingerprint;
pub mod fisher;
mod heal;
mod held;
mod interaction;
mod method;
mod methods;
mod objective;
mod observe;
mod order;
mod organised;
mod output;
mod plan;
pub mod quality;
mod recipe;
mod report;
mod requirements;
mod selection;
mod shortfall;
mod sites;
mod warm;
mod work;

pub use activations::{ActivationRange, ActivationSettings, RoundedActivations};
pub use calibration::{Calibration, CalibrationOptions};
pub use data::{CalibrationData, Content, Example, Target};
pub use error::{Error, Result};
pub use export::{export_dense, two_layer_parameters};
pub use factorisation::Factorisation;
pub use fingerprint::Fingerprint;
pub use heal::{
    AdapterReport, AdapterSettings, HealData, HealReport, HealSettings, PruneAndHeal,
    cubic_sparsity, heal, prune_and_heal,
};
pub use interaction::{Interaction, Interactions, interactions};
pub use method::{Effect, Method, Schedule, Settings, Task};
pub use methods::curvature;
pub use methods::fuse::{FuseLoss, FuseSettings, Gate, macro_influences};
pub use methods::linearise::linearity_scores;
pub use methods::replace_me::{
    CosineDescent, DescentSolver, MapForm, ReplaceMe, RunInput, angular_distances, run_regression,
};
pub use methods::shedder::{Granularities, Search, SearchStep, Shed};
pub use methods::slicing;
pub use methods::{
    LorapDecomposition, LorapSettings, ModegptSettings, MovementSettings, Pattern, PruneSettings,
    QuantiseSettings, RoundingGoal, Scope, ShedderSettings,
};
pub use objective::Objective;
pub use order::Reordered;
pub use output::output_errors;
pub use plan::{Budget, Change, ModulePlan, Plan};
pub use recipe::{Done, Recipe, Seconds, Stage};
pub use report::{Compressed, LayerErrors, ModuleReport, Report, Size};
pub use requirements::{Requirements, Statistic};
pub use selection::{Layer, Selection};
pub use shortfall::Shortfall;
pub use warm::warm_up;
pub use work::Work;
