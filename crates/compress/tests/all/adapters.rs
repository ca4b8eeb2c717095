//! Healing by adapters of low rank.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::common::{DECODER, GATED, close, model, values};
use crate::common::{cut, text};
use crate::heal::{in_rounds, steps, zero_masks};
use lapidary_compress::{
    AdapterSettings, Fingerprint, HealData, HealReport, HealSettings, Method, Settings,
    export_dense, heal,
};
use lapidary_factor::{Metric, WeightedSvd};
use lapidary_model::Model;

fn adapted(rank: usize, count: u64) -> HealSettings {
    HealSettings {
        adapters: Some(AdapterSettings {
            rank,
            ..AdapterSettings::default()
        }),
        ..steps(count)
    }
}

fn healed(
    model: &Model,
    settings: &HealSettings,
) -> lapidary_compress::Result<(Model, HealReport)> {
    let (training, validation) = (text(40, 1), text(10, 2));
    let data = HealData {
        training: &training,
        validation: &validation,
        teacher: None,
    };
    heal(model, &data, settings, |_, _| ())
}

/// The loss on the validation examples.
fn loss(model: &Model) -> f64 {
    healed(model, &steps(0)).unwrap().1.before
}

fn difference(one: &Model, other: &Model, name: &str) -> lapidary_kernels::Tensor {
    (&one.parameters()[name] - &other.parameters()[name]).unwrap()
}

#[test]
fn layers_take_adapters_in_and_nothing_else_moves() {
    for spec in [DECODER, GATED] {
        let original = model(spec, 3);
        let (result, report) = healed(&original, &adapted(2, 30)).unwrap();
        assert!(report.after < report.before, "{report:?}");
        // What was validated with adapters is what came out without.
        close(&[loss(&result)], &[report.after], 1e-12);
        assert_eq!(result.spec(), original.spec());
        let layers: Vec<String> = original
            .linears()
            .iter()
            .filter(|linear| linear.path.starts_with("blocks."))
            .map(|linear| format!("{}.weight", linear.path))
            .collect();
        let adapters = report.adapters.unwrap();
        assert_eq!((adapters.layers, adapters.factorised), (layers.len(), 0));
        let sizes = original.linears().iter();
        let sizes = sizes.filter(|linear| linear.path.starts_with("blocks."));
        let expected: usize = sizes.map(|linear| 2 * (linear.input + linear.output)).sum();
        assert_eq!(adapters.parameters, expected);
        for (name, tensor) in result.parameters() {
            if !layers.contains(name) {
                assert_eq!(
                    values(tensor),
                    values(&original.parameters()[name]),
                    "{name}"
                );
                continue;
            }
            let change = difference(&result, &original, name);
            let svd = WeightedSvd::new(&change, &Metric::Plain).unwrap();
            let found = svd.singular_values();
            assert!(found[0] > 1e-4, "{name}: {found:?}");
            assert!(found[2] < 1e-12 * found[0].max(1.0), "{name}: {found:?}");
        }
    }
}

#[test]
fn chosen_layers_alone_are_trained() {
    let original = model(DECODER, 3);
    let mut settings = adapted(2, 30);
    settings.adapters.as_mut().unwrap().layers = vec!["*.query".to_owned()];
    let (result, report) = healed(&original, &settings).unwrap();
    assert_eq!(report.adapters.unwrap().layers, 2);
    for (name, tensor) in result.parameters() {
        let same = values(tensor) == values(&original.parameters()[name]);
        assert_eq!(same, !name.ends_with("query.weight"), "{name}");
    }
}

#[test]
fn zeros_stay_where_they_are() {
    let original = model(DECODER, 3);
    let pruned = cut(&original, &text(40, 1), "magnitude", 0.5).model;
    let (result, report) = healed(&pruned, &adapted(2, 30)).unwrap();
    assert!(report.after < report.before && report.zeros > 0);
    assert_eq!(zero_masks(&result), zero_masks(&pruned));
    close(&[loss(&result)], &[report.after], 1e-12);
    // Unless they may go.
    let free = HealSettings {
        keep_zeros: false,
        ..adapted(2, 30)
    };
    let (result, report) = healed(&pruned, &free).unwrap();
    assert!(report.after < report.before && report.zeros == 0);
    assert!(zero_masks(&result).concat().iter().all(|zero| !zero));
    // And in rounds.
    let (result, healings) =
        in_rounds(&original, "magnitude", 0.5, 2, None, &adapted(2, 10)).unwrap();
    assert!(healings.iter().all(|healing| healing.adapters.is_some()));
    let masks = zero_masks(&result.model).concat();
    let share = masks.iter().filter(|zero| **zero).count() as f64 / masks.len() as f64;
    assert!((share - 0.5).abs() < 0.02, "{share}");
}

/// Of rank `k` a layer comes out of rank `k + r` without loss, or dense where that saves nothing.
#[test]
fn factorised_layers_are_factored_again_with_the_rank_of_both() {
    let original = model(DECODER, 3);
    for rank in [2, 8] {
        let mut compressed = cut(&original, &text(40, 1), "svd", 0.5);
        let before: BTreeMap<String, usize> = compressed.model.spec().low_rank.clone();
        assert!(!before.is_empty());
        let (result, report) = healed(&compressed.model, &adapted(rank, 30)).unwrap();
        assert!(report.after < report.before, "{report:?}");
        close(&[loss(&result)], &[report.after], 1e-9);
        assert_eq!(report.adapters.unwrap().factorised, before.len());
        let dense = export_dense(&result).unwrap();
        for linear in original.linears() {
            let Some(first) = before.get(&linear.path) else {
                continue;
            };
            let (input, output, both) = (linear.input, linear.output, first + rank);
            let saves = both * (input + output) < input * output;
            let found = result.spec().low_rank.get(&linear.path);
            assert_eq!(found.copied(), saves.then_some(both), "{}", linear.path);
            let weight = &dense.parameters()[&format!("{}.weight", linear.path)];
            let svd = WeightedSvd::new(weight, &Metric::Plain).unwrap();
            let error = |rank: usize| svd.truncate(rank).unwrap().plain_error;
            assert!(error(*first) > 1e-6, "the adapter brought new directions");
            if both < input.min(output) {
                assert!(error(both) < 1e-9 && error(both) <= error(*first));
            }
        }
        assert_eq!(result.spec().low_rank.is_empty(), rank == 8);
        compressed.set_healed(result);
        let (report, result) = (&compressed.report, &compressed.model);
        assert_eq!(report.after.parameters, result.parameter_count());
        for module in &report.modules {
            let rank = result.spec().low_rank.get(&module.path).copied();
            assert_eq!(module.rank(), rank, "{}", module.path);
            let weights: usize = ["weight", "down", "up"]
                .iter()
                .filter_map(|part| result.parameters().get(&format!("{}.{part}", module.path)))
                .map(|tensor| tensor.elem_count())
                .sum();
            assert_eq!(module.parameters_after, weights, "{}", module.path);
        }
    }
}

#[test]
fn adapters_that_learned_nothing_change_nothing() {
    let original = model(GATED, 3);
    let factored = cut(&original, &text(40, 1), "svd", 0.5).model;
    for model in [original, factored] {
        let (result, report) = healed(&model, &adapted(3, 0)).unwrap();
        assert_eq!((report.best, report.after), (0, report.before));
        close(&[report.before], &[loss(&model)], 1e-9);
        let [found, expected] = [&result, &model].map(|model| Fingerprint::of(model).unwrap());
        assert_eq!(found, expected);
        assert_eq!(result.spec(), model.spec());
    }
}

#[test]
fn dropout_is_drawn_by_the_seed() {
    let original = model(DECODER, 3);
    let after = |seed: u64, dropout: f64| {
        let mut settings = HealSettings {
            seed,
            ..adapted(2, 6)
        };
        settings.adapters.as_mut().unwrap().dropout = dropout;
        let (result, report) = healed(&original, &settings).unwrap();
        assert!(report.best > 0);
        close(&[loss(&result)], &[report.after], 1e-12);
        Fingerprint::of(&result).unwrap()
    };
    assert_eq!(after(1, 0.3), after(1, 0.3));
    assert_ne!(after(1, 0.3), after(2, 0.3));
    assert_ne!(after(1, 0.3), after(1, 0.0));
}

/// With the rounding in sight, the loss is that of the rounded sum.
#[test]
fn what_is_rounded_after_is_the_sum() {
    let wide = DECODER
        .replace("width = 16", "width = 32")
        .replace("hidden = 24", "hidden = 64");
    let original = model(&wide, 3);
    let rounding = Method::find("int4").unwrap().rounding(&Settings::default());
    assert!(rounding.is_some());
    let seen = |settings: HealSettings| HealSettings {
        rounding: rounding.clone(),
        ..settings
    };
    let (result, report) = healed(&original, &seen(adapted(2, 20))).unwrap();
    assert!(report.after < report.before, "{report:?}");
    let again = healed(&result, &seen(steps(0))).unwrap().1.before;
    close(&[again], &[report.after], 1e-12);
    let factored = cut(&original, &text(40, 1), "svd", 0.5).model;
    let refused = healed(&factored, &seen(adapted(2, 1)))
        .unwrap_err()
        .to_string();
    assert!(refused.contains("factorised"), "{refused}");
}

#[test]
fn what_means_nothing_with_adapters_is_refused_in_words() {
    let original = model(DECODER, 3);
    let with = |change: fn(&mut AdapterSettings)| {
        let mut settings = adapted(2, 1);
        change(settings.adapters.as_mut().unwrap());
        settings
    };
    let regrowing = HealSettings {
        regrow: 0.3,
        ..adapted(2, 1)
    };
    for (settings, words) in [
        (with(|told| told.rank = 0), "rank of adapters"),
        (with(|told| told.alpha = 0.0), "alpha of adapters"),
        (with(|told| told.dropout = 1.0), "dropout of adapters"),
        (
            with(|told| told.layers = vec!["no.such".to_owned()]),
            "matches no layer",
        ),
        (
            with(|told| told.layers = Vec::new()),
            "layers with adapters",
        ),
        (regrowing, "regrows"),
    ] {
        let refused = healed(&original, &settings).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
}

/// A model that only learns what the original says is perfect already, adapters or not.
#[test]
fn the_originals_predictions_are_learned_by_adapters() {
    let original = model(DECODER, 3);
    let (training, validation) = (text(30, 1), text(10, 2));
    let taught = HealData {
        training: &training,
        validation: &validation,
        teacher: Some(&original),
    };
    let distil = HealSettings {
        distil: 1.0,
        weight_decay: 0.0,
        ..adapted(4, 60)
    };
    let (_, own) = heal(&original, &taught, &distil, |_, _| ()).unwrap();
    assert!(own.before.abs() < 1e-12, "{own:?}");
    let pruned = cut(&original, &training, "magnitude", 0.5).model;
    let (_, report) = heal(&pruned, &taught, &distil, |_, _| ()).unwrap();
    assert!(report.after < report.before, "{report:?}");
}
