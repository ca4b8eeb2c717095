//! The learning rate as a function of the step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine (Loshchilov & Hutter, arXiv 1608.03983, without restarts).
    #[default]
    Cosine,
    /// A straight line.
    Linear,
    /// No decay.
    Constant,
}

/// A linear warm-up to the peak, then a decay to the floor, which holds from then on.
///
/// ```
/// use lapidary_train::{Decay, Schedule};
///
/// let schedule = Schedule { peak: 1e-3, floor: 1e-4, warm_up: 10, steps: 110, decay: Decay::Linear };
/// assert_eq!(schedule.rate(9), 1e-3);
/// assert!((schedule.rate(60) - 5.5e-4).abs() < 1e-12);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// The rate at the end of the decay.
    #[serde(default)]
    pub floor: f64,
    /// Steps until the peak: step `s` of them (from 0) has rate `peak · (s + 1) / warm_up`.
    #[serde(default)]
    pub warm_up: u64,
    /// Steps in all, warm-up included.
    pub steps: u64,
    /// The shape of the decay.
    #[serde(default)]
    pub decay: Decay,
}

impl Schedule {
    /// Refuses rates that are negative or not finite, a floor above the peak, and a warm-up longer
    /// than the whole.
    pub fn validate(&self) -> Result<()> {
        let refuse = |name, found: String, expected| {
            Err(Error::Setting {
                name,
                found,
                expected,
            })
        };
        // Far above any that trains, and far below where a rate on the way there overflows.
        if !(0.0..=1e6).contains(&self.peak) {
            return refuse(
                "schedule.peak",
                self.peak.to_string(),
                "between 0 and 1 000 000",
            );
        }
        if !(0.0..=self.peak).contains(&self.floor) {
            return refuse(
                "schedule.floor",
                self.floor.to_string(),
                "between 0 and schedule.peak",
            );
        }
        if self.warm_up > self.steps {
            return refuse(
                "schedule.warm_up",
                format!("{} steps", self.warm_up),
                "no longer than the schedule",
            );
        }
        Ok(())
    }

    /// The rate of a step, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warm_up {
            return self.peak * (step + 1) as f64 / self.warm_up as f64;
        }
        let decaying = self.steps.saturating_sub(self.warm_up).max(1) as f64;
        let progress = ((step - self.warm_up) as f64 / decaying).min(1.0);
        let remaining = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
            Decay::Constant => 1.0,
        };
        self.floor + (self.peak - self.floor) * remaining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule {
            peak: 2.0,
            floor: 0.5,
            warm_up: 4,
            steps: 24,
            decay,
        }
    }

    #[test]
    fn warm_up_is_linear_and_ends_at_the_peak() {
        let rates: Vec<f64> = (0..5).map(|s| schedule(Decay::Cosine).rate(s)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0]);
    }

    #[test]
    fn decays_meet_at_both_ends_and_differ_between() {
        for decay in [Decay::Cosine, Decay::Linear] {
            let schedule = schedule(decay);
            assert_eq!(schedule.rate(4), 2.0);
            assert!((schedule.rate(14) - 1.25).abs() < 1e-12, "half way");
            assert!((schedule.rate(24) - 0.5).abs() < 1e-12);
            assert!((schedule.rate(9999) - 0.5).abs() < 1e-12);
            assert!((4..24).all(|s| schedule.rate(s + 1) < schedule.rate(s)));
        }
        assert!(schedule(Decay::Cosine).rate(9) > schedule(Decay::Linear).rate(9));
        assert_eq!(schedule(Decay::Constant).rate(9999), 2.0);
    }

    #[test]
    fn no_warm_up_starts_at_the_peak_and_zero_steps_do_not_divide_by_zero() {
        let schedule = Schedule {
            warm_up: 0,
            steps: 0,
            ..schedule(Decay::Linear)
        };
        assert_eq!(schedule.rate(0), 2.0);
        assert_eq!(schedule.rate(1), 0.5);
    }

    #[test]
    fn impossible_schedules_are_refused() {
        let good = schedule(Decay::Cosine);
        assert!(good.validate().is_ok());
        let bad = [
            Schedule {
                peak: f64::NAN,
                ..good
            },
            Schedule {
                peak: 1e308,
                ..good
            },
            Schedule { floor: 3.0, ..good },
            Schedule {
                floor: -1.0,
                ..good
            },
            Schedule {
                warm_up: 25,
                ..good
            },
        ];
        for schedule in bad {
            assert!(schedule.validate().is_err(), "{schedule:?}");
        }
    }
}
