//! Every kernel as a plain composition of Candle operations.
//!
//! These are slow and hold every intermediate; they exist so that the fused kernels have
//! something to be compared with, and so that a reader sees each formula once, bare.

use crate::{
    Activation, AutoencoderGradients, AutoencoderWeights, CrossEntropyOptions, D, DType,
    DropoutMask, Error, Result, RotaryPairs, SoftmaxMask, Tensor, Var,
    inverse::CAUTION,
    mixture::{Mixture, VectorNorm},
};

mod attention;
mod codes;
mod functional_bias;
mod resolution;
mod rows;
mod wavelet;

pub use attention::{
    attention, attention_part, attention_softmax, attention_weights, causal_exponential_means,
    decayed_attention, landmark_attention, linear_attention, linear_attention_by_feature,
    linear_means, polynomial_attention, sinkhorn_attention, tree_attention,
};
pub(crate) use attention::{block_rows, merged_rows};
pub use codes::{code_means, hash_arguments, hashed_codes, hashed_features, passing_signs};
pub use functional_bias::functional_bias;
pub(crate) use resolution::resolution_attention;
pub use rows::{appended_rows, beside_feature, pooled_rows, summed_rows, weighted_change};
pub use wavelet::{wavelet_analysis, wavelet_synthesis};

const MASKED: f64 = f64::NEG_INFINITY;

/// `x Wᵀ + b` for `x` `[.., input]`, `weight` `[output, input]`, `bias` `[output]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (output, input) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == input => *last = output,
        _ => {
            return Err(Error::argument(
                "linear",
                "x",
                x.dims(),
                format!("[.., {input}]"),
            ));
        }
    }
    let y = x
        .reshape(((), input))?
        .matmul(&weight.t()?)?
        .reshape(shape)?;
    Ok(match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

/// `(silu(x) + ½) / ‖silu(x) + ½‖₂` of each row.
pub fn silu_directions(x: &Tensor) -> Result<Tensor> {
    let shifted = (x.silu()? + 0.5)?;
    Ok(shifted.broadcast_div(&shifted.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}

/// `E κ x` of each head, pads multiplied by 0.
pub fn sequence_projection(x: &Tensor, matrix: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
    let real = match kept {
        None => x.contiguous()?,
        Some(kept) => {
            let kept = kept.unsqueeze(1)?.unsqueeze(3)?.to_dtype(x.dtype())?;
            x.broadcast_mul(&kept)?
        }
    };
    Ok(matrix.contiguous()?.unsqueeze(0)?.broadcast_matmul(&real)?)
}

/// [`crate::newton_inverse`], with the gradient of an exact inverse.
pub fn newton_inverse(a: &Tensor, epsilon: f64, steps: usize) -> Result<Tensor> {
    let held = a.detach();
    let norm = held.sum_keepdim(D::Minus1)?.max_keepdim(D::Minus2)?;
    let identity = Tensor::eye(a.dim(D::Minus1)?, a.dtype(), a.device())?;
    let raised = held.broadcast_add(&(identity * epsilon)?)?;
    let alpha = (norm.sqr()?.recip()? * (2.0 * CAUTION))?;
    let mut y = raised.broadcast_mul(&alpha)?;
    for _ in 0..steps {
        y = ((&y * 2.0)? - y.matmul(&raised)?.matmul(&y)?)?;
    }
    // Nothing in value; its derivative is d(A⁻¹) = −A⁻¹ dA A⁻¹.
    let change = (a - held)?;
    Ok((&y - y.matmul(&change.contiguous()?)?.matmul(&y)?)?)
}

/// `x` with each element multiplied by what a mask says of its place.
pub fn dropout(x: &Tensor, mask: &DropoutMask) -> Result<Tensor> {
    let mask: Vec<f64> = (0..x.elem_count()).map(|place| mask.at(place)).collect();
    let mask = Tensor::from_vec(mask, x.shape(), x.device())?;
    Ok((x * mask.to_dtype(x.dtype())?)?)
}

/// `x` `[batch, heads, length, width]`, laid out in `columns` columns, under a filter
/// `[heads, high, wide]` of each head.
pub fn local_filter(x: &Tensor, filters: &Tensor, columns: usize) -> Result<Tensor> {
    let (batch, heads, length, width) = x.dims4()?;
    let (_, high, wide) = filters.dims3()?;
    let rows = length.div_ceil(columns);
    let laid = x.pad_with_zeros(2, 0, rows * columns - length)?;
    let laid = laid.reshape((batch, heads, rows, columns, width))?;
    // The engine pads both sides alike.
    let laid = laid
        .pad_with_zeros(2, high / 2, high / 2)?
        .pad_with_zeros(3, wide / 2, wide / 2)?;
    let images = laid.permute((0, 4, 1, 2, 3))?.contiguous()?;
    let (tall, broad) = (rows + high - 1, columns + wide - 1);
    let images = images.reshape((batch * width, heads, tall, broad))?;
    let filtered = images.conv2d(&filters.unsqueeze(1)?, 0, 1, 1, heads)?;
    let filtered = filtered.reshape((batch, width, heads, rows * columns))?;
    let filtered = filtered.narrow(3, 0, length)?;
    Ok(filtered.permute((0, 2, 3, 1))?.contiguous()?)
}

/// All but the last column of `sums` `[.., width + 1]`, divided by the last one and `epsilon`.
pub fn quotients(sums: &Tensor, epsilon: f64) -> Result<Tensor> {
    let last = sums.dim(D::Minus1)?.saturating_sub(1);
    let total = (sums.narrow(D::Minus1, last, 1)? + epsilon)?;
    let total = (&total + total.eq(0.0)?.to_dtype(total.dtype())?)?;
    Ok(sums.narrow(D::Minus1, 0, last)?.broadcast_div(&total)?)
}

/// Applies `activation` to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Identity => x.clone(),
        Activation::Relu => x.relu()?,
        Activation::Gelu => (((x / std::f64::consts::SQRT_2)?.erf()? + 1.0)? * (x * 0.5)?)?,
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let inner = ((x + (x.sqr()? * x)?.affine(0.044715, 0.0)?)? * c)?;
            ((inner.tanh()? + 1.0)? * (x * 0.5)?)?
        }
        Activation::QuickGelu => (sigmoid(&(x * 1.702)?)? * x)?,
        Activation::Silu => (sigmoid(x)? * x)?,
        Activation::Tanh => x.tanh()?,
        Activation::Sigmoid => sigmoid(x)?,
        Activation::Exp => x.exp()?,
        // ln(1 + e^x) = max(x, 0) + ln(1 + e^{-|x|})
        Activation::Softplus => (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?,
    })
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    // σ(x) = (1 + tanh(x/2)) / 2 cannot overflow.
    Ok(((x * 0.5)?.tanh()?.affine(0.5, 0.5))?)
}

/// The derivative `f'(x)`, elementwise; at ReLU's corner 0. Not differentiable further.
pub fn activation_tangent(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let x = x.detach();
    let one = || x.ones_like();
    Ok(match activation {
        Activation::Identity => one()?,
        Activation::Relu => x.gt(0.0)?.to_dtype(x.dtype())?,
        Activation::Gelu => {
            let cdf = ((&x / std::f64::consts::SQRT_2)?.erf()?.affine(0.5, 0.5))?;
            let density =
                ((x.sqr()? * -0.5)?.exp()? * (2.0 * std::f64::consts::PI).sqrt().recip())?;
            (cdf + (&x * density)?)?
        }
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let inner = ((&x + (x.sqr()? * &x)?.affine(0.044715, 0.0)?)? * c)?;
            let t = inner.tanh()?;
            let slope = x.sqr()?.affine(3.0 * 0.044715 * c, c)?;
            let sech2 = t.sqr()?.affine(-1.0, 1.0)?;
            (t.affine(0.5, 0.5)? + ((&x * 0.5)? * sech2)?.mul(&slope)?)?
        }
        Activation::QuickGelu => {
            let s = sigmoid(&(&x * 1.702)?)?;
            let ds = (&s * s.affine(-1.0, 1.0)?)?;
            (&s + (&x * ds)?.affine(1.702, 0.0)?)?
        }
        Activation::Silu => {
            let s = sigmoid(&x)?;
            let ds = (&s * s.affine(-1.0, 1.0)?)?;
            (&s + (&x * ds)?)?
        }
        Activation::Tanh => x.tanh()?.sqr()?.affine(-1.0, 1.0)?,
        Activation::Sigmoid => {
            let s = sigmoid(&x)?;
            (&s * s.affine(-1.0, 1.0)?)?
        }
        Activation::Exp => x.exp()?,
        Activation::Softplus => sigmoid(&x)?,
    })
}

/// The zero-origin secant `f(x) / x`, elementwise; `f'(0)` where `|x| < 1e-6`.
///
/// Only for activations with `f(0) = 0` ([`Activation::passes_origin`]). Not differentiable.
pub fn activation_secant(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !activation.passes_origin() {
        return Err(Error::argument(
            "activation_secant",
            "activation",
            activation,
            "one with f(0) = 0; use the tangent",
        ));
    }
    let x = x.detach();
    let near_zero = x.abs()?.lt(1e-6)?;
    let safe = near_zero.where_cond(&x.ones_like()?, &x)?;
    let secant = (activate(&safe, activation)? / &safe)?;
    let slope = activation_tangent(&x.zeros_like()?, activation)?;
    Ok(near_zero.where_cond(&slope, &secant)?)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor, mask: &SoftmaxMask) -> Result<Tensor> {
    let x = masked(x, mask)?;
    // A row with every entry masked gives zeros, not NaN; no least number would do for every type.
    let max = x.max_keepdim(D::Minus1)?.detach();
    let max = max.eq(MASKED)?.where_cond(&max.zeros_like()?, &max)?;
    let e = x.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    let sum = (&sum + sum.eq(0.0)?.to_dtype(sum.dtype())?)?;
    Ok(e.broadcast_div(&sum)?)
}

/// Logarithm of the softmax over the last dimension.
pub fn log_softmax(x: &Tensor, mask: &SoftmaxMask) -> Result<Tensor> {
    let x = masked(x, mask)?;
    let max = x.max_keepdim(D::Minus1)?.detach();
    let shifted = x.broadcast_sub(&max)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(shifted.broadcast_sub(&log_sum)?)
}

fn masked(x: &Tensor, mask: &SoftmaxMask) -> Result<Tensor> {
    let mut x = x.clone();
    if let Some(additive) = &mask.additive {
        x = x.broadcast_add(&additive.detach())?;
    }
    if let Some(offset) = mask.causal {
        let rows = x.dim(D::Minus2)?;
        let columns = x.dim(D::Minus1)?;
        x = x.broadcast_add(&keep_to_bias(
            rows,
            columns,
            x.dtype(),
            x.device(),
            |i, j| j <= i + offset,
        )?)?;
    }
    Ok(x)
}

fn keep_to_bias(
    rows: usize,
    columns: usize,
    dtype: DType,
    device: &crate::Device,
    keep: impl Fn(usize, usize) -> bool,
) -> Result<Tensor> {
    let bias: Vec<f64> = (0..rows)
        .flat_map(|i| (0..columns).map(move |j| (i, j)))
        .map(|(i, j)| if keep(i, j) { 0.0 } else { MASKED })
        .collect();
    Ok(Tensor::from_vec(bias, (rows, columns), device)?.to_dtype(dtype)?)
}

/// Mean cross-entropy of `logits` `[rows, classes]` against `targets` `[rows]` (`u32`), in nats.
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    options: &CrossEntropyOptions,
) -> Result<Tensor> {
    let (_, classes) = logits.dims2()?;
    let log_probability = log_softmax(logits, &SoftmaxMask::default())?;
    let kept = match options.ignore_index {
        Some(ignored) => targets.ne(ignored)?,
        None => targets.ones_like()?.to_dtype(DType::U8)?,
    };
    let safe = kept.where_cond(targets, &targets.zeros_like()?)?;
    let picked = log_probability.gather(&safe.unsqueeze(1)?, 1)?.squeeze(1)?;
    let uniform = (log_probability.sum(1)? / classes as f64)?;
    let s = options.label_smoothing;
    let per_row = (picked.affine(-(1.0 - s), 0.0)? + uniform.affine(-s, 0.0)?)?;
    let weight = kept.to_dtype(logits.dtype())?;
    let count = weight.sum_all()?.maximum(1.0)?;
    Ok(((per_row * weight)?.sum_all()? / count)?)
}

/// `γ (x - mean) / √(variance + ε) + β` over the last dimension, biased variance.
pub fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let y = centred.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
    scale_shift(y, weight, bias)
}

/// `γ x / √(mean(x²) + ε)` over the last dimension (Zhang & Sennrich, arXiv 1910.07467).
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, epsilon: f64) -> Result<Tensor> {
    let square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let y = x.broadcast_div(&(square + epsilon)?.sqrt()?)?;
    scale_shift(y, weight, None)
}

fn scale_shift(y: Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = match weight {
        Some(weight) => y.broadcast_mul(weight)?,
        None => y,
    };
    Ok(match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

/// `‖y_t − T_t(j)‖`, `[query, key]`, and `‖y_t‖`, `[query]`, for the shares `T` of a mixture.
pub fn mixture_distances(
    mixture: Mixture<'_>,
    reference: &Tensor,
    norm: VectorNorm,
) -> Result<(Tensor, Tensor)> {
    let measure = |v: &Tensor| match norm {
        VectorNorm::L1 => v.abs()?.sum(D::Minus1),
        VectorNorm::L2 => v.sqr()?.sum(D::Minus1)?.sqrt(),
    };
    let (_, queries, keys) = mixture.weights.dims3()?;
    // [heads, query, key, 1] · [heads, 1, key, width], summed over heads
    let weights = mixture.weights.unsqueeze(3)?;
    let sources = mixture.sources.unsqueeze(1)?;
    let mut shares = weights.broadcast_mul(&sources)?.sum(0)?;
    if let Some(own) = mixture.own {
        let is_own: Vec<f64> = (0..queries)
            .flat_map(|query| (0..keys).map(move |key| (query, mixture.first + key)))
            .map(|(query, key)| f64::from(u8::from(query == key)))
            .collect();
        let is_own = Tensor::from_vec(is_own, (queries, keys, 1), own.device())?;
        let is_own = is_own.to_dtype(own.dtype())?;
        shares = (shares + is_own.broadcast_mul(&own.unsqueeze(1)?)?)?;
    }
    let distances = measure(&reference.unsqueeze(1)?.broadcast_sub(&shares)?)?;
    Ok((distances, measure(reference)?))
}

/// `x` in value, with its gradient multiplied by `factor` of the same shape.
pub fn scale_gradient(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    // x - detach(x) is exactly zero, so the value is untouched.
    let zero = (x - x.detach())?;
    Ok((x.detach() + (zero * factor.detach())?)?)
}

/// `value`, whose gradient goes to `x` of the same shape unchanged.
pub fn pass_gradient(x: &Tensor, value: &Tensor) -> Result<Tensor> {
    Ok((value.detach() + (x - x.detach())?)?)
}

/// `1 / (z + ε sign z)`, and `at_zero` where `z` is zero. Not differentiable.
pub fn stabilised_reciprocal(z: &Tensor, epsilon: f64, at_zero: f64) -> Result<Tensor> {
    let z = z.detach();
    let below = z.lt(0.0)?.to_dtype(z.dtype())?;
    let denominator = (&z + below.affine(-2.0 * epsilon, epsilon)?)?;
    let vanishes = denominator.abs()?.lt(f64::from(f32::MIN_POSITIVE))?;
    let safe = vanishes.where_cond(&z.ones_like()?, &denominator)?;
    let reciprocal = vanishes.where_cond(&z.zeros_like()?, &safe.recip()?)?;
    let constant = z.zeros_like()?.affine(1.0, at_zero)?;
    Ok(z.eq(0.0)?.where_cond(&constant, &reciprocal)?)
}

/// Repeats each of the `groups` of a `[batch, groups, length, width]` tensor so that there are
/// `heads`.
pub fn repeat_groups(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, groups, length, width) = x.dims4()?;
    if groups == 0 || !heads.is_multiple_of(groups) {
        return Err(Error::argument(
            "attention",
            "key/value groups",
            groups,
            format!("a divisor of {heads} heads"),
        ));
    }
    if groups == heads {
        return Ok(x.clone());
    }
    Ok(x.unsqueeze(2)?
        .broadcast_as((batch, groups, heads / groups, length, width))?
        .reshape((batch, heads, length, width))?)
}

/// Rotates pairs of features of `x` `[batch, heads, length, width]` by the angles whose `cos`
/// and `sin` are `[length, width / 2]` (Su et al., arXiv 2104.09864). Where the tables are
/// narrower than half the head, the remaining features pass unrotated.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, pairs: RotaryPairs) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let half = cos.dim(D::Minus1)?;
    if 2 * half > width {
        return Err(Error::argument(
            "rotary",
            "cos",
            cos.dims(),
            format!("[length, <= {}]", width / 2),
        ));
    }
    let rest = x.narrow(D::Minus1, 2 * half, width - 2 * half)?;
    let x = x.narrow(D::Minus1, 0, 2 * half)?;
    let rotated = match pairs {
        RotaryPairs::Halves => {
            let a = x.narrow(D::Minus1, 0, half)?;
            let b = x.narrow(D::Minus1, half, half)?;
            let (a, b) = rotate(&a, &b, cos, sin)?;
            Tensor::cat(&[a, b], D::Minus1)?
        }
        RotaryPairs::Interleaved => {
            let mut shape = x.dims().to_vec();
            let last = shape.len() - 1;
            shape[last] = half;
            shape.push(2);
            let split = x.reshape(shape)?;
            let a = split.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?;
            let b = split.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1)?;
            let (a, b) = rotate(&a, &b, cos, sin)?;
            Tensor::stack(&[a, b], x.rank())?.reshape(x.shape())?
        }
    };
    Ok(if rest.elem_count() == 0 {
        rotated
    } else {
        Tensor::cat(&[rotated, rest], D::Minus1)?
    })
}

fn rotate(a: &Tensor, b: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Ok((first, second))
}

/// Running sum along `dim`: `y_t = Σ_{s ≤ t} x_s`.
pub fn cumulative_sum(x: &Tensor, dim: usize) -> Result<Tensor> {
    Ok(x.cumsum(dim)?)
}

/// Running product along `dim`: `y_t = Π_{s ≤ t} x_s`.
pub fn cumulative_product(x: &Tensor, dim: usize) -> Result<Tensor> {
    let mut running: Option<Tensor> = None;
    let mut steps = Vec::with_capacity(x.dim(dim)?);
    for t in 0..x.dim(dim)? {
        let step = x.narrow(dim, t, 1)?;
        let next = match &running {
            Some(product) => (product * &step)?,
            None => step,
        };
        steps.push(next.clone());
        running = Some(next);
    }
    Ok(Tensor::cat(&steps, dim)?)
}

/// Sorts the last dimension, giving values and indices (`u32`). Ties keep their order.
pub fn sort(x: &Tensor, descending: bool) -> Result<(Tensor, Tensor)> {
    let width = x.dim(D::Minus1)?;
    let rows = x
        .detach()
        .to_dtype(DType::F64)?
        .reshape(((), width))?
        .to_vec2::<f64>()?;
    let mut indices = Vec::with_capacity(rows.len() * width);
    for row in &rows {
        let mut order: Vec<u32> = (0..width as u32).collect();
        order.sort_by(|&a, &b| {
            let ordering = row[a as usize].total_cmp(&row[b as usize]);
            if descending {
                ordering.reverse()
            } else {
                ordering
            }
        });
        indices.extend(order);
    }
    let indices = Tensor::from_vec(indices, x.shape(), x.device())?;
    Ok((x.contiguous()?.gather(&indices, D::Minus1)?, indices))
}

/// The `k` largest entries of the last dimension, largest first, with their indices (`u32`).
pub fn top_k(x: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let width = x.dim(D::Minus1)?;
    if k > width {
        return Err(Error::argument("top_k", "k", k, format!("at most {width}")));
    }
    let (values, indices) = sort(x, true)?;
    Ok((
        values.narrow(D::Minus1, 0, k)?,
        indices.narrow(D::Minus1, 0, k)?.contiguous()?,
    ))
}

/// `y[.., i, ..] = x[.., indices[.., i, ..], ..]` along `dim`; `indices` (`u32`) has the shape of
/// the result.
pub fn gather(x: &Tensor, indices: &Tensor, dim: usize) -> Result<Tensor> {
    Ok(x.contiguous()?.gather(&indices.contiguous()?, dim)?)
}

/// Adds `source` into a copy of `x`: `y[.., indices[.., i, ..], ..] += source[.., i, ..]`.
pub fn scatter_add(x: &Tensor, indices: &Tensor, source: &Tensor, dim: usize) -> Result<Tensor> {
    Ok(x.contiguous()?
        .scatter_add(&indices.contiguous()?, &source.contiguous()?, dim)?)
}

/// Discrete Fourier transform of the real last dimension:
/// `[.., n] -> [.., n / 2 + 1, 2]`, the last pair being real and imaginary part. Unnormalised.
pub fn real_fft(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(D::Minus1)?;
    let half = n / 2 + 1;
    let (cos, sin) = fourier_tables(n, half, x)?;
    let flat = x.reshape(((), n))?;
    let re = flat.matmul(&cos.t()?)?;
    let im = flat.matmul(&sin.t()?)?.neg()?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.extend([half, 2]);
    Ok(Tensor::stack(&[re, im], 2)?.reshape(shape)?)
}

/// Inverse of [`real_fft`] for a signal of length `n`, normalised by `1/n`:
/// `[.., n / 2 + 1, 2] -> [.., n]`.
pub fn inverse_real_fft(x: &Tensor, n: usize) -> Result<Tensor> {
    let half = n / 2 + 1;
    if x.rank() < 2 || x.dims()[x.rank() - 2..] != [half, 2] {
        return Err(Error::argument(
            "inverse_real_fft",
            "x",
            x.dims(),
            format!("[.., {half}, 2]"),
        ));
    }
    let (cos, sin) = fourier_tables(n, half, x)?;
    // Every frequency but 0 (and n/2 when n is even) stands for itself and its mirror image.
    let weight: Vec<f64> = (0..half)
        .map(|f| {
            if f == 0 || 2 * f == n {
                1.0 / n as f64
            } else {
                2.0 / n as f64
            }
        })
        .collect();
    let weight = Tensor::from_vec(weight, (half, 1), x.device())?.to_dtype(x.dtype())?;
    let flat = x.reshape(((), half, 2))?;
    let re = flat.narrow(2, 0, 1)?.squeeze(2)?;
    let im = flat.narrow(2, 1, 1)?.squeeze(2)?;
    let y =
        (re.matmul(&cos.broadcast_mul(&weight)?)? - im.matmul(&sin.broadcast_mul(&weight)?)?)?;
    let mut shape = x.dims()[..x.rank() - 2].to_vec();
    shape.push(n);
    Ok(y.reshape(shape)?)
}

fn fourier_tables(n: usize, half: usize, like: &Tensor) -> Result<(Tensor, Tensor)> {
    let angle = |f: usize, t: usize| 2.0 * std::f64::consts::PI * ((f * t) % n) as f64 / n as f64;
    let table = |g: fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f64> = (0..half)
            .flat_map(|f| (0..n).map(move |t| (f, t)))
            .map(|(f, t)| g(angle(f, t)))
            .collect();
        Ok(Tensor::from_vec(values, (half, n), like.device())?.to_dtype(like.dtype())?)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// Causal convolution along the sequence, one filter per channel:
/// `y[b, c, t] = Σ_s kernel[c, s] x[b, c, t - s]` for `x` `[batch, channels, length]` and
/// `kernel` `[channels, taps]`.
pub fn fft_convolution(x: &Tensor, kernel: &Tensor) -> Result<Tensor> {
    let (_, _, length) = x.dims3()?;
    let (_, taps) = kernel.dims2()?;
    let mut y = x.zeros_like()?;
    for s in 0..taps.min(length) {
        let shifted = x.narrow(2, 0, length - s)?.pad_with_zeros(2, s, 0)?;
        y = (y + shifted.broadcast_mul(&kernel.narrow(1, s, 1)?)?)?;
    }
    Ok(y)
}

/// Linear recurrence `h_t = a_t h_{t-1} + b_t` along dimension 1 of `[batch, length, ..]`
/// tensors, starting from `initial` `[batch, ..]` (zero when absent). Gives every `h_t`.
pub fn linear_scan(a: &Tensor, b: &Tensor, initial: Option<&Tensor>) -> Result<Tensor> {
    let length = b.dim(1)?;
    let mut state = initial.cloned();
    let mut steps = Vec::with_capacity(length);
    for t in 0..length {
        let b_t = b.narrow(1, t, 1)?.squeeze(1)?;
        let next = match &state {
            Some(state) => (a.narrow(1, t, 1)?.squeeze(1)?.mul(state)? + b_t)?,
            None => b_t,
        };
        steps.push(next.clone());
        state = Some(next);
    }
    Ok(Tensor::stack(&steps, 1)?)
}

/// `y[b, c, t] = bias[c] + Σ_j kernel[c, j] x[b, c, t - (taps - 1) + j]`, see
/// [`causal_depthwise_convolution`](crate::causal_depthwise_convolution).
pub fn causal_depthwise_convolution(
    x: &Tensor,
    kernel: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (_, _, length) = x.dims3()?;
    let (channels, taps) = kernel.dims2()?;
    let mut y = x.zeros_like()?;
    for j in 0..taps {
        let delay = taps - 1 - j;
        if delay < length {
            let shifted = x
                .narrow(2, 0, length - delay)?
                .pad_with_zeros(2, delay, 0)?;
            y = (y + shifted.broadcast_mul(&kernel.narrow(1, j, 1)?)?)?;
        }
    }
    Ok(match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((channels, 1))?)?,
        None => y,
    })
}

/// Loss and gradients of a sparse autoencoder, as [`crate::autoencoder_gradients`], by the
/// engine's own backward pass.
pub fn autoencoder_gradients(
    x: &Tensor,
    weights: AutoencoderWeights<'_>,
    sparsity: f64,
) -> Result<AutoencoderGradients> {
    let variable = |tensor: &Tensor| Var::from_tensor(&tensor.detach());
    let (encoder, decoder) = (variable(weights.encoder)?, variable(weights.decoder)?);
    let encoder_bias = variable(weights.encoder_bias)?;
    let decoder_bias = variable(weights.decoder_bias)?;
    let centred = x.broadcast_sub(&decoder_bias)?;
    let f = linear(&centred, &encoder, Some(&encoder_bias))?.relu()?;
    let reconstruction = f.matmul(&decoder)?.broadcast_add(&decoder_bias)?;
    let rows = x.dim(0)? as f64;
    let squared_error = ((reconstruction - x)?.sqr()?.sum_all()? / rows)?;
    let activation = (f.sum_all()? / rows)?;
    let mut gradients = (&squared_error + (&activation * sparsity)?)?.backward()?;
    let mut take = |variable: &Var| match gradients.remove(variable) {
        Some(gradient) => Ok(gradient.detach()),
        None => variable.zeros_like(),
    };
    let number = |x: &Tensor| x.to_dtype(DType::F64)?.to_scalar::<f64>();
    let active = f.gt(0.0)?.to_dtype(DType::U32)?.sum(0)?;
    Ok(AutoencoderGradients {
        encoder: take(&encoder)?,
        encoder_bias: take(&encoder_bias)?,
        decoder: take(&decoder)?,
        decoder_bias: take(&decoder_bias)?,
        squared_error: number(&squared_error)?,
        activation: number(&activation)?,
        active: active.to_vec1::<u32>()?,
    })
}

/// Every row of `x` `[.., width]` divided by its length; rows of zeros stay.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    let safe = length.eq(0.0)?.to_dtype(x.dtype())?;
    Ok(x.broadcast_div(&(length + safe)?)?)
}

/// `x_i − (x_i · d_i) d_i / ‖d_i‖²` for rows of `x` and `directions` `[.., width]`.
pub fn reject_rows(x: &Tensor, directions: &Tensor) -> Result<Tensor> {
    let directions = unit_rows(directions)?;
    let along = (x * &directions)?.sum_keepdim(D::Minus1)?;
    Ok((x - directions.broadcast_mul(&along)?)?)
}
