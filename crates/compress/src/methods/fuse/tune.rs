//! Tuning a group of blocks until it gives what it gave with one block more.

use std::f64::consts::PI;

use lapidary_kernels::{
    AdamW, AdamWOptions, DType, Parameter, SoftmaxMask, Tensor, backward, log_softmax,
};
use lapidary_model::Model;
use lapidary_signal::Signal;

use super::influence::run;
use super::stack::Stack;
use super::{FuseLoss, FuseSettings};
use crate::data::{Batch, real_rows};
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// A run of blocks of which one goes, as numbers in the whole model.
pub(super) struct Group {
    /// All of them, the one that goes too.
    pub(super) blocks: Vec<usize>,
    /// The one that goes.
    pub(super) gone: usize,
    /// Those that are tuned.
    pub(super) survivors: Vec<usize>,
}

/// How far the group's output is from what it was, relative to what the group adds to the stream:
/// `√(Σ‖Ŷ − Y‖² / Σ‖Y − X‖²)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Distances {
    /// With nothing but the block left out.
    pub(super) before: f64,
    /// When it was tuned.
    pub(super) after: f64,
}

/// What one batch shows the group.
struct Shown<'a> {
    batch: Batch<'a>,
    /// `X`, `[batch, length, width]`.
    entering: Signal,
    /// `Y` of the whole group, real rows only.
    wanted: Tensor,
}

/// Leaves the group's block out and tunes the others:
///
/// ```text
/// min KL(softmax(Y) ‖ softmax(Ŷ))        or        min ‖Ŷ − Y‖²
/// ```
///
/// the softmax over the features of a token, by Adam with a rate that falls to 0 as a cosine.
pub(super) fn tune(
    stack: &mut Stack,
    group: &Group,
    data: &CalibrationData,
    batch: usize,
    recycle: bool,
    settings: &FuseSettings,
) -> Result<Distances> {
    let shown = show(stack, group, data, batch)?;
    stack.fuse(group.gone, &group.survivors, recycle, settings)?;
    stack.remove(group.gone);
    let kept = group.blocks.iter().copied();
    let kept: Vec<usize> = kept.filter(|block| *block != group.gone).collect();
    let before = distance(&stack.model(&kept)?, &shown)?;
    let [gates, corrections] = stack.variables(&group.survivors);
    let at_rate = |rate: f64| {
        move |variable| Parameter {
            variable,
            weight_decay: None,
            rate_factor: rate,
        }
    };
    let gates = gates.into_iter().map(at_rate(settings.gate_rate));
    let corrections = corrections.into_iter().map(at_rate(settings.rate));
    let mut optimiser = AdamW::new(
        gates.chain(corrections).collect::<Vec<Parameter>>(),
        AdamWOptions {
            learning_rate: 1.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
        },
    )?;
    let steps = settings.epochs * shown.len();
    for step in 0..steps {
        let Some(shown) = shown.get(step % shown.len()) else {
            break;
        };
        let loss = settings
            .loss
            .of(&given(&stack.model(&kept)?, shown)?, &shown.wanted)?;
        let value = engine(engine(loss.to_dtype(DType::F64))?.to_scalar::<f64>())?;
        if !value.is_finite() {
            return Err(Error::invalid(
                format!("loss of the group around blocks.{}", group.gone),
                value,
                "finite: lower the rates",
            ));
        }
        let share = 0.5 * (1.0 + (PI * step as f64 / steps as f64).cos());
        optimiser.step(&engine(backward(&loss))?, share, 1.0)?;
    }
    let after = match steps {
        0 => before,
        _ => distance(&stack.model(&kept)?, &shown)?,
    };
    Ok(Distances { before, after })
}

/// What enters the group and what it gives while it is whole.
fn show<'a>(
    stack: &Stack,
    group: &Group,
    data: &'a CalibrationData,
    batch: usize,
) -> Result<Vec<Shown<'a>>> {
    let start = group.blocks.first();
    let ahead = stack.left().iter().copied();
    let ahead: Vec<usize> = ahead.take_while(|block| Some(block) != start).collect();
    let (ahead, whole) = (stack.model(&ahead)?, stack.model(&group.blocks)?);
    // The batches outlive this function, and so do not borrow its device.
    let device = ahead.device();
    let batches = data.examples().chunks(batch.max(1));
    let shown = batches.map(|examples| {
        let batch = Batch::new(examples, &device)?;
        let entering = Signal::from(run(&ahead, &batch, None, None)?.detach());
        let wanted = run(&whole, &batch, Some((0, &entering)), None)?.detach();
        Ok(Shown {
            wanted: engine(real_rows(&wanted, batch.real.as_ref()))?,
            entering,
            batch,
        })
    });
    shown.collect()
}

/// What the group gives now, real rows only.
fn given(group: &Model, shown: &Shown<'_>) -> Result<Tensor> {
    let leaving = run(group, &shown.batch, Some((0, &shown.entering)), None)?;
    engine(real_rows(&leaving, shown.batch.real.as_ref()))
}

fn distance(group: &Model, shown: &[Shown<'_>]) -> Result<f64> {
    let squares = |a: &Tensor, b: &Tensor| -> Result<f64> {
        let gap = engine(engine(a - b)?.detach().to_dtype(DType::F64))?;
        engine(engine(engine(gap.sqr())?.sum_all())?.to_scalar::<f64>())
    };
    let (mut missed, mut added) = (0.0, 0.0);
    for shown in shown {
        missed += squares(&given(group, shown)?, &shown.wanted)?;
        let entering = real_rows(shown.entering.value(), shown.batch.real.as_ref());
        added += squares(&engine(entering)?, &shown.wanted)?;
    }
    Ok(match added > 0.0 {
        true => (missed / added).sqrt(),
        false => 0.0,
    })
}

impl FuseLoss {
    /// Of rows `[tokens, width]` that are given and that were wanted.
    fn of(self, given: &Tensor, wanted: &Tensor) -> Result<Tensor> {
        match self {
            Self::Divergence => {
                let mask = SoftmaxMask::default();
                let wanted = log_softmax(wanted, &mask)?;
                let gap = engine(&wanted - log_softmax(given, &mask)?)?;
                let terms = engine(engine(wanted.exp())? * gap)?;
                engine(engine(terms.sum(1))?.mean_all())
            }
            Self::SquaredError => engine(engine(engine(given - wanted)?.sqr())?.mean_all()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::golden;
    use super::*;
    use lapidary_kernels::Device;

    #[test]
    fn the_divergence_is_numpys() {
        let document = golden();
        let (given, wanted) = (document.matrix("stream"), document.matrix("behind"));
        let found = FuseLoss::Divergence.of(&given, &wanted).unwrap();
        let found: f64 = found.to_scalar().unwrap();
        assert!((found - document.number("divergence")).abs() < 1e-12);
    }

    #[test]
    fn losses_are_what_they_say() {
        let wanted = Tensor::new(&[[0.0f64, 1.0, -1.0], [2.0, 0.5, 0.0]], &Device::Cpu).unwrap();
        let given = Tensor::new(&[[1.0f64, 0.0, 0.5], [2.0, 0.5, 0.0]], &Device::Cpu).unwrap();
        let value = |loss: FuseLoss, given: &Tensor| -> f64 {
            loss.of(given, &wanted).unwrap().to_scalar().unwrap()
        };
        let softmax = |row: [f64; 3]| {
            let sum: f64 = row.iter().map(|entry| entry.exp()).sum();
            row.map(|entry| entry.exp() / sum)
        };
        let (p, q) = (softmax([0.0, 1.0, -1.0]), softmax([1.0, 0.0, 0.5]));
        let divergence: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((value(FuseLoss::Divergence, &given) - divergence / 2.0).abs() < 1e-12);
        let squares = (1.0 + 1.0 + 2.25) / 6.0;
        assert!((value(FuseLoss::SquaredError, &given) - squares).abs() < 1e-12);
        for loss in [FuseLoss::Divergence, FuseLoss::SquaredError] {
            assert!(value(loss, &wanted).abs() < 1e-15);
        }
    }
}
