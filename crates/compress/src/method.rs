//! The list of methods, and what each says of itself.

use lapidary_model::Model;

use crate::activations::ActivationSettings;
use crate::ahead::{Left, Refused};
use crate::entropy::EntropyChoice;
use crate::methods::fuse::FuseSettings;
use crate::methods::quantise::ROUNDING;
use crate::methods::replace_me::ReplaceMe;
use crate::methods::slicing::SliceSettings;
use crate::methods::{
    LorapSettings, METHODS, ModegptSettings, PruneSettings, QuantiseSettings, ShedderSettings,
};
use crate::organised;
use crate::plan::{Budget, Plan};
use crate::report::Compressed;
use crate::{Calibration, CalibrationData, Error, Requirements, Result, Selection};
use serde::{Deserialize, Serialize};

/// In which order a method looks and cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Everything is cut by what the whole model showed.
    OneShot,
    /// Each layer is cut by what it reads once those before it have been cut.
    LayerByLayer,
    /// The model is scored anew after each cut.
    Iterative,
    /// Weights are trained while it is cut.
    Training,
}

impl Schedule {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneShot => "one shot",
            Self::LayerByLayer => "layer by layer",
            Self::Iterative => "iterative",
            Self::Training => "training",
        }
    }
}

/// What of a model a method changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// How many blocks there are, or pieces of them that go as a whole.
    Depth,
    /// The width and the basis of the residual stream.
    Stream,
    /// How many heads there are, or features within heads and feed-forward parts.
    Parts,
    /// Which directions a matrix of the same shape keeps.
    Directions,
    /// Matrices become two factors.
    Ranks,
    /// Which single weights are zero.
    Weights,
    /// How numbers are stored.
    Storage,
}

/// Choices that are not the budget's. Each method reads those that it documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The layers that factorisations and pruning may touch.
    pub selection: Selection,
    /// Sequences in one forward pass.
    pub batch: usize,
    /// Seed of whatever is drawn.
    pub seed: u64,
    /// How the residual stream is narrowed.
    pub slicing: SliceSettings,
    /// How a run of blocks is replaced by a linear map.
    pub replace_me: ReplaceMe,
    /// How entropy is estimated, and which blocks it may choose.
    pub entropy: EntropyChoice,
    /// How blocks take in those that go.
    pub fuse: FuseSettings,
    /// For `lorap`.
    pub lorap: LorapSettings,
    /// For `modegpt`.
    pub modegpt: ModegptSettings,
    /// How weights are rounded.
    pub quantise: QuantiseSettings,
    /// How activations are rounded where a model is measured.
    pub activations: ActivationSettings,
    /// For the methods that set weights to zero, or take out whole heads or channels.
    pub pruning: PruneSettings,
    /// How `mamba-shedder-width` narrows feed-forward parts.
    pub shedder: ShedderSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            selection: Selection::default(),
            batch: 8,
            seed: 0,
            slicing: SliceSettings::default(),
            replace_me: ReplaceMe::default(),
            entropy: EntropyChoice::default(),
            fuse: FuseSettings::default(),
            lorap: LorapSettings::default(),
            modegpt: ModegptSettings::default(),
            quantise: QuantiseSettings::default(),
            activations: ActivationSettings::default(),
            pruning: PruneSettings::default(),
            shedder: ShedderSettings::default(),
        }
    }
}

/// A model to be compressed, and what is known about it.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The model.
    pub model: &'a Model,
    /// What the method's requirements found, on these very weights.
    pub calibration: Option<&'a Calibration>,
    /// What the model is for: needed by methods that look more than once.
    pub data: Option<&'a CalibrationData>,
    /// Choices; the defaults when absent.
    pub settings: Option<&'a Settings>,
}

impl<'a> Task<'a> {
    /// A model of which nothing is known.
    pub fn new(model: &'a Model) -> Self {
        Self {
            model,
            calibration: None,
            data: None,
            settings: None,
        }
    }

    /// The settings.
    pub fn settings(&self) -> Settings {
        self.settings.cloned().unwrap_or_default()
    }

    /// The calibration of a method that needs one.
    pub(crate) fn calibrated(&self, method: &str) -> Result<&'a Calibration> {
        self.calibration.ok_or_else(|| {
            Error::invalid(
                format!("calibration of {method}"),
                "absent",
                "one with the requirements of the method",
            )
        })
    }

    /// The data of a method that looks at the model itself.
    pub(crate) fn observed(&self, method: &str) -> Result<&'a CalibrationData> {
        self.data.ok_or_else(|| {
            Error::invalid(
                format!("data of {method}"),
                "absent",
                "given: the method looks at the model more than once",
            )
        })
    }
}

/// Plans for a budget and carries the plan out.
pub(crate) type Cut = fn(&Task<'_>, &Budget) -> Result<(Plan, Compressed)>;

/// A way to make a model smaller.
///
/// ```
/// use lapidary_compress::Method;
/// assert_eq!(Method::find("fwsvd")?.name, "fwsvd");
/// assert!(Method::find("fwsdv").unwrap_err().to_string().contains("whitened"));
/// # Ok::<(), lapidary_compress::Error>(())
/// ```
#[derive(Debug)]
pub struct Method {
    /// Its name on the command line and in files.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Where it was published.
    pub source: &'static str,
    /// In which order it looks and cuts.
    pub schedule: Schedule,
    /// What of a model it changes.
    pub effect: Effect,
    /// Whether it has to see data beside the calibration.
    pub observes: bool,
    /// What it leaves in every model that it cuts, of what others refuse.
    pub(crate) leaves: &'static [Left],
    /// What it cannot be run on.
    pub(crate) refuses: fn(&Settings) -> &'static [Refused],
    pub(crate) requirements: fn(&Model, &Settings) -> Result<Requirements>,
    pub(crate) plan: fn(&Task<'_>, &Budget) -> Result<Plan>,
    pub(crate) apply: fn(&Task<'_>, &Plan) -> Result<Compressed>,
    /// Both at one time, where that spares what one of them would do again.
    pub(crate) cut: Option<Cut>,
}

impl Method {
    /// Every method, by name.
    pub fn all() -> &'static [&'static Method] {
        METHODS
    }

    /// The method of that name; `activation`, `row-column` and `generalised` are short for the
    /// factorisations that begin so.
    ///
    /// # Errors
    /// When there is none; the error lists all.
    pub fn find(name: &str) -> Result<&'static Method> {
        let name = match name {
            "activation" => "activation-weighted",
            "row-column" => "row-column-fisher",
            "generalised" => "generalised-fisher",
            other => other,
        };
        METHODS
            .iter()
            .copied()
            .find(|method| method.name == name)
            .ok_or_else(|| {
                let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
                let expected = format!("one of {}", names.join(", "));
                Error::invalid("method", format!("{name:?}"), expected)
            })
    }

    /// Whether it rounds weights where they are: it changes how they are stored and not how many
    /// there are, so that it has no budget and comes last.
    pub fn rounds(&self) -> bool {
        ROUNDING.iter().any(|method| method.name == self.name)
    }

    /// Whether it takes layers one by one, so that [`Settings::selection`] says which it may touch. `lorap`
    /// makes factors too, but of every block's attention.
    pub fn chooses_layers(&self) -> bool {
        match self.effect {
            Effect::Directions | Effect::Weights | Effect::Storage => true,
            Effect::Ranks => self.name != "lorap",
            Effect::Depth | Effect::Stream | Effect::Parts => false,
        }
    }

    /// Whether it reads this section of [`Settings`]. What `activations` says is about how a model is measured, and
    /// no method's.
    pub fn reads(&self, section: &str) -> bool {
        let is = |names: &[&str]| names.contains(&self.name);
        match section {
            "batch" | "seed" => true,
            "selection" => self.chooses_layers(),
            "slicing" => self.effect == Effect::Stream || is(&["dotresize-hidden"]),
            "replace_me" => is(&["replaceme", "replaceme-cosine"]),
            "entropy" => is(&["entropy-attention", "entropy-blocks"]),
            "fuse" => is(&["fusegpt", "fuse-lora", "macro-influence"]),
            "lorap" | "modegpt" => is(&[section]),
            "quantise" => self.rounds(),
            "pruning" => self.effect == Effect::Weights || is(&["prune-heads", "channel-gradient"]),
            "shedder" => is(&["mamba-shedder-width"]),
            _ => false,
        }
    }

    /// What has to be found out about a model first. Requirements of several methods unite.
    ///
    /// # Errors
    /// When the method is not defined for the model.
    pub fn requirements(&self, model: &Model, settings: &Settings) -> Result<Requirements> {
        self.check_model(model)?;
        (self.requirements)(model, settings)
    }

    /// Gives each module its share of the budget; nothing is cut yet.
    ///
    /// # Errors
    /// When the method is not defined for the model, the budget cannot be met, or what the
    /// method needs to know is missing.
    pub fn plan(&self, task: &Task<'_>, budget: &Budget) -> Result<Plan> {
        self.check(task)?;
        (self.plan)(task, budget)
    }

    /// Carries out a plan of this method.
    ///
    /// # Errors
    /// When the plan is another method's or was made for another model, or what the method needs
    /// to know is missing.
    pub fn apply(&self, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
        if plan.method != self.name {
            return Err(Error::invalid("plan", &plan.method, self.name));
        }
        // Where blocks are scored anew after each cut, they are numbered anew too.
        if matches!(self.schedule, Schedule::OneShot | Schedule::LayerByLayer) {
            plan.check_once()?;
        }
        self.check(task)?;
        (self.apply)(task, plan)
    }

    /// Plans for a budget and carries the plan out: what [`Method::plan`] and [`Method::apply`] give one after the
    /// other, at less cost where a method trains to plan.
    ///
    /// # Errors
    /// Those of both.
    pub fn cut(&self, task: &Task<'_>, budget: &Budget) -> Result<(Plan, Compressed)> {
        self.check(task)?;
        let (plan, mut compressed) = match self.cut {
            Some(cut) => cut(task, budget)?,
            None => {
                let plan = (self.plan)(task, budget)?;
                let compressed = (self.apply)(task, &plan)?;
                (plan, compressed)
            }
        };
        compressed.report.shortfall = plan.shortfall(task, budget);
        Ok((plan, compressed))
    }

    /// Refuses models that no plan of the method fits, whatever it calibrates on.
    pub(crate) fn check_model(&self, model: &Model) -> Result<()> {
        self.check_weights(model)?;
        organised::check(self, model)
    }

    /// Every method cuts a matrix by what one place of the model shows it, and needs its numbers.
    pub(crate) fn check_weights(&self, model: &Model) -> Result<()> {
        if model.shares_weights() {
            return Err(Error::invalid(
                "the set of weights",
                "shared by several blocks",
                format!("each block's own for {}", self.name),
            ));
        }
        if !model.spec().quantised.is_empty() {
            return Err(Error::invalid(
                "the model",
                "quantised already",
                format!("made of numbers for {}: rounding comes last", self.name),
            ));
        }
        Ok(())
    }

    fn check(&self, task: &Task<'_>) -> Result<()> {
        self.check_model(task.model)?;
        task.calibration
            .map_or(Ok(()), |calibration| calibration.check(task.model))
    }
}
