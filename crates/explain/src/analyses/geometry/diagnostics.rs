//! The diagnostics of one site.

use super::decomposition::{Decomposition, Energy};
use super::smoothness::{frequencies, gram, low_frequency_share, truncation_errors};
use super::spectrum::{RankEstimate, estimate_rank, explained_ratio, stable_rank};
use crate::{Error, Result};
use lapidary_factor::{Matrix, symmetric_eigen, thin_svd};

/// Directions that contexts are projected to before topics are compared.
const COMPONENTS: usize = 20;

/// What the diagnostics are told.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The most that ScreeNOT takes the rank for.
    pub rank: usize,
    /// `K`: how many frequencies count as low.
    pub frequencies: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            rank: 20,
            frequencies: 10,
        }
    }
}

/// What one site's position and context vectors look like. `P` is the matrix of the position
/// vectors, with singular values `s`.
#[derive(Clone, Debug)]
pub struct Diagnostics {
    /// Position vectors that stand out of the noise.
    pub rank: RankEstimate,
    /// `Σ s² / s_1²`.
    pub stable_rank: f64,
    /// `Σ_{i ≤ rank} s_i / Σ s_i`.
    pub explained_ratio: f64,
    /// `‖P repeated for every context‖ / ‖M‖` in the operator norm, `M` all states with their
    /// mean.
    pub relative_norm: f64,
    /// The same with the mean taken out of `M`.
    pub relative_norm_centred: f64,
    /// Largest `|cos(pos_t, ctx_c)|`.
    pub incoherence_most: f64,
    /// Mean `|cos(pos_t, ctx_c)|`.
    pub incoherence: f64,
    /// Share of the Gram matrix of `P` in the lowest frequencies.
    pub smoothness: f64,
    /// Error of the Gram matrix cut off at 1, 2, 4, … frequencies.
    pub truncation: Vec<(usize, f64)>,
    /// `s`, largest first.
    pub singular_values: Vec<f64>,
    /// The three leading principal coordinates of each `pos_t`; each turned so that its largest
    /// entry is positive.
    pub spiral: Vec<[f64; 3]>,
    /// What each part has of the variance.
    pub energy: Energy,
}

impl Diagnostics {
    /// Measures a decomposition.
    ///
    /// # Errors
    /// When a factorisation does not converge.
    pub fn of(decomposition: &Decomposition, bounds: Bounds) -> Result<Self> {
        let positions = &decomposition.positions;
        let svd = thin_svd(positions.as_ref())?;
        let s = svd.s.clone();
        let rank = estimate_rank(&s, positions.nrows(), positions.ncols(), bounds.rank);
        let gram = frequencies(&gram(positions));
        let cutoffs: Vec<usize> = std::iter::successors(Some(1), |k| Some(2 * k))
            .take_while(|k| *k < gram.nrows())
            .collect();
        let errors = truncation_errors(&gram, &cutoffs);
        let (incoherence, incoherence_most) = cosines(positions, &decomposition.contexts);
        let (relative_norm, relative_norm_centred) =
            relative_norms(decomposition, s.first().copied().unwrap_or(0.0))?;
        let mut spiral = vec![[0.0; 3]; positions.nrows()];
        for component in 0..s.len().min(3) {
            let column = |t: usize| svd.u[(t, component)] * s[component];
            let largest = (0..positions.nrows())
                .map(column)
                .fold(
                    0.0,
                    |most: f64, x| if x.abs() > most.abs() { x } else { most },
                );
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            for (t, point) in spiral.iter_mut().enumerate() {
                point[component] = sign * column(t);
            }
        }
        Ok(Self {
            rank,
            stable_rank: stable_rank(&s),
            explained_ratio: explained_ratio(&s, rank.rank),
            relative_norm,
            relative_norm_centred,
            incoherence_most,
            incoherence,
            smoothness: low_frequency_share(&gram, bounds.frequencies),
            truncation: cutoffs.into_iter().zip(errors).collect(),
            singular_values: s,
            spiral,
            energy: decomposition.energy(),
        })
    }
}

/// Both relative norms. With `C` contexts, `‖P repeated‖ = √C s_1`, and `‖M‖² ` is the largest
/// eigenvalue of `Σ h hᵀ`.
fn relative_norms(decomposition: &Decomposition, largest: f64) -> Result<(f64, f64)> {
    let contexts = decomposition.contexts.nrows() as f64;
    let count = contexts * decomposition.positions.nrows() as f64;
    let mean = &decomposition.mean;
    let squares = &decomposition.squares;
    let centred = Matrix::from_fn(mean.len(), mean.len(), |i, j| {
        squares[(i, j)] - count * mean[i] * mean[j]
    });
    let repeated = contexts.sqrt() * largest;
    let against = |squares: &Matrix| -> Result<f64> {
        let eigen = symmetric_eigen("squares of hidden states", squares.as_ref())?;
        let norm = eigen.values.last().copied().unwrap_or(0.0).max(0.0).sqrt();
        Ok(if norm == 0.0 { 0.0 } else { repeated / norm })
    };
    Ok((against(squares)?, against(&centred)?))
}

/// Mean and largest `|cos|` between the rows of two matrices; rows of zeros are left out.
fn cosines(a: &Matrix, b: &Matrix) -> (f64, f64) {
    let (a, b) = (unit_rows(a), unit_rows(b));
    let products = &a * b.transpose();
    let (mut sum, mut count, mut most) = (0.0, 0usize, 0.0f64);
    for i in 0..a.nrows() {
        for j in 0..b.nrows() {
            let cosine = products[(i, j)].abs();
            sum += cosine;
            count += 1;
            most = most.max(cosine);
        }
    }
    (sum / count.max(1) as f64, most)
}

/// The rows that are not zero, at length one.
fn unit_rows(matrix: &Matrix) -> Matrix {
    let lengths: Vec<(usize, f64)> = (0..matrix.nrows())
        .map(|row| (row, matrix.row(row).norm_l2()))
        .filter(|(_, norm)| *norm > 0.0)
        .collect();
    Matrix::from_fn(lengths.len(), matrix.ncols(), |index, i| {
        let (row, norm) = lengths[index];
        matrix[(row, i)] / norm
    })
}

/// How alike the context vectors of one topic are: mean `|cos|` over pairs of different contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Topics {
    /// Pairs of the same topic.
    pub within: f64,
    /// Pairs of different topics.
    pub between: f64,
    /// As `within`, of the 20 leading principal coordinates.
    pub within_projected: f64,
    /// As `between`, of the 20 leading principal coordinates.
    pub between_projected: f64,
}

/// The topic structure of context vectors `[contexts, width]`; `labels` has each context's topic.
///
/// # Errors
/// When there is not one label for each context.
pub fn topics(contexts: &Matrix, labels: &[usize]) -> Result<Topics> {
    if labels.len() != contexts.nrows() {
        return Err(Error::invalid(
            "number of topic labels",
            labels.len(),
            format!("{}, one for each context", contexts.nrows()),
        ));
    }
    let svd = thin_svd(contexts.as_ref())?;
    let kept = svd.s.len().min(COMPONENTS);
    let projected = Matrix::from_fn(contexts.nrows(), kept, |c, k| svd.u[(c, k)] * svd.s[k]);
    let (within, between) = likeness(contexts, labels);
    let (within_projected, between_projected) = likeness(&projected, labels);
    Ok(Topics {
        within,
        between,
        within_projected,
        between_projected,
    })
}

fn likeness(contexts: &Matrix, labels: &[usize]) -> (f64, f64) {
    let cosines = super::smoothness::gram(contexts);
    let mut sums = [(0.0, 0usize); 2];
    for (i, label) in labels.iter().enumerate() {
        for (j, other) in labels.iter().enumerate().skip(i + 1) {
            let (sum, count) = &mut sums[usize::from(label != other)];
            *sum += cosines[(i, j)].abs();
            *count += 1;
        }
    }
    let [within, between] = sums.map(|(sum, count)| sum / count.max(1) as f64);
    (within, between)
}
