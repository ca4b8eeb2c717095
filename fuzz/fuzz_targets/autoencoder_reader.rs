#![no_main]

use lapidary_explain::autoencoder::from_bytes;
use lapidary_kernels::{DType, Device, Tensor};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(autoencoder) = from_bytes("fuzzed", bytes.to_vec(), "blocks.0.attention.mixed") else {
        return;
    };
    let x = Tensor::ones((2, autoencoder.width()), DType::F32, &Device::Cpu)
        .expect("a width that was accepted");
    let features = autoencoder.encode(&x).expect("what was accepted encodes");
    assert_eq!(features.dims(), [2, autoencoder.features()]);
});
