//! `lapidary export`: the same model for other programs.

use crate::cli::{Export, Global};
use crate::{loading, output};
use anyhow::{Context, Result, ensure};
use lapidary_compress::export_dense;
use lapidary_model::SavedAs;
use lapidary_model::gguf::{GgufFloat, GgufSummary, write_gguf};
use serde_json::json;

pub fn run(arguments: &Export, global: &Global) -> Result<()> {
    if let Some(out) = &arguments.out {
        ensure!(
            !out.exists(),
            "{} exists; give a directory that does not",
            out.display()
        );
        output::check_directory_writable(out)?;
    }
    // The command line asks for --gguf beside it, but not where --out excludes that.
    ensure!(
        !arguments.half || arguments.gguf.is_some(),
        "--half is given without --gguf FILE, which it is about"
    );
    let mut package = loading::package(&arguments.model, global)?;
    if arguments.dense {
        let dense = export_dense(package.single_model()?)?;
        package = package.with_model(dense);
    }
    if let Some(mechanism) = &arguments.replace_attention {
        let replaced = package
            .single_model()?
            .with_mechanism(mechanism, global.seed)?;
        package = package.with_model(replaced);
    }
    match &arguments.gguf {
        Some(path) => {
            if let Ok(model) = package.single_model() {
                ensure!(
                    model.spec().low_rank.is_empty(),
                    "{} has factorised layers, which GGUF has no words for; add --dense to multiply them out",
                    arguments.model
                );
            }
            let float = match arguments.half {
                true => GgufFloat::F16,
                false => GgufFloat::F32,
            };
            let summary = write_gguf(&package, path, float)?;
            let bytes = std::fs::metadata(path)?.len();
            match global.json {
                true => output::print_json(&json!({
                    "file": path,
                    "bytes": bytes,
                    "architecture": summary.architecture,
                    "tensors": summary.tensors,
                    "written_out": summary.written_out,
                    "vocabulary": summary.vocabulary,
                })),
                false => output::print(&format!(
                    "{}\n{} written, {}",
                    told(&summary),
                    path.display(),
                    output::bytes(bytes)
                )),
            }
        }
        None => {
            let out = arguments
                .out
                .as_deref()
                .context("--out is missing: the directory to write")?;
            let saved = match package.save(out, None)? {
                SavedAs::HuggingFace => "hugging-face",
                SavedAs::Lapidary => "lapidary",
            };
            match global.json {
                true => output::print_json(&json!({ "directory": out, "saved_as": saved })),
                false => output::print(&format!("{} written, a {saved} directory", out.display())),
            }
        }
    }
}

fn told(summary: &GgufSummary) -> String {
    let kinds = summary.tensors.iter();
    let kinds: Vec<String> = kinds
        .map(|(kind, count)| format!("{count} of {kind}"))
        .collect();
    let mut lines = vec![format!(
        "architecture {}; tensors: {}",
        summary.architecture,
        kinds.join(", ")
    )];
    if summary.written_out > 0 {
        lines.push(format!(
            "{} quantised matrices have a form that GGUF does not know and were written in F16",
            summary.written_out
        ));
    }
    if summary.vocabulary == "none" {
        lines.push(
            "no vocabulary: the tokenizer is missing, or not one of byte-level pairs".to_owned(),
        );
    }
    lines.join("\n")
}
