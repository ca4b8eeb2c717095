//! The methods, one file each. A file holds the method's entry in the list of
//! [`explainers`](crate::explainers), a function for the library, and the mathematics.

pub(crate) mod contextual;
pub(crate) mod decompx;
pub(crate) mod gradient;
pub(crate) mod logit_attribution;
