//! Biases by a network of one number, with its hidden units laid out for every query and key.

use super::{activate, linear};
use crate::{Activation, BiasSpan, Result, Tensor};

/// [`crate::functional_bias`] with the network run for every pair.
pub fn functional_bias(
    distances: &Tensor,
    scales: &Tensor,
    network: &[(Tensor, Tensor)],
    span: BiasSpan,
) -> Result<Tensor> {
    let (queries, keys) = (span.queries, span.keys);
    let positions = span.offset..span.offset + queries;
    let pairs = || {
        positions
            .clone()
            .flat_map(move |i| (0..keys).map(move |j| (i, j)))
    };
    let at = |table: &Tensor, index: &dyn Fn(usize, usize) -> usize| -> Result<Tensor> {
        let indices: Vec<u32> = pairs().map(|(i, j)| index(i, j) as u32).collect();
        let indices = Tensor::from_vec(indices, queries * keys, table.device())?;
        Ok(table.index_select(&indices, 0)?.unsqueeze(1)?)
    };
    let distances = at(distances, &|i, j| i.abs_diff(j))?;
    let mut x = (distances * at(scales, &|i, j| i.max(j))?)?;
    for (index, (weight, bias)) in network.iter().enumerate() {
        if index > 0 {
            x = activate(&x, Activation::Relu)?;
        }
        x = linear(&x, weight, Some(bias))?;
    }
    // [heads, query, key]
    let heads = span.heads(x.dims2()?.1);
    let side = |start: usize| {
        x.narrow(1, start, heads)?
            .t()?
            .reshape((heads, queries, keys))
    };
    let later: Vec<u8> = pairs().map(|(i, j)| u8::from(j > i)).collect();
    let later = Tensor::from_vec(later, (1, queries, keys), x.device())?;
    let past = side(0)?;
    let ahead = match span.causal {
        true => past.zeros_like()?,
        false => side(heads)?,
    };
    Ok(later
        .broadcast_as(past.shape())?
        .where_cond(&ahead, &past)?)
}
