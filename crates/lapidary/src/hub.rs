//! Models from the Hugging Face hub, through its official client (feature `hub`).
//!
//! `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured: the cache is the one that Python's
//! `huggingface_hub` uses, and offline nothing but the cache is asked.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use lapidary_model::checkpoint::{INDEX_FILE, WEIGHTS_FILE};

const CONFIG: &str = "config.json";
/// Files that not every model has.
const OPTIONAL: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
];

/// Whether `name` has the form of a hub id: `owner/name`, or a name alone.
pub fn is_id(name: &str) -> bool {
    let valid = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let mut parts = name.split('/');
    let (Some(first), second, None) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    valid(first) && second.is_none_or(valid)
}

/// The directory with the model's files, downloaded where the cache lacks them.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let offline = std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    let cache = Cache::from_env().model(id.to_owned());
    if offline {
        let config = cache.get(CONFIG).with_context(|| {
            format!("model {id} is not in the cache, and HF_HUB_OFFLINE forbids to download it")
        })?;
        return parent(config);
    }
    let mut builder = ApiBuilder::from_env();
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let repository = builder
        .build()
        .context("the hub's client cannot start")?
        .model(id.to_owned());
    let get = |file: &str| {
        repository
            .get(file)
            .map_err(|error| unavailable(file, id, &error))
    };
    let config = get(CONFIG)?;
    if repository.get(WEIGHTS_FILE).is_err() {
        let index = get(INDEX_FILE)?;
        shards(&repository, id, &index)?;
    }
    for file in OPTIONAL {
        // Absent files are told apart from failures by what the model then lacks.
        let _ = repository.get(file);
    }
    parent(config)
}

fn shards(repository: &ApiRepo, id: &str, index: &std::path::Path) -> Result<()> {
    let text = lapidary_model::files::read_text(index, 64 << 20)?;
    let index: serde_json::Value = serde_json::from_str(&text)?;
    let Some(map) = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
    else {
        bail!("the index of model {id} has no weight_map");
    };
    let mut files: Vec<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
    files.sort_unstable();
    files.dedup();
    for file in files {
        repository
            .get(file)
            .map_err(|error| unavailable(file, id, &error))?;
    }
    Ok(())
}

/// That a file cannot be had, and why. The client's errors say their causes and hand them on as well:
/// as a chain they would say each twice.
fn unavailable(file: &str, id: &str, error: &ApiError) -> anyhow::Error {
    anyhow!("{file} of model {id} cannot be had from the hub: {error}")
}

fn parent(config: PathBuf) -> Result<PathBuf> {
    config
        .parent()
        .map(PathBuf::from)
        .context("the hub's cache has no directory")
}
