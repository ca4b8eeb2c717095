//! What the user sees, and what is left behind when they interrupt.

use std::io::{IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result};
use lapidary_model::files::{FileBeside, FileError, StagedDirectory, write_beside};
use serde::Serialize;

/// Sends the library's notes to standard error: warnings, with `-v` more.
pub fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
}

/// Removes files that are being written when the user interrupts, so that nothing half-made is
/// left.
pub fn clean_up_on_interrupt() {
    let handler = || {
        lapidary_model::files::remove_unfinished();
        std::process::exit(130);
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!("an interrupt will leave temporary files behind: {error}");
    }
}

/// Whether the reader of our standard output went away, which is not an error of ours.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints text to standard output.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Prints one JSON document to standard output.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Whether standard output shows colours.
pub fn is_coloured() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Writes a text file whole or not at all.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_beside::<FileError>(path, |writer| {
        writer
            .write_all(text.as_bytes())
            .map_err(FileError::io("write", path))
    })
    .with_context(|| format!("{} was not written", path.display()))
}

/// Fails now rather than after the work when a file could not be written at `path`.
pub fn check_writable(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    anyhow::ensure!(
        parent.is_dir(),
        "{} cannot be written: {} is not a directory",
        path.display(),
        parent.display()
    );
    FileBeside::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(())
}

/// As [`check_writable`], of a directory, which may be there and empty. Those on the way to it are made
/// when it is written.
pub fn check_directory_writable(path: &Path) -> Result<()> {
    check_replaceable(path)?;
    let mut above = path.ancestors().skip(1);
    let there = match above.find(|parent| parent.as_os_str().is_empty() || parent.exists()) {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    anyhow::ensure!(
        there.is_dir(),
        "{} cannot be written: {} is not a directory",
        path.display(),
        there.display()
    );
    if let Some(name) = path.file_name() {
        StagedDirectory::replacing(&there.join(name))
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

/// Refuses what no directory can take the place of when it is done: a link, or a path that ends in no name.
pub fn check_replaceable(path: &Path) -> Result<()> {
    let link = path
        .symlink_metadata()
        .is_ok_and(|found| found.is_symlink());
    anyhow::ensure!(
        !link,
        "{} cannot be written: it is a symbolic link; give the directory itself, or a new one",
        path.display()
    );
    anyhow::ensure!(
        path.file_name().is_some(),
        "{} cannot be written: it ends in no name of its own; give a new directory in it, or beside it",
        path.display()
    );
    Ok(())
}

/// A number for people: `1 234 567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Bytes for people.
pub fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}
