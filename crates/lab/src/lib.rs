//! Systems from papers, each with its reproduction, and the catalogue of parts.
//!
//! A [`System`] registers what it is and an experiment. [`System::reproduce`] runs the
//! experiment at a [`Scale`] and gives a [`Reproduction`]: each published claim beside what is
//! measured here and whether it holds. A claim that does not hold is shown as such.
//! [`System::reproduce_with_seeds`] does so with several seeds, and [`Reproduction::joined`] makes one of
//! what they found.

pub mod catalogue;
mod error;
pub mod experiments;
mod joining;
pub mod mechanisms;
mod numbers;
mod progress;
mod registry;
mod reproduction;

pub use error::{Error, Result};
pub use lapidary_explain::report::{Plot, Series};
pub use progress::Progress;
pub use registry::{Kind, System, find, systems};
pub use reproduction::{Claim, Finding, Reproduction, Scale, Setting, Tally, Verdict};
