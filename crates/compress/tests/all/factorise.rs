//! The exact properties of factorised models.
#![allow(clippy::unwrap_used, clippy::panic)]

use crate::common::{
    ENCODER, all, altered, at_rank, calibrate, classifier, close, distance, family, model, scores,
    values, windows,
};
use lapidary_compress::factorisation::parameters_after;
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Error, Example, Factorisation,
    Objective, Requirements, Selection, Size, Statistic, export_dense, output_errors,
    two_layer_parameters,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, OpenOptions, Package, Pass};
use lapidary_signal::Trace;
use lapidary_signal::meter::Meter;

#[test]
fn full_rank_gives_the_same_outputs() {
    for (name, model, data) in all() {
        let selection = Selection::default();
        let calibration = calibrate(&model, &data, &selection);
        let expected = scores(&model, &data);
        for method in Factorisation::ALL {
            let full = at_rank(&model, method, &selection, usize::min, &calibration);
            let error = distance(&scores(&full.model, &data), &expected);
            // Kronecker factors from ten examples are singular, and regularised.
            let tolerance = match method {
                Factorisation::GeneralisedFisher | Factorisation::Whitened => 1e-5,
                _ => 1e-9,
            };
            assert!(error < tolerance, "{name} {method}: {error}");
            assert_eq!(full.report.factorised().count(), full.report.modules.len());
        }
    }
}

#[test]
fn factorised_inference_equals_merged_and_two_layers() {
    for (name, model, data) in all() {
        let selection = Selection::default();
        let calibration = calibrate(&model, &data, &selection);
        for method in Factorisation::ALL {
            let plan = method.plan(&model, &selection, &Budget::Keep(0.6)).unwrap();
            let compressed = plan.apply(&model, Some(&calibration)).unwrap();
            let found = scores(&compressed.model, &data);
            assert!(found.iter().all(|score| score.is_finite()));
            assert!(distance(&found, &scores(&model, &data)) > 1e-4);
            let merged = export_dense(&compressed.model).unwrap();
            assert!(merged.spec().low_rank.is_empty());
            assert_eq!(merged.parameter_count(), model.parameter_count());
            close(&scores(&merged, &data), &found, 1e-10);

            let pairs = two_layer_parameters(&compressed.model).unwrap();
            let path = "blocks.1.feedforward.down";
            let pair = ["lin0", "lin1"].map(|name| pairs[&format!("{path}.{name}.weight")].clone());
            let product = pair[1].matmul(&pair[0]).unwrap();
            let weight = &merged.parameters()[&format!("{path}.weight")];
            close(&values(&product), &values(weight), 1e-10);
            assert!(!pairs.contains_key(&format!("{path}.down")), "{name}");
        }
    }
}

#[test]
fn counts_of_parameters_bytes_and_operations_are_exact() {
    for (name, model, data) in all() {
        let selection = Selection::default();
        let calibration = calibrate(&model, &data, &selection);
        let plan = Factorisation::Fwsvd
            .plan(&model, &selection, &Budget::Keep(0.5))
            .unwrap();
        let compressed = plan.apply(&model, Some(&calibration)).unwrap();
        let report = &compressed.report;
        let mut saved = 0;
        for layer in &report.modules {
            let rank = layer.rank().unwrap();
            assert_eq!(layer.parameters_before, layer.input * layer.output);
            assert_eq!(layer.parameters_after, rank * (layer.input + layer.output));
            assert!(2 * layer.parameters_after <= layer.parameters_before);
            saved += layer.parameters_before - layer.parameters_after;
        }
        assert!(saved > 0, "{name}");
        assert_eq!(report.before.parameters - report.after.parameters, saved);
        assert_eq!(report.after.parameters, parameters_after(&plan, &model));
        assert_eq!(report.after.bytes, 8 * compressed.model.parameter_count());
        let fewer = report.before.flops_per_token - report.after.flops_per_token;
        assert_eq!(fewer, 2 * saved);
        // The meter counts what is really done.
        let metered = metered_flops(&model) - metered_flops(&compressed.model);
        assert_eq!(metered, (5 * fewer) as u64, "{name}");
    }
}

#[test]
fn of_experts_the_operations_of_those_that_run_are_counted() {
    let package = Package::open(&family("mixtral"), &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let experts = Selection::layers(["*.experts.*"]);
    let plan = Factorisation::Svd
        .plan(model, &experts, &Budget::Keep(0.5))
        .unwrap();
    let compressed = plan.apply(model, None).unwrap();
    let report = &compressed.report;
    let saved = report.before.parameters - report.after.parameters;
    // Two of four run on a token, and all are as large.
    let fewer = report.before.flops_per_token - report.after.flops_per_token;
    assert!(saved > 0);
    assert_eq!(fewer, 2 * saved * 2 / 4);
    let metered = metered_flops(model) - metered_flops(&compressed.model);
    assert_eq!(metered, (5 * fewer) as u64);
}

/// Of five tokens.
fn metered_flops(model: &Model) -> u64 {
    let meter = Meter::new();
    let counter = meter.clone();
    let trace = Trace::new()
        .replace("embeddings", move |_, signal| {
            Ok(signal.into_metered(counter.clone()))
        })
        .unwrap();
    let ids = Tensor::new(&[[1u32, 2, 3, 4, 5]], &Device::Cpu).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    meter.total().flops
}

/// The paper's observation: the weighted error is smaller than plain SVD's, the plain one larger.
#[test]
fn each_method_wins_in_its_own_norm_and_loses_in_the_plain_one() {
    for (name, model, data) in all() {
        let selection = Selection::default();
        let calibration = calibrate(&model, &data, &selection);
        for method in Factorisation::ALL {
            let half = |input: usize, output: usize| input.min(output) / 2;
            let compressed = at_rank(&model, method, &selection, half, &calibration);
            let mut differs = false;
            for layer in &compressed.report.modules {
                let (chosen, plain) = (layer.chosen.unwrap(), layer.plain.unwrap());
                let at = format!("{name} {method} {}: {chosen:?} {plain:?}", layer.path);
                assert!(chosen.weighted <= plain.weighted * (1.0 + 1e-6), "{at}");
                assert!(chosen.unweighted >= plain.unweighted * (1.0 - 1e-9), "{at}");
                assert!(chosen.weighted > 0.0 && chosen.weighted < 1.0, "{at}");
                differs |= chosen.weighted < 0.99 * plain.weighted;
            }
            assert_eq!(differs, method != Factorisation::Svd, "{name} {method}");
        }
    }
}

/// Whitening minimises the very error that is measured at the outputs.
#[test]
fn output_errors_are_measured_and_whitening_has_the_least() {
    for (name, model, data) in all() {
        let selection = Selection::default();
        let calibration = calibrate(&model, &data, &selection);
        let measured: Vec<_> = Factorisation::ALL
            .iter()
            .map(|method| {
                let half = |input: usize, output: usize| input.min(output) / 2;
                let mut compressed = at_rank(&model, *method, &selection, half, &calibration);
                compressed.measure_outputs(&model, &data, 3).unwrap();
                compressed
            })
            .collect();
        let whitened = measured.last().unwrap();
        for compressed in &measured {
            for (layer, best) in compressed
                .report
                .modules
                .iter()
                .zip(&whitened.report.modules)
            {
                let (error, best) = (layer.output_error.unwrap(), best.output_error.unwrap());
                assert!(error > 0.0 && error < 1.0, "{name} {}", layer.path);
                assert!(best <= error * (1.0 + 1e-6), "{name} {}", layer.path);
            }
        }
        for layer in &whitened.report.modules {
            close(
                &[layer.output_error.unwrap()],
                &[layer.chosen.unwrap().weighted],
                1e-5,
            );
        }
        // The same for the merged model, and nothing for a model that is the same.
        let dense = export_dense(&whitened.model).unwrap();
        let errors = output_errors(&model, &dense, &data, 4).unwrap();
        assert_eq!(errors.len(), whitened.report.modules.len());
        for layer in &whitened.report.modules {
            close(&[errors[&layer.path]], &[layer.output_error.unwrap()], 1e-9);
        }
        assert!(output_errors(&model, &model, &data, 4).unwrap().is_empty());
    }
}

#[test]
fn seeing_the_data_a_hundred_times_changes_nothing() {
    let model = model(&classifier(6, 9, 5, true), 4);
    let examples: Vec<Example> = (0..6u32)
        .map(|i| Example::labelled([i, i + 1, (3 * i) % 9], i % 5))
        .collect();
    let selection = Selection::layers(["head.hidden"]);
    let product = |examples: Vec<Example>| {
        let data = CalibrationData::new(examples).unwrap();
        let calibration = calibrate(&model, &data, &selection);
        let compressed = at_rank(
            &model,
            Factorisation::Fwsvd,
            &selection,
            |_, _| 2,
            &calibration,
        );
        let dense = export_dense(&compressed.model).unwrap();
        values(&dense.parameters()["head.hidden.weight"])
    };
    let often = vec![examples.clone(); 100].concat();
    close(&product(often), &product(examples), 1e-9);
}

/// Two of eight features of the pooled vector ever differ from zero, so the loss has no gradient
/// at the weights of the other six: FWSVD at rank 2 keeps the two exactly and spends nothing on
/// the rest, where plain SVD does not know better.
#[test]
fn features_without_gradient_get_no_rank() {
    let base = model(&classifier(8, 12, 8, false), 3);
    let model = altered(&base, "embeddings.tokens.weight", |table| {
        let keep = Tensor::new(&[[1f64, 0., 0., 1., 0., 0., 0., 0.]], &Device::Cpu).unwrap();
        table.broadcast_mul(&keep).unwrap()
    });
    let data = CalibrationData::new(
        (0..10u32)
            .map(|i| Example::labelled([i, (i * 5) % 12, (i * 7) % 12], i % 8))
            .collect(),
    )
    .unwrap();
    let selection = Selection::layers(["head.output"]);
    let expected = scores(&model, &data);
    let plan = |method: Factorisation| {
        let budget = Budget::Ranks([("head.output".to_owned(), 2)].into());
        method.plan(&model, &selection, &budget).unwrap()
    };
    let requirements = Factorisation::Fwsvd
        .requirements(&model, &selection)
        .unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(&model, &data, &requirements, options).unwrap();
    let weighted = plan(Factorisation::Fwsvd)
        .apply(&model, Some(&calibration))
        .unwrap();
    close(&scores(&weighted.model, &data), &expected, 1e-7);
    let plain = plan(Factorisation::Svd).apply(&model, None).unwrap();
    assert!(distance(&scores(&plain.model, &data), &expected) > 0.01);

    let largest = values(&weighted.model.parameters()["head.output.up"])
        .into_iter()
        .chain(values(&weighted.model.parameters()["head.output.down"]))
        .fold(0.0, |m: f64, v| m.max(v.abs()));
    assert!(largest < 10.0, "{largest}");
}

/// A layer that nothing depends on is not weighted by zeros.
#[test]
fn a_layer_without_any_gradient_falls_back_to_plain_svd_and_says_so() {
    let base = model(&classifier(6, 9, 4, true), 3);
    let model = altered(&base, "head.output.weight", |w| w.zeros_like().unwrap());
    let data = CalibrationData::new(vec![Example::labelled([1, 2], 3)]).unwrap();
    let selection = Selection::layers(["head.hidden"]);
    let calibration = calibrate(&model, &data, &selection);
    for method in [Factorisation::Fwsvd, Factorisation::GeneralisedFisher] {
        let compressed = at_rank(&model, method, &selection, |_, _| 2, &calibration);
        let layer = &compressed.report.modules[0];
        assert!(layer.note.as_ref().unwrap().contains("plain SVD"));
        assert_eq!(layer.chosen, layer.plain);
    }
}

#[test]
fn stale_statistics_are_refused() {
    let (_, model, data) = all().remove(1);
    let selection = Selection::default();
    let calibration = calibrate(&model, &data, &selection);
    let plan = Factorisation::Fwsvd
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    let trained = altered(&model, "blocks.1.attention.query.bias", |bias| {
        let mut changed = values(bias);
        changed[3] += 1e-12;
        Tensor::from_vec(changed, bias.shape(), &Device::Cpu).unwrap()
    });
    let error = plan.apply(&trained, Some(&calibration)).unwrap_err();
    assert!(matches!(error, Error::Stale { .. }), "{error}");
    assert!(error.to_string().contains("calibrate it anew"));
    // The same weights in another object are the same weights.
    let same = altered(&model, "blocks.1.attention.query.bias", Tensor::clone);
    assert!(plan.apply(&same, Some(&calibration)).is_ok());
    // A compressed model is another model.
    let compressed = plan.apply(&model, Some(&calibration)).unwrap().model;
    assert!(calibration.check(&compressed).is_err());
}

#[test]
fn missing_statistics_are_named() {
    let (_, model, data) = all().remove(1);
    let selection = Selection::default();
    let plan = Factorisation::Fwsvd
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    let error = plan.apply(&model, None).unwrap_err();
    assert!(matches!(error, Error::NotCollected { .. }));
    let other = Factorisation::ActivationWeighted
        .requirements(&model, &selection)
        .unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(&model, &data, &other, options).unwrap();
    assert_eq!(calibration.objective, None);
    let error = plan.apply(&model, Some(&calibration)).unwrap_err();
    assert!(
        error.to_string().contains("blocks.0.attention.query"),
        "{error}"
    );
    // Plain SVD needs nothing.
    assert!(
        Factorisation::Svd
            .requirements(&model, &selection)
            .unwrap()
            .is_empty()
    );
    let plan = Factorisation::Svd
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    assert!(plan.apply(&model, None).is_ok());
}

#[test]
fn requirements_say_what_they_cost() {
    let (_, model, _) = all().remove(1);
    let selection = Selection::default();
    let fwsvd = Factorisation::Fwsvd
        .requirements(&model, &selection)
        .unwrap();
    assert!(fwsvd.sites().is_empty());
    assert_eq!(fwsvd.gradients().len(), 12);
    // i numbers per layer: five layers of 16 inputs and one of 24, in two blocks.
    assert_eq!(fwsvd.bytes(&model), 8 * 2 * (5 * 16 + 24));
    let whitened = Factorisation::Whitened
        .requirements(&model, &selection)
        .unwrap();
    assert!(whitened.gradients().is_empty());
    // Query, key and value read the same site.
    assert_eq!(whitened.sites().len(), 8);
    assert_eq!(whitened.bytes(&model), 8 * 2 * (3 * 16 * 16 + 24 * 24));
    let both = fwsvd.clone().union(whitened).union(fwsvd);
    assert_eq!(both.statistics.len(), 20);
}

#[test]
fn embeddings_are_factorised_on_request_where_no_head_reads_them() {
    let (_, model, data) = all().remove(0);
    let selection = Selection {
        embeddings: true,
        ..Selection::default()
    };
    for method in Factorisation::ALL {
        let requirements = method.requirements(&model, &selection).unwrap();
        let options = CalibrationOptions::default();
        let calibration = Calibration::collect(&model, &data, &requirements, options).unwrap();
        let plan = method.plan(&model, &selection, &Budget::Keep(0.5)).unwrap();
        let compressed = plan.apply(&model, Some(&calibration)).unwrap();
        let table = &compressed.report.modules[0];
        assert_eq!(table.path, "embeddings.tokens");
        if method == Factorisation::GeneralisedFisher {
            assert_eq!(table.rank(), None);
            continue;
        }
        // 20 tokens of width 16 at half their weights.
        assert_eq!(table.rank(), Some(4));
        assert_eq!(
            compressed.report.after.parameters,
            parameters_after(&plan, &model),
            "{method}"
        );
        let merged = export_dense(&compressed.model).unwrap();
        assert_eq!(merged.spec(), model.spec());
        close(
            &scores(&merged, &data),
            &scores(&compressed.model, &data),
            1e-10,
        );
        if method == Factorisation::Whitened {
            let full = at_rank(&model, method, &selection, usize::min, &calibration);
            assert!(distance(&scores(&full.model, &data), &scores(&model, &data)) < 1e-5);
        }
    }
    let (_, decoder, _) = all().remove(1);
    let plan = Factorisation::Svd
        .plan(&decoder, &selection, &Budget::Keep(0.5))
        .unwrap();
    let compressed = plan.apply(&decoder, None).unwrap();
    let table = &compressed.report.modules[0];
    assert_eq!(table.rank(), None);
    assert!(table.note.as_ref().unwrap().contains("head"));
}

#[test]
fn models_without_a_task_use_the_stated_substitute() {
    let spec = ENCODER.split("[head]").next().unwrap();
    let model = model(spec, 5);
    let data = windows(4, 5);
    let selection = Selection::default();
    let calibration = calibrate(&model, &data, &selection);
    assert_eq!(calibration.objective, Some(Objective::Representation));
    let text = Objective::Representation.to_string();
    assert!(text.contains("in place of a task's loss"));
    let plan = Factorisation::Fwsvd
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    let compressed = plan.apply(&model, Some(&calibration)).unwrap();
    assert_eq!(compressed.report.objective, Some(Objective::Representation));
    assert_eq!(compressed.report.factorised().count(), 12);
}

#[test]
fn data_that_does_not_fit_the_model_is_refused_in_words() {
    let models = all();
    let fisher = |model: &Model, data: &CalibrationData| {
        let selection = Selection::default();
        let requirements = Factorisation::Fwsvd
            .requirements(model, &selection)
            .unwrap();
        let options = CalibrationOptions::default();
        Calibration::collect(model, data, &requirements, options)
            .unwrap_err()
            .to_string()
    };
    let one = CalibrationData::windows([vec![1, 2], vec![3]]).unwrap();
    assert!(fisher(&models[1].1, &one).contains("length of window 1 is 1"));
    let label = CalibrationData::new(vec![Example::labelled([1, 2], 7)]).unwrap();
    assert!(fisher(&models[0].1, &label).contains("largest label is 7"));
    assert!(fisher(&models[1].1, &label).contains("target of the examples"));
    let long = CalibrationData::windows([vec![1; 40]]).unwrap();
    assert!(fisher(&models[1].1, &long).contains("at most 12 tokens"));
    assert!(CalibrationData::new(vec![]).is_err());
    assert!(CalibrationData::windows([vec![]]).is_err());
    let poisoned = altered(&models[1].1, "blocks.0.attention.query.weight", |w| {
        (w * f64::NAN).unwrap()
    });
    assert!(fisher(&poisoned, &windows(2, 1)).contains("not finite"));
}

#[test]
fn the_result_can_be_trained_and_the_original_is_untouched() {
    let (_, model, data) = all().remove(2);
    let before = scores(&model, &data);
    let selection = Selection::layers(["blocks.1.*"]);
    let plan = Factorisation::Svd
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    let compressed = plan.apply(&model, None).unwrap();
    let trainable = compressed.trainable().unwrap();
    assert!(
        trainable
            .variables()
            .contains_key("blocks.1.feedforward.gate.down")
    );
    close(
        &scores(&trainable, &data),
        &scores(&compressed.model, &data),
        1e-14,
    );
    let loss = {
        let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu).unwrap();
        let output = trainable
            .forward(&Input::tokens(ids), Pass::default())
            .unwrap();
        output
            .into_logits()
            .unwrap()
            .into_value()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
    };
    let gradients = loss.backward().unwrap();
    let variable = &trainable.variables()["blocks.1.feedforward.gate.up"];
    assert!(gradients.get(variable.as_tensor()).is_some());
    assert_eq!(scores(&model, &data), before);
    // Compressing a model twice leaves what is factorised already.
    let selection = Selection::default();
    let again = Factorisation::Svd
        .plan(&compressed.model, &selection, &Budget::Keep(0.5))
        .unwrap();
    let twice = again.apply(&compressed.model, None).unwrap();
    assert_eq!(twice.report.factorised().count(), 7);
    assert_eq!(twice.report.modules.len(), 14);
}

#[test]
fn single_precision_models_stay_single_precision() {
    let (_, wide, data) = all().remove(1);
    let mut parameters = wide
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.to_dtype(DType::F32).unwrap()))
        .collect::<std::collections::BTreeMap<_, _>>();
    let model = Model::new(wide.spec().clone(), &mut parameters).unwrap();
    let selection = Selection::default();
    let calibration = calibrate(&model, &data, &selection);
    let layer = "blocks.1.feedforward.up".to_owned();
    let statistic = Statistic::FisherInputs { layer };
    close(
        &calibration.vector(&statistic).unwrap(),
        &calibrate(&wide, &data, &selection)
            .vector(&statistic)
            .unwrap(),
        1e-3,
    );
    for method in Factorisation::ALL {
        let plan = method.plan(&model, &selection, &Budget::Keep(0.5)).unwrap();
        let compressed = plan.apply(&model, Some(&calibration)).unwrap();
        assert_eq!(compressed.model.dtype(), DType::F32);
        let size = Size::of(&compressed.model);
        assert_eq!(size.bytes, 4 * size.parameters);
        let merged = export_dense(&compressed.model).unwrap();
        close(
            &scores(&merged, &data),
            &scores(&compressed.model, &data),
            1e-4,
        );
    }
}

#[test]
fn several_methods_share_one_calibration() {
    let (_, model, data) = all().remove(1);
    let selection = Selection::default();
    let shared = calibrate(&model, &data, &selection);
    for method in Factorisation::ALL {
        let requirements: Requirements = method.requirements(&model, &selection).unwrap();
        let options = CalibrationOptions::default();
        let alone = Calibration::collect(&model, &data, &requirements, options).unwrap();
        for statistic in &requirements.statistics {
            close(
                &values(&shared.tensor(statistic).unwrap()),
                &values(&alone.tensor(statistic).unwrap()),
                1e-10,
            );
        }
    }
}
