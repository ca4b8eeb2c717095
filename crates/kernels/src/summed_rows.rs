//! Sums of a few rows of a few tensors: gathering, averaging and moving rows in one pass, and one pass back.
//!
//! `y_r = Σ_i w_i x^{(s_i)}_{j_i}` over the terms `i` of row `r`, and `∂x^{(s)}_j = Σ w_i ∂y_{r(i)}` over the
//! terms that read row `j` of source `s`: the same kind of sum, with the terms turned around.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape};

type Candle<T> = candle_core::Result<T>;
type Argument<'a> = (&'a CpuStorage, &'a Layout);

/// An operation of the engine has at most three arguments.
const MOST: usize = 3;

/// A row of one of the sources, and what it counts for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowTerm {
    /// Which source.
    pub source: usize,
    /// Its row.
    pub row: u32,
    /// What the row is multiplied by.
    pub weight: f64,
}

/// The terms of each row of a result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowSums {
    terms: Vec<RowTerm>,
    /// Where the terms of each row end.
    ends: Vec<usize>,
}

impl RowSums {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more row, the sum of `terms`; zeros where there are none.
    pub fn push(&mut self, terms: impl IntoIterator<Item = RowTerm>) {
        self.terms.extend(terms);
        self.ends.push(self.terms.len());
    }

    /// Rows of the result.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether the result has no rows.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All terms, row by row.
    pub fn terms(&self) -> &[RowTerm] {
        &self.terms
    }

    /// The terms of each row in turn.
    pub fn rows(&self) -> impl Iterator<Item = &[RowTerm]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, end)| self.terms.get(start..*end).unwrap_or_default())
    }

    /// The same rows with those terms alone that `map` keeps, as it has them.
    pub fn filtered(&self, map: impl Fn(RowTerm) -> Option<RowTerm>) -> Self {
        let mut kept = Self::new();
        for terms in self.rows() {
            kept.push(terms.iter().copied().filter_map(&map));
        }
        kept
    }
}

/// The rows that `sums` says of `sources` `[.., width]`, wherever theirs lie: `[rows, width]`.
///
/// # Errors
/// When there is no source, widths differ, or a term names a source or a row that is not there.
///
/// ```
/// use lapidary_kernels::{Device, RowSums, RowTerm, Tensor, summed_rows};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[1f32, 5.0], [2.0, 0.0], [3.0, 4.0]], &Device::Cpu)?;
/// let term = |row, weight| RowTerm { source: 0, row, weight };
/// let mut sums = RowSums::new();
/// sums.push([term(0, 0.5), term(2, 0.5)]);
/// sums.push([term(1, 1.0)]);
/// let y = summed_rows(&[&x], sums)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2.0, 4.5], [2.0, 0.0]]);
/// # Ok(()) }
/// ```
pub fn summed_rows(sources: &[&Tensor], sums: RowSums) -> Result<Tensor> {
    let refused = |argument, found: &dyn std::fmt::Debug, expected: String| {
        Err(Error::argument("summed rows", argument, found, expected))
    };
    let Some(first) = sources.first() else {
        return refused("sources", &0, "at least 1".to_owned());
    };
    let (_, width) = rows_and_width(first.dims());
    let fits = |source: &&Tensor| source.rank() > 0 && rows_and_width(source.dims()).1 == width;
    if let Some(other) = sources.iter().find(|source| !fits(source)) {
        return refused("a source", &other.dims(), format!("[.., {width}]"));
    }
    let counts: Vec<usize> = sources.iter().map(|x| rows_and_width(x.dims()).0).collect();
    let there = |term: &&RowTerm| {
        let count = counts.get(term.source);
        count.is_some_and(|count| (term.row as usize) < *count)
    };
    if let Some(term) = sums.terms.iter().find(|term| !there(term)) {
        return refused("a term", term, format!("of sources with rows {counts:?}"));
    }
    if !fused(sources) {
        return naive::summed_rows(sources, &sums);
    }
    apply(sources, sums)
}

fn apply(sources: &[&Tensor], sums: RowSums) -> Result<Tensor> {
    let [first, rest @ ..] = sources else {
        return Err(Error::argument("summed rows", "sources", 0, "at least 1"));
    };
    Ok(match rest {
        [] => first.apply1(Sums(sums))?,
        [second] => first.apply2(second, Sums(sums))?,
        [second, third] => first.apply3(second, third, Sums(sums))?,
        _ => {
            // The first ones' sums are the first source of what is left.
            let (now, later) = sources.split_at(MOST);
            let own = sums.filtered(|term| (term.source < MOST).then_some(term));
            let done = apply(now, own)?;
            let mut left = RowSums::new();
            for (terms, row) in sums.rows().zip(0..) {
                let done = RowTerm {
                    source: 0,
                    row,
                    weight: 1.0,
                };
                let others = terms.iter().filter_map(|term| {
                    let source = term.source.checked_sub(MOST)? + 1;
                    Some(RowTerm { source, ..*term })
                });
                left.push(std::iter::once(done).chain(others));
            }
            let mut all = vec![&done];
            all.extend(later);
            apply(&all, left)?
        }
    })
}

struct Sums(RowSums);

/// `y = Σ w x`, one term after the other.
#[inline(always)]
fn sum_into<'a, T: Real>(y: &mut [T], terms: impl Iterator<Item = (&'a [T], T)>) {
    let mut first = true;
    for (x, weight) in terms {
        match (first, weight == T::one()) {
            (true, true) => y.copy_from_slice(x),
            (true, false) => {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * weight;
                }
            }
            (false, _) => simd::add_scaled(y, x, weight),
        }
        first = false;
    }
    if first {
        y.fill(T::zero());
    }
}

impl Sums {
    fn forward<T: Real>(&self, sources: &[Argument]) -> Candle<(CpuStorage, Shape)> {
        let RowSums { terms, ends } = &self.0;
        let width = sources
            .first()
            .and_then(|(_, layout)| layout.dims().last().copied())
            .unwrap_or(0);
        let read: Vec<Rows<T>> = sources
            .iter()
            .map(|(storage, layout)| Rows::new(storage, layout))
            .collect::<Candle<_>>()?;
        let mut y = host::unwritten::<T>(ends.len() * width);
        host::for_rows(
            &mut y,
            width,
            terms.len() / ends.len().max(1) + 1,
            #[inline(always)]
            |row, y| {
                let start = row.checked_sub(1).map_or(0, |before| ends[before]);
                let terms = terms[start..ends[row]].iter();
                sum_into(
                    y,
                    terms
                        .map(|term| (read[term.source].row(term.row as usize), T::of(term.weight))),
                );
            },
        );
        Ok((T::to_cpu_storage_owned(y), Shape::from((ends.len(), width))))
    }

    /// The gradient of a source.
    fn backward(&self, source: usize, of: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        if !of.track_op() {
            return Ok(None);
        }
        let (count, width) = rows_and_width(of.dims());
        let (readers, ends) = self.readers(source, count);
        let host = Host::new(gradient);
        by_dtype!(of.dtype(), T => {
            let slopes = Rows::<T>::new(host.storage()?, host.layout)?;
            let mut dx = host::unwritten::<T>(count * width);
            host::for_rows(
                &mut dx,
                width,
                readers.len() / count.max(1) + 1,
                #[inline(always)]
                |row, dx| {
                    let readers = readers[ends[row]..ends[row + 1]].iter();
                    sum_into(dx, readers.map(|(row, weight)| (slopes.row(*row), T::of(*weight))));
                },
            );
            host::tensor(dx, of.dims()).map(Some)
        })
    }

    /// Which rows of the result read each of the `count` rows of a source, in order, with what weight; and
    /// where those of each begin.
    fn readers(&self, source: usize, count: usize) -> (Vec<(usize, f64)>, Vec<usize>) {
        let mut starts = vec![0; count + 1];
        let own = |term: &&RowTerm| term.source == source;
        for term in self.0.terms.iter().filter(own) {
            starts[term.row as usize + 1] += 1;
        }
        for row in 0..count {
            starts[row + 1] += starts[row];
        }
        let mut readers = vec![(0, 0.0); starts[count]];
        let mut next = starts.clone();
        for (terms, row) in self.0.rows().zip(0..) {
            for term in terms.iter().filter(own) {
                let place = &mut next[term.row as usize];
                readers[*place] = (row, term.weight);
                *place += 1;
            }
        }
        (readers, starts)
    }
}

impl CustomOp1 for Sums {
    fn name(&self) -> &'static str {
        "summed rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => self.forward::<T>(&[(x, layout)]))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        self.backward(0, x, gradient)
    }
}

impl CustomOp2 for Sums {
    fn name(&self) -> &'static str {
        "summed rows"
    }

    fn cpu_fwd(
        &self,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let sources = [(first, first_layout), (second, second_layout)];
        by_dtype!(host::dtype(first), T => self.forward::<T>(&sources))
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        Ok((
            self.backward(0, first, gradient)?,
            self.backward(1, second, gradient)?,
        ))
    }
}

impl CustomOp3 for Sums {
    fn name(&self) -> &'static str {
        "summed rows"
    }

    fn cpu_fwd(
        &self,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
        third: &CpuStorage,
        third_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let sources = [
            (first, first_layout),
            (second, second_layout),
            (third, third_layout),
        ];
        by_dtype!(host::dtype(first), T => self.forward::<T>(&sources))
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        third: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((
            self.backward(0, first, gradient)?,
            self.backward(1, second, gradient)?,
            self.backward(2, third, gradient)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};

    fn term(source: usize, row: u32, weight: f64) -> RowTerm {
        RowTerm {
            source,
            row,
            weight,
        }
    }

    /// Rows with no terms, one and several, a row that is read twice, one that nothing reads.
    fn sums(sources: usize) -> RowSums {
        let mut sums = RowSums::new();
        sums.push([]);
        for row in 0..11u32 {
            let each = (0..sources).filter(|source| (row as usize + source) % 3 != 1);
            sums.push(each.flat_map(|source| {
                let at = |row: u32| term(source, row % 4, 0.5 + f64::from(row) - source as f64);
                [at(row), at(row * row + 1)]
            }));
        }
        sums.push([term(sources - 1, 2, 1.0)]);
        sums.push([]);
        sums
    }

    fn sources(count: usize, width: usize, dtype: DType) -> Vec<Tensor> {
        (0..count)
            .map(|source| arange(&[width, 5], source as f64, dtype).t().unwrap())
            .collect()
    }

    #[test]
    fn equal_the_composition() {
        for (count, width) in (1..=6).flat_map(|count| [1, 7, 40].map(|width| (count, width))) {
            compare(1e-5, |dtype| {
                let sources = sources(count, width, dtype);
                let sources: Vec<&Tensor> = sources.iter().collect();
                (
                    summed_rows(&sources, sums(count)).unwrap(),
                    naive::summed_rows(&sources, &sums(count)).unwrap(),
                )
            });
        }
    }

    #[test]
    fn a_row_alone_is_copied_and_none_are_zeros() {
        let x = arange(&[2, 3, 4], 1.0, DType::F32);
        let mut two = RowSums::new();
        two.push([term(0, 4, 1.0)]);
        two.push([]);
        let y = summed_rows(&[&x], two).unwrap().to_vec2::<f32>().unwrap();
        let x = x.reshape((6, 4)).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y, [x[4].clone(), vec![0.0; 4]]);
        let x = arange(&[2, 4], 1.0, DType::F32);
        let none = summed_rows(&[&x], RowSums::new()).unwrap();
        assert_eq!(none.dims(), [0, 4]);
    }

    #[test]
    fn gradients() {
        for count in [1, 2, 3, 4, 6] {
            let sources = sources(count, 6, DType::F64);
            let f = |x: &[Tensor]| summed_rows(&x.iter().collect::<Vec<_>>(), sums(count));
            assert!(gradient_error(f, &sources).unwrap() < 1e-8, "{count}");
        }
        // A source that no row reads gets zeros, one that is no variable nothing.
        let (x, y) = (
            arange(&[3, 4], 1.0, DType::F64),
            arange(&[2, 4], 2.0, DType::F64),
        );
        let first = || {
            let mut sums = RowSums::new();
            sums.push([term(0, 1, 2.0)]);
            sums
        };
        let f = |x: &[Tensor]| summed_rows(&[&x[0], &x[1]], first());
        assert!(gradient_error(f, &[x.clone(), y.clone()]).unwrap() < 1e-8);
        let f = |x: &[Tensor]| summed_rows(&[&x[0], &y], first());
        assert!(gradient_error(f, &[x]).unwrap() < 1e-8);
    }

    #[test]
    fn other_types_take_the_composition() {
        let x = arange(&[5, 6], 1.0, DType::F32);
        let half = x.to_dtype(DType::BF16).unwrap();
        let mut picked = RowSums::new();
        picked.push([term(0, 3, 1.0)]);
        let y = summed_rows(&[&half], picked).unwrap();
        let expected = half.narrow(0, 3, 1).unwrap();
        let [y, expected] = [y, expected].map(|x| x.to_dtype(DType::F32).unwrap());
        assert_eq!(difference(&y, &expected).unwrap(), 0.0);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let x = arange(&[3, 2], 1.0, DType::F32);
        let one = |term| {
            let mut sums = RowSums::new();
            sums.push([term]);
            sums
        };
        assert!(summed_rows(&[&x], one(term(0, 3, 1.0))).is_err());
        assert!(summed_rows(&[&x], one(term(1, 0, 1.0))).is_err());
        assert!(summed_rows(&[], RowSums::new()).is_err());
        let wide = arange(&[3, 3], 1.0, DType::F32);
        assert!(summed_rows(&[&x, &wide], one(term(0, 0, 1.0))).is_err());
        let number = Tensor::new(1f32, &Device::Cpu).unwrap();
        assert!(summed_rows(&[&number], RowSums::new()).is_err());
    }
}
