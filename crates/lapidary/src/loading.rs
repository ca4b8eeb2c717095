//! From a command line's model argument to a model.

use std::path::Path;

use crate::cli::Global;
use anyhow::{Context, Result, bail, ensure};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package, Tokenizer};
use lapidary_train::language::{Corpus, Language, Mixture, Split};

/// The device that `--device` names.
pub fn device(global: &Global) -> Result<Device> {
    let index = |rest: &str| -> Result<usize> {
        match rest.strip_prefix(':') {
            None if rest.is_empty() => Ok(0),
            Some(number) => number
                .parse()
                .with_context(|| format!("device number {number:?}")),
            None => bail!(
                "device is {:?}, but must be cpu, cuda, cuda:N or metal",
                global.device
            ),
        }
    };
    match global.device.as_str() {
        "cpu" => Ok(Device::Cpu),
        "metal" => Device::new_metal(0).context("device metal: this build or machine has none"),
        other => match other.strip_prefix("cuda") {
            Some(rest) => Device::new_cuda(index(rest)?)
                .context("device cuda: this build or machine has none"),
            None => bail!("device is {other:?}, but must be cpu, cuda, cuda:N or metal"),
        },
    }
}

/// Sets how many threads compute.
pub fn set_threads(global: &Global) -> Result<()> {
    let Some(threads) = global.threads else {
        return Ok(());
    };
    ensure!(
        (1..=1024).contains(&threads),
        "threads is {threads}, but must be between 1 and 1024"
    );
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .context("the number of threads could not be set")
}

/// Opens `embedded`, a model directory, or in builds with the `hub` feature a hub id.
pub fn package(model: &str, global: &Global) -> Result<Package> {
    let device = device(global)?;
    if model == "embedded" {
        return Ok(lapidary::embedded()?);
    }
    let path = Path::new(model);
    let options = OpenOptions {
        device,
        ..OpenOptions::default()
    };
    if path.is_dir() {
        check_is_model(path)?;
        let package = Package::open(path, &options)?;
        if !package.unused.is_empty() {
            let unused = package.unused.join(", ");
            tracing::info!("tensors that this model has no use for: {unused}");
        }
        return Ok(package);
    }
    #[cfg(feature = "hub")]
    if crate::hub::is_id(model) {
        return Ok(Package::open(&crate::hub::fetch(model)?, &options)?);
    }
    bail!(
        "model {model:?} is not a directory; give a directory with config.json or lapidary.json, or `embedded`"
    )
}

/// Refuses a directory without a model's description, and says where there is one when it is that of a run of
/// training.
fn check_is_model(path: &Path) -> Result<()> {
    let is_model = |path: &Path| {
        let described = ["lapidary.json", "config.json"];
        described.iter().any(|name| path.join(name).is_file())
    };
    let below = path.join("model");
    ensure!(
        is_model(path),
        "{} has neither lapidary.json nor config.json{}",
        path.display(),
        match is_model(&below) {
            true => format!(
                "; the model of this run of training is in {}",
                below.display()
            ),
            false => ", so that it is no model".to_owned(),
        }
    );
    Ok(())
}

/// As [`package`], with shared blocks, layer scales and quantised matrices written out, as methods need it that look
/// parameters up.
pub fn written_out(model: &str, global: &Global) -> Result<Package> {
    let mut package = package(model, global)?;
    for tower in &mut package.towers {
        if tower.model.needs_writing_out() {
            tower.model = tower.model.written_out()?;
        }
    }
    Ok(package)
}

/// The error that names the word of `text` which a closed vocabulary lacks, if that is why it
/// cannot be encoded.
fn closed_vocabulary(tokenizer: &Tokenizer, text: &str) -> Option<anyhow::Error> {
    let unknown = text
        .split_whitespace()
        .find(|word| tokenizer.id_of(word).is_none())?;
    Some(anyhow::anyhow!(
        "the word {unknown:?} is not among the {} of this model's closed vocabulary",
        tokenizer.vocabulary_size()
    ))
}

/// Token ids of `text`, within the model's length.
pub fn encode(
    package: &Package,
    model: &Model,
    text: &str,
) -> Result<lapidary_model::tokenizer::Encoding> {
    ensure!(
        !text.trim().is_empty(),
        "the text is empty; give at least one word"
    );
    let tokenizer = package.tokenizer()?;
    let encoding = tokenizer
        .encode(text, &Default::default())
        .map_err(|error| closed_vocabulary(tokenizer, text).unwrap_or_else(|| error.into()))?;
    ensure!(
        !encoding.ids.is_empty(),
        "the text has no tokens; give at least one word"
    );
    let length = model.spec().length();
    ensure!(
        encoding.ids.len() <= length,
        "the text has {} tokens, but must have at most {length}, the length of the model",
        encoding.ids.len()
    );
    Ok(encoding)
}

/// The token that a word is by itself in the model's vocabulary.
pub fn single_token(package: &Package, what: &str, name: &str) -> Result<u32> {
    let tokenizer = package.tokenizer()?;
    let is_other_special = |id: u32, text: &str| {
        tokenizer.is_special(id) && tokenizer.token_of(id).as_deref() != Some(text.trim())
    };
    let single = |text: &str| -> Result<Option<u32>> {
        let options = lapidary_model::tokenizer::EncodeOptions {
            special_tokens: false,
            limit: None,
        };
        Ok(match tokenizer.encode(text, &options)?.ids.as_slice() {
            // An unknown word is one token too, but not its own.
            [only] if !is_other_special(*only, text) => Some(*only),
            _ => None,
        })
    };
    // A word inside a sentence is a token of its own only with the space before it.
    let id = match single(&format!(" {name}"))? {
        Some(id) => Some(id),
        None => single(name)?,
    };
    id.with_context(|| {
        format!(
            "{what} {name:?} is not one token of this model; give a word that is, or a token id"
        )
    })
}

/// A row of ids as the model takes it, `[1, length]`.
pub fn row(ids: &[u32], model: &Model) -> Result<Tensor> {
    Ok(Tensor::from_slice(ids, (1, ids.len()), &model.device())?)
}

/// Where a file of TOML is wrong and why, on one line; the error's own text draws the place over several.
pub fn misread(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let before = error.span().and_then(|span| text.get(..span.start));
    // What is wrong with the whole of it begins at its beginning.
    let place = match before {
        None | Some("") => String::new(),
        Some(before) => format!(", line {}", before.matches('\n').count() + 1),
    };
    anyhow::anyhow!("{}{place}: {}", path.display(), error.message())
}

/// The tokens of a text file.
pub fn file_tokens(package: &Package, path: &Path) -> Result<Vec<u32>> {
    let text = lapidary_model::files::read_text(path, 1 << 30)?;
    ensure!(
        !text.trim().is_empty(),
        "{} is empty; give a file with text",
        path.display()
    );
    let tokenizer = package.tokenizer()?;
    tokenizer
        .ids(&text)
        .map_err(|error| closed_vocabulary(tokenizer, &text).unwrap_or_else(|| error.into()))
}

/// Windows of the embedded model's language, as it was trained on.
pub fn embedded_windows(count: usize, length: usize) -> Result<lapidary_compress::CalibrationData> {
    let corpus = language_corpus(Split::Training)?;
    let windows = (0..count as u64).map(|index| corpus.window(CALIBRATION_START + index, length));
    let windows: Vec<Vec<u32>> = windows.collect::<lapidary_train::Result<_>>()?;
    Ok(lapidary_compress::CalibrationData::windows(windows)?)
}

/// Windows from here on were not read while the embedded model was trained.
const CALIBRATION_START: u64 = 1 << 32;

/// Seed of the embedded model's language, as its training spec has it.
pub const LANGUAGE_SEED: u64 = 7;

/// The language that the embedded model was trained on.
pub fn language_corpus(split: Split) -> Result<Corpus> {
    let language = Language::new(LANGUAGE_SEED);
    Ok(Corpus::new(
        language,
        split,
        Mixture::default(),
        LANGUAGE_SEED,
    )?)
}
