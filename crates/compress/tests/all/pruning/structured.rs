//! Heads and features that go whole.

use crate::common::{
    DECODER, GATED, altered, close, cut, cut_by, model, scores, values, weights, windows, zeros,
};
use lapidary_compress::{CalibrationData, Change, Content, Selection, Settings};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Model, Pass};
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::Trace;

/// Of a decoder with four hidden features that nothing reads, first order takes just those.
#[test]
fn planted_useless_features_go_and_nothing_else_does() {
    let useless = [3usize, 7, 8, 20];
    let decoder = model(DECODER, 6);
    let mut planted = decoder;
    for block in 0..2 {
        let name = format!("blocks.{block}.feedforward.down.weight");
        planted = altered(&planted, &name, |down| {
            let mask: Vec<f64> = (0..24)
                .map(|feature| f64::from(u8::from(!useless.contains(&feature))))
                .collect();
            let mask = Tensor::from_vec(mask, (1, 24), &Device::Cpu).unwrap();
            down.broadcast_mul(&mask).unwrap()
        });
    }
    let data = windows(6, 6);
    let selection = Selection::layers(["blocks.*.feedforward.*"]);
    let share = useless.len() as f64 / 24.0;
    let by = |method: &str| {
        let settings = Settings {
            selection: selection.clone(),
            ..Settings::default()
        };
        cut_by(&planted, &data, method, 1.0 - share, &settings).unwrap()
    };
    let found = by("first-order");
    close(
        &scores(&found.model, &data),
        &scores(&planted, &data),
        1e-12,
    );
    for block in 0..2 {
        let up = &weights(&found.model)[&format!("blocks.{block}.feedforward.up")];
        for (feature, row) in up.chunks(16).enumerate() {
            let expected = if useless.contains(&feature) { 16 } else { 0 };
            assert_eq!(zeros(row), expected, "block {block}, feature {feature}");
        }
    }
    // Whole features by the same score.
    let narrow = cut(&planted, &data, "channel-gradient", 1.0 - share);
    assert!(
        narrow
            .report
            .modules
            .iter()
            .all(|module| module.change == Change::Narrow { features: 20 })
    );
    close(
        &scores(&narrow.model, &data),
        &scores(&planted, &data),
        1e-12,
    );
}

/// What each block's attention writes.
fn written(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut all = Vec::new();
    for example in data.examples() {
        let Content::Tokens { ids, .. } = &example.content else {
            continue;
        };
        let trace = Trace::new().capture("blocks.*.attention.out").unwrap();
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model
            .forward(&lapidary_model::Input::tokens(ids), pass)
            .unwrap();
        for record in trace.records().into_values() {
            all.extend(values(record.signal.value()));
        }
    }
    all
}

const BUCKETS: &str = r#"
width = 16
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4, causal = true, position = { kind = "relative-buckets", buckets = 4 }, query_key_norm = { norm = { kind = "rms" }, per_head = true } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
"#;

/// A model without some heads writes what it does with their columns of the output zero.
#[test]
fn a_head_taken_out_is_a_head_that_nothing_reads() {
    for (spec, heads, groups) in [(DECODER, 4, 4), (GATED, 4, 2), (BUCKETS, 4, 4)] {
        let whole = model(spec, 7);
        let data = windows(5, 7);
        let found = cut(&whole, &data, "prune-heads", 0.5);
        let mut masked = whole.parameters().clone();
        let each = heads / groups;
        let mut left = 0;
        for (block, spec) in found.model.spec().expanded_blocks().iter().enumerate() {
            let MixerSpec::MultiHead(attention) = &spec.attention else {
                panic!("{spec:?}");
            };
            left += attention.groups();
            assert!(attention.groups() >= 1 && attention.heads == each * attention.groups());
            // Which groups stay is found again by their values, which differ.
            let path = format!("blocks.{block}.attention");
            let rows = |model: &Model| -> Vec<Vec<f64>> {
                let value = values(&model.parameters()[&format!("{path}.value.weight")]);
                value.chunks(4 * 16).map(<[f64]>::to_vec).collect()
            };
            let kept = rows(&found.model);
            let mask: Vec<f64> = rows(&whole)
                .iter()
                .flat_map(|group| {
                    let stays = f64::from(u8::from(kept.contains(group)));
                    std::iter::repeat_n(stays, 4 * each)
                })
                .collect();
            assert_eq!(mask.iter().sum::<f64>() as usize, 4 * attention.heads);
            let name = format!("{path}.output.weight");
            let mask = Tensor::from_vec(mask, (1, 16), &Device::Cpu).unwrap();
            let output = masked[&name].broadcast_mul(&mask).unwrap();
            masked.insert(name, output);
        }
        assert_eq!(left, groups, "half of the groups of two blocks");
        let masked = Model::new(whole.spec().clone(), &mut masked).unwrap();
        close(&scores(&found.model, &data), &scores(&masked, &data), 1e-12);
        close(
            &written(&found.model, &data),
            &written(&masked, &data),
            1e-12,
        );
        assert!(found.report.after.parameters < found.report.before.parameters);
        assert!(found.report.after.flops_per_token < found.report.before.flops_per_token);
    }
}

/// A head whose output is nothing has no gradient and goes first, whatever block it is in.
#[test]
fn planted_useless_heads_go() {
    let whole = model(DECODER, 9);
    let planted = altered(&whole, "blocks.1.attention.output.weight", |output| {
        let mask: Vec<f64> = (0..16)
            .map(|i| f64::from(u8::from(i / 4 == 2 || i / 4 == 3)))
            .collect();
        let mask = Tensor::from_vec(mask, (1, 16), &Device::Cpu).unwrap();
        output.broadcast_mul(&mask).unwrap()
    });
    let data = windows(5, 9);
    let found = cut(&planted, &data, "prune-heads", 0.75);
    let changes: Vec<&Change> = found
        .report
        .modules
        .iter()
        .map(|module| &module.change)
        .collect();
    assert!(matches!(changes[0], Change::Leave { .. }));
    assert_eq!(changes[1], &Change::FewerHeads { heads: 2 });
    close(
        &scores(&found.model, &data),
        &scores(&planted, &data),
        1e-12,
    );
}
