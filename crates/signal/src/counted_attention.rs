//! What attention costs, by the keys that each query may see.

use crate::error::tensor;
use crate::meter::{Meter, bytes_of};
use crate::{Result, Signal};
use lapidary_kernels::{AttentionOptions, DType, Tensor};

/// Both products of attention over the keys each query may see, and the softmax. Whether heads
/// are split or merged makes no difference to the sizes.
pub(crate) fn count_attention(
    meter: &Meter,
    heads: usize,
    q: &Signal,
    k: &Signal,
    v: &Signal,
    output: &Tensor,
    options: &AttentionOptions,
) -> Result<()> {
    let batch = tensor(q.value.dim(0))?;
    let length = |x: &Signal| tensor(x.value.dim(x.value.rank() - 2));
    let (queries, keys) = (length(q)?, length(k)?);
    let rows = (batch * heads * queries).max(1);
    let (width, value_width) = (q.value.elem_count() / rows, output.elem_count() / rows);
    let kept = match &options.key_padding {
        Some(padding) => tensor(tensor(padding.to_dtype(DType::U8))?.to_vec2::<u8>())?,
        None => vec![vec![1; keys]; batch],
    };
    let mut visible = 0;
    for sequence in &kept {
        for i in 0..queries {
            let position = i + options.query_offset;
            let sees = |j: usize| {
                !(options.causal && j > position)
                    && options
                        .window
                        .is_none_or(|window| position.abs_diff(j) < window)
            };
            visible += sequence
                .iter()
                .enumerate()
                .filter(|(j, kept)| **kept != 0 && sees(*j))
                .count() as u64;
        }
    }
    meter.count(
        visible * heads as u64 * (2 * width as u64 + 2 * value_width as u64 + 5),
        bytes_of(&q.value) + bytes_of(&k.value) + bytes_of(&v.value) + bytes_of(output),
    );
    Ok(())
}
