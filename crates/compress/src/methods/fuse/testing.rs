//! What `tests/oracles/depth.py` found with NumPy.

use lapidary_kernels::{Device, Tensor};
use serde_json::Value;

/// The document, or an object in it.
pub(super) struct Golden(Value);

pub(super) fn golden() -> Golden {
    let text = include_str!("../../../../../tests/fixtures/depth.json");
    Golden(serde_json::from_str(text).unwrap())
}

impl Golden {
    pub(super) fn inside(&self, name: &str) -> Self {
        Self(self.0[name].clone())
    }

    pub(super) fn number(&self, name: &str) -> f64 {
        self.0[name].as_f64().unwrap()
    }

    pub(super) fn matrix(&self, name: &str) -> Tensor {
        let rows: Vec<Vec<f64>> = serde_json::from_value(self.0[name].clone()).unwrap();
        let shape = (rows.len(), rows[0].len());
        Tensor::from_vec(rows.concat(), shape, &Device::Cpu).unwrap()
    }
}
