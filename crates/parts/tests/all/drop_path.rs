//! Stochastic depth: what a part adds is left out for whole sequences. And dropout of features: entries are left out
//! in all tokens of a sequence alike.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, random,
};
use lapidary_kernels::Tensor;
use lapidary_parts::Context;
use lapidary_parts::block::{Block, BlockSpec};
use lapidary_signal::{Signal, Trace};

const WIDTH: usize = 4;
const ROWS: usize = 12;

fn spec(fields: &str) -> BlockSpec {
    let text = format!("{fields}\nattention = {{ kind = 'multi-head', heads = 2 }}");
    toml::from_str(&text).unwrap()
}

fn drawn(spec: &BlockSpec) -> Map {
    draw(3, |p| Block::new(spec, WIDTH, p))
}

fn run(spec: &BlockSpec, map: &Map, x: &Tensor, dropout_seed: Option<u64>) -> Tensor {
    let block = build(map, |p| Block::new(spec, WIDTH, p)).unwrap();
    let trace = Trace::new();
    let cx = Context {
        dropout_seed,
        ..Context::new(&trace)
    };
    let y = block.forward(Signal::from(x.clone()), &cx, None).unwrap();
    y.into_value()
}

#[test]
fn each_sequence_has_all_of_a_part_or_nothing() {
    const DROPPED: f64 = 0.3;
    const SEEDS: u64 = 200;
    let block = spec(&format!("drop_path = {DROPPED}"));
    let map = drawn(&block);
    let x = random(&[ROWS, 3, WIDTH], 1);
    // Nothing is dropped in evaluation.
    let added = (run(&block, &map, &x, None) - &x).unwrap();
    assert_near(
        &run(&spec(""), &map, &x, None),
        &run(&block, &map, &x, None),
        0.0,
        "evaluation",
    );
    let whole = (added / (1.0 - DROPPED)).unwrap();
    let mut left_out = 0;
    let mut alike = 0;
    for seed in 0..SEEDS {
        let found = (run(&block, &map, &x, Some(seed)) - &x).unwrap();
        let mut of_this = 0;
        for row in 0..ROWS {
            let row = |all: &Tensor| all.narrow(0, row, 1).unwrap();
            match difference(&row(&found), &row(&whole)) < 1e-6 {
                true => {}
                false => {
                    assert_near(
                        &row(&found),
                        &row(&x.zeros_like().unwrap()),
                        0.0,
                        "left out",
                    );
                    of_this += 1;
                }
            }
        }
        left_out += of_this;
        alike += u64::from(of_this == 0 || of_this == ROWS);
    }
    // Three deviations of a binomial count; sequences are independent of each other.
    let count = (SEEDS * ROWS as u64) as f64;
    let off = left_out as f64 - DROPPED * count;
    assert!(
        off.abs() < 3.0 * (count * DROPPED * (1.0 - DROPPED)).sqrt(),
        "{left_out}"
    );
    assert!(alike < SEEDS / 10, "{alike}");
}

#[test]
fn gradients_with_paths_dropped_equal_central_differences() {
    let block =
        spec("drop_path = 0.5\nfeedforward = { kind = 'dense', hidden = 6, activation = 'gelu' }");
    let mut map = drawn(&block);
    map.insert("x".to_owned(), random(&[ROWS, 3, WIDTH], 1));
    let error = gradient_error(&map, 3, |map| {
        contracted(&run(&block, map, &map["x"], Some(5)))
    });
    assert!(error < 1e-6, "{error}");
}

#[test]
fn probabilities_that_mean_nothing_are_refused() {
    for (fields, expected) in [
        ("drop_path = 1.0", "block.drop_path is 1"),
        ("drop_path = -0.1", "block.drop_path is -0.1"),
        (
            "drop_path = 0.1\nwiring = 'replacing'",
            "block.drop_path is 0.1",
        ),
    ] {
        let said = spec(fields).validate(WIDTH, "block").unwrap_err();
        assert!(said.to_string().starts_with(expected), "{said}");
    }
    let plain = spec("");
    assert!(!toml::to_string(&plain).unwrap().contains("drop_path"));
}

#[test]
fn features_are_dropped_in_all_tokens_of_a_sequence_alike() {
    const DROPPED: f64 = 0.3;
    const SEEDS: u64 = 100;
    const LENGTH: usize = 5;
    let block = spec(&format!("dropout = {DROPPED}\ndropout_by_feature = true"));
    let map = drawn(&block);
    let x = random(&[ROWS, LENGTH, WIDTH], 1);
    let added = |dropout_seed: Option<u64>| -> Vec<Vec<Vec<f64>>> {
        let added = (run(&block, &map, &x, dropout_seed) - &x).unwrap();
        added.to_vec3().unwrap()
    };
    let whole = added(None);
    let (mut left_out, mut alike) = (0, 0);
    for seed in 0..SEEDS {
        let found = added(Some(seed));
        let mut masks = Vec::new();
        for (found, whole) in found.iter().zip(&whole) {
            let zeros: Vec<bool> = found[0].iter().map(|entry| entry.abs() < 1e-12).collect();
            for (found, whole) in found.iter().zip(whole) {
                for ((found, whole), zero) in found.iter().zip(whole).zip(&zeros) {
                    let expected = match *zero {
                        true => 0.0,
                        false => whole / (1.0 - DROPPED),
                    };
                    assert!((found - expected).abs() < 1e-9, "{found} {expected}");
                }
            }
            left_out += zeros.iter().filter(|zero| **zero).count();
            masks.push(zeros);
        }
        alike += u64::from(masks.iter().all(|mask| *mask == masks[0]));
    }
    // Five deviations of a binomial count; sequences are independent of each other.
    let count = (SEEDS as usize * ROWS * WIDTH) as f64;
    let off = left_out as f64 - DROPPED * count;
    let most = 5.0 * (count * DROPPED * (1.0 - DROPPED)).sqrt();
    assert!(off.abs() < most, "{left_out} of {count}");
    assert!(alike < SEEDS / 10, "{alike}");
}

#[test]
fn gradients_with_features_dropped_equal_central_differences() {
    let block = spec(
        "dropout = 0.5\ndropout_by_feature = true\nfeedforward = { kind = 'dense', hidden = 6, \
         activation = 'gelu' }",
    );
    let mut map = drawn(&block);
    map.insert("x".to_owned(), random(&[ROWS, 3, WIDTH], 1));
    let error = gradient_error(&map, 3, |map| {
        contracted(&run(&block, map, &map["x"], Some(5)))
    });
    assert!(error < 1e-6, "{error}");
}
