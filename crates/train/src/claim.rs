//! The directory of a run: whether one may begin or go on there, and that no other does meanwhile.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::{Error, Result, TrainSpec, state};

/// Refuses a directory in which `spec` cannot be run: one that holds a run, unless that is to go on (`resume`) and was
/// told the same. Reads no tensors and no data, so that it may be asked before data are read.
///
/// # Errors
/// As said, and when the newest state there cannot be read.
pub fn check_directory(spec: &TrainSpec, directory: &Path, resume: bool) -> Result<()> {
    if directory.exists() && !directory.is_dir() {
        return refused(directory, "no directory", "a directory, or a new name");
    }
    let latest = state::latest(&directory.join("states"))?;
    let has_model = directory.join("model").exists();
    match (resume, latest) {
        (true, Some(latest)) => {
            let limits = state::Limits::default();
            spec.check_settings(&state::settings(&latest, &limits)?)
        }
        // A run that ends leaves a state beside its model: this is another's, and would be replaced.
        (true, None) if has_model => {
            let expected = "one with states to go on from, or a new one";
            refused(directory, "a model without a state", expected)
        }
        (false, found) if found.is_some() || has_model => {
            refused(directory, "a run", "a new one, or --resume to go on")
        }
        _ => Ok(()),
    }
}

fn refused(directory: &Path, holds: &str, expected: &'static str) -> Result<()> {
    let verb = match directory.is_dir() {
        true => "holds",
        false => "is",
    };
    Err(Error::Setting {
        name: "directory of the run",
        found: format!("{}, which {verb} {holds}", directory.display()),
        expected,
    })
}

/// The directory of a run that has not ended. It is made when something is to be written, and locked from when it is
/// there: of two runs in one directory each would remove what the other is writing.
pub(crate) struct Claim<'a> {
    spec: &'a TrainSpec,
    directory: &'a Path,
    resume: bool,
    is_taken: bool,
    /// None where a file system has no locks.
    _lock: Option<File>,
}

impl<'a> Claim<'a> {
    /// Takes the directory if it is there.
    pub(crate) fn new(spec: &'a TrainSpec, directory: &'a Path, resume: bool) -> Result<Self> {
        let mut claim = Self {
            spec,
            directory,
            resume,
            is_taken: false,
            _lock: None,
        };
        match directory.is_dir() {
            true => claim.take()?,
            false => check_directory(spec, directory, resume)?,
        }
        Ok(claim)
    }

    /// Makes the directory and takes it, if that has not been done.
    pub(crate) fn make(&mut self) -> Result<()> {
        if self.is_taken {
            return Ok(());
        }
        std::fs::create_dir_all(self.directory).map_err(Error::file("create", self.directory))?;
        self.take()
    }

    /// What another run did here before it was taken is seen afterwards.
    fn take(&mut self) -> Result<()> {
        self._lock = lock(self.directory)?;
        self.is_taken = true;
        check_directory(self.spec, self.directory, self.resume)
    }

    pub(crate) fn directory(&self) -> &'a Path {
        self.directory
    }
}

fn lock(directory: &Path) -> Result<Option<File>> {
    // Where a directory cannot be opened as a file, it cannot be locked.
    let Ok(file) = File::open(directory) else {
        return Ok(None);
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            let expected = "one that nothing else is trained in";
            refused(directory, "a run that has not ended", expected).map(|()| None)
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}
