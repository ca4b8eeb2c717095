//! What queries got from parts of their keys, wherever it lies, merged into one softmax.
//!
//! ```text
//! o_i = Σ_r e^{L^r_i − L_i} o^r_i,   L_i = ln Σ_r e^{L^r_i}
//! ∂o^r_i = p^r_i ∂o_i,   ∂L^r_i = p^r_i (∂L_i + ∂o_i · (o^r_i − o_i)),   p^r_i = e^{L^r_i − L_i}
//! ```
//!
//! The log-sum stands behind each output in its row, so that a part is one tensor.

use super::BlockAttention;
use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape};
use std::sync::Arc;

type Candle<T> = candle_core::Result<T>;

/// Outputs and log-sums of some rows, and which row each query has.
#[derive(Clone, Debug)]
pub struct Attended {
    /// `[rows, width + 1]`: outputs, and the log-sum in the last column.
    rows: Tensor,
    /// The row of each query, [`Attended::NOWHERE`] for one that got nothing.
    of: Arc<Vec<u32>>,
}

impl Attended {
    /// The row of a query that met no key of a part.
    pub const NOWHERE: u32 = u32::MAX;

    /// What queries `[queries, width]` get of keys `[keys, width]` and their values by `attention`, one of
    /// them for each entry of `of`.
    ///
    /// # Errors
    /// When the shapes do not fit each other, or a row is out of range.
    pub fn new(
        inputs: [&Tensor; 3],
        attention: &Arc<BlockAttention>,
        of: Arc<Vec<u32>>,
    ) -> Result<Self> {
        Self::checked(attention.rows(inputs)?, of)
    }

    /// Outputs `[rows, width]` and log-sums `[rows]` from elsewhere.
    ///
    /// # Errors
    /// When the shapes do not fit each other, or a row is out of range.
    pub fn from_rows(output: &Tensor, log_sums: &Tensor, of: Arc<Vec<u32>>) -> Result<Self> {
        let rows = Tensor::cat(&[output, &log_sums.unsqueeze(1)?], 1)?;
        Self::checked(rows, of)
    }

    fn checked(rows: Tensor, of: Arc<Vec<u32>>) -> Result<Self> {
        let count = rows.dim(0)?;
        let outside = |&&row: &&u32| row != Self::NOWHERE && row as usize >= count;
        match of.iter().find(outside) {
            Some(row) => {
                let expected = format!("below the {count} rows");
                Err(Error::argument("attended", "a row", row, expected))
            }
            None => Ok(Self { rows, of }),
        }
    }

    /// Queries.
    pub fn queries(&self) -> usize {
        self.of.len()
    }

    /// Outputs of all queries, `[queries, width]`; zeros for those that got nothing.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn output(&self) -> Result<Tensor> {
        let width = self.rows.dim(1)?.saturating_sub(1);
        let in_order = self.of.iter().zip(0..).all(|(&row, at)| row == at)
            && self.of.len() == self.rows.dim(0)?;
        let rows = match in_order {
            true => self.rows.clone(),
            false => self.with(&self.nothing()?)?.rows,
        };
        Ok(rows.narrow(1, 0, width)?.contiguous()?)
    }

    /// Log-sums of all queries, `[queries]`; `-∞` for those that got nothing.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn log_sums(&self) -> Result<Tensor> {
        let width = self.rows.dim(1)?.saturating_sub(1);
        let rows = self.with(&self.nothing()?)?.rows;
        Ok(rows.narrow(1, width, 1)?.contiguous()?.flatten_all()?)
    }

    /// What the same queries get from no key.
    fn nothing(&self) -> Result<Self> {
        let shape = (1, self.rows.dim(1)?);
        Ok(Self {
            rows: Tensor::zeros(shape, self.rows.dtype(), self.rows.device())?,
            of: Arc::new(vec![Self::NOWHERE; self.of.len()]),
        })
    }

    /// Attention of the same queries over the keys of all `parts` together, a key that is in
    /// several counted several times; nothing of no parts.
    ///
    /// # Errors
    /// When the parts are not of as many queries or not as wide.
    pub fn merged(parts: &[Self]) -> Result<Option<Self>> {
        let [first, rest @ ..] = parts else {
            return Ok(None);
        };
        let mut merged = first.clone();
        for part in rest {
            merged = merged.with(part)?;
        }
        Ok(Some(merged))
    }

    /// Outputs of [`Attended::merged`], `[queries, width]`, whose log-sums nobody asks for.
    ///
    /// # Errors
    /// As [`Attended::merged`].
    pub fn merged_output(parts: &[Self]) -> Result<Option<Tensor>> {
        let [before @ .., last] = parts else {
            return Ok(None);
        };
        Ok(Some(match Self::merged(before)? {
            None => last.output()?,
            Some(before) => before.joined(last, false)?,
        }))
    }

    fn with(&self, other: &Self) -> Result<Self> {
        Ok(Self {
            rows: self.joined(other, true)?,
            of: Arc::new((0..self.of.len() as u32).collect()),
        })
    }

    /// The rows of both together, in the order of queries; with log-sums where `sums`.
    fn joined(&self, other: &Self, sums: bool) -> Result<Tensor> {
        let width = |part: &Self| part.rows.dim(1);
        if (self.of.len(), width(self)?) != (other.of.len(), width(other)?) {
            let found = (other.of.len(), width(other)?);
            let expected = format!("{:?}, as before", (self.of.len(), width(self)?));
            return Err(Error::argument(
                "attended",
                "queries and width",
                found,
                expected,
            ));
        }
        let merge = Merge {
            of: [self.of.clone(), other.of.clone()],
            sums,
        };
        if fused(&[&self.rows, &other.rows]) {
            return Ok(self.rows.apply2(&other.rows, merge)?);
        }
        let rows = naive::merged_rows([&self.rows, &other.rows], [&self.of, &other.of])?;
        match sums {
            true => Ok(rows),
            false => Ok(rows.narrow(1, 0, rows.dim(1)? - 1)?.contiguous()?),
        }
    }
}

struct Merge {
    of: [Arc<Vec<u32>>; 2],
    /// Whether log-sums stand behind outputs in the result.
    sums: bool,
}

/// The row of a query, where it has one.
fn row<T>(rows: &[T], at: u32, width: usize) -> Option<(&[T], &T)> {
    if at == Attended::NOWHERE {
        return None;
    }
    rows.get(at as usize * (width + 1)..)?
        .get(..=width)?
        .split_last()
        .map(|(log_sum, output)| (output, log_sum))
}

impl Merge {
    fn forward<T: Real>(&self, [a, b]: [&[T]; 2], width: usize) -> Vec<T> {
        let queries = self.of[0].len();
        let step = width + usize::from(self.sums);
        let mut merged = host::unwritten::<T>(queries * step);
        host::for_rows(
            &mut merged,
            step,
            2,
            #[inline(always)]
            |query, to| {
                let got = [
                    row(a, self.of[0][query], width),
                    row(b, self.of[1][query], width),
                ];
                let (output, log_sum) = to.split_at_mut(width);
                let [x, y] = got.map(|got| got.map_or(T::NEG_INFINITY, |(_, log_sum)| *log_sum));
                if x == T::NEG_INFINITY && y == T::NEG_INFINITY {
                    output.fill(T::zero());
                    log_sum.fill(T::NEG_INFINITY);
                    return;
                }
                let maximum = x.larger(y);
                let [x, y] = [(x - maximum).exp(), (y - maximum).exp()];
                let inverse = T::one() / (x + y);
                if self.sums {
                    log_sum.fill(maximum + (x + y).ln());
                }
                match got {
                    [Some((a, _)), Some((b, _))] => {
                        let [x, y] = [x * inverse, y * inverse];
                        for ((to, &a), &b) in output.iter_mut().zip(a).zip(b) {
                            *to = x * a + y * b;
                        }
                    }
                    [Some((a, _)), None] => output.copy_from_slice(a),
                    [None, Some((b, _))] => output.copy_from_slice(b),
                    [None, None] => output.fill(T::zero()),
                }
            },
        );
        merged
    }

    /// `L` of every query.
    fn log_sums<T: Real>(&self, [a, b]: [&[T]; 2], width: usize) -> Vec<T> {
        let mut sums = host::unwritten::<T>(self.of[0].len());
        host::for_rows(
            &mut sums,
            1,
            16,
            #[inline(always)]
            |query, sum| {
                let [x, y] = [
                    row(a, self.of[0][query], width),
                    row(b, self.of[1][query], width),
                ]
                .map(|got| got.map_or(T::NEG_INFINITY, |(_, log_sum)| *log_sum));
                let maximum = x.larger(y);
                sum[0] = match x == T::NEG_INFINITY && y == T::NEG_INFINITY {
                    true => T::NEG_INFINITY,
                    false => maximum + ((x - maximum).exp() + (y - maximum).exp()).ln(),
                };
            },
        );
        sums
    }

    /// The gradient of the rows of one side, each the sum over the queries that have it.
    fn backward<T: Real>(&self, side: usize, rows: &[T], whole: &Whole<T>) -> Vec<T> {
        let width = whole.width;
        let count = rows.len() / (width + 1);
        let users = Users::new(&self.of[side], count);
        let mut result = host::unwritten::<T>(rows.len());
        host::for_rows(
            &mut result,
            width + 1,
            4,
            #[inline(always)]
            |at, to| {
                to.fill(T::zero());
                let (Some((d_log_sum, d_output)), Some((output, log_sum))) =
                    (to.split_last_mut(), row(rows, at as u32, width))
                else {
                    return;
                };
                if *log_sum == T::NEG_INFINITY {
                    return;
                }
                for &query in users.of(at) {
                    let query = query as usize;
                    let first = query * whole.step;
                    let d_whole = &whole.gradient[first..][..width];
                    let share = (*log_sum - whole.log_sums[query]).exp();
                    let along = simd::dot(d_whole, output)
                        - simd::dot(d_whole, &whole.rows[first..][..width]);
                    let of_sum = match whole.step > width {
                        true => whole.gradient[first + width],
                        false => T::zero(),
                    };
                    *d_log_sum += share * (of_sum + along);
                    simd::add_scaled(d_output, d_whole, share);
                }
            },
        );
        result
    }
}

/// What was made of both sides, and its gradient.
struct Whole<'a, T> {
    rows: &'a [T],
    gradient: &'a [T],
    /// `L` of every query.
    log_sums: &'a [T],
    width: usize,
    /// Numbers of a row.
    step: usize,
}

/// Which queries have each row, in order.
struct Users {
    /// Where those of each row begin, and the end of the last.
    starts: Vec<usize>,
    queries: Vec<u32>,
}

impl Users {
    fn new(of: &[u32], rows: usize) -> Self {
        let mut starts = vec![0; rows + 1];
        let place = |row: u32| (row as usize).min(rows);
        let known = || {
            of.iter()
                .zip(0..)
                .filter(|(row, _)| **row != Attended::NOWHERE)
        };
        for (&row, _) in known() {
            if let Some(next) = starts.get_mut(place(row) + 1) {
                *next += 1;
            }
        }
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut queries = vec![0; starts[rows]];
        for (&row, query) in known() {
            let at = &mut next[place(row)];
            queries[*at] = query;
            *at += 1;
        }
        Self { starts, queries }
    }

    fn of(&self, row: usize) -> &[u32] {
        &self.queries[self.starts[row]..self.starts[row + 1]]
    }
}

impl CustomOp2 for Merge {
    fn name(&self) -> &'static str {
        "merged attention"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        use candle_core::WithDType;
        let width = a_layout.dims().last().map_or(0, |last| last - 1);
        by_dtype!(host::dtype(a), T => {
            let [a, b] = [host::ordered::<T>(a, a_layout)?, host::ordered::<T>(b, b_layout)?];
            let merged = self.forward::<T>([&a, &b], width);
            let shape = Shape::from((self.of[0].len(), width + usize::from(self.sums)));
            Ok((T::to_cpu_storage_owned(merged), shape))
        })
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        merged: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let width = a.dims().last().map_or(0, |last| last - 1);
        by_dtype!(a.dtype(), T => {
            let hosts = [a, b, merged, gradient].map(Host::new);
            let sides = [hosts[0].ordered::<T>()?, hosts[1].ordered::<T>()?];
            let (merged, gradient) = (hosts[2].ordered::<T>()?, hosts[3].ordered::<T>()?);
            let log_sums = self.log_sums::<T>([&sides[0], &sides[1]], width);
            let whole = Whole {
                rows: &merged,
                gradient: &gradient,
                log_sums: &log_sums,
                width,
                step: width + usize::from(self.sums),
            };
            let of = |side: usize, rows: &Tensor| -> Candle<Option<Tensor>> {
                if !rows.track_op() {
                    return Ok(None);
                }
                let values = self.backward(side, &sides[side], &whole);
                Ok(Some(host::tensor(values, rows.dims())?))
            };
            Ok((of(0, a)?, of(1, b)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{AttentionPart, BlockPart, DType, Listed};

    const NOWHERE: u32 = Attended::NOWHERE;

    fn places(of: &[u32]) -> Arc<Vec<u32>> {
        Arc::new(of.to_vec())
    }

    #[test]
    fn parts_in_order_merge_as_attention_does() {
        compare(1e-5, |dtype| {
            let [q, k, v] =
                [[9, 4], [11, 4], [11, 3]].map(|dims| arange(&dims, dims[1] as f64, dtype));
            let in_order = places(&(0..9).collect::<Vec<_>>());
            let meets = |start: u32, length: u32| {
                let listed = |rows: std::ops::Range<u32>| Listed {
                    positions: vec![0; rows.len()],
                    rows: rows.collect(),
                };
                let part = BlockPart {
                    ends: vec![[9, length as usize]],
                    queries: listed(0..9),
                    keys: listed(start..start + length),
                    ..BlockPart::default()
                };
                let attention = Arc::new(BlockAttention::new(vec![part], [9, 11], 0.5).unwrap());
                Attended::new([&q, &k, &v], &attention, in_order.clone()).unwrap()
            };
            let whole = meets(0, 11);
            let merged = Attended::merged(&[meets(0, 4), meets(4, 6), meets(10, 1)]).unwrap();
            let merged = merged.unwrap();
            let sums = [&merged, &whole].map(|attended| attended.log_sums().unwrap());
            assert!(difference(&sums[0], &sums[1]).unwrap() < 1e-5);
            (merged.output().unwrap(), whole.output().unwrap())
        });
    }

    /// Parts whose rows lie anywhere, some of several queries, some of none.
    fn scattered(x: &[Tensor]) -> [Attended; 2] {
        let of = [
            [2, 0, NOWHERE, 2, 1, NOWHERE],
            [0, NOWHERE, 1, 1, 1, NOWHERE],
        ];
        [0, 1].map(|side| {
            let sums = x[2 + side].clone();
            Attended::from_rows(&x[side], &sums, places(&of[side])).unwrap()
        })
    }

    fn numbers() -> Vec<Tensor> {
        [(&[3, 5][..], 1.0), (&[2, 5], 2.0), (&[3], 3.0), (&[2], 4.0)]
            .map(|(dims, phase)| arange(dims, phase, DType::F64))
            .to_vec()
    }

    #[test]
    fn rows_that_lie_anywhere_merge_as_those_that_were_gathered() {
        let x = numbers();
        let merged = Attended::merged(&scattered(&x)).unwrap().unwrap();
        let gathered = |side: usize, of: &[Option<u32>]| {
            let rows = of.iter().map(|of| match of {
                Some(row) => x[side].get(*row as usize).unwrap(),
                None => Tensor::zeros(5, DType::F64, &crate::Device::Cpu).unwrap(),
            });
            let sums: Vec<f64> = of
                .iter()
                .map(|of| {
                    of.map_or(f64::NEG_INFINITY, |row| {
                        x[2 + side].get(row as usize).unwrap().to_scalar().unwrap()
                    })
                })
                .collect();
            AttentionPart {
                output: Tensor::stack(&rows.collect::<Vec<_>>(), 0)
                    .unwrap()
                    .reshape((1, 1, 6, 5))
                    .unwrap(),
                log_sums: Tensor::from_vec(sums, (1, 1, 6), &crate::Device::Cpu).unwrap(),
            }
        };
        let plain = AttentionPart::merged(&[
            gathered(0, &[Some(2), Some(0), None, Some(2), Some(1), None]),
            gathered(1, &[Some(0), None, Some(1), Some(1), Some(1), None]),
        ])
        .unwrap();
        let output = plain.output.reshape((6, 5)).unwrap();
        assert!(difference(&merged.output().unwrap(), &output).unwrap() < 1e-12);
        let sums = merged.log_sums().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(sums[5], f64::NEG_INFINITY);
        assert_eq!(merged.queries(), 6);
        let [a, b] = scattered(&x);
        for parts in [
            vec![a.clone()],
            vec![a.clone(), b.clone()],
            vec![b, a.clone(), a],
        ] {
            let merged = Attended::merged(&parts).unwrap().unwrap();
            let outputs = Attended::merged_output(&parts).unwrap().unwrap();
            assert_eq!(
                difference(&outputs, &merged.output().unwrap()).unwrap(),
                0.0
            );
        }
        let [a, b] = scattered(&x);
        let composed = naive::merged_rows([&a.rows, &b.rows], [&a.of, &b.of]).unwrap();
        assert!(difference(&composed.narrow(1, 0, 5).unwrap(), &output).unwrap() < 1e-12);
    }

    #[test]
    fn gradients() {
        let f = |x: &[Tensor]| {
            let [a, b] = scattered(x);
            let Some(merged) = Attended::merged(&[a.clone(), b, a])? else {
                return Ok(x[0].clone());
            };
            let seen = merged.log_sums()?.maximum(-1e3)?.sin()?.unsqueeze(1)?;
            Ok(merged.output()?.broadcast_mul(&seen)?)
        };
        assert!(gradient_error(f, &numbers()).unwrap() < 1e-7);
        let outputs = |x: &[Tensor]| {
            let [a, b] = scattered(x);
            match Attended::merged_output(&[a.clone(), b, a])? {
                Some(outputs) => Ok(outputs),
                None => Ok(x[0].clone()),
            }
        };
        assert!(gradient_error(outputs, &numbers()).unwrap() < 1e-7);
    }

    /// Whichever side has it.
    #[test]
    fn what_is_no_number_stays_none() {
        let of = places(&[0, 1]);
        let output = arange(&[2, 3], 1.0, DType::F64);
        let part = |sums: [f64; 2]| {
            let sums = Tensor::new(&sums, &crate::Device::Cpu).unwrap();
            Attended::from_rows(&output, &sums, of.clone()).unwrap()
        };
        let (lost, nothing) = (part([f64::NAN, 0.5]), part([f64::NEG_INFINITY; 2]));
        for parts in [[lost.clone(), nothing.clone()], [nothing, lost]] {
            let merged = Attended::merged(&parts).unwrap().unwrap();
            let sums = merged.log_sums().unwrap().to_vec1::<f64>().unwrap();
            assert!(sums[0].is_nan() && sums[1] == 0.5, "{sums:?}");
            let rows = merged.output().unwrap().to_vec2::<f64>().unwrap();
            assert!(rows[0].iter().all(|x| x.is_nan()), "{rows:?}");
            assert_eq!(rows[1], output.get(1).unwrap().to_vec1::<f64>().unwrap());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let [a, _] = scattered(&numbers());
        let more = Attended::from_rows(&numbers()[0], &numbers()[2], places(&[0; 7])).unwrap();
        assert!(Attended::merged(&[a, more]).is_err());
        assert!(Attended::merged(&[]).unwrap().is_none());
        assert!(Attended::merged_output(&[]).unwrap().is_none());
        let rows = &numbers()[0];
        assert!(Attended::from_rows(rows, &numbers()[2], places(&[3])).is_err());
    }
}
