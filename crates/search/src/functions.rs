//! Functions with known minima.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Domain, Error, Result};

/// A function to be made small.
#[derive(Clone, Debug, PartialEq)]
pub enum TestFunction {
    /// `½ Σ (x⁴ − 16 x² + 5 x)` on `[−4, 4]^d`: a sum over single variables, with two valleys in each.
    StyblinskiTang {
        /// Number of variables.
        dimensions: usize,
    },
    /// `Σ 100 (x_{i+1} − x_i²)² + (1 − x_i)²` on `[−2, 2]^d`: a chain.
    Rosenbrock {
        /// Number of variables.
        dimensions: usize,
    },
    /// Hartmann's function of six variables on `[0, 1]^d`, among variables that do nothing.
    HiddenHartmann {
        /// Number of variables.
        dimensions: usize,
        /// Which of them are the six.
        active: [usize; 6],
    },
    /// A function on `[−1, 1]^d` whose variables change partners between the halves of the domain.
    ///
    /// With `m` the mean of `x`,
    ///
    /// ```text
    /// m < 0    Σ (x_i + x_j + 1)² + ¼ (x_i − x_j)²             i, j = 0,1  2,3  4,5 ..
    /// m ≥ 0    Σ 3/2 − 3 exp(−4 (x_i − ½)² − 4 (x_j − ½)²)       i, j = 1,2  3,4  .. d−1,0
    /// ```
    ///
    /// The first half is a wide bowl that ends at 0; in the other half lie the deeper minima, and the
    /// pairs that the bowl shows are none of it.
    Lure {
        /// Number of variables, which is even.
        dimensions: usize,
    },
}

impl TestFunction {
    /// Hartmann's function in `dimensions` variables, six of which, drawn by `seed`, matter.
    ///
    /// # Errors
    /// When there are less than six.
    pub fn hidden_hartmann(dimensions: usize, seed: u64) -> Result<Self> {
        let mut order: Vec<usize> = (0..dimensions).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let active = order.first_chunk::<6>();
        match active {
            Some(active) => Ok(Self::HiddenHartmann {
                dimensions,
                active: *active,
            }),
            None => Err(Error::invalid(
                "number of variables",
                dimensions,
                "at least 6, those of Hartmann's function",
            )),
        }
    }

    /// Number of variables.
    pub fn dimensions(&self) -> usize {
        match *self {
            Self::StyblinskiTang { dimensions }
            | Self::Rosenbrock { dimensions }
            | Self::HiddenHartmann { dimensions, .. }
            | Self::Lure { dimensions } => dimensions,
        }
    }

    /// A grid over its box, `places` in each coordinate.
    ///
    /// # Errors
    /// When there is nothing to look at.
    pub fn domain(&self, places: usize) -> Result<Domain> {
        let (low, high) = match self {
            Self::StyblinskiTang { .. } => (-4.0, 4.0),
            Self::Rosenbrock { .. } => (-2.0, 2.0),
            Self::HiddenHartmann { .. } => (0.0, 1.0),
            Self::Lure { .. } => (-1.0, 1.0),
        };
        Domain::uniform(self.dimensions(), low, high, places)
    }

    /// Its value. Variables beyond those given count as none.
    pub fn value(&self, x: &[f64]) -> f64 {
        match self {
            Self::StyblinskiTang { .. } => {
                let term = |x: &f64| x.powi(4) - 16.0 * x * x + 5.0 * x;
                0.5 * x.iter().map(term).sum::<f64>()
            }
            Self::Rosenbrock { .. } => x
                .windows(2)
                .map(|pair| 100.0 * (pair[1] - pair[0] * pair[0]).powi(2) + (1.0 - pair[0]).powi(2))
                .sum(),
            Self::HiddenHartmann { active, .. } => {
                hartmann(&active.map(|i| x.get(i).copied().unwrap_or_default()))
            }
            Self::Lure { .. } => lure(x),
        }
    }

    /// Its least value over the box.
    pub fn least(&self) -> f64 {
        match self {
            // At −2.903534 in each coordinate.
            Self::StyblinskiTang { dimensions } => -39.166_165_703_771_42 * *dimensions as f64,
            Self::Rosenbrock { .. } => 0.0,
            Self::HiddenHartmann { .. } => -3.322_368_011_391_339,
            Self::Lure { dimensions } => -1.5 * (*dimensions / 2) as f64,
        }
    }
}

fn lure(x: &[f64]) -> f64 {
    let count = x.len();
    let mean = x.iter().sum::<f64>() / count.max(1) as f64;
    let partners = |first: usize| {
        (0..count / 2).map(move |k| (x[(2 * k + first) % count], x[(2 * k + 1 + first) % count]))
    };
    match mean < 0.0 {
        true => partners(0)
            .map(|(a, b)| (a + b + 1.0).powi(2) + 0.25 * (a - b).powi(2))
            .sum(),
        false => partners(1)
            .map(|(a, b)| {
                let apart = (a - 0.5).powi(2) + (b - 0.5).powi(2);
                1.5 - 3.0 * (-4.0 * apart).exp()
            })
            .sum(),
    }
}

/// `−Σ_i α_i exp(−Σ_j A_ij (x_j − P_ij)²)`.
fn hartmann(x: &[f64; 6]) -> f64 {
    const ALPHA: [f64; 4] = [1.0, 1.2, 3.0, 3.2];
    const A: [[f64; 6]; 4] = [
        [10.0, 3.0, 17.0, 3.5, 1.7, 8.0],
        [0.05, 10.0, 17.0, 0.1, 8.0, 14.0],
        [3.0, 3.5, 1.7, 10.0, 17.0, 8.0],
        [17.0, 8.0, 0.05, 10.0, 0.1, 14.0],
    ];
    const P: [[f64; 6]; 4] = [
        [0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886],
        [0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991],
        [0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650],
        [0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381],
    ];
    let terms = ALPHA.iter().zip(A.iter().zip(&P));
    -terms
        .map(|(alpha, (a, p))| {
            let distance = x.iter().zip(a.iter().zip(p));
            let distance: f64 = distance.map(|(x, (a, p))| a * (x - p).powi(2)).sum();
            alpha * (-distance).exp()
        })
        .sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;

    #[test]
    fn the_known_minima_are_minima() {
        let hartmann = TestFunction::hidden_hartmann(9, 1).unwrap();
        let TestFunction::HiddenHartmann { active, .. } = hartmann else {
            unreachable!()
        };
        let mut at_hartmann = vec![0.3; 9];
        let six = [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573];
        for (place, value) in active.iter().zip(six) {
            at_hartmann[*place] = value;
        }
        let cases = [
            (
                TestFunction::StyblinskiTang { dimensions: 5 },
                vec![-2.903_534_027_771; 5],
            ),
            (TestFunction::Rosenbrock { dimensions: 4 }, vec![1.0; 4]),
            (TestFunction::Lure { dimensions: 6 }, vec![0.5; 6]),
            (hartmann, at_hartmann),
        ];
        let mut generator = ChaCha8Rng::seed_from_u64(4);
        for (function, at) in cases {
            let least = function.value(&at);
            assert!(
                (least - function.least()).abs() < 1e-6,
                "{function:?} {least}"
            );
            let domain = function.domain(41).unwrap();
            for _ in 0..2000 {
                let point = domain.random(&mut generator);
                assert!(function.value(&domain.values(&point).unwrap()) >= least);
                let near: Vec<f64> = at
                    .iter()
                    .map(|x| x + 0.02 * generator.random::<f64>())
                    .collect();
                assert!(function.value(&near) >= least - 1e-9);
            }
        }
        assert!(TestFunction::hidden_hartmann(5, 1).is_err());
    }

    #[test]
    fn the_lure_changes_partners() {
        let lure = TestFunction::Lure { dimensions: 6 };
        // ∂²f / ∂x_i ∂x_j vanishes except between partners.
        let mixed = |at: f64, i: usize, j: usize| -> f64 {
            let f = |a: f64, b: f64| {
                let mut x = vec![at; 6];
                x[i] += a;
                x[j] += b;
                lure.value(&x)
            };
            let h = 1e-3;
            (f(h, h) - f(h, -h) - f(-h, h) + f(-h, -h)) / (4.0 * h * h)
        };
        for (i, j) in [(0, 1), (2, 3), (4, 5)] {
            assert!(mixed(-0.4, i, j).abs() > 0.5 && mixed(0.2, i, j).abs() < 1e-6);
        }
        for (i, j) in [(1, 2), (3, 4), (0, 5)] {
            assert!(mixed(0.2, i, j).abs() > 0.5 && mixed(-0.4, i, j).abs() < 1e-6);
        }
    }
}
