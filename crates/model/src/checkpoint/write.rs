//! Writing a checkpoint: all of it or nothing.
//!
//! Every file is written beside its target and synchronised before the first one is renamed; of a
//! sharded checkpoint the index comes last, so that what a reader finds is complete.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use lapidary_kernels::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::{CheckpointError, INDEX_FILE, WEIGHTS_FILE};
use crate::files::{FileError, stage_beside};

/// How a checkpoint is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Convert floating-point tensors to this type; `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Bytes of tensors per file. A checkpoint that needs more becomes shards with an index; a
    /// single larger tensor gets a file for itself.
    pub shard_bytes: u64,
    /// Notes for the header. `format = "pt"`, without which `transformers` refuses a file, is
    /// added.
    pub metadata: BTreeMap<String, String>,
}

impl Default for WriteOptions {
    /// Types as they are, shards of 5 GB, no notes.
    fn default() -> Self {
        Self {
            dtype: None,
            shard_bytes: 5_000_000_000,
            metadata: BTreeMap::new(),
        }
    }
}

/// Writes named tensors to `directory`, as `model.safetensors` or as shards with an index, and
/// returns the files. The same tensors give the same bytes.
///
/// The directory is created if necessary. It may hold other files (a config, a tokenizer), but no
/// weights: to replace a checkpoint, write a new directory
/// ([`StagedDirectory`](crate::files::StagedDirectory)).
///
/// # Errors
/// When the directory already holds weights or cannot be written, when a name comes twice, when a
/// type has no name in safetensors, or when a value is NaN or infinite. Nothing is left behind.
pub fn write_checkpoint<'tensor, Name: Into<String>>(
    directory: &Path,
    tensors: impl IntoIterator<Item = (Name, &'tensor Tensor)>,
    options: &WriteOptions,
) -> Result<Vec<PathBuf>, CheckpointError> {
    std::fs::create_dir_all(directory).map_err(FileError::io("create", directory))?;
    refuse_to_replace(directory)?;
    let planned = plan_all(tensors, options)?;
    let shards = divide(planned, options.shard_bytes);
    let names: Vec<String> = match shards.len() {
        1 => vec![WEIGHTS_FILE.to_string()],
        count => (1..=count)
            .map(|i| format!("model-{i:05}-of-{count:05}.safetensors"))
            .collect(),
    };
    let mut staged = Vec::with_capacity(names.len() + 1);
    let mut written = Vec::with_capacity(names.len() + 1);
    for (name, shard) in names.iter().zip(&shards) {
        let path = directory.join(name);
        staged.push(stage_beside(&path, |writer| {
            write_shard(&path, writer, shard, options)
        })?);
        written.push(path);
    }
    if shards.len() > 1 {
        let path = directory.join(INDEX_FILE);
        let index = index_of(&names, &shards);
        staged.push(stage_beside(&path, |writer| {
            write_bytes(&path, writer, index.as_bytes())
        })?);
        written.push(path);
    }
    for file in staged {
        file.publish()?;
    }
    Ok(written)
}

fn refuse_to_replace(directory: &Path) -> Result<(), CheckpointError> {
    for file in [WEIGHTS_FILE, INDEX_FILE] {
        let path = directory.join(file);
        if path.exists() {
            return Err(FileError::NotEmpty { path }.into());
        }
    }
    Ok(())
}

/// One tensor of the file to be.
struct Planned<'tensor> {
    name: String,
    tensor: &'tensor Tensor,
    dtype: DType,
    stored_name: &'static str,
    bytes: u64,
}

/// Checks names and types, and orders the tensors so that each is aligned to its element size:
/// wide types first, then by name.
fn plan_all<'tensor, Name: Into<String>>(
    tensors: impl IntoIterator<Item = (Name, &'tensor Tensor)>,
    options: &WriteOptions,
) -> Result<Vec<Planned<'tensor>>, CheckpointError> {
    let mut planned = Vec::new();
    for (name, tensor) in tensors {
        planned.push(plan(name.into(), tensor, options)?);
    }
    planned.sort_by(|a: &Planned, b: &Planned| a.name.cmp(&b.name));
    for pair in planned.windows(2) {
        if let [a, b] = pair
            && a.name == b.name
        {
            return Err(unwritable(
                &a.name,
                "its name comes twice",
                "each name is unique",
            ));
        }
    }
    planned.sort_by_key(|plan| std::cmp::Reverse(plan.dtype.size_in_bytes()));
    Ok(planned)
}

fn plan<'tensor>(
    name: String,
    tensor: &'tensor Tensor,
    options: &WriteOptions,
) -> Result<Planned<'tensor>, CheckpointError> {
    if name == "__metadata__" {
        return Err(unwritable(
            &name,
            "that is the header's own name",
            "any other is free",
        ));
    }
    let dtype = match options.dtype {
        Some(dtype) if tensor.dtype().is_float() => dtype,
        _ => tensor.dtype(),
    };
    let stored_name = match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::U32 => "U32",
        DType::U8 => "U8",
        other => {
            let found = format!("its type is {other:?}");
            return Err(unwritable(
                &name,
                &found,
                "F64, F32, F16, BF16, I64, U32 and U8 are written",
            ));
        }
    };
    let bytes = tensor.elem_count() as u64 * dtype.size_in_bytes() as u64;
    Ok(Planned {
        name,
        tensor,
        dtype,
        stored_name,
        bytes,
    })
}

fn unwritable(tensor: &str, found: &str, expected: &str) -> CheckpointError {
    CheckpointError::Unwritable {
        tensor: tensor.to_string(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// Fills one file after the other. There is always at least one, empty if need be.
fn divide(planned: Vec<Planned>, shard_bytes: u64) -> Vec<Vec<Planned>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for plan in planned {
        if filled > 0 && filled + plan.bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += plan.bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(plan);
        }
    }
    shards
}

fn index_of(names: &[String], shards: &[Vec<Planned>]) -> String {
    let total: u64 = shards.iter().flatten().map(|plan| plan.bytes).sum();
    let mut weight_map = BTreeMap::new();
    for (name, shard) in names.iter().zip(shards) {
        for plan in shard {
            weight_map.insert(plan.name.as_str(), name.as_str());
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    format!("{index:#}\n")
}

fn write_shard(
    path: &Path,
    writer: &mut dyn Write,
    shard: &[Planned],
    options: &WriteOptions,
) -> Result<(), CheckpointError> {
    let header = header_of(shard, &options.metadata);
    write_bytes(path, writer, &(header.len() as u64).to_le_bytes())?;
    write_bytes(path, writer, header.as_bytes())?;
    for plan in shard {
        write_bytes(path, writer, &plan.data()?)?;
    }
    Ok(())
}

/// The JSON header, padded with spaces so that the data starts at a multiple of 8.
fn header_of(shard: &[Planned], metadata: &BTreeMap<String, String>) -> String {
    let mut notes = metadata.clone();
    notes
        .entry("format".to_string())
        .or_insert_with(|| "pt".to_string());
    let mut header = Map::new();
    header.insert("__metadata__".to_string(), json!(notes));
    let mut position = 0;
    for plan in shard {
        let entry = json!({
            "dtype": plan.stored_name,
            "shape": plan.tensor.dims(),
            "data_offsets": [position, position + plan.bytes],
        });
        header.insert(plan.name.clone(), entry);
        position += plan.bytes;
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    text
}

fn write_bytes(path: &Path, writer: &mut dyn Write, bytes: &[u8]) -> Result<(), CheckpointError> {
    Ok(writer
        .write_all(bytes)
        .map_err(FileError::io("write", path))?)
}

impl Planned<'_> {
    /// The tensor's bytes in its stored type, little-endian.
    fn data(&self) -> Result<Vec<u8>, CheckpointError> {
        let tensor = self
            .tensor
            .to_dtype(self.dtype)
            .and_then(|tensor| tensor.flatten_all())
            .map_err(|error| self.engine_error(error.into()))?;
        let values = tensor.elem_count();
        let mut bytes = Vec::with_capacity(values * self.dtype.size_in_bytes());
        /// Appends the values, and counts those that aren't finite where the type has any.
        macro_rules! append {
            ($type:ty $(, $is_finite:expr)?) => {{
                let values: Vec<$type> =
                    tensor.to_vec1().map_err(|error| self.engine_error(error.into()))?;
                $(self.require_finite(values.iter().filter(|&&value| !$is_finite(value)).count())?;)?
                values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
            }};
        }
        match self.dtype {
            DType::F64 => append!(f64, f64::is_finite),
            DType::F32 => append!(f32, f32::is_finite),
            DType::F16 => append!(f16, f16::is_finite),
            DType::BF16 => append!(bf16, bf16::is_finite),
            DType::I64 => append!(i64),
            DType::U32 => append!(u32),
            _ => append!(u8),
        }
        Ok(bytes)
    }

    fn require_finite(&self, wrong: usize) -> Result<(), CheckpointError> {
        if wrong == 0 {
            return Ok(());
        }
        let found = format!(
            "as {} it has {wrong} NaN or infinite values",
            self.stored_name
        );
        Err(unwritable(
            &self.name,
            &found,
            "every weight must be finite",
        ))
    }

    fn engine_error(&self, reason: lapidary_kernels::Error) -> CheckpointError {
        unwritable(
            &self.name,
            &reason.to_string(),
            "the tensor must be readable",
        )
    }
}

#[cfg(test)]
mod tests {
    use lapidary_kernels::Device;

    use super::*;

    /// A file on a disk that has room for so many bytes.
    struct Disk(usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            let written = bytes.len().min(self.0);
            self.0 -= written;
            Ok(written)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn full_disk_is_one_sentence_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(WEIGHTS_FILE);
        let tensor = Tensor::zeros(100, DType::F32, &Device::Cpu).unwrap();
        let options = WriteOptions::default();
        let shard = plan_all([("w", &tensor)], &options).unwrap();
        for room in [0, 4, 50, 300] {
            let result = stage_beside(&path, |_| {
                write_shard(&path, &mut Disk(room), &shard, &options)
            });
            let message = result.unwrap_err().to_string();
            assert!(message.starts_with("cannot write ") && message.ends_with("no storage space"));
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
