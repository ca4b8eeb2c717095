//! What Lapidary knows of Hugging Face model directories.

pub mod config;

pub use config::{Config, ConfigError, Family};
