//! What Lapidary knows of Hugging Face model directories.

pub mod config;
pub mod families;
mod shorter;

pub use config::{Config, ConfigError, Family};
pub(crate) use shorter::shortened;
