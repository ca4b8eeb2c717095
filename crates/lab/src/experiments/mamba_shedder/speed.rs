//! How fast whole models read and decode, and what is left of them.

use super::{Kind, Recurrence};
use crate::error::engine;
use crate::experiments::after_training;
use crate::experiments::depth::Subject;
use crate::{Claim, Result, Scale};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use std::collections::BTreeMap;
use std::time::Instant;

/// How much is timed, and how often.
#[derive(Clone, Copy)]
pub(super) struct Timing {
    /// Tokens that are decoded one by one, behind a window that is read at once.
    decoded: usize,
    /// Rounds in which each model has its turn, behind one that warms up.
    rounds: usize,
}

impl Timing {
    pub(super) fn of(scale: Scale) -> Self {
        let (decoded, rounds) = match scale {
            Scale::Smoke => (4, 3),
            Scale::Small => (32, 7),
            Scale::Full => (64, 11),
        };
        Self { decoded, rounds }
    }
}

/// Tokens a second of one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speed {
    /// Of a window that is read at once.
    reading: f64,
    /// Of those that follow one by one.
    decoding: f64,
}

impl Speed {
    /// How many times as fast as another.
    fn over(self, other: Self) -> Self {
        Self {
            reading: self.reading / other.reading,
            decoding: self.decoding / other.decoding,
        }
    }

    fn at_least(self, times: f64) -> bool {
        self.reading >= times && self.decoding >= times
    }
}

/// Median speeds of models on a held-out window of the subject. They take turns round by round, so that
/// what else the machine does falls on all of them alike.
pub(super) fn speeds<const N: usize>(
    subject: &Subject,
    models: [&Model; N],
    timing: Timing,
) -> Result<[Speed; N]> {
    let window = subject.tests.first();
    let window = window.map_or(&[][..], |window| window.tokens.as_slice());
    let mut served = Vec::new();
    for model in models {
        served.push(constant(model)?);
    }
    let mut seconds = [(); N].map(|()| (Vec::new(), Vec::new()));
    for round in 0..=timing.rounds {
        for (model, (reading, decoding)) in served.iter().zip(&mut seconds) {
            let (read, decoded) = timed(model, window, timing.decoded)?;
            if round > 0 {
                reading.push(read);
                decoding.push(decoded);
            }
        }
    }
    Ok(seconds.map(|(reading, decoding)| Speed {
        reading: window.len() as f64 / median(reading),
        decoding: timing.decoded as f64 / median(decoding),
    }))
}

/// The model with weights that nothing is derived by, as one that serves has them.
fn constant(model: &Model) -> Result<Model> {
    let parameters = model.parameters().iter();
    let mut parameters: BTreeMap<String, Tensor> = parameters
        .map(|(name, tensor)| (name.clone(), tensor.detach()))
        .collect();
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}

/// Seconds of reading a window at once, and of so many tokens one by one behind it.
fn timed(model: &Model, window: &[u32], decoded: usize) -> Result<(f64, f64)> {
    let mut state = model.decode_state();
    let mut pass = |tokens: &[u32]| -> Result<f64> {
        let ids = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu);
        let input = Input::tokens(engine(ids)?);
        let pass = Pass {
            state: Some(&mut state),
            only_last: true,
            ..Pass::default()
        };
        let started = Instant::now();
        model.forward(&input, pass)?;
        Ok(started.elapsed().as_secs_f64())
    };
    let reading = pass(window)?;
    let mut decoding = 0.0;
    for token in window.iter().cycle().take(decoded) {
        decoding += pass(std::slice::from_ref(token))?;
    }
    Ok((reading, decoding))
}

/// The middle of some values, the upper one of two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Speeds of a stack, whole and without half of its blocks or scans.
#[derive(Clone, Copy)]
pub(super) struct Speeds {
    pub(super) whole: Speed,
    pub(super) blocks: Speed,
    pub(super) scans: Speed,
}

impl Speeds {
    /// What the paper says of shedding one kind: that a stack without them is at least so many times as
    /// fast.
    pub(super) fn faster(
        &self,
        scale: Scale,
        (recurrence, kind): (Recurrence, Kind),
        (times, published): (f64, &str),
    ) -> Claim {
        let left = match kind {
            Kind::Block => self.blocks,
            Kind::Scan => self.scans,
        };
        let claim = format!(
            "without half of its {} {} reads and decodes at least {times} times as fast",
            kind.name(),
            recurrence.name()
        );
        let measured = compared(self.whole, left);
        let holds = left.over(self.whole).at_least(times);
        Claim::new(&claim, published, measured, after_training(scale, holds)).noted(NOTE)
    }

    /// That scans save less time than blocks.
    pub(super) fn scans_beside_blocks(&self, scale: Scale, recurrence: Recurrence) -> Claim {
        let [blocks, scans] = [self.blocks, self.scans].map(|left| left.over(self.whole));
        let holds = scans.reading < blocks.reading && scans.decoding < blocks.decoding;
        Claim::new(
            &format!(
                "a scan of {} saves less time than a block",
                recurrence.name()
            ),
            "1.2 times the speed without 22 scans, 1.3 without 14 blocks",
            format!(
                "reading {:.2} against {:.2} times, decoding {:.2} against {:.2} times",
                scans.reading, blocks.reading, scans.decoding, blocks.decoding
            ),
            after_training(scale, holds),
        )
        .noted(NOTE)
    }
}

/// What the paper says of hybrids.
pub(super) fn of_hybrid(scale: Scale, [whole, left]: [Speed; 2]) -> Claim {
    Claim::new(
        "a shed hybrid reads and decodes at least 1.2 times as fast",
        "1.2 times without 7 blocks of Hymba-1.5B",
        compared(whole, left),
        after_training(scale, left.over(whole).at_least(1.2)),
    )
    .noted(NOTE)
}

/// Speeds before and after, in words.
fn compared(whole: Speed, left: Speed) -> String {
    let times = left.over(whole);
    format!(
        "tokens a second: reading {:.0} from {:.0}, {:.2} times; decoding {:.0} from {:.0}, {:.2} times",
        left.reading, whole.reading, times.reading, left.decoding, whole.decoding, times.decoding
    )
}

/// Beside every claim of time.
const NOTE: &str = "medians of one sequence on a CPU, models in turn, on a machine that may do other \
                    things besides; the share that is shed is another than the paper's";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Verdict;
    use crate::experiments::depth::Size;
    use crate::experiments::texts::Sides;

    #[test]
    fn every_model_has_its_speed() {
        let size = Size::of(Scale::Smoke);
        let text = Sides::language(3).unwrap();
        let subject =
            super::super::trained(text, Size { steps: 1, ..size }, 3, |vocabulary, size| {
                super::super::stack(vocabulary, size, Recurrence::Mamba2)
            })
            .unwrap();
        let timing = Timing {
            decoded: 2,
            rounds: 1,
        };
        let model = &subject.model;
        for speed in speeds(&subject, [model, model], timing).unwrap() {
            assert!(
                speed.reading.is_finite() && speed.reading > 0.0,
                "{speed:?}"
            );
            assert!(
                speed.decoding.is_finite() && speed.decoding > 0.0,
                "{speed:?}"
            );
        }
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 4.0]), 4.0);
        assert_eq!(median(vec![2.0, 1.0]), 2.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn both_speeds_have_to_rise() {
        let whole = Speed {
            reading: 100.0,
            decoding: 10.0,
        };
        let left = Speed {
            reading: 150.0,
            decoding: 11.0,
        };
        let speeds = Speeds {
            whole,
            blocks: left,
            scans: whole,
        };
        let block = (Recurrence::Mamba, Kind::Block);
        let verdict = |times| speeds.faster(Scale::Small, block, (times, "none")).verdict;
        assert_eq!(verdict(1.1), Verdict::Holds);
        assert_eq!(verdict(1.2), Verdict::DoesNotHold);
        let smoke = speeds.faster(Scale::Smoke, block, (1.1, "none"));
        assert_eq!(smoke.verdict, Verdict::NotMeasured);
        assert!(
            smoke.measured.contains("150 from 100, 1.50 times"),
            "{smoke:?}"
        );
    }
}
