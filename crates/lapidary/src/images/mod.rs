//! Pictures on disk as a vision model takes them: decoded, resized and normalised as the model's
//! `preprocessor_config.json` says.

mod decode;
mod preprocessing;
mod resize;

pub use preprocessing::Preprocessing;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// An image of three channels, row by row, each channel beside the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// `height · width · 3` numbers from 0 to 255.
    pub rgb: Vec<u8>,
}

/// The PNG and JPEG files of a directory, by name; or the one file that is given.
pub fn list(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let is_picture = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        let extension = extension.unwrap_or_default().to_ascii_lowercase();
        ["png", "jpg", "jpeg"].contains(&extension.as_str())
    };
    let entries = std::fs::read_dir(path)
        .with_context(|| format!("{} is neither a file nor a directory", path.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("{} cannot be listed", path.display()))?
            .path();
        if path.is_file() && is_picture(&path) {
            found.push(path);
        }
    }
    found.sort();
    ensure!(
        !found.is_empty(),
        "{} holds no pictures; give a directory with .png, .jpg or .jpeg files",
        path.display()
    );
    Ok(found)
}
