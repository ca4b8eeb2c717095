//! What a model learns while it heals.

use lapidary_kernels::{AdamW, D, SoftmaxMask, Tensor, log_softmax};
use lapidary_model::{Model, Output};

use super::hints::{self, Hints};
use super::{HealData, HealSettings, number};
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
    /// The weight of hints, and the blocks that give them.
    hints: Option<(f64, Hints)>,
}

impl<'a> Lesson<'a> {
    pub(super) fn of(model: &Model, data: &HealData<'a>, settings: &HealSettings) -> Result<Self> {
        let objective = settings.objective(model, data.training)?;
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
        let hints = match (settings.hints > 0.0, data.teacher) {
            (false, _) => None,
            (true, Some(teacher)) => {
                let hints = Hints::new(model, teacher, data.training, settings.batch)?;
                Some((settings.hints, hints))
            }
            (true, None) => {
                return Err(Error::invalid(
                    "the original, whose residual stream is to be learned",
                    "absent",
                    "given, or the weight of hints 0",
                ));
            }
        };
        Ok(Self {
            objective,
            teacher: data.teacher,
            distil: settings.distil,
            temperature: settings.temperature,
            hints,
        })
    }

    /// What trains that part of the lesson which is not the model's own, where there is any.
    pub(super) fn optimiser(&self, rate: f64) -> Result<Option<AdamW>> {
        match &self.hints {
            Some((_, hints)) => hints.optimiser(rate),
            None => Ok(None),
        }
    }

    /// The mean loss of a batch's examples.
    pub(super) fn loss(&self, model: &Model, batch: &Batch<'_>) -> Result<Tensor> {
        let (output, streams) = match &self.hints {
            Some((_, hints)) => hints.student(model, batch)?,
            None => (forward(model, batch, None)?, Vec::new()),
        };
        let taught = self.taught(batch)?;
        let learned = match &taught {
            Some((said, _)) if self.distil > 0.0 => Some(self.distance(&output, said, batch)?),
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
        match (&self.hints, &taught) {
            (Some((weight, _)), Some((_, wanted))) => {
                let hints = hints::distance(&streams, wanted)?;
                engine(loss + engine(hints.affine(*weight, 0.0))?)
            }
            _ => Ok(loss),
        }
    }

    /// What the original says of a batch and after its blocks, where either is learned.
    fn taught(&self, batch: &Batch<'_>) -> Result<Option<(Output, Vec<Tensor>)>> {
        let Some(teacher) = self.teacher else {
            return Ok(None);
        };
        match &self.hints {
            Some((_, hints)) => hints.teacher(teacher, batch).map(Some),
            None if self.distil > 0.0 => Ok(Some((forward(teacher, batch, None)?, Vec::new()))),
            None => Ok(None),
        }
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
