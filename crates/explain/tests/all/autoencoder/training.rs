//! How autoencoders are trained.

use super::{SITE, lively, numbers, random};
use crate::common::{DECODER, generator, model};
use lapidary_explain::autoencoder::{
    Autoencoder, Centre, Training, TrainingOptions, geometric_median, train,
};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

fn row_lengths(autoencoder: &Autoencoder) -> Vec<f64> {
    numbers(&autoencoder.weights().decoder.sqr().unwrap().sum(1).unwrap())
        .iter()
        .map(|square| square.sqrt())
        .collect()
}

fn options() -> TrainingOptions {
    TrainingOptions {
        sparsity: 0.05,
        batch: 256,
        warm_up: 10,
        ..TrainingOptions::default()
    }
}

#[test]
fn rows_of_the_decoder_have_length_one_after_every_step() {
    let start = Autoencoder::initialised(SITE, 16, 40, &mut generator(1)).unwrap();
    let mut training = Training::new(&start, options()).unwrap();
    for step in 0..20 {
        training.step(&random(256, 16, step)).unwrap();
        let lengths = row_lengths(&training.autoencoder().unwrap());
        assert!(
            lengths.iter().all(|length| (length - 1.0).abs() < 1e-6),
            "{step}"
        );
    }
}

#[test]
fn without_sparsity_and_with_room_the_error_goes_away() {
    let start = Autoencoder::initialised(SITE, 8, 32, &mut generator(2)).unwrap();
    let options = TrainingOptions {
        sparsity: 0.0,
        rate: 5e-3,
        ..options()
    };
    let mut training = Training::new(&start, options).unwrap();
    let first = training.step(&random(256, 8, 0)).unwrap().squared_error;
    let mut last = first;
    for step in 1..3000 {
        last = training.step(&random(256, 8, step)).unwrap().squared_error;
    }
    assert!(last < 1e-2 * first, "{first} to {last}");
}

#[test]
fn resampling_changes_dead_features_only_and_they_fire_on_their_example() {
    let start = Autoencoder::initialised(SITE, 16, 40, &mut generator(3)).unwrap();
    let options = TrainingOptions {
        beta1: 0.9,
        ..options()
    };
    let mut training = Training::new(&start, options).unwrap();
    for step in 0..5 {
        training.step(&random(256, 16, step)).unwrap();
    }
    let before = training.autoencoder().unwrap();
    let x = random(300, 16, 99);
    let dead = [4usize, 17, 39];
    let resampled = training.resample(&x, &dead, &mut generator(4)).unwrap();
    assert_eq!(resampled, dead);
    let after = training.autoencoder().unwrap();
    let rows = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
    let (old, new) = (before.weights(), after.weights());
    for feature in 0..40 {
        let same = rows(old.encoder)[feature] == rows(new.encoder)[feature]
            && rows(old.decoder)[feature] == rows(new.decoder)[feature];
        assert_eq!(same, !dead.contains(&feature), "{feature}");
    }
    assert_eq!(difference(old.decoder_bias, new.decoder_bias).unwrap(), 0.0);
    // Each fires on an example whose direction it took.
    let centred = x.broadcast_sub(new.decoder_bias).unwrap();
    let lengths = centred
        .sqr()
        .unwrap()
        .sum_keepdim(1)
        .unwrap()
        .sqrt()
        .unwrap();
    let cosines = centred
        .broadcast_div(&lengths)
        .unwrap()
        .matmul(&new.decoder.t().unwrap())
        .unwrap();
    let features = after.encode(&x).unwrap();
    let living: Vec<f64> = (0..40)
        .filter(|feature| !dead.contains(feature))
        .map(|feature| {
            let row = numbers(&new.encoder.get(feature).unwrap());
            row.iter().map(|v| v * v).sum::<f64>().sqrt()
        })
        .collect();
    let length = 0.2 * living.iter().sum::<f64>() / living.len() as f64;
    for feature in dead {
        let of = |tensor: &Tensor| numbers(&tensor.narrow(1, feature, 1).unwrap());
        let cosines = of(&cosines);
        let example = (0..300)
            .max_by(|a, b| cosines[*a].total_cmp(&cosines[*b]))
            .unwrap();
        assert!(
            (cosines[example] - 1.0).abs() < 1e-5,
            "{}",
            cosines[example]
        );
        assert!(of(&features)[example] > 0.0);
        let row = numbers(&new.encoder.get(feature).unwrap());
        let own = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!((own - length).abs() < 1e-5, "{own} {length}");
        assert_eq!(numbers(new.encoder_bias)[feature], 0.0);
    }
    // The optimiser remembers nothing of them: with a mean of gradients, a step in which a
    // feature is not active leaves a forgotten one alone and moves the others.
    let far = (Tensor::ones((4, 16), DType::F32, &Device::Cpu).unwrap() * 0.0).unwrap();
    let inactive = numbers(&after.encode(&far).unwrap());
    training.step(&far).unwrap();
    let then = training.autoencoder().unwrap();
    for feature in dead.into_iter().filter(|f| inactive[*f] == 0.0) {
        let (old, new) = (new.encoder, then.weights().encoder);
        assert_eq!(rows(old)[feature], rows(new)[feature], "{feature}");
    }
}

#[test]
fn dead_features_are_found_and_the_warm_up_starts_again() {
    let mut start = lively(SITE, 6, 19).to_dtype(DType::F32).unwrap();
    // Feature 3 can never be active.
    let bias = Tensor::new(&[5f32, 5.0, 5.0, -1e4, 5.0, 5.0], &Device::Cpu).unwrap();
    let weights = start.weights();
    let (encoder, decoder) = (weights.encoder.clone(), weights.decoder.clone());
    let centre = weights.decoder_bias.clone();
    start = Autoencoder::new(SITE, encoder, bias, decoder, centre).unwrap();
    let options = TrainingOptions {
        steps: 100,
        resample_every: 8,
        warm_up: 4,
        ..options()
    };
    let mut training = Training::new(&start, options).unwrap();
    let mut rates = Vec::new();
    for step in 0..8 {
        assert!(!training.resampling_is_due());
        rates.push(training.step(&random(64, 16, step)).unwrap().rate);
    }
    assert!(training.resampling_is_due());
    assert_eq!(training.dead(), [3]);
    assert!((rates[0] - 1.2e-4).abs() < 1e-12 && rates[7] == 1.2e-3);
    assert!(rates.windows(2).all(|two| two[0] <= two[1]));
    training
        .resample(&random(64, 16, 9), &[3], &mut generator(5))
        .unwrap();
    let again = training.step(&random(64, 16, 10)).unwrap().rate;
    assert_eq!(again, rates[0]);
}

#[test]
fn a_planted_dictionary_is_found() {
    let (width, truths, rows) = (24, 64, 512);
    let mut generator = generator(20);
    let directions = {
        let values: Vec<f32> = (0..truths * width)
            .map(|_| {
                let normal: f32 = (0..12).map(|_| generator.random_range(-0.5f32..0.5)).sum();
                normal
            })
            .collect();
        let all = Tensor::from_vec(values, (truths, width), &Device::Cpu).unwrap();
        lapidary_kernels::unit_rows(&all).unwrap()
    };
    let sample = |generator: &mut ChaCha8Rng| {
        let mut mixing = vec![0f32; rows * truths];
        for row in mixing.chunks_exact_mut(truths) {
            for feature in rand::seq::index::sample(generator, truths, 3) {
                row[feature] = generator.random_range(0.5..1.5);
            }
        }
        let mixing = Tensor::from_vec(mixing, (rows, truths), &Device::Cpu).unwrap();
        mixing.matmul(&directions).unwrap()
    };
    let options = TrainingOptions {
        sparsity: 0.25,
        rate: 3e-3,
        beta2: 0.999,
        batch: rows,
        steps: 4000,
        warm_up: 100,
        resample_every: 1000,
        resamplings: 3,
        dead_frequency: 1e-4,
        ..TrainingOptions::default()
    };
    let start = Autoencoder::initialised("anywhere", width, 2 * truths, &mut generator).unwrap();
    let mut training = Training::new(&start, options).unwrap();
    while training.steps() < 4000 {
        if training.resampling_is_due() {
            let dead = training.dead();
            let x = Tensor::cat(&[sample(&mut generator), sample(&mut generator)], 0).unwrap();
            training.resample(&x, &dead, &mut generator).unwrap();
        }
        let x = sample(&mut generator);
        training.step(&x).unwrap();
    }
    let found = training.autoencoder().unwrap();
    let cosines = directions
        .matmul(&found.weights().decoder.t().unwrap())
        .unwrap();
    let best = numbers(&cosines.max(1).unwrap());
    let mean = best.iter().sum::<f64>() / truths as f64;
    assert!(mean >= 0.9, "mean of the largest cosines: {mean}");
}

#[test]
fn a_model_trains_an_autoencoder_the_same_way_from_the_same_seed() {
    let model = model(DECODER, 21);
    let windows =
        || (0u32..400).map(|i| (0..8).map(|j| (i * 7 + j * j) % 20).collect::<Vec<u32>>());
    let options = TrainingOptions {
        sparsity: 0.02,
        batch: 64,
        steps: 30,
        warm_up: 5,
        buffer_batches: 4,
        resample_every: 10,
        resample_batches: 2,
        dead_frequency: 0.01,
        centre: Centre::GeometricMedian,
        ..TrainingOptions::default()
    };
    let run = |seed: u64| {
        let mut heard = 0;
        let found = train(
            &model,
            SITE,
            48,
            windows(),
            &options,
            &mut generator(seed),
            |_| heard += 1,
        );
        let found = found.unwrap();
        assert_eq!(heard, found.history.len());
        found
    };
    let (first, again, other) = (run(1), run(1), run(2));
    let encoder = |run: &lapidary_explain::autoencoder::TrainedAutoencoder| {
        run.autoencoder.weights().encoder.clone()
    };
    assert_eq!(difference(&encoder(&first), &encoder(&again)).unwrap(), 0.0);
    assert!(difference(&encoder(&first), &encoder(&other)).unwrap() > 0.0);
    let (start, end) = (&first.history[0], first.history.last().unwrap());
    assert!(end.squared_error < start.squared_error);
    // No windows, no training.
    let none = std::iter::empty();
    assert!(train(&model, SITE, 48, none, &options, &mut generator(1), |_| ()).is_err());
}

#[test]
fn the_geometric_median_minimises_the_sum_of_distances() {
    let x = random(101, 5, 22).to_dtype(DType::F64).unwrap();
    let median = geometric_median(&x).unwrap();
    let sum = |point: &Tensor| {
        let squares = x
            .broadcast_sub(point)
            .unwrap()
            .sqr()
            .unwrap()
            .sum(1)
            .unwrap();
        numbers(&squares).iter().map(|s| s.sqrt()).sum::<f64>()
    };
    let least = sum(&median);
    for seed in 0..20 {
        let step = (random(1, 5, 100 + seed).to_dtype(DType::F64).unwrap() * 0.01).unwrap();
        let moved = (&median + step.squeeze(0).unwrap()).unwrap();
        assert!(sum(&moved) > least);
    }
    // One point far away hardly moves it, unlike the mean.
    let far = Tensor::cat(
        &[x.clone(), Tensor::full(1e6, (1, 5), &Device::Cpu).unwrap()],
        0,
    )
    .unwrap();
    assert!(difference(&geometric_median(&far).unwrap(), &median).unwrap() < 0.1);
}
