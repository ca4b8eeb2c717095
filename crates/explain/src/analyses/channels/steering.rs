//! The residual stream moved within the subspace that a channel writes to.

use super::heads::HeadId;
use crate::error::engine;
use crate::{Error, Question, Result};
use lapidary_factor::{Matrix, qr};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::{Signal, Trace};

/// The residual stream before `block` at one position, held to chosen coordinates within the span
/// of some directions: `x ← x − x V Vᵀ + c Vᵀ`, the columns of `V` orthonormal.
#[derive(Clone, Debug)]
pub struct Steering {
    block: usize,
    position: usize,
    /// `Vᵀ`, `[directions, width]` in `f64`.
    span: Tensor,
}

impl Steering {
    /// Steers along `directions`, each `[width]`; the first coordinate is along the first of them,
    /// each further one along what is new in the next.
    ///
    /// # Errors
    /// When there are none, they differ in width, or one is in the span of those before it.
    pub fn new(block: usize, position: usize, directions: &[Vec<f64>]) -> Result<Self> {
        let width = directions.first().map_or(0, Vec::len);
        let fits = directions.iter().all(|direction| direction.len() == width);
        if width == 0 || !fits || directions.len() > width {
            return Err(Error::invalid(
                "directions to steer along",
                format!("{} of widths that differ or are none", directions.len()),
                "at least one, all of the model's width, and no more than that",
            ));
        }
        let columns = Matrix::from_fn(width, directions.len(), |i, j| directions[j][i]);
        let qr = qr(columns.as_ref());
        let largest = directions
            .iter()
            .flatten()
            .fold(0.0, |m: f64, x| m.max(x.abs()));
        let mut rows = Vec::with_capacity(width * directions.len());
        for index in 0..directions.len() {
            let diagonal = qr.r[(index, index)];
            if !diagonal.is_finite() || diagonal.abs() <= 1e-10 * largest {
                return Err(Error::invalid(
                    format!("direction {index}"),
                    "in the span of those before it",
                    "a new one",
                ));
            }
            let sign = diagonal.signum();
            rows.extend(qr.q.col(index).iter().map(|x| sign * x));
        }
        let shape = (directions.len(), width);
        let span = engine(Tensor::from_vec(
            rows,
            shape,
            &lapidary_kernels::Device::Cpu,
        ))?;
        Ok(Self {
            block,
            position,
            span,
        })
    }

    /// The coordinates at which the model itself stands, `[directions]`, on the first sequence.
    ///
    /// # Errors
    /// When the model fails or has no such block or position.
    pub fn coordinates(&self, question: &Question<'_>) -> Result<Vec<f64>> {
        let trace = Trace::new().capture(&self.site())?;
        question
            .model
            .forward(question.input, question.pass(&trace))?;
        let x = trace.signal(&self.site())?.into_value();
        let x = engine(engine(at(&x, self.position)?.narrow(0, 0, 1))?.to_dtype(DType::F64))?;
        let coordinates = engine(x.matmul(&engine(self.span.t())?))?;
        engine(engine(coordinates.squeeze(0))?.to_vec1::<f64>())
    }

    /// A trace under which the residual stream has these coordinates, in every sequence of the
    /// batch.
    ///
    /// # Errors
    /// When there are not as many coordinates as directions.
    pub fn trace(&self, coordinates: &[f64]) -> Result<Trace> {
        let count = engine(self.span.dim(0))?;
        if coordinates.len() != count {
            return Err(Error::invalid(
                "coordinates",
                coordinates.len(),
                count.to_string(),
            ));
        }
        let target = engine(Tensor::from_slice(
            coordinates,
            (1, count),
            self.span.device(),
        ))?;
        let (span, position) = (self.span.clone(), self.position);
        let trace = Trace::new().replace(&self.site(), move |_, signal| {
            moved(signal.value(), &span, &target, position).map(Signal::from)
        })?;
        Ok(trace)
    }

    fn site(&self) -> String {
        format!("blocks.{}.in", self.block)
    }
}

fn at(x: &Tensor, position: usize) -> lapidary_signal::Result<Tensor> {
    let length = x.dims().get(1).copied().unwrap_or(0);
    if position >= length {
        return Err(lapidary_signal::Error::invalid(
            "position to steer at",
            position,
            format!("below {length}"),
        ));
    }
    let row = x.narrow(1, position, 1).and_then(|row| row.squeeze(1));
    row.map_err(|error| lapidary_kernels::Error::from(error).into())
}

/// `x` `[batch, length, width]` with the row at `position` moved.
fn moved(
    x: &Tensor,
    span: &Tensor,
    target: &Tensor,
    position: usize,
) -> lapidary_signal::Result<Tensor> {
    let row = at(x, position)?; // [batch, width]
    let computed = || -> lapidary_kernels::Result<Tensor> {
        let wide = row.to_dtype(DType::F64)?;
        // (c − x V) Vᵀ
        let change = target
            .broadcast_sub(&wide.matmul(&span.t()?)?)?
            .matmul(span)?;
        let row = (wide + change)?.to_dtype(x.dtype())?.unsqueeze(1)?;
        let after = x.dims().get(1).copied().unwrap_or(0) - position - 1;
        let mut parts = Vec::with_capacity(3);
        if position > 0 {
            parts.push(x.narrow(1, 0, position)?);
        }
        parts.push(row);
        if after > 0 {
            parts.push(x.narrow(1, position + 1, after)?);
        }
        Ok(Tensor::cat(&parts, 1)?)
    };
    Ok(computed()?)
}

/// Where a head looks at one place of the subspace.
#[derive(Clone, Debug, PartialEq)]
pub struct SweepPoint {
    /// The coordinates.
    pub coordinates: Vec<f64>,
    /// The head's weights from the steered position, `[key]`, on the first sequence.
    pub attention: Vec<f64>,
}

/// Where `mover` looks from the steered position, for each of `grid`'s coordinates.
///
/// # Errors
/// When the model fails, or has no such head.
pub fn sweep(
    question: &Question<'_>,
    steering: &Steering,
    mover: HeadId,
    grid: &[Vec<f64>],
) -> Result<Vec<SweepPoint>> {
    let site = weights_site(mover);
    grid.iter()
        .map(|coordinates| {
            let trace = steering.trace(coordinates)?.capture(&site)?;
            question
                .model
                .forward(question.input, question.pass(&trace))?;
            let weights = trace.signal(&site)?.into_value();
            Ok(SweepPoint {
                coordinates: coordinates.clone(),
                attention: row_of(&weights, mover, steering.position)?,
            })
        })
        .collect()
}

fn weights_site(head: HeadId) -> String {
    format!("blocks.{}.attention.weights", head.block)
}

/// `[key]` of `[batch, heads, query, key]`, of the first sequence.
fn row_of(weights: &Tensor, head: HeadId, query: usize) -> Result<Vec<f64>> {
    let heads = weights.dims().get(1).copied().unwrap_or(0);
    if head.head >= heads {
        return Err(Error::invalid(
            "head",
            head,
            format!("one of {heads} of its block"),
        ));
    }
    let row = weights
        .narrow(0, 0, 1)
        .and_then(|w| w.narrow(1, head.head, 1));
    let row = engine(row.and_then(|w| w.narrow(2, query, 1)))?;
    engine(engine(engine(row.flatten_all())?.to_dtype(DType::F64))?.to_vec1::<f64>())
}

/// A sentence in which one of two names is right.
#[derive(Clone, Debug)]
pub struct NamePrompt {
    /// Token ids; the last position predicts.
    pub tokens: Vec<u32>,
    /// Where the name stands that is to be inhibited (S: the repeated one).
    pub subject_position: usize,
    /// Where the right name stands (IO).
    pub object_position: usize,
}

/// What an edit changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Inhibition {
    /// Change of the mover's attention to S less that to IO, from the last position.
    pub attention: f64,
    /// Change of the logit of S less that of IO.
    pub logit_difference: f64,
}

/// How much less a mover head avoids the repeated name in `edited` than in `original`: positive
/// when the edit took inhibition away. Means over the prompts.
///
/// # Errors
/// When a prompt has no such positions or a model fails.
pub fn inhibition_score(
    original: &Model,
    edited: &Model,
    mover: HeadId,
    prompts: &[NamePrompt],
) -> Result<Inhibition> {
    if prompts.is_empty() {
        return Err(Error::invalid("prompts", 0, "at least 1"));
    }
    let mut sum = Inhibition::default();
    for prompt in prompts {
        let before = preference(original, mover, prompt)?;
        let after = preference(edited, mover, prompt)?;
        sum.attention += after.attention - before.attention;
        sum.logit_difference += after.logit_difference - before.logit_difference;
    }
    let count = prompts.len() as f64;
    Ok(Inhibition {
        attention: sum.attention / count,
        logit_difference: sum.logit_difference / count,
    })
}

/// S less IO, in attention and logits.
fn preference(model: &Model, mover: HeadId, prompt: &NamePrompt) -> Result<Inhibition> {
    let token = |position: usize| {
        prompt.tokens.get(position).copied().ok_or_else(|| {
            let expected = format!("below {}", prompt.tokens.len());
            Error::invalid("position of a name", position, expected)
        })
    };
    let (subject, object) = (
        token(prompt.subject_position)?,
        token(prompt.object_position)?,
    );
    let site = weights_site(mover);
    let trace = Trace::new().capture(&site)?;
    let shape = (1, prompt.tokens.len());
    let input = Input::tokens(engine(Tensor::from_slice(
        &prompt.tokens,
        shape,
        &model.device(),
    ))?);
    let pass = Pass {
        trace: Some(&trace),
        only_last: true,
        ..Pass::default()
    };
    let logits = model.forward(&input, pass)?.into_logits()?.into_value();
    let logits = engine(engine(logits.flatten_all())?.to_dtype(DType::F64))?;
    let logits = engine(logits.to_vec1::<f64>())?;
    let attention = row_of(
        &trace.signal(&site)?.into_value(),
        mover,
        prompt.tokens.len() - 1,
    )?;
    let of = |values: &[f64], index: usize| values.get(index).copied().unwrap_or(0.0);
    Ok(Inhibition {
        attention: of(&attention, prompt.subject_position) - of(&attention, prompt.object_position),
        logit_difference: of(&logits, subject as usize) - of(&logits, object as usize),
    })
}
