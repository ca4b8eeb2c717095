//! Products with matrices `[f(x_u + y_w)]`.

use std::sync::{Mutex, PoisonError};

use realfft::RealFftPlanner;
use realfft::num_complex::Complex;

use super::{Blocked, Function};

/// Entries of a matrix up to which it is laid out, where transforming would take longer.
const SMALL: usize = 4096;

static PLANNER: Mutex<Option<RealFftPlanner<f64>>> = Mutex::new(None);

/// `C_u = Σ_w values[rows_u + columns_w] X_w`, `[rows, width]`, for a field `X` `[columns, width]`;
/// `values` are those of a function at `0, 1, 2, …`, zero beyond.
///
/// By a Fourier transform where there are many rows and columns, in time
/// `width · (longest + ln longest)`.
pub fn hankel(
    values: &[f64],
    rows: &[usize],
    columns: &[usize],
    field: &[f64],
    width: usize,
) -> Vec<f64> {
    let mut found = vec![0.0; rows.len() * width];
    if rows.is_empty() || columns.is_empty() || width == 0 {
        return found;
    }
    if rows.len() * columns.len() <= SMALL {
        for (found, row) in found.chunks_mut(width).zip(rows) {
            for (x, column) in field.chunks(width).zip(columns) {
                let value = values.get(row + column).copied().unwrap_or(0.0);
                for (found, x) in found.iter_mut().zip(x) {
                    *found += value * x;
                }
            }
        }
        return found;
    }
    let farthest = |places: &[usize]| places.iter().copied().max().unwrap_or(0);
    let span = farthest(rows) + farthest(columns) + 1;
    let transform = Transform::new(span);
    let kernel = transform.of(|at| values.get(at).copied().filter(|_| at < span).unwrap_or(0.0));
    let mut line = vec![0.0; transform.size];
    for feature in 0..width {
        line.fill(0.0);
        for (column, x) in columns.iter().zip(field.chunks(width)) {
            line[*column] += x[feature];
        }
        let spectrum = transform.of(|at| line[at]);
        // Σ_w f[u + w] x[w] is the product with the conjugate.
        let correlated = kernel.iter().zip(&spectrum).map(|(f, x)| f * x.conj());
        let correlated = transform.back(correlated.collect());
        for (found, row) in found.chunks_mut(width).zip(rows) {
            found[feature] += correlated[*row];
        }
    }
    found
}

/// Transforms of one size.
struct Transform {
    size: usize,
    forward: std::sync::Arc<dyn realfft::RealToComplex<f64>>,
    backward: std::sync::Arc<dyn realfft::ComplexToReal<f64>>,
}

impl Transform {
    /// Long enough that what is correlated over `span` places doesn't come round.
    fn new(span: usize) -> Self {
        let size = span.next_power_of_two();
        let mut planner = PLANNER.lock().unwrap_or_else(PoisonError::into_inner);
        let planner = planner.get_or_insert_with(RealFftPlanner::new);
        Self {
            size,
            forward: planner.plan_fft_forward(size),
            backward: planner.plan_fft_inverse(size),
        }
    }

    fn of(&self, at: impl Fn(usize) -> f64) -> Vec<Complex<f64>> {
        let mut input: Vec<f64> = (0..self.size).map(at).collect();
        let mut output = self.forward.make_output_vec();
        // Sizes are those of the plan, the only thing that can be wrong.
        let _ = self.forward.process(&mut input, &mut output);
        output
    }

    fn back(&self, mut spectrum: Vec<Complex<f64>>) -> Vec<f64> {
        // What has no mirror image has no imaginary part but by rounding.
        if let Some(first) = spectrum.first_mut() {
            first.im = 0.0;
        }
        if let Some(last) = spectrum.last_mut() {
            last.im = 0.0;
        }
        let mut output = self.backward.make_output_vec();
        let _ = self.backward.process(&mut spectrum, &mut output);
        for number in &mut output {
            *number /= self.size as f64;
        }
        output
    }
}

/// `C_u = Σ_w f(x_u + y_w) X_w`, `[x, width]`, for a field `[y, width]`, `x` and `y` rising. `lattice` is a length that all of
/// `x` and `y` are whole numbers of, where there is one.
pub(super) fn multiply(
    function: &Function,
    lattice: Option<f64>,
    (x, y): (&[f64], &[f64]),
    field: &[f64],
    width: usize,
) -> Vec<f64> {
    if let Some([left, right]) = function.separated(x, y)
        && left.len() < x.len().min(y.len())
    {
        let mut found = vec![0.0; x.len() * width];
        for (left, right) in left.iter().zip(&right) {
            let mut sum = vec![0.0; width];
            for (factor, row) in right.iter().zip(field.chunks(width)) {
                for (sum, entry) in sum.iter_mut().zip(row) {
                    *sum += factor * entry;
                }
            }
            for (factor, row) in left.iter().zip(found.chunks_mut(width)) {
                for (entry, sum) in row.iter_mut().zip(&sum) {
                    *entry += factor * sum;
                }
            }
        }
        return found;
    }
    if let Some(step) = lattice.filter(|_| x.len() * y.len() > SMALL) {
        let places =
            |x: &[f64]| -> Vec<usize> { x.iter().map(|x| (x / step).round() as usize).collect() };
        let (rows, columns) = (places(x), places(y));
        let farthest = |places: &[usize]| places.iter().copied().max().unwrap_or(0);
        let span = farthest(&rows) + farthest(&columns) + 1;
        // Few levels far apart are not worth a transform of everything between them.
        if span * 32 < x.len() * y.len() {
            let values: Vec<f64> = (0..span)
                .map(|at| function.value(at as f64 * step))
                .collect();
            return hankel(&values, &rows, &columns, field, width);
        }
    }
    let entries = x.len() * y.len();
    if entries > SMALL
        && let Some(blocked) = Blocked::new(function, x, y)
        && blocked.products() < entries
    {
        return blocked.multiply(field, width);
    }
    let mut found = vec![0.0; x.len() * width];
    for (x, row) in x.iter().zip(found.chunks_mut(width)) {
        for (y, other) in y.iter().zip(field.chunks(width)) {
            let value = function.value(x + y);
            for (entry, other) in row.iter_mut().zip(other) {
                *entry += value * other;
            }
        }
    }
    found
}
