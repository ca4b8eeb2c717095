//! Functions of a distance.

use std::fmt;
use std::sync::Arc;

/// `f(x)` for distances `x`, of a class that says how `[f(x_u + y_w)]` is multiplied.
#[derive(Clone)]
pub enum Function {
    /// `c₀ + c₁ x + c₂ x² + …`: rank `t + 1`.
    Polynomial(Vec<f64>),
    /// `e^{λx} (c₀ + c₁ x + …)`: rank `t + 1`.
    Exponential {
        /// `λ`.
        rate: f64,
        /// `c`.
        polynomial: Vec<f64>,
    },
    /// `cos(λx + φ)`: rank 2.
    Wave {
        /// `λ`.
        frequency: f64,
        /// `φ`.
        phase: f64,
    },
    /// `(a₀ + a₁ x + …) / (b₀ + b₁ x + …)`: low rank away from its poles.
    Rational {
        /// `a`.
        numerator: Vec<f64>,
        /// `b`.
        denominator: Vec<f64>,
    },
    /// `e^{λx} / (x + c)`.
    Quotient {
        /// `λ`.
        rate: f64,
        /// `c`.
        shift: f64,
    },
    /// `e^{ux² + vx + w}`.
    Gaussian([f64; 3]),
    /// Any other.
    Any(Arc<dyn Fn(f64) -> f64 + Send + Sync>),
}

impl fmt::Debug for Function {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Polynomial(c) => write!(out, "Polynomial({c:?})"),
            Self::Exponential { rate, polynomial } => {
                write!(out, "Exponential({rate}, {polynomial:?})")
            }
            Self::Wave { frequency, phase } => write!(out, "Wave({frequency}, {phase})"),
            Self::Rational {
                numerator,
                denominator,
            } => write!(out, "Rational({numerator:?}, {denominator:?})"),
            Self::Quotient { rate, shift } => write!(out, "Quotient({rate}, {shift})"),
            Self::Gaussian(c) => write!(out, "Gaussian({c:?})"),
            Self::Any(_) => write!(out, "Any"),
        }
    }
}

/// `c₀ + c₁ x + …`.
fn polynomial(coefficients: &[f64], x: f64) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, c| sum * x + c)
}

impl Function {
    /// `f(x)`.
    pub fn value(&self, x: f64) -> f64 {
        match self {
            Self::Polynomial(c) => polynomial(c, x),
            Self::Exponential {
                rate,
                polynomial: c,
            } => (rate * x).exp() * polynomial(c, x),
            Self::Wave { frequency, phase } => (frequency * x + phase).cos(),
            Self::Rational {
                numerator,
                denominator,
            } => polynomial(numerator, x) / polynomial(denominator, x),
            Self::Quotient { rate, shift } => (rate * x).exp() / (x + shift),
            Self::Gaussian([u, v, w]) => ((u * x + v) * x + w).exp(),
            Self::Any(f) => f(x),
        }
    }

    /// Functions `a_r` and `b_r` with `f(x + y) = Σ_r a_r(x) b_r(y)`, where there are few: what `x` and `y`
    /// make of them, for every one of both.
    pub(super) fn separated(&self, x: &[f64], y: &[f64]) -> Option<[Vec<Vec<f64>>; 2]> {
        match self {
            Self::Polynomial(c) => Some(binomial(c, 0.0, x, y)),
            Self::Exponential { rate, polynomial } => Some(binomial(polynomial, *rate, x, y)),
            // cos(λx + φ + λy) = cos(λx + φ) cos λy − sin(λx + φ) sin λy
            Self::Wave { frequency, phase } => {
                let left = |x: &f64| (frequency * x + phase).sin_cos();
                let right = |y: &f64| (frequency * y).sin_cos();
                Some([
                    vec![
                        x.iter().map(|x| left(x).1).collect(),
                        x.iter().map(|x| -left(x).0).collect(),
                    ],
                    vec![
                        y.iter().map(|y| right(y).1).collect(),
                        y.iter().map(|y| right(y).0).collect(),
                    ],
                ])
            }
            Self::Rational { .. } | Self::Quotient { .. } | Self::Gaussian(_) | Self::Any(_) => {
                None
            }
        }
    }

    /// The derivative with respect to each coefficient, in the order of the fields; none of
    /// [`Function::Any`].
    pub fn derivatives(&self) -> Vec<Self> {
        let monomial = |power: usize| {
            let mut c = vec![0.0; power + 1];
            c[power] = 1.0;
            c
        };
        let times = |a: &[f64], b: &[f64]| -> Vec<f64> {
            let mut product = vec![0.0; (a.len() + b.len()).saturating_sub(1)];
            for (i, a) in a.iter().enumerate() {
                for (j, b) in b.iter().enumerate() {
                    product[i + j] += a * b;
                }
            }
            product
        };
        match self {
            Self::Polynomial(c) => (0..c.len())
                .map(|k| Self::Polynomial(monomial(k)))
                .collect(),
            Self::Exponential { rate, polynomial } => {
                let with = |polynomial| Self::Exponential {
                    rate: *rate,
                    polynomial,
                };
                let slope = with(times(polynomial, &[0.0, 1.0]));
                let each = (0..polynomial.len()).map(|k| with(monomial(k)));
                std::iter::once(slope).chain(each).collect()
            }
            Self::Wave { frequency, phase } => {
                let (frequency, phase) = (*frequency, *phase);
                vec![
                    Self::any(move |x| -x * (frequency * x + phase).sin()),
                    // −sin z = cos(z + π/2)
                    Self::Wave {
                        frequency,
                        phase: phase + std::f64::consts::FRAC_PI_2,
                    },
                ]
            }
            Self::Rational {
                numerator,
                denominator,
            } => {
                let squared = times(denominator, denominator);
                let up = (0..numerator.len()).map(|k| Self::Rational {
                    numerator: monomial(k),
                    denominator: denominator.clone(),
                });
                let down = (0..denominator.len()).map(|k| Self::Rational {
                    numerator: times(numerator, &monomial(k)).iter().map(|c| -c).collect(),
                    denominator: squared.clone(),
                });
                up.chain(down).collect()
            }
            Self::Quotient { rate, shift } => {
                let (rate, shift) = (*rate, *shift);
                vec![
                    Self::any(move |x| x * (rate * x).exp() / (x + shift)),
                    Self::any(move |x| -(rate * x).exp() / (x + shift).powi(2)),
                ]
            }
            Self::Gaussian(_) => (0..3)
                .map(|place| {
                    let f = self.clone();
                    Self::any(move |x| f.value(x) * x.powi(2 - place))
                })
                .collect(),
            Self::Any(_) => Vec::new(),
        }
    }

    /// Any function.
    pub fn any(f: impl Fn(f64) -> f64 + Send + Sync + 'static) -> Self {
        Self::Any(Arc::new(f))
    }
}

/// `e^{λ(x + y)} Σ_k c_k (x + y)^k = Σ_r [e^{λx} x^r] [e^{λy} Σ_{k ≥ r} c_k (k over r) y^{k − r}]`.
fn binomial(c: &[f64], rate: f64, x: &[f64], y: &[f64]) -> [Vec<Vec<f64>>; 2] {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for r in 0..c.len() {
        // (k over r) for k = r, r + 1, …
        let mut choose = 1.0;
        let inner: Vec<f64> = (r..c.len())
            .map(|k| {
                if k > r {
                    choose *= k as f64 / (k - r) as f64;
                }
                c[k] * choose
            })
            .collect();
        let power = i32::try_from(r).unwrap_or(i32::MAX);
        left.push(x.iter().map(|x| (rate * x).exp() * x.powi(power)).collect());
        right.push(
            y.iter()
                .map(|y| (rate * y).exp() * polynomial(&inner, *y))
                .collect(),
        );
    }
    [left, right]
}
