//! What will happen to each module of a model, before anything is cut.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_model::Model;
use serde::{Deserialize, Serialize};

use crate::method::{Method, Task};
use crate::report::Compressed;
use crate::shortfall::{Shortfall, shortfall};
use crate::{Calibration, Error, Result};

/// How much may be left.
#[derive(Clone, Debug, PartialEq)]
pub enum Budget {
    /// The share of the weights that a method works on, in `(0, 1]`: 0.7 cuts 30 %. Methods that
    /// remove whole blocks keep this share of the blocks, rounded to the nearest number.
    Keep(f64),
    /// Parameters of the whole compressed model.
    Parameters(usize),
    /// A rank for each layer named, by path; the others stay. For factorisations.
    Ranks(BTreeMap<String, usize>),
}

impl Budget {
    /// The share to keep.
    ///
    /// # Errors
    /// When it is outside `(0, 1]`, or the budget is no share and `method` knows no other.
    pub fn share(&self, method: &str) -> Result<f64> {
        match *self {
            Self::Keep(share) if share > 0.0 && share <= 1.0 => Ok(share),
            Self::Keep(share) => Err(Error::invalid(
                "share of weights to keep",
                share,
                "above 0 and at most 1",
            )),
            Self::Parameters(_) | Self::Ranks(_) => Err(Error::invalid(
                format!("budget of {method}"),
                "a number of parameters or ranks",
                "a share to keep",
            )),
        }
    }
}

/// A share as a reader would write it: 0.3 and not the 0.30000000000000004 that `1 - 0.7` is.
pub(crate) fn readable(share: f64) -> f64 {
    const PLACES: f64 = 1e9;
    (share * PLACES).round() / PLACES
}

/// What happens to one module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// A linear layer becomes two with `rank` features between them.
    Factorise {
        /// Features between the layers.
        rank: usize,
    },
    /// A feed-forward part keeps some of its hidden features.
    Narrow {
        /// Hidden features that are left.
        features: usize,
    },
    /// The heads of attention become narrower.
    NarrowHeads {
        /// Features of a query and a key.
        query_key: usize,
        /// Features of a value.
        value: usize,
    },
    /// Whole heads of attention are taken out, with their groups of keys and values.
    FewerHeads {
        /// Query heads that are left.
        heads: usize,
    },
    /// The residual stream at a module's input becomes narrower.
    Slice {
        /// Features of a token that are left.
        width: usize,
    },
    /// A block, or its attention, is left out.
    Remove,
    /// A block, or a run of blocks that starts here, becomes one linear map.
    Linearise {
        /// Blocks that the map stands for.
        blocks: usize,
    },
    /// A block takes over from one that goes: its matrices take in those of that block, or, in the
    /// control, are tuned without them. The plan is carried out in its order, so that a block may
    /// be named several times.
    Fuse {
        /// The block that goes.
        from: usize,
    },
    /// Weights are set to zero.
    Prune {
        /// Share of the weights.
        share: f64,
    },
    /// Directions of a weight are taken out.
    Edit {
        /// Share that stays, of what the method measures directions by.
        mass: f64,
    },
    /// Weights are rounded to integers with a scale for each group.
    Quantise {
        /// Bits of an integer.
        bits: u32,
        /// Weights that share a scale.
        group: usize,
    },
    /// It stays as it is.
    Leave {
        /// Why.
        reason: String,
    },
}

/// One module of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModulePlan {
    /// Path of the module: a linear layer's, a part's (`blocks.3.attention`) or a block's.
    pub path: String,
    /// Width of its input.
    pub input: usize,
    /// Width of its output.
    pub output: usize,
    /// What happens to it.
    pub change: Change,
}

impl ModulePlan {
    /// Says that the plan was made for a model without such a module.
    pub(crate) fn of_another_model(&self) -> Error {
        Error::invalid(
            "plan",
            format!("for {} of width {}", self.path, self.input),
            "one that was made for this model",
        )
    }

    /// Whether it is left out, by a `method` that does nothing else.
    ///
    /// # Errors
    /// When something else is to happen to it.
    pub(crate) fn is_removed(&self, method: &str) -> Result<bool> {
        match &self.change {
            Change::Remove => Ok(true),
            Change::Leave { .. } => Ok(false),
            other => Err(Error::invalid(
                format!("change of {} in a plan of {method}", self.path),
                format!("{other:?}"),
                "remove or leave",
            )),
        }
    }
}

/// What a method will do to each module: plain data, to be read, kept or edited before it is
/// applied. A method plans nothing that does not pay; it does what a plan says, so that a number
/// which someone writes into it by hand is obeyed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Name of the method, in [`Method::all`].
    pub method: String,
    /// Every module that the method has to do with.
    pub modules: Vec<ModulePlan>,
}

impl Plan {
    /// Makes the planned model, for methods that need no data but a calibration, if any. What
    /// the method needs besides is given to [`Method::apply`].
    ///
    /// # Errors
    /// When the calibration lacks what the method needs or belongs to other weights, or the plan
    /// was made for another model.
    pub fn apply(&self, model: &Model, calibration: Option<&Calibration>) -> Result<Compressed> {
        let task = Task {
            calibration,
            ..Task::new(model)
        };
        Method::find(&self.method)?.apply(&task, self)
    }

    /// Refuses a plan that names a module more than once.
    pub(crate) fn check_once(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        let mut modules = self.modules.iter();
        match modules.find(|module| !seen.insert(module.path.as_str())) {
            None => Ok(()),
            Some(module) => {
                let found = format!("{} more than once", module.path);
                Err(Error::invalid("plan", found, "each module once"))
            }
        }
    }

    /// What of a budget it does not reach, which [`Method::cut`] reports of its own plan.
    ///
    /// ```
    /// use lapidary_compress::{Budget, Method, Task};
    /// # use lapidary_kernels::{DType, Device};
    /// # use lapidary_model::{Model, ModelSpec};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let spec: ModelSpec = toml::from_str(r#"
    /// #     width = 16
    /// #     input = { kind = "tokens", vocabulary = 32, length = 8 }
    /// #     head = { kind = "language-model" }
    /// #     [[blocks]]
    /// #     attention = { kind = "multi-head", heads = 2, causal = true }
    /// # "#)?;
    /// # let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
    /// let (svd, task) = (Method::find("svd")?, Task::new(&model));
    /// let (half, nearly_all) = (Budget::Keep(0.5), Budget::Keep(0.01));
    /// assert!(svd.plan(&task, &half)?.shortfall(&task, &half).is_none());
    /// // Rank 1 of a matrix of 16×16 has 32 of its 256 weights.
    /// let found = svd.plan(&task, &nearly_all)?.shortfall(&task, &nearly_all);
    /// assert_eq!(found.map(|found| found.taken), Some(0.875));
    /// # Ok(()) }
    /// ```
    pub fn shortfall(&self, task: &Task<'_>, budget: &Budget) -> Option<Shortfall> {
        shortfall(task, self, budget)
    }

    /// The modules that change.
    pub fn changed(&self) -> impl Iterator<Item = &ModulePlan> {
        let leaves = |module: &&ModulePlan| !matches!(module.change, Change::Leave { .. });
        self.modules.iter().filter(leaves)
    }
}
