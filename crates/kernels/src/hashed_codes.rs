//! Vectors hashed to codes of ±1 by their Gaussian kernels with a few anchors (kernel-based hashing; Liu
//! et al., EcoFormer, 2022, arXiv 2209.09004).
//!
//! ```text
//! κ_j = exp(−ρ ‖u − a_j‖²),   u = x / ‖x‖,   ρ = 1 / 2σ²,   p = (κ − μ) Aᵀ,   b = sign(p)
//! ```
//!
//! `σ²` is that of a head, or the mean of `‖u − a_j‖²` over the tokens and anchors of a sequence, which is
//! a sum over tokens that a first pass makes. A block of tokens then becomes codes while it lies in the
//! cache; neither unit vectors nor kernels are held for more.
//!
//! The sign's gradient is that of its argument where that is below 1 in size, and nothing elsewhere. With
//! `W = ∂κ ∘ κ` of `∂κ = ∂p A`
//!
//! ```text
//! ∂u_i = 2ρ (Σ_j W_ij a_j − u_i Σ_j W_ij) + ∂σ² · ∂σ²/∂u_i,   ∂σ² = 2ρ² Σ_ij W_ij ‖u_i − a_j‖²
//! ∂x_i = (∂u_i − u_i (u_i · ∂u_i)) / ‖x_i‖
//! ```
//!
//! for which blocks are hashed once more. Anchors, means, hashes and bandwidths get no gradient.

mod backward;
mod pass;
mod prepared;
#[cfg(test)]
mod tests;

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};
use pass::Pass;
use prepared::Prepared;

type Candle<T> = candle_core::Result<T>;

/// The least length of a vector, and the least `2σ²`.
pub(crate) const LEAST: f64 = 1e-12;

/// A map from vectors to codes, one for each head.
#[derive(Clone, Debug)]
pub struct CodeHash {
    /// `a` `[heads, anchors, width]`.
    pub anchors: Tensor,
    /// `μ` `[heads, anchors]`.
    pub means: Tensor,
    /// `A` `[heads, bits, anchors]`.
    pub hashes: Tensor,
    /// `σ²` `[heads]`, where it is not the sequence's.
    pub bandwidths: Option<Tensor>,
}

/// Codes `b` of ±1 `[batch, heads, length, bits]` of `x` `[batch, heads, length, width]`, differentiable in
/// `x`: the gradient of a sign is that of its argument where it is below 1 in size. `kept`
/// `[batch, 1, length, 1]` says with 1 which tokens the sequence's own `σ²` is a mean over, with 0 which
/// ones it is not.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{CodeHash, Device, Tensor, hashed_codes};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::Cpu;
/// // A vector is near one of two anchors, or near the other.
/// let hash = CodeHash {
///     anchors: Tensor::new(&[[[1f32, 0.0], [0.0, 1.0]]], &device)?,
///     means: Tensor::new(&[[0f32, 0.0]], &device)?,
///     hashes: Tensor::new(&[[[1f32, -1.0]]], &device)?,
///     bandwidths: None,
/// };
/// let x = Tensor::new(&[[[[3f32, 0.1], [0.2, 0.3], [5.0, 4.0]]]], &device)?;
/// let codes = hashed_codes(&x, None, &hash)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(codes, [1.0, -1.0, 1.0]);
/// # Ok(())
/// # }
/// ```
pub fn hashed_codes(x: &Tensor, kept: Option<&Tensor>, hash: &CodeHash) -> Result<Tensor> {
    check(x, kept, hash)?;
    match takes(x, kept, hash) {
        true => Ok(x.apply1(Hashed::new(kept, hash, None))?),
        false => naive::hashed_codes(x, kept, hash),
    }
}

/// `[b, offset]` and `[b, 1]`, the second zero where `kept` is, both `[batch, heads, length, bits + 1]`, for
/// the codes `b` of [`hashed_codes`]: the inner product of a row of each is `b · b' + offset`, or 0.
///
/// # Errors
/// As there.
pub fn hashed_features(
    x: &Tensor,
    kept: Option<&Tensor>,
    hash: &CodeHash,
    offset: f64,
) -> Result<[Tensor; 2]> {
    check(x, kept, hash)?;
    if !takes(x, kept, hash) {
        return naive::hashed_features(x, kept, hash, offset);
    }
    let both = x.apply1(Hashed::new(kept, hash, Some(offset)))?;
    Ok([both.get(0)?, both.get(1)?])
}

/// Whether the fused kernel applies.
fn takes(x: &Tensor, kept: Option<&Tensor>, hash: &CodeHash) -> bool {
    let mut all = vec![x, &hash.anchors, &hash.means, &hash.hashes];
    all.extend(&hash.bandwidths);
    all.extend(kept);
    fused(&all)
}

fn check(x: &Tensor, kept: Option<&Tensor>, hash: &CodeHash) -> Result<()> {
    let (batch, heads, length, width) = x.dims4()?;
    let (_, anchors, _) = hash.anchors.dims3()?;
    let (_, bits, _) = hash.hashes.dims3()?;
    let fits = |name: &'static str, found: &Tensor, expected: &[usize]| match found.dims() {
        dims if dims == expected => Ok(()),
        dims => {
            let expected = format!("{expected:?} for x {:?}", x.dims());
            Err(Error::argument("hashed codes", name, dims, expected))
        }
    };
    for (name, found, least) in [
        (
            "anchors",
            &hash.anchors,
            "at least one anchor of at least one feature",
        ),
        ("hashes", &hash.hashes, "at least one bit"),
    ] {
        if found.dims().iter().skip(1).any(|size| *size == 0) {
            return Err(Error::argument("hashed codes", name, found.dims(), least));
        }
    }
    fits("anchors", &hash.anchors, &[heads, anchors, width])?;
    fits("means", &hash.means, &[heads, anchors])?;
    fits("hashes", &hash.hashes, &[heads, bits, anchors])?;
    if let Some(bandwidths) = &hash.bandwidths {
        fits("bandwidths", bandwidths, &[heads])?;
    }
    match kept {
        Some(kept) => fits("kept", kept, &[batch, 1, length, 1]),
        None => Ok(()),
    }
}

struct Hashed {
    hash: CodeHash,
    kept: Option<Tensor>,
    /// Where features are asked for, what stands behind a query's code.
    offset: Option<f64>,
}

impl Hashed {
    fn new(kept: Option<&Tensor>, hash: &CodeHash, offset: Option<f64>) -> Self {
        Self {
            hash: CodeHash {
                anchors: hash.anchors.detach(),
                means: hash.means.detach(),
                hashes: hash.hashes.detach(),
                bandwidths: hash.bandwidths.as_ref().map(Tensor::detach),
            },
            kept: kept.map(Tensor::detach),
            offset,
        }
    }

    /// `body` on the pass over `x`.
    fn pass<T: Real, R>(
        &self,
        x: (&CpuStorage, &Layout),
        body: impl FnOnce(&Pass<T>) -> R,
    ) -> Candle<R> {
        let prepared = Prepared::<T>::new(&self.hash)?;
        let kept = self.kept.as_ref().map(Host::new);
        let kept = kept.as_ref().map(Host::ordered::<T>).transpose()?;
        let pass = Pass::new(x, kept.as_deref(), &prepared, self.offset.map(T::of))?;
        Ok(body(&pass))
    }
}

impl CustomOp1 for Hashed {
    fn name(&self) -> &'static str {
        "hashed codes"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let mut dims = layout.dims().to_vec();
        let bits = self.hash.hashes.dim(1)?;
        if let Some(last) = dims.last_mut() {
            *last = bits + usize::from(self.offset.is_some());
        }
        if self.offset.is_some() {
            dims.insert(0, 2);
        }
        by_dtype!(host::dtype(x), T => {
            let codes = self.pass::<T, _>((x, layout), |pass| pass.forward())?;
            Ok((T::to_cpu_storage_owned(codes), Shape::from(dims)))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (read, of_result) = (Host::new(x), Host::new(gradient));
        by_dtype!(x.dtype(), T => {
            let gradient = of_result.ordered::<T>()?;
            let place = (read.storage()?, read.layout);
            let slopes = self.pass::<T, _>(place, |pass| pass.backward(&gradient))?;
            Ok(Some(host::tensor(slopes, x.dims())?))
        })
    }
}
