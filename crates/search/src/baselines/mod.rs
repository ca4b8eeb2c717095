//! What random decompositions are compared with.

pub(crate) mod global;
pub(crate) mod random;
pub(crate) mod rembo;
pub(crate) mod tree;
