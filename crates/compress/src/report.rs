//! What was cut, and what it cost.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_model::{HeadSpec, InputSpec, Model};
use lapidary_parts::feedforward::FeedforwardSpec;
use serde::Serialize;

use crate::edit::block_of;
use crate::method::Task;
use crate::plan::{Change, ModulePlan};
use crate::{CalibrationData, Fingerprint, Objective, Result, Shortfall, output_errors};

/// Errors of one approximation of a layer, relative to the layer itself: 0 is exact, 1 is as
/// bad as leaving the layer out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerErrors {
    /// In the norm that the method minimises.
    pub weighted: f64,
    /// In the Frobenius norm.
    pub unweighted: f64,
    /// `½ Σ Î Δ²`, in nats per example, where the calibration has the Fisher information of
    /// every weight.
    pub predicted_loss_rise: Option<f64>,
}

/// One module before and after.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleReport {
    /// Path of the module.
    pub path: String,
    /// Width of its input.
    pub input: usize,
    /// Width of its output.
    pub output: usize,
    /// What was done to it.
    pub change: Change,
    /// Why it was left, or what was unusual about it.
    pub note: Option<String>,
    /// Its weights before, without bias of linear layers.
    pub parameters_before: usize,
    /// Its weights after.
    pub parameters_after: usize,
    /// Errors of what was chosen, rounding to the model's type included.
    pub chosen: Option<LayerErrors>,
    /// Errors that plain SVD makes at the same rank: larger in the method's norm and smaller in
    /// the Frobenius norm, which is the paper's observation that the latter is not what counts.
    pub plain: Option<LayerErrors>,
    /// `√(E‖x (W − Ŵ)ᵀ‖² / E‖x Wᵀ‖²)` over data, once it was measured
    /// ([`crate::Compressed::measure_outputs`]).
    pub output_error: Option<f64>,
}

impl ModuleReport {
    /// A module that became what was planned; its weights are `before` and `after`.
    pub(crate) fn new(planned: &ModulePlan, before: usize, after: usize) -> Self {
        Self {
            path: planned.path.clone(),
            input: planned.input,
            output: planned.output,
            change: planned.change.clone(),
            note: match &planned.change {
                Change::Leave { reason } => Some(reason.clone()),
                _ => None,
            },
            parameters_before: before,
            parameters_after: after,
            chosen: None,
            plain: None,
            output_error: None,
        }
    }

    /// Its rank, when it was factorised.
    pub fn rank(&self) -> Option<usize> {
        match self.change {
            Change::Factorise { rank } => Some(rank),
            _ => None,
        }
    }
}

/// Size of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Parameters, tied ones counted once.
    pub parameters: usize,
    /// Bytes of the parameters.
    pub bytes: usize,
    /// Floating-point operations per token in linear layers and a language model's output, a
    /// multiply-add being two; of experts those that run on a token, as large as all are on average. Attention over other tokens is not in it, nor are recurrences and
    /// their convolutions, nor layers on a pooled vector, which run once per sequence.
    pub flops_per_token: usize,
}

impl Size {
    /// The size of a model.
    pub fn of(model: &Model) -> Self {
        let mut multiplications = 0;
        // Of each block with experts, those of all of them.
        let mut routed: BTreeMap<usize, usize> = BTreeMap::new();
        let counted = model.linears().iter().filter(|linear| {
            !linear.path.starts_with("head.")
                || matches!(model.spec().head, HeadSpec::LanguageModel { .. })
        });
        for linear in counted {
            let own = match linear.rank {
                Some(rank) => rank * (linear.input + linear.output),
                None => linear.input * linear.output,
            };
            match block_of(&linear.path) {
                Some((block, rest)) if rest.starts_with("feedforward.experts.") => {
                    *routed.entry(block).or_default() += own;
                }
                _ => multiplications += own,
            }
        }
        let blocks = model.spec().expanded_blocks();
        for (block, all) in routed {
            let part = blocks
                .get(block)
                .and_then(|block| block.feedforward.as_ref());
            multiplications += match part {
                Some(FeedforwardSpec::Mixture(mixture)) => {
                    all * mixture.active / mixture.experts.max(1)
                }
                _ => all,
            };
        }
        if let (HeadSpec::LanguageModel { tied: true, .. }, InputSpec::Tokens(tokens)) =
            (&model.spec().head, &model.spec().input)
        {
            let width = tokens.embedding_width.unwrap_or(model.spec().width);
            multiplications += tokens.vocabulary * width;
        }
        Self {
            parameters: model.parameter_count(),
            bytes: model
                .parameters()
                .values()
                .map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes())
                .sum(),
            flops_per_token: 2 * multiplications,
        }
    }
}

/// What was done to a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Name of the method.
    pub method: String,
    /// The weights that were compressed.
    pub original: Fingerprint,
    /// The loss whose gradients weighed the weights, where a method needed them.
    pub objective: Option<Objective>,
    /// Examples that the calibration saw.
    pub examples: usize,
    /// Tokens that the calibration saw.
    pub tokens: usize,
    /// Every module that the plan speaks of.
    pub modules: Vec<ModuleReport>,
    /// What else there is to say of the whole.
    pub notes: Vec<String>,
    /// What of the share that was asked for was not reached, where the method planned for one itself.
    pub shortfall: Option<Shortfall>,
    /// The model before.
    pub before: Size,
    /// The model after.
    pub after: Size,
}

impl Report {
    /// The layers that were factorised.
    pub fn factorised(&self) -> impl Iterator<Item = &ModuleReport> {
        self.modules.iter().filter(|layer| layer.rank().is_some())
    }

    /// Of the blocks whose numbers in some original are `earlier`, those that are left, in their order:
    /// whole blocks that were taken out are missing.
    ///
    /// ```
    /// use lapidary_compress::{Recipe, Settings};
    /// # use lapidary_kernels::{DType, Device};
    /// # use lapidary_model::{Model, ModelSpec};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let spec: ModelSpec = toml::from_str(r#"
    /// #     width = 16
    /// #     input = { kind = "tokens", vocabulary = 32, length = 8 }
    /// #     head = { kind = "language-model" }
    /// #     [[blocks]]
    /// #     repeat = 3
    /// #     attention = { kind = "multi-head", heads = 2, causal = true }
    /// # "#)?;
    /// # let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
    /// let done = Recipe::of("svd", "0.3")?.run(&model, None, &Settings::default())?;
    /// let report = &done[0].compressed.report;
    /// // Ranks leave every block where it was.
    /// assert_eq!(report.blocks_left(&[0, 1, 2]), [0, 1, 2]);
    /// # Ok(()) }
    /// ```
    pub fn blocks_left(&self, earlier: &[usize]) -> Vec<usize> {
        let removed: BTreeSet<&str> = self
            .modules
            .iter()
            .filter(|module| module.change == Change::Remove)
            .map(|module| module.path.as_str())
            .collect();
        let stays = |place: usize| !removed.contains(format!("blocks.{place}").as_str());
        let places = earlier.iter().enumerate();
        places
            .filter(|(place, _)| stays(*place))
            .map(|(_, block)| *block)
            .collect()
    }

    /// Parameters after over parameters before.
    pub fn kept(&self) -> f64 {
        self.after.parameters as f64 / self.before.parameters.max(1) as f64
    }
}

/// A compressed model and what became of the original.
#[derive(Debug)]
pub struct Compressed {
    /// The model. Its spec names every width and rank, so that it loads by itself.
    pub model: Model,
    /// What was done.
    pub report: Report,
}

impl Compressed {
    pub(crate) fn new(
        method: &str,
        task: &Task<'_>,
        model: Model,
        modules: Vec<ModuleReport>,
    ) -> Result<Self> {
        let calibration = task.calibration;
        let examples = calibration.map(|calibration| calibration.examples);
        let tokens = calibration.map(|calibration| calibration.tokens);
        Ok(Self {
            report: Report {
                method: method.to_owned(),
                original: Fingerprint::of(task.model)?,
                objective: calibration.and_then(|calibration| calibration.objective),
                examples: examples
                    .or(task.data.map(CalibrationData::len))
                    .unwrap_or(0),
                tokens: tokens
                    .or(task.data.map(CalibrationData::tokens))
                    .unwrap_or(0),
                modules,
                notes: Vec::new(),
                shortfall: None,
                before: Size::of(task.model),
                after: Size::of(&model),
            },
            model,
        })
    }

    /// The model with variables for parameters: what fine-tuning after compression starts from.
    pub fn trainable(&self) -> Result<Model> {
        let mut parameters = self.model.parameters().clone();
        Ok(Model::trainable(
            self.model.spec().clone(),
            &mut parameters,
        )?)
    }

    /// Puts a healed model in the place of the compressed one. Its size is said anew, and the ranks of
    /// layers that took adapters in.
    pub fn set_healed(&mut self, model: Model) {
        self.report.after = Size::of(&model);
        for module in &mut self.report.modules {
            let Change::Factorise { rank } = &mut module.change else {
                continue;
            };
            let mut linears = model.linears().iter();
            let Some(linear) = linears.find(|linear| linear.path == module.path) else {
                continue;
            };
            let (input, output) = (linear.input, linear.output);
            module.parameters_after = match linear.rank {
                Some(healed) => {
                    *rank = healed;
                    lapidary_factor::rank::parameters(input, output, healed)
                }
                None => {
                    module.change = Change::Leave {
                        reason: "with its adapter it has a rank that saves nothing".to_owned(),
                    };
                    input * output
                }
            };
        }
        self.model = model;
    }

    /// Measures how far the outputs of each changed layer are from those of `original` on
    /// the inputs that `original` gives it, and writes it into the report.
    pub fn measure_outputs(
        &mut self,
        original: &Model,
        data: &CalibrationData,
        batch: usize,
    ) -> Result<()> {
        let errors = output_errors(original, &self.model, data, batch)?;
        for module in &mut self.report.modules {
            module.output_error = errors.get(&module.path).copied();
        }
        Ok(())
    }
}
