//! Entropic optimal transport (Cuturi 2013, arXiv 1306.0895), in the logarithmic domain, where
//! small temperatures do not underflow.
//!
//! ```text
//! min_P ⟨P, C⟩ − λ Ent(P),   P ≥ 0,   P 1 = a,   Pᵀ 1 = b
//! P = exp((f ⊕ g − C)/λ),    f ← λ ln a − λ LSE_j((g_j − C_ij)/λ),   g alike
//! ```

use lapidary_factor::Matrix;

use crate::{Error, Result};

/// Marginals are met to this.
const TOLERANCE: f64 = 1e-6;

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
    // Rows one after another, divided by the temperature once.
    let mut scaled = Vec::with_capacity(sources * targets);
    for i in 0..sources {
        scaled.extend((0..targets).map(|j| cost[(i, j)] / temperature));
    }
    if scaled.iter().any(|entry| !entry.is_finite()) {
        return Err(Error::invalid("cost of transport", "not finite", "finite"));
    }
    let (row_weight, column_weight) = (-(sources as f64).ln(), -(targets as f64).ln());
    let (mut f, mut g) = (vec![0.0; sources], vec![0.0; targets]);
    let (mut error, mut iterations) = (f64::INFINITY, 0);
    while iterations < most.max(1) && error >= TOLERANCE {
        iterations += 1;
        for (f, row) in f.iter_mut().zip(scaled.chunks(targets)) {
            let largest = maximum(row.iter().zip(&g).map(|(cost, g)| g - cost));
            let terms = row
                .iter()
                .zip(&g)
                .map(|(cost, g)| (g - cost - largest).exp());
            *f = row_weight - largest - terms.sum::<f64>().ln();
        }
        let sums = column_sums(&scaled, targets, &f, &g);
        // The sums hold the old g: what is missing from the marginal is what g gains. Rows are
        // met exactly here, so these errors are those of the plan.
        error = maximum(
            sums.iter()
                .map(|sum| ((sum - column_weight).exp() - 1.0).abs()),
        );
        if error >= TOLERANCE {
            for (g, sum) in g.iter_mut().zip(&sums) {
                *g += column_weight - sum;
            }
        }
    }
    // When the iterations ran out, columns were met last and rows are off.
    if error >= TOLERANCE {
        let rows = f.iter().zip(scaled.chunks(targets)).map(|(f, row)| {
            let terms = row.iter().zip(&g).map(|(cost, g)| (f + g - cost).exp());
            (terms.sum::<f64>() * sources as f64 - 1.0).abs()
        });
        error = maximum(rows);
    }
    let entry = |i: usize, j: usize| (f[i] + g[j] - scaled[i * targets + j]).exp();
    Ok(Transported {
        plan: Matrix::from_fn(sources, targets, entry),
        error,
        iterations,
    })
}

fn maximum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, f64::max)
}

/// `ln Σ_i exp(f_i + g_j − C_ij/λ)` of each column.
fn column_sums(scaled: &[f64], targets: usize, f: &[f64], g: &[f64]) -> Vec<f64> {
    let mut largest = vec![f64::NEG_INFINITY; targets];
    for (f, row) in f.iter().zip(scaled.chunks(targets)) {
        for (largest, cost) in largest.iter_mut().zip(row) {
            *largest = largest.max(f - cost);
        }
    }
    let mut sums = vec![0.0; targets];
    for (f, row) in f.iter().zip(scaled.chunks(targets)) {
        for ((sum, cost), largest) in sums.iter_mut().zip(row).zip(&largest) {
            *sum += (f - cost - largest).exp();
        }
    }
    let columns = sums.iter().zip(&largest).zip(g);
    columns
        .map(|((sum, largest), g)| sum.ln() + largest + g)
        .collect()
}
