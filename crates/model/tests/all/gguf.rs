//! What a GGUF file says of a model, read back by the few lines that it takes.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;

use half::f16;
use lapidary_kernels::{DType, Device, QuantisedMatrix, Tensor};
use lapidary_model::gguf::{GgufFloat, write_gguf};
use lapidary_model::{Initialiser, Model, ModelSpec, Package, Tokenizer};
use lapidary_parts::parameters::Quantisation;

const LLAMA: &str = r#"
width = 64
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 300
length = 24
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, bias = false, causal = true, position = { kind = "rotary" } }
feedforward = { kind = "gated", hidden = 96 }
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, bias = false, causal = true, position = { kind = "rotary" } }
feedforward = { kind = "gated", hidden = 96 }
[head]
kind = "language-model"
tied = false
"#;

const GPT2: &str = r#"
width = 32
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 300
length = 24
position = { kind = "learned" }
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 64, activation = "gelu-tanh" }
[head]
kind = "language-model"
tied = true
"#;

fn model(spec: &str) -> Model {
    let spec: ModelSpec = toml::from_str(spec).unwrap();
    Model::new(spec, &mut Initialiser::new(3, DType::F32, Device::Cpu)).unwrap()
}

struct Reader<'a>(&'a [u8], usize);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        self.1 += N;
        self.0[self.1 - N..self.1].try_into().unwrap()
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> usize {
        u64::from_le_bytes(self.take()) as usize
    }

    fn text(&mut self) -> String {
        let length = self.u64();
        self.1 += length;
        String::from_utf8(self.0[self.1 - length..self.1].to_vec()).unwrap()
    }

    /// A value in words.
    fn value(&mut self, kind: u32) -> String {
        match kind {
            4 => self.u32().to_string(),
            5 => (self.u32() as i32).to_string(),
            6 => f32::from_le_bytes(self.take()).to_string(),
            8 => self.text(),
            9 => {
                let (kind, count) = (self.u32(), self.u64());
                let all: Vec<String> = (0..count).map(|_| self.value(kind)).collect();
                all.join("|")
            }
            other => panic!("type {other}"),
        }
    }
}

struct Read {
    entries: BTreeMap<String, String>,
    /// Dimensions `[output, input]`, type, and values.
    tensors: BTreeMap<String, (Vec<usize>, u32, Vec<f32>)>,
}

fn read(bytes: &[u8]) -> Read {
    let mut reader = Reader(bytes, 0);
    assert_eq!(&reader.take::<4>(), b"GGUF");
    assert_eq!(reader.u32(), 3);
    let (tensors, entries) = (reader.u64(), reader.u64());
    let entries = (0..entries).map(|_| {
        let key = reader.text();
        let kind = reader.u32();
        (key, reader.value(kind))
    });
    let entries = entries.collect();
    let infos: Vec<(String, Vec<usize>, u32, usize)> = (0..tensors)
        .map(|_| {
            let (name, count) = (reader.text(), reader.u32());
            let mut dims: Vec<usize> = (0..count).map(|_| reader.u64()).collect();
            dims.reverse();
            (name, dims, reader.u32(), reader.u64())
        })
        .collect();
    let start = reader.1.next_multiple_of(32);
    let tensors = infos.into_iter().map(|(name, dims, kind, offset)| {
        assert_eq!(offset % 32, 0);
        let count = dims.iter().product();
        let values = numbers(&bytes[start + offset..], kind, count);
        (name, (dims, kind, values))
    });
    let tensors = tensors.collect();
    Read { entries, tensors }
}

/// The numbers of a tensor by the formulas of its type.
fn numbers(bytes: &[u8], kind: u32, count: usize) -> Vec<f32> {
    let half = |at: usize| f16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).to_f32();
    let nibble = |byte: u8, high: bool| f32::from(if high { byte >> 4 } else { byte & 15 });
    (0..count)
        .map(|i| {
            let (block, within) = (i / 32, i % 32);
            match kind {
                0 => f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()),
                1 => half(2 * i),
                2 => {
                    let at = 18 * block;
                    half(at) * (nibble(bytes[at + 2 + within % 16], within >= 16) - 8.0)
                }
                3 => {
                    let at = 20 * block;
                    half(at) * nibble(bytes[at + 4 + within % 16], within >= 16) + half(at + 2)
                }
                8 => half(34 * block) * f32::from(bytes[34 * block + 2 + within] as i8),
                other => panic!("type {other}"),
            }
        })
        .collect()
}

fn written(model: Model, float: GgufFloat) -> (Read, lapidary_model::gguf::GgufSummary) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let tokenizer = Tokenizer::byte_level(&["<end>"]).unwrap();
    let package = Package::new(model, Some(tokenizer));
    let summary = write_gguf(&package, &path, float).unwrap();
    (read(&std::fs::read(path).unwrap()), summary)
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_parameter_of_a_llama_is_there_and_queries_are_turned() {
    let model = model(LLAMA);
    let parameters = model.parameters().clone();
    let (file, summary) = written(model, GgufFloat::F32);
    assert_eq!((summary.architecture, summary.written_out), ("llama", 0));
    assert_eq!(summary.vocabulary, "gpt2");
    let entry = |key: &str| file.entries[key].as_str();
    assert_eq!(entry("llama.attention.head_count_kv"), "2");
    assert_eq!(entry("llama.feed_forward_length"), "96");
    assert_eq!(entry("llama.block_count"), "2");
    assert_eq!(entry("tokenizer.ggml.tokens").split('|').count(), 301);
    let count: usize = file
        .tensors
        .values()
        .map(|(_, _, values)| values.len())
        .sum();
    let all: usize = parameters.values().map(Tensor::elem_count).sum();
    assert_eq!(count, all);
    let (dims, _, values) = &file.tensors["blk.1.ffn_down.weight"];
    assert_eq!(dims, &[64, 96]);
    assert_eq!(
        values,
        &flat(&parameters["blocks.1.feedforward.down.weight"])
    );
    // Row 2 i of a head is its feature i, row 2 i + 1 its feature i + 8, of 16.
    let (_, _, query) = &file.tensors["blk.0.attn_q.weight"];
    let own = flat(&parameters["blocks.0.attention.query.weight"]);
    let row = |values: &[f32], row: usize| values[row * 64..(row + 1) * 64].to_vec();
    for (stored, from) in [(0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24)] {
        assert_eq!(row(query, stored), row(&own, from));
    }
}

#[test]
fn gpt2_has_one_matrix_for_queries_keys_and_values() {
    let model = model(GPT2);
    let parameters = model.parameters().clone();
    let (file, summary) = written(model, GgufFloat::F16);
    assert_eq!(summary.architecture, "gpt2");
    assert!(!file.tensors.contains_key("output.weight"));
    let (dims, kind, values) = &file.tensors["blk.1.attn_qkv.weight"];
    assert_eq!((dims.as_slice(), *kind), (&[96, 32][..], 1));
    let key = flat(&parameters["blocks.1.attention.key.weight"]);
    for (found, own) in values[32 * 32..].iter().zip(&key) {
        assert_eq!(*found, f16::from_f32(*own).to_f32());
    }
    let (dims, kind, _) = &file.tensors["blk.0.attn_qkv.bias"];
    assert_eq!((dims.as_slice(), *kind), (&[96][..], 0));
    assert_eq!(file.tensors["position_embd.weight"].0, [24, 32]);
}

#[test]
fn integers_keep_their_bits_where_there_is_a_type_for_them() {
    for (bits, group, minima, scaled, name) in [
        (4, 32, false, false, "Q4_0"),
        (4, 64, true, false, "Q4_1"),
        (8, 64, false, false, "Q8_0"),
        (8, 32, true, false, "F16"),
        (4, 32, false, true, "F16"),
    ] {
        let model = model(LLAMA);
        let mut spec = model.spec().clone();
        let mut parameters = model.parameters().clone();
        let path = "blocks.1.attention.query.weight";
        let codes: Vec<u8> = (0..64 * 64u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761) >> 11) & ((1 << bits) - 1)) as u8)
            .collect();
        let groups = 64 * 64 / group;
        let scales = (0..groups)
            .map(|g| f16::from_f32(0.01 + 0.001 * (g % 9) as f32))
            .collect();
        let low = minima.then(|| {
            (0..groups)
                .map(|g| f16::from_f32(-0.05 * (g % 3) as f32))
                .collect()
        });
        let matrix = QuantisedMatrix::pack(bits, group, [64, 64], &codes, scales, low).unwrap();
        parameters.remove(path);
        parameters.insert(format!("{path}.codes"), matrix.codes().clone());
        parameters.insert(format!("{path}.scales"), matrix.scales().clone());
        if let Some(minima) = matrix.minima() {
            parameters.insert(format!("{path}.minima"), minima.clone());
        }
        if scaled {
            let scale = Tensor::full(0.5f32, 64, &Device::Cpu).unwrap();
            parameters.insert(format!("{path}.input_scale"), scale);
        }
        let form = Quantisation {
            bits,
            group,
            minima,
            input_scale: scaled,
            columns: 0,
        };
        spec.quantised.insert(path.to_owned(), form);
        let model = Model::new(spec, &mut parameters).unwrap();
        let numbers = flat(&model.dequantised().unwrap().parameters()[path]);
        let (file, summary) = written(model, GgufFloat::F32);
        assert!(
            summary
                .tensors
                .iter()
                .any(|(kind, count)| *kind == name && *count == 1)
        );
        assert_eq!(summary.written_out, usize::from(name == "F16"));
        let (_, _, found) = &file.tensors["blk.1.attn_q.weight"];
        for row in 0..64 {
            let from = row / 16 * 16 + row % 16 / 2 + row % 2 * 8;
            for column in 0..64 {
                let (found, own) = (found[row * 64 + column], numbers[from * 64 + column]);
                assert!(
                    (found - own).abs() < 1e-3 * own.abs().max(1e-2),
                    "{name}: {found} {own}"
                );
            }
        }
    }
}

/// The query of the second block as integers that are all zero, and numbers in some columns.
fn with_kept_columns(columns: &[u32]) -> Result<Model, String> {
    let model = model(LLAMA);
    let mut spec = model.spec().clone();
    let mut parameters = model.parameters().clone();
    let path = "blocks.1.attention.query.weight";
    let scales = vec![f16::from_f32(0.01); 64 * 2];
    let matrix = QuantisedMatrix::pack(8, 32, [64, 64], &[128; 64 * 64], scales, None).unwrap();
    parameters.remove(path);
    parameters.insert(format!("{path}.codes"), matrix.codes().clone());
    parameters.insert(format!("{path}.scales"), matrix.scales().clone());
    let index = Tensor::new(columns, &Device::Cpu).unwrap();
    parameters.insert(format!("{path}.columns"), index);
    let kept: Vec<f32> = (0..64 * columns.len()).map(|i| 0.25 * i as f32).collect();
    let kept = Tensor::from_vec(kept, (64, columns.len()), &Device::Cpu).unwrap();
    parameters.insert(format!("{path}.kept"), kept);
    let form = Quantisation {
        bits: 8,
        group: 32,
        minima: false,
        input_scale: false,
        columns: columns.len(),
    };
    spec.quantised.insert(path.to_owned(), form);
    Model::new(spec, &mut parameters).map_err(|error| error.to_string())
}

#[test]
fn columns_that_are_numbers_are_written_out_with_the_rest() {
    let (file, summary) = written(with_kept_columns(&[3, 40]).unwrap(), GgufFloat::F32);
    assert_eq!(summary.written_out, 1);
    let (_, _, found) = &file.tensors["blk.1.attn_q.weight"];
    for row in 0..64 {
        let from = row / 16 * 16 + row % 16 / 2 + row % 2 * 8;
        for column in 0..64 {
            let expected = match column {
                3 => 0.5 * from as f32,
                40 => 0.5 * from as f32 + 0.25,
                _ => 0.0,
            };
            assert_eq!(found[row * 64 + column], expected, "{row} {column}");
        }
    }
    for wrong in [[40, 3], [3, 3], [3, 64]] {
        let error = with_kept_columns(&wrong).err().unwrap();
        assert!(error.contains("below 64"), "{error}");
    }
}

#[test]
fn blocks_of_several_widths_have_an_architecture_of_their_own() {
    let (start, second) = LLAMA.split_once("hidden = 96").unwrap();
    let differing = format!(
        "{start}hidden = 96{}",
        second.replace("hidden = 96", "hidden = 40")
    );
    let (file, summary) = written(model(&differing), GgufFloat::F32);
    assert_eq!(summary.architecture, "deci");
    assert_eq!(file.entries["deci.feed_forward_length"], "96|40");
    assert_eq!(file.entries["deci.attention.head_count"], "4");
}

#[test]
fn what_gguf_has_no_words_for_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    for (from, to, word) in [
        (
            "kind = \"rms\" }\nattention",
            "kind = \"layer\" }\nattention",
            "norm",
        ),
        ("causal = true", "causal = true, window = 4", "window"),
        ("\"gated\", hidden = 96", "\"dense\", hidden = 96", "family"),
        (
            "width = 64",
            "width = 64\nlow_rank = { \"blocks.0.attention.query\" = 4 }",
            "factorised",
        ),
    ] {
        let changed = LLAMA.replace(from, to);
        assert_ne!(changed, LLAMA);
        let package = Package::new(model(&changed), None);
        let error = write_gguf(&package, &path, GgufFloat::F32)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
        assert!(!path.exists());
    }
}
