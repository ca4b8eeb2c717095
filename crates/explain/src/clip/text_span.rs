//! TextSpan: the few texts whose directions hold most of what a head says (algorithm 1 of the
//! paper).
//!
//! With the outputs `C` `[images, features]` and the texts `R` `[texts, features]`, `R` is
//! projected onto the leading right singular vectors of `C`, `C` is centred, and `m` times the
//! text along which `C` varies most is chosen and taken out of both:
//!
//! ```text
//! j* = argmax_j std(C R_j),   t = R_j*,   C ← C − (C t / t·t) tᵀ,   R ← R − (R t / t·t) tᵀ
//! ```
//!
//! `t` lies in the span of the `r` singular vectors, and what is left of a text is orthogonal to
//! every `t` before it. So `std²(C R_j) = R_jᵀ S R_j` with the covariance `S` of the outputs as
//! they were at first, in the `r` coordinates of that span: `S R_j` is made once for each text,
//! and both change by an outer product with each choice. That is `O(texts · r)` for a choice,
//! where the products of outputs and texts would take `O(images · texts · features)`.

use crate::{Error, Result};
use lapidary_factor::{Matrix, MatrixView, thin_svd};

/// A text of which less than this share of its squared length is left says nothing new: the rest
/// is rounding.
const NOTHING_LEFT: f64 = 1e-18;

/// Outputs that vary by less than this share of their variance have been explained.
const EXPLAINED: f64 = 1e-20;

/// The texts that span a head's outputs.
#[derive(Clone, Debug)]
pub struct TextSpan {
    /// The chosen texts, by their row.
    pub texts: Vec<usize>,
    /// Share of the outputs' variance that each holds.
    pub shares: Vec<f64>,
    /// Their directions `t`, orthogonal to each other: `[chosen, features]`.
    pub directions: Matrix,
    /// Mean of the outputs, `[features]`.
    pub mean: Vec<f64>,
    /// Sum of the squared deviations of the outputs from their mean.
    pub deviation: f64,
}

impl TextSpan {
    /// Share of the variance that all chosen texts hold.
    pub fn explained(&self) -> f64 {
        self.shares.iter().sum()
    }

    /// `outputs` rebuilt from the mean and the directions: `[images, features]`.
    pub fn reconstruct(&self, outputs: MatrixView<'_>) -> Matrix {
        let mean = |_: usize, j: usize| self.mean.get(j).copied().unwrap_or(0.0);
        let mean = Matrix::from_fn(outputs.nrows(), outputs.ncols(), mean);
        let centred = outputs - &mean;
        let mut along = centred * self.directions.transpose();
        for choice in 0..self.directions.nrows() {
            let square = self.directions.row(choice).squared_norm_l2();
            for image in 0..along.nrows() {
                along[(image, choice)] /= square;
            }
        }
        mean + along * &self.directions
    }
}

/// Chooses up to `count` of `texts` `[texts, features]` that span `outputs` `[images, features]`,
/// after projecting them onto the `rank` leading directions of the outputs (the head's width,
/// for a head). Fewer are chosen when nothing is left to explain, or no text says anything new.
///
/// Source: algorithm 1 of Gandelsman et al., arXiv 2310.05916. Cost: an SVD of the outputs,
/// `O(texts · rank · (features + rank))`, and `O(texts · rank)` for each choice.
///
/// # Errors
/// When the features differ, there are no outputs or texts, or an entry is not finite.
///
/// ```
/// use lapidary_explain::clip::text_span;
/// use lapidary_factor::Matrix;
///
/// // Varies along the second axis most, and not at all along the third.
/// let outputs = Matrix::from_fn(4, 3, |i, j| [0.1, 5.0, 0.0][j] * [1.0, -1.0, 2.0, 0.5][(i + j) % 4]);
/// let texts = Matrix::identity(3, 3);
/// let span = text_span(outputs.as_ref(), texts.as_ref(), 3, 3)?;
/// assert_eq!(span.texts, [1, 0]);
/// assert!((span.explained() - 1.0).abs() < 1e-12);
/// # Ok::<(), lapidary_explain::Error>(())
/// ```
pub fn text_span(
    outputs: MatrixView<'_>,
    texts: MatrixView<'_>,
    rank: usize,
    count: usize,
) -> Result<TextSpan> {
    check(outputs, texts, rank)?;
    let (images, features) = (outputs.nrows(), outputs.ncols());
    let svd = thin_svd(outputs)?;
    let rank = rank.min(svd.s.len());
    let span = svd.vt.as_ref().subrows(0, rank);

    let mean: Vec<f64> = (0..features)
        .map(|j| outputs.col(j).iter().sum::<f64>() / images as f64)
        .collect();
    let at = |j: usize| mean.get(j).copied().unwrap_or(0.0);
    let centred = Matrix::from_fn(images, features, |i, j| outputs[(i, j)] - at(j));
    let deviation = centred.squared_norm_l2();

    // In the coordinates of the span: outputs, their covariance (times the images), and texts.
    let within = &centred * span.transpose();
    let covariance = within.transpose() * &within;
    let mut left = texts * span.transpose();
    let whole: Vec<f64> = (0..texts.nrows())
        .map(|row| left.row(row).squared_norm_l2())
        .collect();
    let mut turned = &left * &covariance;

    let mut chosen: Vec<usize> = Vec::new();
    let mut shares = Vec::new();
    let mut directions: Vec<Vec<f64>> = Vec::new();
    while chosen.len() < count {
        let best = (0..texts.nrows())
            .filter(|row| {
                let square = left.row(*row).squared_norm_l2();
                square > NOTHING_LEFT * whole.get(*row).copied().unwrap_or(0.0)
            })
            .map(|row| (row, dot(&left, &turned, row)))
            // The first of equal ones.
            .fold(None, |best: Option<(usize, f64)>, one| match best {
                Some(best) if best.1 >= one.1 => Some(best),
                _ => Some(one),
            });
        let Some((text, variance)) = best else { break };
        let mut direction: Vec<f64> = left.row(text).iter().copied().collect();
        // Once more, so that rounding does not add up over the choices.
        for earlier in &directions {
            let share = product(&direction, earlier) / product(earlier, earlier);
            for (entry, other) in direction.iter_mut().zip(earlier) {
                *entry -= share * other;
            }
        }
        let square = product(&direction, &direction);
        let held = variance / square;
        if !(square > 0.0 && held > EXPLAINED * deviation) {
            break;
        }
        let t = Matrix::from_fn(rank, 1, |i, _| direction.get(i).copied().unwrap_or(0.0));
        let along = (&left * &t) * (1.0 / square);
        let image = &covariance * &t;
        left -= &along * t.transpose();
        turned -= &along * image.transpose();
        chosen.push(text);
        shares.push(held / deviation);
        directions.push(direction);
    }
    let coordinates = Matrix::from_fn(directions.len(), rank, |i, j| {
        directions
            .get(i)
            .and_then(|d| d.get(j))
            .copied()
            .unwrap_or(0.0)
    });
    Ok(TextSpan {
        texts: chosen,
        shares,
        directions: coordinates * span,
        mean,
        deviation,
    })
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn dot(a: &Matrix, b: &Matrix, row: usize) -> f64 {
    let both = a.row(row).iter().zip(b.row(row).iter());
    both.map(|(a, b)| a * b).sum()
}

fn check(outputs: MatrixView<'_>, texts: MatrixView<'_>, rank: usize) -> Result<()> {
    let shape = |matrix: MatrixView<'_>| format!("[{}, {}]", matrix.nrows(), matrix.ncols());
    if outputs.nrows() == 0 || outputs.ncols() == 0 {
        let expected = "[images, features], at least one of each";
        return Err(Error::invalid("outputs", shape(outputs), expected));
    }
    if texts.nrows() == 0 || texts.ncols() != outputs.ncols() {
        let expected = format!("[texts, {}], at least one text", outputs.ncols());
        return Err(Error::invalid("texts", shape(texts), expected));
    }
    if rank == 0 {
        return Err(Error::invalid("rank", 0, "at least 1"));
    }
    for (what, matrix) in [("outputs", outputs), ("texts", texts)] {
        if !matrix.norm_l2().is_finite() {
            return Err(Error::invalid(what, "not finite", "finite numbers"));
        }
    }
    Ok(())
}
