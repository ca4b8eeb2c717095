//! The methods, one file each. A file holds the method's entry in the list of
//! [`explainers`](crate::explainers), a function for the library, and the mathematics.

pub(crate) mod alti;
pub(crate) mod alti_logit;
pub(crate) mod attention_gradcam;
mod attention_maps;
pub(crate) mod attention_rollout;
pub(crate) mod chefer;
pub(crate) mod contextual;
pub(crate) mod decompx;
pub(crate) mod erasure;
pub(crate) mod full_lrp;
pub(crate) mod gradient;
pub(crate) mod gradient_norm;
pub(crate) mod logit_attribution;
pub(crate) mod partial_lrp;
pub(crate) mod random;
pub(crate) mod raw_attention;
