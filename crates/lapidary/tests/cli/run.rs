//! `run`, `generate`, `train`, `evaluate`, `parts`, `bench`, `demo`.

use super::*;

#[test]
fn runs_on_tensors_at_full_precision() {
    let directory = tempfile::tempdir().unwrap();
    let input = write(
        &directory,
        "in.json",
        br#"{"input_ids": [[3, 4, 5], [6, 7, 1]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}"#,
    );
    let model = family("bert-classifier");
    let document = json(&[
        "run",
        &model,
        "--input",
        &input,
        "--sites",
        "blocks.*.out",
        "--json",
    ]);
    assert_eq!(document["logits"].as_array().unwrap().len(), 2);
    // What each of two blocks gives, and the attention and feed-forward part in it.
    assert_eq!(document["sites"].as_object().unwrap().len(), 6);
    let pixels: Vec<Vec<Vec<f32>>> = vec![vec![vec![0.5; 16]; 16]; 3];
    let pixels = serde_json::to_vec(&serde_json::json!({ "pixel_values": [pixels] })).unwrap();
    let input = write(&directory, "pixels.json", &pixels);
    assert_eq!(
        json(&["run", &family("vit"), "--input", &input, "--json"])["logits"][0]
            .as_array()
            .unwrap()
            .len(),
        5
    );
}

#[test]
fn generation_is_the_same_with_and_without_a_cache() {
    let common = [
        "generate",
        "embedded",
        "--prompt",
        "the capital of",
        "--prompt",
        "the king",
        "--tokens",
        "8",
        "--json",
    ];
    let cached = json(&common);
    let fresh = json(&[&common[..], &["--no-cache"]].concat());
    assert_eq!(cached["sequences"], fresh["sequences"]);
    let sampled = |seed: &str| {
        json(&[&common[..], &["--temperature", "1", "--seed", seed]].concat())["sequences"].clone()
    };
    assert_eq!(sampled("3"), sampled("3"));
    assert_ne!(sampled("3"), sampled("4"));
}

#[test]
fn times_matrices_with_zeros() {
    let arguments = [
        "bench", "sparse", "--width", "16", "--length", "8", "--repeat", "1",
    ];
    let report = json(&[&arguments[..], &["--json"]].concat());
    let rows = report["measured"].as_array().unwrap();
    let dense = rows.iter().find(|row| row["format"] == "dense").unwrap();
    assert_eq!(dense["bytes"], 4 * 64 * 16);
    assert!(rows.iter().any(|row| row["format"] == "CSR"));
    let even = report["csr_breaks_even"]["bytes"].as_f64().unwrap();
    assert!(even > 0.3 && even < 0.5, "{even}");
    lapidary(&arguments).assert().success();
    refused(
        &["bench", "sparse", "--width", "6"],
        &["6", "multiple of 4"],
    );
}

/// A message of a length or a type alone would leave all arrays and numbers to be searched.
#[test]
fn what_is_wrong_in_a_spec_is_told_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let spec = b"steps = 3\nbatch = 2\nlength = 'long'\n[schedule]\npeak = 1e-3\n";
    let spec = write(&directory, "train.toml", spec);
    let out = directory.path().join("run").to_str().unwrap().to_owned();
    refused(
        &["train", &spec, "--out", &out],
        &["train.toml, line 3: ", "\"long\""],
    );
}

#[test]
fn trains_and_resumes_to_the_same_weights() {
    let directory = tempfile::tempdir().unwrap();
    let spec = write(
        &directory,
        "spec.toml",
        br#"
steps = 6
batch = 4
length = 16
[schedule]
peak = 1e-2
[checkpoint]
every = 3
[data]
kind = "copying"
symbols = 7
[model]
width = 16
[model.input]
kind = "tokens"
vocabulary = 8
length = 16
[[model.blocks]]
attention = { kind = "multi-head", heads = 2, causal = true, dropout = 0.1 }
feedforward = { kind = "dense", hidden = 32 }
dropout = 0.1
[model.head]
kind = "language-model"
"#,
    );
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (whole, parts) = (at("whole"), at("parts"));
    output(&["train", &spec, "--out", &whole]);
    // A run that died after its third step leaves a state, and no model.
    output(&["train", &spec, "--out", &parts]);
    std::fs::remove_dir_all(Path::new(&parts).join("model")).unwrap();
    std::fs::remove_dir_all(Path::new(&parts).join("states/step-0000000006")).unwrap();
    output(&["train", &spec, "--out", &parts, "--resume"]);
    let weights =
        |run: &str| std::fs::read(Path::new(run).join("model/model.safetensors")).unwrap();
    assert!(
        weights(&whole) == weights(&parts),
        "the resumed run ends with other weights"
    );
    refused(
        &["train", &spec, "--out", &whole],
        &["holds a run", "--resume"],
    );
}

#[test]
fn what_the_command_line_says_takes_the_place_of_the_spec() {
    let directory = tempfile::tempdir().unwrap();
    let spec = write(
        &directory,
        "spec.toml",
        br#"
seed = 5
steps = 4
batch = 2
length = 8
schedule = { peak = 1e-2 }
data = { kind = "copying", symbols = 7 }
[model]
width = 8
input = { kind = "tokens", vocabulary = 8, length = 8 }
head = { kind = "language-model" }
[[model.blocks]]
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 8 }
"#,
    );
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let weights =
        |run: &str| std::fs::read(Path::new(run).join("model/model.safetensors")).unwrap();
    let runs: [(&str, &[&str], u64); 3] = [
        ("own", &[], 5),
        ("zero", &["--seed", "0"], 0),
        ("five", &["--seed", "5"], 5),
    ];
    for (name, seed, expected) in runs {
        let out = at(name);
        let common = ["train", &spec, "--out", &out, "--steps", "1", "--json"];
        let told = json(&[&common[..], seed].concat());
        assert_eq!(told["seed"], expected, "{name}");
        assert_eq!(told["kept_step"], 1);
        assert_eq!(told["last_validation_loss"], told["validation_loss"]);
        // The run's own spec says so, and goes on without options.
        let own = Path::new(&out).join("run.toml");
        let said = std::fs::read_to_string(&own).unwrap();
        for line in [format!("seed = {expected}"), "steps = 1".to_owned()] {
            assert!(said.lines().any(|other| other == line), "{line}: {said}");
        }
        let own = own.to_str().unwrap();
        let again = json(&["train", own, "--out", &out, "--resume", "--json"]);
        assert_eq!(
            (&again["seed"], &again["steps"]),
            (&told["seed"], &told["steps"])
        );
    }
    assert!(weights(&at("own")) == weights(&at("five")));
    assert!(weights(&at("own")) != weights(&at("zero")));
    assert!(output(&["train", "--help"]).contains("directory of pictures"));
    // Whether weights are the best is asked for in the spec, and told.
    let best = std::fs::read_to_string(&spec).unwrap().replace(
        "schedule =",
        "validation = { every = 2, keep = \"best\" }\nschedule =",
    );
    let spec = write(&directory, "best.toml", best.as_bytes());
    let told = output(&["train", &spec, "--out", &at("best")]);
    assert!(
        told.contains("the least, and") && told.contains("at the end"),
        "{told}"
    );
    assert!(
        told.contains("at step 2") || told.contains("at step 4"),
        "{told}"
    );
}

#[test]
fn trains_on_pictures_without_labels() {
    let directory = tempfile::tempdir().unwrap();
    let text = r#"
steps = 2
batch = 2
[schedule]
peak = 1e-3
[validation]
fraction = 0.25
[data]
kind = "shapes"
count = 8
[self_distillation]
outputs = 8
hidden = 12
bottleneck = 6
crops = { locals = 1 }
[model]
width = 16
final_norm = { kind = "layer" }
input = { kind = "patches", image = [12, 12], patch = 6 }
head = { kind = "pooled" }
[[model.blocks]]
wiring = "replacing"
attention = { kind = "multi-head", heads = 2, sharing = "all", bias = false, output_bias = true }
feedforward = { kind = "sparse-code" }
"#;
    let spec = write(&directory, "spec.toml", text.as_bytes());
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let told = json(&["train", &spec, "--out", &at("run"), "--json"]);
    assert_eq!(told["steps"], 2);
    let entropy = told["teacher_entropy"].as_f64().unwrap();
    assert!((0.0..=8f64.ln() + 1e-6).contains(&entropy));
    assert!(told["teacher_information"].is_f64());
    assert!(
        Path::new(&at("run"))
            .join("model/model.safetensors")
            .is_file()
    );
    // The same from the pictures of a directory, which has to hold some.
    let pictures = text.replace("\"shapes\"\ncount = 8", "\"images\"");
    let spec = write(&directory, "pictures.toml", pictures.as_bytes());
    refused(
        &["train", &spec, "--out", &at("other")],
        &["data.directory is absent", "--data"],
    );
    let none = at("none");
    std::fs::create_dir(&none).unwrap();
    refused(
        &["train", &spec, "--out", &at("other"), "--data", &none],
        &["holds no pictures"],
    );
    for place in 0..4u8 {
        let file = std::fs::File::create(Path::new(&none).join(format!("{place}.png"))).unwrap();
        let mut encoder = png::Encoder::new(file, 16, 20);
        encoder.set_color(png::ColorType::Rgb);
        let pixels: Vec<u8> = (0..16 * 20 * 3)
            .map(|i: u32| (i * (7 + u32::from(place)) % 251) as u8)
            .collect();
        encoder
            .write_header()
            .unwrap()
            .write_image_data(&pixels)
            .unwrap();
    }
    let told = json(&[
        "train",
        &spec,
        "--out",
        &at("other"),
        "--data",
        &none,
        "--json",
    ]);
    assert_eq!(told["steps"], 2);
    // What is refused is refused before pictures are read.
    let missing = at("missing");
    refused(
        &["train", &spec, "--out", &at("other"), "--data", &missing],
        &["holds a run"],
    );
    refused(
        &[
            "train",
            &spec,
            "--out",
            &at("other"),
            "--data",
            &missing,
            "--resume",
        ],
        &["data.directory was", "and is"],
    );
}

#[test]
fn evaluates_with_token_and_window_counts() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings . the king praised himself . ".repeat(20);
    let file = write(&directory, "text.txt", text.as_bytes());
    let document = json(&[
        "evaluate", "embedded", "--text", &file, "--window", "32", "--stride", "16", "--json",
    ]);
    assert_eq!(
        document["scored_tokens"].as_u64().unwrap() + 1,
        document["text_tokens"].as_u64().unwrap()
    );
    assert!(document["perplexity"].as_f64().unwrap() > 1.0);
    assert!(document["ensemble"].is_null());
    // The embedded model draws nothing: it is no ensemble.
    refused(
        &["evaluate", "embedded", "--text", &file, "--ensemble", "3"],
        &["draws nothing at random", "subsampled attention"],
    );
    refused(
        &["evaluate", "embedded", "--text", &file, "--ensemble", "0"],
        &["ensemble is 0", "1024"],
    );
    refused(
        &["evaluate", "embedded", "--text", &file, "--window", "1000"],
        &["window is 1000", "128"],
    );
    let empty = write(&directory, "empty.txt", b"  \n");
    refused(&["evaluate", "embedded", "--text", &empty], &["empty"]);
}

#[test]
fn the_catalogue_measures_every_part() {
    let entries = json(&["parts", "--width", "16", "--length", "8", "--json"]);
    let entries = entries.as_array().unwrap();
    assert!(entries.len() >= 18);
    assert!(
        entries
            .iter()
            .all(|entry| entry["flops"].as_u64().unwrap() > 0)
    );
    refused(
        &["parts", "nonsense", "--width", "16", "--length", "8"],
        &["nonsense"],
    );
}

#[test]
fn the_demo_writes_a_report_without_network_references() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("report.html");
    let text = output(&["demo", "--out", out.to_str().unwrap()]);
    assert!(text.contains("conservation error"));
    let page = std::fs::read_to_string(out).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>"));
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
}

#[test]
fn help_lists_every_verb() {
    insta::assert_snapshot!(output(&["--help"]));
}

/// Another mechanism behind the same weights: how far the outputs move, and a directory that loads.
#[test]
fn attention_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let input = write(&directory, "in.json", br#"{"input_ids": [[3, 4, 5, 6]]}"#);
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for (model, mechanism) in [
        ("gpt2", "fastmax{degree=1}"),
        ("gpt2", "kernelized"),
        (
            "llama",
            "sparse{pattern={kind='strided',stride=2},steps='merged'}",
        ),
        ("bert", "linformer{slots=3,longest=32}"),
        ("bert", "lion{decay='none'}"),
    ] {
        let run = |model: &str, more: &[&str]| {
            json(&[&["run", model, "--input", &input, "--json"], more].concat())
        };
        let replaced = run(&family(model), &["--replace-attention", mechanism]);
        let moved = replaced["distance"]["relative_error_of_hidden"]
            .as_f64()
            .unwrap();
        assert!(moved > 1e-3 && moved.is_finite(), "{mechanism}: {moved}");
        let out = at(&format!("{model}-{}", mechanism.len()));
        let family = family(model);
        output(&[
            "export",
            &family,
            "--replace-attention",
            mechanism,
            "--out",
            &out,
        ]);
        // Nothing that other programs would read as softmax.
        assert!(!Path::new(&out).join("config.json").exists(), "{mechanism}");
        assert_eq!(run(&out, &[])["hidden"], replaced["hidden"], "{mechanism}");
    }
    let same = json(&[
        "run",
        &family("gpt2"),
        "--input",
        &input,
        "--replace-attention",
        "softmax",
        "--json",
    ]);
    assert_eq!(same["distance"]["relative_error_of_hidden"], 0.0);
    refused(
        &[
            "run",
            &family("gpt2"),
            "--input",
            &input,
            "--replace-attention",
            "linformer{slots=3,longest=32}",
        ],
        &[
            "linformer in causal attention",
            "blocks.0.attention.mechanism",
        ],
    );
    refused(
        &[
            "run",
            &family("gpt2"),
            "--input",
            &input,
            "--replace-attention",
            "fastmax{temperature=1e-300}",
        ],
        &["not all finite", "fastmax"],
    );
}

/// What stands at pads means nothing: a mechanism that is softmax at all real tokens is at no distance.
#[test]
fn distances_are_those_of_real_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let input = write(
        &directory,
        "in.json",
        br#"{"input_ids": [[3, 4, 5, 6, 7], [6, 7, 1, 0, 0]], "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}"#,
    );
    for model in ["bert", "bert-masked-lm", "gpt2"] {
        let distance = |mechanism: &str| {
            let arguments = ["--replace-attention", mechanism, "--json"];
            let told =
                json(&[&["run", &family(model), "--input", &input], &arguments[..]].concat());
            let [hidden, scores] = ["relative_error_of_hidden", "divergence"]
                .map(|name| told["distance"][name].as_f64().unwrap_or(0.0));
            hidden.max(scores)
        };
        // Spans of one token each are met as tokens are.
        let same = distance("combiner{form={kind=fixed,segment=1}}");
        assert!(same < 1e-5, "{model}: {same}");
        assert!(distance("combiner{form={kind=fixed,segment=2}}") > 1e-3);
    }
}

/// What CLIP's towers give is an embedding each, and no scores to compare answers of.
#[test]
fn towers_are_told_apart_and_have_no_answers() {
    let directory = tempfile::tempdir().unwrap();
    let pixels: Vec<Vec<Vec<f32>>> = vec![vec![vec![0.5; 16]; 16]; 3];
    let both = serde_json::json!({ "input_ids": [[3, 4, 5]], "pixel_values": [pixels] });
    let input = write(&directory, "in.json", &serde_json::to_vec(&both).unwrap());
    let model = family("clip");
    let run = [
        "run",
        &model,
        "--input",
        &input,
        "--replace-attention",
        "fastmax",
    ];
    let told = json(&[&run[..], &["--json"]].concat());
    let text = output(&run);
    for tower in ["text", "vision"] {
        let distance = &told[tower]["distance"];
        let moved = distance["relative_error_of_hidden"].as_f64().unwrap();
        assert!(moved > 1e-3, "{tower}: {moved}");
        assert!(distance["divergence"].is_null() && distance["same_answer"].is_null());
        let line = format!(
            "{tower}, from the model's own outputs: relative error of hidden vectors {moved:.4}\n"
        );
        assert!(text.contains(&line), "{text}");
    }
    // Only the text is read in order.
    let linformer = "linformer{slots=3,longest=32}";
    refused(
        &[&run[..5], &[linformer]].concat(),
        &["tower text: ", "linformer in causal attention"],
    );
}

/// Texts among a mechanism's fields may be bare, and what is wrong is told by the field's values.
#[test]
fn fields_of_a_mechanism_need_no_quotes() {
    let directory = tempfile::tempdir().unwrap();
    let input = write(&directory, "in.json", br#"{"input_ids": [[3, 4, 5, 6]]}"#);
    let model = family("bert");
    let hidden = |mechanism: &str| {
        let arguments = ["--replace-attention", mechanism, "--json"];
        json(&[&["run", &model, "--input", &input], &arguments[..]].concat())["hidden"].clone()
    };
    for (bare, quoted) in [
        (
            "lion{decay=none,form={kind=chunked,size=2},class_token=true}",
            "lion{decay='none',form={kind=\"chunked\",size=2},class_token=true}",
        ),
        (
            "doubly-stochastic{operator={kind=norm-softmax, over = matrix}}",
            "doubly-stochastic{operator={kind='norm-softmax', over = 'matrix'}}",
        ),
        (
            "lion{image={columns=2,curves=[columns, rows]}}",
            "lion{image={columns=2,curves=['columns', 'rows']}}",
        ),
    ] {
        assert_eq!(hidden(bare), hidden(quoted), "{bare}");
    }
    for (mechanism, words) in [
        ("lion{decay=never}", ["`never`", "`selective`"]),
        ("fastmax{degree=two}", ["\"two\"", "usize"]),
        ("lion{decay='none}", ["unclosed", "lion{decay='none}"]),
    ] {
        let run = ["run", &model, "--input", &input];
        let mut program = lapidary(&[&run[..], &["--replace-attention", mechanism]].concat());
        let done = program.assert().failure().code(2);
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    }
}

/// One repetition over sequences of 2 heads of 8, as JSON.
const MIXERS: [&str; 11] = [
    "bench", "mixers", "--width", "16", "--heads", "2", "--batch", "1", "--repeat", "1", "--json",
];

#[test]
fn times_every_mixer() {
    let sizes = ["--length", "64", "--least", "64"];
    let found = json(&[&MIXERS[..], &sizes].concat());
    let rows = found["rows"].as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["mechanism"].as_str().unwrap())
        .collect();
    for row in rows {
        assert_eq!(row["length"], 64);
        for time in ["forward", "forward_and_backward"] {
            assert!(row[time].as_f64().unwrap() > 0.0, "{row}");
        }
        // Compared with one that is there, of its own direction, which is compared with itself.
        let name = row["dense"].as_str().unwrap();
        let dense = rows.iter().find(|dense| dense["mechanism"] == name);
        let dense = dense.unwrap();
        assert_eq!(dense["dense"], name);
        assert_eq!(dense["causal"], row["causal"], "{row}");
    }
    for name in ["fire", "alibi", "crate", "fit block", "vcc block"] {
        assert!(names.iter().any(|own| own.starts_with(name)), "{name}");
    }
    let distinct: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), names.len());
}

#[test]
fn times_long_sequences() {
    // Behind FIRE's threshold, of several groups, with blocks of which only the mean is seen.
    for name in ["fire, causal", "fit block", "vcc block"] {
        let rest = ["--length", "1024", "--least", "1024", "--method", name];
        let found = json(&[&MIXERS[..], &rest].concat());
        let rows = found["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 1, "{name}");
        assert_eq!(rows[0]["length"], 1024);
    }
}

#[test]
fn a_mixer_is_chosen_by_its_name_or_how_that_begins() {
    let chosen = |name: &str| -> Vec<String> {
        let rest = ["--length", "32", "--least", "32", "--method", name];
        let rows = json(&[&MIXERS[..], &rest].concat())["rows"].clone();
        let rows = rows.as_array().unwrap();
        let name = |row: &serde_json::Value| row["mechanism"].as_str().unwrap().to_owned();
        rows.iter().map(name).collect()
    };
    assert_eq!(chosen("softmax"), ["softmax"]);
    assert_eq!(
        chosen("softmax,"),
        ["softmax, causal", "softmax, with projections"]
    );
    assert_eq!(chosen("fire"), ["fire, causal"]);
    let refusals: &[&str] = &["nothing", "linformer", "fire, causal", "softmax block"];
    refused(&["bench", "mixers", "--method", "nothing"], refusals);
}

#[test]
fn a_circuit_is_left_out_where_it_has_not_the_qubits() {
    let rest = [
        "--length",
        "2048",
        "--least",
        "2048",
        "--method",
        "doubly stochastic, circuit",
    ];
    let found = json(&[&MIXERS[..], &rest].concat());
    assert_eq!(found["rows"].as_array().unwrap().len(), 0);
}

#[test]
fn times_mechanisms() {
    let rest = ["--method", "linformer", "--length", "64", "--least", "32"];
    let found = json(&[&MIXERS[..], &rest].concat());
    let rows = found["rows"].as_array().unwrap();
    let lengths: Vec<_> = rows
        .iter()
        .map(|row| row["length"].as_u64().unwrap())
        .collect();
    assert_eq!(lengths, [32, 64]);
    let decoding = [
        "bench", "decoding", "--method", "lion", "--length", "100", "--width", "16", "--heads",
        "2", "--repeat", "1", "--json",
    ];
    let rows = json(&decoding)["rows"].clone();
    let before: Vec<_> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["tokens"].clone())
        .collect();
    assert_eq!(before, [10, 100]);
    refused(
        &["bench", "decoding", "--method", "linformer"],
        &["linformer", "lion"],
    );
    let cut = json(&[
        "bench",
        "compress",
        "--width",
        "16",
        "--blocks",
        "2",
        "--heads",
        "2",
        "--length",
        "16",
        "--batch",
        "4",
        "--vocabulary",
        "32",
        "--repeat",
        "1",
        "--json",
    ]);
    assert!(cut["parameters_kept"].as_f64().unwrap() < 1.0);
}
