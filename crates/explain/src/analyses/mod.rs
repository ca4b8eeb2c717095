//! What looks at a model as a whole, or at many inputs, one file or folder for each.
//!
//! An analysis has a function that gives its own numbers, for the library, and a function that
//! makes a [`Report`](crate::report::Report) of them, for people.

pub mod attention;
pub mod autoencoder;
pub mod channels;
pub mod circuit;
pub mod clustering;
pub mod components;
pub mod energy;
pub mod geometry;
pub mod linearity;
pub mod power_law;
pub mod prefix_induction;
pub(crate) mod random;
pub mod squashing;
