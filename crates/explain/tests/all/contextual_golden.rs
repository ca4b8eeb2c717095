//! Contextual decomposition against an independent PyTorch implementation that carries both parts
//! of every activation, `tests/oracles/contextual.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_explain::contextual::{
    Case, Endpoint, Means, Method, Node, NodeScore, Place, Scorer, decompose,
};
use lapidary_explain::{Question, Target};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec};
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the oracle of DecompX wrote about the same model.
#[derive(Deserialize)]
struct Subject {
    spec: ModelSpec,
    input_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Fixture {
    read: StoredNode,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    split: bool,
    stabilise: bool,
    tokens: Vec<OfTokens>,
    nodes: Vec<OfNodes>,
}

#[derive(Deserialize)]
struct OfTokens {
    source: Vec<usize>,
    /// By class.
    relevant: Vec<f64>,
}

#[derive(Deserialize)]
struct OfNodes {
    source: Vec<StoredNode>,
    relevant: Vec<f64>,
    share: f64,
}

#[derive(Clone, Copy, Deserialize)]
struct StoredNode {
    block: usize,
    head: usize,
    position: Option<usize>,
}

impl From<StoredNode> for Node {
    fn from(stored: StoredNode) -> Self {
        Self {
            block: stored.block,
            head: stored.head,
            position: stored.position,
        }
    }
}

fn path(name: &str) -> PathBuf {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    directory.join(name)
}

fn parameters(name: &str, dtype: DType) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path(&format!("decompx-{name}.safetensors"))).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: &safetensors::tensor::TensorView<'_>| {
        let values: Vec<f32> = view
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap();
        tensor.to_dtype(dtype).unwrap()
    };
    let all = stored.tensors().into_iter();
    all.map(|(name, view)| (name, tensor(&view))).collect()
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.1, |m: f64, v| m.max(v.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs() / largest;
        assert!(error < tolerance, "{what}: {found} {expected}");
    }
}

fn assert_golden(name: &str) {
    let json = |file: String| std::fs::read(path(&file)).unwrap();
    let subject = json(format!("decompx-{name}.json"));
    let subject: Subject = serde_json::from_slice(&subject).unwrap();
    let fixture = json(format!("contextual-{name}.json"));
    let fixture: Fixture = serde_json::from_slice(&fixture).unwrap();
    let length = subject.input_ids.len();
    let ids = Tensor::from_slice(&subject.input_ids, (1, length), &Device::Cpu).unwrap();
    let input = Input::tokens(ids);
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F64, 1e-10)] {
        let mut parameters = parameters(name, dtype);
        let model = Model::new(subject.spec.clone(), &mut parameters).unwrap();
        for run in &fixture.runs {
            let rules = ContextualRules {
                attention: match run.split {
                    true => AttentionSplit::Split,
                    false => AttentionSplit::Frozen,
                },
                stabilise: run.stabilise,
            };
            let what = format!("{name} {dtype:?} {rules:?}");
            assert_tokens(&model, &input, run, rules, tolerance, &what);
            assert_nodes(&model, &input, &fixture, run, rules, tolerance, &what);
        }
    }
}

fn assert_tokens(
    model: &Model,
    input: &Input,
    run: &Run,
    rules: ContextualRules,
    tolerance: f64,
    what: &str,
) {
    let sources: Vec<Vec<usize>> = run.tokens.iter().map(|one| one.source.clone()).collect();
    let classes = run.tokens[0].relevant.len();
    let targets: Vec<Target> = (0..classes).map(Target::class).collect();
    let question = Question::new(model, input);
    let (scores, _) = decompose(&question, &targets, &sources, rules).unwrap();
    for (source, expected) in run.tokens.iter().enumerate() {
        let found: Vec<f64> = scores.iter().map(|of_class| of_class[source]).collect();
        let what = format!("{what} tokens {:?}", expected.source);
        assert_close(&found, &expected.relevant, tolerance, &what);
    }
}

fn assert_nodes(
    model: &Model,
    input: &Input,
    fixture: &Fixture,
    run: &Run,
    rules: ContextualRules,
    tolerance: f64,
    what: &str,
) {
    let means = Means::over_positions(model, &[input]).unwrap();
    let method = Method::Contextual(rules, NodeScore::Share);
    let sources: Vec<Vec<Node>> = run
        .nodes
        .iter()
        .map(|one| one.source.iter().copied().map(Node::from).collect())
        .collect();
    let classes = run.nodes[0].relevant.len();
    let mut found = vec![Vec::new(); sources.len()];
    for class in 0..classes {
        let case = Case {
            input: input.clone(),
            target: Target::class(class),
            contrast: None,
        };
        let scorer = Scorer::new(model, &[case], means.clone(), method).unwrap();
        let read = Endpoint::Head(fixture.read.into(), Place::Mixed);
        let ends = [Endpoint::Scores, read];
        let scores = scorer.scores_of_sets(&sources, &ends).unwrap();
        for ((found, scores), expected) in found.iter_mut().zip(scores).zip(&run.nodes) {
            found.push(scores[0]);
            assert_close(&[scores[1]], &[expected.share], tolerance, what);
        }
    }
    for (found, expected) in found.iter().zip(&run.nodes) {
        assert_close(found, &expected.relevant, tolerance, what);
    }
}

#[test]
fn a_bert_classifier_is_split_as_published() {
    assert_golden("bert");
}

#[test]
fn a_gpt2_decoder_is_split_as_published() {
    assert_golden("gpt2");
}
