//! Filters of wavelets by their moments and by tables.

use lapidary_parts::attention::wavelet::filters::{coiflet, daubechies, symlet};

#[test]
fn daubechies_filters_have_their_moments() {
    // Four taps by hand.
    let root = 3f64.sqrt();
    let hand = [1.0 + root, 3.0 + root, 3.0 - root, 1.0 - root].map(|x| x / (4.0 * 2f64.sqrt()));
    for (found, expected) in daubechies(4).iter().zip(hand) {
        assert!((found - expected).abs() < 1e-14);
    }
    for taps in (2..=40).step_by(2) {
        for (filter, moments) in [(daubechies(taps), taps / 2), (symlet(taps), taps / 2)] {
            check(&filter, taps, moments);
        }
    }
    for order in 1..=5 {
        check(&coiflet(order).unwrap(), 6 * order, 2 * order);
    }
    assert_eq!(coiflet(0), None);
    assert_eq!(coiflet(6), None);
}

/// `Σ lo = √2`, orthonormal to its shifts by two, and `Σ (−1)^t t^m lo_t = 0`.
fn check(filter: &[f64], taps: usize, moments: usize) {
    assert_eq!(filter.len(), taps);
    let sum: f64 = filter.iter().sum();
    assert!((sum - 2f64.sqrt()).abs() < 1e-13, "{taps} taps: {sum}");
    for shift in 0..taps / 2 {
        let product: f64 = filter
            .iter()
            .zip(&filter[2 * shift..])
            .map(|(a, b)| a * b)
            .sum();
        let expected = f64::from(u8::from(shift == 0));
        assert!(
            (product - expected).abs() < 1e-10,
            "{taps} taps, shift {shift}: {product}"
        );
    }
    for moment in 0..moments {
        let terms = filter.iter().enumerate().map(|(t, tap)| {
            let sign = if t % 2 == 0 { 1.0 } else { -1.0 };
            sign * (t as f64 / taps as f64).powi(moment as i32) * tap
        });
        let sum: f64 = terms.sum();
        assert!(sum.abs() < 1e-9, "{taps} taps, moment {moment}: {sum:e}");
    }
}

/// Moments of scaling functions about their centre, `Σ ((t − 2K) / taps)^m lo_t = 0` for `0 < m < 2K`, beside
/// those of wavelets that [`check`] asks for; what has them and is nearly symmetric is what tables
/// have, of which the first and largest taps of each are given here.
#[test]
fn coiflets_have_moments_of_both_functions() {
    let root = 7f64.sqrt();
    let hand = [
        1.0 - root,
        5.0 + root,
        14.0 + 2.0 * root,
        14.0 - 2.0 * root,
        1.0 - root,
        -3.0 + root,
    ];
    for (found, expected) in coiflet(1).unwrap().iter().zip(hand) {
        assert!((found - expected / (16.0 * 2f64.sqrt())).abs() < 1e-14);
    }
    let tables = [
        (-0.072_732_619_5, 0.852_572_020_2),
        (0.016_387_336_5, 0.812_723_635_4),
        (-0.003_793_512_9, 0.793_777_222_6),
        (0.000_892_313_9, 0.782_238_934_4),
        (-0.000_212_081_9, 0.774_293_622_9),
    ];
    for (order, (first, largest)) in (1..).zip(tables) {
        let filter = coiflet(order).unwrap();
        let length = filter.len() as f64;
        for moment in 1..2 * order {
            let each = filter.iter().enumerate().map(|(t, tap)| {
                tap * ((t as f64 - 2.0 * order as f64) / length).powi(moment as i32)
            });
            let sum: f64 = each.sum();
            assert!(sum.abs() < 1e-14, "order {order}, moment {moment}: {sum:e}");
        }
        assert!((filter[0] - first).abs() < 1e-7, "{filter:?}");
        assert!((filter[2 * order] - largest).abs() < 1e-7, "{filter:?}");
    }
}

#[test]
fn symlets_are_more_symmetric_than_daubechies() {
    // How much of a filter is even about the best centre.
    let symmetry = |filter: &[f64]| {
        let about = |sum: usize| -> f64 {
            let places = sum.saturating_sub(filter.len() - 1)..=sum.min(filter.len() - 1);
            places.map(|t| filter[t] * filter[sum - t]).sum()
        };
        (0..2 * filter.len() - 1).map(about).fold(0.0, f64::max)
    };
    for taps in [8, 12, 16, 20] {
        assert!(symmetry(&symlet(taps)) > 0.94, "{taps} taps");
        assert!(symmetry(&daubechies(taps)) < 0.9, "{taps} taps");
    }
    // Up to six taps there is no choice but the mirror image.
    assert_eq!(symlet(4), daubechies(4));
}
