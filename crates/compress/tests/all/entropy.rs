//! Attention and blocks left out by the entropy or the angle they add.
#![allow(clippy::unwrap_used)]
#![allow(clippy::result_large_err, reason = "errors are looked at by tests")]

use crate::common::{
    DECODER, ENCODER, GATED, close, cut_by, model, scores, windows, with_blocks, zeroed,
};
use lapidary_compress::entropy::{EntropyChoice, EntropyProfile, Estimator};
use lapidary_compress::{Change, Compressed, Method, Settings, export_dense};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::state::MixerState;

const ATTENTION: [&str; 2] = ["entropy-attention", "attention-cosine"];

const ESTIMATORS: [Estimator; 3] = [
    Estimator::Neighbours { count: 5 },
    Estimator::Buckets { bins: 10 },
    Estimator::Renyi { order: 4.0 },
];

fn settings(estimator: Estimator, first: usize, last: usize) -> Settings {
    Settings {
        entropy: EntropyChoice {
            estimator,
            first,
            last,
            stages: false,
            ..EntropyChoice::default()
        },
        ..Settings::default()
    }
}

fn removed(compressed: &Compressed) -> Vec<&str> {
    let modules = compressed.report.modules.iter();
    modules
        .filter(|m| m.change == Change::Remove)
        .map(|m| m.path.as_str())
        .collect()
}

#[test]
fn what_writes_nothing_adds_no_entropy_and_goes_first() {
    let data = windows(12, 3);
    for spec in [DECODER, GATED] {
        let whole = model(&with_blocks(spec, 4), 3);
        let silent = zeroed(&whole, "blocks.1.attention.output");
        for estimator in ESTIMATORS {
            let settings = settings(estimator, 0, 0);
            let profile = EntropyProfile::measure(&silent, &data, 4, &settings.entropy).unwrap();
            assert_eq!(profile.attention[1], Some(0.0), "{estimator:?}");
            assert_ne!(profile.attention[2], Some(0.0), "{estimator:?}");
            let empty = zeroed(&silent, "blocks.1.feedforward.down");
            let profile = EntropyProfile::measure(&empty, &data, 4, &settings.entropy).unwrap();
            assert_eq!(profile.blocks[1], 0.0, "{estimator:?}");
        }
        // Entropy may fall elsewhere; the angle cannot.
        let compressed = cut_by(
            &silent,
            &data,
            "attention-cosine",
            0.75,
            &Settings::default(),
        )
        .unwrap();
        assert_eq!(removed(&compressed), ["blocks.1.attention"]);
    }
}

/// A scale of features behind attention is a part of what attention adds.
#[test]
fn what_a_scale_silences_adds_no_entropy_and_goes_first() {
    let data = windows(12, 3);
    for spec in [DECODER, GATED] {
        let scaled = spec.replace("repeat = 2", "repeat = 4\nlayer_scale = 0.5");
        let silent = zeroed(&model(&scaled, 3), "blocks.1.attention_scale");
        for estimator in ESTIMATORS {
            let choice = settings(estimator, 0, 0).entropy;
            let profile = EntropyProfile::measure(&silent, &data, 4, &choice).unwrap();
            assert_eq!(profile.attention[1], Some(0.0), "{estimator:?}");
            assert_ne!(profile.attention[2], Some(0.0), "{estimator:?}");
        }
        let settings = Settings::default();
        let compressed = cut_by(&silent, &data, "attention-cosine", 0.75, &settings).unwrap();
        assert_eq!(removed(&compressed), ["blocks.1.attention"]);
    }
}

#[test]
fn without_attention_is_with_an_output_of_zero_and_caches_nothing() {
    let data = windows(12, 4);
    for method in ATTENTION {
        for spec in [DECODER, GATED] {
            let model = model(&with_blocks(spec, 4), 5);
            let settings = settings(ESTIMATORS[0], 0, 0);
            let compressed = cut_by(&model, &data, method, 0.5, &settings).unwrap();
            let gone = removed(&compressed);
            assert_eq!(gone.len(), 2);
            let zero = gone.iter().fold(zeroed(&model, "nothing"), |model, path| {
                zeroed(&model, &format!("{path}.output"))
            });
            assert_eq!(scores(&compressed.model, &data), scores(&zero, &data));
            let lost: usize = compressed
                .report
                .modules
                .iter()
                .map(|module| module.parameters_before - module.parameters_after)
                .sum();
            let (before, after) = (compressed.report.before, compressed.report.after);
            assert_eq!(before.parameters - after.parameters, lost);

            let mut state = compressed.model.decode_state();
            let ids = Tensor::new(&[[1u32, 7, 3]], &Device::Cpu).unwrap();
            let pass = Pass {
                state: Some(&mut state),
                ..Pass::default()
            };
            compressed.model.forward(&Input::tokens(ids), pass).unwrap();
            for (index, mixer) in state.mixers.iter().enumerate() {
                let left = !gone.contains(&format!("blocks.{index}.attention").as_str());
                assert_eq!(matches!(mixer, MixerState::Cache(_)), left);
                assert_eq!(matches!(mixer, MixerState::Empty), !left);
            }

            // For programs that know no such blocks: the same function, at the original size.
            let dense = export_dense(&compressed.model).unwrap();
            assert_eq!(
                dense.spec().expanded_blocks(),
                model.spec().expanded_blocks()
            );
            assert!(dense.parameters().keys().eq(model.parameters().keys()));
            close(
                &scores(&dense, &data),
                &scores(&compressed.model, &data),
                1e-12,
            );
        }
    }
}

#[test]
fn excluded_blocks_stay_for_every_number_of_removals() {
    let data = windows(8, 6);
    let model = model(&with_blocks(DECODER, 6), 6);
    for (method, prefix) in [("entropy-attention", ".attention"), ("entropy-blocks", "")] {
        for estimator in ESTIMATORS {
            let settings = settings(estimator, 2, 1);
            let mut before: Vec<String> = Vec::new();
            for count in 1..=3 {
                let keep = 1.0 - count as f64 / 6.0;
                let compressed = cut_by(&model, &data, method, keep, &settings).unwrap();
                let gone = removed(&compressed);
                assert_eq!(gone.len(), count);
                for block in [0, 1, 5] {
                    assert!(!gone.contains(&format!("blocks.{block}{prefix}").as_str()));
                }
                // One score for all: whoever went before goes again.
                assert!(before.iter().all(|path| gone.contains(&path.as_str())));
                before = gone.into_iter().map(str::to_owned).collect();
            }
            let error = cut_by(&model, &data, method, 2.0 / 6.0, &settings).unwrap_err();
            assert!(error.to_string().contains("at most 3"), "{error}");
        }
    }
}

/// Of those that may go, those go that add least by a profile of the same data, whichever stay before them.
#[test]
fn those_that_add_least_go() {
    let data = windows(8, 6);
    let model = model(&with_blocks(DECODER, 6), 6);
    for estimator in ESTIMATORS {
        let settings = settings(estimator, 1, 1);
        let measured =
            EntropyProfile::measure(&model, &data, settings.batch, &settings.entropy).unwrap();
        let attention = measured.attention.iter().map(|added| added.unwrap());
        let attention: Vec<f64> = attention.collect();
        for (method, suffix, added) in [
            ("entropy-attention", ".attention", &attention),
            ("entropy-blocks", "", &measured.blocks),
        ] {
            let mut order: Vec<usize> = (1..5).collect();
            order.sort_by(|a, b| added[*a].total_cmp(&added[*b]));
            for count in 1..=3 {
                let keep = 1.0 - count as f64 / 6.0;
                let compressed = cut_by(&model, &data, method, keep, &settings).unwrap();
                let mut gone = removed(&compressed);
                gone.sort_unstable();
                let mut expected: Vec<String> = order[..count]
                    .iter()
                    .map(|block| format!("blocks.{block}{suffix}"))
                    .collect();
                expected.sort_unstable();
                assert_eq!(gone, expected, "{method} by {estimator:?}: {added:?}");
            }
        }
    }
}

#[test]
fn the_first_stage_ends_where_entropy_is_least() {
    let profile = |stream: &[f64]| EntropyProfile {
        stream: stream.to_vec(),
        blocks: stream.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        attention: vec![None; stream.len() - 1],
    };
    assert_eq!(profile(&[5.0, 4.0, 2.0, 3.0, 4.5]).stage(), 2);
    assert_eq!(profile(&[1.0, 2.0, 3.0]).stage(), 0);
    // What only falls leaves no candidate.
    assert_eq!(profile(&[3.0, 2.0, 1.0]).stage(), 2);
}

#[test]
fn blocks_that_read_no_stream_of_all_tokens_are_refused() {
    let data = windows(8, 6);
    let organised = format!("{DECODER}\n[organisation]\nkind = \"reversible\"\n");
    let means = DECODER.replace(", causal = true", "");
    let means =
        format!("{means}\n[organisation]\nkind = \"vip-centric\"\nvips = 2\nsize = 3\nfine = 1\n");
    for (spec, kind) in [(organised, "reversible"), (means, "vip-centric")] {
        let said = EntropyProfile::measure(&model(&spec, 6), &data, 8, &EntropyChoice::default());
        let said = said.unwrap_err().to_string();
        let begin =
            format!("organisation of the model is {kind}, but must be absent for the entropy");
        assert!(said.starts_with(&begin), "{said}");
    }
}

#[test]
fn the_stage_restricts_the_choice() {
    let (data, model) = (windows(8, 6), model(&with_blocks(DECODER, 6), 6));
    let mut settings = settings(ESTIMATORS[0], 0, 0);
    settings.entropy.stages = true;
    let profile = EntropyProfile::measure(&model, &data, 8, &settings.entropy).unwrap();
    let stage = profile.stage();
    let candidates = 6 - stage;
    for count in 1..=5 {
        let keep = 1.0 - count as f64 / 6.0;
        let result = cut_by(&model, &data, "entropy-blocks", keep, &settings);
        match count <= candidates {
            true => {
                let compressed = result.unwrap();
                let index = |path: &&str| path["blocks.".len()..].parse::<usize>().unwrap();
                assert!(removed(&compressed).iter().all(|path| index(path) >= stage));
            }
            false => assert!(result.is_err()),
        }
    }
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    for method in ["entropy-attention", "entropy-blocks", "attention-cosine"] {
        let compressed = cut_by(&model, &data, method, 1.0, &Settings::default()).unwrap();
        assert_eq!(scores(&model, &data), scores(&compressed.model, &data));
    }
}

#[test]
fn models_without_such_attention_are_refused() {
    let mamba = DECODER.replace(
        "attention = { kind = \"multi-head\", heads = 4, causal = true }\nfeedforward = { kind = \"dense\", hidden = 24, activation = \"gelu-tanh\" }",
        "attention = { kind = \"mamba\", state = 3 }",
    );
    for (spec, why) in [(ENCODER, "post-norm"), (&mamba, "mamba-shedder")] {
        for method in ATTENTION {
            let method = Method::find(method).unwrap();
            let error = method
                .requirements(&model(spec, 1), &Settings::default())
                .unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
    // What is left out already is no candidate.
    let (model, data) = (model(DECODER, 2), windows(8, 4));
    let once = cut_by(&model, &data, "attention-cosine", 0.5, &Settings::default()).unwrap();
    let twice = cut_by(
        &once.model,
        &data,
        "attention-cosine",
        0.5,
        &Settings::default(),
    );
    let absent = |model: &Model| {
        let blocks = model.spec().expanded_blocks();
        blocks
            .iter()
            .filter(|block| block.attention == MixerSpec::Absent)
            .count()
    };
    assert_eq!((absent(&once.model), absent(&twice.unwrap().model)), (1, 2));
}

#[test]
fn attention_without_an_output_of_its_own_comes_back_silent() {
    let data = windows(8, 6);
    for with in [
        "sharing = 'all', output = 'tied'",
        "sharing = 'all', output = 'absent'",
        "sharing = 'query-key', output = 'absent'",
        "output = 'absent'",
    ] {
        let spec =
            with_blocks(DECODER, 4).replace("causal = true", &format!("causal = true, {with}"));
        let model = model(&spec, 2);
        let compressed = cut_by(&model, &data, "attention-cosine", 0.5, &Settings::default());
        let compressed = compressed.unwrap().model;
        let blocks = compressed.spec().expanded_blocks();
        let gone = blocks
            .iter()
            .filter(|block| block.attention == MixerSpec::Absent);
        assert_eq!(gone.count(), 2, "{with}");
        let dense = export_dense(&compressed).unwrap();
        assert_eq!(
            dense.spec().expanded_blocks(),
            model.spec().expanded_blocks(),
            "{with}"
        );
        close(&scores(&dense, &data), &scores(&compressed, &data), 1e-12);
    }
}
