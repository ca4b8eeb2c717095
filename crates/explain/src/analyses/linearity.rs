//! How nearly linear each block is (Razzhigaev et al., Your Transformer is Secretly Linear, 2024,
//! arXiv 2405.12250).
//!
//! With `X` and `Y` the residual stream before and behind a block, rows being tokens,
//!
//! ```text
//! score = 1 − min_{A,b} ‖X A + b − Y‖² / ‖Y − mean Y‖²
//! ```
//!
//! is the share of the variance of `Y` that one linear map explains. Where a block adds little to
//! the stream the score is high whatever it adds, since `A = I` already leaves no more than what
//! it adds: `score ≥ 1 − ‖U_c‖² / ‖Y_c‖²`, `U = Y − X`. The *residual-free* score is that of `U`
//! by itself.
//!
//! With few tokens every score is 1. Each is therefore also taken of the map that every other
//! window gives, on the windows between them, where a map that learned the noise scores less.

use crate::error::engine;
use crate::report::{Cell, Plot, Report, Series, Table};
use crate::{Error, Result};
use lapidary_factor::{Matrix, Regression, matrix_from_tensor, nearest_distances};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

/// Most tokens whose neighbours are looked for.
const MOST_NEIGHBOURS: usize = 1000;

/// Tokens for each feature below which scores in the sample say little.
const ENOUGH: usize = 8;

/// How linear one block is, and what its output looks like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linearity {
    /// Share of the variance of the stream behind the block that a linear map of the stream before
    /// it explains.
    pub score: f64,
    /// The same on windows that the map was not fitted to.
    pub held_out: f64,
    /// Share of the variance of what the block adds; nothing where it adds nothing that varies.
    pub residual_free: Option<f64>,
    /// The same on windows that the map was not fitted to.
    pub residual_free_held_out: Option<f64>,
    /// Share that the best rotation and scale explain.
    pub rotation: Option<f64>,
    /// Mean of `‖y − x‖ / ‖x‖` over tokens.
    pub contribution: f64,
    /// Mean of `cos(x, y)` over tokens.
    pub cosine: f64,
    /// `σ₁² / Σ σ²` of the centred stream behind the block: `1 / width` when all directions are
    /// alike, 1 when there is one.
    pub anisotropy: Option<f64>,
    /// Dimension of the stream behind the block, by the two nearest neighbours of tokens.
    pub dimension: Option<f64>,
}

/// One block's sums.
struct Sums {
    /// Regression of what the block adds on what it reads: of all windows, the even and the odd.
    all: Regression,
    halves: [Regression; 2],
    /// The stream behind, against itself, for its directions.
    behind: Regression,
    contribution: f64,
    cosine: f64,
    /// Rows of the stream behind, of the tokens whose neighbours are looked for.
    kept: Vec<Vec<f64>>,
}

impl Sums {
    fn new(width: usize) -> Self {
        let fresh = || Regression::with_intercept(width, width);
        Self {
            all: fresh(),
            halves: [fresh(), fresh()],
            behind: Regression::with_intercept(width, 0),
            contribution: 0.0,
            cosine: 0.0,
            kept: Vec::new(),
        }
    }

    /// Adds one window: `x` before and `y` behind the block, `[tokens, width]`; rows of `y` are kept
    /// of the `chosen` ones of all tokens.
    fn add(
        &mut self,
        window: usize,
        x: &Matrix,
        y: &Matrix,
        chosen: &BTreeSet<usize>,
    ) -> Result<()> {
        let added = y - x;
        let before = self.all.rows();
        self.all.add(x.as_ref(), added.as_ref())?;
        if let Some(half) = self.halves.get_mut(window % 2) {
            half.add(x.as_ref(), added.as_ref())?;
        }
        self.behind
            .add(y.as_ref(), Matrix::zeros(y.nrows(), 0).as_ref())?;
        for token in 0..x.nrows() {
            let (read, behind) = (x.row(token), y.row(token));
            let lengths = [read.norm_l2(), behind.norm_l2()];
            if lengths[0] > 0.0 {
                self.contribution += added.row(token).norm_l2() / lengths[0];
            }
            if lengths[0] * lengths[1] > 0.0 {
                self.cosine += read * behind.transpose() / (lengths[0] * lengths[1]);
            }
            if chosen.contains(&(before + token)) {
                self.kept.push(behind.iter().copied().collect());
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Linearity> {
        let (score, residual_free) = shares(&self.all, &self.all)?;
        let [fitted, other] = &self.halves;
        let (held_out, residual_free_held_out) = shares(fitted, other)?;
        let tokens = self.all.rows().max(1) as f64;
        Ok(Linearity {
            score: score.unwrap_or(1.0),
            held_out: held_out.unwrap_or(1.0),
            residual_free,
            residual_free_held_out,
            rotation: self.all.beside_inputs().explained_by_rotation()?,
            contribution: self.contribution / tokens,
            cosine: self.cosine / tokens,
            anisotropy: self.behind.anisotropy()?,
            dimension: two_neighbours(&self.kept)?,
        })
    }
}

/// What the map of `fitted` explains of the stream behind and of what is added, on `scored`.
fn shares(fitted: &Regression, scored: &Regression) -> Result<(Option<f64>, Option<f64>)> {
    if scored.rows() == 0 || fitted.rows() == 0 {
        return Ok((None, None));
    }
    // The map of the stream is that of what is added, and the identity: their errors are one.
    let map = fitted.solve(0.0)?;
    let missed = scored.squared_error(&map);
    let share = |total: f64| (total > 0.0).then(|| 1.0 - missed / total);
    Ok((share(scored.beside_inputs().total()), share(scored.total())))
}

/// `count` of `tokens` tokens, drawn: those every few tokens would be the same places of every window
/// where windows are as long as some steps.
fn drawn(tokens: usize, count: usize) -> BTreeSet<usize> {
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    let drawn = rand::seq::index::sample(&mut generator, tokens, count.min(tokens));
    drawn.into_iter().collect()
}

/// The linearity of every block on windows of text, `batch` of one length at a time.
///
/// # Errors
/// When the model fails, there are not more tokens than features, or no second window to hold out.
pub fn linearity(model: &Model, windows: &[Vec<u32>], batch: usize) -> Result<Vec<Linearity>> {
    crate::error::require_one_stream(model, "the linearity of blocks")?;
    let width = model.spec().width;
    if windows.len() < 2 {
        return Err(Error::invalid(
            "windows of the text",
            windows.len(),
            "at least 2: maps are fitted to every other one and scored on those between",
        ));
    }
    let tokens: usize = windows.iter().map(Vec::len).sum();
    if tokens <= width + 1 {
        return Err(Error::invalid(
            "tokens of the text",
            tokens,
            format!("well above {width}, the width: with fewer every block is linear"),
        ));
    }
    let chosen = drawn(tokens, MOST_NEIGHBOURS);
    let blocks = model.spec().expanded_blocks().len();
    let mut sums: Vec<Sums> = (0..blocks).map(|_| Sums::new(width)).collect();
    let mut seen = 0;
    for alike in windows.chunk_by(|a, b| a.len() == b.len()) {
        for chunk in alike.chunks(batch.max(1)) {
            let length = chunk.first().map_or(0, Vec::len);
            let ids = Tensor::from_vec(chunk.concat(), (chunk.len(), length), &model.device());
            let trace = Trace::new().capture("blocks.*.{in,out}")?;
            let pass = Pass {
                trace: Some(&trace),
                ..Pass::default()
            };
            model.forward(&Input::tokens(engine(ids)?), pass)?;
            for (index, sums) in sums.iter_mut().enumerate() {
                let stream = |name: &str| trace.signal(&format!("blocks.{index}.{name}"));
                let (x, y) = (stream("in")?.into_value(), stream("out")?.into_value());
                for row in 0..chunk.len() {
                    let rows = |stream: &Tensor| -> Result<Matrix> {
                        let rows = engine(stream.detach().get(row))?;
                        Ok(matrix_from_tensor("residual stream", &rows)?)
                    };
                    sums.add(seen + row, &rows(&x)?, &rows(&y)?, &chosen)?;
                }
            }
            seen += chunk.len();
        }
    }
    sums.into_iter().map(Sums::finish).collect()
}

/// Dimension of the manifold that points lie on (Facco et al. 2017, arXiv 1803.06992): with
/// `μ = r₂ / r₁` the ratio of the distances to the two nearest neighbours and `F` its distribution,
///
/// ```text
/// −ln(1 − F(μ)) = d ln μ
/// ```
///
/// fitted through the origin over the smallest fifth of `μ`. Points that coincide with another
/// are left out; nothing when hardly any are left.
///
/// # Errors
/// When a decomposition of the points fails.
pub fn two_neighbours(points: &[Vec<f64>]) -> Result<Option<f64>> {
    let width = points.first().map_or(0, Vec::len);
    if points.len() < 3 {
        return Ok(None);
    }
    let at = |i: usize, j: usize| {
        points
            .get(i)
            .and_then(|row| row.get(j))
            .copied()
            .unwrap_or(0.0)
    };
    let matrix = Matrix::from_fn(points.len(), width, at);
    let mut ratios: Vec<f64> = nearest_distances(&matrix, 2)?
        .iter()
        .filter_map(|near| match near.as_slice() {
            [first, second] if *first > 0.0 => Some(second / first),
            _ => None,
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let count = ratios.len() as f64;
    let (mut both, mut squares) = (0.0, 0.0);
    for (index, ratio) in ratios.iter().take(ratios.len() / 5).enumerate() {
        let below = (index + 1) as f64 / count;
        both += -(1.0 - below).ln() * ratio.ln();
        squares += ratio.ln().powi(2);
    }
    Ok((squares > 0.0).then(|| both / squares))
}

/// Every block's linearity as a table and a figure.
///
/// # Errors
/// As [`linearity`].
pub fn report(model: &Model, windows: &[Vec<u32>], batch: usize) -> Result<Report> {
    let found = linearity(model, windows, batch)?;
    let tokens: usize = windows.iter().map(Vec::len).sum();
    let width = model.spec().width;
    let mut notes = vec![
        format!(
            "{tokens} tokens in {} windows, width {width}; held out: fitted to the windows of \
             even number, scored on the others",
            windows.len()
        ),
        "score: of the stream behind a block by the stream before it, which the residual alone \
         makes high; added: of what the block adds"
            .to_owned(),
    ];
    if tokens < 2 * ENOUGH * width {
        notes.push(format!(
            "fewer than {ENOUGH} tokens for each feature in each half: scores of the sample are too \
             high, read those held out"
        ));
    }
    let mut table = Table::new(
        "linearity of blocks",
        &[
            "block",
            "score",
            "held out",
            "added",
            "added, held out",
            "by rotation",
            "‖y − x‖ / ‖x‖",
            "cos(x, y)",
            "anisotropy",
            "dimension",
        ],
    );
    let shown = |value: Option<f64>| value.map_or_else(|| Cell::from("–"), Cell::from);
    for (index, block) in found.iter().enumerate() {
        table.push([
            Cell::from(index),
            block.score.into(),
            block.held_out.into(),
            shown(block.residual_free),
            shown(block.residual_free_held_out),
            shown(block.rotation),
            block.contribution.into(),
            block.cosine.into(),
            shown(block.anisotropy),
            shown(block.dimension),
        ]);
    }
    let series = |name: &str, of: fn(&Linearity) -> Option<f64>| Series {
        name: name.to_owned(),
        points: found
            .iter()
            .enumerate()
            .filter_map(|(index, block)| of(block).map(|value| (index as f64, value)))
            .collect(),
    };
    Ok(Report {
        title: "Linearity".to_owned(),
        notes,
        tables: vec![table],
        plots: vec![Plot {
            title: "Share of variance that a linear map explains, held out".to_owned(),
            x: "block".to_owned(),
            y: "share".to_owned(),
            series: vec![
                series("stream", |block| Some(block.held_out)),
                series("what is added", |block| block.residual_free_held_out),
            ],
        }],
        ..Report::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 1000 windows of 128 tokens every 128th would be the first of each.
    #[test]
    fn tokens_are_drawn_from_all_places_of_windows() {
        let found = drawn(128_000, MOST_NEIGHBOURS);
        assert_eq!(found.len(), MOST_NEIGHBOURS);
        assert!(found.iter().all(|token| *token < 128_000));
        let places: BTreeSet<usize> = found.iter().map(|token| token % 128).collect();
        // About 0.05 of the places are missed on average.
        assert!(places.len() > 100, "{}", places.len());
        assert_eq!(found, drawn(128_000, MOST_NEIGHBOURS));
        assert_eq!(drawn(30, MOST_NEIGHBOURS), (0..30).collect());
    }
}
