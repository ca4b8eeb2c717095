#![no_main]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, InputSpec, Model, ModelSpec, Pass};
use libfuzzer_sys::fuzz_target;

/// Larger models are checked but not built.
const PARAMETERS: u64 = 1 << 14;

fn check(spec: ModelSpec) {
    if spec.validate().is_err() {
        return;
    }
    let json = serde_json::to_string(&spec).expect("what was accepted can be written");
    let again: ModelSpec = serde_json::from_str(&json).expect("and is read again");
    assert_eq!(again, spec);
    let parameters = spec.parameter_count().expect("a valid spec has a size");
    let InputSpec::Tokens(tokens) = &spec.input else {
        return;
    };
    if parameters > PARAMETERS {
        return;
    }
    let ids = Tensor::zeros((1, tokens.length.min(3)), DType::U32, &Device::Cpu);
    if let (Ok(ids), Ok(model)) = (ids, Model::initialised(spec, 0, DType::F32, &Device::Cpu)) {
        let _ = model.forward(&Input::tokens(ids), Pass::default());
    }
}

fuzz_target!(|text: &str| {
    if let Ok(spec) = toml::from_str(text) {
        check(spec);
    }
    if let Ok(spec) = serde_json::from_str(text) {
        check(spec);
    }
});
