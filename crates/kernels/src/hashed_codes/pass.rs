//! Blocks of tokens on their way to codes.

use super::LEAST;
use super::prepared::{Head, Prepared};
use crate::host::{self, Rows, Shared};
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};
use candle_core::{CpuStorage, Layout};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Tokens of a block.
pub(super) const BLOCK: usize = 64;

/// The right operands of the products of a head.
pub(super) struct Operands<'a, T> {
    /// `[width, anchors]`.
    pub(super) across: Repeated<'a, T>,
    /// `[anchors, bits]`.
    pub(super) hashes: Repeated<'a, T>,
    /// `[bits, anchors]` and `[anchors, width]`.
    pub(super) back: Option<[Repeated<'a, T>; 2]>,
}

/// `result = scale · a b`, packed.
pub(super) fn product<T: Real>(
    result: &mut [T],
    scale: f64,
    a: Matrix<T>,
    b: (&Repeated<T>, usize),
) {
    let (b, columns) = b;
    assert_eq!(result.len(), a.rows * columns);
    let part = (0..a.columns, 0..columns);
    let to = (result.as_mut_ptr(), columns);
    // SAFETY: the result is borrowed exclusively and as large.
    unsafe { b.multiply_at(to, Into::Replace, T::of(scale), a, part) }
}

/// Memory that blocks share.
pub(super) struct Scratch<T> {
    /// `u` `[BLOCK, width]`.
    pub(super) units: Vec<T>,
    /// `−‖u − a‖²` `[BLOCK, anchors]`.
    pub(super) exponents: Vec<T>,
    /// `κ`, then `W`, of the same shape.
    pub(super) kernels: Vec<T>,
    /// `∂κ`, of the same shape.
    pub(super) slopes: Vec<T>,
    /// `p`, then its gradient, `[BLOCK, bits]`.
    pub(super) arguments: Vec<T>,
}

impl<T: Real> Scratch<T> {
    pub(super) fn new(prepared: &Prepared<T>) -> Self {
        Self {
            units: host::unwritten(BLOCK * prepared.width),
            exponents: host::unwritten(BLOCK * prepared.anchors),
            kernels: host::unwritten(BLOCK * prepared.anchors),
            slopes: host::unwritten(BLOCK * prepared.anchors),
            arguments: host::unwritten(BLOCK * prepared.bits),
        }
    }
}

/// One over all tokens of all sequences.
pub(super) struct Pass<'a, T: Clone> {
    /// `x`.
    pub(super) rows: Rows<'a, T>,
    pub(super) batch: usize,
    pub(super) length: usize,
    /// `[batch, length]`.
    pub(super) kept: Option<&'a [T]>,
    pub(super) prepared: &'a Prepared<T>,
    pub(super) offset: Option<T>,
    /// What every kept token of a sequence adds to a mean over it.
    pub(super) shares: Vec<T>,
    /// `σ²` of each head of each sequence.
    pub(super) bandwidths: Vec<T>,
}

impl<'a, T: Real> Pass<'a, T> {
    pub(super) fn new(
        (storage, layout): (&'a CpuStorage, &Layout),
        kept: Option<&'a [T]>,
        prepared: &'a Prepared<T>,
        offset: Option<T>,
    ) -> Candle<Self> {
        let (batch, _, length, _) = layout.shape().dims4()?;
        let share = |sequence: usize| {
            let count = match kept {
                Some(kept) => simd::sum(&kept[sequence * length..(sequence + 1) * length]),
                None => T::of(length as f64),
            };
            T::one() / count.larger(T::one())
        };
        let mut pass = Self {
            rows: Rows::new(storage, layout)?,
            batch,
            length,
            kept,
            prepared,
            offset,
            shares: (0..batch).map(share).collect(),
            bandwidths: Vec::new(),
        };
        let fitted: Option<Vec<T>> = prepared.heads.iter().map(|head| head.bandwidth).collect();
        pass.bandwidths = match fitted {
            Some(fitted) => fitted.repeat(batch),
            None => pass.mean_distances(),
        };
        Ok(pass)
    }

    pub(super) fn pairs(&self) -> usize {
        self.batch * self.prepared.heads.len()
    }

    pub(super) fn head(&self, pair: usize) -> &Head<T> {
        &self.prepared.heads[pair % self.prepared.heads.len()]
    }

    pub(super) fn kept(&self, pair: usize, token: usize) -> T {
        let sequence = pair / self.prepared.heads.len();
        self.kept
            .map_or(T::one(), |kept| kept[sequence * self.length + token])
    }

    /// Calls `body` on ranges of blocks of all pairs.
    pub(super) fn share(&self, work_per_token: usize, body: impl Fn(Range<usize>) + Sync) {
        host::share(self.pairs() * self.blocks(), BLOCK * work_per_token, body);
    }

    /// Blocks of a pair.
    pub(super) fn blocks(&self) -> usize {
        self.length.div_ceil(BLOCK)
    }

    /// The pair and the tokens of a block.
    pub(super) fn block(&self, item: usize) -> (usize, Range<usize>) {
        let (pair, start) = (item / self.blocks(), item % self.blocks() * BLOCK);
        (pair, start..self.length.min(start + BLOCK))
    }

    /// The mean of `‖u − a_j‖²` over kept tokens and over anchors, for each pair: of sums alone. 0 without
    /// a token.
    fn mean_distances(&self) -> Vec<T> {
        let two = T::of(2.0);
        let mut parts = vec![T::zero(); self.pairs() * self.blocks()];
        let shared = Shared::new(&mut parts);
        self.share(self.prepared.width / 4 + 2, |items| {
            for item in items {
                let (pair, tokens) = self.block(item);
                let Head {
                    mean, mean_square, ..
                } = self.head(pair);
                // SAFETY: each block is one item.
                let part = unsafe { shared.part(item, 1) };
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for token in tokens.clone() {
                            let x = self.rows.row(pair * self.length + token);
                            let square = simd::squares_about(x, T::zero());
                            let scale = T::one() / floored(square.sqrt());
                            let along = simd::dot(x, mean) * scale;
                            let apart = square * scale * scale - two * along + *mean_square;
                            part[0] += self.kept(pair, token) * apart;
                        }
                    },
                );
            }
        });
        (0..self.pairs())
            .map(|pair| {
                let parts = &parts[pair * self.blocks()..(pair + 1) * self.blocks()];
                let sum: T = parts.iter().copied().sum();
                let share = self.shares[pair / self.prepared.heads.len()];
                (sum * share).larger(T::zero())
            })
            .collect()
    }

    /// `ρ`.
    pub(super) fn rate(&self, pair: usize) -> T {
        T::one() / (T::of(2.0) * self.bandwidths[pair]).larger(T::of(LEAST))
    }

    /// The operands of every head.
    pub(super) fn operands(&self, back: bool) -> Vec<Operands<'_, T>> {
        let Prepared {
            anchors,
            bits,
            width,
            ref heads,
        } = *self.prepared;
        let rows = self.batch * self.length;
        let of = |head: &'a Head<T>| {
            let a = Matrix::packed(&head.anchors, anchors, width);
            let hashes = Matrix::packed(&head.hashes, bits, anchors);
            Operands {
                across: Repeated::new(a.transposed(), rows),
                hashes: Repeated::new(hashes.transposed(), rows),
                back: back.then(|| [Repeated::new(hashes, rows), Repeated::new(a, rows)]),
            }
        };
        heads.iter().map(of).collect()
    }

    /// Hashes a block: `u`, `−‖u − a‖²`, `κ` and `p` of its tokens.
    pub(super) fn hash(
        &self,
        (pair, tokens): (usize, &Range<usize>),
        operands: &Operands<T>,
        scratch: &mut Scratch<T>,
    ) {
        let Prepared {
            anchors,
            bits,
            width,
            ..
        } = *self.prepared;
        let (head, rate, count) = (self.head(pair), self.rate(pair), tokens.len());
        let units = &mut scratch.units[..count * width];
        simd::vectorised(
            #[inline(always)]
            || {
                for (unit, token) in units.chunks_exact_mut(width).zip(tokens.clone()) {
                    let x = self.rows.row(pair * self.length + token);
                    let length = simd::squares_about(x, T::zero()).sqrt();
                    let scale = T::one() / floored(length);
                    for (unit, x) in unit.iter_mut().zip(x) {
                        *unit = *x * scale;
                    }
                }
            },
        );
        let units = Matrix::packed(units, count, width);
        let exponents = &mut scratch.exponents[..count * anchors];
        product(exponents, 2.0, units, (&operands.across, anchors));
        let kernels = &mut scratch.kernels[..count * anchors];
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = exponents
                    .chunks_exact_mut(anchors)
                    .zip(kernels.chunks_exact_mut(anchors));
                for (row, (exponents, kernels)) in rows.enumerate() {
                    let unit = &units.data[row * width..(row + 1) * width];
                    let square = simd::squares_about(unit, T::zero());
                    let each = exponents.iter_mut().zip(kernels).zip(&head.squares);
                    for ((exponent, kernel), of_anchor) in each {
                        let apart = *exponent - square - *of_anchor;
                        // Rounding must not make a distance negative.
                        let apart = if apart > T::zero() { T::zero() } else { apart };
                        *exponent = apart;
                        *kernel = (rate * apart).exp_of_negative();
                    }
                }
            },
        );
        let kernels = Matrix::packed(kernels, count, anchors);
        let arguments = &mut scratch.arguments[..count * bits];
        product(arguments, 1.0, kernels, (&operands.hashes, bits));
        simd::vectorised(
            #[inline(always)]
            || {
                for argument in arguments.chunks_exact_mut(bits) {
                    for (argument, threshold) in argument.iter_mut().zip(&head.thresholds) {
                        *argument -= *threshold;
                    }
                }
            },
        );
    }

    /// Codes `[batch, heads, length, bits]`, or features `[2, batch, heads, length, bits + 1]`.
    pub(super) fn forward(&self) -> Vec<T> {
        let bits = self.prepared.bits;
        let columns = bits + usize::from(self.offset.is_some());
        let tokens_in_all = self.pairs() * self.length;
        let planes = 1 + usize::from(self.offset.is_some());
        let mut result = host::unwritten::<T>(planes * tokens_in_all * columns);
        let shared = Shared::new(&mut result);
        let operands = self.operands(false);
        self.share(self.work(), |items| {
            let mut scratch = Scratch::new(self.prepared);
            for item in items {
                let (pair, tokens) = self.block(item);
                let operands = &operands[pair % operands.len()];
                self.hash((pair, &tokens), operands, &mut scratch);
                let first = pair * self.length + tokens.start;
                // SAFETY: each block is one item.
                let part = |plane: usize| unsafe {
                    let start = (plane * tokens_in_all + first) * columns;
                    shared.part(start, tokens.len() * columns)
                };
                let Some(offset) = self.offset else {
                    let (arguments, codes) = (&scratch.arguments, part(0));
                    simd::vectorised(
                        #[inline(always)]
                        || signs(&arguments[..codes.len()], codes, T::one()),
                    );
                    continue;
                };
                let codes = scratch.arguments.chunks_exact(bits);
                let rows = codes.zip(part(0).chunks_exact_mut(columns));
                let rows = rows.zip(part(1).chunks_exact_mut(columns)).zip(tokens);
                for (((argument, query), key), token) in rows {
                    let kept = self.kept(pair, token);
                    signs(argument, query, T::one());
                    signs(argument, key, kept);
                    query[bits] = offset;
                    key[bits] = kept;
                }
            }
        });
        result
    }

    /// Element operations for a token.
    pub(super) fn work(&self) -> usize {
        let Prepared {
            anchors,
            bits,
            width,
            ..
        } = *self.prepared;
        anchors * ((width + bits) / 8 + 4)
    }
}

/// A length, but not below the least.
#[inline(always)]
pub(super) fn floored<T: Real>(length: T) -> T {
    length.larger(T::of(LEAST))
}

/// `scale` where an argument is not below 0, `−scale` elsewhere.
#[inline(always)]
fn signs<T: Real>(arguments: &[T], code: &mut [T], scale: T) {
    for (code, argument) in code.iter_mut().zip(arguments) {
        *code = if *argument >= T::zero() {
            scale
        } else {
            -scale
        };
    }
}
