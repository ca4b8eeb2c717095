//! Attention that never holds the `[query, key]` matrix.
//!
//! Forward: queries and keys are taken in tiles and the softmax is kept online (Dao et al.,
//! "FlashAttention", arXiv 2205.14135): with running maximum `m` and sum `l` per query,
//! each tile `S = scale · Q Kᵀ + bias` gives
//! `m' = max(m, max S)`, `l' = l e^{m-m'} + Σ e^{S-m'}`, `O' = O e^{m-m'} + e^{S-m'} V`.
//! Backward: with the saved `L = m + ln l` the weights are computed again per tile,
//! `P = e^{S-L}`, and with `δ = Σ ∂O ∘ O` per query
//! `∂V += Pᵀ ∂O`, `∂S = P ∘ (∂O Vᵀ - δ)`, `∂Q += scale ∂S K`, `∂K += scale ∂Sᵀ Q`, `∂bias += ∂S`, the
//! diagonals of `∂S` summed where the bias is one of distances, and what lies on each straight piece where it is a
//! function.

mod attended;
mod bias;
mod blocks;
mod part;
mod tiles;

pub use attended::Attended;
pub use bias::ScoreBias;
pub use blocks::{BlockAttention, BlockPart, Listed, SummaryAttention};
pub use part::{AttentionPart, PartOptions, attention_part};
pub(crate) use tiles::weights_and_slopes;

use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{AttentionOptions, DType, Error, Result, Tensor, naive};
use bias::BiasRows;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, WithDType};
use std::sync::OnceLock;
use tiles::{Heads, Problem};

type Candle<T> = candle_core::Result<T>;

/// `softmax(scale · Q Kᵀ + bias) V`, `[batch, heads, query, value_width]`, for `q`
/// `[batch, heads, query, width]`, `k` `[batch, groups, key, width]` and `v`
/// `[batch, groups, key, value_width]`; see [`AttentionOptions`] for masks and bias.
///
/// Memory grows with `query + key`, not with their product, unless a bias of pairs is given.
/// The result is a view of a `[batch, query, heads, value_width]` tensor, so that merging the
/// heads again (transpose, reshape) copies nothing.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let (batch, heads, queries, width) = q.dims4()?;
    let (k_batch, groups, keys, k_width) = k.dims4()?;
    let (v_batch, v_groups, v_keys, value_width) = v.dims4()?;
    if (k_batch, k_width) != (batch, width) {
        let expected = format!("[{batch}, groups, keys, {width}]");
        return Err(Error::argument("attention", "k", k.dims(), expected));
    }
    if (v_batch, v_groups, v_keys) != (batch, groups, keys) {
        let expected = format!("[{batch}, {groups}, {keys}, width]");
        return Err(Error::argument("attention", "v", v.dims(), expected));
    }
    let problem = Problem::new(
        [batch, heads, groups, queries, keys, width, value_width],
        options,
    )?;
    if !applies(&[q, k, v], options) {
        return naive::attention(q, k, v, options);
    }
    let merged = run(problem, q, k, v, options)?;
    Ok(merged
        .reshape((batch, queries, heads, value_width))?
        .transpose(1, 2)?)
}

/// [`attention`] on heads that lie side by side, as a projection leaves them: `q`
/// `[batch, query, heads · width]`, `k` and `v` `[batch, key, groups · width]`, giving
/// `[batch, query, heads · value_width]`. No transposes stand in the graph, which spares the
/// backward pass several copies.
///
/// # Errors
/// When the shapes do not fit each other or the number of heads.
pub fn merged_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    groups: usize,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let (batch, queries, q_width) = q.dims3()?;
    let (k_batch, keys, k_width) = k.dims3()?;
    let (v_batch, v_keys, v_width) = v.dims3()?;
    if heads == 0 || !q_width.is_multiple_of(heads) {
        let expected = format!("[batch, query, a multiple of {heads}]");
        return Err(Error::argument("attention", "q", q.dims(), expected));
    }
    let width = q_width / heads;
    if k_batch != batch || k_width != groups * width {
        let expected = format!("[{batch}, keys, {}]", groups * width);
        return Err(Error::argument("attention", "k", k.dims(), expected));
    }
    if (v_batch, v_keys) != (batch, keys) || groups == 0 || !v_width.is_multiple_of(groups) {
        let expected = format!("[{batch}, {keys}, a multiple of {groups}]");
        return Err(Error::argument("attention", "v", v.dims(), expected));
    }
    let value_width = v_width / groups;
    let problem = Problem {
        merged: true,
        ..Problem::new(
            [batch, heads, groups, queries, keys, width, value_width],
            options,
        )?
    };
    if !applies(&[q, k, v], options) {
        let split = |x: &Tensor, heads: usize| -> Result<Tensor> {
            let (batch, length, width) = x.dims3()?;
            Ok(x.reshape((batch, length, heads, width / heads))?
                .transpose(1, 2)?)
        };
        let y = naive::attention(
            &split(q, heads)?,
            &split(k, groups)?,
            &split(v, groups)?,
            options,
        )?;
        return Ok(y
            .transpose(1, 2)?
            .reshape((batch, queries, heads * value_width))?);
    }
    run(problem, q, k, v, options)
}

fn applies(inputs: &[&Tensor], options: &AttentionOptions) -> bool {
    let mut all = inputs.to_vec();
    all.extend(options.bias.as_ref().map(ScoreBias::numbers));
    fused(&all)
        && options
            .key_padding
            .as_ref()
            .is_none_or(|keep| matches!(keep.device(), crate::Device::Cpu))
}

/// The merged result of a checked problem.
fn run(
    problem: Problem,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let log_sums = OnceLock::new();
    match options.bias.as_ref().map(ScoreBias::numbers) {
        Some(bias) if bias.track_op() => {
            // An operation has at most three arguments: queries, keys and values travel as one.
            let packed = Tensor::cat(&[q.flatten_all()?, k.flatten_all()?, v.flatten_all()?], 0)?;
            Ok(packed.apply_op2(bias, PackedAttention { problem, log_sums })?)
        }
        bias => Ok(q.apply_op3(
            k,
            v,
            Attention {
                problem,
                bias: bias.cloned(),
                log_sums,
            },
        )?),
    }
}

struct Attention {
    problem: Problem,
    bias: Option<Tensor>,
    /// `L` of every query, `[batch, heads, query]`.
    log_sums: OnceLock<Tensor>,
}

impl Attention {
    fn forward<T: Real>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Candle<(CpuStorage, Shape)> {
        let p = &self.problem;
        let (output, log_sums) = forward_tiles::<T>(p, inputs, self.bias.as_ref())?;
        // A second forward of the same operation would give the same numbers.
        let _ = self.log_sums.set(host::tensor(log_sums, &p.query_dims())?);
        Ok((
            T::to_cpu_storage_owned(output),
            Shape::from(&p.output_dims()[..]),
        ))
    }

    fn backward<T: Real>(
        &self,
        inputs: [&Tensor; 3],
        output: &Tensor,
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let kept = kept(&self.log_sums, output, gradient)?;
        backward_tiles::<T>(&self.problem, inputs, self.bias.as_ref(), &saved(&kept)?)
    }
}

/// Outputs, and `L` of every query, for queries, keys and values.
fn forward_tiles<T: Real>(
    p: &Problem,
    [q, k, v]: [(&CpuStorage, &Layout); 3],
    bias: Option<&Tensor>,
) -> Candle<(Vec<T>, Vec<T>)> {
    let bias_host = bias.map(Host::new);
    let bias = bias_host
        .as_ref()
        .map(|host| BiasRows::new(p, host.storage()?, host.layout))
        .transpose()?;
    Ok(tiles::forward::<T>(
        p,
        &Heads::new(q.0, q.1, p.heads)?,
        &Heads::new(k.0, k.1, p.groups)?,
        &Heads::new(v.0, v.1, p.groups)?,
        bias.as_ref(),
    ))
}

/// Gradients of queries, keys and values.
fn backward_tiles<T: Real>(
    p: &Problem,
    [q, k, v]: [&Tensor; 3],
    bias: Option<&Tensor>,
    saved: &tiles::Saved<T>,
) -> Candle<[Option<Tensor>; 3]> {
    let (qh, kh, vh) = (Host::new(q), Host::new(k), Host::new(v));
    let bias_host = bias.map(Host::new);
    let bias = bias_host
        .as_ref()
        .map(|host| BiasRows::new(p, host.storage()?, host.layout))
        .transpose()?;
    let gradients = tiles::backward::<T>(
        p,
        &Heads::new(qh.storage()?, qh.layout, p.heads)?,
        &Heads::new(kh.storage()?, kh.layout, p.groups)?,
        &Heads::new(vh.storage()?, vh.layout, p.groups)?,
        bias.as_ref(),
        saved,
        false,
    );
    Ok([
        Some(host::tensor(gradients.q, q.dims())?),
        Some(host::tensor(gradients.k, k.dims())?),
        Some(host::tensor(gradients.v, v.dims())?),
    ])
}

/// What the backward pass needs of the forward one: `L`, the output, and the gradient of that.
fn kept<'a>(
    log_sums: &'a OnceLock<Tensor>,
    output: &'a Tensor,
    gradient: &'a Tensor,
) -> Candle<[Host<'a>; 3]> {
    let Some(log_sums) = log_sums.get() else {
        candle_core::bail!("attention: backward without forward")
    };
    Ok([log_sums, output, gradient].map(Host::new))
}

fn saved<'a, T: Real>([log_sums, output, gradient]: &'a [Host; 3]) -> Candle<tiles::Saved<'a, T>> {
    Ok(tiles::Saved {
        log_sums: log_sums.ordered()?,
        output: output.ordered()?,
        gradient: gradient.ordered()?,
        log_sums_gradient: std::borrow::Cow::Borrowed(&[]),
    })
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
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
        output: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] =
            by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], output, gradient))?;
        Ok((dq, dk, dv))
    }
}

/// Attention with a differentiated bias; the first argument is queries, keys and values, flat.
struct PackedAttention {
    problem: Problem,
    log_sums: OnceLock<Tensor>,
}

impl CustomOp2 for PackedAttention {
    fn name(&self) -> &'static str {
        "attention with bias"
    }

    fn cpu_fwd(
        &self,
        packed: &CpuStorage,
        layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let p = &self.problem;
        by_dtype!(host::dtype(packed), T => {
            let flat = host::ordered::<T>(packed, layout)?;
            let [q, k, v] = Heads::unpack(p, &flat);
            let bias = BiasRows::new(p, bias, bias_layout)?;
            let (output, log_sums) = tiles::forward::<T>(p, &q, &k, &v, Some(&bias));
            let _ = self.log_sums.set(host::tensor(log_sums, &p.query_dims())?);
            Ok((T::to_cpu_storage_owned(output), Shape::from(&p.output_dims()[..])))
        })
    }

    fn bwd(
        &self,
        packed: &Tensor,
        bias: &Tensor,
        output: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let p = &self.problem;
        let (packed_host, bias_host) = (Host::new(packed), Host::new(bias));
        by_dtype!(packed.dtype(), T => {
            let flat = packed_host.ordered::<T>()?;
            let [q, k, v] = Heads::unpack(p, &flat);
            let bias_rows = BiasRows::new(p, bias_host.storage()?, bias_host.layout)?;
            let kept = kept(&self.log_sums, output, gradient)?;
            let saved = saved::<T>(&kept)?;
            let gradients = tiles::backward::<T>(
                p, &q, &k, &v, Some(&bias_rows), &saved, true,
            );
            let mut flat = gradients.q;
            flat.extend_from_slice(&gradients.k);
            flat.extend_from_slice(&gradients.v);
            let d_bias = gradients.bias;
            let d_bias = d_bias.map(|each| bias_rows.gradient(p, bias, each)).transpose()?;
            Ok((Some(host::tensor(flat, packed.dims())?), d_bias))
        })
    }
}

impl Problem {
    fn new(sizes: [usize; 7], options: &AttentionOptions) -> Result<Self> {
        let [batch, heads, groups, queries, keys, width, value_width] = sizes;
        if groups == 0 || !heads.is_multiple_of(groups) {
            return Err(Error::argument(
                "attention",
                "key/value groups",
                groups,
                format!("a divisor of {heads} heads"),
            ));
        }
        if let Some(bias) = &options.bias {
            bias.check([batch, heads, queries, keys])?;
        }
        let key_padding = match &options.key_padding {
            Some(keep) if keep.dims() != [batch, keys] || keep.dtype() != DType::U8 => {
                let found = (keep.dims(), keep.dtype());
                let expected = format!("[{batch}, {keys}] in u8");
                return Err(Error::argument("attention", "key_padding", found, expected));
            }
            Some(keep) => Some(keep.flatten_all()?.to_vec1::<u8>()?),
            None => None,
        };
        Ok(Self {
            batch,
            heads,
            groups,
            queries,
            keys,
            width,
            value_width,
            scale: options.scale,
            causal: options.causal,
            window: options.window,
            offset: options.query_offset,
            key_padding,
            merged: false,
            positions: None,
            bias: options.bias.as_ref().map(ScoreBias::form),
        })
    }
}

#[cfg(test)]
mod tests;
