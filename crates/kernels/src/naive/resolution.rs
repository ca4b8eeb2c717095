//! Attention in blocks of several sizes, laid out.

use crate::{Device, ResolutionOptions, Result, Tensor};

/// `[batch, heads, rows, value_width]` of [`crate::ResolutionAttention`], with the scores of all rows laid out, for the
/// size in which each pair of rows of a head meets, if it does, and the rows of each head that are there.
pub(crate) fn resolution_attention(
    [q, k, v]: [&Tensor; 3],
    options: &ResolutionOptions,
    lengths: &[usize],
    met: impl Fn(usize, usize, usize) -> Option<usize>,
) -> Result<Tensor> {
    let (batch, heads, rows, value_width) = v.dims4()?;
    let rows_of = |x: &Tensor, index: usize| -> Result<Tensor> {
        let x = x.flatten(0, 1)?.get(index)?;
        Ok(x.contiguous()?)
    };
    let mut outputs = Vec::with_capacity(batch * heads);
    for (index, &length) in lengths.iter().enumerate() {
        let [q, k, v] = [rows_of(q, index)?, rows_of(k, index)?, rows_of(v, index)?];
        let pairs = || (0..rows).flat_map(|i| (0..rows).map(move |j| (i, j)));
        let of: Vec<Option<usize>> = pairs().map(|(i, j)| met(index, i, j)).collect();
        let table = |numbers: Vec<f64>, columns: usize| -> Result<Tensor> {
            let count = numbers.len() / columns.max(1);
            let table = Tensor::from_vec(numbers, (count, columns), &Device::Cpu)?;
            Ok(table.to_dtype(q.dtype())?.to_device(q.device())?)
        };
        let bare = of.iter().map(|of| match of {
            Some(_) => 0.0,
            None => f64::NEG_INFINITY,
        });
        let mut scores = table(bare.collect(), rows)?;
        for (number, &size) in options.sizes.iter().enumerate() {
            // For each row the mean of the block that it is in, or its first row.
            let spread = |firsts: bool| {
                table(
                    pairs()
                        .map(|(i, j)| {
                            let block = i / size * size;
                            let end = length.min(block + size);
                            match (firsts, (block..end).contains(&j)) {
                                (true, _) => f64::from(u8::from(j == block)),
                                (false, true) => 1.0 / (end - block) as f64,
                                (false, false) => 0.0,
                            }
                        })
                        .collect(),
                    rows,
                )
            };
            let q = spread(options.causal)?.matmul(&q)?;
            let k = spread(false)?.matmul(&k)?;
            let here = of.iter().map(|of| f64::from(u8::from(*of == Some(number))));
            let part = (q.matmul(&k.t()?)? * options.scale)?;
            scores = (scores + part.mul(&table(here.collect(), rows)?)?)?;
        }
        // A row that meets nobody gets zeros and not 0/0.
        let most = scores.max_keepdim(1)?.detach();
        let most = most
            .gt(f64::NEG_INFINITY)?
            .where_cond(&most, &most.zeros_like()?)?;
        let weights = scores.broadcast_sub(&most)?.exp()?;
        let total = weights.sum_keepdim(1)?;
        let total = (&total + total.eq(0.0)?.to_dtype(total.dtype())?)?;
        outputs.push(weights.matmul(&v)?.broadcast_div(&total)?);
    }
    if outputs.is_empty() {
        return Ok(v.zeros_like()?);
    }
    Ok(Tensor::stack(&outputs, 0)?.reshape((batch, heads, rows, value_width))?)
}
