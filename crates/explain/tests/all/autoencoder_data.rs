//! What goes into an autoencoder's training, and its files.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, GATED, model, tokens};
use lapidary_explain::autoencoder::{ActivationBuffer, SiteReader, load};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Pass;
use lapidary_model::checkpoint::{WriteOptions, write_checkpoint};
use lapidary_signal::Trace;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::cell::Cell;
use std::path::Path;

const SITE: &str = "blocks.1.attention.mixed";

fn windows(count: usize) -> Vec<Vec<u32>> {
    (0..count)
        .map(|i| {
            (0..4 + i % 5)
                .map(|j| ((i * 11 + j * j * 3) % 20) as u32)
                .collect()
        })
        .collect()
}

fn sorted(mut rows: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    rows.sort_by(|a, b| a[0].total_cmp(&b[0]));
    rows
}

#[test]
fn a_buffer_gives_every_activation_once_and_in_another_order() {
    for (spec, seed) in [(DECODER, 1), (GATED, 2)] {
        let model = model(spec, seed);
        let windows = windows(60);
        let mut expected = Vec::new();
        for window in &windows {
            let trace = Trace::new().capture(SITE).unwrap();
            let pass = Pass {
                trace: Some(&trace),
                ..Pass::default()
            };
            model.forward(&tokens(window), pass).unwrap();
            let value = trace.signal(SITE).unwrap().into_value().get(0).unwrap();
            expected.extend(
                value
                    .to_dtype(DType::F32)
                    .unwrap()
                    .to_vec2::<f32>()
                    .unwrap(),
            );
        }
        let read = Cell::new(0usize);
        let each = windows
            .iter()
            .cloned()
            .inspect(|_| read.set(read.get() + 1));
        let generator = ChaCha8Rng::seed_from_u64(seed);
        let mut buffer = ActivationBuffer::new(&model, SITE, each, 64, generator).unwrap();
        let mut found: Vec<Vec<f32>> = Vec::new();
        let mut most_waiting = 0;
        while let Some(batch) = buffer.next_batch(10).unwrap() {
            found.extend(batch.to_vec2::<f32>().unwrap());
            let produced: usize = windows.iter().take(read.get()).map(Vec::len).sum();
            // One window may have been looked at without being run.
            most_waiting = most_waiting.max(produced - found.len());
        }
        assert!(
            most_waiting <= 64 + 8,
            "{most_waiting} activations are held"
        );
        assert_eq!(found.len(), expected.len());
        let differs = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-6;
        let moved = found
            .iter()
            .zip(&expected)
            .filter(|(a, b)| a.iter().zip(b.iter()).any(differs))
            .count();
        assert!(moved > expected.len() / 2, "the order is the windows'");
        for (a, b) in sorted(found).iter().zip(&sorted(expected)) {
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn a_buffer_refuses_what_it_cannot_hold_or_read() {
    let model = model(DECODER, 3);
    let generator = || ChaCha8Rng::seed_from_u64(0);
    let long = || std::iter::once(vec![1u32; 9]);
    let mut small = ActivationBuffer::new(&model, SITE, long(), 8, generator()).unwrap();
    let error = small.next_batch(4).unwrap_err();
    assert!(error.to_string().contains("between 1 and 8"), "{error}");
    assert!(ActivationBuffer::new(&model, SITE, long(), 0, generator()).is_err());
    assert!(ActivationBuffer::new(&model, SITE, long(), usize::MAX, generator()).is_err());
    let error = ActivationBuffer::new(&model, "blocks.4.out", long(), 8, generator()).unwrap_err();
    assert!(error.to_string().contains("2 blocks"), "{error}");
    assert!(ActivationBuffer::new(&model, "nowhere", long(), 8, generator()).is_err());
    let empty = std::iter::once(Vec::new());
    let mut nothing = ActivationBuffer::new(&model, SITE, empty, 8, generator()).unwrap();
    assert!(nothing.next_batch(4).is_err());
}

#[test]
fn a_reader_sees_what_the_whole_model_writes() {
    let model = model(GATED, 4);
    let window = vec![3u32, 11, 5, 0, 19];
    let sites = [
        "embeddings",
        "blocks.0.attention.mixed",
        "blocks.0.feedforward.hidden",
        "blocks.1.attention.value",
        "blocks.1.out",
        "final_norm",
    ];
    for site in sites {
        let trace = Trace::new().capture(site).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&tokens(&window), pass).unwrap();
        let whole = trace.signal(site).unwrap().into_value();
        let reader = SiteReader::new(&model, site).unwrap();
        let read = reader.read(std::slice::from_ref(&window)).unwrap();
        assert_eq!(difference(&read, &whole).unwrap(), 0.0, "{site}");
    }
}

/// Files as the authors publish them, converted to safetensors.
fn write_public(path: &Path, shapes: [&[usize]; 4]) {
    let names = ["W_enc", "b_enc", "W_dec", "b_dec"];
    let tensors: Vec<Tensor> = shapes
        .iter()
        .enumerate()
        .map(|(index, shape)| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| (i + index) as f32 * 0.01).collect();
            Tensor::from_vec(values, *shape, &Device::Cpu).unwrap()
        })
        .collect();
    let named = names.into_iter().zip(&tensors);
    write_checkpoint(path, named, &WriteOptions::default()).unwrap();
}

#[test]
fn public_files_are_read_and_their_site_is_translated() {
    let directory = tempfile::tempdir().unwrap();
    write_public(directory.path(), [&[4, 6], &[6], &[6, 4], &[4]]);
    let config = r#"{"act_name": "blocks.5.attn.hook_z", "dict_size": 6, "lr": 0.0012}"#;
    std::fs::write(directory.path().join("cfg.json"), config).unwrap();
    let found = load(directory.path(), None).unwrap();
    assert_eq!(found.site(), "blocks.5.attention.mixed");
    assert_eq!((found.width(), found.features()), (4, 6));
    // W_enc [width, features] becomes one row for each feature.
    let encoder = found.weights().encoder.to_vec2::<f32>().unwrap();
    for (found, expected) in encoder[2].iter().zip([0.02, 0.08, 0.14, 0.2]) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    // One file, its config beside it.
    let alone = tempfile::tempdir().unwrap();
    let file = alone.path().join("layer5.safetensors");
    std::fs::copy(directory.path().join("model.safetensors"), &file).unwrap();
    assert!(load(&file, None).is_err(), "no site is known");
    assert_eq!(
        load(&file, Some("blocks.1.out")).unwrap().site(),
        "blocks.1.out"
    );
    std::fs::write(alone.path().join("layer5_cfg.json"), config).unwrap();
    assert_eq!(
        load(&file, None).unwrap().site(),
        "blocks.5.attention.mixed"
    );
}

#[test]
fn hostile_files_are_refused_with_their_fault() {
    let refused = |shapes: [&[usize]; 4], config: &str, expected: &str| {
        let directory = tempfile::tempdir().unwrap();
        write_public(directory.path(), shapes);
        std::fs::write(directory.path().join("autoencoder.json"), config).unwrap();
        let error = load(directory.path(), None).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let good = r#"{"site": "blocks.0.attention.mixed"}"#;
    let fits: [&[usize]; 4] = [&[4, 6], &[6], &[6, 4], &[4]];
    refused([&[4, 6, 1], &[6], &[6, 4], &[4]], good, "W_enc");
    refused([&[4, 6], &[5], &[6, 4], &[4]], good, "b_enc");
    refused([&[4, 6], &[6], &[4, 6], &[4]], good, "W_dec");
    refused([&[4, 6], &[6], &[6, 4], &[6]], good, "b_dec");
    refused([&[0, 6], &[6], &[6, 0], &[0]], good, "width");
    refused(fits, "{}", "site");
    refused(fits, r#"{"act_name": "blocks.x.attn.hook_z"}"#, "site");
    refused(fits, "[1, 2", "config");
    refused(fits, &" ".repeat(2 << 20), "at most");
    // A header that claims more than the file holds.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let header =
        br#"{"W_enc":{"dtype":"F32","shape":[65536,65536],"data_offsets":[0,17179869184]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    std::fs::write(&path, &bytes).unwrap();
    assert!(load(directory.path(), Some(SITE)).is_err());
    // Cut short anywhere, or with any byte turned, a file is read or refused.
    write_public(&directory.path().join("whole"), fits);
    let whole = std::fs::read(directory.path().join("whole/model.safetensors")).unwrap();
    for index in 0..whole.len() {
        std::fs::write(&path, &whole[..index]).unwrap();
        assert!(load(directory.path(), Some(SITE)).is_err(), "{index} bytes");
        let mut turned = whole.clone();
        turned[index] ^= 0xff;
        std::fs::write(&path, &turned).unwrap();
        let _ = load(directory.path(), Some(SITE));
    }
}
