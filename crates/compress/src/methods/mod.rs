//! The methods that are more than a factorisation of single layers, one file each; and the list.

mod block_influence;
pub mod curvature;
pub mod slicing;

use crate::factorisation::{
    ACTIVATION_WEIGHTED, FWSVD, GENERALISED_FISHER, ROW_COLUMN_FISHER, SVD, WHITENED,
};
use crate::method::Method;

/// Every method, by name.
pub(crate) const METHODS: &[&Method] = &[
    &ACTIVATION_WEIGHTED,
    &block_influence::BLOCK_INFLUENCE,
    &curvature::CURVATURE,
    &curvature::CURVATURE_RECTANGLE,
    &slicing::COORDINATE_MAGNITUDE,
    &slicing::DOTRESIZE,
    &slicing::DOTRESIZE_SHARED,
    &FWSVD,
    &GENERALISED_FISHER,
    &ROW_COLUMN_FISHER,
    &slicing::SLICEGPT,
    &slicing::SLICEGPT_SHARED,
    &SVD,
    &WHITENED,
];
