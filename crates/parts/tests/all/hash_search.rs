//! Where EcoFormer's hashes start, and bits that are sought together.
#![allow(clippy::needless_range_loop, clippy::panic, clippy::unwrap_used)]

use crate::common::attention::dot;
use crate::common::normal;
use lapidary_parts::attention::mechanism::ecoformer::{Fit, Initial, Sample, Search, learn};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A sequence of random kernel values, and random signs that are not symmetric.
fn drawn_sample(tokens: usize, anchors: usize, seed: u64) -> Sample {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers = |count: usize| -> Vec<f64> { (0..count).map(|_| normal(&mut rng)).collect() };
    Sample {
        kernels: (0..tokens).map(|_| numbers(anchors)).collect(),
        targets: (0..tokens)
            .map(|_| {
                let row = numbers(tokens).into_iter().enumerate();
                let far = row.filter(|(_, x)| x.abs() > 0.7);
                far.map(|(j, x)| (j, x.signum())).collect()
            })
            .collect(),
    }
}

/// `β S` laid out.
fn targets_of(sample: &Sample, bits: usize) -> Vec<Vec<f64>> {
    let tokens = sample.kernels.len();
    let mut all = vec![vec![0.0; tokens]; tokens];
    for (row, targets) in all.iter_mut().zip(&sample.targets) {
        for (j, sign) in targets {
            row[*j] += bits as f64 * sign;
        }
    }
    all
}

/// What is said of all bits is what matrices laid out say of them, over two sequences, and together they are
/// never worse than where they started.
#[test]
fn bits_that_are_sought_together_agree_more() {
    const BITS: usize = 4;
    let mut accepted = [0; 2];
    for seed in 0..6 {
        let samples = [drawn_sample(16, 6, seed), drawn_sample(11, 6, seed + 100)];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let start: Vec<Vec<f64>> = (0..BITS)
            .map(|_| (0..6).map(|_| normal(&mut rng)).collect())
            .collect();
        for (place, search) in [Search::Joint, Search::Refined].into_iter().enumerate() {
            let fit = Fit {
                rate: 0.02,
                iterations: 200,
                search,
                ..Fit::default()
            };
            let (hashes, bits) = learn(&samples, &start, &fit);
            let (last, each) = bits.split_last().unwrap();
            accepted[place] += usize::from(last.accepted);
            let (mut objective, mut residual) = (0.0, 0.0);
            for sample in &samples {
                let tokens = sample.kernels.len();
                let code = |i: usize| -> Vec<f64> {
                    let sign = |hash: &Vec<f64>| dot(hash, &sample.kernels[i]).signum();
                    hashes.iter().map(sign).collect()
                };
                let targets = targets_of(sample, BITS);
                let (mut squares, mut agreement) = (0.0, 0.0);
                for i in 0..tokens {
                    for j in 0..tokens {
                        let product = dot(&code(i), &code(j));
                        residual += (targets[i][j] - product).powi(2);
                        squares += product * product;
                        agreement += targets[i][j] * product;
                    }
                }
                // ‖Yᵀ Y‖ = ‖Y Yᵀ‖, and tr Yᵀ S Y = ⟨S, Y Yᵀ⟩.
                objective += (0.5 * squares - agreement) / (2.0 * (tokens * BITS) as f64);
            }
            assert!(
                (last.after - objective).abs() < 1e-9,
                "{} {objective}",
                last.after
            );
            assert!(
                (last.residual - residual).abs() < 1e-6,
                "{} {residual}",
                last.residual
            );
            assert!(last.after <= last.before && last.accepted == (last.after < last.before));
            match search {
                Search::Refined => {
                    assert_eq!(each.len(), BITS);
                    let plain = Fit {
                        search: Search::BitByBit,
                        ..fit
                    };
                    let (bit_by_bit, _) = learn(&samples, &start, &plain);
                    assert_eq!(bit_by_bit == hashes, !last.accepted);
                }
                _ => assert!(each.is_empty()),
            }
        }
    }
    assert!(accepted.iter().all(|count| *count > 0), "{accepted:?}");
}

/// A start solves `κᵀ R κ a = λ κᵀ κ a` for the largest `λ`, and `‖κ a‖²` is the number of tokens.
#[test]
fn hashes_start_at_leading_eigenvectors() {
    let sample = drawn_sample(20, 5, 3);
    let fit = |search| Fit {
        iterations: 0,
        initial: Initial::Eigenvectors,
        search,
        ..Fit::default()
    };
    let products = |bits: usize, a: &[f64], b: &[f64]| {
        let of = |a: &[f64]| -> Vec<f64> { sample.kernels.iter().map(|row| dot(row, a)).collect() };
        let (y, z) = (of(a), of(b));
        let targets = targets_of(&sample, bits);
        let half = |y: &[f64], z: &[f64]| -> f64 {
            targets.iter().zip(y).map(|(row, y)| y * dot(row, z)).sum()
        };
        // κᵀ R κ, of which the symmetric half counts, and κᵀ κ.
        [(half(&y, &z) + half(&z, &y)) / 2.0, dot(&y, &z)]
    };
    let zeros = vec![vec![0.0; 5]; 1];
    let samples = std::slice::from_ref(&sample);
    let (hashes, _) = learn(samples, &zeros, &fit(Search::BitByBit));
    let first = &hashes[0];
    let [agreement, square] = products(1, first, first);
    assert!((square - 20.0).abs() < 1e-9);
    let value = agreement / square;
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for direction in 0..200 {
        let other: Vec<f64> = match direction {
            0..5 => (0..5)
                .map(|i| f64::from(u8::from(i == direction)))
                .collect(),
            _ => (0..5).map(|_| normal(&mut rng)).collect(),
        };
        let [across, along] = products(1, &other, first);
        assert!((across - value * along).abs() < 1e-8, "an eigenvector");
        let [agreement, square] = products(1, &other, &other);
        assert!(agreement / square <= value + 1e-9, "the leading one");
    }
    // Together, as many as there are directions, and the given start for the others.
    let mut start = vec![vec![0.0; 5]; 7];
    start[6][2] = 1.5;
    let (all, _) = learn(samples, &start, &fit(Search::Joint));
    for (i, one) in all[..5].iter().enumerate() {
        for (j, other) in all[..5].iter().enumerate() {
            let [agreement, square] = products(7, one, other);
            let expected = if i == j { 20.0 } else { 0.0 };
            assert!((square - expected).abs() < 1e-8);
            assert!(i == j || agreement.abs() < 1e-7);
        }
    }
    let quotients: Vec<f64> = all[..5].iter().map(|a| products(7, a, a)[0]).collect();
    assert!(
        quotients.windows(2).all(|pair| pair[0] >= pair[1]),
        "{quotients:?}"
    );
    assert_eq!(all[5..], start[5..]);
}
