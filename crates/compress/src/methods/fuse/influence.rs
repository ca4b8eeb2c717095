//! How much the last hidden vectors turn when a block is left out.

use lapidary_kernels::{DType, Tensor, unit_rows};
use lapidary_model::{HeadSpec, Model, Pass};
use lapidary_signal::{Signal, Trace};

use crate::data::{Batch, real_rows};
use crate::edit::{Edit, block_of};
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// `MI_i = 1 − mean cos(h, h^{(−i)})` of every block `i`, over the real tokens of `data`: `h` is
/// what leaves the last block, before the final norm, and `h^{(−i)}` the same without block `i`.
///
/// # Errors
/// When the data does not fit the model.
pub fn macro_influences(model: &Model, data: &CalibrationData, batch: usize) -> Result<Vec<f64>> {
    let edit = headless(Edit::of(model));
    influences(&edit.finish()?, data, batch)
}

/// The model up to what leaves its last block.
pub(super) fn headless(mut edit: Edit) -> Edit {
    edit.spec.final_norm = None;
    edit.spec.head = HeadSpec::None;
    edit.remove_parameters("final_norm");
    edit.remove_parameters("head");
    edit
}

/// The same for a model that ends at its last block. What leaves a block is what enters the next
/// one, so that of the model without block `i` only the blocks behind it are run.
pub(super) fn influences(stack: &Model, data: &CalibrationData, batch: usize) -> Result<Vec<f64>> {
    let blocks = stack.spec().expanded_blocks().len();
    let mut sums = vec![0.0; blocks];
    let mut rows = 0;
    for batch in data.batches(batch, &stack.device()) {
        let batch = batch?;
        let trace = Trace::new().capture("blocks.*.in")?;
        let whole = run(stack, &batch, None, Some(&trace))?;
        let whole = exact(&whole, &batch)?;
        rows += engine(whole.dim(0))?;
        for (site, record) in trace.records() {
            let Some((index, "in")) = block_of(&site) else {
                continue;
            };
            let entering = Signal::from(record.signal.into_value().detach());
            let without = run(stack, &batch, Some((index + 1, &entering)), None)?;
            if let Some(sum) = sums.get_mut(index) {
                *sum += turn(&whole, &exact(&without, &batch)?)?;
            }
        }
    }
    for sum in &mut sums {
        *sum /= rows.max(1) as f64;
    }
    Ok(sums)
}

/// What leaves the last block, `[batch, length, width]`; begun at a block with what enters it.
pub(super) fn run(
    stack: &Model,
    batch: &Batch<'_>,
    start: Option<(usize, &Signal)>,
    trace: Option<&Trace>,
) -> Result<Tensor> {
    let pass = Pass {
        padding: batch.padding.as_ref(),
        trace,
        start,
        ..Pass::default()
    };
    Ok(stack.forward(&batch.input, pass)?.hidden.into_value())
}

/// Real rows in `f64`.
fn exact(hidden: &Tensor, batch: &Batch<'_>) -> Result<Tensor> {
    let rows = engine(real_rows(&hidden.detach(), batch.real.as_ref()))?;
    engine(rows.to_dtype(DType::F64))
}

/// `Σ (1 − cos(a, b))` over rows, as `½ ‖a/‖a‖ − b/‖b‖‖²`, which is 0 for equal rows and never less.
fn turn(a: &Tensor, b: &Tensor) -> Result<f64> {
    let apart = engine(unit_rows(a)? - unit_rows(b)?)?;
    let squares = engine(engine(apart.sqr())?.sum_all())?;
    Ok(0.5 * engine(squares.to_scalar::<f64>())?)
}

/// The first examples, at most `count`.
pub(super) fn first(data: &CalibrationData, count: usize) -> Result<CalibrationData> {
    if count == 0 {
        let expected = "at least 1";
        return Err(Error::invalid(
            "sequences that influence is measured on",
            count,
            expected,
        ));
    }
    let examples = data.examples().iter().take(count).cloned();
    CalibrationData::new(examples.collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::golden;
    use super::*;

    #[test]
    fn the_turn_of_rows_is_numpys() {
        let document = golden();
        let (stream, behind) = (document.matrix("stream"), document.matrix("behind"));
        let rows = stream.dim(0).unwrap() as f64;
        let found = turn(&behind, &stream).unwrap() / rows;
        assert!((found - document.number("influence")).abs() < 1e-12);
        assert_eq!(turn(&stream, &stream).unwrap(), 0.0);
    }
}
