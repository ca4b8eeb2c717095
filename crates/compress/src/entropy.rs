//! How much entropy a block adds to the residual stream, estimated from tokens (EntroDrop: Yang
//! et al. 2025, arXiv 2504.03794).
//!
//! ```text
//! ΔH_l = H(Z_l) − H(Z_{l−1})      per batch, averaged over batches
//! ```
//!
//! `Z` is the stream before and behind a block, or before and behind the sum with its attention.

use lapidary_factor::{Matrix, matrix_from_tensor, nearest_distances};
use lapidary_model::Model;

use crate::error::engine;
use crate::methods::attention_cosine::{attention_added, has_attention};
use crate::observe::observe;
use crate::{CalibrationData, Error, Result};
use serde::{Deserialize, Serialize};

/// A distance or a probability of 0 counts as this much, so that tokens that are alike have a
/// logarithm.
const LEAST: f64 = 1e-10;

/// How entropy is estimated from the rows of `Z` `[tokens, width]`, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Estimator {
    /// By the distance `ρ` to the k-th neighbour (Kozachenko & Leonenko 1987):
    /// `H = d E[ln ρ] + ln V_d + ln n − ln k`, `V_d` the volume of the unit ball.
    Neighbours {
        /// `k`; of fewer tokens all others.
        count: usize,
    },
    /// By a histogram of each feature between its own least and largest value, summed over
    /// features. Does not change when features are scaled or shifted.
    Buckets {
        /// Bars of a histogram.
        bins: usize,
    },
    /// Of order `α` under a Gaussian kernel as wide as the median distance, over standardised
    /// features: `H = ln mean(K^{α−1}) / (1 − α)`.
    Renyi {
        /// `α`, above 0 and not 1.
        order: f64,
    },
}

/// Which estimator, and which blocks it may choose.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EntropyChoice {
    /// How entropy is estimated.
    pub estimator: Estimator,
    /// Most tokens of a batch that are compared, two at least; more are thinned evenly.
    pub tokens: usize,
    /// Blocks at the start that are never removed.
    pub first: usize,
    /// Blocks at the end that are never removed.
    pub last: usize,
    /// Whether blocks before the least entropy are never removed: entropy falls there, since they
    /// gather what the later ones spread out.
    pub stages: bool,
}

impl Default for EntropyChoice {
    fn default() -> Self {
        Self {
            estimator: Estimator::Neighbours { count: 25 },
            tokens: 4096,
            first: 2,
            last: 1,
            stages: true,
        }
    }
}

impl Estimator {
    /// The entropy of rows `[tokens, width]`, in nats.
    ///
    /// # Errors
    /// When there are too few rows, or a setting is none.
    pub fn entropy(self, rows: &Matrix) -> Result<f64> {
        if rows.nrows() < 2 {
            return Err(Error::invalid(
                "tokens of an entropy",
                rows.nrows(),
                "at least 2",
            ));
        }
        match self {
            Self::Neighbours { count } => neighbours(rows, count),
            Self::Buckets { bins } => buckets(rows, bins),
            Self::Renyi { order } => renyi(rows, order),
        }
    }
}

fn neighbours(rows: &Matrix, count: usize) -> Result<f64> {
    let (n, d) = (rows.nrows(), rows.ncols() as f64);
    if count == 0 {
        return Err(Error::invalid(
            "neighbours of an entropy",
            count,
            "at least 1",
        ));
    }
    let count = count.min(n - 1);
    let distances = nearest_distances(rows, count)?;
    let logarithms = distances.iter().filter_map(|near| near.last());
    let mean = logarithms.map(|rho| rho.max(LEAST).ln()).sum::<f64>() / n as f64;
    let ball = 0.5 * d * std::f64::consts::PI.ln() - ln_gamma(0.5 * d + 1.0);
    Ok(d * mean + ball + (n as f64).ln() - (count as f64).ln())
}

fn buckets(rows: &Matrix, bins: usize) -> Result<f64> {
    if bins == 0 {
        return Err(Error::invalid("bins of an entropy", bins, "at least 1"));
    }
    let of = |feature: usize| -> f64 {
        let values = rows.col(feature);
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if largest <= least {
            return 0.0;
        }
        let place = |value: &f64| ((value - least) / (largest - least) * bins as f64) as usize;
        let mut places: Vec<usize> = values
            .iter()
            .map(|value| place(value).min(bins - 1))
            .collect();
        // Bars as runs of equal places: empty ones take no room, however many were asked for.
        places.sort_unstable();
        let shares = places
            .chunk_by(|a, b| a == b)
            .map(|bar| bar.len() as f64 / rows.nrows() as f64);
        shares.map(|p| -p * p.max(LEAST).ln()).sum()
    };
    Ok((0..rows.ncols()).map(of).sum())
}

fn renyi(rows: &Matrix, order: f64) -> Result<f64> {
    if !(order.is_finite() && order > 0.0) || order == 1.0 {
        return Err(Error::invalid(
            "order of an entropy",
            order,
            "above 0 and not 1",
        ));
    }
    let rows = standardised(rows);
    let n = rows.nrows();
    let mut squares = Vec::with_capacity(n * (n - 1) / 2);
    for i in 0..n {
        for j in 0..i {
            squares.push((rows.row(i) - rows.row(j)).squared_norm_l2());
        }
    }
    let middle = squares.len() / 2;
    let (_, median, _) = squares.select_nth_unstable_by(middle, f64::total_cmp);
    let width = median.max(LEAST * LEAST);
    // K_ij^{α−1} with K = exp(−‖x_i − x_j‖² / 2σ²); the diagonal is 1. Below an order of 1 the powers
    // of far pairs overflow, so that all are taken over the largest.
    let logarithm = |square: &f64| -(order - 1.0) * square / (2.0 * width);
    let largest = squares.iter().map(logarithm).fold(0.0, f64::max);
    let powers = squares
        .iter()
        .map(|square| (logarithm(square) - largest).exp());
    let mean = (n as f64 * (-largest).exp() + 2.0 * powers.sum::<f64>()) / (n * n) as f64;
    Ok((largest + mean.ln()) / (1.0 - order))
}

/// Features of mean 0 and variance 1; constant ones of 0.
fn standardised(rows: &Matrix) -> Matrix {
    let n = rows.nrows() as f64;
    let measured: Vec<(f64, f64)> = (0..rows.ncols())
        .map(|feature| {
            let values = rows.col(feature);
            let mean = values.iter().sum::<f64>() / n;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            let scale = match variance > 0.0 {
                true => variance.sqrt().recip(),
                false => 0.0,
            };
            (mean, scale)
        })
        .collect();
    Matrix::from_fn(rows.nrows(), rows.ncols(), |i, j| {
        let (mean, scale) = measured[j];
        (rows[(i, j)] - mean) * scale
    })
}

/// `ln Γ(x)` for `x ≥ 1` by Stirling's series (Abramowitz & Stegun 6.1.41), after the recurrence
/// has carried `x` beyond 10.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut below) = (x, 0.0);
    while x < 10.0 {
        below += x.ln();
        x += 1.0;
    }
    let series = 1.0 / (12.0 * x) - 1.0 / (360.0 * x.powi(3)) + 1.0 / (1260.0 * x.powi(5));
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - below
}

/// What each block adds, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct EntropyProfile {
    /// `H` of the stream before the first block and behind each.
    pub stream: Vec<f64>,
    /// `ΔH` of each block.
    pub blocks: Vec<f64>,
    /// `ΔH` of the sum with each block's attention; nothing where there is none.
    pub attention: Vec<Option<f64>>,
}

impl EntropyProfile {
    /// Measures a model on data.
    ///
    /// # Errors
    /// When a batch has too few tokens, or an organisation has blocks read something else than one stream of all tokens.
    pub fn measure(
        model: &Model,
        data: &CalibrationData,
        batch: usize,
        choice: &EntropyChoice,
    ) -> Result<Self> {
        if let Some(organisation) = &model.spec().organisation {
            return Err(Error::invalid(
                "organisation of the model",
                organisation.kind(),
                "absent for the entropy of the residual stream: its blocks read groups or means of tokens, or two \
                 streams",
            ));
        }
        let specs = model.spec().expanded_blocks();
        let blocks = specs.len();
        let mut sites = Vec::new();
        for (index, block) in specs.iter().enumerate() {
            sites.extend(["in", "out"].map(|site| format!("blocks.{index}.{site}")));
            if has_attention(block) {
                sites.push(attention_added(index, block));
            }
        }
        let mut stream = vec![0.0; blocks + 1];
        let mut attention: Vec<Option<f64>> = specs
            .iter()
            .map(|block| has_attention(block).then_some(0.0))
            .collect();
        let mut batches = 0;
        observe(model, data, batch, &sites, |seen| {
            let entropy = |tensor: &_| {
                let rows = matrix_from_tensor("residual stream", tensor)?;
                choice.estimator.entropy(&thinned(rows, choice.tokens))
            };
            batches += 1;
            for (index, block) in specs.iter().enumerate() {
                let before = seen.rows(&format!("blocks.{index}.in"))?;
                let here = entropy(before)?;
                if let Some(sum) = stream.get_mut(index) {
                    *sum += here;
                }
                if let Some(Some(sum)) = attention.get_mut(index) {
                    let added = seen.rows(&attention_added(index, block))?;
                    *sum += entropy(&engine(before + added)?)? - here;
                }
            }
            if let (Some(index), Some(sum)) = (blocks.checked_sub(1), stream.last_mut()) {
                *sum += entropy(seen.rows(&format!("blocks.{index}.out"))?)?;
            }
            Ok(())
        })?;
        let batches = f64::from(batches.max(1));
        for sum in stream.iter_mut().chain(attention.iter_mut().flatten()) {
            *sum /= batches;
        }
        let steps = stream.iter().zip(stream.iter().skip(1));
        Ok(Self {
            blocks: steps.map(|(before, behind)| behind - before).collect(),
            stream,
            attention,
        })
    }

    /// The blocks in the order in which they would go: those first that add least, of equal ones the
    /// first.
    pub fn block_order(&self) -> Vec<usize> {
        ordered(self.blocks.iter().copied().enumerate())
    }

    /// The blocks with attention in the order in which that would go.
    pub fn attention_order(&self) -> Vec<usize> {
        let blocks = self.attention.iter().enumerate();
        ordered(blocks.filter_map(|(block, score)| score.map(|score| (block, score))))
    }

    /// How many blocks lie before the least entropy, of equal ones the fewest. Behind it entropy is
    /// nowhere less, though a single block may lower it.
    pub fn stage(&self) -> usize {
        let least = self
            .stream
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.total_cmp(b.1));
        least.map_or(0, |(index, _)| index)
    }
}

/// Blocks by rising score.
fn ordered(scores: impl Iterator<Item = (usize, f64)>) -> Vec<usize> {
    let mut scores: Vec<(usize, f64)> = scores.collect();
    scores.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    scores.into_iter().map(|(block, _)| block).collect()
}

/// At most `most` rows, evenly spread.
fn thinned(rows: Matrix, most: usize) -> Matrix {
    let most = most.max(2);
    if rows.nrows() <= most {
        return rows;
    }
    Matrix::from_fn(most, rows.ncols(), |i, j| {
        rows[(i * rows.nrows() / most, j)]
    })
}

/// The rank of each layer in an order of removal: `ranks[layer]` is 0 for the one that goes first.
///
/// ```
/// use lapidary_compress::entropy::{order_of_ranks, ranks_of_order};
/// let order = [2, 0, 1];
/// assert_eq!(ranks_of_order(&order)?, [1, 2, 0]);
/// assert_eq!(order_of_ranks(&[1, 2, 0])?, order);
/// # Ok::<(), lapidary_compress::Error>(())
/// ```
///
/// # Errors
/// When a layer is missing or named twice.
pub fn ranks_of_order(order: &[usize]) -> Result<Vec<usize>> {
    inverted("order of layers", order)
}

/// The layers in the order of their ranks.
///
/// # Errors
/// When a rank is missing or given twice.
pub fn order_of_ranks(ranks: &[usize]) -> Result<Vec<usize>> {
    inverted("ranks of layers", ranks)
}

fn inverted(what: &str, permutation: &[usize]) -> Result<Vec<usize>> {
    let mut inverse = vec![None; permutation.len()];
    for (place, value) in permutation.iter().enumerate() {
        match inverse.get_mut(*value) {
            Some(slot @ None) => *slot = Some(place),
            _ => {
                let expected = format!("each number below {} once", permutation.len());
                return Err(Error::invalid(what, format!("{permutation:?}"), expected));
            }
        }
    }
    Ok(inverse.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const KNN: Estimator = Estimator::Neighbours { count: 25 };
    const ALL: [Estimator; 3] = [
        KNN,
        Estimator::Buckets { bins: 15 },
        Estimator::Renyi { order: 4.0 },
    ];

    fn normal(rows: usize, columns: usize, seed: u64) -> Matrix {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, columns, |_, _| {
            // Box–Muller.
            let (u, v): (f64, f64) = (generator.random_range(1e-12..1.0), generator.random());
            (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
        })
    }

    #[test]
    fn gaussians_have_their_entropy() {
        for (d, sigma) in [(1, 1.0), (2, 3.0), (3, 0.5)] {
            let drawn = normal(4000, d, 1);
            let rows = Matrix::from_fn(4000, d, |i, j| sigma * drawn[(i, j)]);
            let e = std::f64::consts::E;
            let expected = 0.5 * d as f64 * (2.0 * std::f64::consts::PI * e * sigma * sigma).ln();
            let found = KNN.entropy(&rows).unwrap();
            assert!((found / expected - 1.0).abs() < 0.05, "{found} {expected}");
        }
    }

    #[test]
    fn neighbours_scale_and_do_not_see_where_or_in_which_order_rows_lie() {
        let rows = normal(300, 3, 2);
        let entropy = |rows: &Matrix| KNN.entropy(rows).unwrap();
        let plain = entropy(&rows);
        let scaled = entropy(&Matrix::from_fn(300, 3, |i, j| 7.0 * rows[(i, j)]));
        assert!((scaled - plain - 3.0 * 7f64.ln()).abs() < 1e-10);
        let turn = Matrix::from_fn(3, 3, |i, j| {
            [[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]][i][j]
        });
        let moved = &rows * &turn;
        let moved = Matrix::from_fn(300, 3, |i, j| moved[(299 - i, j)] + 11.0);
        assert!((entropy(&moved) - plain).abs() < 1e-10);
    }

    #[test]
    fn buckets_see_neither_scale_nor_place_and_are_bounded() {
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        let rows = Matrix::from_fn(20_000, 2, |_, _| generator.random::<f64>());
        let estimator = Estimator::Buckets { bins: 10 };
        let found = estimator.entropy(&rows).unwrap();
        let most = 2.0 * 10f64.ln();
        assert!(found <= most && found > 0.999 * most, "{found} {most}");
        let drawn = normal(500, 2, 4);
        // Of multiples of 2⁻²⁰ neither powers of two nor shifts move any across the edge of a bucket by
        // rounding.
        let unit = 2f64.powi(20);
        let rows = Matrix::from_fn(500, 2, |i, j| (drawn[(i, j)] * unit).round() / unit);
        let moved = Matrix::from_fn(500, 2, |i, j| rows[(i, j)] * [4.0, 0.5][j] + [8.0, -3.0][j]);
        let (a, b) = (
            estimator.entropy(&rows).unwrap(),
            estimator.entropy(&moved).unwrap(),
        );
        assert_eq!(a, b);
        let constant = Matrix::from_fn(50, 3, |_, _| 2.5);
        assert_eq!(estimator.entropy(&constant).unwrap(), 0.0);
    }

    #[test]
    fn renyi_falls_with_its_order_and_sees_no_scale() {
        let rows = normal(200, 4, 5);
        let of = |order, rows: &Matrix| Estimator::Renyi { order }.entropy(rows).unwrap();
        let found: Vec<f64> = [0.5, 2.0, 4.0, 8.0].map(|order| of(order, &rows)).to_vec();
        assert!(found.windows(2).all(|pair| pair[0] > pair[1]), "{found:?}");
        let scaled = Matrix::from_fn(200, 4, |i, j| rows[(i, j)] * 3.0 + j as f64);
        assert!((of(4.0, &scaled) - of(4.0, &rows)).abs() < 1e-10);
        assert!(Estimator::Renyi { order: 1.0 }.entropy(&rows).is_err());
    }

    #[test]
    fn rows_that_are_all_alike_have_a_finite_entropy() {
        let rows = Matrix::from_fn(40, 3, |_, j| j as f64);
        for estimator in ALL {
            assert!(
                estimator.entropy(&rows).unwrap().is_finite(),
                "{estimator:?}"
            );
        }
    }

    #[test]
    fn bars_that_are_empty_take_no_room() {
        // As many as there are numbers tell all 500 values of a feature apart.
        let estimator = Estimator::Buckets { bins: usize::MAX };
        let found = estimator.entropy(&normal(500, 2, 4)).unwrap();
        assert!((found - 2.0 * 500f64.ln()).abs() < 1e-9, "{found}");
    }

    #[test]
    fn an_order_below_one_bears_a_token_that_is_far_from_all_others() {
        // The median distance is none, beside which that of one token has no power in `f64`.
        let rows = Matrix::from_fn(40, 3, |i, _| if i == 0 { 1.0 } else { 0.0 });
        let found = Estimator::Renyi { order: 0.5 }.entropy(&rows).unwrap();
        assert!(found.is_finite() && found > 0.0, "{found}");
    }

    #[test]
    fn the_gamma_function_is_factorial() {
        let factorial: f64 = (1..=12).map(f64::from).product();
        assert!((ln_gamma(13.0) - factorial.ln()).abs() < 1e-10);
        let half = std::f64::consts::PI.sqrt() / 2.0;
        assert!((ln_gamma(1.5) - half.ln()).abs() < 1e-9);
    }

    #[test]
    fn what_adds_least_goes_first_and_of_equal_ones_the_first() {
        let profile = EntropyProfile {
            stream: vec![0.0, 2.0, 1.0, 3.0, 2.0],
            blocks: vec![2.0, -1.0, 2.0, -1.0],
            attention: vec![Some(0.5), None, Some(-0.5), Some(0.5)],
        };
        assert_eq!(profile.block_order(), [1, 3, 0, 2]);
        assert_eq!(profile.attention_order(), [2, 0, 3]);
        let ranks = ranks_of_order(&profile.block_order()).unwrap();
        assert_eq!(ranks, [2, 0, 3, 1]);
    }

    #[test]
    fn released_ranks_name_the_layers_that_go_first() {
        let released = "29_30_28_26_18_16_17_24_6_20_22_4_19_15_25_27_23_7_8_0_3_13_10_5_14_21_1_12_\
                        2_9_11_31";
        let ranks: Vec<usize> = released
            .split('_')
            .map(|rank| rank.parse().unwrap())
            .collect();
        let order = order_of_ranks(&ranks).unwrap();
        assert_eq!(order[..5], [19, 26, 28, 20, 11]);
        assert_eq!(ranks_of_order(&order).unwrap(), ranks);
        assert!(order_of_ranks(&[0, 0]).is_err());
    }
}
