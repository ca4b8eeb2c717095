//! How far a matrix is from the doubly stochastic ones, the Birkhoff polytope, and the nearest of them.

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};

/// Rounds that a projection takes at the most.
const ROUNDS: usize = 100_000;
/// A round that moves no entry by more leaves them where they are.
const STILL: f64 = 1e-13;
/// How far sums of rows and columns may be from one at the end.
const OFF: f64 = 1e-10;

/// What a normaliser did to a matrix of scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Diagnosis {
    /// Frobenius norm of what separates it from the nearest doubly stochastic matrix.
    pub distance: f64,
    /// Mean entropy of its rows, in nats, each as a distribution.
    pub entropy: f64,
    /// Frobenius norm of what separates it from the scores that it was made of.
    pub change: f64,
}

/// The entries of a square matrix row by row, and its rows.
fn square(matrix: &Tensor) -> Result<(Vec<f64>, usize)> {
    match *matrix.dims() {
        [rows, columns] if rows == columns && rows > 0 => {
            let flat = tensor(tensor(matrix.to_dtype(DType::F64))?.flatten_all())?;
            let entries: Vec<f64> = tensor(flat.to_vec1())?;
            match entries.iter().find(|entry| !entry.is_finite()) {
                None => Ok((entries, rows)),
                Some(entry) => Err(Error::spec("an entry", entry, "a finite number")),
            }
        }
        _ => Err(Error::spec(
            "shape",
            matrix.dims(),
            "that of a square matrix",
        )),
    }
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b));
    squares.sum::<f64>().sqrt()
}

/// `argmin ‖P − M‖_F` over the doubly stochastic `P` of a square matrix `M` `[T, T]`, in `f64`:
/// Dykstra's alternation between matrices whose rows and columns sum to one and those without a
/// negative entry.
///
/// # Errors
/// When it is not square or holds no numbers.
pub fn birkhoff_projection(matrix: &Tensor) -> Result<Tensor> {
    let (entries, size) = square(matrix)?;
    let projected = project(&entries, size);
    tensor(Tensor::from_vec(projected, (size, size), matrix.device()))
}

/// A round without a move is the last one only where rows and columns sum to one. Otherwise negative entries are
/// still being taken back, by the same amount in each round, and those up to the first that is back are one step.
fn project(matrix: &[f64], size: usize) -> Vec<f64> {
    let count = size as f64;
    let mut found = matrix.to_vec();
    // What the last step away from negative entries took off, and by how much a round changed it.
    let mut taken = vec![0.0; found.len()];
    let mut back = vec![0.0; found.len()];
    for _ in 0..ROUNDS {
        let mut rows = vec![-1.0; size];
        let mut columns = vec![-1.0; size];
        for (at, entry) in found.iter().enumerate() {
            rows[at / size] += entry;
            columns[at % size] += entry;
        }
        let all: f64 = rows.iter().sum();
        let sums = rows.iter().chain(&columns);
        let off = sums.fold(0.0, |most: f64, sum| most.max(sum.abs()));
        let mut moved: f64 = 0.0;
        let each = found.iter_mut().zip(&mut taken).zip(&mut back);
        for (at, ((entry, taken), back)) in each.enumerate() {
            // P − (r 1ᵀ + 1 cᵀ) / T + (1ᵀ r) / T²
            let sums =
                *entry - (rows[at / size] + columns[at % size]) / count + all / (count * count);
            let with = sums + *taken;
            let next = with.max(0.0);
            *back = with - next - *taken;
            *taken = with - next;
            moved = moved.max((next - *entry).abs());
            *entry = next;
        }
        if moved >= STILL {
            continue;
        }
        if off < OFF {
            break;
        }
        let coming = taken.iter().zip(&back);
        let coming = coming.filter(|(taken, back)| **taken < 0.0 && **back > 0.0);
        let rounds = coming.map(|(taken, back)| -taken / back);
        let rounds = rounds.fold(f64::INFINITY, f64::min).floor();
        if rounds.is_finite() {
            for (taken, back) in taken
                .iter_mut()
                .zip(&back)
                .filter(|(taken, _)| **taken < 0.0)
            {
                *taken = (*taken + rounds * back).min(0.0);
            }
        }
    }
    found
}

/// What was made of scores `M` `[T, T]`: a matrix `A` of the same shape.
///
/// # Errors
/// When either is not square, holds no numbers, or their sizes differ.
pub fn diagnose(made: &Tensor, scores: &Tensor) -> Result<Diagnosis> {
    let (made, size) = square(made)?;
    let (scores, other) = square(scores)?;
    if size != other {
        return Err(Error::spec("rows of the scores", other, format!("{size}")));
    }
    let entropy = |row: &[f64]| -> f64 {
        let sum: f64 = row.iter().sum();
        let shares = row.iter().map(|entry| entry / sum).filter(|p| *p > 0.0);
        shares.map(|p| -p * p.ln()).sum()
    };
    Ok(Diagnosis {
        distance: distance(&made, &project(&made, size)),
        entropy: made.chunks(size).map(entropy).sum::<f64>() / size as f64,
        change: distance(&made, &scores),
    })
}
