//! Mechanisms and biases of positions beside NumPy's, from `tests/oracles/mechanisms.py`.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use crate::common::{Map, assert_near, build, tensor};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::Context;
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec};
use lapidary_signal::{Signal, Trace};
use serde::Deserialize;

#[derive(Deserialize)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Array {
    fn tensor(&self) -> Tensor {
        tensor(self.values.clone(), &self.shape)
    }
}

#[derive(Deserialize)]
struct Case {
    spec: MultiHeadSpec,
    /// Those that only this one has.
    parameters: BTreeMap<String, Array>,
    keep: Vec<Vec<u8>>,
    /// What heads give before the output.
    mixed: Array,
}

#[derive(Deserialize)]
struct Golden {
    parameters: BTreeMap<String, Array>,
    x: Array,
    cases: Vec<Case>,
}

#[test]
fn what_heads_mix_is_what_numpy_finds_pair_by_pair() {
    let golden: Golden = serde_json::from_str(include_str!("../fixtures/mechanisms.json")).unwrap();
    let x = golden.x.tensor();
    let (batch, length, width) = x.dims3().unwrap();
    assert!(!golden.cases.is_empty());
    for case in &golden.cases {
        let all = golden.parameters.iter().chain(&case.parameters);
        let map: Map = all
            .map(|(name, array)| (name.clone(), array.tensor()))
            .collect();
        let what = serde_json::to_string(&case.spec).unwrap();
        let attention = build(&map, |p| MultiHeadAttention::new(&case.spec, width, p)).unwrap();
        let keep = Tensor::from_vec(case.keep.concat(), (batch, length), &Device::Cpu).unwrap();
        let trace = Trace::new().capture("*.mixed").unwrap();
        let cx = Context {
            key_padding: Some(&keep),
            ..Context::new(&trace)
        };
        attention
            .forward(&Signal::from(x.clone()), &cx, None)
            .unwrap();
        // What stands at pads means nothing.
        let real = keep.to_dtype(x.dtype()).unwrap().unsqueeze(2).unwrap();
        let mixed = trace.signal(".mixed").unwrap().into_value();
        let mixed = mixed.broadcast_mul(&real).unwrap();
        assert_near(&mixed, &case.mixed.tensor(), 1e-9, &what);
    }
}
