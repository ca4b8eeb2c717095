//! Pruning on small models in f64: what must hold exactly.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

mod families;
mod one_layer;
mod structured;
mod told;

use crate::common::{
    DECODER, GATED, all, altered, close, cut, cut_by, model, scores, values, weights, windows,
    zeros,
};
use lapidary_compress::{
    Calibration, CalibrationData, CalibrationOptions, Compressed, Fingerprint, Pattern,
    PruneSettings, Requirements, Scope, Selection, Settings, Statistic,
};
use lapidary_kernels::{CsrMatrix, DType, TwoOfFourMatrix};
use lapidary_model::{Model, OpenOptions, Package};

const WEIGHTS: [&str; 5] = [
    "first-order",
    "magnitude",
    "random-weights",
    "second-order",
    "wanda",
];

const STRUCTURED: [&str; 2] = ["channel-gradient", "prune-heads"];

fn settings(pruning: PruneSettings) -> Settings {
    Settings {
        pruning,
        ..Settings::default()
    }
}

fn scoped(scope: Scope) -> Settings {
    settings(PruneSettings {
        scope: Some(scope),
        ..PruneSettings::default()
    })
}

/// Share of zeros over all layers of the blocks.
fn sparsity(model: &Model) -> f64 {
    let all: Vec<f64> = weights(model).into_values().flatten().collect();
    zeros(&all) as f64 / all.len() as f64
}

/// Whether what is zero in `less` is so in `more`.
fn nested(less: &Model, more: &Model) -> bool {
    let (less, more) = (weights(less), weights(more));
    less.iter().all(|(path, less)| {
        let pairs = less.iter().zip(&more[path]);
        pairs.into_iter().all(|(a, b)| *a != 0.0 || *b == 0.0)
    })
}

#[test]
fn nothing_to_prune_is_the_model_itself() {
    for (kind, model, data) in all() {
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let whole = cut(&model, &data, method, 1.0);
            let (before, after) = (Fingerprint::of(&model), Fingerprint::of(&whole.model));
            assert_eq!(before.unwrap(), after.unwrap(), "{kind} {method}");
            assert_eq!(whole.report.notes, [] as [String; 0]);
        }
    }
}

#[test]
fn the_sparsity_is_the_one_that_was_asked_for() {
    for (kind, model, data) in all() {
        for method in WEIGHTS {
            for share in [0.25, 0.5, 0.9] {
                let total: usize = weights(&model).values().map(Vec::len).sum();
                for scope in [Scope::Global, Scope::Layer, Scope::Row] {
                    let found = cut_by(&model, &data, method, 1.0 - share, &scoped(scope));
                    if (method, scope) == ("second-order", Scope::Global) {
                        let error = found.err().unwrap().to_string();
                        assert!(error.contains("a layer or a row"), "{error}");
                        continue;
                    }
                    let found = found.unwrap();
                    let pruned = zeros(
                        &weights(&found.model)
                            .into_values()
                            .flatten()
                            .collect::<Vec<_>>(),
                    );
                    let apart = (pruned as f64 - share * total as f64).abs();
                    let layers = weights(&model).len() as f64;
                    let rows: usize = model
                        .linears()
                        .iter()
                        .filter(|linear| linear.path.starts_with("blocks."))
                        .map(|linear| linear.output)
                        .sum();
                    let allowed = match scope {
                        Scope::Global => 0.5,
                        Scope::Layer => 0.5 * layers,
                        Scope::Row => 0.5 * rows as f64,
                    };
                    assert!(
                        apart <= allowed + 1e-9,
                        "{kind} {method} {scope:?} {share}: {apart}"
                    );
                    for module in &found.report.modules {
                        let found = &weights(&found.model)[&module.path];
                        assert_eq!(module.parameters_before, found.len());
                        assert_eq!(module.parameters_after, found.len() - zeros(found));
                    }
                }
            }
        }
    }
}

#[test]
fn masks_are_nested_and_seeds_reproduce() {
    for (kind, model, data) in all() {
        for method in ["first-order", "magnitude", "random-weights", "wanda"] {
            for scope in [Scope::Global, Scope::Layer, Scope::Row] {
                let at = |share: f64| {
                    cut_by(&model, &data, method, 1.0 - share, &scoped(scope))
                        .unwrap()
                        .model
                };
                let models = [0.2, 0.45, 0.8].map(at);
                for pair in models.windows(2) {
                    assert!(nested(&pair[0], &pair[1]), "{kind} {method} {scope:?}");
                }
            }
        }
        let drawn = |seed: u64| {
            let settings = Settings {
                seed,
                ..Settings::default()
            };
            let found = cut_by(&model, &data, "random-weights", 0.5, &settings).unwrap();
            Fingerprint::of(&found.model).unwrap()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
    }
}

/// Pruning what was pruned goes on from there, whatever makes up for what went.
#[test]
fn zeros_stay_zero_when_more_goes() {
    for (kind, model, data) in all() {
        for method in WEIGHTS {
            let half = cut(&model, &data, method, 0.5).model;
            let more = cut(&half, &data, method, 0.2).model;
            assert!(nested(&half, &more), "{kind} {method}");
            assert!((sparsity(&more) - 0.8).abs() < 0.02, "{kind} {method}");
        }
    }
}

#[test]
fn a_layer_keeps_its_mask_in_any_scale_but_not_among_others() {
    let gated = model(GATED, 3);
    let data = windows(4, 3);
    // Values by `c` and the output by `1 / c` are the same function.
    let c = 8.0;
    let scaled = altered(&gated, "blocks.0.attention.value.weight", |w| {
        (w * c).unwrap()
    });
    let scaled = altered(&scaled, "blocks.0.attention.output.weight", |w| {
        (w / c).unwrap()
    });
    close(&scores(&scaled, &data), &scores(&gated, &data), 1e-12);
    let masks = |model: &Model, scope: Scope, normalise: bool| -> Vec<bool> {
        let settings = settings(PruneSettings {
            scope: Some(scope),
            normalise,
            ..PruneSettings::default()
        });
        let found = cut_by(model, &data, "magnitude", 0.5, &settings).unwrap();
        let weights = weights(&found.model).into_values().flatten();
        weights.map(|weight| weight == 0.0).collect()
    };
    for scope in [Scope::Layer, Scope::Row] {
        assert_eq!(masks(&gated, scope, false), masks(&scaled, scope, false));
    }
    assert_eq!(
        masks(&gated, Scope::Global, true),
        masks(&scaled, Scope::Global, true)
    );
    assert_ne!(
        masks(&gated, Scope::Global, false),
        masks(&scaled, Scope::Global, false)
    );
}

/// Of all layers together those weights go whose `w² E[(∂L/∂w)²]` is least.
#[test]
fn first_order_takes_the_least_of_all_layers() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 9), windows(6, 9));
        let layers = weights(&model);
        let fisher = |path: &String| Statistic::Fisher {
            layer: path.clone(),
        };
        let requirements = Requirements {
            statistics: layers.keys().map(fisher).collect(),
        };
        let options = CalibrationOptions::default();
        let calibration = Calibration::collect(&model, &data, &requirements, options).unwrap();
        let pruning = settings(PruneSettings {
            keep_at_least: 0.0,
            ..PruneSettings::default()
        });
        for share in [0.1, 0.3, 0.7] {
            let found = cut_by(&model, &data, "first-order", 1.0 - share, &pruning).unwrap();
            let found = weights(&found.model);
            let (mut gone, mut left) = (0.0f64, f64::INFINITY);
            for (path, before) in &layers {
                let squares = values(&calibration.tensor(&fisher(path)).unwrap());
                assert_eq!(squares.len(), before.len(), "{path}");
                for ((weight, square), after) in before.iter().zip(&squares).zip(&found[path]) {
                    let score = weight * weight * square;
                    match *after == 0.0 {
                        true => gone = gone.max(score),
                        false => left = left.min(score),
                    }
                }
            }
            assert!(gone > 0.0 && gone <= left, "{share}: {gone:e} {left:e}");
        }
    }
}

/// A layer of tiny weights would be gone first, and keeps its hundredth.
#[test]
fn no_layer_collapses() {
    let decoder = model(DECODER, 2);
    let tiny = altered(&decoder, "blocks.1.attention.key.weight", |w| {
        (w * 1e-6).unwrap()
    });
    for (keep_at_least, left) in [(0.01, 3), (0.25, 64)] {
        let settings = settings(PruneSettings {
            scope: Some(Scope::Global),
            normalise: false,
            keep_at_least,
            ..PruneSettings::default()
        });
        let found = cut_by(&tiny, &windows(2, 1), "magnitude", 0.5, &settings).unwrap();
        let key = &weights(&found.model)["blocks.1.attention.key"];
        assert_eq!(key.len() - zeros(key), left);
        assert!((sparsity(&found.model) - 0.5).abs() < 1e-3);
    }
    for share in [0.9999, 0.999] {
        let found = cut(&decoder, &windows(2, 1), "magnitude", 1.0 - share);
        for (path, weights) in weights(&found.model) {
            let least = (0.01 * weights.len() as f64).ceil() as usize;
            assert_eq!(weights.len() - zeros(&weights), least, "{path}");
        }
    }
}

/// What `W x` loses over data, relative to what it is.
fn output_error(model: &Model, compressed: &Compressed, data: &CalibrationData) -> f64 {
    let errors = lapidary_compress::output_errors(model, &compressed.model, data, 4).unwrap();
    errors.values().sum::<f64>() / errors.len() as f64
}

#[test]
fn making_up_for_what_goes_loses_less() {
    for (kind, model, data) in all() {
        // The first layers alone, whose inputs are the same before and after.
        let selection = Selection::layers(["blocks.0.attention.{query,key,value}"]);
        let error = |method: &str, block: usize| {
            let settings = Settings {
                selection: selection.clone(),
                ..settings(PruneSettings {
                    scope: Some(Scope::Row),
                    block,
                    damping: 1e-4,
                    ..PruneSettings::default()
                })
            };
            let found = cut_by(&model, &data, method, 0.5, &settings).unwrap();
            output_error(&model, &found, &data)
        };
        let (exact, blocks) = (error("second-order", 16), error("second-order", 4));
        let (aware, magnitude) = (error("wanda", 16), error("magnitude", 16));
        // Blocks of four that lose two each choose among few.
        assert!(
            exact < blocks && exact < aware,
            "{kind}: {exact} {blocks} {aware}"
        );
        assert!(exact < 0.7 * magnitude, "{kind}: {exact} {magnitude}");
    }
}

#[test]
fn n_of_m_holds_in_every_row_and_is_stored_so() {
    for (kind, model, data) in all() {
        for method in WEIGHTS {
            let pruning = settings(PruneSettings {
                pattern: Pattern::NOfM { n: 2, m: 4 },
                ..PruneSettings::default()
            });
            let found = cut_by(&model, &data, method, 0.5, &pruning).unwrap();
            for linear in found.model.linears() {
                if !linear.path.starts_with("blocks.") {
                    continue;
                }
                let weight = &found.model.parameters()[&format!("{}.weight", linear.path)];
                for four in values(weight).chunks(4) {
                    assert_eq!(zeros(four), 2, "{kind} {method} {}", linear.path);
                }
                let single = weight.to_dtype(DType::F32).unwrap();
                let x = single.narrow(0, 0, 3).unwrap();
                let dense = x.matmul(&single.t().unwrap()).unwrap();
                let pairs = TwoOfFourMatrix::from_dense(&single).unwrap();
                let csr = CsrMatrix::from_dense(&single).unwrap();
                close(&values(&pairs.multiply(&x).unwrap()), &values(&dense), 1e-5);
                close(&values(&csr.multiply(&x).unwrap()), &values(&dense), 1e-5);
            }
            let note = &found.report.notes[0];
            assert!(note.contains("as 2 of 4"), "{note}");
            let error = cut_by(&model, &data, method, 0.4, &pruning).err().unwrap();
            assert!(error.to_string().contains("2 of 4"), "{error}");
        }
    }
}

#[test]
fn what_is_pruned_loads_again() {
    for (kind, model, data) in all() {
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let found = cut(&model, &data, method, 0.5);
            let expected = scores(&found.model, &data);
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("model");
            Package::new(found.model, None).save(&path, None).unwrap();
            let options = OpenOptions {
                dtype: DType::F64,
                ..OpenOptions::default()
            };
            let package = Package::open(&path, &options).unwrap();
            let again = package.single_model().unwrap();
            assert_eq!(scores(again, &data), expected, "{kind} {method}");
        }
    }
}
