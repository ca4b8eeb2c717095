//! Reading with a bound, and writing that never leaves half a file.
//!
//! A single file is written beside its target, synchronised and renamed ([`write_beside`]). A
//! directory that must appear whole, such as a checkpoint with its config and tokenizer, is built
//! in a [`StagedDirectory`] next to its target and renamed when complete.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, as a verb: `open`, `write`, `rename`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A text file is larger than the reader's bound.
    #[error("{path} has {found} bytes, but at most {limit} are read")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The bound in bytes.
        limit: u64,
    },
    /// A text file isn't text.
    #[error("{path} is not UTF-8 text: byte {position} is invalid")]
    NotText {
        /// The file.
        path: PathBuf,
        /// Where it stops being UTF-8.
        position: usize,
    },
    /// The target directory of a write has something in it.
    #[error("{path} exists and is not empty; choose a new or an empty directory")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
}

impl FileError {
    /// For use with `map_err`: adds what was tried, on which file.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Temporary files and directories of writes under way.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Keeps a temporary path known for as long as its write is under way.
#[derive(Debug)]
struct Unfinished(PathBuf);

impl Unfinished {
    fn new(path: &Path) -> Self {
        let mut all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(path.to_path_buf());
        Self(path.to_path_buf())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let mut all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&self.0);
    }
}

/// Removes the temporary files and directories of writes under way: for a program that is about
/// to be ended by an interrupt, when nothing is dropped any more.
pub fn remove_unfinished() {
    for path in &*UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner) {
        // Whatever is gone already was finished in between.
        let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
    }
}

/// The text of a file of at most `limit` bytes.
pub fn read_text(path: &Path, limit: u64) -> Result<String, FileError> {
    let file = File::open(path).map_err(FileError::io("open", path))?;
    let metadata = file.metadata().map_err(FileError::io("read", path))?;
    let too_large = |found| FileError::TooLarge {
        path: path.to_path_buf(),
        found,
        limit,
    };
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    // The size of a pipe or of a growing file is not known beforehand: read one byte past the
    // limit to notice.
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(FileError::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    String::from_utf8(bytes).map_err(|error| FileError::NotText {
        path: path.to_path_buf(),
        position: error.utf8_error().valid_up_to(),
    })
}

/// Writes a file through `content` so that `path` holds either what it held before or all of the
/// new content: the bytes go to a temporary file beside it, are synchronised, and renamed.
pub fn write_beside<E: From<FileError>>(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    stage_beside(path, content)?.publish()?;
    Ok(())
}

/// A complete, synchronised temporary file that waits to be renamed to its target.
///
/// Dropped without [`publish`](Self::publish), it disappears.
#[derive(Debug)]
pub struct StagedFile {
    temporary: tempfile::TempPath,
    target: PathBuf,
    _unfinished: Unfinished,
}

/// Writes and synchronises a temporary file beside `path`, without renaming it yet.
pub fn stage_beside<E: From<FileError>>(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<StagedFile, E> {
    let mut temporary = temporary_builder(0o666)
        .tempfile_in(parent(path))
        .map_err(FileError::io("write", path))?;
    let unfinished = Unfinished::new(temporary.path());
    let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    content(&mut writer)?;
    writer.flush().map_err(FileError::io("write", path))?;
    drop(writer);
    let file = temporary.as_file();
    file.sync_all().map_err(FileError::io("write", path))?;
    Ok(StagedFile {
        temporary: temporary.into_temp_path(),
        target: path.to_path_buf(),
        _unfinished: unfinished,
    })
}

impl StagedFile {
    /// Renames the file to its target.
    pub fn publish(self) -> Result<(), FileError> {
        let Self {
            temporary,
            target,
            _unfinished,
        } = self;
        temporary.persist(&target).map_err(|error| FileError::Io {
            action: "write",
            path: target.clone(),
            source: error.error,
        })?;
        sync_directory(parent(&target));
        Ok(())
    }
}

/// A directory under construction: a hidden neighbour of its target, renamed by
/// [`commit`](Self::commit), removed if dropped before.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lapidary_model::files::StagedDirectory;
/// let parent = tempfile::tempdir()?;
/// let target = parent.path().join("model");
/// let staged = StagedDirectory::new(&target)?;
/// std::fs::write(staged.path().join("config.json"), "{}")?;
/// assert!(!target.exists());
/// staged.commit()?;
/// assert!(target.join("config.json").exists());
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct StagedDirectory {
    temporary: tempfile::TempDir,
    target: PathBuf,
    _unfinished: Unfinished,
}

impl StagedDirectory {
    /// Starts a directory that will appear at `target`, which must not exist or be empty.
    pub fn new(target: &Path) -> Result<Self, FileError> {
        if !is_free(target) {
            return Err(FileError::NotEmpty {
                path: target.to_path_buf(),
            });
        }
        let parent = parent(target);
        fs::create_dir_all(parent).map_err(FileError::io("create", parent))?;
        let temporary = temporary_builder(0o777)
            .tempdir_in(parent)
            .map_err(FileError::io("write", target))?;
        let unfinished = Unfinished::new(temporary.path());
        Ok(Self {
            temporary,
            target: target.to_path_buf(),
            _unfinished: unfinished,
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Makes the directory appear at its target, whole.
    pub fn commit(self) -> Result<(), FileError> {
        let target = &self.target;
        if !is_free(target) {
            return Err(FileError::NotEmpty {
                path: target.clone(),
            });
        }
        sync_directory(self.path());
        // Renaming over an empty directory replaces it on Unix; elsewhere it has to go first.
        if target.exists() {
            fs::remove_dir(target).map_err(FileError::io("replace", target))?;
        }
        fs::rename(self.path(), target).map_err(FileError::io("write", target))?;
        sync_directory(parent(target));
        Ok(())
    }
}

/// Whether a directory may be created at `path`: nothing there, or an empty directory.
fn is_free(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => fs::symlink_metadata(path).is_err(),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a rename durable. Some file systems cannot synchronise a directory: not an error.
fn sync_directory(path: &Path) {
    if let Ok(directory) = File::open(path) {
        let _ = directory.sync_all();
    }
}

/// A builder of temporary names whose files get the permissions that the user's umask gives to
/// any other file, not the private ones that temporary files have by default.
fn temporary_builder<'prefix>(mode: u32) -> tempfile::Builder<'prefix, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(path: &Path) -> usize {
        fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn failed_write_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "old").unwrap();
        let result = write_beside(&path, |writer| {
            writer
                .write_all(b"half")
                .map_err(FileError::io("write", &path))?;
            Err(FileError::NotEmpty { path: path.clone() })
        });
        assert!(result.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(entries(directory.path()), 1);
    }

    #[test]
    fn written_file_replaces_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "old").unwrap();
        write_beside(&path, |writer| {
            writer
                .write_all(b"new")
                .map_err(FileError::io("write", &path))
        })
        .unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(entries(directory.path()), 1);
    }

    #[test]
    fn unwritable_place_is_named() {
        let path = Path::new("/dev/null/file");
        let error = write_beside(path, |_| Ok::<(), FileError>(())).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot write /dev/null/file: ")
        );
    }

    #[test]
    fn dropped_directory_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let staged = StagedDirectory::new(&target).unwrap();
        fs::write(staged.path().join("file"), "content").unwrap();
        drop(staged);
        assert_eq!(entries(directory.path()), 0);
    }

    #[test]
    fn occupied_target_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "content").unwrap();
        assert!(StagedDirectory::new(directory.path()).is_err());
        assert!(StagedDirectory::new(&directory.path().join("file")).is_err());
    }

    #[test]
    fn text_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "12345");
        assert!(matches!(
            read_text(&path, 4),
            Err(FileError::TooLarge { found: 5, .. })
        ));
        assert!(read_text(Path::new("/dev/zero"), 100).is_err());
        fs::write(&path, b"ab\xff").unwrap();
        assert!(matches!(
            read_text(&path, 5),
            Err(FileError::NotText { position: 2, .. })
        ));
    }
}
