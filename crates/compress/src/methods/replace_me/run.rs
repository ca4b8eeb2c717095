//! The regression behind a run of blocks, for whoever wants more of it than the merged map.

use lapidary_factor::{Regression, matrix_from_tensor};
use lapidary_model::Model;

use super::cut::Cut;
use super::{pair, sites};
use crate::observe::observe;
use crate::{CalibrationData, Error, Result};

/// What a map that stands in for a run of blocks reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunInput {
    /// What the block before the run adds last, `M`, as ReplaceMe's map, which can be merged.
    Added,
    /// The whole stream before the run, and a constant. Such a map comes nearer, and cannot be
    /// merged: it needs a block of its own.
    Stream,
}

/// The sums of the regression of what is missed when the blocks `anchor + 1 ..= anchor + blocks`
/// go, `X_(anchor + blocks) − Y`, on what the map reads, `[tokens, width]` each. `Y` is the stream
/// to which block `anchor` adds last. By either input the outputs are the same numbers, so that
/// [`Regression::squared_error`] of both compares, on this data or another.
///
/// # Errors
/// When there are no such blocks, or block `anchor` adds nothing to a stream (post-norm), or one that
/// passes shortcuts.
pub fn run_regression(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    (anchor, blocks): (usize, usize),
    input: RunInput,
) -> Result<Regression> {
    super::replaceable(model, super::REPLACE_ME.name)?;
    let all = model.spec().expanded_blocks().len();
    if blocks == 0 || anchor.saturating_add(blocks) >= all {
        return Err(Error::invalid(
            "a run of blocks",
            format!("{blocks} behind block {anchor}"),
            format!("at least one, and within the {all} blocks"),
        ));
    }
    let cut = Cut { anchor, blocks };
    let width = model.spec().width;
    let mut sums = match input {
        RunInput::Added => Regression::through_origin(width, width),
        RunInput::Stream => Regression::with_intercept(width, width),
    };
    observe(model, data, batch, &sites(model, &[cut])?, |seen| {
        let (added, wanted) = pair(seen, model, cut)?;
        let read = match input {
            RunInput::Added => &added,
            RunInput::Stream => seen.rows(&format!("blocks.{anchor}.out"))?,
        };
        sums.add(
            matrix_from_tensor("what a map reads", read)?.as_ref(),
            matrix_from_tensor("what a block should add", &wanted)?.as_ref(),
        )?;
        Ok(())
    })?;
    Ok(sums)
}
