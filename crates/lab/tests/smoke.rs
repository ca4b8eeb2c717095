//! Every system runs at the smallest scale, and what is exact at any scale holds there.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_lab::{Reproduction, Scale, Setting, Verdict, find, systems};

fn smoke(slug: &str) -> Reproduction {
    let setting = Setting {
        scale: Scale::Smoke,
        seed: 1,
        ..Setting::default()
    };
    find(slug).unwrap().reproduce(&setting).unwrap()
}

/// It has claims, none fails (those that need training say so), figures can be drawn.
fn check(slug: &str) -> Reproduction {
    check_but(slug, &[])
}

/// As [`check`], for a system of which some claims are known not to hold at this scale.
fn check_but(slug: &str, failing: &[&str]) -> Reproduction {
    let reproduction = smoke(slug);
    assert_eq!(reproduction.slug, slug);
    assert!(!reproduction.setting.is_empty());
    assert!(!reproduction.claims.is_empty());
    assert!(
        reproduction
            .claims
            .iter()
            .any(|claim| claim.verdict == Verdict::Holds)
    );
    for claim in &reproduction.claims {
        let fails = failing.contains(&claim.claim.as_str());
        assert_eq!(claim.verdict == Verdict::DoesNotHold, fails, "{claim:?}");
        assert!(
            !claim.measured.is_empty() && !claim.published.is_empty(),
            "{claim:?}"
        );
    }
    for plot in &reproduction.plots {
        assert!(plot.to_svg().unwrap().contains("<svg"));
    }
    reproduction
}

#[test]
fn chefer() {
    check("chefer");
}

#[test]
fn associative_memory() {
    check("associative-memory");
}

#[test]
fn clustering() {
    check("clustering");
}

#[test]
fn talking_heads() {
    check("talking-heads");
}

#[test]
fn attention_output_saes() {
    check("attention-output-saes");
}

#[test]
fn clip_text_decomposition() {
    check("clip-text-decomposition");
}

#[test]
fn decomposition_xai() {
    check("decomposition-xai");
}

#[test]
fn contextual_decomposition() {
    check("contextual-decomposition");
}

#[test]
fn decompx() {
    check("decompx");
}

#[test]
fn fastmax() {
    check("fastmax");
}

#[test]
fn kernelized_transformer() {
    check("kernelized-transformer");
}

#[test]
fn lion() {
    check("lion");
}

#[test]
fn linformer() {
    check("linformer");
}

#[test]
fn fire() {
    check("fire");
}

#[test]
fn mixers() {
    check("mixers");
}

#[test]
fn white_box() {
    check_but("crate", &["and signal over noise rises for as many"]);
}

#[test]
fn fusegpt() {
    check("fusegpt");
}

#[test]
fn fwsvd() {
    check("fwsvd");
}

#[test]
fn hidden_geometry() {
    check("hidden-geometry");
}

#[test]
fn information_pathways() {
    check("information-pathways");
}

#[test]
fn introduction_to_transformers() {
    let reproduction = check("introduction-to-transformers");
    let holds = reproduction
        .claims
        .iter()
        .filter(|claim| claim.verdict == Verdict::Holds);
    assert_eq!(holds.count(), 10, "every property of the block");
}

#[test]
fn logit_attribution() {
    let first = check("logit-attribution");
    let again = smoke("logit-attribution");
    let measured = |found: &Reproduction| -> Vec<String> {
        found
            .claims
            .iter()
            .map(|claim| claim.measured.clone())
            .collect()
    };
    assert_eq!(
        measured(&first),
        measured(&again),
        "the same seed, another result"
    );
}

#[test]
fn entropy_pruning() {
    check("entropy-pruning");
}

#[test]
fn linearity() {
    check("linearity");
}

#[test]
fn mamba_shedder() {
    check("mamba-shedder");
}

#[test]
fn pruning_study() {
    check("pruning-study");
}

#[test]
fn qdsformer() {
    check("qdsformer");
}

#[test]
fn tree_field_integrators() {
    check("tree-field-integrators");
}

#[test]
fn rducb() {
    check("rducb");
}

#[test]
fn replaceme() {
    check("replaceme");
}

#[test]
fn slicegpt() {
    check("slicegpt");
}

#[test]
fn over_squashing() {
    check("over-squashing");
}

#[test]
fn curvature_edit() {
    check("curvature-edit");
}

#[test]
fn compression_survey() {
    check("compression-survey");
}

#[test]
fn dotresize() {
    check("dotresize");
}

#[test]
fn lorap() {
    check("lorap");
}

#[test]
fn modegpt() {
    check("modegpt");
}

#[test]
fn sparse_transformer() {
    check("sparse-transformer");
}

#[test]
fn reformer() {
    check("reformer");
}

#[test]
fn combiner() {
    check("combiner");
}

#[test]
fn soft() {
    check("soft");
}

#[test]
fn ecoformer() {
    check("ecoformer");
}

#[test]
fn mra() {
    check("mra");
}

#[test]
fn fit() {
    check("fit");
}

#[test]
fn vcc() {
    check("vcc");
}

#[test]
fn wavspa() {
    check("wavspa");
}

#[test]
fn every_system_is_tested_here() {
    let slugs: Vec<&str> = systems().iter().map(|system| system.slug).collect();
    assert_eq!(
        slugs,
        [
            "associative-memory",
            "attention-output-saes",
            "chefer",
            "clip-text-decomposition",
            "clustering",
            "combiner",
            "compression-survey",
            "contextual-decomposition",
            "crate",
            "curvature-edit",
            "decomposition-xai",
            "decompx",
            "dotresize",
            "ecoformer",
            "entropy-pruning",
            "fastmax",
            "fire",
            "fit",
            "fusegpt",
            "fwsvd",
            "hidden-geometry",
            "information-pathways",
            "introduction-to-transformers",
            "kernelized-transformer",
            "linearity",
            "linformer",
            "lion",
            "logit-attribution",
            "lorap",
            "mamba-shedder",
            "mixers",
            "modegpt",
            "mra",
            "over-squashing",
            "pruning-study",
            "qdsformer",
            "rducb",
            "reformer",
            "replaceme",
            "slicegpt",
            "soft",
            "sparse-transformer",
            "talking-heads",
            "tree-field-integrators",
            "vcc",
            "wavspa",
        ]
    );
    assert!(find("decompy").unwrap_err().to_string().contains("decompx"));
}
