//! The methods, one file each. A file holds the method's entry in the list of
//! [`explainers`](crate::explainers), a function for the library, and the mathematics.

pub(crate) mod alti;
pub(crate) mod alti_logit;
pub(crate) mod decompx;
pub(crate) mod erasure;
pub(crate) mod gradient;
pub(crate) mod gradient_norm;
pub(crate) mod logit_attribution;
pub(crate) mod random;
