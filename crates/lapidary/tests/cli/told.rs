//! `compress` and `export` told what they cannot hear, and what they say of it.

use crate::{family, images, json, lapidary, output, refused, write};

/// Text for the small families.
fn text(directory: &tempfile::TempDir) -> String {
    let text = "the farmer near the dogs sings and the dogs sing ".repeat(20);
    write(directory, "text", text.as_bytes())
}

/// What was meant is said where it is plain.
#[test]
fn methods_and_ratios_that_are_joined_otherwise() {
    for (options, words) in [
        (
            &["--method", "svd,magnitude", "--out", "x"][..],
            &["\"svd,magnitude\"", "joined by +"][..],
        ),
        (
            &["--method", "svd", "--ratio", "30%", "--out", "x"],
            &["ratio is \"30%\"", "above 0 and below 1"],
        ),
        (
            &["--method", "svd", "--ratio", "0.1+0.2", "--out", "x"],
            &[
                "number of ratios is 2",
                "no more than one of the methods cuts",
            ],
        ),
        (
            &["--compare", "svd", "--ratio", "0.1+0.2"],
            &["ratio is \"0.1+0.2\"", "by commas"],
        ),
    ] {
        refused(&[&["compress", "embedded"], options].concat(), words);
    }
}

/// Settings and ratios that no method of the run reads are not passed over.
#[test]
fn settings_that_no_method_reads_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let recipe = |section: &str| {
        let text = format!(
            "[[stage]]\nmethod = \"svd\"\nratio = 0.3\n[stage.settings.{section}]\n{}\n",
            match section {
                "selection" => "layers = [\"blocks.0.*\"]",
                _ => "bits = 8",
            }
        );
        write(&directory, section, text.as_bytes())
    };
    let (unread, read) = (recipe("quantise"), recipe("selection"));
    for (options, words) in [
        (
            &["--method", "svd", "--set", "quantise.bits=8"][..],
            &[
                "--set quantise.bits=8 is not for svd",
                "does not read `quantise`",
            ][..],
        ),
        (
            &["--method", "int8", "--set", "activations.bits=4"],
            &["activations.bits=4", "it is for --activations"],
        ),
        (
            &["--recipe", &unread],
            &["stage 1 has settings of `quantise`, which svd does not read"],
        ),
        (
            &["--auto", "--budget", "0.7x", "--set", "quantise.outliers=6"],
            &["--auto does not tell methods"],
        ),
        (
            &["--method", "slicegpt", "--set", "slicing.multiple=0"],
            &["slicing.multiple", "is 0, but must be between 1 and "],
        ),
        (
            &["--method", "slicegpt", "--set", "slicing.multiple=1000"],
            &["slicing.multiple", "is 1000, but must be between 1 and "],
        ),
        (
            &["--method", "whitened", "--set", "batch=0"],
            &["the settings: batch is 0, but must be at least 1"],
        ),
        (
            &["--method", "svd", "--set", "=1"],
            &["--set has \"=1\", which is no setting: "],
        ),
    ] {
        let base = ["compress", "embedded", "--windows", "2", "--out", "x"];
        refused(&[&base[..], options].concat(), words);
    }
    for option in ["--compare", "--interactions"] {
        let arguments = [
            "compress",
            "embedded",
            option,
            "int8,int4",
            "--ratio",
            "0.3",
        ];
        refused(&arguments, &["--ratio", "the method is int8+int4"]);
    }
    let out = directory.path().join("read");
    let out = out.to_str().unwrap();
    let model = family("llama");
    let report = json(&[
        "compress", &model, "--recipe", &read, "--out", out, "--json",
    ]);
    let modules = report["report"]["modules"].as_array().unwrap();
    assert!(!modules.is_empty(), "{report}");
    let first = |path: &str| path.starts_with("blocks.0.");
    assert!(
        modules
            .iter()
            .all(|one| first(one["path"].as_str().unwrap()))
    );
}

/// A pattern is a ratio, which need not be given besides.
#[test]
fn a_pattern_stands_for_its_ratio() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let model = family("llama");
    let magnitude = ["compress", &model, "--method", "magnitude", "--json"];
    let pattern = ["--pattern", "2:4", "--out", out.to_str().unwrap()];
    let found = json(&[&magnitude[..], &pattern].concat());
    for module in found["report"]["modules"].as_array().unwrap() {
        assert_eq!(module["change"]["prune"]["share"], 0.5, "{module}");
    }
}

/// What rounded activations are measured on is missed before the work, and not after.
#[test]
fn rounded_activations_need_something_to_be_measured_on() {
    let directory = tempfile::tempdir().unwrap();
    let text = text(&directory);
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let model = family("llama");
    let arguments = ["compress", &model, "--method", "int8", "--out", out];
    let needs = "needs --calibrate FILE";
    for range in ["per-token", "per-tensor"] {
        let with = [&arguments[..], &["--activations", range]].concat();
        refused(&with, &[&format!("--activations {range}"), needs]);
    }
    let held_out = [&arguments[..], &["--evaluate", &text, "--window", "16"]].concat();
    let with = [&held_out[..], &["--activations", "per-tensor"]].concat();
    refused(&with, &[needs]);
    assert!(!std::path::Path::new(out).exists());
    // A step of each token is found while the text is read.
    let with = [&held_out[..], &["--activations", "per-token", "--json"]].concat();
    assert!(json(&with)["activations"]["perplexity"]["value"].is_f64());
}

/// A plan that is edited by hand is what is carried out, and not what can be made of a part of it.
#[test]
fn plans_with_fields_that_mean_nothing_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let model = family("llama");
    let plan = ["compress", &model, "--method", "svd", "--ratio", "0.3"];
    let plan = output(&[&plan[..], &["--plan-only"]].concat());
    let carried_out = |edited: &str, method: &str, words: &[&str]| {
        let file = write(&directory, "plan.json", edited.as_bytes());
        let arguments = ["compress", &model, "--method", method, "--plan", &file];
        refused(&[&arguments[..], &["--out", "x"]].concat(), words);
    };
    let rank = "\"factorise\"";
    assert!(plan.contains(rank) && plan.contains("\"path\""), "{plan}");
    for (from, to, words) in [
        ("{", "{ \"note\": 1, ", "unknown field `note`"),
        (
            "\"path\"",
            "\"ratio\": 0.5, \"path\"",
            "unknown field `ratio`",
        ),
        (
            "\"rank\"",
            "\"alpha\": 2, \"rank\"",
            "unknown field `alpha`",
        ),
    ] {
        carried_out(&plan.replacen(from, to, 1), "svd", &[words]);
    }
    let words = ["is a plan of svd, but the method is magnitude; give --method svd"];
    carried_out(&plan, "magnitude", &words);
}

/// Methods that are left out for one reason have one line, though each says it with its own name.
#[test]
fn a_reason_that_names_its_method_is_told_once() {
    let directory = tempfile::tempdir().unwrap();
    let text = text(&directory);
    let found = output(&[
        "compress",
        &family("bert"),
        "--compare",
        "block-influence,delete-linear,mamba-shedder,mamba-shedder-width,svd",
        "--calibrate",
        &text,
        "--windows",
        "2",
        "--window",
        "16",
    ]);
    let line = "left out: block-influence, delete-linear, mamba-shedder, mamba-shedder-width, since the wiring \
                of block 0 is post-norm, but must be pre-norm or parallel for these: only there";
    assert!(found.contains(line), "{found}");
    assert_eq!(found.matches("left out: ").count(), 1, "{found}");
}

/// The directory of a run of training is not that of its model, which is said.
#[test]
fn a_directory_without_a_model_is_refused_for_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let run = directory.path().join("run");
    std::fs::create_dir_all(run.join("model")).unwrap();
    let path = run.to_str().unwrap();
    let words = ["has neither lapidary.json nor config.json, so that it is no model"];
    refused(&["spec", path], &words);
    std::fs::write(run.join("model/lapidary.json"), "{}").unwrap();
    let inside = run.join("model");
    let words = [
        "the model of this run of training is in",
        inside.to_str().unwrap(),
    ];
    refused(&["spec", path], &words);
}

/// An option is not passed over where what it asks for is excluded by another; and what GGUF cannot say is
/// written as what it can.
#[test]
fn gguf_takes_half_precision_and_no_factors() {
    let arguments = ["export", "embedded", "--dense", "--half", "--out", "x"];
    refused(&arguments, &["--half is given without --gguf FILE"]);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (cut, file) = (at("cut"), at("cut.gguf"));
    let model = family("gpt2");
    output(&["compress", &model, "--method", "svd", "--out", &cut]);
    let arguments = ["export", &cut, "--gguf", &file];
    refused(&arguments, &["has factorised layers", "add --dense"]);
    let written = output(&[&arguments[..], &["--dense", "--half"]].concat());
    assert!(written.contains("architecture gpt2"), "{written}");
}

/// What is wrong in a recipe or in settings is told on one line, with the place.
#[test]
fn what_is_wrong_in_toml_is_told_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| write(&directory, name, text.as_bytes());
    let stage = "[[stage]]\nmethod = \"svd\"\nratio = 0.3\n";
    let misspelt = file("misspelt.toml", &format!("{stage}depth = 2\n"));
    let unknown = file(
        "unknown.toml",
        &format!("{stage}[stage.settings]\nfoo = 1\n"),
    );
    let prose = file("prose.toml", "all that is written\n");
    for (options, words) in [
        (
            ["--recipe", &misspelt],
            &["misspelt.toml, line 4: ", "unknown field `depth`"],
        ),
        (
            ["--recipe", &unknown],
            &["unknown.toml, line 5: ", "unknown field `foo`"],
        ),
        (
            ["--settings", &prose],
            &["prose.toml, line 1: ", "key with no value"],
        ),
        (
            ["--set", "foo=1"],
            &["the settings: ", "unknown field `foo`"],
        ),
        (
            ["--set", "selection.layers=1"],
            &["expected a sequence", "`selection.layers`"],
        ),
    ] {
        let arguments = ["compress", "embedded", "--out", "x"];
        refused(&[&arguments[..], &options].concat(), words);
    }
}

/// What is timed is what was asked for, and numbers are of it.
#[test]
fn timing_hears_its_options_and_counts_integers_as_weights() {
    let small = [
        "--width",
        "32",
        "--blocks",
        "1",
        "--length",
        "16",
        "--batch",
        "2",
        "--vocabulary",
        "64",
        "--repeat",
        "1",
    ];
    let gpt2 = family("gpt2");
    for (arguments, words) in [
        (
            &["bench", "step", "--model", &gpt2][..],
            &["--model is for the works", "the work is step"][..],
        ),
        (
            &["bench", "forward", "--method", "svd"],
            &["--method is for the works", "the work is forward"],
        ),
        // A model of 64 tokens has no room for more behind them.
        (
            &["bench", "generate", "--model", &gpt2, "--length", "64"],
            &["length is 64, but must be at most 32", "the model has 64"],
        ),
    ] {
        refused(arguments, words);
    }
    let rounded = ["bench", "compress", "--method", "int8", "--json"];
    let found = json(&[&rounded[..], &small].concat());
    assert_eq!(found["parameters_kept"], 1.0);
    assert!(found["bytes_kept"].as_f64().unwrap() < 1.0, "{found}");
    let written = ["bench", "generate", "--json"];
    let found = json(&[&written[..], &small].concat());
    assert!(found["median_seconds"].as_f64().unwrap() > 0.0, "{found}");
}

/// A directory that could not be put in its place after the work is refused before it.
#[test]
fn what_cannot_be_replaced_is_refused_before_the_work() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(at("empty")).unwrap();
    let above = at("empty/..");
    let model = family("gpt2");
    refused(
        &["export", &model, "--dense", "--out", &at("empty")],
        &["exists; give a directory that does not"],
    );
    let mut links = Vec::new();
    #[cfg(unix)]
    for (name, to) in [("link", "empty"), ("dangling", "nothing")] {
        std::os::unix::fs::symlink(at(to), at(name)).unwrap();
        links.push(at(name));
    }
    for link in &links {
        let compress = ["compress", &model, "--method", "svd", "--out", link];
        refused(&compress, &[link, "is a symbolic link"]);
    }
    assert!(std::fs::read_dir(at("empty")).unwrap().next().is_none());
    // Nothing is written in place of a directory that is named by where it lies.
    let inside = lapidary(&["compress", &model, "--method", "svd", "--out", "."])
        .current_dir(at("empty"))
        .assert()
        .failure()
        .code(1);
    let error = String::from_utf8(inside.get_output().stderr.clone()).unwrap();
    assert!(error.contains("ends in no name of its own"), "{error}");
    refused(
        &["compress", &model, "--method", "svd", "--out", &above],
        &["not an empty directory"],
    );
}

/// What fits its few tokens and no others looks better on these than it is.
#[test]
fn too_few_tokens_to_calibrate_on_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let text = text(&directory);
    let model = family("llama");
    let few = |method: &str, windows: &str| {
        let out = directory.path().join(format!("{method}-{windows}"));
        let arguments = ["compress", &model, "--method", method, "--calibrate", &text];
        let rest = ["--window", "16", "--windows", windows, "--out"];
        let found = output(&[&arguments[..], &rest, &[out.to_str().unwrap()]].concat());
        found.contains("16 tokens, fewer than the 32 features of one")
    };
    assert!(few("whitened", "1"));
    assert!(!few("whitened", "2"), "as many tokens as features");
    assert!(!few("svd", "1"), "a method that looks at none");
}

/// What was learned is what counted: beside the original's predictions alone there is no task.
#[test]
fn healing_says_what_was_learned() {
    let directory = tempfile::tempdir().unwrap();
    let (text, bert) = (text(&directory), family("bert"));
    let alone = "by the original's predictions: ";
    let both = "by cross-entropy of the next token and the original's predictions (weight 0.5): ";
    let vectors = "by the original's hidden vectors: ";
    for (index, (options, words)) in [
        (&["embedded", "--distil", "1"][..], alone),
        (&["embedded", "--distil", "0.5"], both),
        (
            &[bert.as_str(), "--calibrate", &text, "--distil", "1"],
            vectors,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let out = directory.path().join(index.to_string());
        let cut = [
            "--method",
            "svd",
            "--ratio",
            "0.3",
            "--windows",
            "4",
            "--window",
            "8",
        ];
        let healed = ["--heal", "2", "--out", out.to_str().unwrap()];
        let said = output(&[&["compress"][..], options, &cut, &healed].concat());
        let line = said.lines().find(|line| line.starts_with("healing "));
        let line = line.unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains(words), "{line}");
        // However near the two are, the loss is not written as none.
        assert!(!line.contains(" 0.0000 "), "{line}");
    }
}

#[test]
fn what_takes_one_model_says_which_verbs_take_several() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    refused(
        &[
            "compress",
            &family("clip"),
            "--method",
            "svd",
            "--out",
            out.to_str().unwrap(),
        ],
        &["text", "vision", "a single model; run, explain, diff"],
    );
}

#[test]
fn windows_longer_than_the_model_reads_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (text, llama) = (text(&directory), family("llama"));
    let out = directory.path().join("cut");
    for (model, window, length) in [
        (&[llama.as_str(), "--calibrate", &text][..], "65", "64"),
        (&["embedded"], "129", "128"),
    ] {
        let cut = [
            "--method",
            "svd",
            "--window",
            window,
            "--out",
            out.to_str().unwrap(),
        ];
        let limits = format!("between 2 and {length}, the length of the model");
        let found = format!("window is {window}");
        let words = [found.as_str(), limits.as_str()];
        refused(&[&["compress"][..], model, &cut].concat(), &words);
    }
}

/// An image is as many tokens as the model makes of it: here 16 patches and the class.
#[test]
fn images_count_as_the_tokens_that_are_made_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let vit = family("vit");
    let cut = ["compress", &vit, "--method", "whitened", "--calibrate"];
    for (count, few) in [(1, true), (2, false)] {
        let many = write(&directory, &format!("{count}.json"), &images(count, 16));
        let out = directory.path().join(count.to_string());
        let rest = [many.as_str(), "--out", out.to_str().unwrap()];
        let found = output(&[&cut[..], &rest].concat());
        let told = found.contains("17 tokens, fewer than the 32 features of one");
        assert_eq!(told, few, "{found}");
        assert!(!found.contains("fewer than") || few, "{found}");
    }
    let all: serde_json::Value = serde_json::from_slice(&images(1, 16)).unwrap();
    let alone = serde_json::json!({ "pixel_values": all["pixel_values"][0] });
    let alone = write(&directory, "alone.json", alone.to_string().as_bytes());
    let out = directory.path().join("alone");
    let rest = [alone.as_str(), "--out", out.to_str().unwrap()];
    refused(
        &[&cut[..], &rest].concat(),
        &[
            "pixel_values shape is [3, 16, 16]",
            "[images, channels, rows, columns]",
        ],
    );
}
