//! Exact nearest neighbours by blocked products.

use super::patterns::squared_distance;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use rayon::prelude::*;

/// Rows of the stored and of the asked states that meet in one product.
const BLOCK: usize = 2048;
const ASKED: usize = 256;

/// Candidates beyond those asked for that are measured again.
const SPARE: usize = 8;

/// One neighbour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbour {
    /// Row of the stored states.
    pub index: usize,
    /// Its distance.
    pub distance: f64,
}

/// The `count` nearest rows of `stored` `[M, n]` to each row of `asked` `[N, n]`, the nearest first.
///
/// Candidates are found by `|a|² − 2 a·b + |b|²` in `f32`, block by block, `SPARE` more than asked
/// for; those are measured in `f64`. They are exact unless so many stored states lie at the same
/// distance to within the rounding of `f32`.
///
/// # Errors
/// When the shapes do not fit, or there are fewer stored states than neighbours asked for.
pub fn nearest(stored: &Tensor, asked: &Tensor, count: usize) -> Result<Vec<Vec<Neighbour>>> {
    let ((rows, width), (questions, asked_width)) =
        (engine(stored.dims2())?, engine(asked.dims2())?);
    if width != asked_width || count == 0 || count > rows {
        return Err(Error::invalid(
            "neighbours, and width of the states",
            format!("{count} of {rows}, {asked_width}"),
            format!("between 1 and {rows}, and {width}"),
        ));
    }
    let single = |tensor: &Tensor| engine(engine(tensor.to_dtype(DType::F32))?.contiguous());
    let (stored32, asked32) = (single(stored)?, single(asked)?);
    let norms = engine(engine(engine(stored32.sqr())?.sum(1))?.to_vec1::<f32>())?;
    let double = |tensor: &Tensor| -> Result<Vec<f64>> {
        engine(engine(engine(tensor.to_dtype(DType::F64))?.flatten_all())?.to_vec1::<f64>())
    };
    let (stored64, asked64) = (double(stored)?, double(asked)?);
    let mut found = Vec::with_capacity(questions);
    for start in (0..questions).step_by(ASKED) {
        let here = ASKED.min(questions - start);
        let block = engine(asked32.narrow(0, start, here))?;
        let mut candidates: Vec<Vec<(f32, usize)>> = vec![Vec::new(); here];
        for first in (0..rows).step_by(BLOCK) {
            let size = BLOCK.min(rows - first);
            let keys = engine(engine(stored32.narrow(0, first, size))?.t())?;
            let products = engine(engine(block.matmul(&keys))?.to_vec2::<f32>())?;
            let norms = norms.get(first..first + size).unwrap_or_default();
            candidates
                .par_iter_mut()
                .zip(products)
                .for_each(|(kept, products)| {
                    // |a|² is the same for all.
                    let each = products.iter().zip(norms).zip(first..);
                    kept.extend(each.map(|((product, norm), index)| (norm - 2.0 * product, index)));
                    let keep = count + SPARE;
                    if kept.len() > keep {
                        kept.select_nth_unstable_by(keep, |a, b| a.0.total_cmp(&b.0));
                        kept.truncate(keep);
                    }
                });
        }
        for (row, kept) in candidates.into_iter().enumerate() {
            let at = (start + row) * width;
            let x = asked64.get(at..at + width).unwrap_or_default();
            let mut measured: Vec<Neighbour> = kept
                .into_iter()
                .map(|(_, index)| {
                    let pattern = stored64
                        .get(index * width..(index + 1) * width)
                        .unwrap_or_default();
                    Neighbour {
                        index,
                        distance: squared_distance(x, pattern).sqrt(),
                    }
                })
                .collect();
            measured.sort_by(|a, b| {
                a.distance
                    .total_cmp(&b.distance)
                    .then(a.index.cmp(&b.index))
            });
            measured.truncate(count);
            found.push(measured);
        }
    }
    Ok(found)
}
