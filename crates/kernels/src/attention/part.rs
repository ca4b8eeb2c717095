//! Attention over a part of the keys, with what it takes to merge several parts into one softmax.

use super::tiles::{Positions, Problem, Saved};
use super::{Candle, applies, backward_tiles, forward_tiles};
use crate::backward::Apply;
use crate::host::{self, Host, by_dtype};
use crate::simd::Real;
use crate::{AttentionOptions, DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use std::borrow::Cow;

/// Which keys of a part a query may attend to.
#[derive(Clone, Debug)]
pub struct PartOptions {
    /// Scale, masks and bias, as in [`crate::attention`]. A bias is not differentiated; one by distance
    /// or of a function goes by the order that queries and keys lie in.
    pub attention: AttentionOptions,
    /// Positions of queries `[batch, query]` and keys `[batch, key]` in `u32`, where these were
    /// gathered out of order: `causal` and `window` then compare positions, and `query_offset`
    /// is not looked at.
    pub positions: Option<[Tensor; 2]>,
}

impl PartOptions {
    /// A part that lies in order.
    pub fn new(attention: AttentionOptions) -> Self {
        Self {
            attention,
            positions: None,
        }
    }
}

/// What attention over some of the keys gives.
#[derive(Clone, Debug)]
pub struct AttentionPart {
    /// `Σ_j softmax_j(s_ij) v_j`, `[batch, heads, query, value_width]`; zeros for a query that may
    /// see none of the keys.
    pub output: Tensor,
    /// `L_i = ln Σ_j e^{s_ij}`, `[batch, heads, query]`; `-∞` for a query that may see none.
    pub log_sums: Tensor,
}

impl AttentionPart {
    /// Attention over the keys of all `parts` together, a key that is in several counted several
    /// times: `Σ_r e^{L^r − L} o^r` with `L = ln Σ_r e^{L^r}`, and that `L`.
    ///
    /// # Errors
    /// For no parts, or parts of different shapes.
    pub fn merged(parts: &[Self]) -> Result<Self> {
        let [first, rest @ ..] = parts else {
            return Err(Error::argument(
                "merged attention",
                "parts",
                0,
                "at least one",
            ));
        };
        if rest.is_empty() {
            return Ok(first.clone());
        }
        // Finite, so that a query that sees nothing at all gets zeros and not 0/0.
        const NOTHING: f64 = -1e30;
        let finite = |part: &Self| part.log_sums.maximum(NOTHING);
        let mut maximum = finite(first)?.detach();
        for part in rest {
            maximum = maximum.maximum(&finite(part)?.detach())?;
        }
        let mut total: Option<Tensor> = None;
        let mut output: Option<Tensor> = None;
        for part in parts {
            let weight = (finite(part)? - &maximum)?.exp()?;
            let term = part.output.broadcast_mul(&weight.unsqueeze(3)?)?;
            total = Some(match total {
                Some(total) => (total + weight)?,
                None => weight,
            });
            output = Some(match output {
                Some(output) => (output + term)?,
                None => term,
            });
        }
        let (Some(total), Some(output)) = (total, output) else {
            return Ok(first.clone());
        };
        Ok(Self {
            output: output.broadcast_div(&total.unsqueeze(3)?)?,
            log_sums: (total.log()? + maximum)?,
        })
    }
}

/// Attention of `q` `[batch, heads, query, width]` over the keys `k` `[batch, groups, key, width]`
/// with values `v` `[batch, groups, key, value_width]`, which may be only some of the keys that
/// there are: the result says how much weight they have. Differentiable, in the log-sums too.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attention_part(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &PartOptions,
) -> Result<AttentionPart> {
    let (problem, sizes) = problem([q, k, v], options)?;
    let [batch, heads, _, queries, _, _, value_width] = sizes;
    if !applies(&[q, k, v], &options.attention) {
        return naive::attention_part(q, k, v, options);
    }
    let rows = packed([q, k, v], problem, options)?;
    let rows = rows.reshape((batch, queries, heads, value_width + 1))?;
    Ok(AttentionPart {
        output: rows.narrow(3, 0, value_width)?.transpose(1, 2)?,
        log_sums: rows
            .narrow(3, value_width, 1)?
            .squeeze(3)?
            .transpose(1, 2)?
            .contiguous()?,
    })
}

/// `[batch · queries · heads, value_width + 1]`.
fn packed([q, k, v]: [&Tensor; 3], problem: Problem, options: &PartOptions) -> Result<Tensor> {
    let bias = options.attention.bias.as_ref();
    let bias = bias.map(|bias| bias.numbers().detach());
    Ok(q.apply3(k, v, Part { problem, bias })?)
}

fn problem([q, k, v]: [&Tensor; 3], options: &PartOptions) -> Result<(Problem, [usize; 7])> {
    let (batch, heads, queries, width) = q.dims4()?;
    let (k_batch, groups, keys, k_width) = k.dims4()?;
    let (v_batch, v_groups, v_keys, value_width) = v.dims4()?;
    if (k_batch, k_width) != (batch, width) {
        let expected = format!("[{batch}, groups, keys, {width}]");
        return Err(Error::argument("attention part", "k", k.dims(), expected));
    }
    if (v_batch, v_groups, v_keys) != (batch, groups, keys) {
        let expected = format!("[{batch}, {groups}, {keys}, width]");
        return Err(Error::argument("attention part", "v", v.dims(), expected));
    }
    let sizes = [batch, heads, groups, queries, keys, width, value_width];
    let problem = Problem {
        positions: positions(options, batch, queries, keys)?,
        ..Problem::new(sizes, &options.attention)?
    };
    Ok((problem, sizes))
}

fn positions(
    options: &PartOptions,
    batch: usize,
    queries: usize,
    keys: usize,
) -> Result<Option<Positions>> {
    let Some([query, key]) = &options.positions else {
        return Ok(None);
    };
    let read = |name: &'static str, tensor: &Tensor, length: usize| -> Result<Vec<u32>> {
        if tensor.dims() != [batch, length] || tensor.dtype() != DType::U32 {
            let found = (tensor.dims(), tensor.dtype());
            let expected = format!("[{batch}, {length}] in u32");
            return Err(Error::argument("attention part", name, found, expected));
        }
        Ok(tensor.flatten_all()?.to_vec1()?)
    };
    Ok(Some(Positions {
        queries: read("query positions", query, queries)?,
        keys: read("key positions", key, keys)?,
    }))
}

/// Gives the log-sum behind each output, since an operation has one result.
struct Part {
    problem: Problem,
    bias: Option<Tensor>,
}

impl Part {
    /// Where the log-sum of an output `[batch, query, head]` lies among those `[batch, head, query]`.
    fn place(&self, row: usize) -> usize {
        let Problem { heads, queries, .. } = self.problem;
        let (batch, query, head) = (row / heads / queries, row / heads % queries, row % heads);
        (batch * heads + head) * queries + query
    }

    fn forward<T: Real>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Candle<(CpuStorage, Shape)> {
        let (output, log_sums) = forward_tiles::<T>(&self.problem, inputs, self.bias.as_ref())?;
        let width = self.problem.value_width;
        let mut rows = host::unwritten::<T>(output.len() + log_sums.len());
        host::for_rows(
            &mut rows,
            width + 1,
            1,
            #[inline(always)]
            |row, to| {
                if let Some((last, to)) = to.split_last_mut() {
                    to.copy_from_slice(&output[row * width..(row + 1) * width]);
                    *last = log_sums[self.place(row)];
                }
            },
        );
        let shape = Shape::from((log_sums.len(), width + 1));
        Ok((T::to_cpu_storage_owned(rows), shape))
    }

    /// Outputs and log-sums, each for itself.
    fn apart<T: Real>(&self, rows: &[T]) -> (Vec<T>, Vec<T>) {
        let width = self.problem.value_width;
        let count = rows.len() / (width + 1);
        let mut output = host::unwritten::<T>(count * width);
        let mut log_sums = vec![T::zero(); count];
        for (row, from) in rows.chunks_exact(width + 1).enumerate() {
            if let Some((last, from)) = from.split_last() {
                output[row * width..(row + 1) * width].copy_from_slice(from);
                log_sums[self.place(row)] = *last;
            }
        }
        (output, log_sums)
    }

    fn backward<T: Real>(
        &self,
        inputs: [&Tensor; 3],
        rows: &Tensor,
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let (rows, gradient) = (Host::new(rows), Host::new(gradient));
        let (output, log_sums) = self.apart(&rows.ordered::<T>()?);
        let (d_output, d_log_sums) = self.apart(&gradient.ordered::<T>()?);
        let saved = Saved {
            log_sums: Cow::Owned(log_sums),
            output: Cow::Owned(output),
            gradient: Cow::Owned(d_output),
            log_sums_gradient: Cow::Owned(d_log_sums),
        };
        backward_tiles(&self.problem, inputs, (self.bias.as_ref(), None), &saved)
    }
}

impl CustomOp3 for Part {
    fn name(&self) -> &'static str {
        "attention part"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => self.forward::<T>([(q, q_layout), (k, k_layout), (v, v_layout)]))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        both: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] =
            by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], both, gradient))?;
        Ok((dq, dk, dv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::check::{difference, gradient_error};
    use crate::test_data::arange;

    const SIZES: (usize, usize, usize, usize) = (2, 2, 9, 11);

    fn inputs() -> [Tensor; 3] {
        let (batch, heads, queries, keys) = SIZES;
        [
            arange(&[batch, heads, queries, 4], 1.0, DType::F64),
            arange(&[batch, heads, keys, 4], 2.0, DType::F64),
            arange(&[batch, heads, keys, 3], 3.0, DType::F64),
        ]
    }

    /// Positions out of order, some of them met twice.
    fn scattered() -> [Tensor; 2] {
        let (batch, _, queries, keys) = SIZES;
        let at = |length: usize, step: usize| {
            let all: Vec<u32> = (0..batch * length)
                .map(|i| (i * step % 13) as u32)
                .collect();
            Tensor::from_vec(all, (batch, length), &Device::Cpu).unwrap()
        };
        [at(queries, 5), at(keys, 7)]
    }

    fn options() -> Vec<PartOptions> {
        let plain = AttentionOptions::new(4);
        let masked = |causal, window| PartOptions {
            positions: Some(scattered()),
            attention: AttentionOptions {
                causal,
                window,
                ..plain.clone()
            },
        };
        vec![
            PartOptions::new(plain.clone()),
            PartOptions::new(AttentionOptions {
                causal: true,
                ..plain.clone()
            }),
            masked(false, None),
            masked(true, None),
            masked(true, Some(4)),
            masked(false, Some(0)),
        ]
    }

    #[test]
    fn equals_the_composition_in_value_and_gradient() {
        let [q, k, v] = inputs();
        for options in options() {
            let ours = attention_part(&q, &k, &v, &options).unwrap();
            let truth = naive::attention_part(&q, &k, &v, &options).unwrap();
            assert!(difference(&ours.output, &truth.output).unwrap() < 1e-12);
            let finite = |x: &Tensor| x.maximum(-1e3).unwrap();
            let sums = [finite(&ours.log_sums), finite(&truth.log_sums)];
            assert!(difference(&sums[0], &sums[1]).unwrap() < 1e-12);
            let error = gradient_error(
                |x| {
                    let part = attention_part(&x[0], &x[1], &x[2], &options)?;
                    let seen = part.log_sums.maximum(-1e3)?.unsqueeze(3)?;
                    Ok(part.output.broadcast_mul(&seen.sin()?)?)
                },
                &[q.clone(), k.clone(), v.clone()],
            );
            assert!(error.unwrap() < 1e-6, "{options:?}");
        }
    }

    #[test]
    fn parts_merge_into_attention_over_all_keys() {
        let [q, k, v] = inputs();
        let keys = SIZES.3;
        let options = PartOptions::new(AttentionOptions::new(4));
        let whole = attention_part(&q, &k, &v, &options).unwrap();
        for cut in [0, 1, 5, keys] {
            let part = |start: usize, length: usize| {
                let [k, v] = [&k, &v].map(|x| x.narrow(2, start, length).unwrap());
                attention_part(&q, &k, &v, &options).unwrap()
            };
            let parts = [part(0, cut), part(cut, keys - cut)];
            let merged = AttentionPart::merged(&parts).unwrap();
            assert!(difference(&merged.output, &whole.output).unwrap() < 1e-12);
            assert!(difference(&merged.log_sums, &whole.log_sums).unwrap() < 1e-12);
        }
        // A part met twice counts twice, which one softmax over everything does not see.
        let twice = AttentionPart::merged(&[whole.clone(), whole.clone()]).unwrap();
        assert!(difference(&twice.output, &whole.output).unwrap() < 1e-12);
        let more = (whole.log_sums + 2f64.ln()).unwrap();
        assert!(difference(&twice.log_sums, &more).unwrap() < 1e-12);
        assert!(AttentionPart::merged(&[]).is_err());
    }

    #[test]
    fn a_query_without_keys_gets_zeros() {
        let [q, k, v] = inputs();
        let (batch, _, queries, keys) = SIZES;
        let at = |value: u32, length: usize| {
            (Tensor::ones((batch, length), DType::U32, &Device::Cpu).unwrap() * f64::from(value))
                .unwrap()
        };
        let options = PartOptions {
            positions: Some([at(1, queries), at(2, keys)]),
            attention: AttentionOptions {
                causal: true,
                ..AttentionOptions::new(4)
            },
        };
        let part = attention_part(&q, &k, &v, &options).unwrap();
        let merged = AttentionPart::merged(&[part.clone(), part]).unwrap();
        let sum = merged.output.abs().unwrap().sum_all().unwrap();
        assert_eq!(sum.to_scalar::<f64>().unwrap(), 0.0);
    }

    #[test]
    fn positions_of_another_shape_are_refused() {
        let [q, k, v] = inputs();
        let [query, key] = scattered();
        let options = PartOptions {
            positions: Some([key, query]),
            ..PartOptions::new(AttentionOptions::new(4))
        };
        assert!(attention_part(&q, &k, &v, &options).is_err());
    }
}
