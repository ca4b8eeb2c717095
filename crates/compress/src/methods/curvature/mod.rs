//! Taking the directions of least curvature out of feed-forward weights (From Memorization to
//! Reasoning in the Spectrum of Loss Curvature, 2025, Goodfire): what the model recites word for
//! word lies there more than what it can do.
//!
//! With the Kronecker factors `A = V diag(μ) Vᵀ` of a layer's inputs and `G = U diag(λ) Uᵀ` of
//! the gradients at its outputs, the loss curves by `λ_i μ_j` along the direction `u_i v_jᵀ` of
//! its weight. In this basis the weight is
//!
//! ```text
//! C = Uᵀ W V,     W' = U (C ⊙ 1_S) Vᵀ
//! ```
//!
//! and `S` is the smallest set of pairs, those of most curvature first, that carries a share `ρ`
//! of all curvature `Σλ Σμ`. Shapes stay, so that the checkpoint loads anywhere. The rectangle
//! of a truncation on both sides by themselves (`curvature-rectangle`) is what it is compared
//! with.

mod bands;
mod factors;
mod select;
mod subnet;

pub use bands::{Spectrum, correlation};
pub use factors::{Factors, factors};
pub use subnet::Subnet;

use lapidary_factor::{Matrix, matrix_from_tensor, matrix_to_tensor, symmetric_eigen};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;

use crate::ahead::Refused;
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::{Error, Requirements, Result, Selection};

/// The edit by products.
pub(crate) const CURVATURE: Method = Method {
    name: "curvature",
    summary: "Takes directions of least curvature out of feed-forward weights (K-FAC)",
    source: "Merullo et al. 2025, arXiv 2510.24256",
    schedule: Schedule::OneShot,
    effect: Effect::Directions,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements,
    plan: |task, budget| plan(CURVATURE.name, task, budget),
    apply: |task, plan| apply(CURVATURE.name, task, plan, Keep::Staircase),
    cut: None,
};

/// The edit by both sides alone.
pub(crate) const CURVATURE_RECTANGLE: Method = Method {
    name: "curvature-rectangle",
    summary: "The same, inputs and outputs truncated by themselves",
    source: "ablation of Merullo et al. 2025, arXiv 2510.24256",
    schedule: Schedule::OneShot,
    effect: Effect::Directions,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements,
    plan: |task, budget| plan(CURVATURE_RECTANGLE.name, task, budget),
    apply: |task, plan| apply(CURVATURE_RECTANGLE.name, task, plan, Keep::Rectangle),
    cut: None,
};

/// Which pairs of directions stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Those of the largest products of curvature.
    Staircase,
    /// The first inputs with the first outputs.
    Rectangle,
}

/// One weight in the basis of its curvature.
pub struct Curved {
    /// `U`, `[output, output]`, most curvature first.
    outputs: Matrix,
    /// `V`, `[input, input]`, most curvature first.
    inputs: Matrix,
    /// `λ`.
    output_curvature: Vec<f64>,
    /// `μ`.
    input_curvature: Vec<f64>,
    /// `C = Uᵀ W V`.
    coefficients: Matrix,
}

impl Curved {
    /// Decomposes the factors of a weight `[output, input]`.
    ///
    /// # Errors
    /// When they are not symmetric, or of another size than the weight.
    pub fn new(weight: &Tensor, factors: &Factors) -> Result<Self> {
        let weight = matrix_from_tensor("weight", weight)?;
        let (outputs, output_curvature) = falling("output factor", &factors.output)?;
        let (inputs, input_curvature) = falling("input factor", &factors.input)?;
        if (outputs.nrows(), inputs.nrows()) != (weight.nrows(), weight.ncols()) {
            return Err(Error::invalid(
                "factors",
                format!(
                    "of {} outputs and {} inputs",
                    outputs.nrows(),
                    inputs.nrows()
                ),
                format!("{} and {}", weight.nrows(), weight.ncols()),
            ));
        }
        Ok(Self {
            coefficients: outputs.transpose() * &weight * &inputs,
            outputs,
            inputs,
            output_curvature,
            input_curvature,
        })
    }

    /// Of each output direction, how many input directions carry `mass` of the curvature.
    pub fn kept(&self, mass: f64, keep: Keep) -> Vec<usize> {
        let select = match keep {
            Keep::Staircase => select::staircase,
            Keep::Rectangle => select::rectangle,
        };
        select(&self.output_curvature, &self.input_curvature, mass)
    }

    /// Every pair of directions with its share `C_ij²` of the weight's energy.
    pub fn energies(&self) -> Vec<(usize, usize, f64)> {
        let (rows, columns) = (self.coefficients.nrows(), self.coefficients.ncols());
        let pairs = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
        pairs
            .map(|(i, j)| (i, j, self.coefficients[(i, j)].powi(2)))
            .collect()
    }

    /// The weight without these pairs of directions, in `f64`.
    ///
    /// # Errors
    /// When a pair is not one of the weight's.
    pub fn without(&self, removed: &[(usize, usize)]) -> Result<Tensor> {
        let mut chosen = self.coefficients.clone();
        for &(i, j) in removed {
            if i >= chosen.nrows() || j >= chosen.ncols() {
                let expected = format!("below ({}, {})", chosen.nrows(), chosen.ncols());
                return Err(Error::invalid(
                    "a pair of directions",
                    format!("({i}, {j})"),
                    expected,
                ));
            }
            chosen[(i, j)] = 0.0;
        }
        self.written(&chosen)
    }

    /// `U (C ⊙ 1_S) Vᵀ` in `f64`, with the first `kept[i]` input directions of output direction
    /// `i` in `S`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn edited(&self, kept: &[usize]) -> Result<Tensor> {
        let (rows, columns) = (self.coefficients.nrows(), self.coefficients.ncols());
        let chosen = Matrix::from_fn(rows, columns, |i, j| {
            match kept.get(i).is_some_and(|count| j < *count) {
                true => self.coefficients[(i, j)],
                false => 0.0,
            }
        });
        self.written(&chosen)
    }

    /// `‖W − W'‖²` of that edit: the squares of the coefficients that go.
    pub fn removed(&self, kept: &[usize]) -> f64 {
        let from = |i: usize| kept.get(i).copied().unwrap_or(0);
        let columns = self.coefficients.ncols();
        let row = |i: usize| (from(i)..columns).map(move |j| self.coefficients[(i, j)].powi(2));
        (0..self.coefficients.nrows()).flat_map(row).sum()
    }

    /// `U C Vᵀ`.
    fn written(&self, coefficients: &Matrix) -> Result<Tensor> {
        let weight = &self.outputs * coefficients * self.inputs.transpose();
        Ok(matrix_to_tensor(
            weight.as_ref(),
            DType::F64,
            &lapidary_kernels::Device::Cpu,
        )?)
    }
}

/// Eigenvectors as columns with eigenvalues, the largest first, none below zero.
fn falling(name: &'static str, factor: &Tensor) -> Result<(Matrix, Vec<f64>)> {
    let eigen = symmetric_eigen(name, matrix_from_tensor(name, factor)?.as_ref())?;
    let values = eigen.values.iter().rev().map(|value| value.max(0.0));
    let vectors = &eigen.vectors;
    let last = vectors.ncols().saturating_sub(1);
    let reversed = Matrix::from_fn(vectors.nrows(), vectors.ncols(), |i, j| {
        vectors[(i, last - j)]
    });
    Ok((reversed, values.collect()))
}

fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
    factors::check_head(model)?;
    chosen(model, &settings.selection)?;
    Ok(Requirements::default())
}

/// The chosen layers that are linear layers of a feed-forward part, and their blocks.
fn chosen(model: &Model, selection: &Selection) -> Result<(Vec<crate::Layer>, Vec<usize>)> {
    let mut layers = selection.chosen(model)?;
    layers.retain(|layer| layer.path.contains(".feedforward."));
    let blocks = bands::blocks(layers.iter().map(|layer| &layer.path));
    let all = factors::layers(model, &blocks)?;
    layers.retain(|layer| all.contains(&layer.path));
    match layers.is_empty() {
        false => Ok((layers, blocks)),
        true => Err(Error::invalid(
            "chosen layers in feed-forward parts",
            0,
            "at least one for K-FAC; whitened and second-order take others",
        )),
    }
}

fn plan(method: &str, task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let mass = budget.share(method)?;
    let (layers, _) = chosen(task.model, &task.settings().selection)?;
    let module = |layer: crate::Layer| ModulePlan {
        change: Change::Edit { mass },
        path: layer.path,
        input: layer.input,
        output: layer.output,
    };
    Ok(Plan {
        method: method.to_owned(),
        modules: layers.into_iter().map(module).collect(),
    })
}

fn apply(method: &'static str, task: &Task<'_>, plan: &Plan, keep: Keep) -> Result<Compressed> {
    let settings = task.settings();
    let blocks = bands::blocks(plan.changed().map(|module| &module.path));
    let data = task.observed(method)?;
    let factors = factors(task.model, data, &blocks, settings.batch, settings.seed)?;
    let mut edit = Edit::of(task.model);
    let mut modules = Vec::new();
    for planned in &plan.modules {
        let weights = planned.input * planned.output;
        let mut report = ModuleReport::new(planned, weights, weights);
        match planned.change {
            Change::Leave { .. } => {}
            Change::Edit { mass } if (0.0..=1.0).contains(&mass) => {
                let name = format!("{}.weight", planned.path);
                let found = factors.get(&planned.path).ok_or_else(|| {
                    Error::invalid("plan", &planned.path, "of layers of feed-forward parts")
                })?;
                let weight = edit.get(&name)?;
                let curved = Curved::new(&weight, found)?;
                let kept = curved.kept(mass, keep);
                // All of it is the weight itself, to the bit.
                if mass < 1.0 {
                    let edited = curved.edited(&kept)?;
                    report.note = Some(format!(
                        "{} of {weights} directions stay, {:.1} % of the weight's energy",
                        kept.iter().sum::<usize>(),
                        100.0 * energy(&edited)? / energy(&weight)?.max(f64::MIN_POSITIVE)
                    ));
                    edit.put(name, &engine(edited.to_device(&task.model.device()))?)?;
                }
            }
            ref other => {
                return Err(Error::invalid(
                    format!("change of {} in a plan of {method}", planned.path),
                    format!("{other:?}"),
                    "edit, of a mass from 0 to 1, or leave",
                ));
            }
        }
        modules.push(report);
    }
    Compressed::new(method, task, edit.finish()?, modules)
}

/// `‖W‖²`.
fn energy(weight: &Tensor) -> Result<f64> {
    engine(engine(engine(weight.sqr())?.sum_all())?.to_scalar::<f64>())
}
