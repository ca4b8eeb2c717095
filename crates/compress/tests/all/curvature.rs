//! Taking directions of little curvature out of feed-forward weights.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{DECODER, GATED, altered, cut, model, scores, windows};
use lapidary_compress::curvature::{Curved, Factors, Keep, Spectrum, Subnet, correlation, factors};
use lapidary_compress::quality::{
    Recitation, perplexity, ranking_kept, recitation, sliding_windows,
};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, Example, Method, Settings, Target, Task,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> = (0..rows * columns)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn gram(rows: &Tensor) -> Tensor {
    let count = rows.dim(0).unwrap() as f64;
    (rows.t().unwrap().matmul(rows).unwrap() / count).unwrap()
}

fn number(t: &Tensor) -> f64 {
    t.sum_all().unwrap().to_scalar::<f64>().unwrap()
}

fn norm(t: &Tensor) -> f64 {
    number(&t.sqr().unwrap())
}

fn compress(model: &Model, data: &CalibrationData, method: &str, mass: f64) -> Compressed {
    let requirements = Method::find(method)
        .unwrap()
        .requirements(model, &Settings::default());
    assert!(requirements.unwrap().is_empty());
    cut(model, data, method, mass)
}

/// Logarithms of the probabilities of what follows the first of two tokens.
fn log_probabilities(model: &Model, tokens: [u32; 2]) -> Vec<f64> {
    let input = Input::tokens(Tensor::new(&[tokens], &Device::Cpu).unwrap());
    let output = model.forward(&input, Pass::default()).unwrap();
    let logits = output.into_logits().unwrap().into_value();
    let row = logits.get(0).unwrap().get(0).unwrap();
    let row = row.to_vec1::<f64>().unwrap();
    let sum: f64 = row.iter().map(|l| l.exp()).sum();
    row.iter().map(|l| l - sum.ln()).collect()
}

/// The model with one entry of a weight moved.
fn moved(model: &Model, name: &str, [row, column]: [usize; 2], by: f64) -> Model {
    altered(model, name, |w| {
        let (rows, columns) = w.dims2().unwrap();
        let mut values = w.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        values[row * columns + column] += by;
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    })
}

/// Whether some outcome's log probability has a slope whose square is `expected`, by what it is when moved by `step`
/// up and down.
fn some_slope_fits(up: &[f64], down: &[f64], step: f64, expected: f64) -> bool {
    up.iter().zip(down).any(|(up, down)| {
        let slope = (up - down) / (2.0 * step);
        (slope * slope - expected).abs() < 1e-5 * expected.max(1e-8)
    })
}

fn on_diagonal(t: &Tensor, k: usize) -> f64 {
    let entry = t.get(k).unwrap().get(k).unwrap();
    entry.to_scalar::<f64>().unwrap()
}

#[test]
fn the_kronecker_product_of_one_token_is_its_exact_fisher_block() {
    let (x, g) = (random(1, 5, 1), random(1, 4, 2));
    let factors = Factors {
        input: gram(&x),
        output: gram(&g),
        tokens: 1,
    };
    let gradient = g.t().unwrap().matmul(&x).unwrap();
    // vec(g xᵀ) vec(g xᵀ)ᵀ, row by row.
    let flat = gradient.reshape((20, 1)).unwrap();
    let exact = flat.matmul(&flat.t().unwrap()).unwrap();
    for (a, i) in (0..4).flat_map(|a| (0..5).map(move |i| (a, i))) {
        for (b, j) in (0..4).flat_map(|b| (0..5).map(move |j| (b, j))) {
            let entry = |t: &Tensor, r: usize, c: usize| {
                t.get(r)
                    .unwrap()
                    .get(c)
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap()
            };
            let kronecker = entry(&factors.output, a, b) * entry(&factors.input, i, j);
            assert!((kronecker - entry(&exact, a * 5 + i, b * 5 + j)).abs() < 1e-12);
        }
    }
}

/// With inputs and output gradients drawn by themselves, `E[vec(g xᵀ) vec(g xᵀ)ᵀ]` is `G ⊗ A` but
/// for a difference that falls as `1 / √tokens`, here about 2.2 of that; and along `u vᵀ` the product
/// curves as `uᵀ G u · vᵀ A v`.
#[test]
fn independent_tokens_come_to_the_product_of_their_factors() {
    let apart = |tokens: usize| -> f64 {
        let (x, g) = (random(tokens, 3, 11), random(tokens, 2, 12));
        let by_token = |t: &Tensor, width: usize| t.reshape((tokens, width)).unwrap();
        // vec(g xᵀ), row by row: [tokens, 6].
        let outer = g
            .unsqueeze(2)
            .unwrap()
            .broadcast_mul(&x.unsqueeze(1).unwrap());
        let exact = gram(&by_token(&outer.unwrap(), 6));
        let (a, b) = (gram(&x), gram(&g));
        let product: Vec<f64> = (0..36)
            .map(|at| {
                let (row, column) = (at / 6, at % 6);
                let entry = |t: &Tensor, i: usize, j: usize| t.to_vec2::<f64>().unwrap()[i][j];
                entry(&b, row / 3, column / 3) * entry(&a, row % 3, column % 3)
            })
            .collect();
        let product = Tensor::from_vec(product, (6, 6), &Device::Cpu).unwrap();
        let (u, v) = (random(1, 2, 13), random(1, 3, 14));
        let along = |rows: &Tensor, moment: &Tensor| -> f64 {
            number(&(rows.matmul(moment).unwrap() * rows).unwrap())
        };
        let direction = u.t().unwrap().matmul(&v).unwrap().reshape((1, 6)).unwrap();
        let (whole, parts) = (along(&direction, &product), along(&u, &b) * along(&v, &a));
        assert!((whole - parts).abs() < 1e-12, "{whole} {parts}");
        (norm(&(exact - &product).unwrap()) / norm(&product)).sqrt()
    };
    let (few, many) = (apart(200), apart(20_000));
    assert!(many < 0.05 && many < few / 3.0, "{few} {many}");
}

/// For a network of one feed-forward layer the factors are had by hand from finite differences.
#[test]
fn output_gradients_are_those_of_finite_differences() {
    // The mean of g gᵀ over tokens has the trace E‖g‖². Moving the bias of a layer moves its
    // output at every token alike, so one window of two tokens, with one labelled position, has
    // the gradient of its bias for g.
    for spec in [DECODER, GATED] {
        let whole = model(spec, 5);
        let data = CalibrationData::windows([vec![3, 7]]).unwrap();
        let found = factors(&whole, &data, &[1], 1, 9).unwrap();
        let down = &found["blocks.1.feedforward.down"];
        assert_eq!(down.tokens, 1);
        // One token: G = g gᵀ has rank one, and A = x xᵀ.
        for factor in [&down.input, &down.output] {
            let trace = number(
                &(factor * Tensor::eye(factor.dim(0).unwrap(), DType::F64, &Device::Cpu).unwrap())
                    .unwrap(),
            );
            assert!((norm(factor).sqrt() - trace).abs() < 1e-9 * trace);
        }
        // The label that was drawn: the one whose finite differences fit.
        let name = "blocks.1.feedforward.down.weight";
        let (outputs, inputs) = whole.parameters()[name].dims2().unwrap();
        let step = 1e-5;
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (o, i) = (rng.random_range(0..outputs), rng.random_range(0..inputs));
        let at = |by: f64| log_probabilities(&moved(&whole, name, [o, i], by), [3, 7]);
        // (∂ loss / ∂ W_oi)² = g_o² x_i².
        let expected = on_diagonal(&down.output, o) * on_diagonal(&down.input, i);
        let fits = some_slope_fits(&at(step), &at(-step), step, expected);
        assert!(fits, "{expected}");
    }
}

#[test]
fn layers_before_the_activation_have_their_own_gradients() {
    for (spec, names) in [(DECODER, vec!["up"]), (GATED, vec!["gate", "up"])] {
        let whole = model(spec, 6);
        let data = CalibrationData::windows([vec![2, 9]]).unwrap();
        let found = factors(&whole, &data, &[0], 1, 3).unwrap();
        for layer in names {
            let path = format!("blocks.0.feedforward.{layer}");
            let name = format!("{path}.weight");
            let (outputs, inputs) = whole.parameters()[&name].dims2().unwrap();
            let factors = &found[&path];
            assert_eq!(factors.output.dims(), [outputs, outputs]);
            assert_eq!(factors.input.dims(), [inputs, inputs]);
            let step = 1e-5;
            let at = |by: f64| log_probabilities(&moved(&whole, &name, [1, 2], by), [2, 9]);
            let expected = on_diagonal(&factors.output, 1) * on_diagonal(&factors.input, 2);
            let fits = some_slope_fits(&at(step), &at(-step), step, expected);
            assert!(fits, "{path} {expected}");
        }
    }
}

#[test]
fn neither_padding_nor_the_last_position_enters() {
    let whole = model(DECODER, 5);
    let short = CalibrationData::windows([vec![3, 7, 1]]).unwrap();
    let alone = factors(&whole, &short, &[0], 1, 9).unwrap();
    // The same window first, then a longer one; in one batch the first is padded. Labels are
    // drawn in order, so that the first window's are the same.
    let both = CalibrationData::windows([vec![3, 7, 1], vec![4, 4, 9, 2, 6]]).unwrap();
    let padded = factors(&whole, &both, &[0], 2, 9).unwrap();
    let one_by_one = factors(&whole, &both, &[0], 1, 9).unwrap();
    for (layer, found) in &padded {
        assert_eq!(found.tokens, 6);
        assert_eq!(alone[layer].tokens, 2);
        for (a, b) in [
            (&found.input, &one_by_one[layer].input),
            (&found.output, &one_by_one[layer].output),
        ] {
            assert!(norm(&(a - b).unwrap()) <= 1e-18 * norm(b), "{layer}");
        }
        for factor in [&found.input, &found.output] {
            let skew = (factor - factor.t().unwrap()).unwrap();
            assert!(norm(&skew) <= 1e-24 * norm(factor).max(1e-300));
        }
    }
}

/// Where a model sees both sides a position has a label where something is hidden, the last position
/// as any other.
#[test]
fn masked_positions_alone_enter_where_both_sides_are_seen() {
    let both = model(&DECODER.replace(", causal = true", ""), 5);
    let example = |ids: Vec<u32>, hidden: &[usize]| {
        let target = (0..ids.len()).map(|at| hidden.contains(&at).then_some(4));
        Example {
            target: Target::Tokens(target.collect()),
            ..Example::window(ids)
        }
    };
    let of = |examples: Vec<Example>, batch| {
        let data = CalibrationData::new(examples).unwrap();
        factors(&both, &data, &[0], batch, 9)
    };
    let hidden = example(vec![3, 7, 1, 2], &[1, 3]);
    let found = of(vec![hidden.clone()], 1).unwrap();
    // Read through the norm alone, `x` of the two positions is had from the model itself.
    let path = "blocks.0.feedforward";
    let trace = Trace::new().capture(&format!("{path}.in")).unwrap();
    let ids = Tensor::new(&[[3u32, 7, 1, 2]], &Device::Cpu).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    both.forward(&Input::tokens(ids), pass).unwrap();
    let read = trace.signal(&format!("{path}.in")).unwrap().into_value();
    let places = Tensor::new(&[1u32, 3], &Device::Cpu).unwrap();
    let rows = read.get(0).unwrap().index_select(&places, 0).unwrap();
    let up = &found[&format!("{path}.up")];
    assert_eq!(up.tokens, 2);
    assert!(norm(&(&up.input - gram(&rows)).unwrap()) < 1e-20);
    // A window in which nothing is hidden adds nothing, whatever it shares a batch with.
    let nothing = example(vec![5, 6], &[]);
    for batch in [1, 2] {
        let with = of(vec![nothing.clone(), hidden.clone()], batch).unwrap();
        for (layer, found) in &found {
            assert_eq!(with[layer].tokens, 2);
            let gap = norm(&(&with[layer].output - &found.output).unwrap());
            assert!(gap <= 1e-18 * norm(&found.output), "{layer} {batch} {gap}");
        }
        let error = of(vec![nothing.clone()], batch).unwrap_err().to_string();
        assert!(error.contains("positions with a label"), "{error}");
        // Of plain windows no position has a label, and a lone token predicts nothing.
        let plain = of(vec![Example::window([3, 7])], batch).unwrap_err();
        assert!(plain.to_string().contains("masked positions"), "{plain}");
        let lone = CalibrationData::windows([vec![3], vec![3, 7]]).unwrap();
        let lone = factors(&model(DECODER, 5), &lone, &[0], batch, 9).unwrap_err();
        assert!(lone.to_string().contains("at least 2 tokens"), "{lone}");
    }
}

#[test]
fn all_of_the_mass_is_the_model_and_none_of_it_silence() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 2), windows(6, 4));
        let whole = compress(&model, &data, "curvature", 1.0);
        assert_eq!(scores(&model, &data), scores(&whole.model, &data));
        let first = compress(&model, &data, "curvature", 0.6);
        let again = compress(&model, &data, "curvature", 0.6);
        assert_eq!(scores(&first.model, &data), scores(&again.model, &data));
        assert_ne!(scores(&first.model, &data), scores(&model, &data));
        for name in model.parameters().keys() {
            let same =
                norm(&(&model.parameters()[name] - &first.model.parameters()[name]).unwrap());
            let edited = name.contains("feedforward.") && name.ends_with("weight");
            assert_eq!(same > 0.0, edited, "{name}");
        }
    }
}

#[test]
fn the_edit_is_a_projection() {
    let weight = random(7, 9, 1);
    let factors = Factors {
        input: gram(&random(30, 9, 2)),
        output: gram(&random(30, 7, 3)),
        tokens: 30,
    };
    let curved = Curved::new(&weight, &factors).unwrap();
    for keep in [Keep::Staircase, Keep::Rectangle] {
        let mut before = 0.0;
        for mass in [0.1, 0.4, 0.7, 0.95] {
            let kept = curved.kept(mass, keep);
            assert!(kept.is_sorted_by(|a, b| a >= b));
            let edited = curved.edited(&kept).unwrap();
            let removed = (&weight - &edited).unwrap();
            // ‖W‖² = ‖W'‖² + ‖W − W'‖²
            let sum = norm(&edited) + norm(&removed);
            assert!((norm(&removed) - curved.removed(&kept)).abs() < 1e-10);
            assert!((sum - norm(&weight)).abs() < 1e-10);
            assert!(norm(&edited) >= before - 1e-12);
            before = norm(&edited);
            let twice = Curved::new(&edited, &factors).unwrap();
            let twice = twice.edited(&twice.kept(mass, keep)).unwrap();
            assert!(norm(&(&edited - &twice).unwrap()) < 1e-20);
        }
        assert!(norm(&curved.edited(&curved.kept(0.0, keep)).unwrap()) == 0.0);
        let all = curved.edited(&curved.kept(1.0, keep)).unwrap();
        assert!(norm(&(&all - &weight).unwrap()) < 1e-20);
    }
}

#[test]
fn plans_by_hand_are_obeyed_or_refused() {
    let (model, data) = (model(DECODER, 2), windows(4, 4));
    let method = Method::find("curvature").unwrap();
    let task = Task {
        data: Some(&data),
        ..Task::new(&model)
    };
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    assert_eq!(plan.modules.len(), 4);
    for module in plan.modules.iter_mut().skip(1) {
        module.change = Change::Leave {
            reason: "by hand".to_owned(),
        };
    }
    let compressed = method.apply(&task, &plan).unwrap();
    let changed = model.parameters().iter().filter(|(name, before)| {
        norm(&(*before - &compressed.model.parameters()[*name]).unwrap()) > 0.0
    });
    assert_eq!(changed.count(), 1);
    plan.modules[0].change = Change::Remove;
    assert!(
        method
            .apply(&task, &plan)
            .unwrap_err()
            .to_string()
            .contains("edit")
    );
    assert!(method.apply(&Task::new(&model), &plan).is_err());
}

#[test]
fn bands_share_what_a_layer_makes_of_its_inputs() {
    let (weight, x) = (random(6, 8, 4), random(40, 8, 5));
    let factors = Factors {
        input: gram(&x),
        output: gram(&random(30, 6, 6)),
        tokens: 40,
    };
    let curved = Curved::new(&weight, &factors).unwrap();
    let masses = [0.3, 0.6, 0.9];
    // On the inputs of the factors bands are orthogonal.
    let own = curved.band_shares(&factors.input, &masses).unwrap();
    assert_eq!(own.len(), 4);
    assert!(own.iter().all(|share| *share > 0.0), "{own:?}");
    assert!((own.iter().sum::<f64>() - 1.0).abs() < 1e-10, "{own:?}");
    // On any, the last band is what the edit takes away: E‖(W − W') x‖² / E‖W x‖².
    let rows = random(50, 8, 7);
    let moment = gram(&rows);
    let written = |w: &Tensor| norm(&rows.matmul(&w.t().unwrap()).unwrap());
    for mass in masses {
        let edited = curved.edited(&curved.kept(mass, Keep::Staircase)).unwrap();
        let removed = written(&(&weight - &edited).unwrap()) / written(&weight);
        let shares = curved.band_shares(&moment, &[mass]).unwrap();
        assert!((shares[1] - removed).abs() < 1e-10, "{shares:?} {removed}");
        let kept = written(&edited) / written(&weight);
        assert!((shares[0] - kept).abs() < 1e-10, "{shares:?} {kept}");
    }
    let whole = curved.band_shares(&moment, &[]).unwrap();
    assert!((whole[0] - 1.0).abs() < 1e-12 && whole.len() == 1);
    for masses in [&[0.5, 0.5][..], &[0.0], &[1.0], &[0.7, 0.2]] {
        assert!(curved.band_shares(&moment, masses).is_err(), "{masses:?}");
    }
    assert!(curved.band_shares(&gram(&random(9, 7, 8)), &[0.5]).is_err());
}

#[test]
fn a_spectrum_edits_as_the_method_does_and_reads_what_layers_read() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 2), windows(6, 4));
        let found = factors(&model, &data, &[0, 1], 8, 0).unwrap();
        let spectrum = Spectrum::of(&model, &found).unwrap();
        let edited = spectrum.edited(&model, 0.6, Keep::Staircase).unwrap();
        let by_method = compress(&model, &data, "curvature", 0.6).model;
        assert_eq!(scores(&edited, &data), scores(&by_method, &data));
        let removed = spectrum.removed(0.6, Keep::Staircase);
        for (layer, removed) in &removed {
            let of = |model: &Model| model.parameters()[&format!("{layer}.weight")].clone();
            let gone = norm(&(of(&model) - of(&edited)).unwrap());
            assert!((gone - removed).abs() < 1e-9, "{layer} {gone} {removed}");
        }

        let other = windows(9, 8);
        let shares = spectrum.shares(&model, &other, 4, &[0.6]).unwrap();
        assert_eq!(shares.len(), found.len());
        // Padding takes no part.
        let alone = spectrum.shares(&model, &other, 1, &[0.6]).unwrap();
        for (layer, shares) in &shares {
            let gap = alone[layer].iter().zip(shares).map(|(a, b)| (a - b).abs());
            assert!(gap.fold(0.0, f64::max) < 1e-9, "{layer}");
            assert!(
                shares.iter().all(|share| *share > 0.0),
                "{layer} {shares:?}"
            );
        }
        // A layer behind the activation reads other features than one before it.
        let of = |name: &str| &shares[&format!("blocks.0.feedforward.{name}")];
        assert_ne!(of("up"), of("down"));
    }
}

#[test]
fn correlations_are_of_what_varies() {
    let falls = correlation(&[1.0, 2.0, 3.0], &[6.0, 4.0, 2.0]).unwrap();
    assert!((falls + 1.0).abs() < 1e-12, "{falls}");
    let none = correlation(&[-1.0, 0.0, 1.0], &[1.0, 0.0, 1.0]).unwrap();
    assert!(none.abs() < 1e-12, "{none}");
    assert_eq!(correlation(&[1.0], &[2.0]), None);
    assert_eq!(correlation(&[1.0, 2.0], &[2.0, 2.0]), None);
}

#[test]
fn a_learned_mask_clears_whole_weights_within_the_norm_it_is_given() {
    let (model, forget, retain) = (model(DECODER, 5), windows(8, 1), windows(8, 2));
    let path = "blocks.1.feedforward.up";
    let name = format!("{path}.weight");
    let weight = &model.parameters()[&name];
    let budget = |share: f64| BTreeMap::from([(path.to_owned(), share * norm(weight))]);
    let learn = |share, steps| {
        let subnet = Subnet {
            steps,
            ..Subnet::default()
        };
        subnet
            .learn(&model, &forget, &retain, &budget(share))
            .unwrap()
    };
    let masked = learn(0.1, 6);
    let flat = |model: &Model| -> Vec<f64> {
        let flat = model.parameters()[&name].flatten_all().unwrap();
        flat.to_vec1().unwrap()
    };
    let (before, after) = (flat(&model), flat(&masked));
    assert!(before.iter().zip(&after).all(|(w, m)| *m == 0.0 || m == w));
    let gone = norm(&(weight - &masked.parameters()[&name]).unwrap());
    let largest = before.iter().fold(0.0, |most: f64, w| most.max(w * w));
    let allowed = 0.1 * norm(weight);
    assert!(
        gone <= allowed + 1e-12 && gone > allowed - largest,
        "{gone} {allowed}"
    );
    for (other, tensor) in model.parameters() {
        let same = norm(&(tensor - &masked.parameters()[other]).unwrap()) == 0.0;
        assert_eq!(same, *other != name, "{other}");
    }
    assert_eq!(flat(&learn(0.1, 6)), after);
    // Without steps nothing is masked, without a norm nothing can be.
    assert_eq!(flat(&learn(0.1, 0)), before);
    assert_eq!(flat(&learn(0.0, 3)), before);

    let refused = |removed: f64, path: &str, retained: f64| {
        let subnet = Subnet {
            retain: retained,
            ..Subnet::default()
        };
        let removed = BTreeMap::from([(path.to_owned(), removed)]);
        subnet.learn(&model, &forget, &retain, &removed).is_err()
    };
    assert!(refused(1.0, "blocks.7.feedforward.up", 0.5));
    assert!(refused(-1.0, path, 0.5));
    assert!(refused(1.0, path, 1.5));
}

/// The first choice follows the slope of the loss, so that a small mask does what it is for.
#[test]
fn a_small_mask_widens_the_gap_between_what_is_forgotten_and_what_is_not() {
    let (model, forget, retain) = (model(DECODER, 7), windows(8, 3), windows(8, 4));
    let loss = |model: &Model, data: &CalibrationData| -> f64 {
        let texts = data
            .examples()
            .iter()
            .map(|example| match &example.content {
                lapidary_compress::Content::Tokens { ids, .. } => ids.clone(),
                lapidary_compress::Content::Pixels(_) => Vec::new(),
            });
        // The mean of each text's mean, as a step of the mask sees it.
        let texts: Vec<Vec<u32>> = texts.collect();
        let each = texts.iter().map(|ids| {
            let windows = sliding_windows(ids, ids.len(), 1).unwrap();
            perplexity(model, &windows, 8).unwrap().value.ln()
        });
        each.sum::<f64>() / texts.len() as f64
    };
    let removed = ["up", "down"]
        .map(|layer| format!("blocks.1.feedforward.{layer}"))
        .map(|path| {
            let weight = &model.parameters()[&format!("{path}.weight")];
            (path, 0.04 * norm(weight))
        });
    let subnet = Subnet {
        steps: 1,
        ..Subnet::default()
    };
    let masked = subnet
        .learn(&model, &forget, &retain, &BTreeMap::from(removed))
        .unwrap();
    let gap = |model: &Model| loss(model, &forget) - loss(model, &retain);
    let (before, after) = (gap(&model), gap(&masked));
    assert!(after > before, "{before} {after}");
}

#[test]
fn what_a_model_says_itself_it_recites() {
    let (model, data) = (model(DECODER, 3), windows(4, 6));
    let starts: Vec<Vec<u32>> = (0..5).map(|first| vec![first, 2, 7]).collect();
    let options = lapidary_model::generation::GenerationOptions {
        new_tokens: 6,
        ..Default::default()
    };
    let go_on = |_, _| std::ops::ControlFlow::Continue(());
    let said = lapidary_model::generation::generate(&model, &starts, &options, go_on).unwrap();
    let mut texts: Vec<Vec<u32>> = starts
        .iter()
        .zip(&said)
        .map(|(start, said)| [start.clone(), said.clone()].concat())
        .collect();
    let found = recitation(&model, &texts, 3).unwrap();
    let all = Recitation {
        strict: 1.0,
        loose: 1.0,
        distance: 0.0,
        sequences: 5,
    };
    assert_eq!(found, all);
    // One wrong token at the end of one text: 1 of 6 of it.
    let last = texts[0].last_mut().unwrap();
    *last = (*last + 1) % 20;
    let found = recitation(&model, &texts, 3).unwrap();
    assert_eq!((found.strict, found.loose), (0.8, 1.0));
    assert!((found.distance - 1.0 / 30.0).abs() < 1e-12);
    // A model of length 12 can say a 13th token, and is not asked for more.
    let at = |length: usize| recitation(&model, &[vec![1; length]], 3);
    assert_eq!(at(13).unwrap().sequences, 1);
    let error = at(14).unwrap_err().to_string();
    assert!(error.contains("at most 13"), "{error}");
    for shown in [0, 9, 10] {
        let error = recitation(&model, &texts, shown).unwrap_err().to_string();
        assert!(error.contains("between 1 and 8"), "{error}");
    }

    assert!((ranking_kept(&model, &model, &data, 2, 10).unwrap() - 1.0).abs() < 1e-12);
    let edited = compress(&model, &data, "curvature", 0.3).model;
    let kept = ranking_kept(&model, &edited, &data, 2, 10).unwrap();
    assert!(kept > 0.0 && kept < 1.0 - 1e-6, "{kept}");
    let alone = ranking_kept(&model, &edited, &data, 1, 10).unwrap();
    assert!((kept - alone).abs() < 1e-9, "{kept} {alone}");
    let none = ranking_kept(&model, &edited, &data, 1, 0).unwrap_err();
    assert!(none.to_string().contains("at least 1"), "{none}");
    // Scores that are no numbers rank nothing.
    let broken = altered(&model, "blocks.1.feedforward.down.weight", |w| {
        (w * f64::NAN).unwrap()
    });
    let broken = ranking_kept(&model, &broken, &data, 2, 10).unwrap_err();
    assert!(broken.to_string().contains("next token"), "{broken}");
}
