//! `lapidary inspect clip`, as a user runs it on a small CLIP of two towers.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

fn model() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families/clip");
    path.to_str().unwrap().to_owned()
}

/// A directory with three pictures, texts and classes.
struct Study(tempfile::TempDir);

impl Study {
    fn new() -> Self {
        let study = Self(tempfile::tempdir().unwrap());
        for (name, colour) in [
            ("blue", [0, 0, 255]),
            ("green", [0, 255, 0]),
            ("red", [255, 0, 0]),
        ] {
            // Not square, and larger than the model's 16 by 16.
            let pixels: Vec<u8> = (0..40 * 30)
                .flat_map(|i| if i % 7 < 5 { colour } else { [255; 3] })
                .collect();
            let file = std::fs::File::create(study.path(&format!("{name}.png"))).unwrap();
            let mut encoder = png::Encoder::new(file, 40, 30);
            encoder.set_color(png::ColorType::Rgb);
            let mut writer = encoder.write_header().unwrap();
            writer.write_image_data(&pixels).unwrap();
            writer.finish().unwrap();
        }
        std::fs::write(
            study.path("texts.txt"),
            "a dog\na cat\n\nthe sea\n a tree \n",
        )
        .unwrap();
        std::fs::write(study.path("classes.txt"), "dog\ncat\n").unwrap();
        study
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::cargo_bin("lapidary").unwrap();
        command
            .args(["inspect", "clip", &model(), "--images"])
            .arg(self.0.path())
            .arg("--texts")
            .arg(self.path("texts.txt"))
            .args(more)
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG");
        command
    }

    fn json(&self, more: &[&str]) -> Value {
        let done = self.command(more).arg("--json").assert().success();
        serde_json::from_slice(&done.get_output().stdout).unwrap()
    }

    fn refused(&self, more: &[&str], said: &str) {
        let done = self.command(more).assert().failure().code(1);
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        assert!(
            error.starts_with("error: ") && error.contains(said),
            "{error}"
        );
    }
}

#[test]
fn a_report_names_heads_and_shares_out_the_embedding() {
    let study = Study::new();
    let classes = study.path("classes.txt");
    let html = study.path("report.html");
    let report = study.json(&[
        "--heads",
        "0.1,1.3",
        "--count",
        "2",
        "--heat",
        "a dog",
        "--nearest",
        "the sea",
        "--classes",
        classes.to_str().unwrap(),
        "--without",
        "1.0",
        "--html",
        html.to_str().unwrap(),
    ]);
    assert!(
        report["notes"]
            .to_string()
            .contains("no preprocessor_config.json")
    );
    let table = |index: usize| report["tables"][index]["rows"].as_array().unwrap();
    let share: f64 = table(0).iter().map(|row| row[1].as_f64().unwrap()).sum();
    assert!((share - 1.0).abs() < 1e-4, "{share}");
    let heads: Vec<&str> = table(1)
        .iter()
        .map(|row| row[0].as_str().unwrap())
        .collect();
    assert_eq!(heads, ["0.1", "1.3"]);
    assert_eq!(table(1)[0][2].as_str().unwrap().matches('%').count(), 2);
    assert!(table(2)[0][1].as_str().unwrap().contains(".png"));
    assert_eq!(table(3).len(), 3, "three images are classified");
    assert_eq!(table(3)[0].as_array().unwrap().len(), 3);
    let heat = report["maps"][1]["values"].as_array().unwrap();
    assert_eq!(heat.len(), 4, "rows of patches");
    assert!(std::fs::read_to_string(html).unwrap().contains("Where"));
}

#[test]
fn templates_come_from_a_file_too() {
    let study = Study::new();
    let (classes, file) = (study.path("classes.txt"), study.path("templates.txt"));
    let classes = classes.to_str().unwrap();
    std::fs::write(&file, "a photo of a {}.\n\n  the {} \n").unwrap();
    let file = file.to_str().unwrap();
    let from_file = study.json(&["--classes", classes, "--templates", file]);
    let given = ["--classes", classes, "--template", "a photo of a {}."];
    let both = study.json(&[&given[..], &["--template", "the {}"]].concat());
    assert_eq!(from_file, both);
    std::fs::write(study.path("templates.txt"), "a {}\na photo\n").unwrap();
    study.refused(&["--classes", classes, "--templates", file], "template 2");
}

/// Two towers are scored on pictures of shapes by the words for the shapes.
#[test]
fn methods_are_scored_on_captioned_pictures() {
    let evaluate = |model: &str| {
        let mut command = Command::cargo_bin("lapidary").unwrap();
        command.args(["explain", model, "--evaluate", "generated:attributes"]);
        command.args([
            "--method",
            "raw-attention,random",
            "--limit",
            "40",
            "--json",
        ]);
        command.assert()
    };
    let done = evaluate(&model()).success();
    let found: Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!(found["examples"], 40);
    let right = found["right"].as_u64().unwrap();
    assert!((1..40).contains(&right), "{right}");
    let rows = found["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert!(row.get("refused").is_none(), "{row}");
        let mass = row["mass"]["mean"].as_f64().unwrap();
        assert!(mass > 0.0 && mass < 1.0, "{row}");
    }
    let refused = evaluate(&model().replace("clip", "vit")).failure();
    let message = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(message.contains("4 shapes"), "{message}");
}

#[test]
fn scratch_on_disk_says_the_same_and_leaves_nothing() {
    let study = Study::new();
    let scratch = study.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let on_disk = study.json(&["--scratch", scratch.to_str().unwrap()]);
    assert_eq!(on_disk, study.json(&[]));
    assert_eq!(std::fs::read_dir(scratch).unwrap().count(), 0);
}

#[test]
fn what_does_not_fit_is_refused_in_a_sentence() {
    let study = Study::new();
    study.refused(&["--heads", "7.0"], "below 2");
    study.refused(&["--heads", "one"], "layer.head");
    study.refused(&["--image", "3"], "below 3");
    let classes = study.path("classes.txt");
    let classes = classes.to_str().unwrap();
    study.refused(&["--classes", classes, "--template", "a photo"], "{}");
    std::fs::write(study.path("broken.png"), b"\x89PNG\r\n\x1a\nrest").unwrap();
    study.refused(&[], "broken.png");
    std::fs::write(study.path("texts.txt"), "\n\n").unwrap();
    study.refused(&[], "between 1 and");
}

/// The same pixel values, given as JSON, give the same report.
#[test]
fn pixel_values_may_be_given_as_json() {
    let study = Study::new();
    let values = vec![vec![vec![vec![0.25; 16]; 16]; 3]; 2];
    let file = study.path("pixels.json");
    std::fs::write(
        &file,
        serde_json::json!({ "pixel_values": values }).to_string(),
    )
    .unwrap();
    let done = Command::cargo_bin("lapidary")
        .unwrap()
        .args(["inspect", "clip", &model(), "--json", "--images"])
        .arg(&file)
        .arg("--texts")
        .arg(study.path("texts.txt"))
        .assert()
        .success();
    let report: Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert!(
        report["notes"][0]
            .as_str()
            .unwrap()
            .contains("2 images, 4 texts")
    );
}
