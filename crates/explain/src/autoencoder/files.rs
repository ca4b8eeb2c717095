//! An autoencoder in a directory: `model.safetensors` and `autoencoder.json`.
//!
//! Names and shapes of the tensors are those of the public autoencoders of the authors' format,
//! converted to safetensors: `W_enc` `[width, features]`, `b_enc`, `W_dec` `[features, width]`,
//! `b_dec`. Their config, whose `act_name` names the site in another vocabulary, is read as well.

use super::Autoencoder;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::checkpoint::{Checkpoint, WriteOptions, write_checkpoint};
use lapidary_model::files::{FileError, StagedDirectory, read_text, write_beside};
use lapidary_model::{Error as ModelError, Limits};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::path::Path;

/// The file that says which site the autoencoder reads.
pub const CONFIG_FILE: &str = "autoencoder.json";

/// Bytes of a config that are read.
const CONFIG_BYTES: u64 = 1 << 20;

/// What of a config is used; the authors' files have much else.
#[derive(Default, Deserialize)]
struct Config {
    site: Option<String>,
    /// The site as TransformerLens calls it.
    act_name: Option<String>,
}

#[derive(Serialize)]
struct OwnConfig<'a> {
    site: &'a str,
    width: usize,
    features: usize,
}

/// Writes a directory that [`load`] reads, whole or not at all.
///
/// # Errors
/// When the directory exists and is not empty, or cannot be written.
pub fn save(autoencoder: &Autoencoder, directory: &Path) -> Result<()> {
    let weights = autoencoder.weights();
    let encoder = engine(engine(weights.encoder.t())?.contiguous())?;
    let staged = StagedDirectory::new(directory).map_err(ModelError::from)?;
    let tensors = [
        ("W_enc", &encoder),
        ("b_enc", weights.encoder_bias),
        ("W_dec", weights.decoder),
        ("b_dec", weights.decoder_bias),
    ];
    write_checkpoint(staged.path(), tensors, &WriteOptions::default()).map_err(ModelError::from)?;
    let config = OwnConfig {
        site: autoencoder.site(),
        width: autoencoder.width(),
        features: autoencoder.features(),
    };
    let text = serde_json::to_string_pretty(&config)
        .map_err(|error| Error::invalid("config", error, "one that can be written"))?;
    let path = staged.path().join(CONFIG_FILE);
    write_beside::<FileError>(&path, |file| {
        file.write_all(text.as_bytes())
            .map_err(FileError::io("write", &path))
    })
    .map_err(ModelError::from)?;
    Ok(staged.commit().map_err(ModelError::from)?)
}

/// Reads an autoencoder from a directory that [`save`] wrote, or from one safetensors file in the
/// authors' format, with its `.json` beside it under the same name or `_cfg.json`. `site` says
/// what it reads when no config does, and goes before what a config says.
///
/// # Errors
/// When a file is not what it claims to be, shapes do not fit, or no site is known.
pub fn load(path: &Path, site: Option<&str>) -> Result<Autoencoder> {
    let limits = Limits::default();
    let (checkpoint, configs) = if path.is_dir() {
        let configs = vec![path.join(CONFIG_FILE), path.join("cfg.json")];
        (Checkpoint::open(path, &limits), configs)
    } else {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let configs = vec![
            path.with_file_name(format!("{stem}.json")),
            path.with_file_name(format!("{stem}_cfg.json")),
        ];
        (Checkpoint::open_file(path, &limits), configs)
    };
    let checkpoint = checkpoint.map_err(ModelError::from)?;
    let site = match site {
        Some(site) => site.to_owned(),
        None => site_of(&configs)?,
    };
    from_checkpoint(&checkpoint, site)
}

/// Reads an autoencoder of `site` from the bytes of a safetensors file; `name` stands for its path
/// in errors.
///
/// # Errors
/// As [`load`].
pub fn from_bytes(
    name: &str,
    bytes: impl Into<Cow<'static, [u8]>>,
    site: &str,
) -> Result<Autoencoder> {
    let checkpoint = Checkpoint::from_bytes(name, bytes, &Limits::default());
    from_checkpoint(&checkpoint.map_err(ModelError::from)?, site.to_owned())
}

/// An autoencoder from an open checkpoint. Shapes are checked before values are read.
fn from_checkpoint(checkpoint: &Checkpoint, site: String) -> Result<Autoencoder> {
    let info = checkpoint.info("W_enc").map_err(ModelError::from)?;
    let [width, features] = info.shape.as_slice() else {
        let found = format!("{:?}", info.shape);
        return Err(Error::invalid("shape of W_enc", found, "[width, features]"));
    };
    let (width, features) = (*width, *features);
    super::check_size(features, width)?;
    let shapes: [(&str, &[usize]); 4] = [
        ("W_enc", &[width, features]),
        ("b_enc", &[features]),
        ("W_dec", &[features, width]),
        ("b_dec", &[width]),
    ];
    for (name, shape) in shapes {
        let found = &checkpoint.info(name).map_err(ModelError::from)?.shape;
        if found != shape {
            let what = format!("shape of {name}");
            return Err(Error::invalid(
                what,
                format!("{found:?}"),
                format!("{shape:?}"),
            ));
        }
    }
    let read = |name: &str| -> Result<Tensor> {
        Ok(checkpoint
            .tensor(name, DType::F32)
            .map_err(ModelError::from)?)
    };
    let encoder = engine(engine(read("W_enc")?.t())?.contiguous())?;
    Autoencoder::new(
        site,
        encoder,
        read("b_enc")?,
        read("W_dec")?,
        read("b_dec")?,
    )
}

fn site_of(configs: &[std::path::PathBuf]) -> Result<String> {
    let Some(path) = configs.iter().find(|path| path.is_file()) else {
        return Err(Error::invalid(
            "site of the autoencoder",
            "unknown",
            format!("in a {CONFIG_FILE} beside the weights, or given"),
        ));
    };
    let text = read_text(path, CONFIG_BYTES).map_err(ModelError::from)?;
    let config: Config = serde_json::from_str(&text).map_err(|error| {
        Error::invalid(path.display().to_string(), error, "a config with a `site`")
    })?;
    config
        .site
        .or_else(|| config.act_name.as_deref().and_then(own_name))
        .ok_or_else(|| {
            let what = format!("site in {}", path.display());
            Error::invalid(what, "absent", "such as \"blocks.1.attention.mixed\"")
        })
}

/// `blocks.L.attn.hook_z`, the heads' outputs, under its name here.
fn own_name(name: &str) -> Option<String> {
    let block: usize = name
        .strip_prefix("blocks.")?
        .strip_suffix(".attn.hook_z")?
        .parse()
        .ok()?;
    Some(format!("blocks.{block}.attention.mixed"))
}
