//! `compress` and what is left afterwards.

use super::*;

#[test]
fn prunes_heals_and_says_what_zeros_take() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let page = directory.path().join("page.html");
    let arguments = [
        "compress",
        "embedded",
        "--method",
        "second-order",
        "--ratio",
        "0.5",
        "--pattern",
        "2:4",
        "--windows",
        "4",
        "--window",
        "32",
        "--heal",
        "3",
        "--heal-rate",
        "0.0003",
        "--distil",
        "0.5",
        "--html",
        page.to_str().unwrap(),
        "--out",
    ];
    let report = json(&[&arguments[..], &[out.to_str().unwrap(), "--json"]].concat());
    let healing = &report["healing"];
    assert_eq!(healing["training"].as_array().unwrap().len(), 3);
    assert!(healing["after"].as_f64().unwrap() <= healing["before"].as_f64().unwrap());
    assert!(healing["zeros"].as_u64().unwrap() > 0);
    let note = report["report"]["notes"][0].as_str().unwrap();
    assert!(note.contains("as 2 of 4"), "{note}");
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("Healing") && page.contains("as 2 of 4"));
    let again = directory.path().join("again");
    let mut text = lapidary(&[&arguments[..], &[again.to_str().unwrap()]].concat());
    let text = String::from_utf8(text.assert().success().get_output().stdout.clone()).unwrap();
    for words in [
        "healing     3 steps",
        "zeros       ",
        "50.0 % zero",
        "healed on",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
}

#[test]
fn adapters_are_trained_and_taken_in() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let arguments = [
        "compress",
        "embedded",
        "--method",
        "svd",
        "--ratio",
        "0.5",
        "--windows",
        "4",
        "--window",
        "32",
        "--heal",
        "3",
        "--heal-rate",
        "0.001",
        "--adapters",
        "2",
        "--adapter-dropout",
        "0.05",
        "--adapter-layers",
        "blocks.*.query,blocks.*.value",
        "--out",
    ];
    let report = json(&[&arguments[..], &[out.to_str().unwrap(), "--json"]].concat());
    let adapters = &report["healing"]["adapters"];
    assert_eq!(adapters["settings"]["rank"], 2);
    assert_eq!(adapters["settings"]["dropout"], 0.05);
    assert_eq!(adapters["layers"], 12, "two of each of six blocks");
    let parameters = |of: &serde_json::Value| of["size"]["parameters"].as_u64().unwrap();
    let said = report["report"]["after"]["parameters"].as_u64().unwrap();
    assert_eq!(said, parameters(&report["after"]));
    let again = directory.path().join("again");
    let wrong = [again.to_str().unwrap(), "--adapter-alpha", "0"];
    refused(&[&arguments[..], &wrong].concat(), &["alpha of adapters"]);
}

#[test]
fn pairs_of_methods_are_measured_in_both_orders() {
    let arguments = [
        "compress",
        "embedded",
        "--interactions",
        "svd,block-influence,int8",
        "--ratio",
        "0.2",
        "--windows",
        "4",
        "--window",
        "32",
    ];
    let found = json(&[&arguments[..], &["--json"]].concat());
    assert_eq!(found["loss"], "nats per token");
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    let alone: Vec<f64> = found["alone"]
        .as_array()
        .unwrap()
        .iter()
        .map(number)
        .collect();
    let pairs = found["pairs"].as_array().unwrap();
    assert_eq!((alone.len(), pairs.len()), (3, 3));
    for pair in pairs {
        let at = |name: &str| alone[pair[name].as_u64().unwrap() as usize];
        let (there, back) = (number(&pair["in_order"]), number(&pair["reversed"]));
        let interaction = there.min(back) - at("first") - at("second");
        assert!((number(&pair["interaction"]) - interaction).abs() < 1e-12);
        assert!((number(&pair["order_effect"]) - (there - back)).abs() < 1e-12);
    }
    // What is taken out first changes what the decomposition is of, so nothing here is nought.
    assert!(pairs.iter().any(|pair| number(&pair["interaction"]) != 0.0));
    let one_order = [
        "compress",
        "embedded",
        "--interactions",
        "svd,magnitude",
        "--windows",
        "2",
        "--window",
        "16",
    ];
    let said = output(&one_order);
    for words in [
        "in one order only: magnitude, then svd",
        "place of magnitude is after svd",
    ] {
        assert!(said.contains(words), "{words} in {said}");
    }
    let mut one = lapidary(&["compress", "embedded", "--interactions", "svd"]);
    let said = String::from_utf8(one.assert().failure().get_output().stderr.clone()).unwrap();
    assert!(said.contains("must name two at least"), "{said}");
    // What is missing, and for which of them.
    let model = family("llama");
    for (methods, missing) in [
        ("svd,magnitude", "--interactions needs --calibrate FILE"),
        ("svd,whitened", "method whitened needs --calibrate FILE"),
    ] {
        refused(&["compress", &model, "--interactions", methods], &[missing]);
    }
}

#[test]
fn compresses_saves_loads_and_explains_again() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let out = out.to_str().unwrap();
    let report = json(&[
        "compress",
        "embedded",
        "--method",
        "whitened",
        "--ratio",
        "0.3",
        "--windows",
        "4",
        "--window",
        "32",
        "--out",
        out,
        "--json",
    ]);
    assert!(report["kept"].as_f64().unwrap() < 0.8);
    assert_eq!(report["saved_as"], "lapidary");
    let explained = json(&["explain", out, "--text", "the farmer", "--json"]);
    assert!(
        explained["explanations"][0]["explanation"]["account"]["largest_site_error"]
            .as_f64()
            .unwrap()
            < 1e-4
    );
    refused(
        &["compress", "embedded", "--ratio", "0.3", "--out", out],
        &["empty directory"],
    );
    let dense = directory.path().join("dense");
    let model = family("gpt2");
    let report = json(&[
        "compress",
        &model,
        "--method",
        "svd",
        "--ratio",
        "0.5",
        "--dense",
        "--out",
        dense.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(report["saved_as"], "hugging-face");
    assert!(dense.join("config.json").is_file());
}

/// Fewer blocks, and narrower parts where all are alike, are shapes that other programs know.
#[test]
fn stock_shapes_are_written_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings and the dogs sing ".repeat(40);
    let text = write(&directory, "text", text.as_bytes());
    let compress = |name: &str, method: &str, ratio: &str, more: &[&str]| {
        let model = family(name);
        let option = match method {
            "all" => "--compare",
            _ => "--method",
        };
        let arguments = [
            "compress",
            &model,
            option,
            method,
            "--ratio",
            ratio,
            "--calibrate",
            &text,
            "--windows",
            "4",
            "--window",
            "16",
            "--json",
        ];
        json(&[&arguments[..], more].concat())
    };
    for (name, method, ratio, stock) in [
        ("gpt2", "modegpt", "0.25", true),
        ("llama", "lorap", "0.25", true),
        ("llama", "slicegpt-shared", "0.25", true),
        ("gpt2", "slicegpt-shared", "0.25", false),
        ("llama", "fusegpt", "0.5", true),
    ] {
        let out = directory.path().join(format!("{name}-{method}"));
        let out = out.to_str().unwrap();
        let uniform = ["--uniform", "--out", out];
        // Other methods leave one shape anyway, and refuse the option.
        let more = match method {
            "modegpt" | "lorap" => &uniform[..],
            _ => &uniform[1..],
        };
        let report = compress(name, method, ratio, more);
        let expected = if stock { "hugging-face" } else { "lapidary" };
        assert_eq!(report["saved_as"], expected, "{name} {method}");
        assert!(report["kept"].as_f64().unwrap() < 1.0);
    }
    for (name, stock) in [("llama", true), ("gpt2", false)] {
        let out = directory.path().join(format!("{name}-heads"));
        let out = out.to_str().unwrap();
        let report = compress(name, "modegpt", "0.25", &["--uniform-heads", "--out", out]);
        let expected = if stock { "hugging-face" } else { "lapidary" };
        assert_eq!(report["saved_as"], expected, "{name}");
        let notes = report["report"]["notes"].as_array().unwrap();
        assert_eq!(notes.is_empty(), stock, "{notes:?}");
    }
    let plan = compress("llama", "fusegpt", "0.5", &["--plan-only"]);
    assert_eq!(plan["modules"][0]["change"], "remove");
    assert!(
        plan["modules"][1]["change"]["fuse"]["from"].is_u64(),
        "{plan}"
    );
    let compared = compress("llama", "all", "0.3", &[]);
    let left_out = compared["left_out"].as_array().unwrap();
    let trains = left_out
        .iter()
        .filter(|pair| pair[1].as_str().unwrap().contains("trains"));
    assert_eq!(trains.count(), 3, "{left_out:?}");
}

#[test]
fn inspects_linearity_and_cuts_depth() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings . the dogs near the farmer sleep . ".repeat(30);
    let text = write(&directory, "text.txt", text.as_bytes());
    let linearity = json(&[
        "inspect",
        "linearity",
        "embedded",
        "--text",
        &text,
        "--window",
        "16",
        "--json",
    ]);
    let rows = linearity["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    assert!(rows.iter().all(|row| row[1].as_f64().unwrap() <= 1.0));
    refused(
        &[
            "inspect",
            "linearity",
            "embedded",
            "--text",
            &text,
            "--windows",
            "1",
        ],
        &["windows is 1", "held out"],
    );
    let entropy = json(&[
        "inspect",
        "entropy",
        "embedded",
        "--text",
        &text,
        "--window",
        "16",
        "--windows",
        "16",
        "--json",
    ]);
    let note = entropy["notes"][0].as_str().unwrap();
    assert!(
        note.contains("keep the first 2 blocks, the last 1"),
        "{note}"
    );
    let tables = entropy["tables"].as_array().unwrap();
    assert_eq!(tables.len(), 3);
    for table in tables {
        let rows = table["rows"].as_array().unwrap();
        let mut ranks: Vec<&str> = rows.iter().map(|row| row[3].as_str().unwrap()).collect();
        ranks.sort_unstable();
        assert_eq!(ranks, ["0", "1", "2", "3", "4", "5"]);
    }
    for (method, ratio) in [("replaceme", "0.34"), ("attention-cosine", "0.34")] {
        let out = directory.path().join(method).display().to_string();
        let document = json(&[
            "compress",
            "embedded",
            "--method",
            method,
            "--ratio",
            ratio,
            "--windows",
            "8",
            "--out",
            &out,
            "--json",
        ]);
        let after = &document["report"]["after"]["parameters"];
        assert!(after.as_u64() < document["report"]["before"]["parameters"].as_u64());
        let again = json(&[
            "evaluate", &out, "--text", &text, "--window", "16", "--json",
        ]);
        assert!(again.is_object());
    }
}

#[test]
fn methods_are_put_in_order_and_the_result_is_measured_with_rounded_activations() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let page = directory.path().join("page.html");
    let arguments = [
        "compress",
        "embedded",
        "--method",
        "int8+block-influence",
        "--ratio",
        "0.2",
        "--windows",
        "4",
        "--window",
        "32",
        "--out",
        out.to_str().unwrap(),
    ];
    refused(
        &arguments,
        &["--reorder", "block-influence+int8", "not cut"],
    );
    let more = [
        "--reorder",
        "--heal",
        "2",
        "--hints",
        "0.5",
        "--heal-rounded",
        "--activations",
        "per-tensor",
        "--set",
        "quantise.outliers=6",
        "--html",
        page.to_str().unwrap(),
        "--json",
    ];
    let report = json(&[&arguments[..], &more].concat());
    assert_eq!(report["methods"], "block-influence+int8");
    assert_eq!(report["better_order"]["taken"], true);
    assert_eq!(report["healing"]["hints"], 0.5);
    assert_eq!(report["healing"]["bits"], 8);
    let activations = &report["activations"];
    assert_eq!(activations["range"], "per-tensor");
    assert_eq!(activations["bits"], 8);
    assert!(activations["inputs"].as_u64() > activations["kept"].as_u64());
    assert!(activations["perplexity"]["value"].as_f64().unwrap() > 1.0);
    assert!(activations["agreement"]["top1"].as_f64().unwrap() > 0.0);
    let written = std::fs::metadata(out.join("model.safetensors"))
        .unwrap()
        .len();
    assert_eq!(report["bytes_on_disk"]["after"].as_u64(), Some(written));
    assert!(report["bytes_on_disk"]["before"].is_null());
    // A pass holds something beside the parameters.
    for side in ["before", "after"] {
        let memory = report[side]["memory"].as_u64().unwrap();
        assert!(memory > report[side]["size"]["bytes"].as_u64().unwrap());
    }
    let page = std::fs::read_to_string(&page).unwrap();
    for words in [
        "put as block-influence+int8",
        "8 bits per-tensor",
        "on disk",
    ] {
        assert!(page.contains(words), "{words}");
    }
}

#[test]
fn what_was_written_and_what_was_not_cut_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let svd = |model: &str, out: &str, more: &[&str]| {
        let few = ["--windows", "2", "--window", "16"];
        let base = ["compress", model, "--method", "svd", "--out", out];
        output(&[&base[..], &few, more].concat())
    };
    let advice = "or write --dense for other programs";
    assert!(svd(&family("gpt2"), &place("family"), &[]).contains(advice));
    // It has no config that other programs know.
    assert!(!svd("embedded", &place("own"), &[]).contains(advice));
    let dense = svd("embedded", &place("dense"), &["--dense"]);
    assert!(dense.contains("before they were written out") && !dense.contains(advice));
    let text = write(&directory, "text", "the dogs sing ".repeat(40).as_bytes());
    let (model, out) = (family("gpt2"), place("whole"));
    // A fifth of two blocks is none.
    let mut done = lapidary(&[
        "compress",
        &model,
        "--method",
        "block-influence",
        "--ratio",
        "0.2",
        "--calibrate",
        &text,
        "--windows",
        "2",
        "--window",
        "16",
        "--out",
        &out,
    ]);
    let done = done.assert().success();
    let warning = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(
        warning.contains("block-influence leaves every module as it is"),
        "{warning}"
    );
}

#[test]
fn a_directory_may_be_there_and_empty_and_those_above_it_missing() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(place("cut")).unwrap();
    // When the second is written, a full `cut` stands where `new` will.
    for out in ["cut", "new/cut"] {
        let out = place(out);
        output(&[
            "compress",
            "embedded",
            "--method",
            "svd",
            "--windows",
            "2",
            "--window",
            "16",
            "--out",
            &out,
        ]);
        assert!(Path::new(&out).join("lapidary.json").is_file());
    }
    // Nothing else was left.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
}

/// `case.safetensors` lies beside the weights.
#[test]
fn files_that_a_model_is_not_read_from_are_not_counted() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["gpt2", "llama"] {
        let out = directory.path().join(name);
        let model = family(name);
        let report = json(&[
            "compress",
            &model,
            "--method",
            "svd",
            "--ratio",
            "0.2",
            "--out",
            out.to_str().unwrap(),
            "--json",
        ]);
        let files = std::fs::read_dir(&model).unwrap().map(Result::unwrap);
        let weights = files.filter(|file| {
            let name = file.file_name().into_string().unwrap();
            name.starts_with("model") && name.ends_with(".safetensors")
        });
        let bytes: u64 = weights.map(|file| file.metadata().unwrap().len()).sum();
        let found = report["bytes_on_disk"]["before"].as_u64();
        assert_eq!(found, Some(bytes), "{name}");
    }
}

/// What a thread's first product sets aside for good is no method's.
#[test]
fn the_memory_of_a_method_does_not_depend_on_its_place() {
    let held = |methods: &str| -> Vec<u64> {
        let found = json(&[
            "compress",
            "embedded",
            "--compare",
            methods,
            "--windows",
            "2",
            "--window",
            "16",
            "--threads",
            "1",
            "--json",
        ]);
        let rows = found["rows"].as_array().unwrap();
        let svd = rows.iter().filter(|row| row["method"] == "svd");
        svd.map(|row| row["memory"].as_u64().unwrap()).collect()
    };
    let (first, second) = (held("svd,magnitude")[0], held("magnitude,svd")[0]);
    assert!(first < 2 * second, "{first} and {second}");
    let [first, second] = held("svd,svd")[..] else {
        panic!("a row for each time that it is named");
    };
    assert!(first.abs_diff(second) < second / 20, "{first} and {second}");
}

#[test]
fn a_comparison_says_what_each_method_needs_and_holds() {
    let found = json(&[
        "compress",
        "embedded",
        "--compare",
        "svd,first-order,int8",
        "--ratio",
        "0.3",
        "--windows",
        "2",
        "--window",
        "16",
        "--json",
    ]);
    let rows = found["rows"].as_array().unwrap();
    let needs: Vec<&str> = rows
        .iter()
        .filter_map(|row| row["needs"].as_str())
        .collect();
    assert_eq!(needs, ["nothing", "gradients", "nothing"]);
    assert!(
        rows.iter().all(|row| row["memory"].as_u64() > Some(0)),
        "{rows:?}"
    );
    let columns = found["tables"][0]["columns"].as_array().unwrap();
    assert_eq!(columns.len(), 13);
    // Rounding has no share; the others begin with the whole model.
    let plots = found["plots"].as_array().unwrap();
    let by_ratio = plots.iter().find(|plot| plot["x"] == "share removed");
    let series = by_ratio.unwrap()["series"].as_array().unwrap();
    let names: Vec<&str> = series
        .iter()
        .filter_map(|one| one["name"].as_str())
        .collect();
    assert_eq!(names, ["svd", "first-order"]);
    let whole = found["original"]["perplexity"]["value"].as_f64().unwrap();
    for one in series {
        let points = one["points"].as_array().unwrap();
        assert_eq!((points.len(), &points[1][0]), (2, &serde_json::json!(0.3)));
        let first = points[0][1].as_f64().unwrap();
        assert!(
            points[0][0] == 0.0 && (first - whole.ln()).abs() < 1e-12,
            "{first}"
        );
    }
}
