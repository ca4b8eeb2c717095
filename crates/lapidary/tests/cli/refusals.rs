//! Wrong input, and input that means harm.

use super::*;

#[test]
fn wrong_input_gets_one_sentence() {
    let directory = tempfile::tempdir().unwrap();
    refused(
        &["explain", "/no/such/model", "--text", "a"],
        &["/no/such/model", "not a directory"],
    );
    refused(&["explain", "embedded", "--text", "  "], &["empty"]);
    refused(
        &["explain", "embedded", "--text", "the zebra sings"],
        &["zebra", "vocabulary"],
    );
    refused(
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--target",
            "9999",
        ],
        &["9999", "403"],
    );
    let masked = family("bert-masked-lm");
    refused(
        &["explain", &masked, "--tokens", "2,5,3", "--target", "☃"],
        &["☃", "not one token"],
    );
    refused(
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--bias",
            "all",
        ],
        &["absdot"],
    );
    refused(
        &["explain", "embedded", "--tokens", "1,2,99999"],
        &["99999", "403"],
    );
    let long = vec!["1"; 200].join(",");
    refused(&["explain", "embedded", "--tokens", &long], &["200", "128"]);
    refused(
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--html",
            "/no/such/dir/x.html",
        ],
        &["/no/such/dir"],
    );
    refused(
        &["explain", &family("vit"), "--text", "a"],
        &["reads images"],
    );
    let input = write(
        &directory,
        "ragged.json",
        br#"{"input_ids": [[1, 2], [3]]}"#,
    );
    refused(&["run", &family("gpt2"), "--input", &input], &["ragged"]);
    let input = write(&directory, "other.json", br#"{"inputs": [[1, 2]]}"#);
    refused(
        &["run", &family("gpt2"), "--input", &input],
        &["inputs", "input_ids"],
    );
    let input = write(&directory, "not.json", b"{");
    refused(&["run", &family("gpt2"), "--input", &input], &["not.json"]);
    let input = write(&directory, "ids.json", br#"{"input_ids": [[1, 2]]}"#);
    refused(
        &[
            "run",
            &family("gpt2"),
            "--input",
            &input,
            "--sites",
            "nothing.*",
        ],
        &["nothing.*"],
    );
    refused(
        &["compress", "embedded", "--ratio", "1.5", "--out", "x"],
        &["1.5"],
    );
    let most = usize::MAX.to_string();
    let compress = ["compress", "embedded", "--ratio", "0.3", "--out", "x"];
    for (more, words) in [
        (&["--heal-rate", "0.1"][..], "--heal"),
        (&["--regrow", "0.3"], "--heal"),
        (&["--hints", "1"], "--heal"),
        (
            &["--heal", "1", "--regrow", "0.3", "--pattern", "2:4"],
            "--pattern",
        ),
        (&["--pattern", "4:2"], "2:4"),
        (&["--pattern", "two"], "2:4"),
        (&["--method", "magnitude", "--pattern", "2:4"], "2 of 4"),
        (&["--pattern", "2:4"], "set weights to zero"),
        (
            &["--method", "svd+int4", "--pattern", "2:4"],
            "the method is svd+int4",
        ),
        (
            &["--seed", "18446744073709551615"],
            "at most 9223372036854775807",
        ),
    ] {
        let done = lapidary(&[&compress[..], more].concat()).assert().failure();
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        assert!(error.contains(words), "{words} in {error}");
    }
    refused(
        &[
            &compress[..],
            &["--windows", "4", "--heal", "1", "--distil", "2"],
        ]
        .concat(),
        &["distillation", "0 to 1"],
    );
    refused(
        &[&compress[..], &["--windows", &most]].concat(),
        &["windows", "65536"],
    );
    refused(
        &[&compress[..], &["--window", "0"]].concat(),
        &["window is 0", "at least 2 tokens"],
    );
    let bert = family("bert");
    refused(
        &[
            "compress",
            &bert,
            "--method",
            "svd",
            "--evaluate",
            "nowhere",
            "--out",
            "x",
        ],
        &["--evaluate", "next token"],
    );
    // Before the work, and not after.
    let inside = format!("{}/out", write(&directory, "file", b"a"));
    refused(
        &["compress", "embedded", "--method", "svd", "--out", &inside],
        &[&inside, "cannot be written", "not a directory"],
    );
    refused(
        &["generate", &family("bert-masked-lm"), "--prompt", "a"],
        &[],
    );
    lapidary(&["explain", "embedded"]).assert().code(2);
    lapidary(&["frobnicate"]).assert().code(2);
}

/// What is passed over in silence is taken for done.
#[test]
fn options_that_nothing_hears_are_refused() {
    for (options, words) in [
        (
            &["--method", "int8", "--ratio", "nan", "--out", "x"][..],
            &["--ratio", "the method is int8"][..],
        ),
        (
            &["--method", "svd", "--ratio", "-0.1", "--out", "x"],
            &["ratio of svd is -0.1,"],
        ),
        (
            &["--method", "svd", "--uniform", "--out", "x"],
            &["--uniform is for modegpt and lorap", "the method is svd"],
        ),
        (
            &[
                "--method",
                "slicegpt",
                "--layers",
                "blocks.0.*",
                "--out",
                "x",
            ],
            &["--layers", "the method is slicegpt"],
        ),
        (
            &["--compare", "svd,modegpt", "--pattern", "2:4"],
            &["--pattern", "the method is svd+modegpt"],
        ),
        (
            &["--method", "svd", "--budget", "0.7x", "--out", "x"],
            &["--budget is given without --auto"],
        ),
        (
            &["--compare", "svd", "--adapters", "4"],
            &["--adapters is given without --heal STEPS"],
        ),
        (
            &["--method", "svd", "--heal", "0", "--out", "x"],
            &["--heal is 0 steps", "at least 1"],
        ),
    ] {
        refused(&[&["compress", "embedded"], options].concat(), words);
    }
    for options in [
        &["--plan-only", "--out", "x"][..],
        &["--plan-only", "--html", "x"],
        &["--compare", "svd", "--method", "svd"],
        &["--compare", "svd", "--dense"],
        &["--plan", "x", "--ratio", "0.3", "--out", "x"],
    ] {
        let arguments = [&["compress", "embedded"], options].concat();
        lapidary(&arguments).assert().code(2);
    }
}

/// What the system says of a file is said, and not twice.
#[test]
fn a_file_that_cannot_be_opened_is_refused_for_one_reason() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (missing, out, cut) = (at("missing.txt"), at("run"), at("cut"));
    let spec = write(
        &directory,
        "spec.toml",
        br#"
steps = 2
batch = 1
length = 16
[schedule]
peak = 1e-2
[data]
kind = "text"
[model]
width = 16
[model.input]
kind = "tokens"
vocabulary = 256
length = 16
[[model.blocks]]
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 32 }
[model.head]
kind = "language-model"
"#,
    );
    let gpt2 = family("gpt2");
    for arguments in [
        // The spec, and what it trains on.
        &["train", &missing, "--out", &out][..],
        &["train", &spec, "--out", &out, "--data", &missing],
        &["evaluate", "embedded", "--text", &missing],
        &["run", &gpt2, "--input", &missing],
        &[
            "compress",
            "embedded",
            "--ratio",
            "0.3",
            "--out",
            &cut,
            "--calibrate",
            &missing,
        ],
    ] {
        let done = lapidary(arguments).assert().failure().code(1);
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        assert!(
            error.contains("cannot open") && error.contains("missing.txt"),
            "{error}"
        );
        assert_eq!(error.matches("os error").count(), 1, "{error}");
    }
}

#[test]
fn broken_checkpoints_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let to = directory.path().join(name);
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(
                Path::new(&family("bert-classifier")).join(file),
                to.join(file),
            )
            .unwrap();
        }
        to
    };
    let input = write(&directory, "ids.json", br#"{"input_ids": [[1, 2]]}"#);
    let run = |model: &Path, words: &[&str]| {
        refused(&["run", model.to_str().unwrap(), "--input", &input], words)
    };

    let cut = copy("truncated");
    let bytes = std::fs::read(cut.join("model.safetensors")).unwrap();
    std::fs::write(cut.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    run(&cut, &["model.safetensors"]);

    let lying = copy("lying");
    let mut bytes = std::fs::read(lying.join("model.safetensors")).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(lying.join("model.safetensors"), bytes).unwrap();
    run(&lying, &["model.safetensors"]);

    let absurd = copy("absurd");
    let config = std::fs::read_to_string(absurd.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["hidden_size"] = 1_000_000_000_000u64.into();
    std::fs::write(absurd.join("config.json"), config.to_string()).unwrap();
    run(&absurd, &["hidden_size"]);
    config["hidden_size"] = 48.into();
    std::fs::write(absurd.join("config.json"), config.to_string()).unwrap();
    run(&absurd, &["shape"]);
    config["model_type"] = "perceiver".into();
    std::fs::write(absurd.join("config.json"), config.to_string()).unwrap();
    run(&absurd, &["perceiver", "bert"]);

    let untokenised = copy("untokenised");
    refused(
        &["explain", untokenised.to_str().unwrap(), "--text", "a"],
        &["tokenizer"],
    );
}

#[test]
fn hostile_tensors_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let deep = format!("{}1{}", "[".repeat(100), "]".repeat(100));
    let too_deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let long = vec!["[1, [2, 3]]"; 5_000].join(",");
    let cases = [
        ("gpt2", r#"{"input_ids": [[1e999]]}"#.to_owned(), "number"),
        ("gpt2", r#"{"input_ids": [[NaN]]}"#.to_owned(), "expected"),
        ("gpt2", r#"{"input_ids": [[-1]]}"#.to_owned(), "-1"),
        ("gpt2", r#"{"input_ids": [[1.5]]}"#.to_owned(), "1.5"),
        (
            "gpt2",
            r#"{"input_ids": [[18446744073709551616]]}"#.to_owned(),
            "whole numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[4294967295]]}"#.to_owned(),
            "whole numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[4294967294]]}"#.to_owned(),
            "below 128",
        ),
        (
            "gpt2",
            r#"{"input_ids": [["a"]]}"#.to_owned(),
            "list of numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[true]]}"#.to_owned(),
            "list of numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[null]]}"#.to_owned(),
            "list of numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": {"0": 1}}"#.to_owned(),
            "list of numbers",
        ),
        ("gpt2", r#"{"input_ids": 5}"#.to_owned(), "[batch, length]"),
        (
            "gpt2",
            r#"{"input_ids": [1, 2]}"#.to_owned(),
            "[batch, length]",
        ),
        ("gpt2", r#"{"input_ids": []}"#.to_owned(), "empty list"),
        (
            "gpt2",
            r#"{"input_ids": [[], []]}"#.to_owned(),
            "empty list",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[1], 2]}"#.to_owned(),
            "nested evenly",
        ),
        (
            "gpt2",
            format!(r#"{{"input_ids": [{long}]}}"#),
            "nested evenly",
        ),
        ("gpt2", format!(r#"{{"input_ids": {deep}}}"#), "deeper"),
        (
            "gpt2",
            format!(r#"{{"input_ids": {too_deep}}}"#),
            "recursion",
        ),
        (
            "gpt2",
            format!(r#"{{"input_ids": [[{}]]}}"#, vec!["1"; 65].join(",")),
            "64",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[1, 2]], "attention_mask": [[1]]}"#.to_owned(),
            "attention_mask",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[1]], "token_type_ids": [[0]]}"#.to_owned(),
            "token_type_ids",
        ),
        (
            "bert",
            r#"{"input_ids": [[1]], "token_type_ids": [[9]]}"#.to_owned(),
            "token_type_ids",
        ),
        (
            "gpt2",
            r#"{"pixel_values": [[[[1]]]]}"#.to_owned(),
            "input_ids",
        ),
        ("vit", r#"{"input_ids": [[1]]}"#.to_owned(), "pixel_values"),
        ("vit", r#"{"pixel_values": [[[[1]]]]}"#.to_owned(), "16"),
        ("vit", r#"{"pixel_values": 1}"#.to_owned(), "pixel_values"),
        ("gpt2", r#"[1]"#.to_owned(), "map"),
        ("gpt2", r#"{}"#.to_owned(), "input_ids"),
    ];
    for (model, json, word) in cases {
        let input = write(&directory, "hostile.json", json.as_bytes());
        let done = lapidary(&["run", &family(model), "--input", &input])
            .assert()
            .failure()
            .code(1);
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        let shown = json.get(..80).unwrap_or(&json);
        assert!(
            error.starts_with("error: ") && error.contains(word),
            "{shown}: {error}"
        );
        assert!(
            error.lines().count() == 1 && error.len() < 500,
            "{shown}: {error}"
        );
    }
}
