//! Writing files so that a reader sees the old one or the new one, never a part of one.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// The directory a path is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file that is written beside its destination and takes its place in [`Beside::finish`]. Dropped
/// before that, it leaves nothing.
pub(crate) struct Beside {
    writer: BufWriter<NamedTempFile>,
    destination: std::path::PathBuf,
}

impl Beside {
    pub(crate) fn create(destination: &Path) -> Result<Self> {
        let file = tempfile::Builder::new()
            .prefix(".partial-")
            .tempfile_in(parent(destination))
            .map_err(Error::file("write", destination))?;
        Ok(Self {
            writer: BufWriter::with_capacity(1 << 16, file),
            destination: destination.to_path_buf(),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer
            .write_all(bytes)
            .map_err(Error::file("write", &self.destination))
    }

    /// Lets `edit` change the file, everything written so far being in it, then makes it durable and
    /// gives it its name.
    pub(crate) fn finish(self, edit: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
        let destination = self.destination;
        let mut file = self
            .writer
            .into_inner()
            .map_err(|error| Error::file("write", &destination)(error.into_error()))?;
        edit(file.as_file_mut())
            .and_then(|()| file.as_file().sync_all())
            .map_err(Error::file("write", &destination))?;
        file.persist(&destination)
            .map_err(|error| Error::file("write", &destination)(error.error))?;
        sync_directory(parent(&destination))
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::file("sync", directory))
}
