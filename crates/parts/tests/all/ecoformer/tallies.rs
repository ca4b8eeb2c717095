//! Additions and multiplications against what a counting program does.

use super::plain;
use crate::common::attention::growth;
use lapidary_parts::attention::mechanism::ecoformer::{EcoformerSpec, Tally};

/// Counts what it does.
#[derive(Default)]
struct Counter(Tally);

impl Counter {
    fn times(&mut self, a: f64, b: f64) -> f64 {
        self.0.multiplications += 1;
        a * b
    }

    fn plus(&mut self, a: f64, b: f64) -> f64 {
        self.0.additions += 1;
        a + b
    }
}

/// Attention of one head, step by step as a chip would take it.
fn counted(n: usize, d: usize, m: usize, bits: usize) -> Tally {
    let mut count = Counter::default();
    let x = |i: usize, j: usize| ((i * 13 + j * 7) % 5) as f64 - 2.0;
    let mut codes = vec![vec![0.0; bits]; n];
    for (i, code) in codes.iter_mut().enumerate() {
        let mut kernels = vec![0.0; m];
        for (a, kernel) in kernels.iter_mut().enumerate() {
            // Differences and their sum are additions, squares a table's; then the bandwidth and the
            // exponential.
            let mut distance = 0.0;
            for f in 0..d {
                let by = count.plus(x(i, f), -x(a + 3, f));
                distance = count.plus(distance, by * by);
            }
            let scaled = count.times(distance, -0.1);
            *kernel = count.times(scaled, 1.0).exp();
        }
        for (r, bit) in code.iter_mut().enumerate() {
            let mut sum = 0.0;
            for (a, kernel) in kernels.iter().enumerate() {
                let product = count.times(*kernel, x(r, a) + 0.5);
                sum = count.plus(sum, product);
            }
            *bit = if sum < 0.0 { -1.0 } else { 1.0 };
        }
    }
    let mut keys = vec![0.0; bits];
    let mut context = vec![vec![0.0; d]; bits];
    for (j, code) in codes.iter().enumerate() {
        for r in 0..bits {
            keys[r] = count.plus(keys[r], code[r]);
            for f in 0..d {
                context[r][f] = count.plus(context[r][f], code[r] * x(j, f));
            }
        }
    }
    for code in &codes {
        let mut normaliser = 0.0;
        for r in 0..bits {
            let product = count.times(code[r], keys[r]);
            normaliser = count.plus(normaliser, product);
        }
        for f in 0..d {
            let mut sum = 0.0;
            for r in 0..bits {
                sum = count.plus(sum, code[r] * context[r][f]);
            }
            // The sum of all values, and the quotient.
            sum = count.plus(sum, 1.0);
            count.times(sum, 1.0 / (1.0 + normaliser.abs()));
        }
    }
    count.0
}

#[test]
fn tallies_are_what_is_counted() {
    for (n, d, m, bits) in [(5, 4, 3, 7), (11, 8, 6, 16)] {
        let ecoformer = EcoformerSpec {
            bits,
            anchors: m,
            ..plain()
        };
        let one = counted(n, d, m, bits);
        assert_eq!(ecoformer.tally(1, n, d), one);
        let three = ecoformer.tally(3, n, d);
        assert_eq!(three.multiplications, 3 * one.multiplications);
        assert_eq!(three.additions, 3 * one.additions);
    }
    // Scores and mixing, and the softmax's quotients.
    let softmax = Tally::of_softmax(2, 10, 4);
    assert_eq!(softmax.multiplications, 2 * 100 * 8 + 2 * 100);
    assert_eq!(softmax.additions, 2 * 100 * 8);
    let energy = 3.7 * 1800.0 + 0.9 * 1600.0;
    assert!((softmax.picojoules() - energy).abs() < 1e-9);
    let slope = growth(64, |n| plain().tally(4, n, 16).multiplications);
    assert!((slope - 1.0).abs() < 1e-12);
}
