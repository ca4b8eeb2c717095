//! Heads that MoDeGPT narrows to a shape that configs can say.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{DECODER, GATED, altered, close, distance, model, scores, windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Method, Plan,
    Settings, Task,
};
use lapidary_kernels::Tensor;
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::position::{KeptPairs, PositionSpec};

/// Rotated heads of eight, in two groups, with biases.
const ROTARY: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, head_width = 8, causal = true, position = { kind = "rotary", theta = 50.0 } }
feedforward = { kind = "gated", hidden = 24 }
[head]
kind = "language-model"
"#;

fn stock() -> Settings {
    let mut settings = Settings::default();
    settings.modegpt.stock = true;
    settings
}

fn compress(
    model: &Model,
    data: &CalibrationData,
    settings: &Settings,
    keep: f64,
    change: impl Fn(&mut Plan),
) -> lapidary_compress::Result<Compressed> {
    let method = Method::find("modegpt").unwrap();
    let requirements = method.requirements(model, settings)?;
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, data, &requirements, options)?;
    let task = Task {
        calibration: Some(&calibration),
        settings: Some(settings),
        ..Task::new(model)
    };
    let mut plan = method.plan(&task, &Budget::Keep(keep))?;
    change(&mut plan);
    method.apply(&task, &plan)
}

fn heads(model: &Model, block: usize) -> MultiHeadSpec {
    match &model.spec().expanded_blocks()[block].attention {
        MixerSpec::MultiHead(spec) => spec.clone(),
        other => panic!("{other:?}"),
    }
}

/// The same heads with pairs of wider ones kept and their scale, as they are without `stock`.
fn spelled_out(narrow: &Model, whole: &MultiHeadSpec, pairs: &[usize]) -> Model {
    let mut spec = narrow.spec().clone();
    spec.blocks = spec.expanded_blocks();
    let factor = (2.0 * pairs.len() as f64).sqrt() * whole.scale(16);
    let mut queries = Vec::new();
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let MixerSpec::MultiHead(attention) = &mut block.attention else {
            panic!("{:?}", block.attention);
        };
        attention.scale = Some(whole.scale(16));
        attention.position = whole.position.clone();
        let PositionSpec::Rotary(rotary) = &mut attention.position else {
            panic!("{:?}", attention.position);
        };
        rotary.kept = Some(KeptPairs {
            of: whole.head_width(16),
            groups: vec![pairs.to_vec(); whole.groups()],
        });
        for part in ["weight", "bias"] {
            queries.push(format!("blocks.{index}.attention.query.{part}"));
        }
    }
    let mut parameters = narrow.parameters().clone();
    for name in queries {
        if let Some(query) = parameters.get_mut(&name) {
            *query = query.affine(1.0 / factor, 0.0).unwrap();
        }
    }
    Model::new(spec, &mut parameters).unwrap()
}

#[test]
fn the_base_and_the_queries_hold_what_pairs_and_scale_would() {
    let (model, data) = (model(ROTARY, 1), windows(12, 4));
    let whole = heads(&model, 0);
    let narrow = compress(&model, &data, &stock(), 0.5, |_| ())
        .unwrap()
        .model;
    for block in 0..2 {
        let own = heads(&narrow, block);
        assert_eq!((own.head_width(16), own.value_width(16)), (4, 4));
        assert_eq!((own.scale, own.scale(16)), (None, 0.5));
        let rotary = own.position.rotary().unwrap();
        assert!(rotary.kept.is_none() && rotary.width.is_none());
    }
    // Two of four pairs, one, two or three apart: θ' = 50^(t / 2).
    let theta = heads(&narrow, 0).position.rotary().unwrap().theta;
    let step = (1..=3).find(|step| (theta / 50f64.powf(*step as f64 / 2.0) - 1.0).abs() < 1e-12);
    let step = step.unwrap();
    let apart = spelled_out(&narrow, &whole, &[0, step]);
    close(&scores(&narrow, &data), &scores(&apart, &data), 1e-9);
    let other = spelled_out(&narrow, &whole, &[0, step % 3 + 1]);
    assert!(distance(&scores(&other, &data), &scores(&apart, &data)) > 1e-6);
}

/// The step is the one whose pairs are worth most: here all but two pairs of the queries are silent.
#[test]
fn the_step_is_that_of_the_pairs_that_count() {
    for (loud, step) in [(1, 1), (2, 2), (3, 3)] {
        let mut model = model(ROTARY, 1);
        for block in 0..2 {
            for part in ["weight", "bias"] {
                let name = format!("blocks.{block}.attention.query.{part}");
                model = altered(&model, &name, |tensor| {
                    // Feature `i` and `i + 4` of each head of eight turn as pair `i`.
                    let rows = tensor.dims()[0];
                    let mask: Vec<f64> = (0..rows)
                        .map(|row| {
                            let pair = row % 8 % 4;
                            f64::from(u8::from(pair == 0 || pair == loud))
                        })
                        .collect();
                    let mut shape = vec![1; tensor.rank()];
                    shape[0] = rows;
                    let mask = Tensor::from_vec(mask, shape, tensor.device());
                    tensor.broadcast_mul(&mask.unwrap()).unwrap()
                });
            }
        }
        let data = windows(12, 4);
        let narrow = compress(&model, &data, &stock(), 0.5, |plan| {
            for module in &mut plan.modules {
                let attention = module.path.ends_with("attention");
                module.change = match attention {
                    true => Change::NarrowHeads {
                        query_key: 4,
                        value: 8,
                    },
                    false => Change::Leave {
                        reason: "only heads".to_owned(),
                    },
                };
            }
        });
        // One width for both is asked for.
        let error = narrow.unwrap_err().to_string();
        assert!(error.contains("one for both"), "{error}");
        let narrow = compress(&model, &data, &stock(), 0.5, |_| ())
            .unwrap()
            .model;
        let theta = heads(&narrow, 1).position.rotary().unwrap().theta;
        let expected = 50f64.powf(f64::from(step) / 2.0);
        assert!((theta / expected - 1.0).abs() < 1e-12, "{theta} {expected}");
    }
}

#[test]
fn whoever_keeps_everything_changes_nothing_and_reasons_are_given() {
    let (model, data) = (model(ROTARY, 1), windows(12, 4));
    let same = compress(&model, &data, &stock(), 1.0, |_| ()).unwrap();
    assert_eq!(scores(&same.model, &data), scores(&model, &data));
    assert!(same.report.notes.is_empty());
    let stock_heads = compress(&model, &data, &stock(), 0.5, |_| ()).unwrap();
    assert!(
        stock_heads.report.notes.is_empty(),
        "{:?}",
        stock_heads.report.notes
    );
    let mut even = Settings::default();
    even.modegpt.smoothing = f64::INFINITY;
    let chosen = compress(&model, &data, &even, 0.5, |_| ()).unwrap();
    let note = chosen.report.notes.join("");
    assert!(
        note.contains("Lapidary directory") && note.contains("no base"),
        "{note}"
    );
    // Positions that are added to the embeddings.
    let decoder = crate::common::model(DECODER, 1);
    let learned = compress(&decoder, &data, &stock(), 0.5, |_| ()).unwrap();
    let note = learned.report.notes.join("");
    assert!(note.contains("rotary only"), "{note}");
}

#[test]
fn heads_of_several_shapes_are_refused() {
    let refused = |spec: &str, words: &str| {
        let error = Method::find("modegpt")
            .unwrap()
            .requirements(&model(spec, 1), &stock());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let rotary = "position = { kind = \"rotary\", theta = 50.0 }";
    let part = "position = { kind = \"rotary\", width = 4 }";
    refused(&ROTARY.replace(rotary, part), "turns whole heads");
    refused(
        &ROTARY.replace("head_width = 8", "head_width = 8, value_width = 4"),
        "as wide as",
    );
    let other = GATED.replace("[head]", &format!("[[blocks]]\n{OTHER}\n[head]"));
    refused(&other, "one as the others");
}

/// A block whose rotation has another base.
const OTHER: &str = r#"norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, causal = true, bias = false, position = { kind = "rotary", theta = 7.0 } }
feedforward = { kind = "gated", hidden = 24 }"#;
