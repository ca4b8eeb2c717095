//! An autoencoder in a directory: `model.safetensors` and `autoencoder.json`.
//!
//! Names and shapes of the tensors are those of public autoencoders: `W_enc` `[width, features]`,
//! `b_enc`, `W_dec` `[features, width]`, `b_dec`. Those are read too, as PyTorch's state dict or
//! converted to safetensors, with their config, which names the site in the vocabulary of
//! TransformerLens.

use super::Autoencoder;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, PytorchFile, Tensor};
use lapidary_model::checkpoint::{Checkpoint, WriteOptions, write_checkpoint};
use lapidary_model::files::{FileError, StagedDirectory, read_text, write_beside};
use lapidary_model::{Error as ModelError, Limits};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

/// The file that says which site the autoencoder reads.
pub const CONFIG_FILE: &str = "autoencoder.json";

/// Bytes of a config that are read.
const CONFIG_BYTES: u64 = 1 << 20;

/// How a zip archive begins, as which PyTorch writes tensors.
const ARCHIVE: [u8; 4] = *b"PK\x03\x04";
/// Names of the tensors.
const NAMES: [&str; 4] = ["W_enc", "b_enc", "W_dec", "b_dec"];

/// What of a config is used; others' files have much else.
#[derive(Default, Deserialize)]
struct Config {
    /// The site, or its short name in TransformerLens, such as `z`.
    site: Option<String>,
    /// The site as TransformerLens calls it.
    #[serde(alias = "hook_name", alias = "hook_point")]
    act_name: Option<String>,
    /// The block of a short name.
    #[serde(alias = "hook_point_layer", alias = "hook_layer")]
    layer: Option<usize>,
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

/// Reads an autoencoder from a directory that [`save`] wrote, or from one file of public weights:
/// safetensors, or what `torch.save` makes of a state dict. Its config is beside it under the same
/// name with `.json` or `_cfg.json`, or is `cfg.json`. `site` says what it reads when no config
/// does, and goes before what a config says.
///
/// TransformerLens moves the bias of values behind the attention unless it is told not to, so that
/// what public autoencoders of `hook_z` read lacks it: see
/// [`with_value_biases`](super::with_value_biases).
///
/// # Errors
/// When a file is not what it claims to be, shapes do not fit, or no site is known.
pub fn load(path: &Path, site: Option<&str>) -> Result<Autoencoder> {
    let configs = if path.is_dir() {
        vec![path.join(CONFIG_FILE), path.join("cfg.json")]
    } else {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        vec![
            path.with_file_name(format!("{stem}.json")),
            path.with_file_name(format!("{stem}_cfg.json")),
            path.with_file_name("cfg.json"),
        ]
    };
    // What is missing is said of the weights first.
    let site = || site.map_or_else(|| site_of(&configs), |site| Ok(site.to_owned()));
    if path.is_file() && starts_as_archive(path)? {
        let file = File::open(path)
            .map_err(FileError::io("open", path))
            .map_err(ModelError::from)?;
        return from_pytorch(BufReader::new(file), site()?);
    }
    let checkpoint = match path.is_dir() {
        true => Checkpoint::open(path, &Limits::default()),
        false => Checkpoint::open_file(path, &Limits::default()),
    };
    from_checkpoint(&checkpoint.map_err(ModelError::from)?, site()?)
}

fn starts_as_archive(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    File::open(path)
        .and_then(|file| file.take(ARCHIVE.len() as u64).read_to_end(&mut start))
        .map_err(FileError::io("open", path))
        .map_err(ModelError::from)?;
    Ok(start == ARCHIVE)
}

/// Reads an autoencoder of `site` from the bytes of a file of weights, safetensors or PyTorch's;
/// `name` stands for its path in errors.
///
/// # Errors
/// As [`load`].
pub fn from_bytes(
    name: &str,
    bytes: impl Into<Cow<'static, [u8]>>,
    site: &str,
) -> Result<Autoencoder> {
    let bytes = bytes.into();
    if bytes.starts_with(&ARCHIVE) {
        return from_pytorch(std::io::Cursor::new(bytes), site.to_owned());
    }
    let checkpoint = Checkpoint::from_bytes(name, bytes, &Limits::default());
    from_checkpoint(&checkpoint.map_err(ModelError::from)?, site.to_owned())
}

fn from_checkpoint(checkpoint: &Checkpoint, site: String) -> Result<Autoencoder> {
    let mut shapes = Vec::new();
    for name in NAMES {
        let info = checkpoint.info(name).map_err(ModelError::from)?;
        shapes.push(info.shape.clone());
    }
    checked(site, &shapes, |name| {
        let tensor = checkpoint.tensor(name, DType::F32);
        Ok(tensor.map_err(ModelError::from)?)
    })
}

fn from_pytorch(reader: impl Read + Seek, site: String) -> Result<Autoencoder> {
    let mut file = engine(PytorchFile::open(reader))?;
    let mut shapes = Vec::new();
    for name in NAMES {
        let shape = file.shape(name).ok_or_else(|| {
            let known: Vec<&str> = file.names().take(8).collect();
            let found = format!("one with {}", known.join(", "));
            Error::invalid("file of an autoencoder", found, format!("one with {name}"))
        })?;
        shapes.push(shape.to_vec());
    }
    checked(site, &shapes, |name| {
        let tensor = engine(file.tensor(name))?;
        engine(engine(tensor.to_dtype(DType::F32))?.contiguous())
    })
}

/// An autoencoder of tensors in the order of their names. Shapes are checked before values are
/// read.
fn checked(
    site: String,
    shapes: &[Vec<usize>],
    mut read: impl FnMut(&str) -> Result<Tensor>,
) -> Result<Autoencoder> {
    let (width, features) = match shapes.first().map(Vec::as_slice) {
        Some([width, features]) => (*width, *features),
        found => {
            let found = format!("{found:?}");
            return Err(Error::invalid("shape of W_enc", found, "[width, features]"));
        }
    };
    super::check_size(features, width)?;
    let expected = [
        vec![width, features],
        vec![features],
        vec![features, width],
        vec![width],
    ];
    for ((name, found), expected) in NAMES.iter().zip(shapes).zip(expected) {
        if *found != expected {
            return Err(Error::invalid(
                format!("shape of {name}"),
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
    }
    let encoder = engine(engine(read("W_enc")?.t())?.contiguous())?;
    Autoencoder::new(
        site,
        encoder,
        read("b_enc")?,
        read("W_dec")?,
        read("b_dec")?,
    )
}

fn site_of(configs: &[PathBuf]) -> Result<String> {
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
    let known = [config.act_name.as_deref(), config.site.as_deref()];
    let short = config.site.as_deref().zip(config.layer);
    let found = known.into_iter().flatten().find_map(own_name);
    found
        .or_else(|| short.and_then(|(name, block)| own_name_in(block, name)))
        .or(config.site)
        .ok_or_else(|| {
            let what = format!("site in {}", path.display());
            Error::invalid(what, "absent", "such as \"blocks.1.attention.mixed\"")
        })
}

/// A place of TransformerLens, such as `blocks.5.attn.hook_z`, under its name here.
fn own_name(name: &str) -> Option<String> {
    let (block, place) = name.strip_prefix("blocks.")?.split_once('.')?;
    let place = place.strip_prefix("attn.").unwrap_or(place);
    own_name_in(block.parse().ok()?, place.strip_prefix("hook_")?)
}

/// A place by its short name.
fn own_name_in(block: usize, place: &str) -> Option<String> {
    let own = match place {
        "z" => "attention.mixed",
        "attn_out" => "attention.out",
        "mlp_out" => "feedforward.out",
        "resid_pre" => "in",
        "resid_post" => "out",
        _ => return None,
    };
    Some(format!("blocks.{block}.{own}"))
}
