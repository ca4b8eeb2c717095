//! How far two models' residual streams are from each other, block by block.

use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;

use crate::error::engine;
use crate::observe::observe;
use crate::{CalibrationData, Result};

/// `√(Σ ‖a − b‖² / Σ ‖a‖²)` of the residual stream after each block, `a` the original's. Nothing
/// where the models have not as many blocks, or streams of another width.
///
/// # Errors
/// When the data does not fit the models.
pub fn block_errors(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
) -> Result<Vec<f64>> {
    let all: Vec<usize> = (0..original.spec().expanded_blocks().len()).collect();
    block_errors_after(original, other, &all, data, batch)
}

/// As [`block_errors`], where block `i` of `other` was block `earlier[i]` of the original
/// ([`crate::Report::blocks_left`]). Nothing where `earlier` is not about all of its blocks, too.
///
/// # Errors
/// When the data does not fit the models.
pub fn block_errors_after(
    original: &Model,
    other: &Model,
    earlier: &[usize],
    data: &CalibrationData,
    batch: usize,
) -> Result<Vec<f64>> {
    let [whole, left] = [original, other].map(|model| model.spec().expanded_blocks().len());
    let alike = left == earlier.len()
        && earlier.iter().all(|block| *block < whole)
        && other.spec().width == original.spec().width;
    if !alike {
        return Ok(Vec::new());
    }
    let site = |block: usize| format!("blocks.{block}.out");
    let there: Vec<String> = earlier.iter().map(|block| site(*block)).collect();
    let here: Vec<String> = (0..left).map(site).collect();
    let mut sums = vec![(0.0, 0.0); left];
    for examples in data.examples().chunks(batch.max(1)) {
        let data = CalibrationData::new(examples.to_vec())?;
        let before = written(original, &data, batch, &there)?;
        let after = written(other, &data, batch, &here)?;
        for ((error, size), (a, b)) in sums.iter_mut().zip(before.iter().zip(&after)) {
            *error += squares(&engine(a - b)?)?;
            *size += squares(a)?;
        }
    }
    let relative = |(error, size): (f64, f64)| match error > 0.0 {
        true => (error / size.max(f64::MIN_POSITIVE)).sqrt(),
        false => 0.0,
    };
    Ok(sums.into_iter().map(relative).collect())
}

/// `[tokens, width]` at each site, for data of one batch.
fn written(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    sites: &[String],
) -> Result<Vec<Tensor>> {
    let mut all = Vec::with_capacity(sites.len());
    observe(model, data, batch, sites, |seen| {
        for site in sites {
            all.push(seen.rows(site)?.clone());
        }
        Ok(())
    })?;
    Ok(all)
}

fn squares(x: &Tensor) -> Result<f64> {
    let sum = engine(engine(engine(x.sqr())?.to_dtype(DType::F64))?.sum_all())?;
    engine(sum.to_scalar::<f64>())
}
