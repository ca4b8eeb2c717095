#![no_main]

use lapidary_kernels::DType;
use lapidary_model::{Checkpoint, Limits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(checkpoint) = Checkpoint::from_bytes("fuzzed", bytes.to_vec(), &Limits::default())
    else {
        return;
    };
    for name in checkpoint.names() {
        let info = checkpoint
            .info(name)
            .expect("a listed tensor has a description");
        let elements = info.elements();
        for dtype in [DType::F32, DType::I64] {
            if let Ok(tensor) = checkpoint.tensor(name, dtype) {
                assert_eq!(tensor.elem_count(), elements);
            }
        }
    }
});
