//! Regret on functions with known minima, and the validation error of a regression by its penalties.

use lapidary_search::{
    Decomposition, Domain, Ensemble, EnsembleSettings, GlobalProcess, GlobalSettings, Lasso,
    LassoSettings, LearnedTree, Optimiser, RandomSearch, Rducb, RducbSettings, Rembo, TestFunction,
    TreeSettings,
};
use rand::RngExt;

use super::{Size, Summary};
use crate::experiments::mean;
use crate::{Plot, Result, Series};

/// Directions of the search in few directions: as many as Hartmann's function has variables.
const DIRECTIONS: usize = 6;
/// Standard deviation of the noise on the Styblinski–Tang function.
const NOISE: f64 = 0.15;

/// One way to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Rducb,
    /// RDUCB on standardised values, which the published code does not do.
    Standardised,
    Random,
    Tree,
    Global,
    Rembo,
    /// Several acquisitions on bent values and places, over random forests.
    Ensemble,
    /// The same over one process of all variables.
    WholeEnsemble,
}

impl Way {
    pub(super) const ALL: [Self; 8] = [
        Self::Rducb,
        Self::Standardised,
        Self::Random,
        Self::Tree,
        Self::Global,
        Self::Rembo,
        Self::Ensemble,
        Self::WholeEnsemble,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Rducb => "RDUCB",
            Self::Standardised => "RDUCB on standardised values",
            Self::Random => "random points",
            Self::Tree => "learned tree",
            Self::Global => "one process",
            Self::Rembo => "REMBO",
            Self::Ensemble => "ensemble over random forests",
            Self::WholeEnsemble => "ensemble over one process",
        }
    }

    fn search(self, domain: Domain, seed: u64) -> Result<Box<dyn Optimiser>> {
        let global = GlobalSettings::default();
        Ok(match self {
            Self::Rducb => Box::new(Rducb::new(domain, RducbSettings::default(), seed)?),
            Self::Standardised => {
                let settings = RducbSettings::standardised(domain.dimensions());
                Box::new(Rducb::new(domain, settings, seed)?)
            }
            Self::Random => Box::new(RandomSearch::new(domain, seed)),
            Self::Tree => Box::new(LearnedTree::new(domain, TreeSettings::default(), seed)?),
            Self::Global => Box::new(GlobalProcess::new(domain, global, seed)?),
            Self::Rembo => Box::new(Rembo::new(domain, DIRECTIONS, global, seed)?),
            Self::Ensemble => ensemble(domain, Decomposition::RandomForest, seed)?,
            Self::WholeEnsemble => ensemble(domain, Decomposition::Whole, seed)?,
        })
    }
}

fn ensemble(domain: Domain, decomposition: Decomposition, seed: u64) -> Result<Box<dyn Optimiser>> {
    let settings = EnsembleSettings::new(domain.dimensions(), decomposition);
    Ok(Box::new(Ensemble::new(domain, settings, seed)?))
}

/// What is made small.
enum Problem {
    /// A function with a known minimum, and the noise that is observed with it.
    Known(TestFunction, f64),
    /// Validation error by the penalty of each coefficient.
    Penalties(Lasso),
}

impl Problem {
    fn domain(&self, places: usize) -> Result<Domain> {
        Ok(match self {
            Self::Known(function, _) => function.domain(places)?,
            Self::Penalties(lasso) => lasso.domain(places)?,
        })
    }

    fn value(&self, x: &[f64]) -> f64 {
        match self {
            Self::Known(function, _) => function.value(x),
            Self::Penalties(lasso) => lasso.value(x),
        }
    }

    /// Its least value; 0 where that is not known, so that regret is the value itself.
    fn least(&self) -> f64 {
        match self {
            Self::Known(function, _) => function.least(),
            Self::Penalties(_) => 0.0,
        }
    }

    /// The value on data that the search did not see, where there is such.
    fn unseen(&self, x: &[f64]) -> Option<f64> {
        match self {
            Self::Known(..) => None,
            Self::Penalties(lasso) => Some(lasso.test_error(x)),
        }
    }

    fn noise(&self) -> f64 {
        match self {
            Self::Known(_, noise) => *noise,
            Self::Penalties(_) => 0.0,
        }
    }

    /// The best penalty that all coefficients share: its errors on rows to validate on and on unseen ones.
    fn common(&self, places: usize) -> Option<[f64; 2]> {
        match self {
            Self::Known(..) => None,
            Self::Penalties(lasso) => {
                let (place, error) = lasso.best_common(places);
                let everywhere = vec![place; lasso.dimensions()];
                Some([error, lasso.test_error(&everywhere)])
            }
        }
    }
}

/// One search.
struct Run {
    /// The regret of the best point after each evaluation.
    curve: Vec<f64>,
    /// The best point's on unseen data.
    unseen: Option<f64>,
}

/// Every way on one function.
pub(super) struct Trial {
    pub(super) name: &'static str,
    /// Of each way, its searches, one a seed.
    runs: Vec<(Way, Vec<Run>)>,
    /// Of each seed, the errors of the best penalty that all share.
    common: Vec<[f64; 2]>,
}

impl Trial {
    /// Regrets at the end.
    pub(super) fn of(&self, way: Way) -> Summary {
        self.summed(way, |run| run.curve.last().copied())
    }

    fn summed(&self, way: Way, of: impl Fn(&Run) -> Option<f64>) -> Summary {
        let runs = self.runs.iter().filter(|(which, _)| *which == way);
        Summary {
            values: runs
                .flat_map(|(_, runs)| runs.iter().filter_map(&of))
                .collect(),
        }
    }

    pub(super) fn is_lure(&self) -> bool {
        self.name == LURE
    }

    /// Each way's regret with its standard error.
    pub(super) fn listed(&self) -> String {
        let each = Way::ALL.map(|way| {
            let found = self.of(way);
            let error = found.squared_error().sqrt();
            let unseen = self.summed(way, |run| run.unseen);
            let unseen = match unseen.values.is_empty() {
                true => String::new(),
                false => format!(" (unseen {:.3})", unseen.mean()),
            };
            format!("{} {:.3} ± {error:.3}{unseen}", way.name(), found.mean())
        });
        let mut listed = format!("{}: {}", self.measure(), each.join(", "));
        if !self.common.is_empty() {
            let [error, unseen] =
                [0, 1].map(|at| mean(self.common.iter().filter_map(|both| both.get(at).copied())));
            listed += &format!(", one penalty for all {error:.3} (unseen {unseen:.3})");
        }
        listed
    }

    fn measure(&self) -> &'static str {
        match self.common.is_empty() {
            true => "regret",
            false => "validation error",
        }
    }

    pub(super) fn plot(&self) -> Plot {
        let line = |(way, runs): &(Way, Vec<Run>)| {
            let length = runs.iter().map(|run| run.curve.len()).min().unwrap_or(0);
            let at = |step: usize| mean(runs.iter().filter_map(|run| run.curve.get(step).copied()));
            Series {
                name: way.name().to_owned(),
                points: (0..length)
                    .map(|step| (step as f64 + 1.0, at(step)))
                    .collect(),
            }
        };
        Plot {
            title: format!("Search on {}", self.name),
            x: "evaluations".to_owned(),
            y: format!(
                "{} of the best point so far, mean over seeds",
                self.measure()
            ),
            series: self.runs.iter().map(line).collect(),
        }
    }
}

const LURE: &str = "the lure";

/// The problems of a seed, in order.
fn problems(size: &Size, seed: u64) -> Result<[(&'static str, Problem); 5]> {
    let (wide, narrow) = (size.wide, size.narrow);
    let lasso = Lasso::new(LassoSettings::new(narrow), seed)?;
    Ok([
        (
            "Styblinski–Tang",
            Problem::Known(TestFunction::StyblinskiTang { dimensions: wide }, NOISE),
        ),
        (
            "hidden Hartmann",
            Problem::Known(TestFunction::hidden_hartmann(narrow, seed)?, 0.0),
        ),
        (
            "Rosenbrock",
            Problem::Known(TestFunction::Rosenbrock { dimensions: narrow }, 0.0),
        ),
        (
            LURE,
            Problem::Known(TestFunction::Lure { dimensions: narrow }, 0.0),
        ),
        ("penalties of a LASSO", Problem::Penalties(lasso)),
    ])
}

pub(super) fn run(size: &Size, seed: u64) -> Result<Vec<Trial>> {
    let seeds: Vec<u64> = (seed..seed + size.seeds).collect();
    let drawn = seeds
        .iter()
        .map(|seed| problems(size, *seed))
        .collect::<Result<Vec<_>>>()?;
    let names = drawn
        .first()
        .map(|problems| problems.each_ref().map(|(name, _)| *name));
    let mut trials: Vec<Trial> = Vec::new();
    for (index, name) in names.into_iter().flatten().enumerate() {
        let of_seeds = || {
            let problems = drawn.iter().filter_map(move |problems| problems.get(index));
            seeds.iter().zip(problems.map(|(_, problem)| problem))
        };
        let mut runs = Vec::new();
        for way in Way::ALL {
            let all = of_seeds().map(|(seed, problem)| searched(way, problem, size, *seed));
            runs.push((way, all.collect::<Result<Vec<_>>>()?));
        }
        let common = of_seeds().filter_map(|(_, problem)| problem.common(size.places));
        trials.push(Trial {
            name,
            runs,
            common: common.collect(),
        });
    }
    Ok(trials)
}

fn searched(way: Way, problem: &Problem, size: &Size, seed: u64) -> Result<Run> {
    let domain = problem.domain(size.places)?;
    let mut search = way.search(domain.clone(), seed)?;
    let mut generator = lapidary_train::generator(seed);
    let (mut least, mut best) = (f64::INFINITY, Vec::new());
    let mut curve = Vec::with_capacity(size.evaluations);
    for _ in 0..size.evaluations {
        let point = search.suggest()?;
        let x = domain.values(&point)?;
        let value = problem.value(&x);
        let regret = value - problem.least();
        if regret < least {
            (least, best) = (regret, x);
        }
        let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * generator.random::<f64>()).cos();
        search.observe(point, value + problem.noise() * normal)?;
        curve.push(least);
    }
    Ok(Run {
        curve,
        unseen: problem.unseen(&best),
    })
}
