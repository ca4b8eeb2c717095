//! What is made once and kept.

use lapidary_factor::Matrix;

/// Beyond what is multiplied without room for panels.
const SIZE: usize = 64;

/// Multiplies two matrices in double precision on every thread. The first product of a thread sets room aside
/// for good, twice as much as the outermost cache holds, most of which is never touched; after this, what a method
/// is seen to hold is its own.
pub fn warm_up() {
    let multiply = || {
        let square = Matrix::zeros(SIZE, SIZE);
        let _product = square.as_ref() * square.as_ref();
    };
    multiply();
    rayon::broadcast(|_| multiply());
}
