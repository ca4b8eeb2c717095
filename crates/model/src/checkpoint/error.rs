//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use lapidary_kernels::DType;

use super::StoredType;
use crate::files::FileError;

/// A checkpoint that is not what it claims to be, or not what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file could not be opened, mapped or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The directory has no weights that can be read.
    #[error(
        "{directory} has no model.safetensors and no model.safetensors.index.json{found}; \
         a checkpoint directory holds one of them"
    )]
    NoWeights {
        /// The directory.
        directory: PathBuf,
        /// Weights in other formats that are there, as `" (but pytorch_model.bin)"`.
        found: String,
    },
    /// The file cannot be a safetensors file.
    #[error("{path} is not a safetensors file: {found}, but {expected}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What its header says.
        found: String,
        /// What a valid header says.
        expected: String,
    },
    /// One tensor's entry in the header is wrong.
    #[error("{path}: the header gives tensor `{tensor}` {found}, but {expected}")]
    Entry {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What its entry says.
        found: String,
        /// What a valid entry says.
        expected: String,
    },
    /// The shard index is wrong.
    #[error("{path} is not a valid shard index: {found}, but {expected}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What a valid index says.
        expected: String,
    },
    /// A tensor that was asked for is not there.
    #[error("{path} has no tensor `{tensor}`{near}")]
    NoTensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor asked for.
        tensor: String,
        /// The closest name that is there, as `"; the closest name is …"`.
        near: String,
    },
    /// Tensors that the model needs are missing, or there are some that it doesn't know.
    #[error("{path} does not fit the model: {found}, but {expected}")]
    Keys {
        /// The file or directory.
        path: PathBuf,
        /// What is missing and what is surplus.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// A tensor has another shape than the model's.
    #[error("{path}: tensor `{tensor}` has shape {found:?}, but the model needs {expected:?}")]
    Shape {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape asked for.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a type that can't become the one asked for.
    #[error(
        "{path}: tensor `{tensor}` is stored as {found}, which cannot be read as {expected:?}; \
         F64, F32, F16, BF16, I64, I32, U32, U8 and BOOL can be read"
    )]
    Type {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The stored type.
        found: StoredType,
        /// The type asked for.
        expected: DType,
    },
    /// A tensor holds NaN or infinite values, or would in the type asked for.
    #[error(
        "{path}: tensor `{tensor}` has {nan} NaN and {infinite} infinite values among {total} \
         {when}; every weight must be finite"
    )]
    NotFinite {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many values are NaN.
        nan: usize,
        /// How many are infinite.
        infinite: usize,
        /// How many values it has.
        total: usize,
        /// `"as stored"`, or `"once converted to …"`.
        when: String,
    },
    /// A checkpoint to be written has the same name twice, or one that a file can't hold.
    #[error("cannot write tensor `{tensor}`: {found}, but {expected}")]
    Unwritable {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        found: String,
        /// What can be written.
        expected: String,
    },
    /// The tensor engine refused.
    #[error("{path}: tensor `{tensor}`: {reason}")]
    Tensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        reason: Box<lapidary_kernels::Error>,
    },
}
