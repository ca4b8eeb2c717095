//! Models whose tokens are organised: what can be cut of them, and what is refused before any work.
#![allow(clippy::unwrap_used)]

use crate::common::{close, cut_by, model, scores, silenced};
use lapidary_compress::{CalibrationData, HealSettings, Method, Settings};
use lapidary_model::ModelSpec;
use lapidary_parts::organisation::OrganisationSpec;

/// Four blocks like these, in such an organisation.
fn spec(causal: bool, organisation: &str) -> String {
    format!(
        "width = 16
        final_norm = {{ kind = 'layer' }}
        input = {{ kind = 'tokens', vocabulary = 20, length = 8 }}
        head = {{ kind = 'language-model' }}
        [[blocks]]
        repeat = 4
        attention = {{ kind = 'multi-head', heads = 4, causal = {causal} }}
        feedforward = {{ kind = 'dense', hidden = 24 }}
        [organisation]
        {organisation}"
    )
}

fn interleaved() -> String {
    let organisation = "kind = 'interleaved'
        layout = '(2)1(2)'
        group = 4
        groups = 2
        latents = 2
        [organisation.block]
        attention = { kind = 'multi-head', heads = 4, causal = true }
        feedforward = { kind = 'dense', hidden = 24 }";
    spec(true, organisation)
}

fn vip_centric() -> String {
    let organisation = "kind = 'vip-centric'
        segment_blocks = 1
        segment = 4
        whole_blocks = [2]
        vips = 2
        size = 2
        fine = 1";
    spec(false, organisation)
}

fn data() -> CalibrationData {
    let windows = (0..6).map(|row| (0..8).map(|at| (row * 7 + at * at * 3 + at) % 20).collect());
    CalibrationData::windows(windows).unwrap()
}

/// Methods that say that the organisation of this model's tokens is not theirs.
fn refused(spec: &str) -> Vec<&'static str> {
    let model = model(spec, 3);
    let refused = Method::all().iter().filter(|method| {
        let told = method.requirements(&model, &Settings::default());
        let told = told.err().map(|error| error.to_string());
        told.is_some_and(|told| {
            told.starts_with("the organisation of tokens is ")
                && told.contains(&format!("but must be none for {}", method.name))
        })
    });
    refused.map(|method| method.name).collect()
}

const STREAM: [&str; 5] = [
    "coordinate-magnitude",
    "dotresize",
    "dotresize-shared",
    "slicegpt",
    "slicegpt-shared",
];

#[test]
fn what_an_organisation_cannot_do_without_is_refused_before_the_work() {
    let with_stream = |names: &[&'static str]| {
        let mut all = [names, &STREAM[..]].concat();
        all.sort_unstable();
        all
    };
    let blocks = [
        "block-influence",
        "delete-linear",
        "entropy-blocks",
        "fuse-lora",
        "fusegpt",
        "macro-influence",
        "mamba-shedder",
        "replaceme",
        "replaceme-cosine",
    ];
    let attention = ["attention-cosine", "entropy-attention", "linearise"];
    let middle = ["fuse-lora", "fusegpt", "macro-influence"];
    assert_eq!(refused(&interleaved()), with_stream(&blocks));
    let expected = with_stream(&[&attention[..], &middle[..]].concat());
    assert_eq!(refused(&vip_centric()), expected);
    let expected = with_stream(&[&attention[..], &blocks[..], &["modegpt"]].concat());
    let reversible = spec(true, "kind = 'reversible'");
    assert_eq!(refused(&reversible), expected);
}

#[test]
fn methods_that_go_layer_by_layer_cut_blocks_that_are_counted() {
    let data = data();
    for spec in [interleaved(), vip_centric()] {
        let model = model(&spec, 5);
        for method in ["second-order", "lorap", "dotresize-hidden"] {
            let cut = cut_by(&model, &data, method, 0.6, &Settings::default());
            let cut = cut.unwrap().model;
            assert_eq!(cut.spec().organisation, model.spec().organisation);
            let found = scores(&cut, &data);
            assert!(found.iter().all(|score| score.is_finite()), "{method}");
            assert_ne!(found, scores(&model, &data), "{method}");
        }
    }
}

#[test]
fn blocks_that_are_left_see_what_they_saw() {
    let data = data();
    // The first block sees segments, the third the whole sequence, and the others its compressed form.
    for (silent, segment_blocks, whole_blocks) in [(0, 0, [1]), (1, 1, [1]), (3, 1, [2])] {
        let model = silenced(&model(&vip_centric(), 7), silent);
        let cut = cut_by(&model, &data, "block-influence", 0.75, &Settings::default());
        let cut = cut.unwrap().model;
        let ModelSpec { organisation, .. } = cut.spec();
        let Some(OrganisationSpec::VipCentric(vcc)) = organisation else {
            unreachable!("{organisation:?}");
        };
        assert_eq!(vcc.segment_blocks, segment_blocks, "{silent}");
        assert_eq!(vcc.whole_blocks, whole_blocks, "{silent}");
        close(&scores(&cut, &data), &scores(&model, &data), 1e-9);
    }
}

#[test]
fn hints_ask_for_one_stream() {
    let settings = HealSettings {
        hints: 0.5,
        ..HealSettings::default()
    };
    let two = model(&spec(true, "kind = 'reversible'"), 3);
    let told = settings.objective(&two, &data()).unwrap_err().to_string();
    assert!(
        told.starts_with("weight of hints is 0.5") && told.contains("two streams"),
        "{told}"
    );
    assert!(HealSettings::default().objective(&two, &data()).is_ok());
    let one = model(&interleaved(), 3);
    assert!(settings.objective(&one, &data()).is_ok());
}
