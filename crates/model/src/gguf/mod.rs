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
use blocks::Form;
use format::{Header, Value, pad};

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

/// Writes the package's single model to `path`, which is replaced as a whole or not at all. One tensor
/// at a time is held in its bytes.
///
/// # Errors
/// When the model is one that GGUF has no words for, naming what, or the file cannot be written.
pub fn write_gguf(package: &Package, path: &Path, float: GgufFloat) -> Result<GgufSummary> {
    let model = package.single_model()?;
    let described = architecture::describe(model)?;
    let (vocabulary, entries) = vocabulary::entries(package.tokenizer.as_ref(), model)?;
    let mut header = Header::default();
    header.put("general.architecture", Value::text(described.name));
    header.put("general.quantization_version", Value::U32(2));
    for (key, value) in described.entries.into_iter().chain(entries) {
        header.put(key, value);
    }
    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    let mut written_out = 0;
    let mut tensors = Vec::with_capacity(described.tensors.len());
    for named in described.tensors {
        let form = Form::of(model, &named, float)?;
        written_out += usize::from(form.written_out);
        let name = form.kind.name();
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
        header.tensor(named.name.clone(), form.clone());
        tensors.push((named, form));
    }
    header.put("general.file_type", Value::U32(file_type(&counts)));
    write_beside::<Error>(path, |writer| {
        let mut write = |bytes: &[u8]| {
            writer
                .write_all(bytes)
                .map_err(FileError::io("write", path))
        };
        write(&header.finish())?;
        for (named, form) in &tensors {
            let mut bytes = form.write(model, named)?;
            if bytes.len() != form.bytes() {
                // Everything after it would lie elsewhere than the header says.
                let expected = format!("{} bytes, as its dimensions say", form.bytes());
                let field = format!("tensor {}", named.name);
                return Err(lapidary_parts::Error::spec(field, bytes.len(), expected).into());
            }
            pad(&mut bytes);
            write(&bytes)?;
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
