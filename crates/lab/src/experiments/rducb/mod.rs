//! RDUCB beside random points, a learned decomposition and one process of all variables; and the
//! ranks of a decoder's matrices by it.
//!
//! The paper's functions have up to 250 variables and a few hundred evaluations. Here the same
//! functions have 50 or 20 and a hundred evaluations (250 and 510 at full scale). One more is made to
//! mislead whoever learns a decomposition where the search happens to be, and in the place of LassoBench
//! stand the penalties of a regression on data made here.

mod functions;
mod ranks;
mod theory;

use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Setting, Verdict};
use functions::{Trial, Way};

/// How much is searched.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// Variables of the Styblinski–Tang function.
    wide: usize,
    /// Variables of the other functions.
    narrow: usize,
    places: usize,
    evaluations: usize,
    seeds: u64,
    /// Variables of trees that are counted out.
    enumerated: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                wide: 6,
                narrow: 8,
                places: 20,
                evaluations: 14,
                seeds: 1,
                enumerated: 5,
            },
            Scale::Small => Self {
                wide: 50,
                narrow: 20,
                places: 150,
                evaluations: 100,
                seeds: 5,
                enumerated: 6,
            },
            Scale::Full => Self {
                wide: 250,
                narrow: 20,
                places: 150,
                evaluations: 510,
                seeds: 5,
                enumerated: 6,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    setting.tell(|| "functions to be searched".to_owned());
    let trials = functions::run(&size, setting.seed)?;
    setting.tell(|| "ranks of a model's layers".to_owned());
    let text = Sides::of(setting)?;
    let ranks = ranks::run(text.clone(), setting.scale, setting.seed)?;
    let trade = theory::trade_off(setting.seed)?;
    let mut plots: Vec<Plot> = trials.iter().map(Trial::plot).collect();
    plots.extend(theory::plots(&trade));
    plots.push(ranks::plot(&ranks));
    Ok(Reproduction {
        setting: format!(
            "Styblinski–Tang in {} variables with noise 0.15, Hartmann's six among {}, Rosenbrock, a lure \
             and the penalties of a LASSO of as many; {} places in each, {} evaluations of which 10 are \
             random, {} seeds; regret is that of the best point seen, without noise; {}",
            size.wide,
            size.narrow,
            size.places,
            size.evaluations,
            size.seeds,
            ranks::describe(setting.scale, &text.what),
        ),
        claims: claims(setting.scale, &size, &trials, &ranks, &trade)?,
        plots,
        ..Reproduction::default()
    })
}

fn claims(
    scale: Scale,
    size: &Size,
    trials: &[Trial],
    ranks: &[ranks::Allocation],
    trade: &theory::TradeOff,
) -> Result<Vec<Claim>> {
    let (uniform, others) = theory::least_probabilities(size.enumerated)?;
    let bound = 2.0 / size.enumerated as f64;
    let exact = theory::means_add_up()?;
    let mut claims = vec![
        Claim::new(
            "trees drawn uniformly leave an adversary who picks the pair the least: each pair is an \
             edge with probability 2/d, and no other weights leave more",
            "exact",
            format!(
                "d = {}: {uniform:.6} against {bound:.6}, the best of 200 other weightings {others:.6}",
                size.enumerated
            ),
            Verdict::of((uniform - bound).abs() < 1e-12 && others < bound),
        ),
        Claim::new(
            "posterior means of the terms add up to that of the sum",
            "exact",
            format!("largest difference {exact:.1e}"),
            Verdict::of(exact < 1e-9),
        ),
        Claim::new(
            "with more edges a decomposition misses fewer pairs and has more to learn",
            "theory, in outline",
            theory::listed(&trade.edges, "edges"),
            after_training(scale, richer(&trade.edges)),
        ),
        Claim::new(
            "with larger cliques a decomposition misses fewer pairs and has more to learn",
            "theory, in outline: the gain grows with the size of cliques",
            theory::listed(&trade.sizes, "variables in a clique"),
            after_training(scale, richer(&trade.sizes)),
        )
        .noted(
            "the error is what is expected of a process that assumes these cliques where a tree that was drawn \
             by itself is true",
        ),
    ];
    for trial in trials {
        let own = trial.of(Way::Rducb);
        claims.push(match trial.is_lure() {
            false => Claim::new(
                &format!("RDUCB is best or tied on {}", trial.name),
                "better than learned trees on every function (abstract)",
                trial.listed(),
                after_training(
                    scale,
                    Way::ALL
                        .into_iter()
                        .filter(|way| {
                            matches!(way, Way::Random | Way::Tree | Way::Global | Way::Rembo)
                        })
                        .all(|way| own.tied_or_better(&trial.of(way))),
                ),
            )
            .noted("tied: within a standard error of the difference of the means"),
            true => Claim::new(
                "on a function whose pairs change between the halves of its domain, a learned tree \
                 ends worse than RDUCB",
                "expected from the theory",
                trial.listed(),
                after_training(scale, own.better(&trial.of(Way::Tree))),
            )
            .noted("worse: by more than a standard error of the difference of the means"),
        });
    }
    claims.push(plugged_in(scale, trials));
    for allocation in ranks {
        claims.push(
            Claim::new(
                &format!(
                    "searched ranks of {} beat uniform ones at the same number of parameters",
                    allocation.method
                ),
                "estimate; within 60 evaluations",
                allocation.listed(),
                after_training(scale, allocation.found.tests < allocation.uniform.tests),
            )
            .noted("on windows that the search did not see"),
        );
    }
    Ok(claims)
}

/// The forest in the place of the kernel of another search.
fn plugged_in(scale: Scale, trials: &[Trial]) -> Claim {
    let regrets = trials.iter().map(|trial| {
        let [forests, whole] = [Way::Ensemble, Way::WholeEnsemble].map(|way| trial.of(way));
        let listed = format!(
            "{}: {:.3} against {:.3}",
            trial.name,
            forests.mean(),
            whole.mean()
        );
        (forests.tied_or_better(&whole), listed)
    });
    let (better, listed): (Vec<bool>, Vec<String>) = regrets.unzip();
    Claim::new(
        "random forests in a search by several acquisitions on bent values and places are no worse than one \
         process of all variables in it, on every function",
        "HEBO with random decompositions above HEBO on the largest tasks of Bayesmark (abstract)",
        listed.join("; "),
        after_training(scale, better.iter().all(|better| *better)),
    )
    .noted("no worse: within a standard error of the difference of the means")
}

/// Whether each next decomposition has more to learn and misses less.
fn richer(points: &[theory::Point]) -> bool {
    points.windows(2).all(|pair| match pair {
        [a, b] => b.gain > a.gain && b.missed < a.missed,
        _ => false,
    })
}

/// Mean and standard error.
struct Summary {
    values: Vec<f64>,
}

impl Summary {
    fn mean(&self) -> f64 {
        mean(self.values.iter().copied())
    }

    fn squared_error(&self) -> f64 {
        let (mean, count) = (self.mean(), self.values.len() as f64);
        let squares = self.values.iter().map(|value| (value - mean).powi(2));
        squares.sum::<f64>() / (count - 1.0).max(1.0) / count
    }

    /// The standard error of the difference of the means.
    fn error(&self, other: &Self) -> f64 {
        (self.squared_error() + other.squared_error()).sqrt()
    }

    fn tied_or_better(&self, other: &Self) -> bool {
        self.mean() <= other.mean() + self.error(other)
    }

    fn better(&self, other: &Self) -> bool {
        self.mean() < other.mean() - self.error(other)
    }
}
