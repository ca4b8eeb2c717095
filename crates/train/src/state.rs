//! The state of a training run on disk.
//!
//! ```text
//! ROOT/step-0000001200/state.json            everything but tensors, and the checksum of
//!                      tensors.safetensors   parameters, moments, averages, by name
//! ```
//!
//! A state is written into a directory beside its destination, made durable, and renamed: whenever
//! the machine or the process dies, what [`latest`] finds is whole. Numbers come back bit for bit.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::files::{REPLACED_PREFIX, StagedDirectory, TEMPORARY_PREFIX, remove_directory};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};

use crate::{Error, GeneratorState, Result};

const FORMAT: &str = "lapidary training state 1";
const WHAT: &str = "training state";
const JSON_FILE: &str = "state.json";
const TENSOR_FILE: &str = "tensors.safetensors";
const STEP_PREFIX: &str = "step-";

/// Everything a run needs to go on as if it had never stopped.
#[derive(Clone, Debug, Default)]
pub struct TrainingState {
    /// Steps done.
    pub step: u64,
    /// Generators of random numbers, by what they are for.
    pub generators: BTreeMap<String, GeneratorState>,
    /// Positions in the data and other counters, by name.
    pub positions: BTreeMap<String, u64>,
    /// The settings of the run, for comparison when it is resumed.
    pub settings: serde_json::Value,
    /// Parameters, moments and averages, by name.
    pub tensors: BTreeMap<String, Tensor>,
}

/// How much a state from disk may claim before it is refused.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of `state.json`.
    pub json_bytes: u64,
    /// Bytes of `tensors.safetensors`.
    pub tensor_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            json_bytes: 16 << 20,
            tensor_bytes: 256 << 30,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    step: u64,
    generators: BTreeMap<String, GeneratorState>,
    positions: BTreeMap<String, u64>,
    settings: serde_json::Value,
    tensor_bytes: u64,
    tensor_crc32c: u32,
}

/// Writes a state under `root` and removes all but the newest `keep` (at least one). Returns its
/// directory.
///
/// One process writes to a root at a time; what an earlier one left unfinished there is removed.
pub fn save(root: &Path, state: &TrainingState, keep: usize) -> Result<PathBuf> {
    std::fs::create_dir_all(root).map_err(Error::file("create", root))?;
    remove_with_prefix(root, TEMPORARY_PREFIX)?;
    let destination = root.join(format!("{STEP_PREFIX}{:010}", state.step));
    let staged = StagedDirectory::replacing(&destination)?;

    let tensor_path = staged.path().join(TENSOR_FILE);
    write_tensors(&tensor_path, &state.tensors)?;
    let (tensor_bytes, tensor_crc32c) = {
        let map = map_file(&tensor_path, u64::MAX)?;
        (map.len() as u64, crc32c::crc32c(&map))
    };
    let header = Header {
        format: FORMAT.into(),
        step: state.step,
        generators: state.generators.clone(),
        positions: state.positions.clone(),
        settings: state.settings.clone(),
        tensor_bytes,
        tensor_crc32c,
    };
    write_json(&staged.path().join(JSON_FILE), &header)?;
    staged.commit()?;
    remove_with_prefix(root, REPLACED_PREFIX)?;
    let states = list(root)?;
    for (_, old) in states.iter().rev().skip(keep.max(1)) {
        remove_directory(old)?;
    }
    Ok(destination)
}

/// The directory of the newest state under `root`, if there is one.
pub fn latest(root: &Path) -> Result<Option<PathBuf>> {
    if !root.exists() {
        return Ok(None);
    }
    Ok(list(root)?.pop().map(|(_, path)| path))
}

/// The settings of the run that the state in `directory` is of, without its tensors.
pub(crate) fn settings(directory: &Path, limits: &Limits) -> Result<serde_json::Value> {
    Ok(header(directory, limits)?.settings)
}

/// Reads the state in `directory`, its tensors onto `device`.
pub fn load(directory: &Path, device: &Device, limits: &Limits) -> Result<TrainingState> {
    let header = header(directory, limits)?;
    let tensor_path = directory.join(TENSOR_FILE);
    let map = map_file(&tensor_path, limits.tensor_bytes)?;
    if map.len() as u64 != header.tensor_bytes || crc32c::crc32c(&map) != header.tensor_crc32c {
        return Err(Error::format(
            WHAT,
            &tensor_path,
            format!("it is damaged or not the one that {JSON_FILE} was written with"),
        ));
    }
    let file = SafeTensors::deserialize(&map)
        .map_err(|error| Error::format(WHAT, &tensor_path, error.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let Some(dtype) = from_stored(view.dtype()) else {
            return Err(Error::Tensor {
                name: name.into(),
                detail: format!(
                    "type {:?} is not one that training states hold",
                    view.dtype()
                ),
            });
        };
        let tensor = tensor_from_bytes(view.data(), dtype, view.shape(), device)?;
        tensors.insert(name.to_string(), tensor);
    }
    Ok(TrainingState {
        step: header.step,
        generators: header.generators,
        positions: header.positions,
        settings: header.settings,
        tensors,
    })
}

/// States under a root with their steps, oldest first, and of the same step the one last written
/// last: a directory that is about to be replaced sorts before its replacement.
fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut states: Vec<(u64, PathBuf)> = entries(root)?
        .into_iter()
        .filter_map(|(name, path)| {
            let own = name.strip_prefix(REPLACED_PREFIX).unwrap_or(&name);
            let step = own.strip_prefix(STEP_PREFIX)?.parse().ok()?;
            path.is_dir().then_some((step, path))
        })
        .collect();
    states.sort();
    Ok(states)
}

fn remove_with_prefix(root: &Path, prefix: &str) -> Result<()> {
    for (name, path) in entries(root)? {
        if name.starts_with(prefix) {
            std::fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
        }
    }
    Ok(())
}

fn entries(root: &Path) -> Result<Vec<(String, PathBuf)>> {
    std::fs::read_dir(root)
        .and_then(|entries| {
            entries
                .map(|entry| {
                    let entry = entry?;
                    let name = entry.file_name().to_string_lossy().into_owned();
                    Ok((name, entry.path()))
                })
                .collect()
        })
        .map_err(Error::file("list", root))
}

fn write_json(path: &Path, header: &Header) -> Result<()> {
    let text = serde_json::to_vec_pretty(header)
        .map_err(|error| Error::format(WHAT, path, error.to_string()))?;
    let mut file = File::create_new(path).map_err(Error::file("write", path))?;
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(Error::file("write", path))
}

fn header(directory: &Path, limits: &Limits) -> Result<Header> {
    let path = directory.join(JSON_FILE);
    let header = read_json(&path, limits.json_bytes)?;
    match header.format == FORMAT {
        true => Ok(header),
        false => Err(Error::format(
            WHAT,
            &path,
            format!("its format is {:?}, not {FORMAT:?}", header.format),
        )),
    }
}

fn read_json(path: &Path, limit: u64) -> Result<Header> {
    let file = File::open(path).map_err(Error::file("open", path))?;
    let mut text = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut text)
        .map_err(Error::file("read", path))?;
    if text.len() as u64 > limit {
        return Err(Error::format(
            WHAT,
            path,
            format!("it has more than the {limit} bytes allowed"),
        ));
    }
    serde_json::from_slice(&text).map_err(|error| Error::format(WHAT, path, error.to_string()))
}

fn map_file(path: &Path, limit: u64) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::file("open", path))?;
    let bytes = file.metadata().map_err(Error::file("read", path))?.len();
    if bytes > limit {
        return Err(Error::format(
            WHAT,
            path,
            format!("it has {bytes} bytes, more than the {limit} allowed"),
        ));
    }
    // SAFETY: the map is only read as bytes, any of which are valid, and lives for the length of
    // one call; the file must not be shortened meanwhile, as for every memory-mapped file.
    unsafe { Mmap::map(&file) }.map_err(Error::file("map", path))
}

/// A tensor whose bytes are made when they are written, so that no second copy of the whole state
/// is held. [`View`] knows no errors: the first one is kept aside.
struct LazyBytes<'a> {
    tensor: &'a Tensor,
    dtype: Dtype,
    bytes: usize,
    error: Rc<RefCell<Option<lapidary_kernels::Error>>>,
}

impl View for LazyBytes<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(tensor_bytes(self.tensor).unwrap_or_else(|error| {
            self.error.borrow_mut().get_or_insert(error);
            vec![0; self.bytes]
        }))
    }

    fn data_len(&self) -> usize {
        self.bytes
    }
}

fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let error = Rc::new(RefCell::new(None));
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let Some(dtype) = to_stored(tensor.dtype()) else {
            return Err(Error::Tensor {
                name: name.clone(),
                detail: format!("type {:?} is not one that can be saved", tensor.dtype()),
            });
        };
        let view = LazyBytes {
            tensor,
            dtype,
            bytes: tensor.elem_count() * tensor.dtype().size_in_bytes(),
            error: error.clone(),
        };
        views.push((name.as_str(), view));
    }
    safetensors::serialize_to_file(views, None, path).map_err(|error| match error {
        SafeTensorError::IoError(source) => Error::file("write", path)(source),
        other => Error::format(WHAT, path, other.to_string()),
    })?;
    if let Some(error) = error.take() {
        return Err(error.into());
    }
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::file("write", path))
}

/// The types a state can hold, in the engine and in the file.
const STORED: [(DType, Dtype); 7] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::BF16, Dtype::BF16),
    (DType::F16, Dtype::F16),
    (DType::I64, Dtype::I64),
    (DType::U32, Dtype::U32),
    (DType::U8, Dtype::U8),
];

fn to_stored(dtype: DType) -> Option<Dtype> {
    STORED.iter().find(|(d, _)| *d == dtype).map(|(_, s)| *s)
}

fn from_stored(stored: Dtype) -> Option<DType> {
    STORED.iter().find(|(_, s)| *s == stored).map(|(d, _)| *d)
}

/// The elements in row-major order, little endian.
fn tensor_bytes(tensor: &Tensor) -> lapidary_kernels::Result<Vec<u8>> {
    macro_rules! little_endian {
        ($element:ty) => {{
            let values = tensor.flatten_all()?.to_vec1::<$element>()?;
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        }};
    }
    Ok(match tensor.dtype() {
        DType::F64 => little_endian!(f64),
        DType::F32 => little_endian!(f32),
        DType::BF16 => little_endian!(half::bf16),
        DType::F16 => little_endian!(half::f16),
        DType::I64 => little_endian!(i64),
        DType::U32 => little_endian!(u32),
        DType::U8 => tensor.flatten_all()?.to_vec1::<u8>()?,
        other => {
            return Err(lapidary_kernels::Error::argument(
                "tensor_bytes",
                "type",
                other,
                "one of F64, F32, BF16, F16, I64, U32, U8",
            ));
        }
    })
}

fn tensor_from_bytes(
    bytes: &[u8],
    dtype: DType,
    shape: &[usize],
    device: &Device,
) -> lapidary_kernels::Result<Tensor> {
    Ok(Tensor::from_raw_buffer(bytes, dtype, shape, device)?)
}
