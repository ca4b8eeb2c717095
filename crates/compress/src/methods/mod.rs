//! The methods that are more than a factorisation of single layers, one file each; and the list.

mod block_influence;
mod channel_magnitude;
mod channels;
mod lorap;
mod modegpt;

pub use lorap::LorapSettings;
pub use modegpt::ModegptSettings;

use crate::factorisation::{
    ACTIVATION_WEIGHTED, FWSVD, GENERALISED_FISHER, ROW_COLUMN_FISHER, SVD, WHITENED,
};
use crate::method::Method;

/// Every method, by name.
pub(crate) const METHODS: &[&Method] = &[
    &ACTIVATION_WEIGHTED,
    &block_influence::BLOCK_INFLUENCE,
    &channel_magnitude::CHANNEL_MAGNITUDE,
    &FWSVD,
    &GENERALISED_FISHER,
    &lorap::LORAP,
    &modegpt::MODEGPT,
    &ROW_COLUMN_FISHER,
    &SVD,
    &WHITENED,
];
