//! What an organisation lets blocks see is not taken for the sequence.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::{DECODER, generator, model, tokens};
use lapidary_explain::analyses::channels::Heads;
use lapidary_explain::analyses::geometry::{Bounds, Reading};
use lapidary_explain::analyses::prefix_induction::{PrefixDraws, prefix_induction};
use lapidary_explain::analyses::squashing::{Directions, Flow, jacobian_norms, path_bound};
use lapidary_explain::analyses::{attention, clustering, components, geometry, linearity};
use lapidary_explain::{Error, Options, Question, Target, difference, explainer};
use lapidary_model::Model;

/// Groups of four tokens, and latents between them.
fn groups() -> Model {
    let organisation = r#"
[organisation]
kind = "interleaved"
layout = "(1)1(1)"
group = 4
groups = 3
latents = 2
[organisation.block]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 24 }
"#;
    model(&format!("{DECODER}{organisation}"), 3)
}

/// Two tokens, and means of three of the others.
fn means() -> Model {
    let organisation = "\n[organisation]\nkind = \"vip-centric\"\nvips = 2\nsize = 3\nfine = 1\n";
    let both_ways = DECODER.replace(", causal = true", "");
    model(&format!("{both_ways}{organisation}"), 4)
}

/// Two streams, both of which come out.
fn streams() -> Model {
    let organisation = "\n[organisation]\nkind = \"reversible\"\noutput = \"concatenated\"\n";
    model(&format!("{DECODER}{organisation}"), 5)
}

const IDS: [u32; 11] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5];

#[track_caller]
fn assert_refused<T>(found: Result<T, Error>, kind: &str, what: &str) {
    let said = found.map(|_| ()).unwrap_err().to_string();
    let begin = format!("organisation of the model is {kind}, but must be absent");
    assert!(said.starts_with(&begin), "{what}: {said}");
}

#[test]
fn groups_and_means_are_not_explained_as_sequences() {
    let input = tokens(&IDS);
    for (model, kind) in [(groups(), "interleaved"), (means(), "vip-centric")] {
        let question = Question::new(&model, &input);
        for method in [
            "alti",
            "alti-logit",
            "attention-gradcam",
            "attention-rollout",
            "chefer",
            "partial-lrp",
            "raw-attention",
        ] {
            let found = explainer(method).unwrap();
            let found = found.explain(&question, Target::class(1), &Options::default());
            assert_refused(found, kind, method);
        }
        assert_refused(attention::head_patterns(&question), kind, "heads");
        assert_refused(clustering::layers(&question), kind, "clusters");
        assert_refused(path_bound(&question), kind, "paths");
        assert_refused(
            components::report(&question, None, 2, &[]),
            kind,
            "components",
        );
        let outside = components::report(&question, Some("embeddings"), 2, &[]).unwrap();
        let note = "11 tokens of 1 sequence(s) at embeddings";
        assert_eq!(outside.notes, [note], "{kind}");
        let windows = vec![IDS.to_vec(); 4];
        let found = geometry::layers(&model, &windows, Reading::default(), Bounds::default());
        assert_refused(found, kind, "geometry");
        assert_refused(linearity::linearity(&model, &windows, 2), kind, "linearity");
        let draws = PrefixDraws {
            alphabet: &[1, 2, 3, 4],
            start: None,
            longest: 2,
            draws: 3,
            length: 10,
        };
        let found = prefix_induction(&model, draws, &mut generator(1));
        assert_refused(found, kind, "prefixes");
        // Contributions that go through any part are still there, and are the explained number.
        let found = explainer("decompx").unwrap();
        let found = found
            .explain(&question, Target::class(1), &Options::default())
            .unwrap();
        let account = &found.account;
        let left = account.explained - account.attributed;
        assert!(left.abs() < 1e-9, "{kind}: {left:e}");
        // What arrives at a block is a part of the whole: it is not said to be all that passes there.
        for method in ["cp-lrp", "attnlrp", "gradient-x-input"] {
            let found = explainer(method).unwrap();
            let found = found.explain(&question, Target::class(1), &Options::default());
            assert!(found.unwrap().account.leaks.is_empty(), "{kind}: {method}");
        }
    }
}

/// An organisation without parameters beside the same model without it: what both have at each token is compared.
#[test]
fn a_model_is_compared_with_itself_organised() {
    let plain = model(&DECODER.replace(", causal = true", ""), 4);
    let (input, organised) = (tokens(&IDS), means());
    let questions = [&plain, &organised].map(|model| Question::new(model, &input));
    let names: Vec<String> = IDS.iter().map(u32::to_string).collect();
    let method = explainer("decompx").unwrap();
    let [before, after] = &questions;
    let target = Target::class(1);
    let found = difference(before, after, target, method, &names, &Options::default()).unwrap();
    let sites: Vec<&str> = found.sites.iter().map(|site| site.site.as_str()).collect();
    assert_eq!(sites, ["embeddings"]);
    assert!(found.explained.0 != found.explained.1);
    let same = difference(after, after, target, method, &names, &Options::default()).unwrap();
    assert_eq!(same.sites.len(), 3);
}

#[test]
fn two_streams_have_weights_but_no_stream_between_blocks() {
    let (input, model) = (tokens(&IDS), streams());
    let question = Question::new(&model, &input);
    for method in ["alti", "alti-logit"] {
        let found = explainer(method).unwrap();
        let found = found.explain(&question, Target::class(1), &Options::default());
        assert_refused(found, "reversible", method);
    }
    let windows = vec![IDS.to_vec(); 4];
    let found = geometry::layers(&model, &windows, Reading::default(), Bounds::default());
    assert_refused(found, "reversible", "geometry");
    // Heads write to the one and read the other.
    let said = Heads::of(&model).map(|_| ()).unwrap_err().to_string();
    assert!(
        said.starts_with("organisation of the model is reversible, but must be another"),
        "{said}"
    );
    assert!(Heads::of(&groups()).is_ok());
    let patterns = attention::head_patterns(&question).unwrap();
    assert_eq!(patterns.len(), 8);
    assert!(patterns.iter().all(|head| head.weights.len() == IDS.len()));
}

/// What comes out is twice as wide as what goes in: norms are of the tokens that went in.
#[test]
fn jacobians_are_of_what_goes_in() {
    let (input, model) = (tokens(&IDS), streams());
    let question = Question::new(&model, &input);
    let found = jacobian_norms(&question, Flow::All, Directions::Every).unwrap();
    let operator = found.operator.unwrap();
    assert_eq!(
        (operator.len(), found.frobenius.len()),
        (IDS.len(), IDS.len())
    );
    for (operator, frobenius) in operator.iter().zip(&found.frobenius) {
        assert!(*operator > 0.0 && *operator <= frobenius * (1.0 + 1e-9));
    }
}

/// A sequence too short for the longest prefix says which one it is long enough for.
#[test]
fn prefixes_that_have_no_room_are_named() {
    let model = model(DECODER, 1);
    let said = |longest| {
        let draws = PrefixDraws {
            alphabet: &[1, 2, 3, 4],
            start: Some(0),
            longest,
            draws: 1,
            length: 12,
        };
        prefix_induction(&model, draws, &mut generator(1)).map_err(|error| error.to_string())
    };
    assert_eq!(
        said(5).unwrap_err(),
        "longest prefix is 5, but must be at most 4, which the model's 12 tokens have room for twice"
    );
    assert_eq!(said(4).unwrap().len(), 8);
}

/// A mixer without keys: the sentence names a site that is there.
#[test]
fn sites_that_are_not_written_name_one_that_is() {
    let mixer = r#"attention = { kind = "mamba", inner = 16, state = 4, step_rank = 2 }"#;
    let line = DECODER.lines().find(|line| line.starts_with("attention"));
    let model = model(&DECODER.replace(line.unwrap(), mixer), 1);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let said = components::report(&question, None, 2, &[]).unwrap_err();
    let said = said.to_string();
    assert!(said.contains("(--site), such as blocks.1.out"), "{said}");
    assert!(components::report(&question, Some("blocks.1.out"), 2, &[]).is_ok());
}
