//! The bytes of a GGUF file (version 3): a header, entries, where each tensor lies, the tensors. All
//! but the tensors is known before the first of them is read.

use super::blocks::Form;

/// Tensors start at multiples of this.
const ALIGNMENT: usize = 32;

/// The value of an entry.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Text(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    Texts(Vec<String>),
}

impl Value {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    /// One number where all are the same, else a list.
    pub(super) fn each(numbers: Vec<u32>) -> Self {
        match numbers.first() {
            Some(first) if numbers.iter().all(|number| number == first) => Self::U32(*first),
            _ => Self::U32s(numbers),
        }
    }

    fn kind(&self) -> u32 {
        const ARRAY: u32 = 9;
        match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Text(_) => 8,
            Self::U32s(_) | Self::I32s(_) | Self::Texts(_) => ARRAY,
        }
    }

    fn write(&self, into: &mut Vec<u8>) {
        let array = |into: &mut Vec<u8>, kind: u32, count: usize| {
            into.extend(kind.to_le_bytes());
            into.extend((count as u64).to_le_bytes());
        };
        match self {
            Self::U32(number) => into.extend(number.to_le_bytes()),
            Self::F32(number) => into.extend(number.to_le_bytes()),
            Self::Text(text) => write_text(text, into),
            Self::U32s(numbers) => {
                array(into, 4, numbers.len());
                into.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Self::I32s(numbers) => {
                array(into, 5, numbers.len());
                into.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Self::Texts(texts) => {
                array(into, 8, texts.len());
                for text in texts {
                    write_text(text, into);
                }
            }
        }
    }
}

fn write_text(text: &str, into: &mut Vec<u8>) {
    into.extend((text.len() as u64).to_le_bytes());
    into.extend(text.as_bytes());
}

/// What stands before the tensors.
#[derive(Default)]
pub(super) struct Header {
    entries: Vec<(String, Value)>,
    tensors: Vec<(String, Form)>,
}

impl Header {
    pub(super) fn put(&mut self, key: impl Into<String>, value: Value) {
        self.entries.push((key.into(), value));
    }

    pub(super) fn tensor(&mut self, name: String, form: Form) {
        self.tensors.push((name, form));
    }

    /// Its bytes, up to where the first tensor starts.
    pub(super) fn finish(&self) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend(b"GGUF");
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            write_text(key, &mut header);
            header.extend(value.kind().to_le_bytes());
            value.write(&mut header);
        }
        let mut offset = 0;
        for (name, form) in &self.tensors {
            write_text(name, &mut header);
            header.extend((form.dims.len() as u32).to_le_bytes());
            // The dimension that lies closest together comes first.
            for dim in form.dims.iter().rev() {
                header.extend((*dim as u64).to_le_bytes());
            }
            header.extend(form.kind.number().to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += form.bytes().next_multiple_of(ALIGNMENT);
        }
        pad(&mut header);
        header
    }
}

/// Zeros up to where the next tensor starts.
pub(super) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}
