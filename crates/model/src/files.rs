//! Reading with a bound, and writing that never leaves half a file.
//!
//! A single file is written beside its target, synchronised and renamed ([`write_beside`]). A
//! directory that must appear whole, such as a checkpoint with its config and tokenizer, is built
//! in a [`StagedDirectory`] next to its target and renamed when complete.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How the name of every temporary file and directory begins.
pub const TEMPORARY_PREFIX: &str = ".writing-";

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {path}: {reason}")]
    Io {
        /// What was tried, as a verb: `open`, `write`, `rename`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not. The message says it, so that it is no `source` which would say it again.
        reason: std::io::Error,
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
    /// The target of a write is a device, a pipe or a directory.
    #[error("{path} is not a regular file, so that it cannot be replaced by one")]
    NotAFile {
        /// The target.
        path: PathBuf,
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
        move |reason| Self::Io {
            action,
            path,
            reason,
        }
    }
}

/// Temporary files and directories of writes under way.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn unfinished() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A temporary path for as long as its write is under way: known to [`remove_unfinished`], and
/// locked, which tells it from what a program that was killed left behind.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    _lock: Option<File>,
}

impl Unfinished {
    /// Makes a temporary neighbour of `target` after removing those that killed programs left.
    fn begin<T: AsRef<Path>>(
        action: &'static str,
        target: &Path,
        make: impl FnOnce(&str, &Path) -> std::io::Result<T>,
    ) -> Result<(T, Self), FileError> {
        let parent = parent(target);
        let prefix = temporary_prefix(target);
        let mut all = unfinished();
        remove_abandoned(parent, &prefix);
        let temporary = make(&prefix, parent).map_err(FileError::io(action, target))?;
        let path = temporary.as_ref().to_path_buf();
        all.insert(path.clone());
        let _lock = lock(&path);
        Ok((temporary, Self { path, _lock }))
    }

    /// Runs the renaming that completes the write: all of it, or nothing when the program is being
    /// interrupted.
    fn complete<T>(self, rename: impl FnOnce() -> T) -> T {
        let mut all = unfinished();
        let result = rename();
        all.remove(&self.path);
        result
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().remove(&self.path);
    }
}

/// Removes the temporary files and directories of writes under way, and lets no write begin or be
/// completed from here on: for a program that is about to be ended by an interrupt, when nothing
/// is dropped any more.
pub fn remove_unfinished() {
    let all = unfinished();
    for path in &*all {
        // A directory that is just being written into may get a new file while it is emptied.
        for _ in 0..100 {
            remove(path);
            if !path.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    // Whoever is writing waits for this lock until the process is gone.
    std::mem::forget(all);
}

/// Removes a file or a directory; that it cannot be removed is no reason to stop.
fn remove(path: &Path) {
    let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
}

/// The lock that says a temporary file is being written; `None` where there are no such locks.
#[cfg(unix)]
fn lock(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    file.try_lock().is_ok().then_some(file)
}

/// Elsewhere a lock would keep the writer itself out.
#[cfg(not(unix))]
fn lock(_: &Path) -> Option<File> {
    None
}

/// Removes temporary neighbours that nobody is writing any more.
fn remove_abandoned(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let is_temporary = entry.file_name().to_string_lossy().starts_with(prefix);
        if is_temporary && lock(&entry.path()).is_some() {
            remove(&entry.path());
        }
    }
}

/// How the names of a target's temporary neighbours begin.
fn temporary_prefix(target: &Path) -> String {
    const LONGEST: usize = 100;
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().take(LONGEST / char::MAX.len_utf8()).collect();
    format!("{TEMPORARY_PREFIX}{name}-")
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

/// A file that is written beside its target, a piece at a time, and takes the target's place when
/// it is complete. Dropped before that, it leaves nothing.
#[derive(Debug)]
pub struct FileBeside {
    writer: BufWriter<tempfile::NamedTempFile>,
    target: PathBuf,
    unfinished: Unfinished,
}

impl FileBeside {
    /// Starts a file that will be `target`.
    ///
    /// # Errors
    /// When the directory cannot be written to, or when `target` is something else than a file,
    /// such as a device: it would be replaced, not written to.
    pub fn create(target: &Path) -> Result<Self, FileError> {
        if fs::metadata(target).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(FileError::NotAFile {
                path: target.to_path_buf(),
            });
        }
        let (file, unfinished) = Unfinished::begin("write", target, |prefix, parent| {
            temporary_builder(prefix, 0o666).tempfile_in(parent)
        })?;
        Ok(Self {
            writer: BufWriter::with_capacity(1 << 20, file),
            target: target.to_path_buf(),
            unfinished,
        })
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.writer
            .write_all(bytes)
            .map_err(FileError::io("write", &self.target))
    }

    /// Lets `edit` change the file, everything written so far being in it, and makes it durable,
    /// without renaming it yet.
    pub fn stage(
        self,
        edit: impl FnOnce(&mut File) -> std::io::Result<()>,
    ) -> Result<StagedFile, FileError> {
        let target = self.target;
        let mut file = self
            .writer
            .into_inner()
            .map_err(|error| FileError::io("write", &target)(error.into_error()))?;
        edit(file.as_file_mut())
            .and_then(|()| file.as_file().sync_all())
            .map_err(FileError::io("write", &target))?;
        Ok(StagedFile {
            temporary: file.into_temp_path(),
            target,
            unfinished: self.unfinished,
        })
    }
}

/// A complete, synchronised temporary file that waits to be renamed to its target.
///
/// Dropped without [`publish`](Self::publish), it disappears.
#[derive(Debug)]
pub struct StagedFile {
    temporary: tempfile::TempPath,
    target: PathBuf,
    unfinished: Unfinished,
}

/// Writes and synchronises a temporary file beside `path`, without renaming it yet.
pub fn stage_beside<E: From<FileError>>(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<StagedFile, E> {
    let mut file = FileBeside::create(path)?;
    content(&mut file.writer)?;
    Ok(file.stage(|_| Ok(()))?)
}

impl StagedFile {
    /// Renames the file to its target.
    pub fn publish(self) -> Result<(), FileError> {
        let Self {
            temporary,
            target,
            unfinished,
        } = self;
        unfinished
            .complete(|| temporary.persist(&target))
            .map_err(|error| FileError::io("write", &target)(error.error))?;
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
    replaces: bool,
    unfinished: Unfinished,
}

/// What stands before the name of a directory that [`StagedDirectory::replacing`] is about to
/// replace: a reader that finds no directory under its own name finds the old one there.
pub const REPLACED_PREFIX: &str = ".replaced-";

impl StagedDirectory {
    /// Starts a directory that will appear at `target`, which must not exist or be empty.
    pub fn new(target: &Path) -> Result<Self, FileError> {
        if !is_free(target) {
            return Err(FileError::NotEmpty {
                path: target.to_path_buf(),
            });
        }
        Self::start(target, false)
    }

    /// Starts a directory that will take the place of the one at `target`, if there is one.
    ///
    /// A directory cannot be renamed over another: for the moment between two renames, the old
    /// one stands under its name after [`REPLACED_PREFIX`].
    pub fn replacing(target: &Path) -> Result<Self, FileError> {
        Self::start(target, true)
    }

    fn start(target: &Path, replaces: bool) -> Result<Self, FileError> {
        let parent = parent(target);
        fs::create_dir_all(parent).map_err(FileError::io("create", parent))?;
        let (temporary, unfinished) = Unfinished::begin("write", target, |prefix, parent| {
            temporary_builder(prefix, 0o777).tempdir_in(parent)
        })?;
        Ok(Self {
            temporary,
            target: target.to_path_buf(),
            replaces,
            unfinished,
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Makes the directory appear at its target, whole.
    pub fn commit(self) -> Result<(), FileError> {
        let Self {
            temporary,
            target,
            replaces,
            unfinished,
        } = self;
        let source = temporary.path();
        sync_directory(source);
        let replaced = unfinished.complete(|| {
            let replaced = if is_free(&target) {
                // Renaming over an empty directory replaces it on Unix; elsewhere it has to go
                // first.
                if target.exists() {
                    fs::remove_dir(&target).map_err(FileError::io("replace", &target))?;
                }
                None
            } else if replaces {
                let mut name = std::ffi::OsString::from(REPLACED_PREFIX);
                name.push(target.file_name().unwrap_or_default());
                let replaced = target.with_file_name(name);
                remove(&replaced);
                fs::rename(&target, &replaced).map_err(FileError::io("replace", &target))?;
                Some(replaced)
            } else {
                return Err(FileError::NotEmpty {
                    path: target.clone(),
                });
            };
            fs::rename(source, &target).map_err(FileError::io("write", &target))?;
            Ok(replaced)
        })?;
        sync_directory(parent(&target));
        match replaced {
            Some(replaced) => remove_directory(&replaced),
            None => Ok(()),
        }
    }
}

/// Removes a directory so that its name never stands for a part of it: it is renamed first.
pub fn remove_directory(path: &Path) -> Result<(), FileError> {
    let (doomed, _unfinished) = Unfinished::begin("remove", path, |prefix, parent| {
        let doomed = parent.join(format!("{prefix}removed"));
        fs::rename(path, &doomed).map(|()| doomed)
    })?;
    fs::remove_dir_all(doomed).map_err(FileError::io("remove", path))
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
fn temporary_builder(prefix: &str, mode: u32) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
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
    #[cfg(unix)]
    fn what_a_killed_writer_left_is_removed_and_what_is_being_written_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let abandoned = directory.path().join(".writing-file-a1b2c3");
        fs::write(&abandoned, "half").unwrap();
        let abandoned_directory = directory.path().join(".writing-file-d4e5f6");
        fs::create_dir(&abandoned_directory).unwrap();
        fs::write(abandoned_directory.join("part"), "half").unwrap();
        let of_another = directory.path().join(".writing-other-a1b2c3");
        fs::write(&of_another, "half").unwrap();

        let first = FileBeside::create(&path).unwrap();
        assert!(!abandoned.exists() && !abandoned_directory.exists());
        assert!(of_another.exists());
        let mut second = FileBeside::create(&path).unwrap();
        second.write(b"second").unwrap();
        first.stage(|_| Ok(())).unwrap().publish().unwrap();
        second.stage(|_| Ok(())).unwrap().publish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(entries(directory.path()), 2);
    }

    #[test]
    fn a_directory_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("model");
        for content in ["old", "new"] {
            let staged = StagedDirectory::replacing(&target).unwrap();
            fs::write(staged.path().join(content), content).unwrap();
            staged.commit().unwrap();
        }
        assert!(target.join("new").exists() && !target.join("old").exists());
        assert_eq!(entries(directory.path()), 1);
    }

    #[test]
    #[cfg(unix)]
    fn a_device_is_not_replaced_by_a_file() {
        let error = FileBeside::create(Path::new("/dev/full")).unwrap_err();
        assert!(matches!(error, FileError::NotAFile { .. }), "{error}");
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
