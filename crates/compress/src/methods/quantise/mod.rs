//! Weights as integers of four or eight bits, with a scale for each group.
//!
//! Every method rounds the matrices of the chosen layers where they are, the factors of a factorised
//! layer each by itself, and leaves their number and the model's shape alone. So there is no budget,
//! and rounding comes last: what is rounded is not cut any more. Symmetric groups of 32 are GGUF's
//! `Q8_0` and `Q4_0` and those with minima its `Q4_1`, bit for bit in what they can say.
//!
//! Columns whose inputs are outliers may stay numbers (Dettmers et al. 2022, LLM.int8, arXiv
//! 2208.07339): `W = Q + K` with `K` in those columns alone, which `Q` is rounded without, so that they
//! are exact whatever the grid.

mod goal;
mod grid;
pub(crate) mod kept;
mod rounded;
mod scaling;
mod second_order;
mod target;

pub use goal::RoundingGoal;

use std::collections::BTreeMap;

use lapidary_factor::matrix_from_tensor;
use lapidary_kernels::Tensor;
use lapidary_model::Model;

use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, LayerErrors, ModuleReport};
use crate::selection::Layer;
use crate::{Error, Requirements, Result, Statistic};
use grid::GridKind;
use rounded::Rounded;
use serde::{Deserialize, Serialize};
use target::{Target, original, put, writes_too};

/// How weights are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantiseSettings {
    /// Bits of `awq` and `gptq`: 4 or 8. Other methods have theirs in their names.
    pub bits: u32,
    /// Weights of a row that share a scale: a multiple of 32.
    pub group: usize,
    /// Whether each group has a minimum beside its scale, for weights that are not centred.
    pub minima: bool,
    /// Whether a narrower grid is taken where its squared error is smaller. For up to four bits.
    pub search: bool,
    /// What `gptq` adds to the diagonal of the second moment, as a share of its mean.
    pub damping: f64,
    /// Inputs that come to this size or more somewhere in the calibration keep their column of the
    /// weights as numbers; none for 0. LLM.int8 takes 6.
    pub outliers: f64,
}

impl Default for QuantiseSettings {
    fn default() -> Self {
        Self {
            bits: 4,
            group: 32,
            minima: false,
            search: true,
            damping: 0.01,
            outliers: 0.0,
        }
    }
}

/// Eight bits, to nearest.
pub(crate) const INT8: Method = Method {
    name: "int8",
    summary: "Rounds weights to 8 bits, each to the nearest number of its group's grid",
    source: "Dettmers & Zettlemoyer 2023, arXiv 2212.09720; GGUF Q8_0",
    schedule: Schedule::OneShot,
    effect: Effect::Storage,
    observes: false,
    leaves: &[],
    refuses: |_| &[],
    requirements: |model, settings| Rounding::INT8.requirements(model, settings),
    plan: |task, budget| Rounding::INT8.plan(task, budget),
    apply: |task, plan| Rounding::INT8.apply(task, plan),
    cut: None,
};

/// Four bits, to nearest.
pub(crate) const INT4: Method = Method {
    name: "int4",
    summary: "Rounds weights to 4 bits, each to the nearest number of its group's grid",
    source: "Dettmers & Zettlemoyer 2023, arXiv 2212.09720; GGUF Q4_0, Q4_1",
    schedule: Schedule::OneShot,
    effect: Effect::Storage,
    observes: false,
    leaves: &[],
    refuses: |_| &[],
    requirements: |model, settings| Rounding::INT4.requirements(model, settings),
    plan: |task, budget| Rounding::INT4.plan(task, budget),
    apply: |task, plan| Rounding::INT4.apply(task, plan),
    cut: None,
};

/// Activation-aware scales.
pub(crate) const AWQ: Method = Method {
    name: "awq",
    summary: "Rounds weights after columns with large inputs have been made large",
    source: "Lin et al. 2023, AWQ, arXiv 2306.00978",
    schedule: Schedule::OneShot,
    effect: Effect::Storage,
    observes: false,
    leaves: &[],
    refuses: |_| &[],
    requirements: |model, settings| Rounding::AWQ.requirements(model, settings),
    plan: |task, budget| Rounding::AWQ.plan(task, budget),
    apply: |task, plan| Rounding::AWQ.apply(task, plan),
    cut: None,
};

/// Second-order compensation.
pub(crate) const GPTQ: Method = Method {
    name: "gptq",
    summary: "Rounds weights column by column and makes each error good in the columns after it",
    source: "Frantar et al. 2022, GPTQ, arXiv 2210.17323",
    schedule: Schedule::OneShot,
    effect: Effect::Storage,
    observes: false,
    leaves: &[],
    refuses: |_| &[],
    requirements: |model, settings| Rounding::GPTQ.requirements(model, settings),
    plan: |task, budget| Rounding::GPTQ.plan(task, budget),
    apply: |task, plan| Rounding::GPTQ.apply(task, plan),
    cut: None,
};

/// The methods that change how weights are stored and not how many there are.
pub(crate) const ROUNDING: [&Method; 4] = [&INT8, &INT4, &AWQ, &GPTQ];

const ROUNDINGS: [Rounding; 4] = [
    Rounding::INT8,
    Rounding::INT4,
    Rounding::AWQ,
    Rounding::GPTQ,
];

/// What guides the rounding.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guide {
    Nearest,
    Scaling,
    SecondOrder,
}

#[derive(Clone, Copy)]
struct Rounding {
    name: &'static str,
    guide: Guide,
    bits: Option<u32>,
}

impl Rounding {
    const INT8: Self = Self {
        name: "int8",
        guide: Guide::Nearest,
        bits: Some(8),
    };
    const INT4: Self = Self {
        name: "int4",
        guide: Guide::Nearest,
        bits: Some(4),
    };
    const AWQ: Self = Self {
        name: "awq",
        guide: Guide::Scaling,
        bits: None,
    };
    const GPTQ: Self = Self {
        name: "gptq",
        guide: Guide::SecondOrder,
        bits: None,
    };

    fn bits(self, settings: &Settings) -> u32 {
        self.bits.unwrap_or(settings.quantise.bits)
    }

    fn layers(self, model: &Model, settings: &Settings) -> Result<Vec<Layer>> {
        if settings.selection.embeddings {
            return Err(Error::invalid(
                "embeddings",
                "among the layers to be rounded",
                "left as they are: the table is looked up, not multiplied with",
            ));
        }
        settings.selection.chosen(model)
    }

    fn requirements(self, model: &Model, settings: &Settings) -> Result<Requirements> {
        let bits = self.bits(settings);
        if !matches!(bits, 4 | 8) {
            return Err(Error::invalid(
                format!("bits of {}", self.name),
                bits,
                "4 or 8",
            ));
        }
        let damping = settings.quantise.damping;
        if self.guide == Guide::SecondOrder && !(damping.is_finite() && damping >= 0.0) {
            return Err(Error::invalid(
                format!("damping of {}", self.name),
                damping,
                "at least 0",
            ));
        }
        let outliers = kept::threshold(&settings.quantise)?;
        let layers = self.layers(model, settings)?;
        let sites = layers.into_iter().map(|layer| layer.input_site);
        let statistics = sites.flat_map(|site| {
            let peaks = outliers.map(|_| Statistic::InputPeaks { site: site.clone() });
            let moment = Statistic::Covariance { site: site.clone() };
            let guide = match self.guide {
                Guide::Nearest => vec![],
                Guide::SecondOrder => vec![moment],
                Guide::Scaling => vec![moment, Statistic::InputMagnitudes { site }],
            };
            guide.into_iter().chain(peaks)
        });
        Ok(Requirements {
            statistics: statistics.collect(),
        })
    }

    fn plan(self, task: &Task<'_>, _: &Budget) -> Result<Plan> {
        let settings = task.settings();
        let (bits, group) = (self.bits(&settings), settings.quantise.group);
        check_group("group", group)?;
        let layers = self.layers(task.model, &settings)?;
        let modules = layers.iter().map(|layer| {
            let odd = |target: &Target| !target.dims[1].is_multiple_of(group);
            let change = match Target::of(layer).iter().find(|target| odd(target)) {
                None if writes_too(task.model, layer) => Change::Leave {
                    reason: "the output is tied to it".to_owned(),
                },
                None => Change::Quantise { bits, group },
                Some(target) => Change::Leave {
                    reason: format!("its rows of {} are not groups of {group}", target.dims[1]),
                },
            };
            ModulePlan {
                path: layer.path.clone(),
                input: layer.input,
                output: layer.output,
                change,
            }
        });
        Ok(Plan {
            method: self.name.to_owned(),
            modules: modules.collect(),
        })
    }

    fn apply(self, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
        let model = task.model;
        let layers: BTreeMap<String, Layer> = Layer::all(model)
            .into_iter()
            .map(|layer| (layer.path.clone(), layer))
            .collect();
        let mut edit = Edit::of(model);
        // Repetitions stay as they were written: nothing about blocks changes.
        edit.spec.blocks.clone_from(&model.spec().blocks);
        let mut modules = Vec::with_capacity(plan.modules.len());
        for planned in &plan.modules {
            let layer = layers.get(&planned.path).filter(|layer| {
                (layer.input, layer.output) == (planned.input, planned.output) && !layer.is_table()
            });
            let layer = layer.ok_or_else(|| {
                let expected = "one of the model's linear layers, for which the plan was made";
                Error::invalid("layer in a plan", &planned.path, expected)
            })?;
            let weights = layer.weights();
            let mut report = ModuleReport::new(planned, weights, weights);
            match planned.change {
                Change::Leave { .. } => {}
                Change::Quantise { bits, group } => {
                    check_planned(layer, bits, group)?;
                    report.chosen = Some(self.round_layer(task, layer, bits, group, &mut edit)?);
                }
                ref other => {
                    return Err(Error::invalid(
                        format!("change of {} in a plan of {}", planned.path, self.name),
                        format!("{other:?}"),
                        "quantise or leave",
                    ));
                }
            }
            modules.push(report);
        }
        Compressed::new(self.name, task, edit.finish()?, modules)
    }

    /// Rounds each matrix of a layer; says what the first that its inputs meet lost.
    fn round_layer(
        self,
        task: &Task<'_>,
        layer: &Layer,
        bits: u32,
        group: usize,
        edit: &mut Edit,
    ) -> Result<LayerErrors> {
        let settings = task.settings().quantise;
        let outliers = self.outliers(task, layer, &settings)?;
        let kind = GridKind {
            bits,
            symmetric: !settings.minima,
            search: settings.search && bits <= 4,
        };
        let mut worst = LayerErrors {
            weighted: 0.0,
            unweighted: 0.0,
            predicted_loss_rise: None,
        };
        for target in Target::of(layer) {
            let Target { name, dims, after } = target;
            let before = match &after {
                Some(after) => Some(original(task.model, after)?),
                None => None,
            };
            let weight = original(task.model, &name)?;
            let weights = engine(engine(weight.flatten_all())?.to_vec1::<f64>())?;
            let inputs = self.inputs(task, layer, before.as_ref())?;
            // What flows between two factors was not looked at.
            let columns: &[usize] = if after.is_none() { &outliers } else { &[] };
            let without = kept::without(&weights, dims, columns);
            let (rounded, input_scale) = match &inputs {
                None => (Rounded::to_nearest(kind, group, dims, &without)?, None),
                Some(Inputs {
                    moment,
                    magnitudes: None,
                }) => {
                    let mut moment = matrix_from_tensor("second moment", moment)?;
                    kept::detach(&mut moment, columns);
                    let damping = settings.damping;
                    let rounded =
                        second_order::round(kind, group, dims, without, &moment, damping)?;
                    (rounded, None)
                }
                Some(Inputs {
                    moment,
                    magnitudes: Some(magnitudes),
                }) => {
                    let scaled = scaling::round(kind, group, dims, &without, magnitudes, moment)?;
                    (scaled.rounded, scaled.input_scale)
                }
            };
            let mut numbers = match &input_scale {
                None => rounded.numbers(),
                Some(scale) => {
                    let columns = scale.iter().cycle();
                    rounded
                        .numbers()
                        .iter()
                        .zip(columns)
                        .map(|(w, r)| w * r)
                        .collect()
                }
            };
            let lost = kept::take_up(&weights, &mut numbers, dims, columns);
            let errors = relative_errors(dims, &weights, &numbers, inputs.as_ref())?;
            worst.weighted = worst.weighted.max(errors.weighted);
            worst.unweighted = worst.unweighted.max(errors.unweighted);
            put(edit, &name, &rounded.pack()?, input_scale, columns, lost)?;
        }
        Ok(worst)
    }

    /// The inputs of a layer that are too large to be multiplied with integers, in rising order.
    fn outliers(
        self,
        task: &Task<'_>,
        layer: &Layer,
        settings: &QuantiseSettings,
    ) -> Result<Vec<usize>> {
        let Some(threshold) = kept::threshold(settings)? else {
            return Ok(Vec::new());
        };
        let site = layer.input_site.clone();
        let peaks = task.calibrated(self.name)?;
        let peaks = peaks.vector(&Statistic::InputPeaks { site })?;
        Ok(kept::columns(&peaks, threshold))
    }

    /// What is known of the inputs of a matrix, where the method asks.
    fn inputs(
        self,
        task: &Task<'_>,
        layer: &Layer,
        before: Option<&Tensor>,
    ) -> Result<Option<Inputs>> {
        if self.guide == Guide::Nearest {
            return Ok(None);
        }
        let calibration = task.calibrated(self.name)?;
        let site = layer.input_site.clone();
        let moment = calibration.tensor(&Statistic::Covariance { site: site.clone() })?;
        let scaling = self.guide == Guide::Scaling;
        let Some(down) = before else {
            let magnitudes = match scaling {
                true => Some(calibration.vector(&Statistic::InputMagnitudes { site })?),
                false => None,
            };
            return Ok(Some(Inputs { moment, magnitudes }));
        };
        // Between two factors flows D x, of second moment D H Dᵀ.
        let inner = engine(down.matmul(&moment))?;
        let inner = engine(inner.matmul(&engine(down.t())?))?;
        let magnitudes = match scaling {
            true => Some(root_diagonal(&inner)?),
            false => None,
        };
        Ok(Some(Inputs {
            moment: inner,
            magnitudes,
        }))
    }
}

fn check_group(what: impl Into<String>, group: usize) -> Result<()> {
    match group > 0 && group.is_multiple_of(32) {
        true => Ok(()),
        false => Err(Error::invalid(what, group, "a multiple of 32")),
    }
}

/// Fails where a plan, which somebody may have written, asks for what cannot be stored.
fn check_planned(layer: &Layer, bits: u32, group: usize) -> Result<()> {
    let of = |what: &str| format!("{what} of {} in a plan", layer.path);
    if !matches!(bits, 4 | 8) {
        return Err(Error::invalid(of("bits"), bits, "4 or 8"));
    }
    check_group(of("group"), group)?;
    let targets = Target::of(layer);
    let odd = targets
        .iter()
        .find(|target| !target.dims[1].is_multiple_of(group));
    match odd {
        None => Ok(()),
        Some(target) => {
            let expected = format!("a divisor of {}, the length of its rows", target.dims[1]);
            Err(Error::invalid(of("group"), group, expected))
        }
    }
}

/// What is known of the inputs of a matrix.
struct Inputs {
    /// `E[x xᵀ]`.
    moment: Tensor,
    /// `E|x|`, for a method that scales by them.
    magnitudes: Option<Vec<f64>>,
}

fn root_diagonal(moment: &Tensor) -> Result<Vec<f64>> {
    let rows = engine(moment.to_vec2::<f64>())?;
    let entries = rows.iter().enumerate();
    Ok(entries
        .filter_map(|(i, row)| row.get(i).map(|x| x.max(0.0).sqrt()))
        .collect())
}

fn relative_errors(
    dims: [usize; 2],
    weights: &[f64],
    numbers: &[f64],
    inputs: Option<&Inputs>,
) -> Result<LayerErrors> {
    let share = |error: f64, whole: f64| match whole > 0.0 {
        true => (error.max(0.0) / whole).sqrt(),
        false => 0.0,
    };
    let errors = weights.iter().zip(numbers).map(|(w, n)| (w - n).powi(2));
    let whole = weights.iter().map(|w| w * w).sum();
    let unweighted = share(errors.sum(), whole);
    let weighted = match inputs {
        None => unweighted,
        Some(inputs) => {
            let zeros = vec![0.0; weights.len()];
            let error = scaling::error_on(dims, weights, numbers, &inputs.moment)?;
            share(
                error,
                scaling::error_on(dims, weights, &zeros, &inputs.moment)?,
            )
        }
    };
    Ok(LayerErrors {
        weighted,
        unweighted,
        predicted_loss_rise: None,
    })
}
