//! Entropic optimal transport (Cuturi 2013, arXiv 1306.0895), in the logarithmic domain, where
//! small temperatures do not underflow.
//!
//! ```text
//! min_P ⟨P, C⟩ − λ Ent(P),   P ≥ 0,   P 1 = a,   Pᵀ 1 = b
//! P = exp((f ⊕ g − C)/λ),    f ← λ ln a − λ LSE_j((g_j − C_ij)/λ),   g alike
//! ```

use lapidary_factor::Matrix;
use rayon::prelude::*;

use crate::{Error, Result};

/// Marginals are met to this.
const TOLERANCE: f64 = 1e-6;

/// Terms of a sum below which another thread takes longer to begin than it saves.
const WORTHWHILE: usize = 1 << 12;

/// A plan between points of uniform weight.
#[derive(Clone, Debug)]
pub struct Transported {
    /// `P`, `[sources, targets]`: rows sum to `1 / sources`, columns to `1 / targets`.
    pub plan: Matrix,
    /// The largest relative error of a marginal.
    pub error: f64,
    /// Iterations that were made.
    pub iterations: usize,
}

/// The entropic plan of `cost` `[sources, targets]` at temperature `λ`, with uniform marginals.
///
/// # Errors
/// When the cost is not finite, or the temperature not positive.
pub fn transport_plan(cost: &Matrix, temperature: f64, most: usize) -> Result<Transported> {
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(Error::invalid(
            "temperature of transport",
            temperature,
            "above 0",
        ));
    }
    let (sources, targets) = (cost.nrows(), cost.ncols());
    if sources == 0 || targets == 0 {
        let found = format!("{sources} by {targets}");
        return Err(Error::invalid("cost of transport", found, "not empty"));
    }
    // Rows one after another, divided by the temperature once, and columns: either is summed by its row.
    let divided = |at: usize| cost[(at / targets, at % targets)] / temperature;
    let by_row: Vec<f64> = (0..sources * targets).map(divided).collect();
    let turned = |at: usize| by_row[at % sources * targets + at / sources];
    let by_column: Vec<f64> = (0..sources * targets).map(turned).collect();
    if by_row.iter().any(|entry| !entry.is_finite()) {
        return Err(Error::invalid("cost of transport", "not finite", "finite"));
    }
    let (row_weight, column_weight) = (-(sources as f64).ln(), -(targets as f64).ln());
    let (mut f, mut g) = (vec![0.0; sources], vec![0.0; targets]);
    let (mut error, mut iterations) = (f64::INFINITY, 0);
    while iterations < most.max(1) && error >= TOLERANCE {
        iterations += 1;
        f = soft_maxima(&by_row, &g);
        f.iter_mut().for_each(|f| *f = row_weight - *f);
        let sums = soft_maxima(&by_column, &f);
        // What is missing from the marginal, which holds the old g, is what g gains. Rows are met exactly
        // here, so these errors are those of the plan.
        let missing = sums
            .iter()
            .zip(&g)
            .map(|(sum, g)| column_weight - (sum + g));
        let missing: Vec<f64> = missing.collect();
        error = maximum(missing.iter().map(|missing| ((-missing).exp() - 1.0).abs()));
        if error >= TOLERANCE {
            g.iter_mut().zip(&missing).for_each(|(g, gain)| *g += gain);
        }
    }
    // When the iterations ran out, columns were met last and rows are off.
    if error >= TOLERANCE {
        let rows = f.iter().zip(soft_maxima(&by_row, &g));
        error = maximum(rows.map(|(f, sum)| ((f + sum - row_weight).exp() - 1.0).abs()));
    }
    let entry = |i: usize, j: usize| (f[i] + g[j] - by_row[i * targets + j]).exp();
    Ok(Transported {
        plan: Matrix::from_fn(sources, targets, entry),
        error,
        iterations,
    })
}

fn maximum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, f64::max)
}

/// `ln Σ_j exp(potential_j − C_ij/λ)` of each row `i` of `scaled`. Threads share the rows, and each is summed by
/// one of them from its beginning, so that the result is the same whatever their number.
fn soft_maxima(scaled: &[f64], potential: &[f64]) -> Vec<f64> {
    let rows = scaled.par_chunks(potential.len());
    let rows = rows.with_min_len((WORTHWHILE / potential.len()).max(1));
    rows.map(|row| {
        let exponents = || row.iter().zip(potential).map(|(cost, of)| of - cost);
        let largest = maximum(exponents());
        let terms = exponents().map(|exponent| (exponent - largest).exp());
        largest + terms.sum::<f64>().ln()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_do_not_depend_on_threads() {
        // Rows and columns for several threads, as many iterations as are asked for, and marginals met.
        let entry = |i: usize, j: usize| ((i * 31 + j * 17 + i * j) % 101) as f64 / 50.0;
        let cost = Matrix::from_fn(500, 90, entry);
        for (temperature, most) in [(0.02, 2), (0.5, 1000)] {
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let pool = pool.build().unwrap();
                pool.install(|| transport_plan(&cost, temperature, most).unwrap())
            };
            let (one, three) = (run(1), run(3));
            assert_eq!(one.iterations, three.iterations);
            assert_eq!(one.error, three.error);
            assert_eq!((&one.plan - &three.plan).norm_max(), 0.0);
            assert_eq!(one.error < TOLERANCE, most == 1000);
            // Columns of the first were met last, and rows of the second.
            let sum =
                |entries: usize, entry: &dyn Fn(usize) -> f64| (0..entries).map(entry).sum::<f64>();
            let met: Vec<f64> = match most {
                2 => (0..90)
                    .map(|j| 90.0 * sum(500, &|i| one.plan[(i, j)]))
                    .collect(),
                _ => (0..500)
                    .map(|i| 500.0 * sum(90, &|j| one.plan[(i, j)]))
                    .collect(),
            };
            assert!(met.iter().all(|sum| (sum - 1.0).abs() < 1e-9));
        }
    }
}
