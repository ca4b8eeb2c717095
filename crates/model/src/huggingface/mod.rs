//! What Lapidary knows of Hugging Face model directories.

pub mod config;
pub mod families;
mod reshaped;

pub use config::{Config, ConfigError, Family};
pub(crate) use reshaped::reshaped;
