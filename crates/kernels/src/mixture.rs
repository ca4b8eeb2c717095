//! How far each share of a mixture is from a reference, without laying the shares out.
//!
//! Attention writes `Σ_j T_t(j)` at query `t`, with the shares `T_t(j) = Σ_h A^h_tj F^h_j` of the
//! keys `j`. What is asked of them is often one number for each pair: `‖y_t − T_t(j)‖`. All shares
//! together are `query · key · width` numbers; here each lives in registers, a few features at a
//! time. Cost: `query · key · heads · width` multiplications, none for pairs whose weights are all
//! zero, as those of causal attention above the diagonal.

use crate::host::{self, Host, Shared, by_dtype, fused, share};
use crate::simd::{LANES, Real, vectorised};
use crate::{Error, Result, naive};
use candle_core::Tensor;

/// How a vector is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorNorm {
    /// `Σ |v_i|`.
    L1,
    /// `√Σ v_i²`.
    L2,
}

/// A mixture of some keys.
#[derive(Clone, Copy, Debug)]
pub struct Mixture<'a> {
    /// `A`, `[heads, query, key]`.
    pub weights: &'a Tensor,
    /// `F`, `[heads, key, width]`.
    pub sources: &'a Tensor,
    /// `[query, width]`: what the share of a query's own key has besides.
    pub own: Option<&'a Tensor>,
    /// Index of the first key, so that key `j` is query `first + j`'s own for `own`.
    pub first: usize,
}

/// `‖y_t − T_t(j)‖` for each query and key, `[query, key]`, of references `y` `[query, width]`;
/// and `‖y_t‖`, `[query]`. Where all weights of a pair are zero the two are the same to the bit. Not
/// differentiable.
pub fn mixture_distances(
    mixture: Mixture<'_>,
    reference: &Tensor,
    norm: VectorNorm,
) -> Result<(Tensor, Tensor)> {
    let Mixture {
        weights,
        sources,
        own,
        first,
    } = mixture;
    let (heads, queries, keys) = weights.dims3()?;
    let width = reference.dims().last().copied().unwrap_or(0);
    let check = |argument: &'static str, found: &Tensor, expected: &[usize]| {
        if found.dims() == expected {
            return Ok(());
        }
        let expected = format!("{expected:?}");
        Err(Error::argument(
            "mixture_distances",
            argument,
            found.dims(),
            expected,
        ))
    };
    check("sources", sources, &[heads, keys, width])?;
    check("reference", reference, &[queries, width])?;
    if let Some(own) = own {
        check("own", own, &[queries, width])?;
    }
    let mut all = vec![weights, sources, reference];
    all.extend(own);
    if !fused(&all) {
        return naive::mixture_distances(mixture, reference, norm);
    }
    Ok(by_dtype!(weights.dtype(), T => {
        let (weights, sources) = (Host::new(weights), Host::new(sources));
        let reference = Host::new(reference);
        let (weights, sources) = (weights.ordered::<T>()?, sources.ordered::<T>()?);
        let reference = reference.ordered::<T>()?;
        let own = own.map(Host::new);
        let own = own.as_ref().map(Host::ordered::<T>).transpose()?;
        let own = own.as_deref().unwrap_or(&[]);
        let shares = Shares {
            weights: &weights,
            sources: &sources,
            heads,
            queries,
            keys,
            width,
            norm,
        };
        let lengths = shares.lengths(&reference);
        // [key, query], so that a task writes rows of its own.
        let mut distances = host::unwritten::<T>(keys * queries);
        let shared = Shared::new(&mut distances);
        share(keys, queries * heads * width, |range| for key in range {
            // SAFETY: rows are disjoint and each key belongs to one range.
            let row = unsafe { shared.part(key * queries, queries) };
            row.copy_from_slice(&lengths);
            shares.distances(key, &reference, row);
            let query = first + key;
            if let Some(own) = own.get(query * width..(query + 1) * width)
                && let Some(distance) = row.get_mut(query)
            {
                *distance = shares.own_distance(key, query, &reference, own);
            }
        });
        let distances = host::tensor(distances, &[keys, queries])?.t()?;
        host::tensor(lengths, &[queries]).map(|lengths| (distances, lengths))
    })?)
}

/// Queries that are measured together, so that each feature of a source is read once for all.
const ROWS: usize = 4;

struct Shares<'a, T> {
    weights: &'a [T],
    sources: &'a [T],
    heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
    norm: VectorNorm,
}

impl<T: Real> Shares<'_, T> {
    /// `‖y_t‖` of every query.
    fn lengths(&self, reference: &[T]) -> Vec<T> {
        let mut lengths = vec![T::zero(); self.queries];
        for (query, length) in lengths.iter_mut().enumerate() {
            let row = &reference[query * self.width..][..self.width];
            *length = vectorised(
                #[inline(always)]
                || measure(&[], &[], [row; ROWS], self.norm)[0],
            );
        }
        lengths
    }

    /// The rows `F^h_j` of one key.
    fn sources_of(&self, key: usize) -> Vec<&[T]> {
        (0..self.heads)
            .map(|head| &self.sources[(head * self.keys + key) * self.width..][..self.width])
            .collect()
    }

    fn weight(&self, head: usize, query: usize, key: usize) -> T {
        self.weights[(head * self.queries + query) * self.keys + key]
    }

    /// Overwrites the distances of the queries for which `key` has any weight.
    fn distances(&self, key: usize, reference: &[T], distances: &mut [T]) {
        let sources = self.sources_of(key);
        let mut weights = vec![[T::zero(); ROWS]; self.heads];
        for (block, distances) in distances.chunks_mut(ROWS).enumerate() {
            // The last block measures its last query several times.
            let query = |row: usize| (block * ROWS + row).min(self.queries - 1);
            let mut any = false;
            for (head, weights) in weights.iter_mut().enumerate() {
                for (row, weight) in weights.iter_mut().enumerate() {
                    *weight = self.weight(head, query(row), key);
                    any |= *weight != T::zero();
                }
            }
            if !any {
                continue;
            }
            let rows: [&[T]; ROWS] =
                std::array::from_fn(|row| &reference[query(row) * self.width..][..self.width]);
            let measured = vectorised(
                #[inline(always)]
                || measure(&weights, &sources, rows, self.norm),
            );
            for (distance, measured) in distances.iter_mut().zip(measured) {
                *distance = measured;
            }
        }
    }

    /// The distance of a share that has `own` besides.
    fn own_distance(&self, key: usize, query: usize, reference: &[T], own: &[T]) -> T {
        let sources = self.sources_of(key);
        let weights: Vec<[T; ROWS]> = (0..self.heads)
            .map(|head| [self.weight(head, query, key); ROWS])
            .collect();
        let rest: Vec<T> = reference[query * self.width..][..self.width]
            .iter()
            .zip(own)
            .map(|(reference, own)| *reference - *own)
            .collect();
        vectorised(
            #[inline(always)]
            || measure(&weights, &sources, [&rest; ROWS], self.norm)[0],
        )
    }
}

/// `‖y_r − Σ_h a_hr F_h‖` for each row `r`.
#[inline(always)]
fn measure<T: Real>(
    weights: &[[T; ROWS]],
    sources: &[&[T]],
    rows: [&[T]; ROWS],
    norm: VectorNorm,
) -> [T; ROWS] {
    let width = rows[0].len();
    let mut sums = [[T::zero(); LANES]; ROWS];
    let mut start = 0;
    // Counted loops over fixed sizes: `mixed` and `sums` then stay in registers.
    while start + LANES <= width {
        let mut mixed = rows.map(|row| lanes(row, start));
        for (weights, source) in weights.iter().zip(sources) {
            let source = lanes(source, start);
            for row in 0..ROWS {
                for lane in 0..LANES {
                    mixed[row][lane] = source[lane].mul_add(-weights[row], mixed[row][lane]);
                }
            }
        }
        for row in 0..ROWS {
            for lane in 0..LANES {
                sums[row][lane] += part(mixed[row][lane], norm);
            }
        }
        start += LANES;
    }
    for feature in start..width {
        for (row, sums) in sums.iter_mut().enumerate() {
            let mut mixed = T::zero();
            for (weights, source) in weights.iter().zip(sources) {
                mixed = source[feature].mul_add(weights[row], mixed);
            }
            sums[0] += part(rows[row][feature] - mixed, norm);
        }
    }
    let mut measured = [T::zero(); ROWS];
    for (measured, sums) in measured.iter_mut().zip(sums) {
        for sum in sums {
            *measured += sum;
        }
        if norm == VectorNorm::L2 {
            *measured = measured.sqrt();
        }
    }
    measured
}

/// The [`LANES`] numbers from `start` on.
#[inline(always)]
fn lanes<T: Real>(numbers: &[T], start: usize) -> [T; LANES] {
    let mut lanes = [T::zero(); LANES];
    lanes.copy_from_slice(&numbers[start..start + LANES]);
    lanes
}

#[inline(always)]
fn part<T: Real>(difference: T, norm: VectorNorm) -> T {
    match norm {
        VectorNorm::L1 => difference.abs(),
        VectorNorm::L2 => difference * difference,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn distances_equal_those_of_shares_laid_out(
            heads in 1usize..4, queries in 1usize..10, keys in 1usize..6, width in 1usize..40,
            with_own: bool, first in 0usize..4, two: bool,
        ) {
            let norm = if two { VectorNorm::L2 } else { VectorNorm::L1 };
            for which in 0..2 {
                compare(1e-5, |dtype| {
                    let weights = arange(&[heads, queries, keys], 1.0, dtype);
                    let sources = arange(&[heads, keys, width], 2.0, dtype);
                    let own = arange(&[queries, width], 3.0, dtype);
                    let reference = arange(&[queries, width], 4.0, dtype);
                    let mixture = Mixture {
                        weights: &weights,
                        sources: &sources,
                        own: with_own.then_some(&own),
                        first,
                    };
                    let fast = mixture_distances(mixture, &reference, norm).unwrap();
                    let plain = naive::mixture_distances(mixture, &reference, norm).unwrap();
                    match which {
                        0 => (fast.0, plain.0),
                        _ => (fast.1, plain.1),
                    }
                });
            }
        }
    }

    #[test]
    fn pairs_without_weight_are_as_far_as_nothing_to_the_bit() {
        let weights = arange(&[2, 6, 5], 1.0, DType::F32);
        // A lower triangle: within a block of rows some pairs have weight and some do not.
        let keep: Vec<f32> = (0..30)
            .map(|i| f32::from(u8::from(i % 5 <= i / 5)))
            .collect();
        let keep = Tensor::from_vec(keep, (6, 5), weights.device()).unwrap();
        let weights = weights.broadcast_mul(&keep).unwrap();
        let sources = arange(&[2, 5, 37], 2.0, DType::F32);
        let reference = arange(&[6, 37], 4.0, DType::F32);
        let mixture = Mixture {
            weights: &weights,
            sources: &sources,
            own: None,
            first: 0,
        };
        let (distances, lengths) = mixture_distances(mixture, &reference, VectorNorm::L1).unwrap();
        let distances = distances.to_vec2::<f32>().unwrap();
        let lengths = lengths.to_vec1::<f32>().unwrap();
        for (query, (row, length)) in distances.iter().zip(lengths).enumerate() {
            for (key, distance) in row.iter().enumerate() {
                assert_eq!(*distance == length, key > query, "{query} {key}");
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let weights = arange(&[2, 3, 4], 1.0, DType::F32);
        let sources = arange(&[2, 3, 5], 1.0, DType::F32);
        let reference = arange(&[3, 5], 1.0, DType::F32);
        let mixture = Mixture {
            weights: &weights,
            sources: &sources,
            own: None,
            first: 0,
        };
        let error = mixture_distances(mixture, &reference, VectorNorm::L1).unwrap_err();
        assert!(error.to_string().contains("sources"), "{error}");
    }
}
