//! What is measured behind each block: how compact tokens lie, and how sparse they are.

use super::rate::rate;
use super::{BLOCKS, HEADS};
use crate::error::engine;
use crate::experiments::{classifier, mean, numbers};
use crate::{Result, Series};
use lapidary_factor::Matrix;
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;

/// Numbers behind each block: means over sequences, and deviations among them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Curve {
    pub means: Vec<f64>,
    pub deviations: Vec<f64>,
}

/// What is behind each block.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    /// `½ log det(I + p/(N ε) W Wᵀ)` of tokens projected on a head's subspace and made as long as one,
    /// `ε = 0.01`; mean over heads.
    pub rates: Curve,
    /// Share of entries that are not zero.
    pub active: Curve,
}

impl Curve {
    /// The next block's, of one number for each sequence.
    fn push(&mut self, each: &[f64]) {
        let middle = mean(each.iter().copied());
        let variance = mean(each.iter().map(|number| (number - middle).powi(2)));
        self.means.push(middle);
        self.deviations.push(variance.sqrt());
    }

    /// The first blocks', and those of the others.
    pub(super) fn split_at(&self, block: usize) -> [Self; 2] {
        let (means, deviations) = (&self.means, &self.deviations);
        let block = block.min(means.len()).min(deviations.len());
        let (means, deviations) = (means.split_at(block), deviations.split_at(block));
        [(means.0, deviations.0), (means.1, deviations.1)].map(|(means, deviations)| Self {
            means: means.to_vec(),
            deviations: deviations.to_vec(),
        })
    }

    /// How often a mean is below the one before.
    pub(super) fn falls(&self) -> usize {
        let pairs = self.means.windows(2);
        pairs.filter(|w| matches!(w, [a, b] if b < a)).count()
    }

    /// By how much the last mean is below the first.
    pub(super) fn dropped(&self) -> f64 {
        match self.means.as_slice() {
            [first, .., last] => first - last,
            _ => 0.0,
        }
    }

    /// In words.
    pub(super) fn told(&self) -> String {
        let each = self.means.iter().zip(&self.deviations);
        let each: Vec<String> = each
            .map(|(mean, deviation)| format!("{mean:.2} ± {deviation:.2}"))
            .collect();
        each.join(", ")
    }

    /// As a line over the blocks.
    pub(super) fn series(&self, name: &str) -> Series {
        Series {
            name: name.to_owned(),
            points: (1..)
                .zip(&self.means)
                .map(|(block, value)| (f64::from(block), *value))
                .collect(),
        }
    }
}

/// The sites that `blocks` blocks are measured at.
pub(super) fn sites() -> Result<Trace> {
    Ok(Trace::new()
        .capture("blocks.*.attention.query")?
        .capture("blocks.*.out")?)
}

impl Audit {
    /// Of a pass over so many blocks by [`sites`]. What a block of codes gives is its code.
    pub(super) fn of(trace: &Trace, blocks: usize) -> Result<Self> {
        let mut audit = Self::default();
        for block in 0..blocks {
            let projected = trace.signal(&format!("blocks.{block}.attention.query"))?;
            audit.rates.push(&rates(projected.value())?);
            let out = trace.signal(&format!("blocks.{block}.out"))?;
            audit.active.push(&active(out.value())?);
        }
        Ok(audit)
    }
}

/// The share of entries of each sequence of `x` `[batch, length, width]` that are not zero.
fn active(x: &Tensor) -> Result<Vec<f64>> {
    let (_, length, width) = engine(x.dims3())?;
    let values = numbers(x)?;
    let each = values.chunks((length * width).max(1)).map(|sequence| {
        let active = sequence.iter().filter(|value| **value != 0.0).count();
        active as f64 / sequence.len() as f64
    });
    Ok(each.collect())
}

/// The coding rate of each sequence of `projected` `[batch, length, heads · width]`, the mean over heads.
fn rates(projected: &Tensor) -> Result<Vec<f64>> {
    let (batch, length, width) = engine(projected.dims3())?;
    let each = width / HEADS;
    let values = numbers(projected)?;
    let mut found = Vec::new();
    for sequence in 0..batch {
        let mut rates = Vec::new();
        for head in 0..HEADS {
            let token = |j: usize| {
                let start = (sequence * length + j) * width + head * each;
                values.get(start..start + each).unwrap_or(&[])
            };
            let lengths: Vec<f64> = (0..length)
                .map(|j| {
                    let square: f64 = token(j).iter().map(|x| x * x).sum();
                    square.sqrt().max(1e-12)
                })
                .collect();
            let w = Matrix::from_fn(each, length, |i, j| token(j)[i] / lengths[j]);
            let identity = Matrix::from_fn(each, each, |i, j| f64::from(u8::from(i == j)));
            // ε = 0.01 stands where the definition has ε², as in the authors' measurements.
            rates.push(rate(&w, &[identity], 0.1)?);
        }
        found.push(mean(rates));
    }
    Ok(found)
}

/// Of a model of sequences.
pub(super) fn of_sequences(model: &Model, sequences: &[&[u32]]) -> Result<Audit> {
    let (input, padding) = classifier::batch(sequences)?;
    of_input(model, &input, Some(&padding))
}

/// Of a model of as many blocks as this experiment has.
pub(super) fn of_input(model: &Model, input: &Input, padding: Option<&Tensor>) -> Result<Audit> {
    let trace = sites()?;
    let pass = Pass {
        padding,
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(input, pass)?;
    Audit::of(&trace, BLOCKS)
}

/// Means over several.
pub(super) fn averaged(audits: &[Audit]) -> Audit {
    let over = |of: fn(&Audit) -> &Vec<f64>| -> Vec<f64> {
        let blocks = audits.first().map_or(0, |audit| of(audit).len());
        let at = |block: usize| {
            let each = audits.iter().filter_map(|audit| of(audit).get(block));
            mean(each.copied())
        };
        (0..blocks).map(at).collect()
    };
    Audit {
        rates: Curve {
            means: over(|audit| &audit.rates.means),
            deviations: over(|audit| &audit.rates.deviations),
        },
        active: Curve {
            means: over(|audit| &audit.active.means),
            deviations: over(|audit| &audit.active.deviations),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    fn curve(means: &[f64]) -> Curve {
        Curve {
            means: means.to_vec(),
            deviations: vec![0.5; means.len()],
        }
    }

    #[test]
    fn curves_fall_and_drop() {
        let found = curve(&[4.0, 3.0, 3.5, 1.0]);
        assert_eq!((found.falls(), found.dropped()), (2, 3.0));
        assert_eq!((curve(&[2.0]).falls(), curve(&[2.0]).dropped()), (0, 0.0));
        let halves = found.split_at(3);
        assert_eq!(halves, [curve(&[4.0, 3.0, 3.5]), curve(&[1.0])]);
        assert_eq!(halves[1].told(), "1.00 ± 0.50");
        let mut measured = Curve::default();
        measured.push(&[1.0, 3.0]);
        assert_eq!(measured.means, [2.0]);
        assert_eq!(measured.deviations, [1.0]);
    }

    #[test]
    fn shares_are_of_each_sequence() {
        let x = Tensor::new(&[[[0.0f64, 1.0]], [[0.0, 0.0]]], &Device::Cpu).unwrap();
        assert_eq!(active(&x).unwrap(), [0.5, 0.0]);
    }

    /// Tokens that all lie along one line have the rate of one direction, `½ ln(1 + p/ε)`, whatever their lengths; spread
    /// over orthogonal ones they have more.
    #[test]
    fn tokens_along_a_line_have_the_least_rate() {
        const EACH: usize = 2;
        let row = |across: bool, token: usize| {
            let place = usize::from(across && token == 1);
            (0..HEADS * EACH)
                .map(|at| {
                    if at % EACH == place {
                        1.0 + token as f64
                    } else {
                        0.0
                    }
                })
                .collect::<Vec<f64>>()
        };
        let all: Vec<f64> = [false, true]
            .into_iter()
            .flat_map(|across| (0..2).flat_map(move |token| row(across, token)))
            .collect();
        let x = Tensor::from_vec(all, (2, 2, HEADS * EACH), &Device::Cpu).unwrap();
        let found = rates(&x).unwrap();
        // p = N = 2: one eigenvalue 2, or two of 1.
        let [line, across] = [0.5 * 201f64.ln(), 101f64.ln()];
        assert!(
            (found[0] - line).abs() < 1e-9 && (found[1] - across).abs() < 1e-9,
            "{found:?}"
        );
    }
}
