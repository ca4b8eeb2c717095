//! Hidden states as a two-way analysis of variance over contexts `c` and positions `t`:
//!
//! `h_{c,t} = μ + pos_t + ctx_c + resid_{c,t}`,
//! `μ = mean_{c,t} h`, `pos_t = mean_c h_{c,t} − μ`, `ctx_c = mean_t h_{c,t} − μ`.
//!
//! The four are orthogonal: the sums of squares over all `(c, t)` add up.

use crate::error::engine;
use crate::{Error, Result};
use lapidary_factor::{Matrix, matrix_from_tensor};
use lapidary_kernels::{DType, Tensor};

/// Sums over hidden states, in `f64`, from which the decomposition follows. States are added a
/// few contexts at a time; what was added in two places can be merged.
#[derive(Clone, Debug)]
pub struct Sums {
    /// Contexts to keep whole.
    keep: usize,
    found: Option<Found>,
}

#[derive(Clone, Debug)]
struct Found {
    /// `Σ_c h_{c,t}`, `[positions, width]`.
    by_position: Tensor,
    /// `Σ_t h_{c,t}`, each `[contexts, width]`.
    by_context: Vec<Tensor>,
    /// `Σ_{c,t} h hᵀ`, `[width, width]`.
    squares: Tensor,
    /// The first contexts, `[positions, width]` each.
    kept: Vec<Tensor>,
}

impl Sums {
    /// Nothing yet; the first `keep` contexts will be kept whole, for what needs residuals.
    pub fn new(keep: usize) -> Self {
        Self { keep, found: None }
    }

    /// Adds states `[contexts, positions, width]`.
    ///
    /// # Errors
    /// When positions or width are not those of the states before.
    pub fn add(&mut self, hidden: &Tensor) -> Result<()> {
        let hidden = engine(engine(hidden.detach().to_dtype(DType::F64))?.contiguous())?;
        let (contexts, positions, width) = engine(hidden.dims3())?;
        let flat = engine(hidden.reshape((contexts * positions, width)))?;
        let mut kept = Vec::new();
        for context in 0..contexts.min(self.keep) {
            // Laid out anew, so that a kept context does not hold its whole batch.
            kept.push(engine(engine(hidden.get(context))?.force_contiguous())?);
        }
        self.merge(Self {
            keep: self.keep,
            found: Some(Found {
                by_position: engine(hidden.sum(0))?,
                by_context: vec![engine(hidden.sum(1))?],
                squares: engine(engine(engine(flat.t())?.contiguous())?.matmul(&flat))?,
                kept,
            }),
        })
    }

    /// Adds what another shard found; its contexts come after these.
    ///
    /// # Errors
    /// When positions or width differ.
    pub fn merge(&mut self, later: Self) -> Result<()> {
        let Some(later) = later.found else {
            return Ok(());
        };
        let Some(found) = &mut self.found else {
            self.found = Some(later);
            return Ok(());
        };
        if found.by_position.dims() != later.by_position.dims() {
            return Err(Error::invalid(
                "positions and width of hidden states",
                format!("{:?}", later.by_position.dims()),
                format!("{:?}, as before", found.by_position.dims()),
            ));
        }
        found.by_position = engine(&found.by_position + &later.by_position)?;
        found.squares = engine(&found.squares + &later.squares)?;
        found.by_context.extend(later.by_context);
        found.kept.extend(later.kept);
        found.kept.truncate(self.keep);
        Ok(())
    }

    /// The decomposition of everything added.
    ///
    /// # Errors
    /// When nothing was added, or a state is not finite.
    pub fn finish(&self) -> Result<Decomposition> {
        let Some(found) = &self.found else {
            return Err(Error::invalid(
                "number of contexts",
                0,
                "at least 1 to be decomposed",
            ));
        };
        let by_position = matrix_from_tensor("sums by position", &found.by_position)?;
        let all = engine(Tensor::cat(&found.by_context, 0))?;
        let by_context = matrix_from_tensor("sums by context", &all)?;
        let (positions, width) = (by_position.nrows(), by_position.ncols());
        let contexts = by_context.nrows();
        let count = (contexts * positions) as f64;
        let mean: Vec<f64> = (0..width)
            .map(|i| by_position.col(i).iter().sum::<f64>() / count)
            .collect();
        let centred = |sums: &Matrix, each: usize| {
            Matrix::from_fn(sums.nrows(), width, |row, i| {
                sums[(row, i)] / each as f64 - mean[i]
            })
        };
        let mut kept = Vec::with_capacity(found.kept.len());
        for context in &found.kept {
            kept.push(matrix_from_tensor("hidden states", context)?);
        }
        Ok(Decomposition {
            positions: centred(&by_position, contexts),
            contexts: centred(&by_context, positions),
            squares: matrix_from_tensor("squares of hidden states", &found.squares)?,
            mean,
            kept,
        })
    }
}

/// Hidden states of one site, decomposed.
#[derive(Clone, Debug)]
pub struct Decomposition {
    /// `μ`, `[width]`.
    pub mean: Vec<f64>,
    /// `pos_t`, `[positions, width]`.
    pub positions: Matrix,
    /// `ctx_c`, `[contexts, width]`.
    pub contexts: Matrix,
    /// `Σ_{c,t} h hᵀ`, `[width, width]`.
    pub squares: Matrix,
    /// `h` of the first contexts, `[positions, width]` each.
    pub kept: Vec<Matrix>,
}

/// Sums of squares over all contexts and positions, which add up: `total = positions + contexts
/// + residual`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Energy {
    /// `Σ ‖h − μ‖²`.
    pub total: f64,
    /// `C Σ_t ‖pos_t‖²`.
    pub positions: f64,
    /// `T Σ_c ‖ctx_c‖²`.
    pub contexts: f64,
    /// `Σ ‖resid‖²`: the rest.
    pub residual: f64,
}

impl Decomposition {
    /// The decomposition of states `[contexts, positions, width]` held at once, all of them kept.
    pub fn of(hidden: &Tensor) -> Result<Self> {
        let mut sums = Sums::new(engine(hidden.dim(0))?);
        sums.add(hidden)?;
        sums.finish()
    }

    /// `h − μ − pos_t = ctx_c + resid_{c,t}` of a kept context, `[positions, width]`.
    pub fn without_position(&self, context: usize) -> Result<Matrix> {
        let kept = self.kept(context)?;
        Ok(Matrix::from_fn(kept.nrows(), kept.ncols(), |t, i| {
            kept[(t, i)] - self.mean[i] - self.positions[(t, i)]
        }))
    }

    /// `resid_{c,t}` of a kept context, `[positions, width]`.
    pub fn residual(&self, context: usize) -> Result<Matrix> {
        let rest = self.without_position(context)?;
        Ok(Matrix::from_fn(rest.nrows(), rest.ncols(), |t, i| {
            rest[(t, i)] - self.contexts[(context, i)]
        }))
    }

    /// `h` of a kept context, `[positions, width]`.
    pub fn kept(&self, context: usize) -> Result<&Matrix> {
        self.kept.get(context).ok_or_else(|| {
            Error::invalid(
                "context",
                context,
                format!(
                    "below {}, the contexts that were kept whole",
                    self.kept.len()
                ),
            )
        })
    }

    /// What each part has of the variance.
    pub fn energy(&self) -> Energy {
        let square = |matrix: &Matrix| matrix.norm_l2().powi(2);
        let (contexts, positions) = (self.contexts.nrows() as f64, self.positions.nrows() as f64);
        let of_mean: f64 = self.mean.iter().map(|m| m * m).sum();
        let all: f64 = (0..self.squares.nrows())
            .map(|i| self.squares[(i, i)])
            .sum();
        let total = all - contexts * positions * of_mean;
        let of_positions = contexts * square(&self.positions);
        let of_contexts = positions * square(&self.contexts);
        Energy {
            total,
            positions: of_positions,
            contexts: of_contexts,
            residual: total - of_positions - of_contexts,
        }
    }
}
