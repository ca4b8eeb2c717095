//! Whether an explanation says what the model does: measures of scores against the model itself
//! or against a known truth.

pub mod image;
