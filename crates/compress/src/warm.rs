//! What is made once and kept.

use lapidary_factor::Matrix;
use lapidary_kernels::{DType, Device, Tensor};

/// Beyond what is multiplied without room for panels.
const SIZE: usize = 64;

/// Multiplies two matrices in double precision on every thread, and two tensors. The first product of a thread sets
/// room aside for good, twice as much as the outermost cache holds, most of which is never touched, and that of the
/// tensor engine as much as a second-level cache; after this, what a method is seen to hold is its own.
pub fn warm_up() {
    let multiply = || {
        let square = Matrix::zeros(SIZE, SIZE);
        let _product = square.as_ref() * square.as_ref();
        // Where it cannot be made, nothing is warm, and all else is as it was.
        if let Ok(square) = Tensor::zeros((SIZE, SIZE), DType::F64, &Device::Cpu) {
            let _product = square.matmul(&square);
        }
    };
    multiply();
    rayon::broadcast(|_| multiply());
}
