//! Generated prompts with known roles, on a small random decoder whose byte-level tokenizer is made
//! here: some words are one token of it, others are not.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::Path;

use assert_cmd::Command;
use lapidary_explain::analyses::autoencoder::rank_features;
use lapidary_explain::autoencoder::{Autoencoder, Edit, edited, save, splice};
use lapidary_explain::contextual::{Ablation, Means, Metric};
use lapidary_explain::tasks::{Generated, Prompt, Task};
use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, Model, ModelSpec, Package, Pass, Tokenizer};
use lapidary_signal::Trace;
use serde_json::{Value, json};

/// Words that are one token with the space before them; `Kate` and `garden` are not, and neither
/// are years from 60 on.
const WORDS: [&str; 14] = [
    "Mary", "John", "Tom", "Anna", "school", "market", "book", "ring", "war", "trade", "and",
    "the", "to", "a",
];

fn tokenizer() -> Tokenizer {
    let printable = |byte: &u8| matches!(byte, 33..=126);
    let mut tokens: Vec<String> = (0..=255u8)
        .filter(printable)
        .map(|byte| char::from(byte).to_string())
        .collect();
    tokens.push("Ġ".to_owned());
    let mut merges: Vec<(String, String)> = Vec::new();
    let mut merge = |left: &str, right: &str, tokens: &mut Vec<String>| {
        let pair = (left.to_owned(), right.to_owned());
        if !merges.contains(&pair) {
            merges.push(pair);
            tokens.push(format!("{left}{right}"));
        }
    };
    for word in WORDS.iter().copied().chain(["17"]) {
        let mut before = "Ġ".to_owned();
        for letter in word.chars() {
            merge(&before, &letter.to_string(), &mut tokens);
            before.push(letter);
        }
    }
    for year in 0..60 {
        let year = format!("{year:02}");
        merge(&year[..1], &year[1..], &mut tokens);
    }
    let vocabulary: serde_json::Map<String, Value> = tokens
        .into_iter()
        .zip(0u32..)
        .map(|(token, id)| (token, id.into()))
        .collect();
    let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({
        "version": "1.0",
        "pre_tokenizer": bytes, "post_processor": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    });
    Tokenizer::from_json(Path::new("test"), &json.to_string()).unwrap()
}

fn model(vocabulary: usize) -> Model {
    reading(vocabulary, true)
}

/// One that reads from left to right, where it is causal.
fn reading(vocabulary: usize, causal: bool) -> Model {
    let spec = format!(
        r#"
width = 16
final_norm = {{ kind = "layer" }}
[input]
kind = "tokens"
vocabulary = {vocabulary}
length = 96
position = {{ kind = "learned" }}
[[blocks]]
repeat = 2
attention = {{ kind = "multi-head", heads = 2, causal = {causal} }}
feedforward = {{ kind = "dense", hidden = 24, activation = "gelu-tanh" }}
[head]
kind = "language-model"
"#
    );
    let spec: ModelSpec = toml::from_str(&spec).unwrap();
    Model::new(spec, &mut Initialiser::new(3, DType::F32, Device::Cpu)).unwrap()
}

fn generated(task: Task, template: Option<usize>, seed: u64) -> Generated {
    let mut generator = lapidary_train::generator(seed);
    task.generate(&tokenizer(), template, 24, &mut generator)
        .unwrap()
}

fn read(tokenizer: &Tokenizer, id: usize) -> String {
    tokenizer
        .decode(&[id as u32], true)
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn the_indirect_object_is_who_is_named_once() {
    let tokenizer = tokenizer();
    let found = generated(Task::Ioi, None, 1);
    assert_eq!((found.prompts.len(), found.reference.len()), (24, 24));
    assert!(
        found.notes.iter().any(|note| note.contains("Kate")),
        "{:?}",
        found.notes
    );
    let mut templates = std::collections::BTreeSet::new();
    let mut first = 0;
    for (prompt, reference) in found.prompts.iter().zip(&found.reference) {
        let at = |role: &str| read(&tokenizer, prompt.ids[prompt.role(role).unwrap()] as usize);
        let (object, subject) = (at("IO"), at("S1"));
        assert_eq!(subject, at("S2"));
        assert_ne!(object, subject);
        assert_eq!(prompt.role("S1+1").unwrap(), prompt.role("S1").unwrap() + 1);
        assert_eq!(
            (at("END").as_str(), prompt.role("END").unwrap() + 1),
            ("to", prompt.ids.len())
        );
        assert_eq!(read(&tokenizer, prompt.right[0]), object);
        assert_eq!(read(&tokenizer, prompt.wrong[0]), subject);
        assert_eq!(prompt.text.matches(&subject).count(), 2);
        assert_eq!(prompt.text.matches(&object).count(), 1);
        for refused in ["Kate", "garden", "Laura"] {
            assert!(!prompt.text.contains(refused));
        }
        // The reference differs in the second subject only.
        let differ = prompt.ids.iter().zip(&reference.ids).enumerate();
        let differ: Vec<usize> = differ
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .collect();
        assert_eq!(differ, [prompt.role("S2").unwrap()]);
        let example = prompt.example();
        assert_eq!(example.evidence, [prompt.role("IO").unwrap()]);
        templates.insert(prompt.template);
        first += usize::from(prompt.role("IO") < prompt.role("S1"));
    }
    assert!(
        templates.len() > 3 && (4..20).contains(&first),
        "{templates:?} {first}"
    );
    assert_eq!(found, generated(Task::Ioi, None, 1));
    assert_ne!(found, generated(Task::Ioi, None, 2));
    let of_one = generated(Task::Ioi, Some(2), 1).prompts;
    assert!(
        of_one
            .iter()
            .all(|p| p.template == 2 && p.roles == of_one[0].roles)
    );
}

#[test]
fn later_years_are_right() {
    let tokenizer = tokenizer();
    let found = generated(Task::GreaterThan, None, 1);
    for (prompt, reference) in found.prompts.iter().zip(&found.reference) {
        let at = |role: &str| read(&tokenizer, prompt.ids[prompt.role(role).unwrap()] as usize);
        assert_eq!((at("XX"), at("END")), ("17".to_owned(), "17".to_owned()));
        assert_eq!(prompt.role("END").unwrap() + 1, prompt.ids.len());
        let first: u32 = at("YY").parse().unwrap();
        let years = |ids: &[usize]| -> Vec<u32> {
            ids.iter()
                .map(|id| read(&tokenizer, *id).parse().unwrap())
                .collect()
        };
        assert_eq!(years(&prompt.right), (first + 1..60).collect::<Vec<_>>());
        assert_eq!(years(&prompt.wrong), (0..=first).collect::<Vec<_>>());
        let lowest = reference
            .role("YY")
            .map(|at| read(&tokenizer, reference.ids[at] as usize));
        assert_eq!(lowest.as_deref(), Some("00"));
        assert_eq!(prompt.ids.len(), reference.ids.len());
        let example = prompt.example();
        assert!(prompt.right.contains(&example.target));
        assert!(prompt.wrong.contains(&example.foil.unwrap()));
    }
}

#[test]
fn tokenizers_without_the_words_are_refused() {
    let bytes = Tokenizer::byte_level(&[]).unwrap();
    let mut generator = lapidary_train::generator(0);
    for (task, word) in [(Task::Ioi, "Mary"), (Task::GreaterThan, "war")] {
        let said = task
            .generate(&bytes, None, 2, &mut generator)
            .unwrap_err()
            .to_string();
        assert!(said.contains("one token") && said.contains(word), "{said}");
    }
    let said = Task::Ioi
        .generate(&tokenizer(), Some(12), 2, &mut generator)
        .unwrap_err();
    assert!(said.to_string().contains("template is 12"), "{said}");
}

/// The measure of the whole model, from its own scores.
fn measured(model: &Model, prompts: &[Prompt], probabilities: bool) -> f64 {
    let of = |prompt: &Prompt| {
        let output = model
            .forward(&prompt.input(model).unwrap(), Pass::default())
            .unwrap();
        let logits = output.logits.unwrap().into_value().get(0).unwrap();
        let scores = logits
            .get(prompt.ids.len() - 1)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap();
        let mut scores: Vec<f64> = scores.to_vec1().unwrap();
        if probabilities {
            let total: f64 = scores.iter().map(|score| score.exp()).sum();
            scores
                .iter_mut()
                .for_each(|score| *score = score.exp() / total);
        }
        let sum = |ids: &[usize]| ids.iter().map(|id| scores[*id]).sum::<f64>();
        sum(&prompt.right) - sum(&prompt.wrong)
    };
    prompts.iter().map(of).sum::<f64>() / prompts.len() as f64
}

#[test]
fn circuits_are_measured_by_each_tasks_own_difference() {
    let model = model(tokenizer().vocabulary_size());
    for (task, metric) in [
        (Task::Ioi, Metric::ScoreDifference),
        (Task::GreaterThan, Metric::ProbabilityDifference),
    ] {
        let found = generated(task, Some(0), 4);
        let cases: Vec<_> = found
            .prompts
            .iter()
            .map(|p| p.case(&model).unwrap())
            .collect();
        let inputs: Vec<_> = found
            .reference
            .iter()
            .map(|p| p.input(&model).unwrap())
            .collect();
        let means = Means::by_position(&model, &inputs.iter().collect::<Vec<_>>()).unwrap();
        let ablation = Ablation::new(&model, &cases, means, metric).unwrap();
        let expected = measured(&model, &found.prompts, task == Task::GreaterThan);
        let difference = (ablation.full() - expected).abs();
        assert!(
            difference < 1e-5 * expected.abs().max(1e-2),
            "{} {expected}",
            ablation.full()
        );
    }
}

fn lapidary(arguments: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = Command::cargo_bin("lapidary").unwrap();
    command
        .args(arguments)
        .env("NO_COLOR", "1")
        .env_remove("RUST_LOG")
        .assert()
}

fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_slice(&lapidary(arguments).success().get_output().stdout).unwrap()
}

#[test]
fn tasks_are_evaluated_and_searched_for_circuits() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let tokenizer = tokenizer();
    let model = model(tokenizer.vocabulary_size());
    let saved = path("model");
    Package::new(model, Some(tokenizer))
        .save(Path::new(&saved), None)
        .unwrap();
    for task in ["ioi", "greater-than"] {
        let found = json_of(&[
            "explain",
            &saved,
            "--evaluate",
            task,
            "--limit",
            "12",
            "--method",
            "random",
            "--unit",
            "word",
            "--json",
        ]);
        assert_eq!(found["examples"], 12);
        assert_eq!(found["rows"][0]["agreement"][0]["count"], found["right"]);
        let circuit = json_of(&[
            "inspect",
            "circuit",
            &saved,
            "--task",
            task,
            "--limit",
            "6",
            "--draws",
            "2",
            "--positions",
            "--json",
        ]);
        let notes = circuit["notes"].to_string();
        let roles = if task == "ioi" { 5 } else { 3 };
        assert!(
            notes.contains("END") && notes.contains("not one token"),
            "{notes}"
        );
        assert!(
            notes.contains(&format!("6 prompts of {task}, {} nodes", 4 * roles)),
            "{notes}"
        );
        assert_eq!(circuit["tables"].as_array().unwrap().len(), 3);
    }
    let refused = lapidary(&["explain", "embedded", "--evaluate", "ioi"])
        .failure()
        .code(1);
    let said = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
    assert!(said.contains("one token"), "{said}");

    // The published file, by its header.
    let rows = ",Sentence_good,one_prefix_prefix,one_prefix_word_good,one_prefix_word_bad,target\n\
                0,x,\"Then, Mary and John met. John gave a book to\",Mary,John,Mary\n\
                1,x,\"After Tom and Anna met, Tom gave a ring to\",Anna,Tom,Anna\n";
    let file = path("ioi.csv");
    std::fs::write(&file, rows).unwrap();
    let circuit = json_of(&[
        "inspect",
        "circuit",
        &saved,
        "--dataset",
        &file,
        "--draws",
        "2",
        "--json",
    ]);
    assert!(circuit["notes"].to_string().contains("2 prompts"));
}

const SITE: &str = "blocks.0.attention.mixed";

fn autoencoder(seed: u64) -> Autoencoder {
    let mut generator = lapidary_train::generator(seed);
    Autoencoder::initialised(SITE, 16, 24, &mut generator).unwrap()
}

/// The right answer's score less the wrong one's, with a feature set to zero at a position.
fn without(model: &Model, prompt: &Prompt, edit: Option<(usize, usize)>) -> f64 {
    let edits: Vec<Edit> = edit
        .into_iter()
        .map(|(feature, position)| Edit::zero(feature).at([position]))
        .collect();
    let change = move |features: &_| edited(features, &edits);
    let trace = splice(Trace::new(), &autoencoder(5), change).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    let output = model.forward(&prompt.input(model).unwrap(), pass).unwrap();
    let logits = output.logits.unwrap().into_value().get(0).unwrap();
    let last = logits.get(prompt.ids.len() - 1).unwrap();
    let scores: Vec<f32> = last.to_vec1().unwrap();
    f64::from(scores[prompt.right[0]]) - f64::from(scores[prompt.wrong[0]])
}

#[test]
fn features_at_a_role_are_ranked_by_what_leaving_each_out_changes() {
    let model = model(tokenizer().vocabulary_size());
    let prompts = generated(Task::Ioi, None, 4).prompts;
    let ranked = rank_features(&model, &autoencoder(5), &prompts, "S2").unwrap();
    assert_eq!(ranked.prompts, prompts.len());
    assert!(!ranked.features.is_empty());
    let sizes: Vec<f64> = ranked.features.iter().map(|of| of.effect.abs()).collect();
    assert!(sizes.is_sorted_by(|a, b| a >= b) && sizes[0] > 0.0);
    let count = prompts.len() as f64;
    let clean: f64 = prompts.iter().map(|one| without(&model, one, None)).sum();
    assert!((ranked.clean - clean / count).abs() < 1e-5);
    // Where a feature is not active, setting it to zero changes nothing, so that all prompts count.
    for of in ranked.features.iter().take(4) {
        let change = |prompt: &Prompt| {
            let position = prompt.role("S2").unwrap();
            without(&model, prompt, Some((of.feature, position))) - without(&model, prompt, None)
        };
        let changed: f64 = prompts.iter().map(change).sum();
        assert!((of.effect - changed / count).abs() < 1e-5, "{of:?}");
        let all = of.effect_where_active * of.prompts as f64;
        assert!((all - changed).abs() < 1e-4, "{of:?}");
    }
    let said = rank_features(&model, &autoencoder(5), &prompts, "XX").unwrap_err();
    assert!(said.to_string().contains("S2"), "{said}");
    assert!(rank_features(&model, &autoencoder(5), &[], "S2").is_err());
}

#[test]
fn the_command_ranks_features_of_a_task() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (saved, sae) = (path("model"), path("sae"));
    let tokenizer = tokenizer();
    Package::new(model(tokenizer.vocabulary_size()), Some(tokenizer))
        .save(Path::new(&saved), None)
        .unwrap();
    save(&autoencoder(5), Path::new(&sae)).unwrap();
    let of = |more: &[&str]| {
        let start = [
            "inspect",
            "sae",
            &saved,
            "--sae",
            &sae,
            "--prompts",
            "6",
            "--json",
        ];
        json_of(&[start.as_slice(), more].concat())
    };
    let found = of(&["--task", "ioi", "--most", "5"]);
    assert_eq!(found["title"], "Features of blocks.0.attention.mixed at S2");
    let rows = found["tables"][0]["rows"].as_array().unwrap();
    assert!(rows.len() <= 5 && !rows.is_empty());
    let found = of(&["--task", "greater-than", "--role", "XX", "--folded-biases"]);
    assert!(found["title"].as_str().unwrap().ends_with("XX"));
}

#[test]
fn curvature_is_of_models_that_read_from_left_to_right() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (saved, text) = (path("model"), path("text"));
    let task = format!("own={text}");
    std::fs::write(&text, "the text is not read").unwrap();
    let tokenizer = tokenizer();
    let model = reading(tokenizer.vocabulary_size(), false);
    Package::new(model, Some(tokenizer))
        .save(Path::new(&saved), None)
        .unwrap();
    let arguments = [
        "inspect",
        "curvature",
        &saved,
        "--text",
        &text,
        "--task",
        &task,
    ];
    let refused = lapidary(&arguments).failure();
    let said = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(said.contains("is a model that sees later tokens"), "{said}");
}
