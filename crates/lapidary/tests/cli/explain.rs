//! `explain` and `diff`.

use super::*;

#[test]
fn explains_the_embedded_model_by_every_method() {
    let text = "the farmer near the dogs";
    for method in [
        "decompx",
        "attnlrp",
        "contextual-decomposition",
        "cp-lrp",
        "gradient-x-input",
        "integrated-gradients",
    ] {
        let document = json(&[
            "explain", "embedded", "--text", text, "--target", "sings", "--foil", "sing",
            "--method", method, "--json",
        ]);
        assert_eq!(document["tokens"].as_array().unwrap().len(), 6, "{method}");
        assert_eq!(
            document["explanations"][0]["explanation"]["scores"]
                .as_array()
                .unwrap()
                .len(),
            6,
            "{method}"
        );
        assert_eq!(document["explanations"][0]["target"], "sings");
    }
    let document = json(&[
        "explain", "embedded", "--text", text, "--method", "decompx", "--json",
    ]);
    let account = &document["explanations"][0]["explanation"]["account"];
    assert!(account["unattributed"].as_f64().unwrap().abs() < 1e-3);
    assert!(account["largest_site_error"].as_f64().unwrap() < 1e-4);
}

#[test]
fn a_phrase_is_explained_as_one() {
    let mut arguments = vec!["explain", "embedded", "--text", "the farmer near the dogs"];
    arguments.extend(["--method", "contextual-decomposition", "--split-attention"]);
    arguments.extend(["--stabilise", "--phrase", "1-2", "--json"]);
    let explanation = json(&arguments)["explanations"][0]["explanation"].clone();
    assert_eq!(explanation["unit"], "phrase");
    assert_eq!(explanation["scores"].as_array().unwrap().len(), 5);
    let name = explanation["labels"][1].as_str().unwrap();
    assert!(name.contains("the") && name.contains("farmer"), "{name}");
    let last = arguments.len() - 2;
    arguments[last] = "4-9";
    refused(&arguments, &["phrase is 4-9", "6, the number of tokens"]);
}

/// Which heads make the verb agree with its subject.
#[test]
fn finds_circuits_in_prompts_and_datasets() {
    let directory = tempfile::tempdir().unwrap();
    let rows = "n,prefix,good,bad\n0,the farmer near the dogs,sings,sing\n\
                1,the dogs near the farmer,sing,sings\n2,the farmer,no such word,sing\n";
    let dataset = write(&directory, "agreement.csv", rows.as_bytes());
    let html = directory.path().join("circuit.html");
    let html = html.to_str().unwrap();
    let mut arguments = vec!["inspect", "circuit", "embedded", "--dataset", &dataset];
    arguments.extend([
        "--columns",
        "prefix,good,bad",
        "--html",
        html,
        "--draws",
        "3",
    ]);
    arguments.extend(["--places", "query,key,value", "--prune", "--json"]);
    let found = json(&arguments);
    let notes = found["notes"].to_string();
    assert!(
        notes.contains("2 prompts") && notes.contains("1 rows left out"),
        "{notes}"
    );
    assert_eq!(found["tables"].as_array().unwrap().len(), 3);
    let nodes = found["graphs"][0]["nodes"].as_array().unwrap();
    assert_eq!(nodes.last().unwrap()["name"], "scores");
    assert!(
        std::fs::read_to_string(html)
            .unwrap()
            .contains("svg class=\"graph\"")
    );

    let text = "the farmer near the dogs";
    let one = [
        "inspect",
        "circuit",
        "embedded",
        "--text",
        text,
        "--positions",
        "--draws",
        "2",
    ];
    let printed = output(&one);
    assert!(
        printed.contains("Random circuits") && printed.contains("@"),
        "{printed}"
    );
    arguments[6] = "prefix,right,bad";
    refused(&arguments, &["no column \"right\"", "prefix"]);
}

#[test]
fn explains_every_family_that_reads_text() {
    for name in [
        "gpt2",
        "opt",
        "llama",
        "bert",
        "bert-classifier",
        "roberta-classifier",
        "mamba",
        "mixtral",
        "clip",
    ] {
        for method in ["decompx", "attnlrp", "logit-attribution"] {
            let model = family(name);
            let document = json(&[
                "explain", &model, "--tokens", "5,9,3,17", "--method", method, "--json",
            ]);
            let account = &document["explanations"][0]["explanation"]["account"];
            if method != "attnlrp" {
                let left = account["unattributed"].as_f64().unwrap();
                let scale = account["explained"].as_f64().unwrap().abs().max(1.0);
                assert!(left.abs() < 1e-3 * scale, "{name} {method}: {account}");
            }
        }
    }
}

#[test]
fn alti_logit_names_what_no_token_gets() {
    for name in ["gpt2", "opt", "llama"] {
        let model = family(name);
        let arguments = [
            "explain",
            &model,
            "--tokens",
            "5,9,3,17",
            "--method",
            "alti-logit",
        ];
        let document = json(&[&arguments[..], &["--json"]].concat());
        let account = &document["explanations"][0]["explanation"]["account"];
        let elsewhere = account["elsewhere"].as_array().unwrap();
        let parts: f64 = elsewhere.iter().map(|part| part[1].as_f64().unwrap()).sum();
        let number = |name: &str| account[name].as_f64().unwrap();
        let left = number("explained") - number("attributed") - parts;
        assert!(
            left.abs() < 1e-4 * number("explained").abs().max(1.0),
            "{name}: {account}"
        );
        assert!(
            elsewhere.iter().any(|part| part[0] == "feed-forward parts"),
            "{name}"
        );
        let traced = json(&[&arguments[..], &["--trace-feedforward", "--json"]].concat());
        let elsewhere = traced["explanations"][0]["explanation"]["account"]["elsewhere"]
            .as_array()
            .unwrap();
        assert!(
            !elsewhere.iter().any(|part| part[0] == "feed-forward parts"),
            "{name}"
        );
    }
    let model = family("bert-classifier");
    let post_norm = [
        "explain",
        &model,
        "--tokens",
        "5,9,3,17",
        "--method",
        "alti-logit",
    ];
    refused(&post_norm, &["post-norm", "globenc"]);
}

#[test]
fn explains_and_compresses_what_reads_images() {
    let directory = tempfile::tempdir().unwrap();
    let one = write(&directory, "one.json", &images(1, 16));
    let many = write(&directory, "many.json", &images(8, 16));
    for name in ["vit", "deit", "clip"] {
        let document = json(&["explain", &family(name), "--input", &one, "--json"]);
        let tokens = document["tokens"].as_array().unwrap();
        assert_eq!(tokens[0], "[class]", "{name}");
        assert_eq!(tokens.last().unwrap(), "row 3 column 3", "{name}");
        let explanation = &document["explanations"][0]["explanation"];
        let scores = explanation["scores"].as_array().unwrap();
        assert_eq!(scores.len(), tokens.len(), "{name}");
        let left_out = explanation["account"]["unattributed"].as_f64().unwrap();
        assert!(left_out.abs() < 1e-4, "{name}: {left_out}");
    }
    let vit = family("vit");
    refused(&["explain", &vit, "--input", &many], &["8", "one example"]);
    refused(
        &["explain", &family("gpt2"), "--input", &one],
        &["input_ids"],
    );
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let arguments = ["--method", "fwsvd", "--ratio", "0.2", "--out", out];
    refused(
        &[&["compress", &vit], &arguments[..]].concat(),
        &["pixel_values"],
    );
    let calibrated = ["compress", &vit, "--calibrate", &many, "--json"];
    let document = json(&[&calibrated[..], &arguments[..]].concat());
    assert_eq!(document["agreement_on_calibration"]["predictions"], 8);
    json(&["explain", out, "--input", &one, "--json"]);
}

#[test]
fn padding_gets_nothing_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let padded =
        br#"{"input_ids": [[2, 5, 6, 7, 3, 0, 0]], "attention_mask": [[1, 1, 1, 1, 1, 0, 0]]}"#;
    let padded = write(&directory, "padded.json", padded);
    for name in ["bert-classifier", "gpt2"] {
        let model = family(name);
        let alone = json(&["explain", &model, "--tokens", "2,5,6,7,3", "--json"]);
        let document = json(&["explain", &model, "--input", &padded, "--json"]);
        assert_eq!(document["target"], alone["target"], "{name}");
        let scores = |document: &Value| -> Vec<f64> {
            let scores = document["explanations"][0]["explanation"]["scores"]
                .as_array()
                .unwrap();
            scores.iter().map(|score| score.as_f64().unwrap()).collect()
        };
        let (found, expected) = (scores(&document), scores(&alone));
        assert_eq!(&found[5..], [0.0, 0.0], "{name}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{name}: {found} {expected}"
            );
        }
    }
}

#[test]
fn explains_by_all_methods_at_once_and_on_one_page() {
    let directory = tempfile::tempdir().unwrap();
    let page = directory.path().join("page.html");
    let text = "the farmer near the dogs";
    let base = ["explain", "embedded", "--text", text, "--method", "all"];
    let arguments = [&base[..], &["--target", "sings", "--target", "sing"]].concat();
    let document = json(&[&arguments[..], &["--json"]].concat());
    let all = document["explanations"].as_array().unwrap();
    let methods: std::collections::BTreeSet<_> = all
        .iter()
        .map(|one| one["explanation"]["method"].as_str().unwrap())
        .collect();
    for method in ["attnlrp", "cp-lrp", "decompx", "logit-attribution"] {
        assert!(methods.contains(method), "{methods:?}");
    }
    // Both targets by every method, each with an account that adds up.
    assert_eq!(all.len(), 2 * methods.len());
    for one in all {
        let account = &one["explanation"]["account"];
        let number = |name: &str| account[name].as_f64().unwrap();
        let elsewhere = account["elsewhere"].as_array().into_iter().flatten();
        let elsewhere: f64 = elsewhere.map(|one| one[1].as_f64().unwrap()).sum();
        let sum = number("attributed") + elsewhere + number("unattributed");
        assert!((sum - number("explained")).abs() < 1e-3 * number("explained").abs().max(1.0));
    }
    output(&[&arguments[..], &["--html", page.to_str().unwrap()]].concat());
    let html = std::fs::read_to_string(page).unwrap();
    for part in [
        "type=\"radio\"",
        "value=\"cp-lrp\"",
        "Where each head looks",
        "Methods side by side",
    ] {
        assert!(html.contains(part), "{part}");
    }
    // One file: nothing is fetched.
    assert!(!html.contains("src=") && !html.contains("href="));
}

#[test]
fn methods_are_scored_on_generated_examples_and_on_files() {
    let common = [
        "--method",
        "cp-lrp,gradient-x-input",
        "--limit",
        "12",
        "--json",
    ];
    let generated = [
        "explain",
        "embedded",
        "--evaluate",
        "generated:number-agreement",
    ];
    let found = json(&[&generated[..], &common[..]].concat());
    assert_eq!(found["examples"], 12);
    assert_eq!(found["rows"].as_array().unwrap().len(), 2);
    assert_eq!(found["rows"][0]["agreement"][0]["count"], found["right"]);
    let directory = tempfile::tempdir().unwrap();
    let csv = b"prefix,target,foil,evidence\nthe farmer near the dogs,sings,sing,farmer\n\
                the farmers near the dog,sing,sings,farmers\n";
    let file = write(&directory, "data.csv", csv);
    let from_file = ["explain", "embedded", "--evaluate", &file];
    let found = json(&[&from_file[..], &common[..]].concat());
    assert_eq!(found["examples"], 2);
    let text = output(&[&from_file[..], &common[..4]].concat());
    assert!(text.contains("MRR") && text.contains("AOPC"), "{text}");
    assert!(text.contains("F1 of the highest tokens"), "{text}");
    let f1 = &found["rows"][0]["evidence_f1"];
    assert_eq!(f1["points"].as_array().unwrap().len(), 8);
    // Every word of this model is a token: scored by word, the rows are the same.
    let by_word = json(&[&from_file[..], &common[..], &["--unit", "word"]].concat());
    for (row, same) in [0, 1].map(|i| (&found["rows"][i], &by_word["rows"][i])) {
        for what in ["agreement", "evidence_f1", "masking"] {
            assert_eq!(row[what], same[what]);
        }
    }
    let bad = write(&directory, "bad.csv", b"prefix,word\na,b\n");
    refused(
        &["explain", "embedded", "--evaluate", &bad],
        &["column target"],
    );
    refused(
        &["explain", "embedded", "--evaluate", "nowhere.csv"],
        &["nowhere.csv"],
    );
    let unknown = ["explain", "embedded", "--evaluate", "generated:rhymes"];
    refused(&unknown, &["generated:rhymes", "induction"]);
}

/// Words of several tokens are scored as one, everywhere; what the account says stays.
#[test]
fn words_are_explained_in_place_of_their_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let model = family("bert-classifier");
    let page = directory.path().join("page.html");
    let text = ["explain", &model, "--text", "the birds cutely seeing"];
    let methods = ["--method", "decompx,gradient-x-input"];
    let tokens = json(&[&text[..], &methods, &["--json"]].concat());
    let html = ["--unit", "word", "--json", "--html", page.to_str().unwrap()];
    let words = json(&[&text[..], &methods, &html].concat());
    let names = ["[CLS]", "the", "birds", "cutely", "seeing", "[SEP]"];
    assert_eq!(words["words"].as_array().unwrap(), &names);
    assert_eq!(words["tokens"], tokens["tokens"]);
    let count = tokens["tokens"].as_array().unwrap().len();
    assert!(count > names.len());
    for (before, after) in [0, 1].map(|i| (&tokens["explanations"][i], &words["explanations"][i])) {
        let (before, after) = (&before["explanation"], &after["explanation"]);
        assert_eq!(after["unit"], "word");
        assert_eq!(before["account"], after["account"]);
        let sum = |of: &Value| {
            of.as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_f64().unwrap())
                .sum::<f64>()
        };
        assert!((sum(&before["scores"]) - sum(&after["scores"])).abs() < 1e-9);
        let own: Vec<f64> = serde_json::from_value(before["scores"].clone()).unwrap();
        // "cutely" is cut ##e ##ly.
        let whole = after["scores"][3].as_f64().unwrap();
        assert!((own[3..6].iter().sum::<f64>() - whole).abs() < 1e-12);
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("cutely"), "words are on the page");
    let by_word = output(&[&text[..], &["--unit", "word"]].concat());
    assert!(
        by_word.contains("cutely") && !by_word.contains("##"),
        "{by_word}"
    );
    let both = output(&[&text[..], &methods, &["--unit", "word"]].concat());
    assert!(both.contains("cutely") && !both.contains("##"), "{both}");
}

#[test]
fn two_models_are_compared() {
    let directory = tempfile::tempdir().unwrap();
    let cut = directory.path().join("cut");
    let cut = cut.to_str().unwrap();
    output(&[
        "compress", "embedded", "--ratio", "0.5", "--method", "svd", "--out", cut,
    ]);
    let text = [
        "--text",
        "the farmer near the dogs",
        "--target",
        "sings",
        "--foil",
        "sing",
    ];
    let found = json(&[&["diff", "embedded", cut][..], &text[..], &["--json"]].concat());
    assert!(found["output"]["divergence"].as_f64().unwrap() > 0.0);
    let changes: Vec<f64> = found["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["after"].as_f64().unwrap() - one["before"].as_f64().unwrap()).abs())
        .collect();
    assert!(changes.is_sorted_by(|a, b| a >= b), "{changes:?}");
    let said = output(&[&["diff", "embedded", cut][..], &text[..]].concat());
    assert!(said.contains("Parts whose contribution moved"), "{said}");
    let bert = family("bert-classifier");
    refused(
        &["diff", "embedded", &bert, "--tokens", "1,2,900"],
        &["900"],
    );
}

/// The classifier that a reproduction trains is a model like any other.
#[test]
fn a_kept_classifier_is_explained_on_polarity() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (models, out) = (at("models"), at("out"));
    let scale = ["--scale", "smoke", "--models", &models, "--out", &out];
    output(&[&["reproduce", "decompx"][..], &scale[..]].concat());
    let polarity = at("models/polarity");
    let found = json(&[
        "explain",
        &polarity,
        "--evaluate",
        "generated:polarity",
        "--method",
        "decompx,globenc",
        "--limit",
        "20",
        "--json",
    ]);
    assert_eq!(found["examples"], 20);
    assert!(found["right"].as_u64().unwrap() > 0);
    assert!(found["rows"][1]["refused"].is_null());
    let other = ["explain", "embedded", "--evaluate", "generated:polarity"];
    refused(&other, &["reproduce decompx --models"]);
}

#[test]
fn a_kept_image_model_is_explained_on_glyphs() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (models, out) = (at("models"), at("out"));
    let scale = ["--scale", "smoke", "--models", &models, "--out", &out];
    output(&[&["reproduce", "chefer"][..], &scale[..]].concat());
    let glyphs = at("models/glyphs");
    let on = ["--evaluate", "generated:glyphs", "--limit", "24", "--json"];
    let method = ["--method", "chefer,attention-rollout,globenc"];
    let found = json(&[&["explain", &glyphs][..], &on[..], &method[..]].concat());
    assert_eq!(found["examples"], 24);
    let right = found["right"].as_u64().unwrap();
    let rows = found["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["mass"]["count"], right);
    assert!(rows[2]["refused"].as_str().unwrap().contains("globenc"));
    for row in &rows[..2] {
        for share in ["pixel_accuracy", "positive_perturbation", "insertion"] {
            let share = row[share].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&share));
        }
    }
    let other = ["explain", "embedded", "--evaluate", "generated:glyphs"];
    refused(&other, &["reproduce chefer --models"]);
}
