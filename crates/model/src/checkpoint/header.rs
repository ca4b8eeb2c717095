//! The header of a safetensors file, believed only after every claim in it has been checked.
//!
//! A safetensors file is `n: u64 little-endian`, `n` bytes of JSON, then the data. The JSON maps
//! each tensor's name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from
//! the start of the data, and `__metadata__` to a map of strings. The data has neither holes nor
//! overlaps.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::CheckpointError;
use crate::Limits;

/// The element type of a stored tensor, by its name in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[allow(missing_docs, non_camel_case_types, clippy::upper_case_acronyms)]
pub enum StoredType {
    BOOL,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    U16,
    I16,
    F16,
    BF16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
    C64,
}

impl StoredType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::BOOL | Self::U8 | Self::I8 => 1,
            Self::F8_E5M2 | Self::F8_E4M3 | Self::F8_E8M0 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::C64 => 8,
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// What a checkpoint says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The element type as stored.
    pub dtype: StoredType,
    /// The shape.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// The number of elements. Cannot overflow in a checkpoint that opened.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A tensor's claims and where its bytes are in the file, all checked.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub info: TensorInfo,
    pub bytes: Range<usize>,
}

/// A checked header.
#[derive(Clone, Debug, Default)]
pub(super) struct Header {
    pub entries: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
}

const LENGTH_BYTES: usize = 8;

/// Reads and checks the header of a whole file's bytes.
pub(super) fn read(path: &Path, file: &[u8], limits: &Limits) -> Result<Header, CheckpointError> {
    let json = header_bytes(path, file, limits)?;
    let data_start = LENGTH_BYTES + json.len();
    let data_bytes = file.len() - data_start;
    let claims: Claims = serde_json::from_slice(json)
        .map_err(|error| wrong(path, format!("its header says {error}"), HEADER_FORM))?;
    if claims.tensors.len() > limits.tensors {
        let found = format!("its header lists {} tensors", claims.tensors.len());
        return Err(wrong(
            path,
            found,
            format!("at most {} are read", limits.tensors),
        ));
    }
    let checker = Checker {
        path,
        data_bytes,
        limits,
    };
    let mut header = Header {
        metadata: claims.metadata,
        ..Header::default()
    };
    for (name, claim) in claims.tensors {
        let entry = checker.entry(&name, &claim)?;
        header.entries.insert(name, entry);
    }
    checker.tiles_the_data(&header)?;
    for entry in header.entries.values_mut() {
        entry.bytes = data_start + entry.bytes.start..data_start + entry.bytes.end;
    }
    Ok(header)
}

const HEADER_FORM: &str =
    "a header maps each name once to {\"dtype\", \"shape\", \"data_offsets\": [begin, end]}";

fn wrong(path: &Path, found: String, expected: impl Into<String>) -> CheckpointError {
    CheckpointError::Header {
        path: path.to_path_buf(),
        found,
        expected: expected.into(),
    }
}

/// The JSON part, once its claimed length is known to be honest.
fn header_bytes<'file>(
    path: &Path,
    file: &'file [u8],
    limits: &Limits,
) -> Result<&'file [u8], CheckpointError> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let found = format!("it has {} bytes", file.len());
        return Err(wrong(path, found, "the length of its header takes 8"));
    };
    let length = u64::from_le_bytes(*length);
    let claim = || format!("it claims a header of {length} bytes");
    if length > limits.header_bytes {
        let expected = format!("at most {} are read", limits.header_bytes);
        return Err(wrong(path, claim(), expected));
    }
    let json = usize::try_from(length).ok().and_then(|end| rest.get(..end));
    let Some(json) = json else {
        let expected = format!("only {} bytes follow (is it truncated?)", rest.len());
        return Err(wrong(path, claim(), expected));
    };
    if json.first() != Some(&b'{') {
        let found = "its header does not start with `{`".to_string();
        return Err(wrong(path, found, "a header is a JSON object"));
    }
    Ok(json)
}

/// Checks one tensor's claims against the file.
struct Checker<'file> {
    path: &'file Path,
    data_bytes: usize,
    limits: &'file Limits,
}

impl Checker<'_> {
    fn wrong(&self, tensor: &str, found: String, expected: String) -> CheckpointError {
        CheckpointError::Entry {
            path: self.path.to_path_buf(),
            tensor: shortened(tensor, 80),
            found,
            expected,
        }
    }

    /// The tensor's claims, if it lies inside the data and is as long as dtype and shape say.
    /// Its bytes are counted from the start of the data.
    fn entry(&self, name: &str, claim: &Claim) -> Result<Entry, CheckpointError> {
        if name.len() > self.limits.name_bytes {
            let found = format!("a name of {} bytes", name.len());
            return Err(self.wrong(
                name,
                found,
                format!("at most {} are read", self.limits.name_bytes),
            ));
        }
        let shape = self.shape(name, claim)?;
        let bytes = shape
            .iter()
            .try_fold(claim.dtype.bytes(), |product, &size| {
                product.checked_mul(size)
            });
        let Some(bytes) = bytes.filter(|&bytes| bytes as u64 <= self.limits.tensor_bytes) else {
            let found = format!("shape {shape:?} of {}", claim.dtype);
            let expected = format!("at most {} bytes are read", self.limits.tensor_bytes);
            return Err(self.wrong(name, found, expected));
        };
        let [begin, end] = claim.data_offsets;
        let offsets = format!("data offsets [{begin}, {end}]");
        if begin > end || end > self.data_bytes as u64 {
            let expected = format!("the file holds bytes 0 to {} of data", self.data_bytes);
            return Err(self.wrong(name, offsets, expected));
        }
        if end - begin != bytes as u64 {
            let expected = format!("shape {shape:?} of {} takes {bytes} bytes", claim.dtype);
            return Err(self.wrong(name, offsets, expected));
        }
        let info = TensorInfo {
            dtype: claim.dtype,
            shape,
        };
        // Both ends are at most `data_bytes`, a usize.
        let bytes = begin as usize..end as usize;
        Ok(Entry { info, bytes })
    }

    fn shape(&self, name: &str, claim: &Claim) -> Result<Vec<usize>, CheckpointError> {
        if claim.shape.0.len() > self.limits.rank {
            let found = format!("more than {} dimensions", self.limits.rank);
            let expected = format!("at most {} are read", self.limits.rank);
            return Err(self.wrong(name, found, expected));
        }
        let sizes: Option<Vec<usize>> = claim
            .shape
            .0
            .iter()
            .map(|&n| usize::try_from(n).ok())
            .collect();
        sizes.ok_or_else(|| {
            let found = format!("shape {:?}", claim.shape.0);
            self.wrong(name, found, "sizes fit the address space".to_string())
        })
    }

    /// Every byte of the data belongs to exactly one tensor.
    fn tiles_the_data(&self, header: &Header) -> Result<(), CheckpointError> {
        let mut entries: Vec<_> = header.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
        let mut covered = 0;
        for (name, Entry { bytes: span, .. }) in entries {
            if span.start != covered {
                let kind = if span.start < covered {
                    "overlaps"
                } else {
                    "leaves a hole after"
                };
                let found = format!("bytes {} to {}", span.start, span.end);
                let expected = format!("this {kind} the previous tensor, which ends at {covered}");
                return Err(self.wrong(name, found, expected));
            }
            covered = span.end;
        }
        if covered != self.data_bytes {
            let found = format!("it has {} bytes of data", self.data_bytes);
            return Err(wrong(
                self.path,
                found,
                format!("its tensors take {covered}"),
            ));
        }
        Ok(())
    }
}

/// A text cut to at most `limit` bytes, for messages.
pub(super) fn shortened(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_string();
    }
    let end = (0..=limit)
        .rev()
        .find(|&end| text.is_char_boundary(end))
        .unwrap_or(0);
    format!("{}…", &text[..end])
}

/// What the header says, unchecked, but bounded in size by the header's own length.
#[derive(Default)]
struct Claims {
    tensors: BTreeMap<String, Claim>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Claim {
    dtype: StoredType,
    shape: Sizes,
    data_offsets: [u64; 2],
}

/// A shape that stops growing at a rank beyond any limit, so that a list of a million zeros takes
/// no more memory than its text.
struct Sizes(Vec<u64>);

const LONGEST_SHAPE: usize = 64;

impl<'de> Deserialize<'de> for Sizes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizesVisitor;
        impl<'de> Visitor<'de> for SizesVisitor {
            type Value = Sizes;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                write!(formatter, "a list of at most {LONGEST_SHAPE} sizes")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Sizes, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = sequence.next_element()? {
                    if sizes.len() == LONGEST_SHAPE {
                        return Err(A::Error::invalid_length(LONGEST_SHAPE + 1, &self));
                    }
                    sizes.push(size);
                }
                Ok(Sizes(sizes))
            }
        }
        deserializer.deserialize_seq(SizesVisitor)
    }
}

impl<'de> Deserialize<'de> for Claims {
    /// Like a map, but a name that comes twice is an error: JSON readers disagree on which of the
    /// two they keep.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ClaimsVisitor;
        impl<'de> Visitor<'de> for ClaimsVisitor {
            type Value = Claims;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a map from tensor names to their dtype, shape and offsets")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claims, A::Error> {
                let mut claims = Claims::default();
                let mut metadata_seen = false;
                while let Some(name) = map.next_key::<String>()? {
                    let twice = if name == "__metadata__" {
                        claims.metadata = map.next_value()?;
                        std::mem::replace(&mut metadata_seen, true)
                    } else {
                        let claim = map.next_value()?;
                        claims.tensors.insert(name.clone(), claim).is_some()
                    };
                    if twice {
                        let name = shortened(&name, 80);
                        return Err(A::Error::custom(format!("the name `{name}` comes twice")));
                    }
                }
                Ok(claims)
            }
        }
        deserializer.deserialize_map(ClaimsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(json: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        bytes
    }

    fn error(bytes: &[u8]) -> String {
        read(Path::new("x.safetensors"), bytes, &Limits::default())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn honest_header_is_read() {
        let bytes = file(
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]},
               "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
               "empty":{"dtype":"I64","shape":[0,3],"data_offsets":[4,4]}}"#,
            8,
        );
        let header = read(Path::new("x"), &bytes, &Limits::default()).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.entries["a"].info.elements(), 1);
        assert_eq!(header.entries["b"].bytes.len(), 4);
        assert_eq!(header.entries["empty"].bytes.len(), 0);
    }

    #[test]
    fn lies_are_named() {
        let entry = |body: &str| format!(r#"{{"w":{body}}}"#);
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (
                vec![1, 2, 3],
                "it has 3 bytes, but the length of its header takes 8",
            ),
            (
                u64::MAX.to_le_bytes().to_vec(),
                "at most 100000000 are read",
            ),
            (
                file("{}", 0)[..9].to_vec(),
                "only 1 bytes follow (is it truncated?)",
            ),
            (file("[]", 0), "does not start with `{`"),
            (file(r#"{"w":"#, 0), "EOF while parsing"),
            (
                file("{}", 3),
                "it has 3 bytes of data, but its tensors take 0",
            ),
            (
                file(
                    &entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#),
                    4,
                ),
                "data offsets [0, 8], but the file holds bytes 0 to 4 of data",
            ),
            (
                file(
                    &entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#),
                    8,
                ),
                "data offsets [8, 0]",
            ),
            (
                file(
                    &entry(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#),
                    8,
                ),
                "data offsets [0, 8], but shape [3] of F32 takes 12 bytes",
            ),
            (
                file(
                    &entry(
                        r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#,
                    ),
                    0,
                ),
                "at most 68719476736 bytes are read",
            ),
            (
                file(
                    &entry(r#"{"dtype":"Q3","shape":[1],"data_offsets":[0,1]}"#),
                    1,
                ),
                "unknown variant `Q3`, expected one of `BOOL`",
            ),
            (
                file(
                    &entry(r#"{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}"#),
                    1,
                ),
                "integer `-1`",
            ),
            (
                file(
                    &entry(r#"{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}"#),
                    1,
                ),
                "more than 8 dimensions",
            ),
            (
                file(
                    r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                        "w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
                    1,
                ),
                "the name `w` comes twice",
            ),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                        "b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                    3,
                ),
                "`b` bytes 1 to 3, but this overlaps the previous tensor, which ends at 2",
            ),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                        "b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#,
                    3,
                ),
                "this leaves a hole after the previous tensor, which ends at 1",
            ),
        ];
        for (bytes, expected) in cases {
            let message = error(&bytes);
            assert!(
                message.contains(expected),
                "{message}\ndoes not say\n{expected}"
            );
            assert!(!message.contains('\n'), "{message}");
        }
        let zeros = format!(
            r#"{{"dtype":"U8","shape":[{}0],"data_offsets":[0,0]}}"#,
            "0,".repeat(1000)
        );
        assert!(error(&file(&entry(&zeros), 0)).contains("at most 64 sizes"));
        let name = "n".repeat(2000);
        let entry = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        assert!(error(&file(&entry, 1)).contains("a name of 2000 bytes"));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(Path::new("x"), &bytes, &Limits::default());
        }

        #[test]
        fn any_json_never_panics(json in r#"\{("[a-b]":\{"dtype":"(F32|U8|F4)","shape":\[[0-9,]{0,30}\],"data_offsets":\[[0-9]{1,20},[0-9]{1,20}\]\},?){0,3}\}?"#, data in 0usize..20) {
            let _ = read(Path::new("x"), &file(&json, data), &Limits::default());
        }

        /// A header that passes points only inside the file, whatever was flipped in it.
        #[test]
        fn flipped_bytes_stay_inside(position in 0usize..250, value in any::<u8>()) {
            let mut bytes = file(
                r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"U8","shape":[4],"data_offsets":[24,28]}}"#,
                28,
            );
            let position = position % bytes.len();
            bytes[position] = value;
            if let Ok(header) = read(Path::new("x"), &bytes, &Limits::default()) {
                for entry in header.entries.values() {
                    prop_assert!(entry.bytes.end <= bytes.len());
                    prop_assert_eq!(entry.bytes.len(), entry.info.elements() * entry.info.dtype.bytes());
                }
            }
        }
    }
}
