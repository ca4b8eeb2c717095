//! What heads hash by, in the shape that blocks of tokens read.

use super::CodeHash;
use crate::host::Host;
use crate::simd::{self, LANES, Real};

type Candle<T> = candle_core::Result<T>;

/// What the heads hash by; neither bits nor anchors nor the width is 0. Anchors of zeros, which no hash
/// reads, fill rows of kernels up to whole vectors.
pub(super) struct Prepared<T> {
    /// Anchors of a head, those of zeros among them.
    pub(super) anchors: usize,
    pub(super) bits: usize,
    pub(super) width: usize,
    pub(super) heads: Vec<Head<T>>,
}

pub(super) struct Head<T> {
    /// `a` `[anchors, width]`.
    pub(super) anchors: Vec<T>,
    /// `‖a_j‖²`.
    pub(super) squares: Vec<T>,
    /// The mean of `a`, and that of `‖a‖²`, over real anchors.
    pub(super) mean: Vec<T>,
    pub(super) mean_square: T,
    /// `A` `[bits, anchors]`.
    pub(super) hashes: Vec<T>,
    /// `μ Aᵀ`.
    pub(super) thresholds: Vec<T>,
    /// `σ²`, where it is not the sequence's.
    pub(super) bandwidth: Option<T>,
}

/// `rows` of `width` numbers each, with zeros behind them up to `to` numbers in a row.
fn padded<T: Real>(rows: &[T], width: usize, to: usize) -> Vec<T> {
    let mut wide = vec![T::zero(); rows.len() / width * to];
    for (wide, row) in wide.chunks_exact_mut(to).zip(rows.chunks_exact(width)) {
        wide[..width].copy_from_slice(row);
    }
    wide
}

impl<T: Real> Prepared<T> {
    pub(super) fn new(hash: &CodeHash) -> Candle<Self> {
        let (heads, real, width) = hash.anchors.dims3()?;
        let bits = hash.hashes.dim(1)?;
        let hosts = [&hash.anchors, &hash.means, &hash.hashes].map(Host::new);
        let [anchors, means, hashes] = &hosts;
        let (anchors, means) = (anchors.ordered::<T>()?, means.ordered::<T>()?);
        let hashes = hashes.ordered::<T>()?;
        let bandwidths = hash.bandwidths.as_ref().map(Host::new);
        let bandwidths = bandwidths.as_ref().map(Host::ordered::<T>).transpose()?;
        let of = |head: usize| {
            let a = &anchors[head * real * width..(head + 1) * real * width];
            let hashes = &hashes[head * bits * real..(head + 1) * bits * real];
            let means = &means[head * real..(head + 1) * real];
            Head::new(a, means, hashes, bandwidths.as_ref().map(|all| all[head]))
        };
        Ok(Self {
            anchors: real.next_multiple_of(LANES),
            bits,
            width,
            heads: (0..heads).map(of).collect(),
        })
    }
}

impl<T: Real> Head<T> {
    fn new(anchors: &[T], means: &[T], hashes: &[T], bandwidth: Option<T>) -> Self {
        let real = means.len();
        let (width, all) = (anchors.len() / real, real.next_multiple_of(LANES));
        let each = T::one() / T::of(real as f64);
        let mut wide = anchors.to_vec();
        wide.resize(all * width, T::zero());
        let mut mean = vec![T::zero(); width];
        for anchor in anchors.chunks_exact(width) {
            for (mean, anchor) in mean.iter_mut().zip(anchor) {
                *mean += *anchor * each;
            }
        }
        let thresholds = hashes.chunks_exact(real);
        Self {
            squares: (0..all)
                .map(|j| simd::squares_about(&wide[j * width..(j + 1) * width], T::zero()))
                .collect(),
            mean,
            mean_square: simd::squares_about(anchors, T::zero()) * each,
            thresholds: thresholds.map(|hash| simd::dot(hash, means)).collect(),
            hashes: padded(hashes, real, all),
            anchors: wide,
            bandwidth,
        }
    }
}
