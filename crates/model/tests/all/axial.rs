//! Positions in a grid: a table for each of its dimensions.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_signal::Trace;

const WIDTH: usize = 6;

fn model(position: &str) -> Model {
    let spec = format!(
        "width = {WIDTH}
        [input]
        kind = 'tokens'
        vocabulary = 3
        length = 24
        position = {{ kind = 'axial', {position} }}
        [[blocks]]
        attention = {{ kind = 'multi-head', heads = 2, causal = true }}
        [head]
        kind = 'language-model'"
    );
    let spec: ModelSpec = toml::from_str(&spec).unwrap();
    Model::initialised(spec, 7, DType::F32, &Device::Cpu).unwrap()
}

/// What is added to the embedding of each of `length` tokens.
fn added(model: &Model, length: usize) -> Vec<Vec<f32>> {
    let ids = Tensor::zeros((1, length), DType::U32, &Device::Cpu).unwrap();
    let trace = Trace::new().capture("embeddings").unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    let seen = trace.signal("embeddings").unwrap().value().get(0).unwrap();
    let token = model.parameters()["embeddings.tokens.weight"]
        .get(0)
        .unwrap();
    seen.broadcast_sub(&token).unwrap().to_vec2().unwrap()
}

fn table(model: &Model, name: &str) -> Vec<Vec<f32>> {
    let name = format!("embeddings.positions.{name}");
    model.parameters()[&name].to_vec2().unwrap()
}

fn near(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
}

#[test]
fn summed_tables_tell_row_column_and_channel() {
    let model = model("columns = 4, channels = 3");
    let [rows, columns, channels] = ["rows", "columns", "channels"].map(|name| table(&model, name));
    assert_eq!([rows.len(), columns.len(), channels.len()], [2, 4, 3]);
    for (t, found) in added(&model, 24).iter().enumerate() {
        let (row, column, channel) = (t / 12, t / 3 % 4, t % 3);
        let expected: Vec<f32> = (0..WIDTH)
            .map(|i| rows[row][i] + columns[column][i] + channels[channel][i])
            .collect();
        assert!(near(found, &expected), "token {t}");
    }
}

#[test]
fn tables_side_by_side_tell_row_and_column() {
    // The last row is begun, not full.
    let model = model("columns = 5, row_width = 2");
    let [rows, columns] = ["rows", "columns"].map(|name| table(&model, name));
    assert_eq!([rows.len(), columns.len()], [5, 5]);
    assert_eq!([rows[0].len(), columns[0].len()], [2, 4]);
    for (t, found) in added(&model, 24).iter().enumerate() {
        let expected = [rows[t / 5].as_slice(), columns[t % 5].as_slice()].concat();
        assert!(near(found, &expected), "token {t}");
    }
}

#[test]
fn a_step_of_decoding_stands_where_it_stands() {
    let model = model("columns = 5, row_width = 2");
    let ids: Vec<u32> = (0..9).map(|t| t % 3).collect();
    let logits = |ids: &[u32], state: Option<&mut lapidary_parts::state::DecodeState>| {
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let pass = Pass {
            state,
            only_last: true,
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids), pass).unwrap();
        let logits = output.into_logits().unwrap().into_value();
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let mut state = model.decode_state();
    let mut last = Vec::new();
    for id in &ids {
        last = logits(&[*id], Some(&mut state));
    }
    let whole = logits(&ids, None);
    assert!(last.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn grids_that_cannot_be_are_refused() {
    for (position, field) in [
        ("columns = 0", "input.position.columns"),
        ("columns = 25", "input.position.columns"),
        ("columns = 4, channels = 0", "input.position.channels"),
        ("columns = 4, row_width = 6", "input.position.row_width"),
        (
            "columns = 4, channels = 2, row_width = 3",
            "input.position.row_width",
        ),
    ] {
        let spec = format!(
            "width = {WIDTH}
            blocks = []
            [input]
            kind = 'tokens'
            vocabulary = 3
            length = 24
            position = {{ kind = 'axial', {position} }}"
        );
        let spec: ModelSpec = toml::from_str(&spec).unwrap();
        let error = spec.validate().unwrap_err().to_string();
        assert!(error.contains(field), "{position}: {error}");
    }
}
