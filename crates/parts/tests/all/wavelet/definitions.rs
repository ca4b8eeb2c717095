//! Coefficients by their definitions: transforms that are undone exactly could be others.

use super::{BATCH, Subject, WIDTH, spec, tokens};
use crate::common::values;
use lapidary_parts::attention::wavelet::Family;
use lapidary_parts::attention::wavelet::filters::daubechies;

/// The numbers of one channel of one sequence, of `[batch, length, WIDTH]` flat.
fn line(flat: &[f64], length: usize, sequence: usize, channel: usize) -> Vec<f64> {
    (0..length)
        .map(|t| flat[(sequence * length + t) * WIDTH + channel])
        .collect()
}

/// Each band of each channel is what `bands` makes of the channel's numbers and its place.
fn check(subject: &Subject, length: usize, bands: impl Fn(&[f64], usize) -> Vec<Vec<f64>>) {
    let x = tokens(length);
    let found: Vec<Vec<f64>> = subject.coefficients(&x).iter().map(values).collect();
    let x = values(&x);
    for sequence in 0..BATCH {
        for channel in 0..WIDTH {
            let expected = bands(&line(&x, length, sequence, channel), channel);
            assert_eq!(found.len(), expected.len());
            for (band, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let found = line(found, expected.len(), sequence, channel);
                for (m, (found, expected)) in found.iter().zip(expected).enumerate() {
                    assert!(
                        (found - expected).abs() < 1e-12,
                        "{} tokens, band {band}, {m}: {found} {expected}",
                        length
                    );
                }
            }
        }
    }
}

/// A place on a circle.
fn on(x: &[f64], place: i64) -> f64 {
    x[place.rem_euclid(x.len() as i64) as usize]
}

/// `a_m = Σ_t lo_t x_{2m+t}` and `d_m = Σ_t hi_t x_{2m+t}` with `hi_t = (−1)^{t+1} lo_{w−1−t}`, averages once more:
/// `[a₂, d₂, d₁]`, and filters that go around the circle more than once.
#[test]
fn bands_are_correlations_with_filters() {
    let taps = 8;
    let low = daubechies(taps);
    let high: Vec<f64> = (0..taps)
        .map(|t| {
            let mirrored = low[taps - 1 - t];
            if t % 2 == 0 { -mirrored } else { mirrored }
        })
        .collect();
    let halves = |x: &[f64]| -> [Vec<f64>; 2] {
        [&low, &high].map(|filter| {
            let of = |m: usize| {
                let each = filter.iter().enumerate();
                each.map(|(t, tap)| tap * on(x, (2 * m + t) as i64)).sum()
            };
            (0..x.len() / 2).map(of).collect()
        })
    };
    let subject = Subject::new(spec(Family::Fixed, 2, taps));
    for length in [4, 12, 16] {
        check(&subject, length, |x, _| {
            let [first, fine] = halves(x);
            let [second, coarse] = halves(&first);
            vec![second, coarse, fine]
        });
    }
}

/// `d_k = odd_k − ½ (even_k + even_{k+1})`, `a_k = even_k + ¼ (d_{k−1} + d_k)`.
#[test]
fn lifting_takes_means_of_neighbours() {
    let subject = Subject::new(spec(Family::Lifting, 1, 8));
    for length in [2, 6, 10] {
        check(&subject, length, |x, _| {
            let half = length as i64 / 2;
            let even: Vec<f64> = x.iter().step_by(2).copied().collect();
            let odd = x.iter().skip(1).step_by(2);
            let high: Vec<f64> = odd
                .zip(0..)
                .map(|(odd, k)| odd - 0.5 * (on(&even, k) + on(&even, k + 1)))
                .collect();
            let low = (0..half)
                .map(|k| on(&even, k) + 0.25 * (on(&high, k - 1) + on(&high, k)))
                .collect();
            vec![low, high]
        });
    }
}

/// `d = odd − ½ SiLU(even ⋆ p)`, `a = even + ¼ SiLU(d ⋆ u)`, each channel by filters of its own, about each place.
#[test]
fn adaptive_lifting_takes_what_filters_say() {
    for taps in [1, 3, 4, 5] {
        let subject = Subject::new(spec(Family::AdaptiveLifting, 1, taps));
        let [predict, update] = ["predict", "update"].map(|name| values(&subject.map[name]));
        assert_eq!(predict.len(), taps * WIDTH);
        for length in [4, 10] {
            check(&subject, length, |x, channel| {
                let bent = |x: &[f64], filters: &[f64], k: usize| -> f64 {
                    let sum: f64 = (0..taps)
                        .map(|s| {
                            let place = (k + s) as i64 - (taps as i64 - 1) / 2;
                            filters[s * WIDTH + channel] * on(x, place)
                        })
                        .sum();
                    sum / (1.0 + (-sum).exp())
                };
                let even: Vec<f64> = x.iter().step_by(2).copied().collect();
                let odd = x.iter().skip(1).step_by(2).enumerate();
                let high: Vec<f64> = odd
                    .map(|(k, odd)| odd - 0.5 * bent(&even, &predict, k))
                    .collect();
                let low = even.iter().enumerate();
                let low = low
                    .map(|(k, even)| even + 0.25 * bent(&high, &update, k))
                    .collect();
                vec![low, high]
            });
        }
    }
}
