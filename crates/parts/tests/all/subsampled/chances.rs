//! Which keys are drawn, and how often.

use super::*;

/// Every key is kept with probability `k / n`, and pairs with `k (k − 1) / (n (n − 1))`.
#[test]
fn subsets_are_uniform() {
    let (length, kept) = (8, 3);
    let spec = SubsampledSpec {
        per_head: true,
        ..subsampled(0.375, Selection::Unbiased)
    };
    assert_eq!(spec.kept(length, 0.0), kept);
    let batch = 2500;
    let [q, k, v] = drawn(batch, length);
    let (mut single, mut double) = (vec![0.0; length], vec![0.0; length * length]);
    let mut draws = 0.0;
    for seed in 0..20 {
        let how = How {
            seed,
            path: "attention",
            ..How::default()
        };
        let laid = weights(mixing(&spec, [&q, &k], how).as_ref(), &v);
        for matrix in laid.chunks(length * length) {
            let subset = &met(&matrix[..length], length)[0];
            assert_eq!(subset.len(), kept);
            draws += 1.0;
            for &a in subset {
                single[a] += 1.0;
                for &b in subset.iter().filter(|b| **b > a) {
                    double[a * length + b] += 1.0;
                }
            }
        }
    }
    assert_eq!(draws, 1e5);
    let (n, k) = (length as f64, kept as f64);
    let p = k / n;
    let chi: f64 = single.iter().map(|c| (c - draws * p).powi(2)).sum();
    // What is drawn without replacement varies less, by (1 − p) n / (n − 1).
    let chi = chi / (draws * p * (1.0 - p) * n / (n - 1.0));
    assert!(chi < 24.3, "beyond the 0.999 quantile for 7 degrees: {chi}");
    let p = k * (k - 1.0) / (n * (n - 1.0));
    for a in 0..length {
        for b in a + 1..length {
            let off = double[a * length + b] - draws * p;
            assert!(
                off.abs() < 5.0 * (draws * p * (1.0 - p)).sqrt(),
                "{a} {b} {off}"
            );
        }
    }
}

/// A key moves at most twice the radius, and near ones are kept more often.
#[test]
fn local_windows_keep_near_keys_more_often() {
    let (length, window, radius) = (48, 8, 3.0);
    let [q, k, v] = drawn(400, length);
    for causal in [false, true] {
        let spec = subsampled(window as f64 / length as f64, local(radius));
        let how = How {
            causal,
            seed: 2,
            path: "attention",
            ..How::default()
        };
        let laid = weights(mixing(&spec, [&q, &k], how).as_ref(), &v);
        let mut counts = vec![0.0; length];
        for (row, keys) in met(&laid, length).iter().enumerate() {
            let i = row % length;
            if !causal {
                assert_eq!(keys.len(), window);
            }
            for &j in keys {
                let distance = i.abs_diff(j);
                assert!(distance < window + 2 * radius as usize, "{distance}");
                // Pairs at a distance are fewer the further apart.
                counts[distance] += 1.0 / (length - distance) as f64;
            }
        }
        // Both sides count for all distances but none.
        if !causal {
            counts[0] *= 2.0;
        }
        let near: f64 = counts[1..4].iter().sum();
        let middle: f64 = counts[4..7].iter().sum();
        let far: f64 = counts[7..10].iter().sum();
        assert!(near > middle && middle > far && far > 0.0, "{counts:?}");
    }
}

#[test]
fn windows_of_an_image_are_rectangles() {
    let [q, k, v] = drawn(1, 16);
    let image = Selection::Local {
        radius: 0.0,
        columns: Some(4),
    };
    let how = How {
        path: "attention",
        ..How::default()
    };
    let laid = weights(mixing(&subsampled(0.25, image), [&q, &k], how).as_ref(), &v);
    for (row, keys) in met(&laid, 16).iter().enumerate() {
        let (line, column) = (row % 16 / 4 / 2, row % 4 / 2);
        let corner = line * 8 + column * 2;
        assert_eq!(*keys, [corner, corner + 1, corner + 4, corner + 5]);
    }
}

/// Of two columns a window of twelve keys takes six rows.
#[test]
fn windows_of_a_narrow_image_are_as_much_higher() {
    let [q, k, v] = drawn(1, 48);
    let image = Selection::Local {
        radius: 0.0,
        columns: Some(2),
    };
    let how = How {
        path: "attention",
        ..How::default()
    };
    let laid = weights(mixing(&subsampled(0.25, image), [&q, &k], how).as_ref(), &v);
    for (row, keys) in met(&laid, 48).into_iter().enumerate() {
        let first = row % 48 / 12 * 12;
        assert!(keys.into_iter().eq(first..first + 12), "row {row}");
    }
}
