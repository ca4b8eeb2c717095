//! `inspect`.

use super::*;

#[test]
fn attention_is_inspected() {
    let found = json(&[
        "inspect",
        "attention",
        "embedded",
        "--text",
        "the farmer sings",
        "--json",
    ]);
    let rows = found["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 24);
    lapidary(&["inspect", "attention", "embedded"])
        .assert()
        .code(2);
}

#[test]
fn components_of_tokens_are_shown() {
    let arguments = [
        "inspect",
        "components",
        "embedded",
        "--text",
        "the farmer sings",
        "--json",
    ];
    let found = json(&arguments);
    let rows = found["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    let map = &found["maps"][0];
    assert_eq!(map["rows"].as_array().unwrap().len(), 3);
    let tokens = map["columns"].as_array().unwrap().len();
    let values = map["values"].as_array().unwrap();
    assert!(
        values
            .iter()
            .all(|row| row.as_array().unwrap().len() == tokens)
    );
    for (more, code) in [(["--components", "0"], 2), (["--site", "nowhere"], 1)] {
        let arguments = arguments.iter().chain(&more).copied().collect::<Vec<_>>();
        lapidary(&arguments).assert().code(code);
    }
}

#[test]
fn inspects_the_geometry_of_hidden_states() {
    let document = json(&[
        "inspect",
        "geometry",
        "embedded",
        "--windows",
        "8",
        "--window",
        "24",
        "--control",
        "random",
        "--control",
        "untrained",
        "--head",
        "1.0",
        "--json",
    ]);
    let tables = document["tables"].as_array().unwrap();
    let titles: Vec<&str> = tables
        .iter()
        .filter_map(|table| table["title"].as_str())
        .collect();
    assert_eq!(titles.len(), 5, "{titles:?}");
    assert!(titles[0].ends_with("the text") && titles[1].ends_with("random tokens"));
    assert_eq!(document["maps"].as_array().unwrap().len(), 22);

    let directory = tempfile::tempdir().unwrap();
    for (name, text) in [("a", "the farmer sings . "), ("b", "the dogs sing . ")] {
        write(&directory, name, text.repeat(30).as_bytes());
    }
    let topics = directory.path().to_str().unwrap();
    let document = json(&[
        "inspect",
        "geometry",
        "embedded",
        "--topics",
        topics,
        "--windows",
        "6",
        "--window",
        "16",
        "--json",
    ]);
    let rows = &document["tables"][2]["rows"];
    assert!(rows[1][1].is_number(), "{rows}");
    refused(
        &["inspect", "geometry", "embedded", "--window", "2"],
        &["window is 2", "between 3"],
    );
    let missing = family("gpt2");
    refused(&["inspect", "geometry", &missing], &["--text", "--topics"]);
}

#[test]
fn inspects_where_sequences_collapse() {
    let directory = tempfile::tempdir().unwrap();
    let prompts = write(
        &directory,
        "prompts",
        b"sings\tthe farmer\nsing\tthe dogs\n",
    );
    let document = json(&[
        "inspect",
        "collapse",
        "embedded",
        "--one",
        "dogs",
        "--zero",
        "farmer",
        "--longest",
        "24",
        "--lengths",
        "6",
        "--format",
        "bf16",
        "--separator",
        "#3",
        "--sharpen",
        "8",
        "--prompts",
        &prompts,
        "--json",
    ]);
    let rows = document["tables"][0]["rows"].as_array().unwrap();
    // Three families, two formats, with no remedy and two.
    assert_eq!(rows.len(), 18);
    assert_eq!(document["tables"][1]["rows"].as_array().unwrap().len(), 2);
    refused(
        &["inspect", "collapse", "embedded", "--one", "unheard-of"],
        &["one is", "unheard-of"],
    );
}

#[test]
fn inspects_channels_clusters_particles_and_energy() {
    for name in ["gpt2", "opt", "llama", "mixtral"] {
        let document = json(&[
            "inspect",
            "channels",
            &family(name),
            "--threshold",
            "1",
            "--draws",
            "99",
            "--json",
        ]);
        assert!(
            !document["tables"][0]["rows"].as_array().unwrap().is_empty(),
            "{name}"
        );
    }
    refused(&["inspect", "channels", &family("bert")], &["post-norm"]);
    refused(&["inspect", "channels", &family("mamba")], &["heads"]);
    let layers = |passes: &str| {
        let document = json(&[
            "inspect",
            "clusters",
            &family("gpt2"),
            "--tokens",
            "5,9,3,17",
            "--passes",
            passes,
            "--json",
        ]);
        document["tables"][0]["rows"].as_array().unwrap().len()
    };
    assert!(layers("3") > layers("1"));
    let particles = json(&[
        "inspect",
        "particles",
        "--count",
        "6",
        "--dimension",
        "2",
        "--systems",
        "2",
        "--time",
        "3",
        "--json",
    ]);
    assert_eq!(particles["plots"].as_array().unwrap().len(), 2);
    let phases = json(&[
        "inspect",
        "particles",
        "--count",
        "4",
        "--systems",
        "2",
        "--time",
        "2",
        "--beta",
        "0,2",
        "--matrices",
        "symmetric",
        "--json",
    ]);
    assert_eq!(phases["maps"][0]["rows"].as_array().unwrap().len(), 2);
    refused(&["inspect", "particles", "--step", "0"], &["positive"]);
    let directory = tempfile::tempdir().unwrap();
    let film = directory.path().join("film.svg");
    let film = film.to_str().unwrap();
    let short = ["inspect", "particles", "--time", "3", "--systems", "2"];
    output(&[&short[..], &["--count", "5", "--film", film]].concat());
    let svg = std::fs::read_to_string(film).unwrap();
    assert_eq!(svg.matches("attributeName=\"cx\"").count(), 5);
    refused(
        &[&short[..], &["--beta", "1,2", "--film", film]].concat(),
        &["one temperature", "2"],
    );
    let albert = family("albert-masked-lm");
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let deeper = [
        "inspect",
        "clusters",
        &albert,
        "--tokens",
        "2,5,6,7,3",
        "--json",
    ];
    let document = json(&[&deeper[..], &["--depth", "9"]].concat());
    assert_eq!(document["tables"][0]["rows"].as_array().unwrap().len(), 10);
    let once = json(&deeper);
    assert_eq!(once["tables"][0]["rows"].as_array().unwrap().len(), 3);
    refused(
        &[
            "inspect", "clusters", "embedded", "--text", "the cat", "--depth", "9",
        ],
        &["shares its weights"],
    );
    refused(
        &[
            "compress", &albert, "--method", "svd", "--ratio", "0.5", "--out", out,
        ],
        &["shared by several blocks"],
    );

    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings . ".repeat(8);
    let (training, held_out) = (
        write(&directory, "training.txt", text.as_bytes()),
        write(
            &directory,
            "held.txt",
            text.replace("near", "behind").as_bytes(),
        ),
    );
    let energy = json(&[
        "inspect",
        "energy",
        "embedded",
        "--text",
        &training,
        "--held-out",
        &held_out,
        "--window",
        "8",
        "--json",
    ]);
    assert_eq!(energy["tables"].as_array().unwrap().len(), 3);
}

#[test]
fn inspects_texts_along_the_curvature() {
    let directory = tempfile::tempdir().unwrap();
    let text = |name: &str, sentence: &str| write(&directory, name, sentence.repeat(16).as_bytes());
    let ordinary = text("ordinary", "the farmer near the dogs sings . ");
    let other = text("other", "the dogs near the farmer sleep . ");
    let third = text("third", "the dogs sleep . the farmer sings . ");
    let tasks = [
        format!("own={ordinary}"),
        format!("other={other}"),
        format!("third={third}"),
    ];
    let with = |extra: &[&str]| -> Vec<String> {
        let always = [
            "inspect",
            "curvature",
            "embedded",
            "--text",
            &ordinary,
            "--window",
            "14",
        ];
        let few: &[&str] = match extra.contains(&"--windows") {
            true => &["--blocks", "5"],
            false => &["--windows", "4", "--blocks", "5"],
        };
        let all = always.iter().chain(few).chain(extra);
        all.map(|part| (*part).to_owned()).collect()
    };
    let run = |extra: &[&str]| -> Value {
        let arguments = with(extra);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        json(&arguments)
    };
    let note = |count: usize| -> (Value, String) {
        let each = tasks[..count].iter();
        let each = each.flat_map(|task| ["--task", task.as_str()]);
        let extra: Vec<&str> = each.chain(["--mass", "0.5", "--json"]).collect();
        let found = run(&extra);
        let note = found["notes"][1].as_str().unwrap().to_owned();
        (found, note)
    };
    let (found, together) = note(3);
    assert!(together.contains("over 3 texts"), "{together}");
    assert!(together.contains("correlate by"), "{together}");
    // Two always lie on a line.
    let (_, together) = note(2);
    assert!(together.contains("at least 3 texts, not 2"), "{together}");
    assert!(!together.contains("correlate"), "{together}");
    let costs = found["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(costs.len(), 3);
    for row in costs {
        let number = |column: usize| row[column].as_f64().unwrap();
        assert!(number(1) > 0.0 && number(2) > 0.0);
        assert!((number(4) - (number(3) - number(2))).abs() < 1e-9);
    }
    let bands = found["maps"][0]["values"][0].as_array().unwrap();
    assert_eq!(bands.len(), 7);
    let recited = found["tables"][1]["rows"][0].as_array().unwrap();
    assert_eq!(recited.len(), 8);
    assert!(found["tables"][2].is_null());
    let found = run(&[
        "--task",
        &tasks[0],
        "--forget",
        &other,
        "--mask-steps",
        "2",
        "--json",
    ]);
    let masked = found["tables"][2]["rows"][0].as_array().unwrap();
    let number = |column: usize| masked[column].as_f64().unwrap();
    assert!(number(1) > 0.0 && (0.0..=1.0).contains(&number(6)));
    for (extra, words) in [
        (vec!["--task", "own"], &["NAME=FILE"][..]),
        (
            vec!["--task", &tasks[0], "--mass", "1"],
            &["mass is 1", "below 1"][..],
        ),
        (
            vec!["--task", &tasks[0], "--shown", "14"],
            &["tokens that are shown", "between 1 and 13"][..],
        ),
        (
            vec!["--task", &tasks[0], "--windows", "0"],
            &["gives no window"][..],
        ),
    ] {
        let arguments = with(&extra);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        refused(&arguments, words);
    }
}
