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

use crate::backward::Apply;
use crate::fourth_argument::Fourth;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{AttentionOptions, DType, Error, Result, Tensor, naive};
use bias::BiasRows;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
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
    let numbers = options.bias.as_ref().map(ScoreBias::numbers);
    let (v, learned) = match numbers.filter(|numbers| numbers.track_op()) {
        Some(numbers) => {
            let (v, fourth) = Fourth::riding_on(v, numbers)?;
            (v, Some(fourth))
        }
        None => (v.clone(), None),
    };
    let operation = Attention {
        problem,
        bias: numbers.map(Tensor::detach),
        learned,
        log_sums: OnceLock::new(),
    };
    Ok(q.apply3(k, &v, operation)?)
}

struct Attention {
    problem: Problem,
    bias: Option<Tensor>,
    /// Where the gradient of the bias goes, when it is asked for.
    learned: Option<Fourth>,
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
        let Some(log_sums) = self.log_sums.get() else {
            candle_core::bail!("attention: backward without forward")
        };
        let kept = [log_sums, output, gradient].map(Host::new);
        let [log_sums, output, gradient] = &kept;
        let saved = tiles::Saved::<T> {
            log_sums: log_sums.ordered()?,
            output: output.ordered()?,
            gradient: gradient.ordered()?,
            log_sums_gradient: std::borrow::Cow::Borrowed(&[]),
        };
        let bias = (self.bias.as_ref(), self.learned.as_ref());
        backward_tiles(&self.problem, inputs, bias, &saved)
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

/// Gradients of queries, keys and values; that of the bias is left where it is asked for.
fn backward_tiles<T: Real>(
    p: &Problem,
    [q, k, v]: [&Tensor; 3],
    (bias, learned): (Option<&Tensor>, Option<&Fourth>),
    saved: &tiles::Saved<T>,
) -> Candle<[Option<Tensor>; 3]> {
    let (qh, kh, vh) = (Host::new(q), Host::new(k), Host::new(v));
    let bias_host = bias.map(Host::new);
    let bias_rows = bias_host
        .as_ref()
        .map(|host| BiasRows::new(p, host.storage()?, host.layout))
        .transpose()?;
    let gradients = tiles::backward::<T>(
        p,
        &Heads::new(qh.storage()?, qh.layout, p.heads)?,
        &Heads::new(kh.storage()?, kh.layout, p.groups)?,
        &Heads::new(vh.storage()?, vh.layout, p.groups)?,
        bias_rows.as_ref(),
        saved,
        learned.is_some(),
    );
    if let (Some(learned), Some(bias), Some(rows), Some(each)) =
        (learned, bias, &bias_rows, gradients.bias)
    {
        learned.leave(rows.gradient(p, bias, each)?);
    }
    Ok([
        Some(host::tensor(gradients.q, q.dims())?),
        Some(host::tensor(gradients.k, k.dims())?),
        Some(host::tensor(gradients.v, v.dims())?),
    ])
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
