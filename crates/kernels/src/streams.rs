//! Passes over values that are carried as a sum of streams, `[streams, rows, width]`.
//!
//! Each function reads its operands once and writes its result once, where a composition of
//! tensor operations would hold several temporaries as large as all streams together. Fields
//! (one vector for each row, the same for every stream) are `[rows, width]`, or `[1, width]`
//! where every row has the same. None of these is differentiated.

use crate::host::{self, Host, Shared, by_dtype, for_rows, fused, share};
use crate::product::{Into, Matrix, multiply_at};
use crate::simd::{self, Real};
use crate::{D, DType, Error, Result, Tensor};
use std::borrow::Cow;

/// `Σ_w streams[k, r, w] · field[r, w]`, `[streams, rows]`.
pub fn stream_dot(streams: &Tensor, field: &Tensor) -> Result<Tensor> {
    let (k, rows, width) = check_field("stream_dot", streams, field)?;
    if !fused(&[streams, field]) {
        return Ok(streams.broadcast_mul(field)?.sum(D::Minus1)?);
    }
    Ok(by_dtype!(streams.dtype(), T => {
        let (streams, field) = (Host::new(streams), Host::new(field));
        let (streams, field) = (streams.ordered::<T>()?, field.ordered::<T>()?);
        let step = if field.len() == width { 0 } else { width };
        let mut out = host::unwritten::<T>(k * rows);
        for_each(&mut out, width, #[inline(always)] |i, out| {
            let row = i % rows.max(1) * step;
            *out = simd::dot(&streams[i * width..][..width], &field[row..][..width]);
        });
        host::tensor(out, &[k, rows])
    })?)
}

/// `Σ_w streams[k, r, w]²`, `[streams, rows]`.
pub fn stream_squares(streams: &Tensor) -> Result<Tensor> {
    let (k, rows, width) = streams.dims3()?;
    if !fused(&[streams]) {
        return Ok(streams.sqr()?.sum(D::Minus1)?);
    }
    Ok(by_dtype!(streams.dtype(), T => {
        let streams = Host::new(streams);
        let streams = streams.ordered::<T>()?;
        let mut out = host::unwritten::<T>(k * rows);
        for_each(&mut out, width, #[inline(always)] |i, out| {
            let row = &streams[i * width..][..width];
            *out = simd::dot(row, row);
        });
        host::tensor(out, &[k, rows])
    })?)
}

/// `Σ_k streams[k, r, w]`, `[rows, width]`, added in the order of the streams.
pub fn stream_sum(streams: &Tensor) -> Result<Tensor> {
    let (k, rows, width) = streams.dims3()?;
    if !fused(&[streams]) {
        return Ok(streams.sum(0)?);
    }
    Ok(by_dtype!(streams.dtype(), T => {
        let streams = Host::new(streams);
        let streams = streams.ordered::<T>()?;
        let mut out = vec![T::default(); rows * width];
        for_rows(&mut out, width, k, #[inline(always)] |row, out| {
            for stream in 0..k {
                let from = &streams[(stream * rows + row) * width..][..width];
                for (out, from) in out.iter_mut().zip(from) {
                    *out += *from;
                }
            }
        });
        host::tensor(out, &[rows, width])
    })?)
}

/// Weights `[streams, rows]` and a field: `weights[k, r] · field[r]` is a stream's share of it.
pub type StreamShare = (Tensor, Tensor);

/// What [`stream_affine`] does to each stream, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamAffine<'a> {
    /// Other streams `[streams, rows, width]`, added.
    pub add: Option<&'a Tensor>,
    /// Shares that are added first.
    pub before: &'a [StreamShare],
    /// Whether each stream's own mean over the width is subtracted.
    pub centre: bool,
    /// A field that multiplies.
    pub slope: Option<&'a Tensor>,
    /// Shares that are added last.
    pub after: &'a [StreamShare],
}

/// `slope[r] ⊙ (t − mean t) + Σ_after w[k, r] c[r]` with
/// `t = streams[k, r] + add[k, r] + Σ_before w[k, r] c[r]`, in one pass.
pub fn stream_affine(streams: &Tensor, map: StreamAffine<'_>) -> Result<Tensor> {
    let (k, rows, width) = streams.dims3()?;
    let mut operands = vec![streams];
    if let Some(add) = map.add {
        same_shape("add", add, streams.dims())?;
        operands.push(add);
    }
    if let Some(slope) = map.slope {
        check_field("stream_affine", streams, slope)?;
        operands.push(slope);
    }
    for (weights, constant) in map.before.iter().chain(map.after) {
        check_field("stream_affine", streams, constant)?;
        same_shape("weights", weights, &[k, rows])?;
        operands.extend([weights, constant]);
    }
    if !fused(&operands) {
        return naive_affine(streams, map);
    }
    Ok(by_dtype!(streams.dtype(), T => {
        let streams = Host::new(streams);
        let streams = streams.ordered::<T>()?;
        let [add, slope] = [map.add, map.slope].map(|operand| operand.map(Host::new));
        let add = add.as_ref().map(Host::ordered::<T>).transpose()?;
        let slope = slope.as_ref().map(Host::ordered::<T>).transpose()?;
        let before = hosts(map.before);
        let before = ordered_pairs::<T>(&before)?;
        let after = hosts(map.after);
        let after = ordered_pairs::<T>(&after)?;
        let mut out = host::unwritten::<T>(k * rows * width);
        for_rows(&mut out, width, 2, #[inline(always)] |i, out| {
            let row = i % rows.max(1);
            let x = &streams[i * width..][..width];
            match &add {
                Some(add) => {
                    for ((out, x), add) in out.iter_mut().zip(x).zip(&add[i * width..]) {
                        *out = *x + *add;
                    }
                }
                None => out.copy_from_slice(x),
            }
            add_shares(out, &before, i, row);
            if map.centre {
                let mean = simd::sum(out) / T::of(width as f64);
                for out in out.iter_mut() {
                    *out -= mean;
                }
            }
            if let Some(slope) = &slope {
                for (out, slope) in out.iter_mut().zip(field_row(slope, row, width)) {
                    *out *= *slope;
                }
            }
            add_shares(out, &after, i, row);
        });
        host::tensor(out, &[k, rows, width])
    })?)
}

/// The row of a field; a field of one row is read again for each.
#[inline(always)]
fn field_row<T>(field: &[T], row: usize, width: usize) -> &[T] {
    let start = if field.len() == width { 0 } else { row * width };
    &field[start..][..width]
}

type Pairs<'a, T> = Vec<(Cow<'a, [T]>, Cow<'a, [T]>)>;

fn hosts(shares: &[StreamShare]) -> Vec<(Host<'_>, Host<'_>)> {
    let host = |(weights, constant)| (Host::new(weights), Host::new(constant));
    shares.iter().map(|(w, c)| host((w, c))).collect()
}

fn ordered_pairs<'a, T: Real>(
    hosts: &'a [(Host<'_>, Host<'_>)],
) -> candle_core::Result<Pairs<'a, T>> {
    let pair = |(w, c): &'a (Host<'_>, Host<'_>)| Ok((w.ordered::<T>()?, c.ordered::<T>()?));
    hosts.iter().map(pair).collect()
}

#[inline(always)]
fn add_shares<T: Real>(out: &mut [T], shares: &Pairs<'_, T>, i: usize, row: usize) {
    for (weights, constant) in shares {
        let weight = weights[i];
        let constant = field_row(constant, row, out.len());
        for (out, constant) in out.iter_mut().zip(constant) {
            *out = constant.mul_add(weight, *out);
        }
    }
}

fn naive_affine(streams: &Tensor, map: StreamAffine<'_>) -> Result<Tensor> {
    let share = |out: Tensor, shares: &[StreamShare]| -> Result<Tensor> {
        shares.iter().try_fold(out, |out, (weights, constant)| {
            let share = weights
                .unsqueeze(2)?
                .broadcast_mul(&constant.unsqueeze(0)?)?;
            Ok((out + share)?)
        })
    };
    let mut out = streams.clone();
    if let Some(add) = map.add {
        out = (out + add)?;
    }
    out = share(out, map.before)?;
    if map.centre {
        out = out.broadcast_sub(&out.mean_keepdim(D::Minus1)?)?;
    }
    if let Some(slope) = map.slope {
        out = out.broadcast_mul(slope)?;
    }
    share(out, map.after)
}

fn same_shape(argument: &'static str, found: &Tensor, expected: &[usize]) -> Result<()> {
    if found.dims() == expected {
        return Ok(());
    }
    let expected = format!("{expected:?}");
    Err(Error::argument(
        "stream_affine",
        argument,
        found.dims(),
        expected,
    ))
}

/// Mixes the positions of every stream by attention weights `[batch, heads, query, key]`:
/// `values` `[streams, batch, key, groups · head]` gives `[streams, batch, query, heads · head]`,
/// head `h` reading group `h / (heads / groups)`. Heads are read and written where they lie.
pub fn stream_mix(weights: &Tensor, values: &Tensor, groups: usize) -> Result<Tensor> {
    let sizes = Mixing::new(weights, values.dims().get(1..).unwrap_or_default(), groups)?;
    let k = values.dim(0)?;
    let Mixing {
        batch,
        heads,
        queries,
        keys,
        head,
        ..
    } = sizes;
    if !fused(&[weights, values]) {
        // [streams, batch, key, groups, head] -> [streams, batch, heads, key, head]
        let split = values
            .reshape((k * batch, keys, groups, head))?
            .transpose(1, 2)?;
        let split = crate::naive::repeat_groups(&split, heads)?
            .reshape((k, batch, heads, keys, head))?
            .contiguous()?;
        let weights = weights
            .unsqueeze(0)?
            .broadcast_as((k, batch, heads, queries, keys))?;
        let mixed = weights.contiguous()?.matmul(&split)?.transpose(2, 3)?;
        return Ok(mixed.reshape((k, batch, queries, heads * head))?);
    }
    Ok(by_dtype!(values.dtype(), T => {
        let (weights, values) = (Host::new(weights), Host::new(values));
        let (weights, values) = (weights.ordered::<T>()?, values.ordered::<T>()?);
        let (input, output) = (keys * groups * head, queries * heads * head);
        let mut out = host::unwritten::<T>(k * batch * output);
        let shared = Shared::new(&mut out);
        share(k * batch * heads, queries * keys * head, |range| for item in range {
            let (block, h) = (item / heads, item % heads);
            let group = h / (heads / groups);
            let alpha = &weights[(block % batch * heads + h) * queries * keys..][..queries * keys];
            let source = &values[block * input + group * head..(block + 1) * input];
            let start = block * output + h * head;
            let length = output - h * head;
            // SAFETY: each head writes its own columns, `heads · head` apart, of its own block.
            unsafe {
                multiply_at(
                    shared.pointer(start, length),
                    heads * head,
                    Into::Replace,
                    T::of(1.0),
                    Matrix::packed(alpha, queries, keys),
                    Matrix::spaced(source, keys, head, groups * head),
                    false,
                );
            }
        });
        host::tensor(out, &[k, batch, queries, heads * head])
    })?)
}

/// [`stream_mix`] of streams that are still alone at their positions: row `j` of `value`
/// `[batch, key, groups · head]` belongs to stream `stream_of[j]` alone. Gives the streams
/// `first..first + count`.
pub fn stream_mix_own(
    weights: &Tensor,
    value: &Tensor,
    groups: usize,
    stream_of: &[usize],
    first: usize,
    count: usize,
) -> Result<Tensor> {
    let sizes = Mixing::new(weights, value.dims(), groups)?;
    let Mixing {
        batch,
        heads,
        queries,
        keys,
        head,
        ..
    } = sizes;
    if stream_of.len() != keys {
        let expected = format!("{keys} entries, one for each key");
        return Err(Error::argument(
            "stream_mix_own",
            "stream_of",
            stream_of,
            expected,
        ));
    }
    if !fused(&[weights, value]) {
        let member: Vec<f64> = (first..first + count)
            .flat_map(|stream| {
                stream_of
                    .iter()
                    .map(move |of| f64::from(u8::from(*of == stream)))
            })
            .collect();
        let member = Tensor::from_vec(member, (count, 1, keys, 1), value.device())?;
        let own = value
            .unsqueeze(0)?
            .broadcast_mul(&member.to_dtype(value.dtype())?)?;
        return stream_mix(weights, &own, groups);
    }
    let mut keys_of = vec![Vec::new(); count];
    for (key, stream) in stream_of.iter().enumerate() {
        if let Some(keys) = stream
            .checked_sub(first)
            .and_then(|index| keys_of.get_mut(index))
        {
            keys.push(key);
        }
    }
    Ok(by_dtype!(value.dtype(), T => {
        let (weights, value) = (Host::new(weights), Host::new(value));
        let (weights, value) = (weights.ordered::<T>()?, value.ordered::<T>()?);
        let width = heads * head;
        let mut out = vec![T::default(); count * batch * queries * width];
        for_rows(&mut out, width, 2, #[inline(always)] |i, out| {
            let (query, block) = (i % queries, i / queries);
            let (example, stream) = (block % batch, block / batch);
            for key in &keys_of[stream] {
                let row = &value[(example * keys + key) * groups * head..][..groups * head];
                for (h, out) in out.chunks_exact_mut(head).enumerate() {
                    let alpha = weights[((example * heads + h) * queries + query) * keys + key];
                    let group = h / (heads / groups);
                    for (out, v) in out.iter_mut().zip(&row[group * head..][..head]) {
                        *out = v.mul_add(alpha, *out);
                    }
                }
            }
        });
        host::tensor(out, &[count, batch, queries, width])
    })?)
}

struct Mixing {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    head: usize,
}

impl Mixing {
    fn new(weights: &Tensor, value: &[usize], groups: usize) -> Result<Self> {
        let (batch, heads, queries, keys) = weights.dims4()?;
        match value {
            [b, k, width]
                if (*b, *k) == (batch, keys)
                    && groups > 0
                    && width.is_multiple_of(groups)
                    && heads.is_multiple_of(groups) =>
            {
                let head = width / groups;
                Ok(Self {
                    batch,
                    heads,
                    queries,
                    keys,
                    head,
                })
            }
            found => Err(Error::argument(
                "stream_mix",
                "values",
                found,
                format!(
                    "[{batch}, {keys}, a multiple of {groups} groups, which divide {heads} heads]"
                ),
            )),
        }
    }
}

/// A tensor of streams that is written block by block.
#[derive(Debug)]
pub struct StreamBuffer {
    data: Data,
    shape: Vec<usize>,
    written: usize,
}

#[derive(Debug)]
enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
    /// Types and devices that the fused kernels do not know are joined at the end.
    Blocks(Vec<Tensor>),
}

impl StreamBuffer {
    /// Room for a tensor of `shape`, the streams first, like `example` in type and device.
    pub fn new(shape: &[usize], example: &Tensor) -> Self {
        let count = shape.iter().product();
        let data = match (fused(&[example]), example.dtype()) {
            (true, DType::F32) => Data::F32(Vec::with_capacity(count)),
            (true, DType::F64) => Data::F64(Vec::with_capacity(count)),
            _ => Data::Blocks(Vec::new()),
        };
        Self {
            data,
            shape: shape.to_vec(),
            written: 0,
        }
    }

    /// Writes the next streams.
    pub fn push(&mut self, block: &Tensor) -> Result<()> {
        self.written += block.elem_count();
        match &mut self.data {
            Data::F32(data) => data.extend_from_slice(&Host::new(block).ordered::<f32>()?),
            Data::F64(data) => data.extend_from_slice(&Host::new(block).ordered::<f64>()?),
            Data::Blocks(blocks) => blocks.push(block.clone()),
        }
        Ok(())
    }

    /// The tensor; an error when the blocks do not fill it.
    pub fn finish(self) -> Result<Tensor> {
        let count: usize = self.shape.iter().product();
        if self.written != count {
            let expected = format!("{count}, the size of {:?}", self.shape);
            return Err(Error::argument(
                "StreamBuffer",
                "elements written",
                self.written,
                expected,
            ));
        }
        Ok(match self.data {
            Data::F32(data) => host::tensor(data, &self.shape)?,
            Data::F64(data) => host::tensor(data, &self.shape)?,
            Data::Blocks(blocks) => Tensor::cat(&blocks, 0)?.reshape(self.shape)?,
        })
    }
}

fn check_field(
    kernel: &'static str,
    streams: &Tensor,
    field: &Tensor,
) -> Result<(usize, usize, usize)> {
    let (k, rows, width) = streams.dims3()?;
    match field.dims() {
        [r, w] if (*r == rows || *r == 1) && *w == width => Ok((k, rows, width)),
        found => {
            let expected = format!("[{rows}, {width}] or [1, {width}]");
            Err(Error::argument(kernel, "field", found, expected))
        }
    }
}

/// Calls `body(i, &mut out[i])` for every element, each worth `work`, in parallel, vectorised.
fn for_each<T: Real>(out: &mut [T], work: usize, body: impl Fn(usize, &mut T) + Sync) {
    for_rows(
        out,
        1,
        work,
        #[inline(always)]
        |i, out| {
            if let Some(out) = out.first_mut() {
                body(i, out);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    fn streams(k: usize, rows: usize, width: usize, dtype: DType) -> Tensor {
        arange(&[k, rows, width], 1.0, dtype)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn reductions_equal_their_compositions(k in 1usize..6, rows in 1usize..5, width in 1usize..40, same: bool) {
            let field_rows = if same { 1 } else { rows };
            compare(1e-5, |dtype| {
                let (s, f) = (streams(k, rows, width, dtype), arange(&[field_rows, width], 2.0, dtype));
                let plain = s.broadcast_mul(&f).unwrap().sum(D::Minus1).unwrap();
                (stream_dot(&s, &f).unwrap(), plain)
            });
            compare(1e-5, |dtype| {
                let s = streams(k, rows, width, dtype);
                (stream_squares(&s).unwrap(), s.sqr().unwrap().sum(D::Minus1).unwrap())
            });
            compare(1e-5, |dtype| {
                let s = streams(k, rows, width, dtype);
                (stream_sum(&s).unwrap(), s.sum(0).unwrap())
            });
        }

        #[test]
        fn the_affine_pass_equals_its_composition(
            k in 1usize..6, rows in 1usize..5, width in 1usize..40,
            add: bool, centre: bool, slope: bool, same: bool, before in 0usize..3, after in 0usize..3,
        ) {
            let field_rows = if same { 1 } else { rows };
            compare(1e-5, |dtype| {
                let s = streams(k, rows, width, dtype);
                let other = arange(&[k, rows, width], 5.0, dtype);
                let field = arange(&[field_rows, width], 2.0, dtype);
                let share = |phase: usize| {
                    let weights = arange(&[k, rows], phase as f64, dtype);
                    (weights, arange(&[field_rows, width], phase as f64 + 0.5, dtype))
                };
                let before: Vec<_> = (0..before).map(share).collect();
                let after: Vec<_> = (3..3 + after).map(share).collect();
                let map = StreamAffine {
                    add: add.then_some(&other),
                    before: &before,
                    centre,
                    slope: slope.then_some(&field),
                    after: &after,
                };
                (stream_affine(&s, map).unwrap(), naive_affine(&s, map).unwrap())
            });
        }

        #[test]
        fn mixing_equals_attention_over_each_stream(
            k in 1usize..4, batch in 1usize..3, queries in 1usize..5, keys in 1usize..5,
            groups in 1usize..3, repeat in 1usize..3, head in 1usize..5,
        ) {
            let heads = groups * repeat;
            compare(1e-5, |dtype| {
                let weights = arange(&[batch, heads, queries, keys], 1.0, dtype);
                let values = arange(&[k, batch, keys, groups * head], 2.0, dtype);
                let mut plain = Vec::new();
                for stream in 0..k {
                    let v = values.get(stream).unwrap();
                    let v = v.reshape((batch, keys, groups, head)).unwrap().transpose(1, 2).unwrap();
                    let v = crate::naive::repeat_groups(&v, heads).unwrap().contiguous().unwrap();
                    let mixed = weights.matmul(&v).unwrap().transpose(1, 2).unwrap();
                    plain.push(mixed.reshape((batch, queries, heads * head)).unwrap());
                }
                (stream_mix(&weights, &values, groups).unwrap(), Tensor::stack(&plain, 0).unwrap())
            });
            compare(1e-5, |dtype| {
                let weights = arange(&[batch, heads, queries, keys], 1.0, dtype);
                let value = arange(&[batch, keys, groups * head], 2.0, dtype);
                let stream_of: Vec<usize> = (0..keys).map(|key| (key * 2) % 3).collect();
                let member: Vec<f64> = (0..3)
                    .flat_map(|s| stream_of.iter().map(move |of| f64::from(u8::from(*of == s))))
                    .collect();
                let member = Tensor::from_vec(member, (3, 1, keys, 1), value.device()).unwrap();
                let own = value.unsqueeze(0).unwrap()
                    .broadcast_mul(&member.to_dtype(dtype).unwrap()).unwrap();
                let plain = stream_mix(&weights, &own, groups).unwrap().narrow(0, 1, 2).unwrap();
                let fused = stream_mix_own(&weights, &value, groups, &stream_of, 1, 2).unwrap();
                (fused, plain)
            });
        }
    }

    #[test]
    fn strided_streams_are_read_through_their_layout() {
        compare(1e-5, |dtype| {
            let s = arange(&[3, 5, 4], 1.0, dtype).transpose(1, 2).unwrap();
            let f = arange(&[5, 4], 2.0, dtype).t().unwrap();
            let plain = s.broadcast_mul(&f).unwrap().sum(D::Minus1).unwrap();
            (stream_dot(&s, &f).unwrap(), plain)
        });
    }

    #[test]
    fn a_buffer_is_filled_exactly_or_refused() {
        let block = arange(&[2, 3], 1.0, DType::F64);
        let mut buffer = StreamBuffer::new(&[4, 3], &block);
        buffer.push(&block).unwrap();
        buffer.push(&block).unwrap();
        let joined = buffer.finish().unwrap();
        assert_eq!(joined.dims(), [4, 3]);
        assert_eq!(
            crate::check::difference(&joined.narrow(0, 2, 2).unwrap(), &block).unwrap(),
            0.0
        );
        let mut buffer = StreamBuffer::new(&[4, 3], &block);
        buffer.push(&block).unwrap();
        assert!(
            buffer
                .finish()
                .unwrap_err()
                .to_string()
                .contains("elements written is 6")
        );
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let s = arange(&[2, 3, 4], 1.0, DType::F32);
        let f = arange(&[2, 4], 1.0, DType::F32);
        assert!(stream_dot(&s, &f).is_err());
        let weights = arange(&[1, 2, 3, 3], 1.0, DType::F32);
        let values = arange(&[2, 1, 3, 5], 1.0, DType::F32);
        assert!(stream_mix(&weights, &values, 2).is_err());
    }
}
