//! A mix of methods for one budget, found by search.
//!
//! What a method takes from a model it takes by one rule everywhere. Which rule suits which module,
//! and how much each module can do without, is a question with as many variables as there are
//! modules and an answer that costs a run over held-out data: what [`lapidary_search::Rducb`] is for.
//!
//! ```text
//! blocks left out  · 0 or a few, in the order of one depth method
//! density          · of each group of matrices of each block: a level
//! method           · of each group that several methods can cut
//! ```
//!
//! A *group* is a block's queries and keys, its values and output, its feed-forward part, or
//! whatever else mixes its tokens. A proposal is *projected* onto the budget: densities are multiplied
//! by one number, the largest that the budget allows, so that levels only say how
//! much denser one group is than another. What the search sees is the loss of the projected mix.
//! Each method is applied to the whole original, on one calibration shared by all, and the modules
//! are put together by their paths; blocks go last.
//!
//! The search starts from the uniform mixes, all groups by one method at one density: what it ends
//! with is no worse on its data than the best of them. It chooses among many mixes by a few
//! examples, so that the loss it reports is lower than it will be elsewhere; measure on other text.

mod candidates;
mod compose;
mod methods;
mod projection;
mod score;
mod state;

use lapidary_model::Model;
use lapidary_search::{Optimiser, Rducb, RducbSettings};
use serde::{Deserialize, Serialize};

use candidates::Candidates;
use compose::Composer;

use crate::method::{Settings, Task};
use crate::plan::Plan;
use crate::report::{Compressed, ModuleReport};
use crate::{Calibration, CalibrationData, CalibrationOptions, Error, Result};

pub use candidates::Group;
pub use score::Score;
pub use state::{AutomaticState, Evaluation};

/// Name of a mix, where a report names a method.
pub const MIX: &str = "auto";

/// What a search of the mix can be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutomaticSettings {
    /// Parameters that may be left of the whole model.
    pub parameters: usize,
    /// Names of the methods to mix: of those that leave out blocks at most one. Those that the
    /// model does not allow are left out, and those that train.
    pub methods: Vec<String>,
    /// Mixes that are tried, the uniform ones included.
    pub evaluations: usize,
    /// Different densities that a proposal can give a group, from half to double; an odd number, so
    /// that one of them is as dense as the others on average.
    pub levels: usize,
    /// Most blocks that may go.
    pub removable: usize,
    /// Sequences in one forward pass.
    pub batch: usize,
    /// Seed of the search.
    pub seed: u64,
}

impl AutomaticSettings {
    /// The methods that are mixed when none are named.
    pub const METHODS: [&str; 4] = ["block-influence", "fwsvd", "modegpt", "whitened"];

    /// A search of mixes of at most `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Self {
            parameters,
            methods: Self::METHODS.map(str::to_owned).to_vec(),
            evaluations: 60,
            levels: 9,
            removable: 4,
            batch: 8,
            seed: 0,
        }
    }

    fn check(&self) -> Result<()> {
        if self.evaluations == 0 {
            return Err(Error::invalid("number of evaluations", 0, "at least 1"));
        }
        if !(2..=1000).contains(&self.levels) {
            let expected = "between 2 and 1000";
            return Err(Error::invalid("number of levels", self.levels, expected));
        }
        Ok(())
    }
}

/// What a proposal comes to: one plan for each method in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mix {
    /// The plans, for the original model. Blocks go after everything else is cut.
    pub plans: Vec<Plan>,
    /// Parameters of the whole model that they leave.
    pub parameters: usize,
}

/// A search under way.
///
/// ```
/// use lapidary_compress::automatic::{Automatic, AutomaticSettings};
/// use lapidary_compress::CalibrationData;
/// use lapidary_kernels::{DType, Device};
/// use lapidary_model::{Model, ModelSpec};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let spec: ModelSpec = toml::from_str(r#"
/// #     width = 16
/// #     input = { kind = "tokens", vocabulary = 32, length = 8 }
/// #     head = { kind = "language-model" }
/// #     [[blocks]]
/// #     attention = { kind = "multi-head", heads = 2, causal = true }
/// #     feedforward = { kind = "dense", hidden = 64 }
/// # "#)?;
/// # let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
/// let data = CalibrationData::windows([vec![1, 5, 2, 7], vec![3, 3, 9, 4]])?;
/// let held_out = CalibrationData::windows([vec![5, 2, 9, 1]])?;
/// let settings = AutomaticSettings {
///     evaluations: 4,
///     ..AutomaticSettings::new(model.parameter_count() * 7 / 10)
/// };
/// let mut search = Automatic::new(&model, &data, &held_out, settings)?;
/// while !search.is_finished() {
///     search.step()?;
/// }
/// assert!(search.best_model()?.model.parameter_count() <= model.parameter_count() * 7 / 10);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Automatic<'a> {
    model: &'a Model,
    held_out: &'a CalibrationData,
    candidates: Candidates,
    composer: Composer<'a>,
    score: Score,
    state: AutomaticState,
}

impl<'a> Automatic<'a> {
    /// Calibrates `model` on `data`, once for all methods, and sets the search up, which scores mixes
    /// on `held_out`.
    ///
    /// # Errors
    /// When none of the methods is defined for the model (the error says why of each), the budget
    /// cannot be met, or a setting is not one that can be used.
    pub fn new(
        model: &'a Model,
        data: &'a CalibrationData,
        held_out: &'a CalibrationData,
        settings: AutomaticSettings,
    ) -> Result<Self> {
        settings.check()?;
        let shared = Settings {
            batch: settings.batch,
            seed: settings.seed,
            ..Settings::default()
        };
        let applicable = methods::applicable(model, &settings.methods, &shared)?;
        let (mixed, left_out) = methods::answerable(model, data, applicable, &shared)?;
        let requirements = methods::requirements(model, &mixed, &shared)?;
        let options = CalibrationOptions {
            batch: settings.batch,
            ..CalibrationOptions::default()
        };
        let calibration = Calibration::collect(model, data, &requirements, options)?;
        let task = Task {
            model,
            calibration: Some(&calibration),
            data: Some(data),
            settings: Some(&shared),
        };
        let candidates = Candidates::new(&task, &mixed, left_out, &settings)?;
        let (domain, starts) = (candidates.domain(&settings)?, candidates.starts(&settings));
        let course = RducbSettings::standardised(domain.dimensions());
        let search = Rducb::new(domain, course, settings.seed)?;
        let state =
            AutomaticState::new(model, data, held_out, settings, search.starting_at(starts)?)?;
        Ok(Self {
            score: Score::of(model, held_out),
            composer: Composer::new(model, data, calibration, shared),
            model,
            held_out,
            candidates,
            state,
        })
    }

    /// Goes on where another search stopped, as if it had never stopped. It may have been told of
    /// fewer evaluations.
    ///
    /// # Errors
    /// When the state is that of a search over other weights or data, or with other settings.
    pub fn resumed(mut self, state: AutomaticState) -> Result<Self> {
        state.check_continues(&self.state)?;
        let evaluations = self.state.settings.evaluations;
        self.state = state;
        self.state.settings.evaluations = evaluations;
        Ok(self)
    }

    /// All that has to be kept to go on later.
    pub fn state(&self) -> &AutomaticState {
        &self.state
    }

    /// Whether as many mixes were tried as were asked for, or there are no more.
    pub fn is_finished(&self) -> bool {
        let tried = self.state.evaluations.len();
        tried >= self.state.settings.evaluations || tried >= self.state.search.domain().size()
    }

    /// What mixes are scored by.
    pub fn score(&self) -> Score {
        self.score
    }

    /// Methods that are left out, and why.
    pub fn left_out(&self) -> &[(String, String)] {
        &self.candidates.left_out
    }

    /// Variables of the search that can vary.
    pub fn variables(&self) -> usize {
        let domain = self.state.search.domain();
        let varies = |coordinate: &usize| domain.places(*coordinate) > 1;
        (0..domain.dimensions()).filter(varies).count()
    }

    /// The names of the uniform mixes, which are the first to be tried.
    pub fn baselines(&self) -> Vec<String> {
        self.candidates.start_names()
    }

    /// Tries the next mix.
    ///
    /// # Errors
    /// When a method fails.
    pub fn step(&mut self) -> Result<&Evaluation> {
        let point = self.state.search.suggest()?;
        let mix = self.mix(&point)?;
        let composed = self.composer.compose(&mix)?;
        let loss = self.score.measure(
            self.model,
            &composed,
            self.held_out,
            self.state.settings.batch,
        )?;
        // A mix whose loss is no number is as bad as the worst.
        let worst = self.state.evaluations.iter().map(|e| e.loss);
        let loss = match loss.is_finite() {
            true => loss,
            false => worst.fold(1e3, f64::max),
        };
        self.state.search.observe(point.clone(), loss)?;
        let number = self.state.evaluations.len();
        self.state.evaluations.push(Evaluation {
            point,
            parameters: composed.parameter_count(),
            loss,
        });
        self.state
            .evaluations
            .get(number)
            .ok_or_else(|| Error::invalid("evaluation", number, "one that was kept"))
    }

    /// What a point of the search stands for.
    ///
    /// # Errors
    /// When it is no point of the search's domain.
    pub fn mix(&self, point: &[usize]) -> Result<Mix> {
        let values = self.state.search.domain().values(point)?;
        let proposal = self.candidates.proposal(&values);
        Ok(self.candidates.projected(&proposal))
    }

    /// The model of a mix.
    ///
    /// # Errors
    /// When a plan is not one that this search makes.
    pub fn compose(&mut self, mix: &Mix) -> Result<Model> {
        self.composer.compose(mix)
    }

    /// The best mix so far, and its evaluation.
    pub fn best(&self) -> Result<(Mix, &Evaluation)> {
        let all = self.state.evaluations.iter();
        let best = all
            .min_by(|a, b| a.loss.total_cmp(&b.loss))
            .ok_or_else(|| Error::invalid("number of mixes that were tried", 0, "at least 1"))?;
        Ok((self.mix(&best.point)?, best))
    }

    /// The model of the best mix so far.
    ///
    /// # Errors
    /// When no mix was tried.
    pub fn best_model(&mut self) -> Result<Compressed> {
        let (mix, _) = self.best()?;
        let model = self.composer.compose(&mix)?;
        let modules = mix.plans.iter().flat_map(|plan| {
            plan.modules.iter().map(|planned| {
                let (before, after) = candidates::weights(self.model, planned);
                ModuleReport {
                    note: Some(plan.method.clone()),
                    ..ModuleReport::new(planned, before, after)
                }
            })
        });
        let modules = modules.collect();
        Compressed::new(MIX, &self.composer.task(), model, modules)
    }

    /// The loss of the original on the same data.
    pub fn original_loss(&self) -> Result<f64> {
        let batch = self.state.settings.batch;
        self.score
            .measure(self.model, self.model, self.held_out, batch)
    }
}
