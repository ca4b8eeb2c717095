//! A directory with a model in it: opened, held, and written back.
//!
//! Two kinds of directory hold a model. A *Hugging Face* directory has a `config.json` whose
//! `model_type` is known. A *Lapidary* directory has a `lapidary.json`, the spec, beside the
//! same `model.safetensors` and `tokenizer.json`; its tensors are named as the model's own
//! parameters. A model that its family can still express is written back as the former,
//! everything else as the latter.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::{WriteOptions, write_checkpoint};
use crate::files::{FileError, StagedDirectory, read_text, write_beside};
use crate::huggingface::config::CONFIG_FILE;
use crate::huggingface::families::{NameTable, Shapes, towers};
use crate::huggingface::reshaped;
use crate::{Checkpoint, Config, Error, Limits, Model, ModelSpec, Result, Tokenizer};
use lapidary_kernels::{DType, Device, Tensor};

/// The file with the spec of a Lapidary directory.
pub const SPEC_FILE: &str = "lapidary.json";

/// Files of a Hugging Face directory that say how tokens, sequences and images are made beside what the model
/// and `tokenizer.json` say, and are the same for a model of another shape.
const COMPANIONS: [&str; 6] = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
];

/// How a directory is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What a file may claim.
    pub limits: Limits,
    /// Type that the parameters are converted to.
    pub dtype: DType,
    /// Where they go.
    pub device: Device,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            dtype: DType::F32,
            device: Device::Cpu,
        }
    }
}

/// Where a package came from, and so which form it can be written in.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A Hugging Face directory with this config; one name table for each tower.
    HuggingFace {
        /// The config as read.
        config: Box<Config>,
        /// What it describes, for each tower.
        specs: Vec<ModelSpec>,
        /// Where each tower's parameters are stored.
        tables: Vec<NameTable>,
        /// Tensors that belong to no tower, such as CLIP's `logit_scale`.
        extra: BTreeMap<String, Tensor>,
        /// Texts of other files by name, such as `tokenizer_config.json`, that are written back as they are.
        companions: BTreeMap<String, String>,
    },
    /// A Lapidary directory, or a model made here.
    Lapidary,
}

/// One model of a package, with its name where there are several.
#[derive(Debug)]
pub struct TowerModel {
    /// Empty, or which of several (`text`, `vision`).
    pub name: String,
    /// The model.
    pub model: Model,
}

/// A model, its tokenizer, and where it came from.
#[derive(Debug)]
pub struct Package {
    /// One model, or the towers of CLIP.
    pub towers: Vec<TowerModel>,
    /// Its tokenizer, when the directory has one.
    pub tokenizer: Option<Tokenizer>,
    /// Where it came from.
    pub origin: Origin,
    /// Names of classes, when the config has them.
    pub labels: Vec<String>,
    /// Stored tensors that the model has no use for.
    pub unused: Vec<String>,
}

impl Package {
    /// A package of a model made here.
    pub fn new(model: Model, tokenizer: Option<Tokenizer>) -> Self {
        Self {
            towers: vec![TowerModel {
                name: String::new(),
                model,
            }],
            tokenizer,
            origin: Origin::Lapidary,
            labels: Vec::new(),
            unused: Vec::new(),
        }
    }

    /// Opens a model directory of either kind.
    pub fn open(directory: &Path, options: &OpenOptions) -> Result<Self> {
        let package = if directory.join(SPEC_FILE).is_file() {
            Self::open_lapidary(directory, options)?
        } else {
            Self::open_huggingface(directory, options)?
        };
        if let (Some(tokenizer), Ok(model)) = (&package.tokenizer, package.text_model())
            && let Some(vocabulary) = model.spec().vocabulary()
        {
            tokenizer.check_fits(vocabulary)?;
        }
        Ok(package)
    }

    fn open_lapidary(directory: &Path, options: &OpenOptions) -> Result<Self> {
        let path = directory.join(SPEC_FILE);
        let text = read_text(&path, options.limits.text_file_bytes)?;
        let spec: ModelSpec = serde_json::from_str(&text).map_err(|error| {
            let expected = format!("a model spec ({error})");
            lapidary_parts::Error::spec(path.display().to_string(), "not a valid spec", expected)
        })?;
        spec.validate()?;
        let checkpoint = Checkpoint::open(directory, &options.limits)?;
        let mut source = CheckpointSource {
            checkpoint: &checkpoint,
            options,
        };
        let model = Model::new(spec, &mut source)?;
        let report = checkpoint.compare_keys(model.parameters().keys().map(String::as_str));
        report.require_exact()?;
        Ok(Self {
            tokenizer: open_tokenizer(directory, &options.limits)?,
            ..Self::new(model, None)
        })
    }

    fn open_huggingface(directory: &Path, options: &OpenOptions) -> Result<Self> {
        let config = Config::read(directory, &options.limits)?;
        let checkpoint = Checkpoint::open(directory, &options.limits)?;
        let mut used = Vec::new();
        let mut models = Vec::new();
        let (mut tables, mut specs) = (Vec::new(), Vec::new());
        for tower in towers(&config, &shapes(&checkpoint)?)? {
            tower.spec.validate()?;
            let mut parameters = tower.table.read(&checkpoint, options.dtype, &mut used)?;
            for tensor in parameters.values_mut() {
                *tensor = tensor
                    .to_device(&options.device)
                    .map_err(lapidary_kernels::Error::from)?;
            }
            specs.push(tower.spec.clone());
            let model = Model::new(tower.spec, &mut parameters)?;
            models.push(TowerModel {
                name: tower.name.to_owned(),
                model,
            });
            tables.push(tower.table);
        }
        let mut extra = BTreeMap::new();
        let mut unused = Vec::new();
        for name in checkpoint
            .names()
            .filter(|name| !used.iter().any(|used| used == name))
        {
            if name == "logit_scale" {
                extra.insert(name.to_owned(), checkpoint.tensor(name, options.dtype)?);
            } else if is_no_parameter(name) {
                tracing::debug!(name, "a buffer or a copy, not read");
            } else {
                unused.push(name.to_owned());
            }
        }
        refuse_other_model(directory, &unused, used.len())?;
        let labels = config.labels.clone();
        Ok(Self {
            towers: models,
            tokenizer: open_tokenizer(directory, &options.limits)?,
            origin: Origin::HuggingFace {
                config: Box::new(config),
                specs,
                tables,
                extra,
                companions: companions(directory, &options.limits),
            },
            labels,
            unused,
        })
    }

    /// The only model, or CLIP's text tower.
    ///
    /// # Errors
    /// When the package holds no model that reads text.
    pub fn text_model(&self) -> Result<&Model> {
        self.towers
            .iter()
            .map(|tower| &tower.model)
            .find(|model| model.spec().vocabulary().is_some())
            .ok_or_else(|| {
                lapidary_parts::Error::spec("model", "one that reads images", "one that reads text")
                    .into()
            })
    }

    /// The only model; an error for a package of several.
    pub fn single_model(&self) -> Result<&Model> {
        match self.towers.as_slice() {
            [tower] => Ok(&tower.model),
            several => {
                let names: Vec<_> = several.iter().map(|tower| tower.name.as_str()).collect();
                let expected =
                    "a single model; run, explain, diff and inspect clip take one of several";
                Err(lapidary_parts::Error::spec("model", names, expected).into())
            }
        }
    }

    /// The tokenizer, or an error that says what is missing.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let expected = "a tokenizer.json beside the model, or token ids as input";
            lapidary_parts::Error::spec("tokenizer", "missing", expected).into()
        })
    }

    /// The same package with another model in place of its single one.
    pub fn with_model(self, model: Model) -> Self {
        Self {
            towers: vec![TowerModel {
                name: String::new(),
                model,
            }],
            ..self
        }
    }

    /// Writes the package to `directory`, which must not exist or be empty: as a Hugging Face
    /// directory when its family can express every tower, else as a Lapidary directory.
    /// `dtype` converts the parameters; without it they are written as they are, or as the config says
    /// where that loses nothing, and the config says what was written. Says which of the two it wrote.
    pub fn save(&self, directory: &Path, dtype: Option<DType>) -> Result<SavedAs> {
        self.save_in(StagedDirectory::new(directory)?, dtype)
    }

    /// As [`Package::save`], in place of the directory that may be there.
    pub fn replace(&self, directory: &Path, dtype: Option<DType>) -> Result<SavedAs> {
        self.save_in(StagedDirectory::replacing(directory)?, dtype)
    }

    fn save_in(&self, staged: StagedDirectory, dtype: Option<DType>) -> Result<SavedAs> {
        let mut options = WriteOptions {
            dtype,
            ..WriteOptions::default()
        };
        let saved = match self.as_huggingface()? {
            Some((config, tensors)) => {
                let stored = stored_type(dtype, config.dtype, &tensors)?;
                options.dtype = stored.or(dtype);
                let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
                write_checkpoint(staged.path(), tensors, &options)?;
                let config = match stored {
                    Some(stored) => Cow::Owned(config.stored_as(stored)),
                    None => config,
                };
                write_text(&staged.path().join(CONFIG_FILE), &config.to_json())?;
                if let Origin::HuggingFace { companions, .. } = &self.origin {
                    for (name, text) in companions {
                        write_text(&staged.path().join(name), text)?;
                    }
                }
                SavedAs::HuggingFace
            }
            None => {
                let model = self.single_model()?;
                if let Some(dtype) = dtype.filter(|_| !model.spec().quantised.is_empty()) {
                    let expected = "none: integers and their scales are written as they are";
                    let found = format!("{dtype:?}");
                    return Err(lapidary_parts::Error::spec(
                        "type of the parameters of a quantised model",
                        found,
                        expected,
                    )
                    .into());
                }
                let tensors = model
                    .parameters()
                    .iter()
                    .map(|(name, tensor)| (name.as_str(), tensor));
                write_checkpoint(staged.path(), tensors, &options)?;
                let spec = serde_json::to_string_pretty(model.spec()).map_err(|error| {
                    lapidary_parts::Error::spec("spec", error.to_string(), "one that serialises")
                })?;
                write_text(&staged.path().join(SPEC_FILE), &(spec + "\n"))?;
                SavedAs::Lapidary
            }
        };
        if let Some(tokenizer) = &self.tokenizer {
            tokenizer.save(staged.path())?;
        }
        staged.commit()?;
        Ok(saved)
    }

    /// Config and tensors of the family's own form, when every tower still has the spec that the
    /// config describes, or the only one has a shape that another config can say.
    #[allow(clippy::type_complexity, reason = "a config beside its tensors")]
    fn as_huggingface(&self) -> Result<Option<(Cow<'_, Config>, Vec<(String, Tensor)>)>> {
        let Origin::HuggingFace {
            config,
            specs,
            tables,
            extra,
            ..
        } = &self.origin
        else {
            return Ok(None);
        };
        let mut tensors = Vec::new();
        for ((tower, table), spec) in self.towers.iter().zip(tables).zip(specs) {
            let model = &tower.model;
            let named = table.tensors().iter().flat_map(|stored| &stored.parameters);
            let mut names: Vec<&String> = named.collect();
            names.sort();
            names.dedup();
            // Equal names may still hold other widths than the config says.
            let shapes = |spec: &ModelSpec| (spec.width, spec.expanded_blocks());
            if !names.into_iter().eq(model.parameters().keys())
                || shapes(model.spec()) != shapes(spec)
            {
                if self.towers.len() != 1 || !extra.is_empty() {
                    return Ok(None);
                }
                let other = reshaped(config, spec, table, model)?;
                return Ok(other.map(|(config, tensors)| (Cow::Owned(config), tensors)));
            }
            tensors.extend(table.write(model.parameters())?);
        }
        tensors.extend(
            extra
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor.clone())),
        );
        Ok(Some((Cow::Borrowed(config.as_ref()), tensors)))
    }
}

/// The type that tensors are written in, which readers take from the config: the one that was `told`, else the
/// config's own where it is smaller and holds every number exactly, else the widest that a tensor has. Nothing
/// when no tensor has fractions.
fn stored_type(
    told: Option<DType>,
    config: Option<DType>,
    tensors: &[(String, Tensor)],
) -> Result<Option<DType>> {
    let fractions = || {
        tensors
            .iter()
            .map(|(_, tensor)| tensor)
            .filter(|tensor| tensor.dtype().is_float())
    };
    let widest = fractions()
        .map(|tensor| tensor.dtype())
        .max_by_key(|dtype| dtype.size_in_bytes());
    let (None, Some(widest), Some(config)) = (told, widest, config) else {
        return Ok(told.or(widest));
    };
    if config.size_in_bytes() >= widest.size_in_bytes() {
        return Ok(Some(widest));
    }
    for tensor in fractions() {
        if !holds(config, tensor)? {
            return Ok(Some(widest));
        }
    }
    Ok(Some(config))
}

/// Whether a type has every number of a tensor.
fn holds(dtype: DType, tensor: &Tensor) -> Result<bool> {
    let (own, count) = (tensor.dtype(), tensor.elem_count());
    if own == dtype || count == 0 {
        return Ok(true);
    }
    let same = || {
        let there_and_back = tensor.to_dtype(dtype)?.to_dtype(own)?;
        let same = there_and_back.eq(tensor)?.to_dtype(DType::F32)?;
        same.min_all()?.to_scalar::<f32>()
    };
    Ok(same().map_err(lapidary_kernels::Error::from)? == 1.0)
}

/// Which kind of directory was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedAs {
    /// One that `transformers` loads.
    HuggingFace,
    /// One with a `lapidary.json`.
    Lapidary,
}

/// The texts of a directory's [`COMPANIONS`]; one that cannot be read is none that the model needs.
fn companions(directory: &Path, limits: &Limits) -> BTreeMap<String, String> {
    let read = |name: &str| {
        let path = directory.join(name);
        if !path.is_file() {
            return None;
        }
        match read_text(&path, limits.text_file_bytes) {
            Ok(text) => Some((name.to_owned(), text)),
            Err(error) => {
                tracing::warn!("{error}; it will not be written back");
                None
            }
        }
    };
    COMPANIONS.into_iter().filter_map(read).collect()
}

fn shapes(checkpoint: &Checkpoint) -> Result<Shapes> {
    checkpoint
        .names()
        .map(|name| Ok((name.to_owned(), checkpoint.info(name)?.shape.clone())))
        .collect()
}

struct CheckpointSource<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a OpenOptions,
}

impl lapidary_parts::parameters::ParameterSource for CheckpointSource<'_> {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        _: lapidary_parts::parameters::Init,
    ) -> lapidary_parts::Result<Tensor> {
        let wrong = |reason: String| lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason,
        };
        let tensor = self
            .checkpoint
            .tensor_of_shape(name, shape, self.options.dtype)
            .map_err(|error| wrong(error.to_string()))?;
        Ok(tensor
            .to_device(&self.options.device)
            .map_err(lapidary_kernels::Error::from)?)
    }

    fn packed(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
    ) -> lapidary_parts::Result<Tensor> {
        let wrong = |reason: String| lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason,
        };
        let tensor = self
            .checkpoint
            .tensor_of_shape(name, shape, dtype)
            .map_err(|error| wrong(error.to_string()))?;
        Ok(tensor
            .to_device(&self.options.device)
            .map_err(lapidary_kernels::Error::from)?)
    }
}

/// Buffers, and copies of tied matrices, that checkpoints carry beside their parameters.
fn is_no_parameter(name: &str) -> bool {
    const ENDINGS: [&str; 9] = [
        "position_ids",
        "attn.bias",
        "attn.masked_bias",
        "rotary_emb.inv_freq",
        "lm_head.weight",
        "predictions.decoder.weight",
        "predictions.decoder.bias",
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
    ];
    ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Tensors that a model of this class has no use for are allowed when they are heads (a
/// pre-training head beside a classifier); more of them than were used says that the config is
/// not that of the checkpoint.
fn refuse_other_model(directory: &Path, unused: &[String], used: usize) -> Result<()> {
    let blocks = unused
        .iter()
        .find(|name| name.contains(".layer.") || name.contains("layers.") || name.contains("h."));
    match blocks {
        Some(name) => Err(lapidary_parts::Error::spec(
            format!("tensors of {}", directory.display()),
            format!(
                "{} that the config does not describe, such as {name}",
                unused.len()
            ),
            format!("the {used} that it does"),
        )
        .into()),
        None => Ok(()),
    }
}

fn open_tokenizer(directory: &Path, limits: &Limits) -> Result<Option<Tokenizer>> {
    const FILES: [&str; 3] = ["tokenizer.json", "vocab.json", "vocab.txt"];
    if FILES.iter().any(|file| directory.join(file).is_file()) {
        return Ok(Some(Tokenizer::open(directory, limits)?));
    }
    Ok(None)
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    write_beside::<Error>(path, |writer| {
        writer
            .write_all(text.as_bytes())
            .map_err(FileError::io("write", path))?;
        Ok(())
    })
}
