//! Whole checkpoints: fixtures written by transformers, our own written and read back, and what
//! the safetensors crate says about them.

use std::fs;
use std::path::{Path, PathBuf};

use lapidary_kernels::Device;
use safetensors::SafeTensors;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/families")
        .join(name)
}

fn open(directory: &Path) -> Checkpoint {
    Checkpoint::open(directory, &Limits::default()).unwrap()
}

fn range(count: usize, dtype: DType) -> Tensor {
    Tensor::arange(0u32, count as u32, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

#[test]
fn every_fixture_opens_and_reads_as_the_safetensors_crate_does() {
    for directory in fs::read_dir(fixture("")).unwrap() {
        let directory = directory.unwrap().path();
        if !directory.is_dir() {
            continue;
        }
        let checkpoint = open(&directory);
        let files = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let mut seen = 0;
        for file in files.filter(|file| file.extension().is_some_and(|e| e == "safetensors")) {
            if file.ends_with("case.safetensors") {
                continue;
            }
            let bytes = fs::read(&file).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                seen += 1;
                let tensor = checkpoint.tensor(&name, DType::F32).unwrap();
                assert_eq!(tensor.dims(), view.shape(), "{name}");
                if view.dtype() == safetensors::Dtype::F32 {
                    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                    let (expected, _) = view.data().as_chunks::<4>();
                    assert!(
                        values
                            .iter()
                            .zip(expected)
                            .all(|(a, b)| a.to_le_bytes() == *b),
                        "{name}"
                    );
                }
            }
        }
        assert_eq!(checkpoint.names().count(), seen);
    }
}

#[test]
fn shards_and_types_are_those_of_the_fixtures() {
    let sharded = open(&fixture("llama"));
    assert!(sharded.shards.len() > 1);
    assert_eq!(sharded.info("lm_head.weight").unwrap().shape, [128, 32]);
    assert_eq!(sharded.metadata()["format"], "pt");
    let half = open(&fixture("llama-tied"));
    assert_eq!(
        half.info("model.norm.weight").unwrap().dtype,
        StoredType::BF16
    );
    let old = open(&fixture("bert-masked-lm-old-names"));
    let positions = old
        .tensor("bert.embeddings.position_ids", DType::I64)
        .unwrap();
    assert_eq!(
        positions.flatten_all().unwrap().to_vec1::<i64>().unwrap()[..3],
        [0, 1, 2]
    );
}

#[test]
fn asking_for_what_is_not_there_names_the_nearest() {
    let checkpoint = open(&fixture("gpt2"));
    let error = checkpoint
        .tensor("transformer.h.0.attn.c_atn.weight", DType::F32)
        .unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("the closest name is `transformer.h.0.attn.c_attn.weight`"),
        "{message}"
    );
    let error = checkpoint
        .tensor_of_shape("transformer.wte.weight", &[4, 4], DType::F32)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("has shape [128, 32], but the model needs [4, 4]")
    );
}

#[test]
fn directories_without_weights_say_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("pytorch_model.bin"), "").unwrap();
    let message = Checkpoint::open(directory.path(), &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(message.contains("(but pytorch_model.bin"), "{message}");
    let nowhere = directory.path().join("nowhere");
    let message = Checkpoint::open(&nowhere, &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(message.starts_with("cannot open"), "{message}");
    fs::write(directory.path().join(WEIGHTS_FILE), "").unwrap();
    let message = Checkpoint::open(directory.path(), &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(message.contains("it has 0 bytes"), "{message}");
}

#[test]
fn index_and_shards_must_agree() {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("llama")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    let index_path = directory.path().join(INDEX_FILE);
    let index = fs::read_to_string(&index_path).unwrap();
    fs::write(
        &index_path,
        index.replace("\"lm_head.weight\"", "\"lm_tail.weight\""),
    )
    .unwrap();
    let message = Checkpoint::open(directory.path(), &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("tensor `lm_tail.weight` is in model-0000"),
        "{message}"
    );
    fs::write(&index_path, index.replace("-00002-of-", "-00009-of-")).unwrap();
    let message = Checkpoint::open(directory.path(), &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("cannot open") && message.contains("00009"),
        "{message}"
    );
}

#[test]
fn truncated_fixture_is_refused() {
    let bytes = fs::read(fixture("bert").join(WEIGHTS_FILE)).unwrap();
    for length in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        let result = Checkpoint::from_bytes("cut", bytes[..length].to_vec(), &Limits::default());
        assert!(result.is_err(), "{length} bytes");
    }
    assert!(Checkpoint::from_bytes("whole", bytes, &Limits::default()).is_ok());
}

#[test]
fn written_checkpoint_reads_back_and_satisfies_the_safetensors_crate() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = [
        (
            "b.weight",
            range(6, DType::F32).reshape((2, 3)).unwrap().t().unwrap(),
        ),
        ("a.mask", range(3, DType::U8)),
        ("c.half", range(5, DType::BF16)),
        (
            "d.empty",
            Tensor::zeros((0, 4), DType::F64, &Device::Cpu).unwrap(),
        ),
        ("e.scalar", Tensor::new(7i64, &Device::Cpu).unwrap()),
    ];
    let options = WriteOptions {
        metadata: [("seed".to_string(), "1".to_string())].into(),
        ..WriteOptions::default()
    };
    let files = write_checkpoint(
        directory.path(),
        tensors.iter().map(|(n, t)| (*n, t)),
        &options,
    )
    .unwrap();
    let bytes = fs::read(&files[0]).unwrap();
    assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), 5);
    let checkpoint = open(directory.path());
    assert_eq!(checkpoint.metadata()["seed"], "1");
    for (name, tensor) in &tensors {
        let read = checkpoint.tensor(name, tensor.dtype()).unwrap();
        assert_eq!(read.dims(), tensor.dims());
        let values = |tensor: &Tensor| -> Vec<f64> {
            tensor
                .to_dtype(DType::F64)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1()
                .unwrap()
        };
        assert_eq!(values(&read), values(tensor), "{name}");
    }
    let again = tempfile::tempdir().unwrap();
    write_checkpoint(
        again.path(),
        tensors.iter().rev().map(|(n, t)| (*n, t)),
        &options,
    )
    .unwrap();
    assert_eq!(
        fs::read(again.path().join(WEIGHTS_FILE)).unwrap(),
        bytes,
        "same tensors, same bytes"
    );
}

#[test]
fn large_checkpoints_become_shards() {
    let directory = tempfile::tempdir().unwrap();
    let tensor = range(100, DType::F32);
    let options = WriteOptions {
        shard_bytes: 800,
        dtype: Some(DType::F16),
        ..WriteOptions::default()
    };
    let names: Vec<String> = (0..10).map(|i| format!("t{i}")).collect();
    let files = write_checkpoint(
        directory.path(),
        names.iter().map(|name| (name.as_str(), &tensor)),
        &options,
    )
    .unwrap();
    assert_eq!(
        files.len(),
        4,
        "three shards of at most four tensors, and the index"
    );
    let checkpoint = open(directory.path());
    assert_eq!(checkpoint.names().count(), 10);
    assert_eq!(checkpoint.stored_bytes(), 2000);
    fs::write(directory.path().join("other.safetensors"), [0; 64]).unwrap();
    let shards = (1..=3).map(|i| format!("model-{i:05}-of-00003.safetensors"));
    let bytes = shards.map(|name| fs::metadata(directory.path().join(name)).unwrap().len());
    assert_eq!(checkpoint.file_bytes(), bytes.sum::<u64>());
    assert_eq!(checkpoint.info("t9").unwrap().dtype, StoredType::F16);
}

#[test]
fn refused_writes_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let good = range(3, DType::F32);
    let bad = Tensor::new(&[1.0f32, f32::NAN], &Device::Cpu).unwrap();
    let options = WriteOptions {
        shard_bytes: 4,
        ..WriteOptions::default()
    };
    let message = |tensors: Vec<(&str, &Tensor)>| {
        write_checkpoint(directory.path(), tensors, &options)
            .unwrap_err()
            .to_string()
    };
    assert!(message(vec![("a", &good), ("b", &bad)]).contains("as F32 it has 1 NaN or infinite"));
    assert!(message(vec![("a", &good), ("a", &good)]).contains("its name comes twice"));
    assert!(message(vec![("__metadata__", &good)]).contains("the header's own name"));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    write_checkpoint(directory.path(), [("a", &good)], &options).unwrap();
    assert!(message(vec![("a", &good)]).contains("exists and is not empty"));
}
