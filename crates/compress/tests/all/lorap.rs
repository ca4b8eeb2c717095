//! LoRAP on small models in f64: what must hold exactly.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::common;
use crate::common::{DECODER, ENCODER, GATED, close, distance, model, scores, windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Factorisation,
    LorapSettings, Method, Plan, Selection, Settings, Statistic, Task, export_dense,
};
use lapidary_factor::{Metric, WeightedSvd};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn settings(lorap: LorapSettings) -> Settings {
    Settings {
        lorap,
        ..Settings::default()
    }
}

fn one_shot() -> Settings {
    settings(LorapSettings {
        one_shot: true,
        ..LorapSettings::default()
    })
}

/// Plans and applies, with a calibration where the settings ask for one.
pub fn compress(
    model: &Model,
    data: &CalibrationData,
    settings: &Settings,
    keep: f64,
    change: impl Fn(&mut Plan),
) -> lapidary_compress::Result<Compressed> {
    let method = Method::find("lorap").unwrap();
    let requirements = method.requirements(model, settings)?;
    let options = CalibrationOptions::default();
    let calibration = match requirements.is_empty() {
        true => None,
        false => Some(Calibration::collect(model, data, &requirements, options)?),
    };
    let task = Task {
        calibration: calibration.as_ref(),
        data: Some(data),
        settings: Some(settings),
        ..Task::new(model)
    };
    let mut plan = method.plan(&task, &Budget::Keep(keep))?;
    change(&mut plan);
    method.apply(&task, &plan)
}

#[test]
fn keeping_everything_keeps_the_model_and_less_reloads() {
    for spec in [ENCODER, DECODER, GATED] {
        let (model, data) = (model(spec, 1), windows(10, 4));
        let whole = compress(&model, &data, &Settings::default(), 1.0, |_| {}).unwrap();
        assert_eq!(scores(&model, &data), scores(&whole.model, &data));

        let less = compress(&model, &data, &Settings::default(), 0.6, |_| {}).unwrap();
        let saved: usize = less
            .report
            .modules
            .iter()
            .map(|m| m.parameters_before - m.parameters_after)
            .sum();
        assert!(saved > 0);
        assert!(less.report.after.parameters < less.report.before.parameters);
        let expected = scores(&less.model, &data);
        assert!(distance(&expected, &scores(&model, &data)) > 1e-6);
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("saved");
        Package::new(less.model, None).save(&to, None).unwrap();
        let options = OpenOptions {
            dtype: DType::F64,
            ..OpenOptions::default()
        };
        let loaded = Package::open(&to, &options).unwrap();
        assert_eq!(expected, scores(loaded.single_model().unwrap(), &data));
    }
}

#[test]
fn all_ranks_lose_nothing() {
    for (spec, one_shot) in [(DECODER, false), (GATED, true)] {
        let (model, data) = (model(spec, 2), windows(10, 4));
        let settings = settings(LorapSettings {
            one_shot,
            ..LorapSettings::default()
        });
        let whole = compress(&model, &data, &settings, 1.0, |plan| {
            for module in &mut plan.modules {
                if module.path.contains(".attention.") {
                    let rank = module.input.min(module.output);
                    module.change = Change::Factorise { rank };
                }
            }
        });
        close(
            &scores(&whole.unwrap().model, &data),
            &scores(&model, &data),
            1e-9,
        );
    }
}

/// `c` of a site of a model.
fn mean_squares(model: &Model, data: &CalibrationData, site: &str) -> Vec<f64> {
    let statistic = Statistic::InputSquares {
        site: site.to_owned(),
    };
    let requirements = lapidary_compress::Requirements {
        statistics: [statistic.clone()].into(),
    };
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, data, &requirements, options).unwrap();
    calibration.vector(&statistic).unwrap()
}

/// The second block is cut by what it reads once the first is, or in one shot by what it read
/// before: each mode's factors are those of its own statistics and not the other's.
#[test]
fn statistics_come_from_what_is_cut_already() {
    let (model, data) = (model(GATED, 3), windows(20, 4));
    let path = "blocks.1.attention.query";
    let rank = 3;
    let hand = |plan: &mut Plan| {
        for module in plan.modules.iter_mut().filter(|module| module.path == path) {
            module.change = Change::Factorise { rank };
        }
    };
    let factors = |model: &Model| {
        let get = |name: &str| model.parameters()[&format!("{path}.{name}")].clone();
        common::values(&get("up").matmul(&get("down")).unwrap())
    };
    let expected = |c: &[f64]| {
        let weight = &model.parameters()[&format!("{path}.weight")];
        let svd = WeightedSvd::new(weight, &Metric::InputSquares(c)).unwrap();
        common::values(&svd.truncate(rank).unwrap().factors.merged().unwrap())
    };
    let site = "blocks.1.attention.in";
    let layerwise = compress(&model, &data, &Settings::default(), 0.5, hand)
        .unwrap()
        .model;
    let at_once = compress(&model, &data, &one_shot(), 0.5, hand)
        .unwrap()
        .model;
    // What the second block reads in the compressed model is what it was cut by.
    let anew = expected(&mean_squares(&layerwise, &data, site));
    let before = expected(&mean_squares(&model, &data, site));
    close(&factors(&layerwise), &anew, 1e-9);
    close(&factors(&at_once), &before, 1e-9);
    assert!(distance(&anew, &before) > 1e-3);
}

#[test]
fn the_weighted_error_is_the_tail_and_the_least() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut draw =
        |count: usize| -> Vec<f64> { (0..count).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let tensor = |values: Vec<f64>, shape: (usize, usize)| {
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let (output, input, rank) = (6, 8, 3);
    let weight = tensor(draw(output * input), (output, input));
    let c: Vec<f64> = draw(input).iter().map(|x| 0.05 + 4.0 * x * x).collect();
    let error =
        |merged: &Tensor| -> Vec<Vec<f64>> { (&weight - merged).unwrap().to_vec2().unwrap() };
    let weighted = |merged: &Tensor| -> f64 {
        let rows = error(merged);
        rows.iter()
            .flat_map(|row| row.iter().zip(&c))
            .map(|(e, c)| e * e * c)
            .sum()
    };
    let merged = |metric: &Metric<'_>| {
        let svd = WeightedSvd::new(&weight, metric).unwrap();
        let found = svd.truncate(rank).unwrap();
        (found.factors.merged().unwrap(), found.discarded_energy)
    };
    let (best, tail) = merged(&Metric::InputSquares(&c));
    let (plain, _) = merged(&Metric::Plain);
    assert!((weighted(&best) - tail).abs() < 1e-12);
    assert!(weighted(&best) < weighted(&plain));
    let (constant, _) = merged(&Metric::InputSquares(&[0.7; 8]));
    close(&common::values(&constant), &common::values(&plain), 1e-10);

    // Inputs without correlation: the error of outputs is the weighted error.
    let tokens = 200_000;
    let mut sum = 0.0;
    let rows = error(&best);
    for _ in 0..tokens {
        // Of variance c: uniform on ±√(3 c).
        let x: Vec<f64> = draw(input)
            .iter()
            .zip(&c)
            .map(|(u, c)| u * (3.0 * c).sqrt())
            .collect();
        let outputs = rows
            .iter()
            .map(|row| row.iter().zip(&x).map(|(e, x)| e * x).sum::<f64>());
        sum += outputs.map(|y| y * y).sum::<f64>();
    }
    let measured = sum / tokens as f64;
    assert!((measured / tail - 1.0).abs() < 0.02, "{measured} {tail}");

    // With correlation, the factorisation that knows it is at least as good.
    let mix = tensor(draw(input * input), (input, input));
    let covariance = mix.t().unwrap().matmul(&mix).unwrap();
    let diagonal: Vec<f64> = (0..input)
        .map(|i| {
            covariance
                .get(i)
                .unwrap()
                .get(i)
                .unwrap()
                .to_scalar()
                .unwrap()
        })
        .collect();
    let output_error = |merged: &Tensor| -> f64 {
        let error = (&weight - merged).unwrap();
        let product = error.matmul(&covariance).unwrap();
        (product * error)
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar()
            .unwrap()
    };
    let (blind, _) = merged(&Metric::InputSquares(&diagonal));
    let (whole, least) = merged(&Metric::Covariance(&covariance));
    assert!((output_error(&whole) - least).abs() < 1e-9 * least);
    assert!(output_error(&blind) > least);
}

/// The result equals the model with the same channels silenced, and they are those after the
/// lowest ones.
#[test]
fn channels_that_go_are_the_ones_after_the_spared_ones() {
    let (model, data) = (model(GATED, 4), windows(20, 4));
    let settings = settings(LorapSettings {
        spared: 0.1,
        one_shot: true,
        ..LorapSettings::default()
    });
    let whole_attention = |plan: &mut Plan| {
        for module in plan
            .modules
            .iter_mut()
            .filter(|m| m.path.contains(".attention."))
        {
            let reason = "whole".to_owned();
            module.change = Change::Leave { reason };
        }
    };
    let narrow = compress(&model, &data, &settings, 0.5, whole_attention)
        .unwrap()
        .model;
    let mut silenced: BTreeMap<String, Tensor> = model.parameters().clone();
    for block in 0..2 {
        let path = format!("blocks.{block}.feedforward");
        let rows = |name: &str| -> Vec<Vec<f64>> {
            model.parameters()[&format!("{path}.{name}.weight")]
                .to_vec2()
                .unwrap()
        };
        let (c, hidden) = (
            mean_squares(&model, &data, &format!("{path}.in")),
            mean_squares(&model, &data, &format!("{path}.hidden")),
        );
        let (gate, up, down) = (rows("gate"), rows("up"), rows("down"));
        let norm = |row: &[f64]| {
            row.iter()
                .zip(&c)
                .map(|(w, c)| w * w * c)
                .sum::<f64>()
                .sqrt()
        };
        let mut order: Vec<(usize, f64)> = (0..24)
            .map(|i| {
                let column: f64 = down.iter().map(|row| row[i] * row[i]).sum::<f64>() * hidden[i];
                (i, norm(&gate[i]) + norm(&up[i]) + column.sqrt())
            })
            .collect();
        order.sort_by(|a, b| a.1.total_cmp(&b.1));
        // ⌊0.1 · 24⌋ = 2 are spared, ⌊0.6 · 24⌋ − 2 = 12 go.
        let mut mask = vec![1.0; 24];
        order[2..14]
            .iter()
            .for_each(|(channel, _)| mask[*channel] = 0.0);
        let name = format!("{path}.down.weight");
        let mask = Tensor::from_vec(mask, (1, 24), &Device::Cpu).unwrap();
        let masked = silenced[&name].broadcast_mul(&mask).unwrap();
        silenced.insert(name, masked);
        let kept = narrow.parameters()[&format!("{path}.up.weight")].dims()[0];
        assert_eq!(kept, 12);
    }
    let silenced = Model::new(model.spec().clone(), &mut silenced).unwrap();
    close(&scores(&narrow, &data), &scores(&silenced, &data), 1e-12);
}

/// An up row times α with its down column by α is the same part, but not the same score: what
/// goes may differ. This is how the published score is.
#[test]
fn the_score_knows_how_a_channel_is_scaled() {
    let (model, data) = (model(DECODER, 4), windows(20, 4));
    // GELU is not homogeneous, so the gated part's linear half is the one that may be scaled.
    let gated = common::model(GATED, 4);
    let scaled = |channel: usize, alpha: f64| {
        let scale = |dimension: usize, factor: f64| {
            move |t: &Tensor| {
                let mut values = vec![1.0; 24];
                values[channel] = factor;
                let values = Tensor::from_vec(values, 24, &Device::Cpu).unwrap();
                t.broadcast_mul(&values.unsqueeze(1 - dimension).unwrap())
                    .unwrap()
            }
        };
        let model = common::altered(&gated, "blocks.0.feedforward.up.weight", scale(0, alpha));
        common::altered(
            &model,
            "blocks.0.feedforward.down.weight",
            scale(1, 1.0 / alpha),
        )
    };
    let cut = |model: &Model| {
        let cut = compress(model, &data, &Settings::default(), 0.5, |_| {}).unwrap();
        scores(&cut.model, &data)
    };
    let moved = (0..24).filter(|channel| {
        let scaled = scaled(*channel, 30.0);
        close(&scores(&scaled, &data), &scores(&gated, &data), 1e-10);
        distance(&cut(&scaled), &cut(&gated)) > 1e-6
    });
    assert!(moved.count() > 0);
    assert!(compress(&model, &data, &Settings::default(), 0.5, |_| {}).is_ok());
}

#[test]
fn merged_and_factorised_anew_at_a_larger_rank_nothing_more_is_lost() {
    let (model, data) = (model(DECODER, 5), windows(10, 4));
    let compressed = compress(&model, &data, &Settings::default(), 0.4, |_| {})
        .unwrap()
        .model;
    let merged = export_dense(&compressed).unwrap();
    let expected = scores(&compressed, &data);
    close(&scores(&merged, &data), &expected, 1e-10);
    let ranks: BTreeMap<String, usize> = compressed
        .spec()
        .low_rank
        .iter()
        .map(|(path, rank)| (path.clone(), rank + 1))
        .collect();
    assert!(!ranks.is_empty());
    let selection = Selection::layers(ranks.keys().map(String::as_str));
    let mut plan = Factorisation::Svd
        .plan(&merged, &selection, &Budget::Ranks(ranks.clone()))
        .unwrap();
    for module in &mut plan.modules {
        let rank = ranks[&module.path];
        module.change = Change::Factorise { rank };
    }
    let again = plan.apply(&merged, None).unwrap();
    close(&scores(&again.model, &data), &expected, 1e-9);
}

#[test]
fn without_attention_any_mixer_will_do() {
    let multi_head = "{ kind = \"multi-head\", heads = 4, groups = 2, causal = true, bias = false, \
                      position = { kind = \"rotary\" } }";
    let spec = GATED.replace(multi_head, "{ kind = \"mamba\" }");
    assert_ne!(spec, GATED);
    let (recurrent, data) = (model(&spec, 1), windows(10, 4));
    for one_shot in [false, true] {
        let told = |attention: bool| {
            settings(LorapSettings {
                attention,
                one_shot,
                ..LorapSettings::default()
            })
        };
        let error = compress(&recurrent, &data, &told(true), 0.5, |_| {});
        let error = error.unwrap_err().to_string();
        assert!(error.contains("mamba"), "{error}");
        let cut = compress(&recurrent, &data, &told(false), 0.5, |_| {}).unwrap();
        for (before, after) in recurrent
            .spec()
            .expanded_blocks()
            .iter()
            .zip(cut.model.spec().expanded_blocks())
        {
            assert_eq!(before.attention, after.attention);
            assert_eq!(after.feedforward.unwrap().hidden(), 12);
        }
    }
}

#[test]
fn ranks_of_nothing_other_mixers_and_missing_data_are_refused() {
    let (gated, data) = (model(GATED, 1), windows(10, 4));
    let error = compress(&gated, &data, &Settings::default(), 0.05, |_| {});
    let error = error.unwrap_err().to_string();
    assert!(error.contains("at least 1"), "{error}");
    let method = Method::find("lorap").unwrap();
    let plan = method.plan(&Task::new(&gated), &Budget::Keep(0.5)).unwrap();
    let error = method
        .apply(&Task::new(&gated), &plan)
        .unwrap_err()
        .to_string();
    assert!(error.contains("data of lorap"), "{error}");
    let wrong = settings(LorapSettings {
        ratio: 0.0,
        ..LorapSettings::default()
    });
    assert!(method.requirements(&gated, &wrong).is_err());
    let other = compress(&gated, &data, &Settings::default(), 0.5, |plan| {
        plan.modules[0].path = "blocks.7.attention.query".to_owned();
    });
    assert!(other.unwrap_err().to_string().contains("blocks.7"));
}
