//! Multiplying an expression out, a few streams at a time.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::{Expression, Kind, STORED, own_streams, rows_and_width};
use crate::error::tensor;
use crate::streams::share::Share;
use crate::{Error, Result};
use lapidary_kernels::{
    StreamAffine, StreamBuffer, StreamShare, Tensor, stream_affine, stream_mix, stream_mix_own,
    stream_squares,
};

/// Numbers of the widest intermediate that are held while multiplying out.
const BLOCK: usize = 1 << 21;

impl Expression {
    /// All streams: `[streams, ..shape]`.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        if let Kind::Dense(dense) = self.kind() {
            return Ok(dense);
        }
        let mut shape = vec![self.0.streams];
        shape.extend(&self.0.shape);
        let mut buffer = None;
        self.blocks(|block| {
            let buffer = buffer.get_or_insert_with(|| StreamBuffer::new(&shape, block));
            Ok(buffer.push(block)?)
        })?;
        match buffer {
            Some(buffer) => Ok(buffer.finish()?),
            None => Err(Error::invalid("number of streams", 0, "at least 1")),
        }
    }

    /// Calls `body` with a few streams `[some, rows, width]` after the other.
    fn blocks(&self, mut body: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let step = (BLOCK / self.widest().max(1)).max(1);
        for start in (0..self.0.streams).step_by(step) {
            let end = (start + step).min(self.0.streams);
            body(&self.evaluate(start..end, &mut HashMap::new())?)?;
        }
        Ok(())
    }

    /// Numbers of one stream in the largest value that evaluation passes through.
    fn widest(&self) -> usize {
        let mut widest = 0;
        self.visit(&mut |node| {
            widest = widest.max(node.0.shape.iter().product());
            !matches!(node.kind(), Kind::Dense(_))
        });
        widest
    }

    /// Visits every node below (and this one) once, going on below where `visit` says so.
    pub(super) fn visit(&self, visit: &mut dyn FnMut(&Self) -> bool) {
        let mut seen = HashSet::new();
        let mut open = vec![self.clone()];
        while let Some(node) = open.pop() {
            if seen.insert(node.0.id) && visit(&node) {
                open.extend(node.operands());
            }
        }
    }

    /// Streams `range` as `[.., rows, width]`. What several nodes read is kept in `memo`.
    fn evaluate(&self, range: Range<usize>, memo: &mut HashMap<u64, Tensor>) -> Result<Tensor> {
        if let Some(known) = memo.get(&self.0.id) {
            return Ok(known.clone());
        }
        let value = match self.is_affine() {
            true => self.affine(range, memo)?,
            false => self.other(range, memo)?,
        };
        if self.has_other_readers() {
            memo.insert(self.0.id, value.clone());
        }
        Ok(value)
    }

    /// Whether [`Expression::affine`] evaluates this node.
    fn is_affine(&self) -> bool {
        match &*self.0.kind.read().unwrap_or_else(PoisonError::into_inner) {
            Kind::Share(_, share) => !share.is_by_feature(),
            Kind::Scale(..) | Kind::Centre(_) | Kind::Sum(..) => true,
            _ => false,
        }
    }

    /// Evaluates everything else.
    fn other(&self, range: Range<usize>, memo: &mut HashMap<u64, Tensor>) -> Result<Tensor> {
        let (rows, width) = rows_and_width(&self.0.shape);
        let flat = |t: Tensor| tensor(t.reshape((range.len(), rows, width)));
        Ok(match self.kind() {
            Kind::Dense(dense) => flat(tensor(dense.narrow(0, range.start, range.len()))?)?,
            Kind::Own {
                value,
                axis,
                stream_of,
            } => flat(own_streams(&value, axis, &stream_of, range.clone())?)?,
            Kind::Whole { value, stream } => {
                let value = tensor(value.reshape((1, rows, width)))?;
                if range.contains(&stream) {
                    let (before, after) = (stream - range.start, range.end - stream - 1);
                    tensor(value.pad_with_zeros(0, before, after))?
                } else {
                    let shape = (range.len(), rows, width);
                    tensor(Tensor::zeros(shape, value.dtype(), value.device()))?
                }
            }
            Kind::Linear(x, layer) => {
                layer.apply_without_bias(&x.evaluate(range.clone(), memo)?)?
            }
            Kind::Reshape(x) => flat(x.evaluate(range.clone(), memo)?)?,
            Kind::Mix {
                source,
                weights,
                groups,
            } => {
                let mixed = match source.kind() {
                    Kind::Own {
                        value,
                        axis: 1,
                        stream_of,
                    } => stream_mix_own(
                        &weights,
                        &value,
                        groups,
                        &stream_of,
                        range.start,
                        range.len(),
                    )?,
                    _ => {
                        let mut shape = vec![range.len()];
                        shape.extend(&source.0.shape);
                        let values = source.evaluate(range.clone(), memo)?;
                        stream_mix(&weights, &tensor(values.reshape(shape))?, groups)?
                    }
                };
                flat(mixed)?
            }
            Kind::Share(x, share) if share.is_by_feature() => {
                let before = x.evaluate(range.clone(), memo)?;
                tensor(before + share.features(&x, range.clone())?)?
            }
            Kind::Share(..) | Kind::Scale(..) | Kind::Centre(_) | Kind::Sum(..) => {
                self.affine(range, memo)?
            }
        })
    }

    /// Whether more read this node than the one that has just cloned it from its operands.
    /// Signals outside count too; then keeping the node's value costs a block and no more.
    fn has_other_readers(&self) -> bool {
        Arc::strong_count(&self.0) > 2
    }

    /// Shares, a slope, a mean taken off, shares and a sum, or as much of that as there is from
    /// here down: in one pass.
    fn affine(&self, range: Range<usize>, memo: &mut HashMap<u64, Tensor>) -> Result<Tensor> {
        let share_of = |x: &Self, share: &Share| -> Result<StreamShare> {
            let weights = tensor(share.weights(x)?.narrow(0, range.start, range.len()))?;
            Ok((weights, share.constant().clone()))
        };
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let (mut slope, mut centre) = (None, false);
        let mut node = self.clone();
        let mut operands = Vec::new();
        while operands.is_empty() {
            let next = match node.kind() {
                Kind::Share(x, share) if !share.is_by_feature() => {
                    let list = match centre || slope.is_some() {
                        true => &mut before,
                        false => &mut after,
                    };
                    list.push(share_of(&x, &share)?);
                    x
                }
                Kind::Scale(x, by) if !centre && slope.is_none() && before.is_empty() => {
                    slope = Some(by);
                    x
                }
                Kind::Centre(x) if !centre && before.is_empty() => {
                    centre = true;
                    x
                }
                Kind::Sum(a, b) => {
                    operands.extend([a, b]);
                    continue;
                }
                _ => {
                    operands.push(node.clone());
                    continue;
                }
            };
            node = next;
            if node.has_other_readers() {
                operands.push(node.clone());
            }
        }
        // What is shared in one operand of a sum is shared in the sum.
        for operand in &mut operands {
            while let Kind::Share(x, share) = operand.kind()
                && !share.is_by_feature()
                && !operand.has_other_readers()
            {
                before.push(share_of(&x, &share)?);
                *operand = x;
            }
        }
        if slope.is_none() && !centre {
            before.append(&mut after);
        }
        let mut values = Vec::with_capacity(operands.len());
        for operand in operands {
            values.push(operand.evaluate(range.clone(), memo)?);
        }
        let map = StreamAffine {
            add: values.get(1),
            before: &before,
            centre,
            slope: slope.as_ref(),
            after: &after,
        };
        match values.first() {
            Some(first) => Ok(stream_affine(first, map)?),
            None => Err(Error::invalid("operands of a sum", 0, "at least one")),
        }
    }

    /// Multiplies out, and forgets what it was made of.
    pub(super) fn store(&self) -> Result<()> {
        if matches!(self.kind(), Kind::Dense(_)) {
            return Ok(());
        }
        let dense = self.dense()?;
        // The sum of what is stored may differ, by rounding, from the sum of the parts.
        *self.0.total.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.0.kind.write().unwrap_or_else(PoisonError::into_inner) = Kind::Dense(dense);
        Ok(())
    }

    /// `‖S[k, r]‖²`, `[streams, rows]`.
    pub(in crate::streams) fn squares(&self) -> Result<Tensor> {
        if self.0.streams * self.0.shape.iter().product::<usize>() <= STORED {
            self.store()?;
        }
        let mut squares = Vec::new();
        self.blocks(|block| {
            squares.push(stream_squares(block)?);
            Ok(())
        })?;
        tensor(Tensor::cat(&squares, 0))
    }
}
