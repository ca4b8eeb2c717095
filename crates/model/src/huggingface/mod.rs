//! What Lapidary knows of Hugging Face model directories.

pub mod config;
pub mod families;

pub use config::{Config, ConfigError, Family};
