//! What is exact about the decomposition of hidden states into position and context.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common;
use crate::common::{DECODER, ENCODER, GATED, generator, model};
use lapidary_explain::analyses::geometry::{
    Bounds, Control, Decomposition, Diagnostics, Layer, Reading, Sites, Subject, Sums, Survey,
    layers, randomised, report, score_blocks, topics,
};
use lapidary_factor::{Matrix, matrix_from_tensor, qr, thin_svd};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

const TAU: f64 = std::f64::consts::TAU;

/// Numbers of mean zero and variance one.
fn noise(count: usize, generator: &mut ChaCha8Rng) -> Vec<f64> {
    (0..count)
        .map(|_| (generator.random::<f64>() - 0.5) * 12f64.sqrt())
        .collect()
}

/// Irregular states `[contexts, positions, width]` with a mean that is not zero.
fn states(contexts: usize, positions: usize, width: usize, seed: u64) -> Tensor {
    let mut generator = generator(seed);
    let mut values = noise(contexts * positions * width, &mut generator);
    for (index, value) in values.iter_mut().enumerate() {
        let (t, i) = (index / width % positions, index % width);
        *value += (t as f64 * 0.3 + i as f64).sin() + 0.7 * (i as f64).cos();
    }
    Tensor::from_vec(values, (contexts, positions, width), &Device::Cpu).unwrap()
}

fn windows(count: usize, length: usize, vocabulary: u32, seed: u64) -> Vec<Vec<u32>> {
    let mut generator = generator(seed);
    let mut window = || {
        (0..length)
            .map(|_| generator.random_range(0..vocabulary))
            .collect()
    };
    (0..count).map(|_| window()).collect()
}

fn assert_near(a: &Matrix, b: &Matrix, tolerance: f64, what: &str) {
    let error = (a - b).norm_max() / b.norm_max().max(1e-300);
    assert!(error <= tolerance, "{what}: {error}");
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / a.abs().max(b.abs()).max(1e-300)
}

/// Every number of the diagnostics that should not depend on the basis.
fn figures(d: &Diagnostics) -> Vec<f64> {
    let mut all = vec![
        d.rank.rank as f64,
        d.stable_rank,
        d.explained_ratio,
        d.relative_norm,
        d.relative_norm_centred,
        d.incoherence_most,
        d.incoherence,
        d.smoothness,
        d.energy.total,
        d.energy.residual,
    ];
    // The last singular value is zero but for rounding.
    all.extend(&d.singular_values[..d.singular_values.len() - 1]);
    all.extend(d.truncation.iter().map(|(_, error)| error));
    all.extend(d.spiral.iter().flat_map(|point| point[..2].iter()));
    all
}

#[test]
fn the_parts_sum_to_the_states_and_are_centred() {
    let (contexts, positions, width) = (7, 12, 5);
    let hidden = states(contexts, positions, width, 1);
    let found = Decomposition::of(&hidden).unwrap();
    let mut residuals = Vec::new();
    for context in 0..contexts {
        let residual = found.residual(context).unwrap();
        let expected = matrix_from_tensor("states", &hidden.get(context).unwrap()).unwrap();
        let sum = Matrix::from_fn(positions, width, |t, i| {
            found.mean[i]
                + found.positions[(t, i)]
                + found.contexts[(context, i)]
                + residual[(t, i)]
        });
        assert_near(&sum, &expected, 1e-14, "h");
        residuals.push(residual);
    }
    for i in 0..width {
        assert!(found.positions.col(i).iter().sum::<f64>().abs() < 1e-12);
        assert!(found.contexts.col(i).iter().sum::<f64>().abs() < 1e-12);
        for t in 0..positions {
            let over_contexts: f64 = residuals.iter().map(|r| r[(t, i)]).sum();
            assert!(over_contexts.abs() < 1e-12);
        }
        for residual in &residuals {
            assert!(residual.col(i).iter().sum::<f64>().abs() < 1e-12);
        }
    }
}

#[test]
fn sums_of_squares_add_up() {
    let hidden = states(9, 14, 6, 2);
    let found = Decomposition::of(&hidden).unwrap();
    let energy = found.energy();
    // Each side by itself: the residual from residuals, the total from the states.
    let residual: f64 = (0..9)
        .map(|c| found.residual(c).unwrap().norm_l2().powi(2))
        .sum();
    let total: f64 = (0..9)
        .map(|c| {
            let h = found.kept(c).unwrap();
            let centred = Matrix::from_fn(14, 6, |t, i| h[(t, i)] - found.mean[i]);
            centred.norm_l2().powi(2)
        })
        .sum();
    let positions = 9.0 * found.positions.norm_l2().powi(2);
    let contexts = 14.0 * found.contexts.norm_l2().powi(2);
    assert!(relative(total, positions + contexts + residual) < 1e-10);
    assert!(relative(energy.total, total) < 1e-10);
    assert!(relative(energy.residual, residual) < 1e-10);
}

#[test]
fn streaming_and_merging_are_one_run() {
    let hidden = states(11, 8, 5, 3);
    let whole = Decomposition::of(&hidden).unwrap();
    let mut shards = [Sums::new(11), Sums::new(11)];
    for (shard, start, count) in [(0, 0, 4), (0, 4, 2), (1, 6, 1), (1, 7, 4)] {
        let part = hidden.narrow(0, start, count).unwrap();
        shards[shard].add(&part).unwrap();
    }
    let [mut first, second] = shards;
    first.merge(second).unwrap();
    let merged = first.finish().unwrap();
    assert_near(&merged.positions, &whole.positions, 1e-13, "positions");
    assert_near(&merged.contexts, &whole.contexts, 1e-13, "contexts");
    assert_near(&merged.squares, &whole.squares, 1e-13, "squares");
    for context in 0..11 {
        let (a, b) = (
            merged.residual(context).unwrap(),
            whole.residual(context).unwrap(),
        );
        assert_near(&a, &b, 1e-13, "residual");
    }
    assert!(first.merge(Sums::new(0)).is_ok());
    let mut other = Sums::new(0);
    other.add(&states(2, 9, 5, 4)).unwrap();
    let error = first.merge(other).unwrap_err().to_string();
    assert!(
        error.contains("[9, 5]") && error.contains("[8, 5]"),
        "{error}"
    );
}

#[test]
fn shards_of_a_model_merge_into_one_pass_over_all_layers() {
    let model = model(DECODER, 3);
    let windows = windows(13, 9, 20, 5);
    let reading = Reading {
        keep: 13,
        batch: 4,
        ..Reading::default()
    };
    let whole = layers(&model, &windows, reading, Bounds::default()).unwrap();
    assert_eq!(whole.len(), 3);
    let mut first = Survey::new(&model, reading);
    first.read(&model, &windows[..6]).unwrap();
    let mut second = Survey::new(&model, reading);
    second.read(&model, &windows[6..]).unwrap();
    first.merge(second).unwrap();
    for ((site, merged), layer) in first.finish().unwrap().iter().zip(&whole) {
        assert_eq!(*site, layer.site);
        assert_near(
            &merged.positions,
            &layer.decomposition.positions,
            1e-12,
            site,
        );
        assert_near(&merged.contexts, &layer.decomposition.contexts, 1e-12, site);
    }
}

#[test]
fn permuting_contexts_permutes_contexts_alone() {
    let hidden = states(6, 9, 4, 6);
    let order = [4u32, 0, 5, 2, 1, 3];
    let index = Tensor::new(&order, &Device::Cpu).unwrap();
    let permuted = Decomposition::of(&hidden.index_select(&index, 0).unwrap()).unwrap();
    let found = Decomposition::of(&hidden).unwrap();
    assert_near(&permuted.positions, &found.positions, 1e-13, "positions");
    let expected = Matrix::from_fn(6, 4, |c, i| found.contexts[(order[c] as usize, i)]);
    assert_near(&permuted.contexts, &expected, 1e-13, "contexts");
}

#[test]
fn a_rotation_of_all_states_changes_no_diagnostic() {
    let (contexts, positions, width) = (20, 50, 46);
    let hidden = states(contexts, positions, width, 7);
    let random = Matrix::from_fn(width, width, |i, j| ((i * 31 + j * 17) as f64).sin());
    let rotation = qr(random.as_ref()).q;
    let rotation = lapidary_factor::matrix_to_tensor(rotation.as_ref(), DType::F64, &Device::Cpu);
    let flat = hidden.reshape((contexts * positions, width)).unwrap();
    let rotated = flat.matmul(&rotation.unwrap()).unwrap();
    let rotated = rotated.reshape((contexts, positions, width)).unwrap();
    let measure = |hidden: &Tensor| {
        let found = Decomposition::of(hidden).unwrap();
        let labels: Vec<usize> = (0..contexts).map(|c| c % 3).collect();
        let topics = topics(&found.contexts, &labels).unwrap();
        let mut all = figures(&Diagnostics::of(&found, Bounds::default()).unwrap());
        all.extend([topics.within, topics.between, topics.within_projected]);
        all
    };
    let (before, after) = (measure(&hidden), measure(&rotated));
    assert_eq!(before.len(), after.len());
    for (index, (a, b)) in before.iter().zip(&after).enumerate() {
        assert!((a - b).abs() < 1e-8 * a.abs().max(1.0), "{index}: {a} {b}");
    }
}

#[test]
fn a_planted_circle_and_planted_topics_are_found() {
    let (contexts, positions, width, topic_count) = (200, 60, 40, 4);
    let mut generator = generator(8);
    let frame = Matrix::from_fn(width, width, |i, j| ((i * 7 + j * 13) as f64 * 0.37).sin());
    let frame = qr(frame.as_ref()).q;
    let label = |context: usize| context % topic_count;
    let own = noise(contexts * width, &mut generator);
    let rest = noise(contexts * positions * width, &mut generator);
    let mut values = Vec::new();
    for c in 0..contexts {
        for t in 0..positions {
            let angle = TAU * t as f64 / positions as f64;
            for i in 0..width {
                let circle = 1.3 * angle.cos() * frame[(i, 0)] + 0.9 * angle.sin() * frame[(i, 1)];
                let topic = 0.8 * frame[(i, 2 + label(c))] + 0.05 * own[c * width + i];
                let index = (c * positions + t) * width + i;
                values.push(2.0 + circle + topic + 0.03 * rest[index]);
            }
        }
    }
    let shape = (contexts, positions, width);
    let hidden = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let found = Decomposition::of(&hidden).unwrap();
    let svd = thin_svd(found.positions.as_ref()).unwrap();
    // Sine of the largest principal angle: what of the planted plane the found one lacks.
    let plane = frame.as_ref().subcols(0, 2);
    let top = svd.vt.as_ref().subrows(0, 2);
    let missed = plane - top.transpose() * (top * plane);
    let sine = thin_svd(missed.as_ref()).unwrap().s[0];
    assert!(sine < 1e-2, "{sine}");
    let diagnostics = Diagnostics::of(
        &found,
        Bounds {
            rank: 10,
            ..Bounds::default()
        },
    )
    .unwrap();
    assert_eq!(diagnostics.rank.rank, 2);
    // `(1.3² + 0.9²) / 1.3²` for a circle that is an ellipse.
    assert!((diagnostics.stable_rank - 2.5 / 1.69).abs() < 0.01);
    assert!(diagnostics.smoothness > 0.99);
    assert!(diagnostics.incoherence < 0.1);
    let labels: Vec<usize> = (0..contexts).map(label).collect();
    let found = topics(&found.contexts, &labels).unwrap();
    assert!(found.within > 0.7 && found.between < 0.4, "{found:?}");
    // Four topics about their mean: cosines of −1/3 between them.
    assert!(
        (found.between_projected - 1.0 / 3.0).abs() < 0.1,
        "{found:?}"
    );
    assert!(topics(&Matrix::zeros(2, 2), &[0]).is_err());
}

#[test]
fn the_relative_norm_is_that_of_the_stacked_matrices() {
    let hidden = states(6, 10, 5, 9);
    let found = Decomposition::of(&hidden).unwrap();
    let diagnostics = Diagnostics::of(&found, Bounds::default()).unwrap();
    let all = matrix_from_tensor("all", &hidden.reshape((60, 5)).unwrap()).unwrap();
    let norm = |m: &Matrix| thin_svd(m.as_ref()).unwrap().s[0];
    let repeated = Matrix::from_fn(60, 5, |row, i| found.positions[(row % 10, i)]);
    let expected = norm(&repeated) / norm(&all);
    assert!(relative(diagnostics.relative_norm, expected) < 1e-10);
    let centred = Matrix::from_fn(60, 5, |row, i| all[(row, i)] - found.mean[i]);
    let expected = norm(&repeated) / norm(&centred);
    assert!(relative(diagnostics.relative_norm_centred, expected) < 1e-10);
}

/// Embeddings of independent tokens: `pos_t → E[t] − mean(E)`, with an error of `C^{−1/2}`.
#[test]
fn learned_positions_are_found_at_the_first_layer() {
    let model = model(DECODER, 11);
    let table = &model.parameters()["embeddings.positions.weight"];
    let table = matrix_from_tensor("positions", &table.narrow(0, 1, 8).unwrap()).unwrap();
    let means: Vec<f64> = (0..16)
        .map(|i| table.col(i).iter().sum::<f64>() / 8.0)
        .collect();
    let expected = Matrix::from_fn(8, 16, |t, i| table[(t, i)] - means[i]);
    let error = |count: usize| {
        let mut survey = Survey::new(&model, Reading::default());
        survey.read(&model, &windows(count, 9, 20, 12)).unwrap();
        let (site, found) = &survey.finish().unwrap()[0];
        assert_eq!(site, "embeddings");
        (&found.positions - &expected).norm_l2() / expected.norm_l2()
    };
    let (few, many) = (error(50), error(5000));
    assert!(many < 0.05, "{many}");
    // A hundred times as many contexts: a tenth of the error.
    assert!((5.0..20.0).contains(&(few / many)), "{few} {many}");
}

#[test]
fn without_positions_a_bidirectional_model_has_no_position_vectors() {
    let spec = ENCODER.replace("kind = \"learned\"", "kind = \"none\"");
    let model = model(&spec, 13);
    let count = 1000;
    let found = layers(
        &model,
        &windows(count, 12, 20, 14),
        Reading::default(),
        Bounds::default(),
    )
    .unwrap();
    for layer in &found {
        let energy = layer.diagnostics.energy;
        let share = energy.positions / energy.total;
        // What is left is the mean of independent residuals: their share over `C`.
        assert!(share < 2.0 / count as f64, "{}: {share}", layer.site);
    }
    let with = common::model(ENCODER, 13);
    let found = layers(
        &with,
        &windows(200, 12, 20, 14),
        Reading::default(),
        Bounds::default(),
    )
    .unwrap();
    let energy = found[0].diagnostics.energy;
    assert!(energy.positions / energy.total > 0.05);
}

/// Sixteen blocks sum to the scores whose softmax the model computes.
fn assert_scores(model: &Model, block: usize) {
    let windows = windows(6, 10, 20, 15);
    let reading = Reading {
        skip: 0,
        keep: 2,
        ..Reading::default()
    };
    let found = layers(model, &windows, reading, Bounds::default()).unwrap();
    let trace = Trace::new();
    let site = format!("blocks.{block}.attention.weights");
    let trace = trace.capture(&site).unwrap();
    let ids = Tensor::from_slice(&windows[1], (1, 10), &Device::Cpu).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    let weights = trace.signal(&site).unwrap().into_value().get(0).unwrap();
    for head in 0..4 {
        let scores = score_blocks(model, &found[block].decomposition, block, head, 1, 0).unwrap();
        let mut sum = Matrix::zeros(10, 10);
        for part in scores.exact.iter().flatten() {
            sum += part;
        }
        assert_near(&sum, &scores.total, 1e-12, "sum of blocks");
        let weights = weights.get(head).unwrap().to_vec2::<f64>().unwrap();
        for (i, row) in weights.iter().enumerate() {
            for (j, weight) in row.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                let expected = (weight / row[0]).ln();
                let found = scores.total[(i, j)] - scores.total[(i, 0)];
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{i} {j}: {found} {expected}"
                );
            }
        }
        let some = scores.renormalised[0][0].norm_l2();
        assert!(some.is_finite() && some > 0.0);
    }
    assert!(score_blocks(model, &found[block].decomposition, block, 4, 1, 0).is_err());
    assert!(score_blocks(model, &found[block].decomposition, block, 0, 2, 0).is_err());
    assert!(score_blocks(model, &found[block].decomposition, 9, 0, 0, 0).is_err());
}

#[test]
fn the_blocks_of_scores_add_up_under_layer_norm() {
    assert_scores(&model(DECODER, 16), 0);
    assert_scores(&model(DECODER, 16), 1);
}

#[test]
fn the_blocks_of_scores_add_up_with_groups_and_rotation() {
    assert_scores(&model(GATED, 17), 0);
    assert_scores(&model(GATED, 17), 1);
}

#[test]
fn the_blocks_of_scores_add_up_without_a_norm_before() {
    assert_scores(&model(ENCODER, 18), 1);
}

/// Rotations know the positions that were skipped.
#[test]
fn skipped_positions_still_count_for_rotation() {
    let model = model(GATED, 19);
    let windows = windows(4, 10, 20, 20);
    let of = |skip: usize| {
        let reading = Reading {
            skip,
            ..Reading::default()
        };
        let found = layers(&model, &windows, reading, Bounds::default()).unwrap();
        score_blocks(&model, &found[0].decomposition, 0, 1, 0, skip)
            .unwrap()
            .total
    };
    let (all, later) = (of(0), of(3));
    let cut = all.as_ref().submatrix(3, 3, 7, 7).to_owned();
    assert_near(&later, &cut, 1e-10, "scores");
}

#[test]
fn parts_normalised_by_themselves_are_those_of_the_norm() {
    // The norm of a state alone and of the same state as the only part agree.
    let model = model(DECODER, 21);
    let windows = windows(5, 8, 20, 22);
    let found = layers(&model, &windows, Reading::default(), Bounds::default()).unwrap();
    let decomposition = &found[1].decomposition;
    let scores = score_blocks(&model, decomposition, 1, 0, 0, 1).unwrap();
    // Position alone as a whole: a decomposition whose states are the position vectors.
    let mut alone = decomposition.clone();
    alone.kept = vec![decomposition.positions.clone()];
    let expected = score_blocks(&model, &alone, 1, 0, 0, 1).unwrap().total;
    assert_near(&scores.renormalised[0][0], &expected, 1e-12, "position");
}

#[test]
fn other_sites_and_controls() {
    let model = model(DECODER, 23);
    let real = windows(6, 8, 20, 24);
    let reading = Reading {
        sites: Sites::Normalised,
        ..Reading::default()
    };
    let found = layers(&model, &real, reading, Bounds::default()).unwrap();
    let sites: Vec<&str> = found.iter().map(|layer| layer.site.as_str()).collect();
    assert_eq!(
        sites,
        [
            "blocks.0.attention.in",
            "blocks.1.attention.in",
            "final_norm"
        ]
    );
    let half = randomised(&real, 20, Control::SecondHalf, &mut generator(1));
    assert!(real.iter().zip(&half).all(|(a, b)| a[..4] == b[..4]));
    assert_ne!(real, half);
    let all = randomised(&real, 20, Control::All, &mut generator(1));
    assert!(all.iter().flatten().all(|token| *token < 20));
    assert_eq!(all, randomised(&real, 20, Control::All, &mut generator(1)));
}

#[test]
fn the_report_has_every_layer_and_the_topics() {
    let model = model(DECODER, 25);
    let windows = windows(6, 8, 20, 26);
    let reading = Reading::default();
    let layers: Vec<Layer> = layers(&model, &windows, reading, Bounds::default()).unwrap();
    let subject = Subject {
        name: "text".to_owned(),
        layers,
    };
    let labels = [0, 0, 0, 1, 1, 1];
    let found = report(&model, &[subject], reading, Some(&labels), (1, 2)).unwrap();
    assert_eq!(found.tables.len(), 4);
    assert_eq!(found.tables[0].rows.len(), 3);
    for table in &found.tables {
        assert!(
            table
                .rows
                .iter()
                .all(|row| row.len() == table.columns.len())
        );
    }
    // The Gram matrix, the whole scores, sixteen blocks, four renormalised.
    assert_eq!(found.maps.len(), 1 + 1 + 16 + 4);
    assert!(found.plots.iter().all(|plot| plot.to_svg().is_ok()));
}

#[test]
fn windows_that_do_not_fit_are_refused() {
    let model = model(DECODER, 27);
    let mut survey = Survey::new(&model, Reading::default());
    let error = survey.read(&model, &[vec![1; 6], vec![1; 5]]).unwrap_err();
    assert!(
        error.to_string().contains("length of a window is 5"),
        "{error}"
    );
    let error = survey.read(&model, &[vec![1; 2]]).unwrap_err();
    assert!(error.to_string().contains("at least 3"), "{error}");
    assert!(
        survey
            .finish()
            .unwrap_err()
            .to_string()
            .contains("at least 1")
    );
}

/// Against `tests/oracles/geometry.py`, which finds the same numbers in NumPy.
#[test]
fn the_numbers_are_those_of_an_independent_implementation() {
    let json = include_str!("../fixtures/geometry.json");
    let golden: serde_json::Value = serde_json::from_str(json).unwrap();
    let numbers =
        |name: &str| -> Vec<f64> { serde_json::from_value(golden[name].clone()).unwrap() };
    let number = |name: &str| golden[name].as_f64().unwrap();
    let shape: [usize; 3] = serde_json::from_value(golden["shape"].clone()).unwrap();
    let [contexts, positions, width] = shape;
    let topic_count = golden["topics"].as_u64().unwrap() as usize;
    let mut x = 7u64;
    let mut values = Vec::new();
    for index in 0..contexts * positions * width {
        x = (1_664_525 * x + 1_013_904_223) % (1 << 32);
        let (c, t, i) = (
            index / width / positions,
            index / width % positions,
            index % width,
        );
        let angle = TAU * t as f64 / positions as f64;
        values.push(
            x as f64 / 2f64.powi(32) - 0.5
                + 0.25
                + match i {
                    0 => 3.0 * angle.cos(),
                    1 => 2.0 * angle.sin(),
                    i if i == 2 + c % topic_count => 1.5,
                    _ => 0.0,
                },
        );
    }
    let hidden = Tensor::from_vec(values, (contexts, positions, width), &Device::Cpu).unwrap();
    let found = Decomposition::of(&hidden).unwrap();
    let assert_all = |found: &[f64], expected: &[f64], what: &str| {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-9 * b.abs().max(1.0), "{what}: {a} {b}");
        }
    };
    let row = |m: &Matrix, row: usize| -> Vec<f64> { m.row(row).iter().copied().collect() };
    assert_all(&found.mean, &numbers("mean"), "mean");
    assert_all(
        &row(&found.positions, 7),
        &numbers("position_7"),
        "position",
    );
    assert_all(&row(&found.contexts, 3), &numbers("context_3"), "context");
    let residual = found.residual(2).unwrap();
    assert_all(&row(&residual, 11), &numbers("residual_2_11"), "residual");
    let d = Diagnostics::of(&found, Bounds::default()).unwrap();
    assert_all(
        &d.singular_values,
        &numbers("singular_values"),
        "singular values",
    );
    assert!(relative(d.rank.threshold, number("screenot_threshold")) < 1e-6);
    assert_eq!(d.rank.rank, golden["rank"].as_u64().unwrap() as usize);
    for (found, name) in [
        (d.stable_rank, "stable_rank"),
        (d.explained_ratio, "explained_ratio"),
        (d.relative_norm, "relative_norm"),
        (d.relative_norm_centred, "relative_norm_centred"),
        (d.incoherence, "incoherence"),
        (d.incoherence_most, "incoherence_most"),
        (d.smoothness, "smoothness"),
    ] {
        assert_all(&[found], &[number(name)], name);
    }
    let e = d.energy;
    let energy = [e.total, e.positions, e.contexts, e.residual];
    assert_all(&energy, &numbers("energy"), "energy");
    let truncation: Vec<(usize, f64)> =
        serde_json::from_value(golden["truncation"].clone()).unwrap();
    assert_eq!(truncation.len(), d.truncation.len());
    for ((k, error), (expected_k, expected)) in d.truncation.iter().zip(&truncation) {
        assert_eq!(k, expected_k);
        assert!((error - expected).abs() < 1e-9);
    }
    let labels: Vec<usize> = (0..contexts).map(|c| c % topic_count).collect();
    let t = topics(&found.contexts, &labels).unwrap();
    let alike = [t.within, t.between, t.within_projected, t.between_projected];
    assert_all(&alike, &numbers("topics_alike"), "topics");
}

/// A network that layers share stands beside the blocks.
#[test]
fn scores_are_had_beside_a_network_that_blocks_share() {
    let shared = DECODER.replace(
        "causal = true",
        "causal = true, position = { kind = \"fire\", hidden = 4, shared = true, initial_length = 4 }",
    );
    let model = model(&shared, 21);
    let windows = windows(6, 10, 20, 15);
    let reading = Reading {
        skip: 0,
        keep: 2,
        ..Reading::default()
    };
    let found = layers(&model, &windows, reading, Bounds::default()).unwrap();
    let scores = score_blocks(&model, &found[1].decomposition, 1, 2, 1, 0).unwrap();
    let mut sum = Matrix::zeros(10, 10);
    for part in scores.exact.iter().flatten() {
        sum += part;
    }
    assert_near(&sum, &scores.total, 1e-12, "sum of blocks");
}
