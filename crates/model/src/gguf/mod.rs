//! Writing a model as GGUF, which llama.cpp and what is built on it load.
//!
//! What can be said there is said: decoders like Llama and GPT-2, with other numbers of heads and
//! hidden features in each block (as the `deci` architecture), dense or quantised. A matrix of
//! integers keeps its bits where a GGUF type has the same form (`Q8_0`, `Q4_0`, `Q4_1`) and is written
//! out in `f16` where none has; the summary counts both. Everything else is refused with the reason:
//! factorised layers (multiply them out first), blocks without attention or with other parts.

mod architecture;
mod blocks;
mod format;
mod vocabulary;

use std::path::Path;

use crate::files::{FileError, write_beside};
use crate::{Error, Package, Result};
use blocks::Stored;
use format::{File, Value};

/// The type of matrices that are not quantised. Vectors are always `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GgufFloat {
    /// Single precision.
    #[default]
    F32,
    /// Half precision.
    F16,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufSummary {
    /// The architecture that the file names.
    pub architecture: &'static str,
    /// Tensors of each type, by the type's name.
    pub tensors: Vec<(&'static str, usize)>,
    /// Quantised matrices that no type has a form for, written out in half precision.
    pub written_out: usize,
    /// How the vocabulary is given: `gpt2` for byte-level pairs, `none` when the file holds no
    /// vocabulary since the tokenizer is of another kind or missing.
    pub vocabulary: &'static str,
}

/// Writes the package's single model to `path`, which is replaced as a whole or not at all.
///
/// # Errors
/// When the model is one that GGUF has no words for, naming what, or the file cannot be written.
pub fn write_gguf(package: &Package, path: &Path, float: GgufFloat) -> Result<GgufSummary> {
    let model = package.single_model()?;
    let described = architecture::describe(model)?;
    let (vocabulary, entries) = vocabulary::entries(package.tokenizer.as_ref(), model)?;
    let mut file = File::default();
    file.put("general.architecture", Value::text(described.name));
    file.put("general.quantization_version", Value::U32(2));
    for (key, value) in described.entries.into_iter().chain(entries) {
        file.put(key, value);
    }
    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    let mut written_out = 0;
    for named in described.tensors {
        let stored = Stored::of(model, &named, float)?;
        written_out += usize::from(stored.written_out);
        let name = stored.kind.name();
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
        file.tensor(named.name, stored);
    }
    file.put("general.file_type", Value::U32(file_type(&counts)));
    let bytes = file.finish();
    write_beside::<Error>(path, |writer| {
        for part in &bytes {
            writer
                .write_all(part)
                .map_err(FileError::io("write", path))?;
        }
        Ok(())
    })?;
    Ok(GgufSummary {
        architecture: described.name,
        tensors: counts,
        written_out,
        vocabulary,
    })
}

/// GGUF's number for what most matrices are.
fn file_type(counts: &[(&'static str, usize)]) -> u32 {
    let has = |name: &str| counts.iter().any(|(known, _)| *known == name);
    match () {
        () if has("Q4_0") => 2,
        () if has("Q4_1") => 3,
        () if has("Q8_0") => 7,
        () if has("F16") => 1,
        () => 0,
    }
}
