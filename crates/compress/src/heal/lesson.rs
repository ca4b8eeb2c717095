//! What healing minimises: the task's loss, the distance from what the original says, and that of the
//! residual stream behind each block from the original's.

use lapidary_kernels::{D, DType, SoftmaxMask, Tensor, log_softmax};
use lapidary_model::{Model, Output, Pass};
use lapidary_signal::Trace;

use super::{HealData, HealSettings};
use crate::calibration::forward;
use crate::data::{Batch, real_rows};
use crate::error::engine;
use crate::{CalibrationData, Error, Objective, Result};

/// What is learned.
pub(super) struct Lesson<'a> {
    pub(super) objective: Objective,
    teacher: Option<&'a Model>,
    distil: f64,
    temperature: f64,
    /// Weight of the streams behind each block.
    streams: f64,
}

impl<'a> Lesson<'a> {
    pub(super) fn of(model: &Model, data: &HealData<'a>, settings: &HealSettings) -> Result<Self> {
        let objective = Objective::of(model, data.training)?;
        if Objective::of(model, data.validation)? != objective {
            return Err(Error::invalid(
                "the validation examples",
                "of another task than the training examples",
                "of the same",
            ));
        }
        if settings.distil > 0.0 && data.teacher.is_none() {
            return Err(Error::invalid(
                "the original, whose predictions are to be learned",
                "absent",
                "given, or the weight of distillation 0",
            ));
        }
        if settings.streams > 0.0 {
            check_streams(model, data.teacher)?;
        }
        if objective == Objective::Representation && settings.distil < 1.0 {
            return Err(Error::invalid(
                "weight of distillation",
                settings.distil,
                "1 for a model and examples without a task, which can only learn the original's \
                 hidden vectors",
            ));
        }
        Ok(Self {
            objective,
            teacher: data.teacher,
            distil: settings.distil,
            temperature: settings.temperature,
            streams: settings.streams,
        })
    }

    /// The mean loss of a batch's examples.
    pub(super) fn loss(&self, model: &Model, batch: &Batch<'_>) -> Result<Tensor> {
        let (output, streams) = self.forward(model, batch)?;
        let taught = self.distil > 0.0 || self.streams > 0.0;
        let teacher = match self.teacher.filter(|_| taught) {
            Some(teacher) => Some(self.forward(teacher, batch)?),
            None => None,
        };
        let learned = match &teacher {
            Some((teacher, _)) if self.distil > 0.0 => {
                Some(self.distance(&output, teacher, batch)?)
            }
            _ => None,
        };
        let task =
            || -> Result<Tensor> { engine(self.objective.losses(&output, batch)?.mean_all()) };
        let loss = match learned {
            None => task()?,
            Some(learned) if self.distil >= 1.0 => learned,
            Some(learned) => {
                let task = engine(task()?.affine(1.0 - self.distil, 0.0))?;
                engine(task + engine(learned.affine(self.distil, 0.0))?)?
            }
        };
        match teacher {
            Some((_, wanted)) if self.streams > 0.0 => {
                let apart = streams_apart(&streams, &wanted, batch)?;
                engine(loss + engine(apart.affine(self.streams, 0.0))?)
            }
            _ => Ok(loss),
        }
    }

    /// What a model says of a batch, and the streams behind its blocks where they are compared.
    fn forward(&self, model: &Model, batch: &Batch<'_>) -> Result<(Output, Vec<Tensor>)> {
        if self.streams <= 0.0 {
            return Ok((forward(model, batch, None)?, Vec::new()));
        }
        let trace = Trace::new().capture("blocks.*.out")?;
        let output = model.forward(
            &batch.input,
            Pass {
                padding: batch.padding.as_ref(),
                trace: Some(&trace),
                ..Pass::default()
            },
        )?;
        let blocks = 0..model.spec().expanded_blocks().len();
        let streams =
            blocks.map(|block| Ok(trace.signal(&format!("blocks.{block}.out"))?.into_value()));
        Ok((output, streams.collect::<Result<_>>()?))
    }

    /// How far predictions are from the original's, or hidden vectors where nothing is predicted.
    fn distance(&self, output: &Output, teacher: &Output, batch: &Batch<'_>) -> Result<Tensor> {
        let rows = |x: &Tensor| engine(real_rows(x, batch.real.as_ref()));
        let (Some(found), Some(wanted)) = (&output.logits, &teacher.logits) else {
            let found = rows(output.hidden.value())?;
            let wanted = rows(&teacher.hidden.value().detach())?;
            alike(&found, &wanted)?;
            let length = number(&engine(engine(wanted.sqr())?.sum_all())?)?;
            let error = engine(engine(engine(found - wanted)?.sqr())?.sum_all())?;
            return engine(error.affine(1.0 / length.max(f64::MIN_POSITIVE), 0.0));
        };
        let found = rows(found.value())?;
        let wanted = engine(rows(&wanted.value().detach())?.to_dtype(found.dtype()))?;
        alike(&found, &wanted)?;
        let logarithms = |scores: &Tensor| -> Result<Tensor> {
            let cooled = engine(scores.affine(1.0 / self.temperature, 0.0))?;
            Ok(log_softmax(&cooled, &SoftmaxMask::default())?)
        };
        let (found, wanted) = (logarithms(&found)?, logarithms(&wanted)?.detach());
        let gap = engine(&wanted - found)?;
        let divergence = engine(engine(engine(wanted.exp())? * gap)?.sum(D::Minus1))?;
        let scale = self.temperature * self.temperature;
        engine(engine(divergence.mean_all())?.affine(scale, 0.0))
    }

    /// The mean loss over all examples.
    pub(super) fn mean(&self, model: &Model, data: &CalibrationData, size: usize) -> Result<f64> {
        let mut sum = 0.0;
        for batch in data.batches(size, &model.device()) {
            let batch = batch?;
            sum += number(&self.loss(model, &batch)?)? * batch.examples.len() as f64;
        }
        Ok(sum / data.len() as f64)
    }
}

/// Refuses models whose streams cannot be compared block by block.
fn check_streams(model: &Model, teacher: Option<&Model>) -> Result<()> {
    let shape = |model: &Model| (model.spec().expanded_blocks().len(), model.spec().width);
    let (blocks, width) = shape(model);
    match teacher.map(shape) {
        Some(found) if found == (blocks, width) => Ok(()),
        found => Err(Error::invalid(
            "the original, whose streams are to be learned",
            found.map_or("absent".to_owned(), |(blocks, width)| {
                format!("one of {blocks} blocks and width {width}")
            }),
            format!(
                "one of {blocks} blocks and width {width}, as the compressed model; or the weight of \
                 streams 0"
            ),
        )),
    }
}

/// The mean over blocks of `‖Y − Y*‖² / ‖Y*‖²`, rows being the real tokens of a batch: of streams
/// `[batch, length, width]` that are found and wanted.
fn streams_apart(found: &[Tensor], wanted: &[Tensor], batch: &Batch<'_>) -> Result<Tensor> {
    let rows = |x: &Tensor| engine(real_rows(x, batch.real.as_ref()));
    let share = 1.0 / found.len().max(1) as f64;
    let mut total: Option<Tensor> = None;
    for (found, wanted) in found.iter().zip(wanted) {
        let found = rows(found)?;
        let wanted = engine(rows(&wanted.detach())?.to_dtype(found.dtype()))?;
        alike(&found, &wanted)?;
        let length = number(&engine(engine(wanted.sqr())?.sum_all())?)?;
        let error = engine(engine(engine(found - wanted)?.sqr())?.sum_all())?;
        let term = engine(error.affine(share / length.max(f64::MIN_POSITIVE), 0.0))?;
        total = Some(match total {
            Some(total) => engine(total + term)?,
            None => term,
        });
    }
    total.ok_or_else(|| Error::invalid("blocks whose streams are learned", 0, "at least 1"))
}

fn alike(found: &Tensor, wanted: &Tensor) -> Result<()> {
    match found.dims() == wanted.dims() {
        true => Ok(()),
        false => Err(Error::invalid(
            "what the original says of a batch",
            format!("{:?}", wanted.dims()),
            format!("{:?}, as the compressed model does", found.dims()),
        )),
    }
}

/// The number in a scalar.
pub(crate) fn number(scalar: &Tensor) -> Result<f64> {
    engine(engine(scalar.detach().to_dtype(DType::F64))?.to_scalar::<f64>())
}
