//! Regret on functions with known minima.

use lapidary_search::{
    Decomposition, Domain, Ensemble, EnsembleSettings, GlobalProcess, GlobalSettings, LearnedTree,
    Optimiser, RandomSearch, Rducb, RducbSettings, Rembo, TestFunction, TreeSettings,
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

/// Every way on one function.
pub(super) struct Trial {
    pub(super) name: &'static str,
    /// Of each way and seed, the regret of the best point after each evaluation.
    curves: Vec<(Way, Vec<Vec<f64>>)>,
}

impl Trial {
    /// Regrets at the end.
    pub(super) fn of(&self, way: Way) -> Summary {
        let curves = self.curves.iter().filter(|(which, _)| *which == way);
        Summary {
            values: curves
                .flat_map(|(_, curves)| curves.iter().filter_map(|curve| curve.last().copied()))
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
            format!("{} {:.3} ± {error:.3}", way.name(), found.mean())
        });
        format!("regret: {}", each.join(", "))
    }

    pub(super) fn plot(&self) -> Plot {
        let line = |(way, curves): &(Way, Vec<Vec<f64>>)| {
            let length = curves.iter().map(Vec::len).min().unwrap_or(0);
            let at = |step: usize| mean(curves.iter().filter_map(|curve| curve.get(step).copied()));
            Series {
                name: way.name().to_owned(),
                points: (0..length)
                    .map(|step| (step as f64 + 1.0, at(step)))
                    .collect(),
            }
        };
        Plot {
            title: format!("Regret on {}", self.name),
            x: "evaluations".to_owned(),
            y: "regret of the best point so far, mean over seeds".to_owned(),
            series: self.curves.iter().map(line).collect(),
        }
    }
}

const LURE: &str = "the lure";

pub(super) fn run(size: &Size, seed: u64) -> Result<Vec<Trial>> {
    let functions = |seed: u64| -> Result<[(&'static str, TestFunction, f64); 3]> {
        Ok([
            (
                "Styblinski–Tang",
                TestFunction::StyblinskiTang {
                    dimensions: size.wide,
                },
                NOISE,
            ),
            (
                "hidden Hartmann",
                TestFunction::hidden_hartmann(size.narrow, seed)?,
                0.0,
            ),
            (
                LURE,
                TestFunction::Lure {
                    dimensions: size.narrow,
                },
                0.0,
            ),
        ])
    };
    let mut trials: Vec<Trial> = Vec::new();
    for (index, (name, ..)) in functions(seed)?.into_iter().enumerate() {
        let mut curves = Vec::new();
        for way in Way::ALL {
            let of_seed = |seed: u64| {
                let functions = functions(seed)?;
                let (_, function, noise) = &functions[index];
                regrets(way, function, *noise, size, seed)
            };
            let all = (seed..seed + size.seeds).map(of_seed);
            curves.push((way, all.collect::<Result<Vec<_>>>()?));
        }
        trials.push(Trial { name, curves });
    }
    Ok(trials)
}

/// The regret of the best point after each evaluation.
fn regrets(
    way: Way,
    function: &TestFunction,
    noise: f64,
    size: &Size,
    seed: u64,
) -> Result<Vec<f64>> {
    let domain = function.domain(size.places)?;
    let mut search = way.search(domain.clone(), seed)?;
    let mut generator = lapidary_train::generator(seed);
    let mut best = f64::INFINITY;
    (0..size.evaluations)
        .map(|_| {
            let point = search.suggest()?;
            let value = function.value(&domain.values(&point)?);
            best = best.min(value - function.least());
            let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
            let normal = radius * (std::f64::consts::TAU * generator.random::<f64>()).cos();
            search.observe(point, value + noise * normal)?;
            Ok(best)
        })
        .collect()
}
