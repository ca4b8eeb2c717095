//! The map that turns what a block adds towards what it should add.

use lapidary_factor::{
    AffineMap, ConjugateOptions, LbfgsOptions, matrix_from_tensor, minimise, minimise_conjugate,
};
use lapidary_kernels::{D, DType, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::form::MapForm;
use super::{ReplaceMe, Rows};
use crate::error::engine;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How the angle is made small: `T` starts as the identity (of rank one, as the least squares) and
/// goes down
///
/// ```text
/// E[1 − cos(M_t T, X_t − Y_t)]        or, when accurate,  E[1 − cos(M_t T + Y_t, X_t)]
/// ```
///
/// with `(α ‖T‖² + β Σ |T_ij|) / width` added where a ridge `α` or a lasso `β` is asked for. The
/// first cosine does not change when `T` is scaled: its length is what the descent leaves of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CosineDescent {
    /// Who takes the steps.
    pub solver: DescentSolver,
    /// Step size of Adam.
    pub rate: f64,
    /// Passes over the tokens; steps of L-BFGS and of conjugate gradients, which see all at each.
    pub epochs: usize,
    /// Tokens of a step of Adam.
    pub batch: usize,
    /// Whether the whole stream's angle counts and not only that of what is added.
    pub accurate: bool,
}

/// Who takes the steps of a descent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DescentSolver {
    /// Adam (Kingma & Ba, arXiv 1412.6980) on a few tokens at a time.
    #[default]
    Adam,
    /// L-BFGS (Liu & Nocedal 1989) on all tokens at once; not with a lasso, which has corners.
    Lbfgs,
    /// Conjugate gradients (Hager & Zhang 2005) on all tokens at once, which hold a few maps where
    /// L-BFGS holds twenty; not with a lasso either. They end where no entry of the gradient is above
    /// `1e-9`.
    ConjugateGradient,
}

impl DescentSolver {
    /// Its name in settings.
    fn name(self) -> &'static str {
        match self {
            Self::Adam => "adam",
            Self::Lbfgs => "lbfgs",
            Self::ConjugateGradient => "conjugate-gradient",
        }
    }
}

impl Default for CosineDescent {
    fn default() -> Self {
        Self {
            solver: DescentSolver::Adam,
            rate: 1e-4,
            epochs: 10,
            batch: 1024,
            accurate: false,
        }
    }
}

const DECAYS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

/// Below this length a vector has no direction.
const SHORTEST: f64 = 1e-12;

pub(super) fn descend(rows: &Rows, choice: &ReplaceMe, seed: u64) -> Result<AffineMap> {
    let told = &choice.cosine;
    if !(told.rate.is_finite() && told.rate > 0.0) {
        return Err(Error::invalid("rate of the descent", told.rate, "above 0"));
    }
    let goal = Goal::of(rows, choice)?;
    let start = choice.form.start(&rows.sums()?, goal.width)?;
    let numbers = match told.solver {
        DescentSolver::Adam => by_adam(&goal, start, told, seed)?,
        solver if choice.lasso > 0.0 => {
            return Err(Error::invalid(
                "solver of the descent",
                format!("{} with a lasso", solver.name()),
                "adam: the lasso has corners, at which descent by curvature stops too early",
            ));
        }
        DescentSolver::Lbfgs => {
            let options = LbfgsOptions {
                steps: told.epochs,
                ..LbfgsOptions::default()
            };
            minimise(start, &options, |numbers| goal.at(numbers, None))?.point
        }
        DescentSolver::ConjugateGradient => {
            let options = ConjugateOptions {
                steps: told.epochs,
                ..ConjugateOptions::default()
            };
            minimise_conjugate(start, &options, |numbers| goal.at(numbers, None))?.point
        }
    };
    Ok(AffineMap {
        weight: matrix_from_tensor("map of a run of blocks", &goal.map(&numbers)?)?,
        bias: vec![0.0; goal.width],
    })
}

/// What the descent makes small, as a function of a map's numbers.
struct Goal<'a> {
    choice: &'a ReplaceMe,
    width: usize,
    tokens: usize,
    /// `M`, `[tokens, width]`.
    added: Tensor,
    /// `X − Y`.
    wanted: Tensor,
    /// `Y`, where it counts.
    stream: Option<Tensor>,
}

impl<'a> Goal<'a> {
    fn of(rows: &Rows, choice: &'a ReplaceMe) -> Result<Self> {
        let exact = |tensor: &Tensor| engine(tensor.to_dtype(DType::F64));
        let (tokens, width) = engine(rows.added.dims2())?;
        Ok(Self {
            choice,
            width,
            tokens,
            added: exact(&rows.added)?,
            wanted: exact(&rows.wanted)?,
            stream: match choice.cosine.accurate {
                true => Some(exact(&rows.stream)?),
                false => None,
            },
        })
    }

    fn map(&self, numbers: &[f64]) -> Result<Tensor> {
        let entries = self.choice.form.map(numbers, self.width);
        let shape = (self.width, self.width);
        engine(Tensor::from_vec(entries, shape, self.added.device()))
    }

    /// Its value and its gradient by the numbers, over these tokens or all.
    fn at(&self, numbers: &[f64], chosen: Option<&Tensor>) -> Result<(f64, Vec<f64>)> {
        let pick = |tensor: &Tensor| match chosen {
            Some(chosen) => engine(tensor.index_select(chosen, 0)),
            None => Ok(tensor.clone()),
        };
        let (m, r) = (pick(&self.added)?, pick(&self.wanted)?);
        let y = self.stream.as_ref().map(pick).transpose()?;
        let map = self.map(numbers)?;
        let (mut value, gradient) = loss_and_gradient(&map, &m, y.as_ref(), &r)?;
        let mut by_map = flat(&gradient)?;
        let (ridge, lasso) = (self.choice.ridge, self.choice.lasso);
        let each = 1.0 / self.width as f64;
        if ridge > 0.0 || lasso > 0.0 {
            for (slope, entry) in by_map.iter_mut().zip(flat(&map)?) {
                value += each * (ridge * entry * entry + lasso * entry.abs());
                let side = if entry == 0.0 { 0.0 } else { entry.signum() };
                *slope += each * (2.0 * ridge * entry + lasso * side);
            }
        }
        let form: MapForm = self.choice.form;
        Ok((value, form.pulled(numbers, &by_map, self.width)))
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f64>> {
    engine(engine(tensor.flatten_all())?.to_vec1::<f64>())
}

fn by_adam(
    goal: &Goal<'_>,
    mut numbers: Vec<f64>,
    told: &CosineDescent,
    seed: u64,
) -> Result<Vec<f64>> {
    let mut moments = vec![[0.0; 2]; numbers.len()];
    let mut order: Vec<u32> = (0..goal.tokens as u32).collect();
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut step = 0;
    for _ in 0..told.epochs {
        order.shuffle(&mut generator);
        for chosen in order.chunks(told.batch.max(1)) {
            let chosen = engine(Tensor::new(chosen, goal.added.device()))?;
            let (_, gradient) = goal.at(&numbers, Some(&chosen))?;
            step += 1;
            adam(&mut numbers, &gradient, &mut moments, step, told.rate);
        }
    }
    Ok(numbers)
}

/// `mean (1 − cos(m T [+ y], r [+ y]))` and its gradient by `T`.
fn loss_and_gradient(
    map: &Tensor,
    m: &Tensor,
    offset: Option<&Tensor>,
    r: &Tensor,
) -> Result<(f64, Tensor)> {
    let (mut a, mut b) = (engine(m.matmul(map))?, r.clone());
    if let Some(y) = offset {
        a = engine(&a + y)?;
        b = engine(&b + y)?;
    }
    let length = |x: &Tensor| -> Result<Tensor> {
        let squares = engine(engine(x.sqr())?.sum_keepdim(D::Minus1))?;
        engine(engine(squares.sqrt())?.maximum(SHORTEST))
    };
    let length_a = length(&a)?;
    let unit_a = engine(a.broadcast_div(&length_a))?;
    let unit_b = engine(b.broadcast_div(&length(&b)?))?;
    let cosine = engine(engine(&unit_a * &unit_b)?.sum_keepdim(D::Minus1))?;
    // ∂(1 − cos)/∂a = −(b̂ − cos â) / ‖a‖
    let along = engine(unit_a.broadcast_mul(&cosine))?;
    let by_a = engine(engine(&along - &unit_b)?.broadcast_div(&length_a))?;
    let tokens = engine(m.dim(0))?.max(1) as f64;
    let gradient = engine(engine(engine(m.t())?.matmul(&by_a))?.affine(1.0 / tokens, 0.0))?;
    let mean = engine(engine(cosine.mean_all())?.to_scalar::<f64>())?;
    Ok((1.0 - mean, gradient))
}

/// One step, with both moments of each number.
fn adam(numbers: &mut [f64], gradient: &[f64], moments: &mut [[f64; 2]], step: i32, rate: f64) {
    let [beta1, beta2] = DECAYS;
    let (seen1, seen2) = (1.0 - beta1.powi(step), 1.0 - beta2.powi(step));
    let each = numbers.iter_mut().zip(gradient).zip(moments);
    for ((number, slope), [first, second]) in each {
        *first = beta1 * *first + (1.0 - beta1) * slope;
        *second = beta2 * *second + (1.0 - beta2) * slope * slope;
        *number -= rate * (*first / seen1) / ((*second / seen2).sqrt() + EPSILON);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_factor::Matrix;
    use lapidary_kernels::Device;
    use rand::RngExt;

    fn drawn(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let numbers: Vec<f64> = (0..rows * columns)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
    }

    fn by(cosine: CosineDescent) -> ReplaceMe {
        ReplaceMe {
            cosine,
            ..ReplaceMe::default()
        }
    }

    #[test]
    fn gradients_equal_central_differences() {
        let (m, r, y) = (drawn(7, 3, 1), drawn(7, 3, 2), drawn(7, 3, 3));
        let map = drawn(3, 3, 4);
        for offset in [None, Some(&y)] {
            let (_, gradient) = loss_and_gradient(&map, &m, offset, &r).unwrap();
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (at, expected) in gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut entries = map.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                    entries[at] += by;
                    let map = Tensor::from_vec(entries, (3, 3), &Device::Cpu).unwrap();
                    loss_and_gradient(&map, &m, offset, &r).unwrap().0
                };
                let found = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!((found - expected).abs() < 1e-8, "{found} {expected}");
            }
        }
    }

    #[test]
    fn scale_counts_in_the_accurate_form_alone() {
        let (m, r, y) = (drawn(9, 3, 5), drawn(9, 3, 6), drawn(9, 3, 7));
        let map = drawn(3, 3, 8);
        let larger = (&map * 3.0).unwrap();
        let loss = |map: &Tensor, offset| loss_and_gradient(map, &m, offset, &r).unwrap().0;
        assert!((loss(&map, None) - loss(&larger, None)).abs() < 1e-12);
        assert!((loss(&map, Some(&y)) - loss(&larger, Some(&y))).abs() > 1e-3);
    }

    #[test]
    fn descent_finds_a_rotation_and_keeps_its_length_near_one() {
        let added = drawn(512, 4, 9);
        let turn = Tensor::new(
            &[
                [0.8f64, 0.6, 0.0, 0.0],
                [-0.6, 0.8, 0.0, 0.0],
                [0.0, 0.0, 1.0, 0.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            &Device::Cpu,
        )
        .unwrap();
        let wanted = added.matmul(&turn).unwrap();
        let rows = Rows {
            stream: added.zeros_like().unwrap(),
            added,
            wanted,
        };
        let choice = by(CosineDescent {
            rate: 1e-2,
            epochs: 60,
            batch: 128,
            ..CosineDescent::default()
        });
        let map = descend(&rows, &choice, 1).unwrap();
        let again = descend(&rows, &choice, 1).unwrap();
        let turn = matrix_from_tensor("turn", &turn).unwrap();
        assert!((&map.weight - &again.weight).norm_max() == 0.0);
        // The objective sees the direction alone; its length is where the descent left it.
        let length = map.weight.norm_l2() / turn.norm_l2();
        let direction = Matrix::from_fn(4, 4, |i, j| map.weight[(i, j)] / length);
        assert!((&direction - &turn).norm_max() < 0.05, "{direction:?}");
        assert!((0.7..1.3).contains(&length), "{length}");
        // With the curvature of all tokens it is found to many more digits.
        for (solver, name) in [
            (DescentSolver::Lbfgs, "lbfgs"),
            (DescentSolver::ConjugateGradient, "conjugate-gradient"),
        ] {
            let quick = by(CosineDescent {
                solver,
                epochs: 200,
                ..CosineDescent::default()
            });
            let map = descend(&rows, &quick, 1).unwrap();
            let length = map.weight.norm_l2() / turn.norm_l2();
            let direction = Matrix::from_fn(4, 4, |i, j| map.weight[(i, j)] / length);
            assert!(
                (&direction - &turn).norm_max() < 1e-4,
                "{name} {direction:?}"
            );
            let cornered = ReplaceMe {
                lasso: 0.1,
                ..quick
            };
            let refused = descend(&rows, &cornered, 1).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("{name} with a lasso")),
                "{refused}"
            );
            assert!(refused.contains("adam"), "{refused}");
            // Named in settings as in errors.
            let written = serde_json::to_string(&solver).unwrap();
            assert_eq!(written, format!("{name:?}"));
        }
    }

    #[test]
    fn goals_of_every_form_have_the_gradients_of_central_differences() {
        let rows = Rows {
            added: drawn(9, 3, 10),
            wanted: drawn(9, 3, 11),
            stream: drawn(9, 3, 12),
        };
        for (form, accurate) in [
            (MapForm::Full, true),
            (MapForm::Full, false),
            (MapForm::Diagonal, false),
            (MapForm::LowerTriangular, true),
            (MapForm::RankOne, false),
        ] {
            let choice = ReplaceMe {
                form,
                ridge: 0.3,
                lasso: 0.2,
                cosine: CosineDescent {
                    accurate,
                    ..CosineDescent::default()
                },
                ..ReplaceMe::default()
            };
            let goal = Goal::of(&rows, &choice).unwrap();
            let mut numbers = form.start(&rows.sums().unwrap(), 3).unwrap();
            for (at, number) in numbers.iter_mut().enumerate() {
                // Away from the corners of the lasso, where the form has a number.
                *number *= 1.0 + 0.05 * at as f64;
            }
            let (_, gradient) = goal.at(&numbers, None).unwrap();
            for at in (0..numbers.len()).filter(|at| numbers[*at] != 0.0) {
                let moved = |by: f64| {
                    let mut numbers = numbers.clone();
                    numbers[at] += by;
                    goal.at(&numbers, None).unwrap().0
                };
                let expected = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                let found = gradient[at];
                assert!(
                    (found - expected).abs() < 1e-7,
                    "{form:?} {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn descent_keeps_the_form_and_turns_towards_what_is_wanted() {
        let rows = Rows {
            added: drawn(64, 4, 13),
            wanted: drawn(64, 4, 14),
            stream: drawn(64, 4, 15),
        };
        for solver in [
            DescentSolver::Adam,
            DescentSolver::Lbfgs,
            DescentSolver::ConjugateGradient,
        ] {
            for form in [
                MapForm::Diagonal,
                MapForm::LowerTriangular,
                MapForm::Full,
                MapForm::RankOne,
            ] {
                let with = |epochs| ReplaceMe {
                    form,
                    ..by(CosineDescent {
                        solver,
                        rate: 1e-2,
                        epochs,
                        batch: 64,
                        accurate: false,
                    })
                };
                let angle = |choice: &ReplaceMe| {
                    let map = descend(&rows, choice, 1).unwrap().weight;
                    let places = (0..4).flat_map(|i| (0..4).map(move |j| (i, j)));
                    for (i, j) in places {
                        let none = match form {
                            MapForm::Diagonal => i != j,
                            MapForm::LowerTriangular => i < j,
                            MapForm::Full | MapForm::RankOne => false,
                        };
                        assert!(!none || map[(i, j)] == 0.0);
                    }
                    if form == MapForm::RankOne {
                        let minor = map[(0, 0)] * map[(1, 1)] - map[(0, 1)] * map[(1, 0)];
                        assert!(minor.abs() < 1e-12, "{minor}");
                    }
                    let entries: Vec<f64> = (0..16).map(|at| map[(at / 4, at % 4)]).collect();
                    let map = Tensor::from_vec(entries, (4, 4), &Device::Cpu).unwrap();
                    loss_and_gradient(&map, &rows.added, None, &rows.wanted)
                        .unwrap()
                        .0
                };
                let (before, after) = (angle(&with(0)), angle(&with(100)));
                assert!(after < before, "{solver:?} {form:?} {before} {after}");
            }
        }
    }
}
