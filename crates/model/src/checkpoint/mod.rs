//! Checkpoints: named tensors in safetensors files, one or sharded, memory-mapped.
//!
//! [`Checkpoint::open`] believes nothing that it has not checked against [`Limits`]
//! and the file's size. Tensors are converted to the asked type one at a time, so
//! that memory holds what was asked for and not the file. [`write_checkpoint`] is the way back.

mod convert;
mod error;
mod header;
mod index;
mod keys;
mod write;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use lapidary_kernels::{DType, Tensor};
use memmap2::Mmap;

use crate::Limits;
use crate::files::FileError;
pub use error::CheckpointError;
use header::{Entry, Header};
pub use header::{StoredType, TensorInfo};
pub use keys::KeyReport;
pub use write::{WriteOptions, write_checkpoint};

/// The file of an unsharded checkpoint.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Named tensors, still in their files.
///
/// ```
/// # fn main() -> lapidary_model::Result<()> {
/// use lapidary_kernels::{DType, Device, Tensor};
/// use lapidary_model::checkpoint::{Checkpoint, WriteOptions, write_checkpoint};
///
/// let directory = std::env::temp_dir().join(format!("lapidary-doc-{}", std::process::id()));
/// let weight = Tensor::ones((2, 3), DType::F32, &Device::Cpu).map_err(lapidary_kernels::Error::from)?;
/// write_checkpoint(&directory, [("head.weight", &weight)], &WriteOptions::default())?;
///
/// let checkpoint = Checkpoint::open(&directory, &Default::default())?;
/// assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["head.weight"]);
/// assert_eq!(checkpoint.tensor("head.weight", DType::F64)?.dims(), [2, 3]);
/// # let _ = std::fs::remove_dir_all(directory);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    places: BTreeMap<String, usize>,
}

/// One checked file.
#[derive(Debug)]
struct Shard {
    bytes: Bytes,
    header: Header,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Held(Cow<'static, [u8]>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Held(bytes) => bytes,
        }
    }
}

impl Shard {
    fn open(path: &Path, limits: &Limits) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(FileError::io("open", path))?;
        let length = file.metadata().map_err(FileError::io("read", path))?.len();
        // An empty file cannot be mapped everywhere; its header says the rest.
        let bytes = if length == 0 {
            Bytes::Held(Cow::Borrowed(&[]))
        } else {
            // SAFETY: the map is read-only. As with every mapped file, truncating it while it is
            // open is undefined; writers here replace files by renaming, which keeps the map.
            Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(FileError::io("map", path))?)
        };
        Self::check(path, bytes, limits)
    }

    fn check(path: &Path, bytes: Bytes, limits: &Limits) -> Result<Self, CheckpointError> {
        let header = header::read(path, bytes.as_slice(), limits)?;
        Ok(Self { bytes, header })
    }
}

impl Checkpoint {
    /// Opens a directory's `model.safetensors`, or else the shards that its index names.
    ///
    /// # Errors
    /// When there is neither, or when a header or the index makes a claim that does not hold.
    pub fn open(directory: &Path, limits: &Limits) -> Result<Self, CheckpointError> {
        let single = directory.join(WEIGHTS_FILE);
        let index = directory.join(INDEX_FILE);
        if single.exists() {
            return Self::open_file(&single, limits);
        }
        if index.exists() {
            return Self::open_shards(directory, &index, limits);
        }
        // A missing directory is better reported as such.
        std::fs::read_dir(directory).map_err(FileError::io("open", directory))?;
        Err(CheckpointError::NoWeights {
            directory: directory.to_path_buf(),
            found: other_weights(directory),
        })
    }

    /// Opens one safetensors file.
    pub fn open_file(path: &Path, limits: &Limits) -> Result<Self, CheckpointError> {
        Self::from_shards(path, vec![Shard::open(path, limits)?])
    }

    /// Reads a safetensors file that is already in memory, such as one embedded in a program.
    /// `name` stands for its path in errors.
    pub fn from_bytes(
        name: &str,
        bytes: impl Into<Cow<'static, [u8]>>,
        limits: &Limits,
    ) -> Result<Self, CheckpointError> {
        let path = Path::new(name);
        let shard = Shard::check(path, Bytes::Held(bytes.into()), limits)?;
        Self::from_shards(path, vec![shard])
    }

    fn open_shards(
        directory: &Path,
        index_path: &Path,
        limits: &Limits,
    ) -> Result<Self, CheckpointError> {
        let index = index::read(index_path, limits)?;
        let mut shards = Vec::with_capacity(index.files.len());
        for file in &index.files {
            shards.push(Shard::open(&directory.join(file), limits)?);
        }
        index.check(index_path, |shard, tensor| {
            shards
                .get(shard)
                .is_some_and(|shard: &Shard| shard.header.entries.contains_key(tensor))
        })?;
        Self::from_shards(directory, shards)
    }

    fn from_shards(path: &Path, shards: Vec<Shard>) -> Result<Self, CheckpointError> {
        let mut places = BTreeMap::new();
        for (place, shard) in shards.iter().enumerate() {
            for name in shard.header.entries.keys() {
                if places.insert(name.clone(), place).is_some() {
                    return Err(CheckpointError::Index {
                        path: path.to_path_buf(),
                        found: format!("tensor `{name}` is in two shards"),
                        expected: "each tensor is in one".to_string(),
                    });
                }
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            shards,
            places,
        })
    }

    /// The file or directory that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Shape and stored type of a tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        Ok(&self.find(name)?.1.info)
    }

    /// What the writer noted in the header, such as `format = "pt"`. Shards are merged.
    pub fn metadata(&self) -> BTreeMap<&str, &str> {
        let shards = self.shards.iter().flat_map(|shard| &shard.header.metadata);
        shards
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect()
    }

    /// Bytes of all tensors as stored.
    pub fn stored_bytes(&self) -> u64 {
        let entries = self
            .shards
            .iter()
            .flat_map(|shard| shard.header.entries.values());
        entries.map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Bytes of its files, headers included.
    pub fn file_bytes(&self) -> u64 {
        let files = self.shards.iter();
        files.map(|file| file.bytes.as_slice().len() as u64).sum()
    }

    /// A tensor on the CPU, converted to `dtype`.
    ///
    /// Floating-point and integer tensors convert to any type; what is out of the range of a
    /// narrower floating-point type is an error.
    ///
    /// # Errors
    /// When there is no such tensor, when its stored type cannot be read, or when a value is NaN
    /// or infinite.
    pub fn tensor(&self, name: &str, dtype: DType) -> Result<Tensor, CheckpointError> {
        let (shard, entry) = self.find(name)?;
        // The header was checked against these very bytes.
        let bytes = shard
            .bytes
            .as_slice()
            .get(entry.bytes.clone())
            .unwrap_or_default();
        let stored = convert::Stored {
            path: &self.path,
            name,
            info: &entry.info,
            bytes,
        };
        stored.read(dtype)
    }

    /// Like [`tensor`](Self::tensor), for a model that knows which shape it needs.
    pub fn tensor_of_shape(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Tensor, CheckpointError> {
        let info = self.info(name)?;
        if info.shape != shape {
            return Err(CheckpointError::Shape {
                path: self.path.clone(),
                tensor: name.to_string(),
                found: info.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        self.tensor(name, dtype)
    }

    /// Compares the names with those that a model needs; see [`KeyReport`].
    pub fn compare_keys<'a>(&'a self, needed: impl IntoIterator<Item = &'a str>) -> KeyReport {
        KeyReport::new(self.path.clone(), needed, self.names())
    }

    fn find(&self, name: &str) -> Result<(&Shard, &Entry), CheckpointError> {
        let shard = self
            .places
            .get(name)
            .and_then(|&place| self.shards.get(place));
        shard
            .and_then(|shard| Some((shard, shard.header.entries.get(name)?)))
            .ok_or_else(|| CheckpointError::NoTensor {
                path: self.path.clone(),
                tensor: name.to_string(),
                near: keys::nearest(name, self.names())
                    .map(|near| format!("; the closest name is `{near}`"))
                    .unwrap_or_default(),
            })
    }
}

/// Names a file of weights in a format that isn't read, so that the user knows what to convert.
fn other_weights(directory: &Path) -> String {
    [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
    ]
    .iter()
    .find(|file| directory.join(file).exists())
    .map(|file| format!(" (but {file}, which holds them in another format)"))
    .unwrap_or_default()
}

#[cfg(test)]
mod tests;
