//! The three decompositions beside NumPy's, from `tests/oracles/modegpt.py`.

use lapidary_factor::Matrix;
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::position::{PositionSpec, RotarySpec};
use serde::Deserialize;

use super::{feedforward, query_key, value_output};

type Rows = Vec<Vec<f64>>;

#[derive(Deserialize)]
struct Fixture {
    hidden_moment: Rows,
    down: Rows,
    ridge: f64,
    kept: Vec<usize>,
    refit: Rows,
    query_squares: Vec<f64>,
    key_squares: Vec<f64>,
    pairs: Vec<Vec<usize>>,
    input_moment: Rows,
    value: Rows,
    outputs: Vec<Rows>,
    products: Vec<Rows>,
    discarded: f64,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../../../tests/fixtures/modegpt.json")).unwrap()
}

fn matrix(rows: &Rows) -> Matrix {
    Matrix::from_fn(rows.len(), rows[0].len(), |i, j| rows[i][j])
}

fn close(found: &Matrix, expected: &Rows) {
    let difference = (found - matrix(expected)).norm_max();
    assert!(
        difference < 1e-9 * matrix(expected).norm_max(),
        "{difference}"
    );
}

#[test]
fn hidden_features_and_their_refit() {
    let fixture = fixture();
    let moment = matrix(&fixture.hidden_moment);
    let kept = feedforward::by_leverage(moment.clone(), fixture.ridge, fixture.kept.len()).unwrap();
    assert_eq!(kept, fixture.kept);
    let found = feedforward::refitted(&matrix(&fixture.down), moment, &kept).unwrap();
    close(&found, &fixture.refit);
}

#[test]
fn rotary_pairs_of_each_group() {
    let fixture = fixture();
    let spec = MultiHeadSpec {
        groups: Some(2),
        position: PositionSpec::Rotary(RotarySpec::default()),
        ..MultiHeadSpec::new(4)
    };
    let (queries, keys) = (&fixture.query_squares, &fixture.key_squares);
    let kept = query_key::choose(&spec, 6, 4, queries, keys).unwrap();
    let PositionSpec::Rotary(rotary) = kept.position else {
        unreachable!()
    };
    assert_eq!(rotary.kept.unwrap().groups, fixture.pairs);
    for (features, pairs) in kept.features.iter().zip(&fixture.pairs) {
        assert_eq!(*features, [pairs[0], pairs[1], pairs[0] + 3, pairs[1] + 3]);
    }
}

#[test]
fn values_and_outputs_of_a_group() {
    let fixture = fixture();
    let root = value_output::root(&matrix(&fixture.input_moment)).unwrap();
    let outputs: Vec<Matrix> = fixture.outputs.iter().map(matrix).collect();
    let found = value_output::narrow(&root, &matrix(&fixture.value), &outputs, 2).unwrap();
    for (output, product) in found.outputs.iter().zip(&fixture.products) {
        close(&(output * &found.value), product);
    }
    assert!((found.discarded - fixture.discarded).abs() < 1e-10 * fixture.discarded);
}
