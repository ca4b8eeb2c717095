//! The invariants of ARCHITECTURE.md that a look at the sources can keep.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lapidary::kernels::{AttentionOptions, DType, Device, Tensor, attention};
use lapidary::model::{Input, Pass};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn toml_of(path: &Path) -> toml::Table {
    read(path).parse().unwrap()
}

/// The crates' names, which are those of their directories.
fn crates() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("crates")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 10, "{names:?}");
    names
}

fn manifest(name: &str) -> toml::Table {
    toml_of(&root().join("crates").join(name).join("Cargo.toml"))
}

/// What a manifest depends on, for whatever purpose and platform.
fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for (key, value) in manifest {
        match (key.as_str(), value.as_table()) {
            ("dependencies" | "dev-dependencies" | "build-dependencies", Some(table)) => {
                all.extend(table.keys().cloned());
            }
            ("target", Some(targets)) => {
                let tables = targets.values().filter_map(toml::Value::as_table);
                all.extend(tables.flat_map(dependencies));
            }
            _ => {}
        }
    }
    all
}

/// Every file below `directory` with one of these extensions.
fn files(directory: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !["target", "corpus", "artifacts", "fixtures"].contains(&name)
                && !name.starts_with('.')
            {
                found.extend(files(&path, extensions));
            }
        } else if extensions.iter().any(|extension| name.ends_with(extension)) {
            found.push(path);
        }
    }
    found
}

fn sources(name: &str) -> Vec<PathBuf> {
    files(&root().join("crates").join(name).join("src"), &[".rs"])
}

#[test]
fn only_kernels_knows_the_tensor_engine() {
    for name in crates() {
        let knows = dependencies(&manifest(&name))
            .iter()
            .any(|dependency| dependency.starts_with("candle"));
        assert_eq!(knows, name == "kernels", "{name}");
    }
}

/// The rows of ARCHITECTURE.md's table: a crate, and what it says it uses.
fn table() -> Vec<(String, String)> {
    let text = read(&root().join("ARCHITECTURE.md"));
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0].trim_matches('`').to_owned(), cells[2].to_owned())
    })
    .collect()
}

#[test]
fn rooms_do_not_point_back_up() {
    let mut allowed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, uses) in table() {
        let mut below: BTreeSet<String> = match uses.as_str() {
            "all above" => allowed.keys().cloned().collect(),
            some => some.split(", ").map(str::to_owned).collect(),
        };
        below.remove("");
        for direct in below.clone() {
            let further = allowed.get(&direct);
            below.extend(
                further
                    .unwrap_or_else(|| panic!("{direct} is below {name}"))
                    .clone(),
            );
        }
        allowed.insert(name, below);
    }
    assert!(
        allowed.keys().eq(&crates()),
        "the table lists {:?}",
        allowed.keys()
    );
    for (name, allowed) in &allowed {
        for dependency in dependencies(&manifest(name)) {
            if let Some(room) = dependency.strip_prefix("lapidary-") {
                assert!(allowed.contains(room), "{name} depends on {room}");
            }
        }
    }
}

#[test]
fn every_crate_has_the_lints_that_forbid_panics() {
    let workspace = toml_of(&root().join("Cargo.toml"));
    for lint in ["unwrap_used", "expect_used", "panic"] {
        assert_eq!(
            workspace["workspace"]["lints"]["clippy"][lint].as_str(),
            Some("warn"),
            "{lint}"
        );
    }
    let checks = read(&root().join(".ci/run"));
    assert!(checks.contains("cargo clippy --workspace --all-targets -- -D warnings"));
    let exempts = |line: &str| {
        line.contains("allow(clippy::")
            && ["unwrap_used", "expect_used", "panic"]
                .iter()
                .any(|lint| line.contains(lint))
    };
    for name in crates() {
        let lints = manifest(&name);
        assert_eq!(lints["lints"]["workspace"].as_bool(), Some(true), "{name}");
        for path in sources(&name) {
            for line in read(&path).lines() {
                assert!(!exempts(line), "{}: {line}", path.display());
            }
        }
    }
}

/// Of each variant with an `#[error(..)]`: its message, and what stands between it and the next.
fn errors_of(text: &str) -> Vec<(&str, &str)> {
    let variants = text.split("#[error(").skip(1);
    variants
        .filter_map(|variant| variant.split_once(")]"))
        .collect()
}

#[test]
fn a_message_that_says_its_cause_does_not_hand_it_on_as_well() {
    let mut seen = 0;
    for path in crates().iter().flat_map(|name| sources(name)) {
        for (message, variant) in errors_of(&read(&path)) {
            seen += 1;
            let handed_on = variant.contains("#[from]") || variant.contains("#[source]");
            let said = message.contains("{source") || handed_on && message.contains("{0");
            assert!(!said, "{}: {message}", path.display());
        }
    }
    assert!(seen > 50, "{seen}");
}

#[test]
fn no_source_file_is_too_long_to_read() {
    for path in crates().iter().flat_map(|name| sources(name)) {
        let lines = read(&path).lines().count();
        assert!(lines <= 700, "{} has {lines} lines", path.display());
    }
}

#[test]
fn no_file_speaks_of_a_private_machine() {
    // Put together here, so that this file does not contain them.
    let private: Vec<String> = ["work", "root", "home"]
        .iter()
        .map(|directory| format!("/{directory}/"))
        .chain([["local", "host"].concat(), ["127.0", ".0.1"].concat()])
        .collect();
    let text = [
        ".rs", ".toml", ".md", ".py", ".sh", ".html", ".svg", ".json", "run",
    ];
    let all = files(&root(), &text);
    assert!(all.len() > 200, "{}", all.len());
    for path in all {
        let content = std::fs::read_to_string(&path).unwrap_or_default();
        for place in &private {
            assert!(
                !content.contains(place.as_str()),
                "{}: {place}",
                path.display()
            );
        }
    }
}

#[test]
fn masks_keep_where_they_are_one() {
    // In attention: the second key is hidden, so the first value is all there is.
    let device = Device::Cpu;
    let q = Tensor::new(&[[[[1f32, 0.0]]]], &device).unwrap();
    let k = Tensor::new(&[[[[1f32, 0.0], [0.0, 1.0]]]], &device).unwrap();
    let v = Tensor::new(&[[[[3f32, 4.0], [5.0, 6.0]]]], &device).unwrap();
    let options = AttentionOptions {
        key_padding: Some(Tensor::new(&[[1u8, 0]], &device).unwrap()),
        ..AttentionOptions::new(2)
    };
    let y = attention(&q, &k, &v, &options).unwrap();
    let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(y, [3.0, 4.0]);

    // In a model: what stands where the mask is 0 changes nothing where it is 1.
    let package = lapidary::embedded().unwrap();
    let model = package.single_model().unwrap();
    let padding = Tensor::new(&[[0u8, 1, 1]], &device).unwrap();
    let last = |first: u32| {
        let ids = Tensor::new(&[[first, 7, 9]], &device).unwrap();
        let pass = Pass {
            padding: Some(&padding),
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids), pass).unwrap();
        let logits = output.into_logits().unwrap().into_value();
        let kept = logits
            .narrow(1, 1, 2)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        kept.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(last(3), last(4));
}
