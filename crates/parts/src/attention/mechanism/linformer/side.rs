//! Projections along the sequence.

use lapidary_kernels::{Tensor, sequence_projection};

/// Below any key that is there, and finite in half precision.
const FAR_BELOW: f64 = -6e4;

/// What projects along the sequence.
#[derive(Clone, Debug)]
pub(super) enum Along {
    /// `[heads or 1, slots, longest]`.
    Matrix(Tensor),
    /// The same weights `[heads or 1, neighbours]` for the neighbours of each slot; equal ones when
    /// absent.
    Windows(Option<Tensor>),
    /// The largest neighbour of each slot, feature by feature.
    Largest,
}

/// A projection of keys, or of values, to `slots`.
#[derive(Clone, Debug)]
pub(super) struct Side {
    pub(super) along: Along,
    pub(super) slots: usize,
    pub(super) longest: usize,
}

/// Which keys count.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    /// `[batch, key]` in `u8`, 1 where one does; all when absent.
    keep: Option<Tensor>,
    /// Places of each sequence, where tokens of it need not count; up to its last key that does when absent.
    places: Option<Vec<usize>>,
}

impl Counted {
    /// Those that `keep` has, all tokens of their sequences.
    pub(super) fn real(keep: Option<&Tensor>) -> Self {
        Self {
            keep: keep.cloned(),
            places: None,
        }
    }

    /// Those that were `drawn` of the tokens that `keep` has: where these end does not hang on the draw.
    pub(super) fn drawn(drawn: &Tensor, keep: Option<&Tensor>) -> lapidary_kernels::Result<Self> {
        let (batch, keys) = drawn.dims2()?;
        Ok(Self {
            keep: Some(drawn.clone()),
            places: Some(match keep {
                None => vec![keys; batch],
                Some(keep) => ends(keep)?,
            }),
        })
    }

    /// Places of each sequence, and the mask of their keys; nothing where all have all `keys`.
    fn shorter(&self, keys: usize) -> lapidary_kernels::Result<Option<(Vec<usize>, &Tensor)>> {
        let Some(keep) = &self.keep else {
            return Ok(None);
        };
        let places = match &self.places {
            Some(places) => places.clone(),
            None => ends(keep)?,
        };
        let whole = places.iter().all(|places| *places == keys);
        Ok((!whole).then_some((places, keep)))
    }
}

/// Places of each sequence up to the last that `keep` `[batch, key]` has.
fn ends(keep: &Tensor) -> lapidary_kernels::Result<Vec<usize>> {
    let rows = keep.to_vec2::<u8>()?;
    let last = |kept: &Vec<u8>| kept.iter().rposition(|kept| *kept != 0);
    Ok(rows
        .iter()
        .map(|kept| last(kept).unwrap_or(0) + 1)
        .collect())
}

/// As many neighbours as `slots` windows of `longest` positions have each.
pub(super) fn neighbours(longest: usize, slots: usize) -> usize {
    longest.div_ceil(slots.max(1))
}

impl Side {
    /// Slots that each key goes to: windows meet it once.
    pub(super) fn meets(&self) -> usize {
        match self.along {
            Along::Matrix(_) => self.slots,
            Along::Windows(_) | Along::Largest => 1,
        }
    }

    /// `E x` for `x` `[batch, heads, key, width]`, where keys that do not count are zeros:
    /// `[batch, heads, slot, width]`.
    pub(super) fn project(
        &self,
        x: &Tensor,
        counted: &Counted,
    ) -> lapidary_kernels::Result<Tensor> {
        let keep = counted.keep.as_ref();
        let there = |keep: &Tensor| keep.unsqueeze(1)?.unsqueeze(3)?.to_dtype(x.dtype());
        let real = || match keep {
            Some(keep) => x.broadcast_mul(&there(keep)?),
            None => Ok(x.clone()),
        };
        match &self.along {
            Along::Matrix(matrix) => {
                let keys = x.dim(2)?;
                let shorter = match keys > matrix.dim(2)? {
                    true => counted.shorter(keys)?,
                    false => None,
                };
                match shorter {
                    Some((places, keep)) => each_by_itself(x, matrix, &places, keep),
                    None => sequence_projection(x, &columns(matrix, keys)?, keep),
                }
            }
            Along::Windows(weights) => {
                let windows = self.windows(&real()?)?;
                let slots = match weights {
                    None => windows.mean(3)?,
                    Some(weights) => {
                        let (heads, neighbours) = weights.dims2()?;
                        let weights = weights.reshape((1, heads, 1, neighbours, 1))?;
                        windows.broadcast_mul(&weights)?.sum(3)?
                    }
                };
                self.behind_used(&slots)
            }
            Along::Largest => {
                let there = match keep {
                    Some(keep) => there(keep)?,
                    None => x.narrow(1, 0, 1)?.narrow(3, 0, 1)?.ones_like()?,
                };
                let there = self.windows(&there)?;
                let away = there.affine(-FAR_BELOW, FAR_BELOW)?;
                let largest = self.windows(&real()?)?.broadcast_add(&away)?.max(3)?;
                // A window of pads alone has the key 0.
                self.behind_used(&largest.broadcast_mul(&there.max(3)?)?)
            }
        }
    }

    /// `[batch, heads, windows, neighbours, width]`. Neighbours beyond the input are zeros, as its
    /// columns would be.
    fn windows(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let (batch, heads, keys, width) = x.dims4()?;
        let neighbours = neighbours(self.longest, self.slots);
        let used = keys.div_ceil(neighbours);
        let x = x.pad_with_zeros(2, 0, used * neighbours - keys)?;
        let shape = (batch, heads, used, neighbours, width);
        Ok(x.contiguous()?.reshape(shape)?)
    }

    /// Zeros for the slots beyond the input.
    fn behind_used(&self, slots: &Tensor) -> lapidary_kernels::Result<Tensor> {
        Ok(slots.pad_with_zeros(2, 0, self.slots - slots.dim(2)?)?)
    }
}

/// Projections of sequences of so many places each, of whose keys `keep` `[batch, key]` has some: columns are spread over
/// these places, not over the pads behind them.
fn each_by_itself(
    x: &Tensor,
    matrix: &Tensor,
    places: &[usize],
    keep: &Tensor,
) -> lapidary_kernels::Result<Tensor> {
    let mut projected = Vec::new();
    for (sequence, &places) in places.iter().enumerate() {
        let x = x.narrow(0, sequence, 1)?.narrow(2, 0, places)?;
        let keep = keep.narrow(0, sequence, 1)?.narrow(1, 0, places)?;
        let columns = columns(matrix, places)?;
        let (x, keep) = (x.contiguous()?, keep.contiguous()?);
        projected.push(sequence_projection(&x, &columns, Some(&keep))?);
    }
    Ok(Tensor::cat(&projected, 0)?)
}

/// The columns of `matrix` `[heads, slots, longest]` for `keys` positions.
fn columns(matrix: &Tensor, keys: usize) -> lapidary_kernels::Result<Tensor> {
    let longest = matrix.dim(2)?;
    if keys <= longest {
        return Ok(matrix.narrow(2, 0, keys)?);
    }
    // Position `t` stands at `t (longest − 1) / (keys − 1)` between the columns.
    let step = (longest - 1) as f64 / (keys - 1) as f64;
    let (mut left, mut share) = (Vec::new(), Vec::new());
    for t in 0..keys {
        let place = t as f64 * step;
        let below = (place as usize).min(longest.saturating_sub(2));
        left.push(below as u32);
        share.push(place - below as f64);
    }
    let right = left.iter().map(|below| (below + 1).min(longest as u32 - 1));
    let right = Tensor::from_vec(right.collect::<Vec<_>>(), keys, matrix.device())?;
    let left = Tensor::from_vec(left, keys, matrix.device())?;
    let share = Tensor::from_vec(share, keys, matrix.device())?.to_dtype(matrix.dtype())?;
    let (left, right) = (
        matrix.contiguous()?.index_select(&left, 2)?,
        matrix.contiguous()?.index_select(&right, 2)?,
    );
    let between = (&left + (right - &left)?.broadcast_mul(&share)?)?;
    Ok((between * (longest as f64 / keys as f64))?)
}
