//! The loss between what a teacher and a student say of different views, and what tells that both have
//! collapsed.

use lapidary_kernels::{D, DType, SoftmaxMask, Tensor, log_softmax, softmax};

use crate::error::engine;
use crate::{Error, Result};

/// What the logits of both are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperatures {
    /// `τ_s`.
    pub student: f64,
    /// `τ_t`, the lower one: it sharpens.
    pub teacher: f64,
}

/// `softmax((g − c) / τ_t)` of a teacher's logits `[.., outputs]` and the centre `[outputs]`; a constant of the
/// loss.
///
/// # Errors
/// When the shapes do not fit.
pub fn teacher_probabilities(logits: &Tensor, centre: &Tensor, temperature: f64) -> Result<Tensor> {
    let centred = engine(logits.detach().broadcast_sub(&centre.detach()))?;
    let scaled = engine(centred.affine(1.0 / temperature, 0.0))?;
    Ok(softmax(&scaled, &SoftmaxMask::default())?.detach())
}

/// The mean over images and over pairs of a view that the teacher saw and *another* that the student saw:
///
/// ```text
/// L = −1 / (G (V − 1)) Σ_t Σ_{s ≠ t} P_t · ln softmax(g_s / τ_s)
/// ```
///
/// `student` holds logits `[views, images, outputs]`, the first of them of the views of `teacher`, which holds
/// probabilities `[teacher's views, images, outputs]`. Differentiable in `student`.
///
/// # Errors
/// For shapes that do not fit, or fewer than two views of the student.
pub fn distillation_loss(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let (views, images, outputs) = engine(student.dims3())?;
    let fits = matches!(*teacher.dims(), [global, i, o]
        if i == images && o == outputs && (1..=views).contains(&global));
    if !fits || views < 2 || images == 0 {
        return Err(Error::Tensor {
            name: "logits of teacher and student".to_owned(),
            detail: format!(
                "shapes {:?} and {:?} have to be [views, images, outputs], with two views of the student at \
                 least and as many of the teacher at most",
                teacher.dims(),
                student.dims()
            ),
        });
    }
    let global = engine(teacher.dim(0))?;
    let teacher = teacher.detach();
    let scaled = engine(student.affine(1.0 / temperature, 0.0))?;
    let logarithms = log_softmax(&scaled, &SoftmaxMask::default())?;
    // Every pair, less those of a view with itself.
    let all = engine(engine(teacher.sum(0))? * engine(logarithms.sum(0))?)?;
    let same = engine(&teacher * engine(logarithms.narrow(0, 0, global))?)?;
    let sum = engine(engine(all.sum_all())? - engine(same.sum_all())?)?;
    let pairs = global * (views - 1) * images;
    engine(sum.affine(-1.0 / pairs as f64, 0.0))
}

/// `c ← m c + (1 − m) mean(g)` over all of a teacher's logits `[.., outputs]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn moved_centre(centre: &Tensor, logits: &Tensor, momentum: f64) -> Result<Tensor> {
    let outputs = engine(logits.dim(D::Minus1))?;
    let mean = engine(engine(logits.detach().reshape(((), outputs)))?.mean(0))?;
    let kept = engine(centre.detach().affine(momentum, 0.0))?;
    engine(kept + engine(mean.affine(1.0 - momentum, 0.0))?)
}

/// What a teacher says of many images, in nats. Where every image gets the same distribution, be it a level one
/// or a single output, both numbers are equal: it says nothing of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// `mean_i H(P_i)`: `ln outputs` where nothing is sharp, 0 where each image has one output.
    pub entropy: f64,
    /// `H(mean_i P_i)`: 0 where all have the same output.
    pub entropy_of_mean: f64,
}

impl Spread {
    /// Of probabilities `[.., outputs]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn of(probabilities: &Tensor) -> Result<Self> {
        let outputs = engine(probabilities.dim(D::Minus1))?;
        let each = engine(probabilities.detach().to_dtype(DType::F64))?;
        let each = engine(engine(each.reshape(((), outputs)))?.to_vec2::<f64>())?;
        let count = each.len().max(1) as f64;
        let mut mean = vec![0.0; outputs];
        for row in &each {
            for (mean, p) in mean.iter_mut().zip(row) {
                *mean += p / count;
            }
        }
        Ok(Self {
            entropy: each.iter().map(|row| entropy(row)).sum::<f64>() / count,
            entropy_of_mean: entropy(&mean),
        })
    }

    /// `H(mean P) − mean H(P)`: what an output tells of the image, 0 after a collapse of either kind.
    pub fn information(&self) -> f64 {
        self.entropy_of_mean - self.entropy
    }
}

/// `−Σ p ln p`.
fn entropy(probabilities: &[f64]) -> f64 {
    let positive = probabilities.iter().filter(|p| **p > 0.0);
    -positive.map(|p| p * p.ln()).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator;
    use lapidary_kernels::check::gradient_error;
    use lapidary_kernels::{Device, Var};
    use rand::RngExt;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let mut generator = generator(seed);
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn number(tensor: &Tensor) -> f64 {
        tensor.to_scalar().unwrap()
    }

    fn flat(tensor: &Tensor) -> Vec<f64> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn zeros(outputs: usize) -> Tensor {
        Tensor::zeros(outputs, DType::F64, &Device::Cpu).unwrap()
    }

    /// Pair by pair, as it is written.
    #[test]
    fn it_is_the_mean_cross_entropy_of_pairs_of_different_views() {
        let (views, global, images, outputs) = (4, 2, 3, 5);
        let student = random(&[views, images, outputs], 1);
        let logits = random(&[global, images, outputs], 2);
        let teacher = teacher_probabilities(&logits, &random(&[outputs], 3), 0.3).unwrap();
        let found = number(&distillation_loss(&student, &teacher, 0.7).unwrap());
        let (s, t) = (flat(&student), flat(&teacher));
        let (mut sum, mut pairs) = (0.0, 0);
        for view in 0..views {
            for other in (0..global).filter(|other| *other != view) {
                for image in 0..images {
                    let row = |x: &[f64], view: usize| {
                        x[(view * images + image) * outputs..][..outputs].to_vec()
                    };
                    let (s, t) = (row(&s, view), row(&t, other));
                    let all: f64 = s.iter().map(|s| (s / 0.7).exp()).sum();
                    let each = s.iter().zip(&t).map(|(s, t)| -t * (s / 0.7 - all.ln()));
                    sum += each.sum::<f64>();
                    pairs += 1;
                }
            }
        }
        assert_eq!(pairs, global * (views - 1) * images);
        assert!((found - sum / pairs as f64).abs() < 1e-12);
    }

    /// Where both say the same of every view, the loss is the entropy, the least it can be.
    #[test]
    fn equal_distributions_leave_their_entropy_and_no_gradient() {
        let one = random(&[1, 3, 6], 4);
        let variable = Var::from_tensor(&Tensor::cat(&[&one, &one, &one], 0).unwrap()).unwrap();
        let both = Tensor::cat(&[&one, &one], 0).unwrap();
        let teacher = teacher_probabilities(&both, &zeros(6), 0.4).unwrap();
        let loss = distillation_loss(variable.as_tensor(), &teacher, 0.4).unwrap();
        let spread = Spread::of(&teacher).unwrap();
        assert!((number(&loss) - spread.entropy).abs() < 1e-12);
        let gradients = loss.backward().unwrap();
        let gradient = gradients.get(variable.as_tensor()).unwrap();
        assert!(flat(gradient).iter().all(|slope| slope.abs() < 1e-12));
        // Away from there it is more.
        let away = (variable.as_tensor() + random(&[3, 3, 6], 5)).unwrap();
        assert!(number(&distillation_loss(&away, &teacher, 0.4).unwrap()) > spread.entropy + 1e-6);
    }

    #[test]
    fn gradients_equal_central_differences_and_the_teacher_has_none() {
        let logits = Var::from_tensor(&random(&[2, 2, 4], 6)).unwrap();
        let teacher = teacher_probabilities(logits.as_tensor(), &zeros(4), 0.5).unwrap();
        let student = random(&[3, 2, 4], 7);
        let loss = |x: &[Tensor]| {
            distillation_loss(&x[0], &teacher, 0.2).map_err(|error| match error {
                Error::Kernel(error) => error,
                other => panic!("{other}"),
            })
        };
        assert!(gradient_error(loss, std::slice::from_ref(&student)).unwrap() < 1e-7);
        let student = Var::from_tensor(&student).unwrap();
        let loss = distillation_loss(student.as_tensor(), &teacher, 0.2).unwrap();
        let gradients = loss.backward().unwrap();
        assert!(gradients.get(student.as_tensor()).is_some());
        assert!(gradients.get(logits.as_tensor()).is_none());
    }

    #[test]
    fn the_centre_follows_the_mean_of_all_logits() {
        let logits = random(&[2, 3, 4], 8);
        let centre = random(&[4], 9);
        let found = flat(&moved_centre(&centre, &logits, 0.9).unwrap());
        let (logits, centre) = (flat(&logits), flat(&centre));
        for (output, found) in found.iter().enumerate() {
            let mean: f64 = logits.iter().skip(output).step_by(4).sum::<f64>() / 6.0;
            assert!((found - (0.9 * centre[output] + 0.1 * mean)).abs() < 1e-12);
        }
    }

    /// A shift of all logits of an output is taken off by the centre that has followed it.
    #[test]
    fn what_all_logits_have_in_common_is_centred_away() {
        let logits = random(&[2, 3, 4], 10);
        let shift = random(&[4], 11);
        let shifted = logits.broadcast_add(&shift).unwrap();
        let plain = teacher_probabilities(&logits, &zeros(4), 0.1).unwrap();
        let centred = teacher_probabilities(&shifted, &shift, 0.1).unwrap();
        for (a, b) in flat(&plain).iter().zip(flat(&centred)) {
            assert!((a - b).abs() < 1e-12);
        }
    }

    #[test]
    fn both_collapses_have_no_information() {
        let outputs = 4;
        let of = |rows: &[[f64; 4]]| {
            let all = Tensor::from_vec(rows.concat(), (rows.len(), outputs), &Device::Cpu);
            Spread::of(&all.unwrap()).unwrap()
        };
        let level = of(&[[0.25; 4]; 3]);
        assert!((level.entropy - 4f64.ln()).abs() < 1e-12 && level.information().abs() < 1e-12);
        let single = of(&[[0.0, 1.0, 0.0, 0.0]; 3]);
        assert_eq!((single.entropy, single.information()), (0.0, 0.0));
        // One output for each of four images.
        let told = of(&[
            [1.0, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, 1.0],
        ]);
        assert_eq!(told.entropy, 0.0);
        assert!((told.information() - 4f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let teacher = random(&[2, 3, 4], 0);
        for shape in [[1, 3, 4], [3, 2, 4], [3, 3, 5]] {
            assert!(distillation_loss(&random(&shape, 1), &teacher, 0.1).is_err());
        }
        let alone = random(&[1, 3, 4], 1);
        assert!(distillation_loss(&alone, &alone, 0.1).is_err());
    }
}
