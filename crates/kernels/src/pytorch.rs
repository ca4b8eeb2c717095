//! Named tensors in a file of `torch.save`: a zip archive with a pickle, which says what there is,
//! and the numbers beside it.
//!
//! The pickle is read by Candle, one operation at a time and under limits: nothing is called,
//! strings are no longer than what is left of the file, objects neither nest deeply nor grow by being
//! repeated. Numbers are read when they are asked for, and their size is checked against the archive
//! before memory is taken.

use crate::{Error, Result};
use candle_core::pickle::{Object, Stack};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Seek};
use zip::{CompressionMethod, ZipArchive};

/// Bytes of a pickle that are read; that of a state dict has some hundred for each tensor.
const PICKLE_BYTES: u64 = 1 << 20;
/// Objects that a pickle may make, those that are repeated counted again, as are parts of what is
/// looked at again.
const OBJECTS: usize = 1 << 20;
/// Objects inside one another.
const DEPTH: usize = 24;
/// Where other programs keep the tensors, when they are not alone in the file.
const NESTED: &str = "state_dict";

/// A file of `torch.save`, opened.
pub struct PytorchFile<R> {
    archive: ZipArchive<R>,
    tensors: BTreeMap<String, Stored>,
}

impl<R> std::fmt::Debug for PytorchFile<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(&self.tensors).finish()
    }
}

/// Where a tensor's numbers are.
#[derive(Clone, Debug, PartialEq)]
struct Stored {
    /// Name in the archive.
    entry: String,
    dtype: DType,
    /// First number.
    offset: usize,
    shape: Vec<usize>,
    /// Whether the first dimension is the one whose numbers follow each other.
    reversed: bool,
}

impl<R: Read + Seek> PytorchFile<R> {
    /// Opens a file and reads which tensors it has: those of its dictionary, or of the one that is
    /// called `state_dict` in it. What else it holds is passed over.
    ///
    /// # Errors
    /// When it is not such a file, is compressed, or goes beyond the limits.
    pub fn open(reader: R) -> Result<Self> {
        let mut archive = ZipArchive::new(reader)
            .map_err(|error| invalid("archive", error, "a zip archive, as torch.save writes it"))?;
        let names = archive.file_names().flatten();
        let pickle = names
            .map(|name| name.into_owned())
            .find(|name| name == "data.pkl" || name.ends_with("/data.pkl"))
            .ok_or_else(|| invalid("archive", "without a data.pkl", "one of torch.save"))?;
        let bytes = entry_bytes(&mut archive, &pickle, 0, PICKLE_BYTES, None)?;
        let folder = pickle.strip_suffix(".pkl").unwrap_or_default();
        let tensors = dictionary(unpickle(&bytes)?)?
            .into_iter()
            .filter_map(|(name, value)| {
                let name = name.unicode().ok()?;
                Some((name, stored(&value, folder)?))
            })
            .collect();
        Ok(Self { archive, tensors })
    }

    /// Names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, as the file says it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// The numbers of a tensor, as stored.
    ///
    /// # Errors
    /// When there is no such tensor, or the archive has fewer numbers than its shape says.
    pub fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let stored = self.tensors.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.names().take(8).collect();
            invalid("tensor", name, format!("one of {}", known.join(", ")))
        })?;
        let Stored {
            entry,
            dtype,
            offset,
            shape,
            reversed,
        } = stored.clone();
        let too_large = || invalid("shape of a tensor", format!("{shape:?}"), "a smaller one");
        let width = dtype.size_in_bytes();
        let count = shape
            .iter()
            .try_fold(width, |product, size| product.checked_mul(*size));
        let count = count.ok_or_else(too_large)? as u64;
        let start = offset.checked_mul(width).ok_or_else(too_large)? as u64;
        let bytes = entry_bytes(&mut self.archive, &entry, start, u64::MAX, Some(count))?;
        let laid_out: Vec<usize> = match reversed {
            true => shape.iter().rev().copied().collect(),
            false => shape,
        };
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, &laid_out, &Device::Cpu)?;
        match reversed {
            true => Ok(tensor.permute((0..laid_out.len()).rev().collect::<Vec<_>>())?),
            false => Ok(tensor),
        }
    }
}

fn invalid(
    argument: &'static str,
    found: impl std::fmt::Display,
    expected: impl Into<String>,
) -> Error {
    Error::Argument {
        kernel: "file of tensors",
        argument,
        found: found.to_string(),
        expected: expected.into(),
    }
}

/// Bytes of an entry that is stored as it is, from `start`: `count` of them, or all.
fn entry_bytes<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    name: &str,
    start: u64,
    limit: u64,
    count: Option<u64>,
) -> Result<Vec<u8>> {
    let mut entry = archive
        .by_name(name)
        .map_err(|error| invalid("entry of the archive", format!("{name}: {error}"), "there"))?;
    if entry.compression() != CompressionMethod::Stored || entry.size() != entry.compressed_size() {
        let found = format!("{name}, which is compressed");
        return Err(invalid("entry of the archive", found, "stored as it is"));
    }
    let count = count.unwrap_or(entry.size());
    let end = start.checked_add(count);
    if count > limit || end.is_none_or(|end| end > entry.size()) {
        let found = format!("{count} bytes from byte {start} of {name}");
        let expected = format!("within its {} bytes, at most {limit}", entry.size());
        return Err(invalid("tensor", found, expected));
    }
    let failed = |error| {
        invalid(
            "entry of the archive",
            format!("{name}: {error}"),
            "readable",
        )
    };
    std::io::copy(&mut entry.by_ref().take(start), &mut std::io::sink()).map_err(failed)?;
    // No memory for what a header only claims: the vector grows with what is there.
    let mut bytes = Vec::new();
    entry.take(count).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 != count {
        let found = format!("{name}, which is cut short");
        return Err(invalid("entry of the archive", found, "whole"));
    }
    Ok(bytes)
}

/// The object that a pickle describes.
fn unpickle(bytes: &[u8]) -> Result<Object> {
    let mut stack = Stack::empty();
    let mut cursor = Cursor::new(bytes);
    let mut budget = OBJECTS;
    loop {
        let rest = usize::try_from(cursor.position()).ok();
        let rest = rest.and_then(|at| bytes.get(at..)).unwrap_or_default();
        if asks_too_much(rest) {
            return Err(invalid("pickle", "longer than its file", "whole"));
        }
        // What the operation cannot read, it says at length; the place is enough.
        let done = stack.read(&mut cursor).map_err(|_| {
            let found = format!("unreadable at byte {}", bytes.len() - rest.len());
            invalid("pickle", found, "one that torch.save writes")
        })?;
        if done {
            return Ok(stack.finalize()?);
        }
        // Each operation makes one object of those below it or repeats one, which is then on top.
        let top = stack.stack().last();
        let allowed = top.is_none_or(|object| spend(object, DEPTH, &mut budget));
        if !allowed {
            let expected = format!("at most {OBJECTS} objects, {DEPTH} inside one another");
            return Err(invalid("pickle", "larger or deeper", expected));
        }
    }
}

/// Whether the next operation takes memory, or shifts, by a number that the file cannot mean.
fn asks_too_much(rest: &[u8]) -> bool {
    match rest {
        // A string, after its length.
        [b'X', a, b, c, d, after @ ..] => {
            u64::from(u32::from_le_bytes([*a, *b, *c, *d])) > after.len() as u64
        }
        // An integer of so many bytes.
        [0x8a, bytes, ..] => *bytes > 8,
        _ => false,
    }
}

/// Takes what an object weighs off the budget: one for each object in it and for sixteen letters.
fn spend(object: &Object, depth: usize, budget: &mut usize) -> bool {
    let Some(depth) = depth.checked_sub(1) else {
        return false;
    };
    let letters = match object {
        Object::Unicode(text) => text.len(),
        Object::Class {
            module_name,
            class_name,
        } => module_name.len() + class_name.len(),
        _ => 0,
    };
    let Some(left) = budget.checked_sub(1 + letters / 16) else {
        return false;
    };
    *budget = left;
    match object {
        Object::Tuple(all) | Object::List(all) => {
            all.iter().all(|object| spend(object, depth, budget))
        }
        Object::Dict(all) => all
            .iter()
            .all(|(key, value)| spend(key, depth, budget) && spend(value, depth, budget)),
        Object::Reduce { callable, args } | Object::Build { callable, args } => {
            spend(callable, depth, budget) && spend(args, depth, budget)
        }
        Object::PersistentLoad(id) => spend(id, depth, budget),
        _ => true,
    }
}

/// The dictionary of tensors.
fn dictionary(object: Object) -> Result<Vec<(Object, Object)>> {
    let object = match object {
        // What an ordered dictionary also carries.
        Object::Build { callable, .. } => *callable,
        other => other,
    };
    let all = object
        .dict()
        .map_err(|_| invalid("pickle", "no dictionary", "a dictionary of tensors"))?;
    let nested = all.iter().position(|(name, value)| {
        matches!(name, Object::Unicode(name) if name == NESTED)
            && matches!(value, Object::Dict(_) | Object::Build { .. })
    });
    match nested {
        Some(index) => match all.into_iter().nth(index) {
            Some((_, Object::Build { callable, .. })) => Ok(callable.dict().unwrap_or_default()),
            Some((_, nested)) => Ok(nested.dict().unwrap_or_default()),
            None => Ok(Vec::new()),
        },
        None => Ok(all),
    }
}

/// `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, …)`, or a parameter made of one;
/// the storage is `("storage", type, key, device, length)`. `None` for all else.
fn stored(object: &Object, folder: &str) -> Option<Stored> {
    let Object::Reduce { callable, args } = object else {
        return None;
    };
    let (Object::Class { class_name, .. }, Object::Tuple(arguments)) = (&**callable, &**args)
    else {
        return None;
    };
    match (class_name.as_str(), arguments.as_slice()) {
        ("_rebuild_parameter", [tensor, ..]) => stored(tensor, folder),
        ("_rebuild_tensor_v2", [Object::PersistentLoad(storage), offset, shape, strides, ..]) => {
            let Object::Tuple(storage) = &**storage else {
                return None;
            };
            let [
                _,
                Object::Class { class_name, .. },
                Object::Unicode(key),
                ..,
            ] = storage.as_slice()
            else {
                return None;
            };
            let dtype = match class_name.as_str() {
                "FloatStorage" => DType::F32,
                "DoubleStorage" => DType::F64,
                "HalfStorage" => DType::F16,
                "BFloat16Storage" => DType::BF16,
                _ => return None,
            };
            let shape = sizes(shape)?;
            Some(Stored {
                entry: format!("{folder}/{key}"),
                dtype,
                offset: size(offset)?,
                reversed: is_reversed(&shape, &sizes(strides)?)?,
                shape,
            })
        }
        _ => None,
    }
}

/// Whether strides are those of the dimensions in reverse, or in order; `None` for any others.
fn is_reversed(shape: &[usize], strides: &[usize]) -> Option<bool> {
    let follows = |indices: &mut dyn Iterator<Item = usize>| {
        let mut expected = 1_usize;
        for index in indices {
            let (size, stride) = (*shape.get(index)?, *strides.get(index)?);
            if size != 1 && stride != expected {
                return Some(false);
            }
            expected = expected.checked_mul(size)?;
        }
        Some(true)
    };
    if shape.len() != strides.len() {
        return None;
    }
    match follows(&mut (0..shape.len()).rev())? {
        true => Some(false),
        false => follows(&mut (0..shape.len()))?.then_some(true),
    }
}

fn sizes(object: &Object) -> Option<Vec<usize>> {
    match object {
        Object::Tuple(all) => all.iter().map(size).collect(),
        _ => None,
    }
}

fn size(object: &Object) -> Option<usize> {
    match object {
        Object::Int(number) => usize::try_from(*number).ok(),
        Object::Long(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of stored entries, and one with a pickle in `a/data.pkl`.
    fn archive(entries: &[(&str, &[u8])]) -> Cursor<Vec<u8>> {
        use std::io::Write;
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options =
            zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        for (name, bytes) in entries {
            writer.start_file(*name, options).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    fn text(text: &str) -> Vec<u8> {
        let length = (text.len() as u32).to_le_bytes();
        [b"X".as_slice(), &length, text.as_bytes()].concat()
    }

    /// A dictionary with "w", two rows of three, and whatever strides and offset.
    fn pickle(strides: [u8; 2], offset: u8) -> Vec<u8> {
        let storage = [
            b"(".as_slice(),
            &text("storage"),
            b"ctorch\nFloatStorage\n",
            &text("0"),
            &text("cpu"),
            b"K\x06tQ",
        ]
        .concat();
        [
            b"\x80\x02}(".as_slice(),
            &text("w"),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            &storage,
            &[b'K', offset],
            b"K\x02K\x03\x86",
            &[b'K', strides[0], b'K', strides[1], 0x86],
            b"\x89}tRu.",
        ]
        .concat()
    }

    fn opened(pickle: &[u8], floats: usize) -> Result<PytorchFile<Cursor<Vec<u8>>>> {
        let numbers: Vec<u8> = (0..floats)
            .flat_map(|number| (number as f32).to_le_bytes())
            .collect();
        PytorchFile::open(archive(&[("a/data.pkl", pickle), ("a/data/0", &numbers)]))
    }

    #[test]
    fn rows_columns_and_offsets_are_read() {
        for (strides, offset, expected) in [
            ([3, 1], 0, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
            ([3, 1], 1, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
            ([1, 2], 0, [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]),
        ] {
            let mut file = opened(&pickle(strides, offset), 7).unwrap();
            assert_eq!(file.names().collect::<Vec<_>>(), ["w"]);
            assert_eq!(file.shape("w"), Some([2, 3].as_slice()));
            assert_eq!(
                file.tensor("w").unwrap().to_vec2::<f32>().unwrap(),
                expected
            );
            assert!(file.tensor("v").unwrap_err().to_string().contains('v'));
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        // One number short, strides that skip, and every way of cutting a pickle off.
        assert!(opened(&pickle([3, 1], 0), 5).unwrap().tensor("w").is_err());
        assert!(opened(&pickle([3, 1], 2), 7).unwrap().tensor("w").is_err());
        assert_eq!(opened(&pickle([9, 1], 0), 7).unwrap().names().count(), 0);
        let whole = pickle([3, 1], 0);
        for length in 0..whole.len() {
            assert!(opened(&whole[..length], 7).is_err(), "{length}");
        }
        assert!(PytorchFile::open(Cursor::new(b"PK".to_vec())).is_err());
        assert!(PytorchFile::open(archive(&[("a/other", b"")])).is_err());
    }

    #[test]
    fn hostile_pickles_are_refused_before_they_take_memory() {
        // A string of four gigabytes; an integer of 255 bytes; a tuple of itself twice, a thousand
        // times over; a tuple in a tuple, ten thousand deep; arguments that are missing.
        let long = [b"\x80\x02X".as_slice(), &[0xff; 4], b"abc."].concat();
        let wide = [b"\x80\x02\x8a\xff".as_slice(), &[1; 255], b"."].concat();
        let doubled = [
            b"\x80\x02K\x01".as_slice(),
            &b"q\x00h\x00\x86".repeat(1000),
            b".",
        ]
        .concat();
        let deep = [b"\x80\x02K\x01".as_slice(), &[0x85; 10_000], b"."].concat();
        for hostile in [long, wide, doubled, deep] {
            let said = opened(&hostile, 1).unwrap_err().to_string();
            assert!(said.contains("pickle"), "{said}");
        }
        let short = [
            b"\x80\x02}(".as_slice(),
            &text("w"),
            b"ctorch._utils\n_rebuild_tensor_v2\n)Ru.",
        ]
        .concat();
        assert_eq!(opened(&short, 1).unwrap().names().count(), 0);
    }
}
