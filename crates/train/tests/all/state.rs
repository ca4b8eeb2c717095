//! A training state comes back bit for bit, or is refused.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_train::state::{Limits, TrainingState, latest, load, save};
use lapidary_train::{GeneratorState, generator};
use rand::RngExt;

fn tensors(seed: u64) -> BTreeMap<String, Tensor> {
    let rng = &mut generator(seed);
    let mut values: Vec<f64> = (0..24).map(|_| rng.random_range(-1e3..1e3)).collect();
    values[3] = -0.0;
    values[4] = f64::MIN_POSITIVE / 8.0;
    let base = Tensor::from_vec(values, (2, 3, 4), &Device::Cpu).unwrap();
    let strided = base.transpose(0, 2).unwrap();
    let floats = [DType::F64, DType::F32, DType::BF16, DType::F16];
    let mut tensors: BTreeMap<String, Tensor> = floats
        .iter()
        .map(|&dtype| {
            (
                format!("moment.{dtype:?}"),
                strided.to_dtype(dtype).unwrap(),
            )
        })
        .collect();
    tensors.insert(
        "special".into(),
        Tensor::new(&[f32::NAN, f32::INFINITY, -0.0, 1e-45], &Device::Cpu).unwrap(),
    );
    tensors.insert(
        "counts".into(),
        Tensor::new(&[0u32, u32::MAX], &Device::Cpu).unwrap(),
    );
    tensors.insert("scalar".into(), Tensor::new(7i64, &Device::Cpu).unwrap());
    tensors.insert(
        "empty".into(),
        Tensor::zeros((0, 3), DType::U8, &Device::Cpu).unwrap(),
    );
    tensors
}

fn state(step: u64) -> TrainingState {
    let mut data = generator(step);
    data.set_stream(5);
    let _: f32 = data.random();
    TrainingState {
        step,
        generators: [("data".to_string(), GeneratorState::of(&data))].into(),
        positions: [("windows".to_string(), u64::MAX), ("ema".to_string(), 3)].into(),
        settings: serde_json::json!({ "rate": 0.1 + 0.2, "name": "ünïcode" }),
        tensors: tensors(step),
    }
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F64 => flat
            .to_vec1::<f64>()
            .unwrap()
            .iter()
            .map(|v| v.to_bits())
            .collect(),
        DType::F32 | DType::BF16 | DType::F16 => {
            let wide = flat.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            wide.iter().map(|v| v.to_bits().into()).collect()
        }
        DType::I64 => flat
            .to_vec1::<i64>()
            .unwrap()
            .iter()
            .map(|&v| v as u64)
            .collect(),
        _ => {
            let wide = flat.to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
            wide.into_iter().map(u64::from).collect()
        }
    }
}

fn assert_same(a: &TrainingState, b: &TrainingState) {
    assert_eq!(a.step, b.step);
    assert_eq!(a.generators, b.generators);
    assert_eq!(a.positions, b.positions);
    assert_eq!(a.settings, b.settings);
    assert!(a.tensors.keys().eq(b.tensors.keys()));
    for (name, tensor) in &a.tensors {
        let other = &b.tensors[name];
        assert_eq!(
            (tensor.dtype(), tensor.dims()),
            (other.dtype(), other.dims())
        );
        assert_eq!(bits(tensor), bits(other), "{name}");
    }
}

fn read(directory: &Path) -> lapidary_train::Result<TrainingState> {
    load(directory, &Device::Cpu, &Limits::default())
}

#[test]
fn a_state_comes_back_bit_for_bit() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path(), &state(120), 2).unwrap();
    assert_same(&state(120), &read(&path).unwrap());
}

#[test]
fn the_newest_states_are_kept_and_the_latest_is_found() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(latest(&root.path().join("nowhere")).unwrap(), None);
    assert_eq!(latest(root.path()).unwrap(), None);
    for step in [5, 10, 1_000, 90] {
        save(root.path(), &state(step), 3).unwrap();
    }
    let found = latest(root.path()).unwrap().unwrap();
    assert_eq!(read(&found).unwrap().step, 1_000);
    let mut names: Vec<String> = std::fs::read_dir(root.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["step-0000000010", "step-0000000090", "step-0000001000"]
    );
}

#[test]
fn a_step_saved_again_replaces_the_old_one() {
    let root = tempfile::tempdir().unwrap();
    save(root.path(), &state(7), 2).unwrap();
    let mut changed = state(7);
    changed.positions.insert("windows".into(), 12);
    let path = save(root.path(), &changed, 2).unwrap();
    assert_same(&changed, &read(&path).unwrap());
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn what_a_killed_writer_left_is_passed_over_and_cleaned_up() {
    let root = tempfile::tempdir().unwrap();
    save(root.path(), &state(7), 2).unwrap();
    let partial = root.path().join(".writing-step-0000000008-abc123");
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("tensors.safetensors"), b"half a fi").unwrap();
    let found = latest(root.path()).unwrap().unwrap();
    assert_same(&state(7), &read(&found).unwrap());
    save(root.path(), &state(8), 2).unwrap();
    assert!(!partial.exists());
}

#[test]
fn a_writer_killed_between_its_two_renames_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path(), &state(7), 1).unwrap();
    let replaced = root.path().join(".replaced-step-0000000007");
    std::fs::rename(&path, &replaced).unwrap();
    let found = latest(root.path()).unwrap().unwrap();
    assert_same(&state(7), &read(&found).unwrap());
    let newer = save(root.path(), &state(8), 1).unwrap();
    assert_eq!(latest(root.path()).unwrap().unwrap(), newer);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn damage_anywhere_in_the_tensors_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path(), &state(1), 1).unwrap();
    let file = path.join("tensors.safetensors");
    let good = std::fs::read(&file).unwrap();
    for position in (0..good.len()).step_by(37) {
        let mut bad = good.clone();
        bad[position] ^= 0x10;
        std::fs::write(&file, bad).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("damaged"));
    }
    for length in [0, 7, 8, good.len() / 2, good.len() - 1] {
        std::fs::write(&file, &good[..length]).unwrap();
        assert!(read(&path).is_err());
    }
    std::fs::remove_file(&file).unwrap();
    assert!(read(&path).is_err());
}

#[test]
fn a_lying_header_with_a_right_checksum_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path(), &state(1), 1).unwrap();
    let json = std::fs::read_to_string(path.join("state.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let headers = [
        r#"{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#,
    ];
    for header in headers {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[0; 4]);
        value["tensor_bytes"] = bytes.len().into();
        value["tensor_crc32c"] = crc32c::crc32c(&bytes).into();
        std::fs::write(path.join("tensors.safetensors"), &bytes).unwrap();
        std::fs::write(path.join("state.json"), value.to_string()).unwrap();
        assert!(read(&path).is_err(), "{header}");
    }
}

#[test]
fn limits_and_foreign_formats_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path(), &state(1), 1).unwrap();
    for limits in [
        Limits {
            json_bytes: 20,
            ..Limits::default()
        },
        Limits {
            tensor_bytes: 20,
            ..Limits::default()
        },
    ] {
        let error = load(&path, &Device::Cpu, &limits).unwrap_err().to_string();
        assert!(error.contains("more than the 20"), "{error}");
    }
    let json = path.join("state.json");
    let text = std::fs::read_to_string(&json).unwrap();
    std::fs::write(&json, text.replace("training state 1", "training state 9")).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("format"));
    std::fs::write(&json, "{").unwrap();
    assert!(read(&path).is_err());
}
