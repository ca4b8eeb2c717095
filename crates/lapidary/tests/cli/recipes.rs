//! Recipes and comparisons: what is left out, what is refused before the work, and what a stage is told.

use crate::{family, json, lapidary, output, refused, write};

/// Where a tokenizer has no mask token, what needs gradients is left out, and the rest goes on.
#[test]
fn a_comparison_goes_on_where_nothing_can_be_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings and the dogs sing ".repeat(20);
    let text = write(&directory, "text", text.as_bytes());
    let page = directory.path().join("page.html");
    let model = family("roberta-masked-lm");
    let arguments = [
        "compress",
        &model,
        "--compare",
        "svd,whitened,fwsvd,first-order,curvature,int8",
        "--ratio",
        "0.3,0.5",
        "--calibrate",
        &text,
        "--windows",
        "4",
        "--window",
        "16",
        "--html",
        page.to_str().unwrap(),
    ];
    let found = json(&[&arguments[..], &["--json"]].concat());
    let rows = found["rows"].as_array().unwrap();
    let names: Vec<&str> = rows
        .iter()
        .filter_map(|row| row["method"].as_str())
        .collect();
    assert_eq!(names, ["svd", "svd", "whitened", "whitened", "int8"]);
    for row in rows {
        assert!(row["divergence"].is_f64() && row["measured"]["prefill"].is_f64());
        let [row, measured] = [row, &row["measured"]].map(|value| value.as_object().unwrap());
        assert!(!row.contains_key("cosine") && !measured.contains_key("perplexity"));
    }
    let left_out = found["left_out"].as_array().unwrap();
    let names: Vec<&str> = left_out
        .iter()
        .filter_map(|pair| pair[0].as_str())
        .collect();
    assert_eq!(names, ["fwsvd", "first-order", "curvature"]);
    // One reason is told once, and columns without numbers are not there.
    let page = std::fs::read_to_string(&page).unwrap();
    let text = output(&arguments);
    for shown in [&page, &text] {
        assert_eq!(shown.matches("left out: ").count(), 1, "{shown}");
        assert!(shown.contains("left out: fwsvd, first-order, curvature, since target of the"));
        assert!(shown.contains("not measured"), "{shown}");
    }
    let columns = found["tables"][0]["columns"].as_array().unwrap();
    assert!(!columns.iter().any(|name| name == "perplexity"));
    assert!(columns.iter().any(|name| name == "same answer"));
}

/// What cannot be healed, and stages that cannot follow each other, are told before anything is cut.
#[test]
fn recipes_and_healing_are_refused_before_the_work() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let short = write(
        &directory,
        "short",
        "the farmer sings ".repeat(8).as_bytes(),
    );
    let model = family("llama");
    let arguments = [
        "compress",
        &model,
        "--calibrate",
        &short,
        "--window",
        "60",
        "--windows",
        "1",
        "--out",
        out,
    ];
    let with = |more: &[&str], words: &[&str]| refused(&[&arguments[..], more].concat(), words);
    with(
        &["--method", "slicegpt+block-influence", "--ratio", "0.5"],
        &["--reorder runs it as block-influence+slicegpt", "shortcuts"],
    );
    with(
        &["--method", "svd+magnitude", "--ratio", "0.5"],
        &["place of magnitude is after svd", "factors"],
    );
    with(
        &["--method", "slicegpt", "--layers", "blocks.0.*"],
        &["--layers is for methods", "slicegpt"],
    );
    // An encoder without scores has nothing to learn but the original's vectors.
    let encoder = family("bert");
    let healed = [
        "compress",
        &encoder,
        "--method",
        "svd",
        "--calibrate",
        &short,
        "--window",
        "8",
        "--heal",
        "2",
        "--out",
        out,
    ];
    let words = ["--heal has nothing to learn", "weight of distillation is 0"];
    refused(&healed, &words);
    assert!(!std::path::Path::new(out).exists());
}

/// A stage with settings of its own is told the rest of what the whole run is told.
#[test]
fn a_stage_keeps_what_the_whole_run_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings and the dogs sing ".repeat(20);
    let text = write(&directory, "text", text.as_bytes());
    let recipe = "[[stage]]\nmethod = \"gptq\"\n[stage.settings.quantise]\nbits = 8\n";
    let recipe = write(&directory, "recipe.toml", recipe.as_bytes());
    let model = family("llama");
    let out = directory.path().join("out");
    let report = json(&[
        "compress",
        &model,
        "--recipe",
        &recipe,
        "--calibrate",
        &text,
        "--windows",
        "4",
        "--window",
        "16",
        "--layers",
        "blocks.0.*",
        "--out",
        out.to_str().unwrap(),
        "--json",
    ]);
    let modules = report["report"]["modules"].as_array().unwrap();
    assert!(!modules.is_empty());
    for module in modules {
        let path = module["path"].as_str().unwrap();
        assert!(path.starts_with("blocks.0."), "{path}");
    }
    assert_eq!(
        modules[0]["change"]["quantise"]["bits"], 8,
        "{}",
        modules[0]
    );
}

/// The same holds for the methods of a mix.
#[test]
fn a_search_goes_on_where_nothing_can_be_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings and the dogs sing ".repeat(20);
    let text = write(&directory, "text", text.as_bytes());
    let model = family("roberta-masked-lm");
    let out = directory.path().join("out");
    let found = json(&[
        "compress",
        &model,
        "--auto",
        "--budget",
        "0.9x",
        "--mix",
        "fwsvd,whitened",
        "--evaluations",
        "2",
        "--calibrate",
        &text,
        "--windows",
        "4",
        "--window",
        "16",
        "--out",
        out.to_str().unwrap(),
        "--json",
    ]);
    let left_out = found["search"]["left_out"].as_array().unwrap();
    assert_eq!(left_out.len(), 1, "{left_out:?}");
    assert_eq!(left_out[0][0], "fwsvd");
    assert_eq!(found["search"]["tried"].as_array().unwrap().len(), 2);
}

/// A ratio that there is a least against is said not to be reached: in the plan, the text, and JSON.
#[test]
fn a_ratio_that_is_not_reached_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let out = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let model = family("llama");
    let arguments = ["compress", &model, "--method", "svd", "--ratio", "0.99"];
    let words = "of the weights of its layers 99.0 % were to go, and ";
    let text = output(&[&arguments[..], &["--out", &out("text")]].concat());
    assert!(
        text.contains(&format!("ratio       svd: {words}")),
        "{text}"
    );
    let found = json(&[&arguments[..], &["--out", &out("json"), "--json"]].concat());
    let short = &found["report"]["shortfall"];
    assert!(short["taken"].as_f64() < short["asked"].as_f64(), "{short}");
    let done = lapidary(&[&arguments[..], &["--plan-only"]].concat())
        .assert()
        .success();
    let warning = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(warning.contains(words), "{warning}");
    let compared = [
        "compress",
        &model,
        "--compare",
        "svd",
        "--ratio",
        "0.5,0.99",
    ];
    let text = output(&compared);
    assert!(text.contains(&format!("svd at 0.99: {words}")), "{text}");
    assert!(!text.contains("svd at 0.5"), "{text}");
}

/// What the data decides is refused in its turn, with what it comes after and the order that is better; what is
/// sure is refused before.
#[test]
fn blocks_that_were_cut_unlike_are_not_fused() {
    for (methods, words) in [
        (
            "modegpt+fusegpt",
            [
                "--reorder runs it as fusegpt+modegpt: ",
                "fusegpt cannot be run on what modegpt left: blocks.",
            ],
        ),
        (
            "prune-heads+fusegpt",
            [
                "--reorder runs it as fusegpt+prune-heads: ",
                "place of fusegpt is after prune-heads, which leaves blocks of different shapes at this ratio",
            ],
        ),
    ] {
        let arguments = [
            "compress",
            "embedded",
            "--method",
            methods,
            "--ratio",
            "0.3+0.2",
            "--windows",
            "2",
            "--window",
            "16",
            "--out",
            "x",
        ];
        refused(&arguments, &words);
    }
}
