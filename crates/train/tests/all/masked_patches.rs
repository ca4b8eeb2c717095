//! Hidden patches, and the loss that they alone have a part in.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_train::generator;
use lapidary_train::masked_patches::{reconstruction_loss, visible};
use rand::RngExt;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut generator = generator(seed);
    let count = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|_| generator.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn rows(x: &Tensor) -> Vec<Vec<u8>> {
    x.to_vec2().unwrap()
}

#[test]
fn as_many_patches_are_hidden_as_are_asked_for_and_the_same_by_seed() {
    for (patches, share, seen) in [(16, 0.75, 4), (10, 0.75, 2), (4, 0.0, 3), (4, 1.0, 1)] {
        let masks = rows(&visible(5, patches, share, &mut generator(3)).unwrap());
        for mask in &masks {
            assert_eq!(mask.len(), patches);
            assert_eq!(
                mask.iter().map(|kept| usize::from(*kept)).sum::<usize>(),
                seen
            );
        }
        let again = rows(&visible(5, patches, share, &mut generator(3)).unwrap());
        assert_eq!(masks, again);
    }
    let of = |seed| rows(&visible(4, 16, 0.75, &mut generator(seed)).unwrap());
    assert_ne!(of(1), of(2));
    // Every patch is seen about as often as any other.
    let mut counts = [0; 8];
    for mask in rows(&visible(8000, 8, 0.75, &mut generator(1)).unwrap()) {
        for (count, kept) in counts.iter_mut().zip(mask) {
            *count += usize::from(kept);
        }
    }
    assert!(
        counts.iter().all(|count| (1850..2150).contains(count)),
        "{counts:?}"
    );
    assert!(visible(1, 1, 0.5, &mut generator(1)).is_err());
    assert!(visible(1, 4, 1.5, &mut generator(1)).is_err());
}

#[test]
fn the_loss_is_the_mean_over_hidden_patches_alone() {
    let (pixels, targets) = (random(&[2, 3, 4], 1), random(&[2, 3, 4], 2));
    let keep = Tensor::new(&[[1u8, 0, 0], [0, 1, 1]], &Device::Cpu).unwrap();
    for normalised in [false, true] {
        let found = pixels.to_vec3::<f64>().unwrap();
        let wanted = targets.to_vec3::<f64>().unwrap();
        let mut sum = 0.0;
        for (image, patch) in [(0, 1), (0, 2), (1, 0)] {
            let wanted = &wanted[image][patch];
            let mean = wanted.iter().sum::<f64>() / 4.0;
            let variance = wanted.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 3.0;
            for (found, wanted) in found[image][patch].iter().zip(wanted) {
                let wanted = match normalised {
                    true => (wanted - mean) / (variance + 1e-6).sqrt(),
                    false => *wanted,
                };
                sum += (found - wanted).powi(2) / 12.0;
            }
        }
        let loss = reconstruction_loss(&pixels, &targets, &keep, normalised).unwrap();
        assert!((loss.to_scalar::<f64>().unwrap() - sum).abs() < 1e-12);
    }
}

/// No visible pixel, drawn or given, has a gradient; every hidden one has.
#[test]
fn visible_pixels_have_no_gradient() {
    let keep = Tensor::new(&[[1u8, 0, 1, 0]], &Device::Cpu).unwrap();
    let [pixels, targets] = [1, 2].map(|seed| Var::from_tensor(&random(&[1, 4, 3], seed)).unwrap());
    let loss = reconstruction_loss(&pixels, &targets, &keep, false).unwrap();
    let gradients = loss.backward().unwrap();
    for variable in [&pixels, &targets] {
        let slope: Vec<Vec<Vec<f64>>> = gradients.get(variable).unwrap().to_vec3().unwrap();
        for (patch, slope) in slope[0].iter().enumerate() {
            let hidden = patch % 2 == 1;
            assert!(
                slope.iter().all(|x| (*x != 0.0) == hidden),
                "{patch}: {slope:?}"
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let x = random(&[1, 2, 3], 1);
    let all = Tensor::ones((1, 2), DType::U8, &Device::Cpu).unwrap();
    let said = |targets: &Tensor, keep: &Tensor| {
        reconstruction_loss(&x, targets, keep, false)
            .unwrap_err()
            .to_string()
    };
    assert!(said(&x, &all).contains("one at least has to be hidden"));
    assert!(said(&random(&[1, 3, 3], 1), &all).contains("targets"));
}
