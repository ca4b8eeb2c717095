//! Self-distillation without labels (Caron et al., Emerging Properties in Self-Supervised Vision Transformers,
//! DINO, 2021, arXiv 2104.14294): a student names views of an image as a teacher names other views of it, and
//! the teacher is the mean of earlier students.
//!
//! ```text
//! L = −mean_{t ≠ s} P_t · ln P_s,   P_s = softmax(g_s / τ_s),   P_t = softmax((g_t − c) / τ_t)
//! θ_t ← m θ_t + (1 − m) θ_s,        c ← m_c c + (1 − m_c) mean(g_t)
//! ```
//!
//! The teacher sees two views that show much of the image, the student these and several that show little.
//! Without the centre `c` one output wins for all images; without the low `τ_t` all outputs become alike:
//! [`Spread::information`] is near 0 in both.
//!
//! - [`SelfDistillationSpec`], part of a [`TrainSpec`](crate::TrainSpec); [`Distiller`] a step at a time.
//! - [`CropSpec`], [`Image`]: views of images.
//! - [`Projection`]: from features to logits.
//! - [`distillation_loss`], [`teacher_probabilities`], [`moved_centre`], [`Spread`].
//!
//! Every view is brought to the size of the model's images, or small ones to a smaller size of their own
//! ([`CropSpec::local_size`]) for a model that interpolates between its positions, as the published program does. Of its
//! changes of colour there are contrast and brightness alone.

mod crops;
mod distiller;
mod image;
mod loss;
mod projection;

pub use crops::{CropSpec, GLOBAL};
pub use distiller::{Distiller, Images};
pub use image::{Image, Window};
pub use loss::{Spread, Temperatures, distillation_loss, moved_centre, teacher_probabilities};
pub use projection::{Projection, ProjectionSizes};

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Most features of a hidden layer, and most outputs.
const MOST: usize = 1 << 20;

/// How a student learns from its teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelfDistillationSpec {
    /// Prototypes that views are assigned to.
    pub outputs: usize,
    /// Features of the projection's hidden layers.
    pub hidden: usize,
    /// Features that are compared with prototypes.
    pub bottleneck: usize,
    /// `m` at the first step; it rises to 1 as a cosine.
    pub momentum: f64,
    /// `m_c`.
    pub centre_momentum: f64,
    /// `τ_s`.
    pub student_temperature: f64,
    /// `τ_t`.
    pub teacher_temperature: f64,
    /// `τ_t` at the first step, from where it goes to the other in a line.
    pub first_teacher_temperature: f64,
    /// Steps until then.
    pub temperature_steps: u64,
    /// First steps in which prototypes stay where they are.
    pub frozen_steps: u64,
    /// How views are cut out.
    pub crops: CropSpec,
}

impl Default for SelfDistillationSpec {
    fn default() -> Self {
        Self {
            outputs: 1024,
            hidden: 512,
            bottleneck: 128,
            momentum: 0.996,
            centre_momentum: 0.9,
            student_temperature: 0.1,
            teacher_temperature: 0.04,
            first_teacher_temperature: 0.04,
            temperature_steps: 0,
            frozen_steps: 0,
            crops: CropSpec::default(),
        }
    }
}

impl SelfDistillationSpec {
    /// Refuses settings that cannot be trained with.
    ///
    /// # Errors
    /// Names the setting, what it is and what it could be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name, found: String, expected| {
            Err(Error::Setting {
                name,
                found,
                expected,
            })
        };
        for (name, count) in [
            ("self_distillation.outputs", self.outputs),
            ("self_distillation.hidden", self.hidden),
            ("self_distillation.bottleneck", self.bottleneck),
        ] {
            if !(1..=MOST).contains(&count) {
                return wrong(name, count.to_string(), "between 1 and 1 048 576");
            }
        }
        for (name, share) in [
            ("self_distillation.momentum", self.momentum),
            ("self_distillation.centre_momentum", self.centre_momentum),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return wrong(name, share.to_string(), "between 0 and 1");
            }
        }
        for (name, temperature) in [
            (
                "self_distillation.student_temperature",
                self.student_temperature,
            ),
            (
                "self_distillation.teacher_temperature",
                self.teacher_temperature,
            ),
            (
                "self_distillation.first_teacher_temperature",
                self.first_teacher_temperature,
            ),
        ] {
            // Logits are at most 1: far below that and far above, exponentials say nothing any more.
            if !(1e-3..=1e6).contains(&temperature) {
                let expected = "between 0.001 and 1 000 000";
                return wrong(name, temperature.to_string(), expected);
            }
        }
        let [first, last] = [self.first_teacher_temperature, self.teacher_temperature];
        let usual = Self::default().first_teacher_temperature;
        if self.temperature_steps == 0 && first != usual && first != last {
            let expected = "absent where temperature_steps is 0, so that nothing begins there";
            let name = "self_distillation.first_teacher_temperature";
            return wrong(name, first.to_string(), expected);
        }
        self.crops.validate()
    }

    /// `m` at a step, counted from 0, of so many: `1 − (1 − m₀) (1 + cos(π s / S)) / 2`.
    pub fn momentum_at(&self, step: u64, steps: u64) -> f64 {
        let gone = (step as f64 / steps.max(1) as f64).min(1.0);
        1.0 - (1.0 - self.momentum) * (1.0 + (PI * gone).cos()) / 2.0
    }

    /// Both temperatures at a step, counted from 0.
    pub fn temperatures_at(&self, step: u64) -> Temperatures {
        let gone = match self.temperature_steps {
            0 => 1.0,
            steps => (step as f64 / steps as f64).min(1.0),
        };
        let [first, last] = [self.first_teacher_temperature, self.teacher_temperature];
        Temperatures {
            student: self.student_temperature,
            teacher: first + gone * (last - first),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_momentum_rises_to_one_as_a_cosine() {
        let spec = SelfDistillationSpec {
            momentum: 0.8,
            ..SelfDistillationSpec::default()
        };
        for (step, expected) in [(0, 0.8), (50, 0.9), (100, 1.0), (200, 1.0)] {
            assert!((spec.momentum_at(step, 100) - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn the_teachers_temperature_goes_to_its_last_in_a_line() {
        let spec = SelfDistillationSpec {
            first_teacher_temperature: 0.02,
            teacher_temperature: 0.06,
            temperature_steps: 4,
            ..SelfDistillationSpec::default()
        };
        for (step, expected) in [(0, 0.02), (1, 0.03), (4, 0.06), (9, 0.06)] {
            assert!((spec.temperatures_at(step).teacher - expected).abs() < 1e-12);
        }
        let still = SelfDistillationSpec::default();
        assert_eq!(still.temperatures_at(0).teacher, 0.04);
        assert_eq!(still.temperatures_at(0).student, 0.1);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let good = SelfDistillationSpec::default();
        assert!(good.validate().is_ok());
        for (bad, name) in [
            (
                SelfDistillationSpec {
                    outputs: 0,
                    ..good.clone()
                },
                "self_distillation.outputs is 0",
            ),
            (
                SelfDistillationSpec {
                    momentum: 1.5,
                    ..good.clone()
                },
                "self_distillation.momentum is 1.5",
            ),
            (
                SelfDistillationSpec {
                    student_temperature: 0.0,
                    ..good.clone()
                },
                "self_distillation.student_temperature is 0",
            ),
            (
                SelfDistillationSpec {
                    first_teacher_temperature: 0.02,
                    ..good.clone()
                },
                "self_distillation.first_teacher_temperature is 0.02, but must be absent",
            ),
        ] {
            let said = bad.validate().unwrap_err().to_string();
            assert!(said.contains(name), "{said}");
        }
    }
}
