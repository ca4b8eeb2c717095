//! `config.json` of the families that load.
//!
//! A field that the file leaves out has the value that `transformers` gives it: each family's
//! defaults are a value of its struct (`overlay`), and the file's fields are laid over them.
//! Fields that do not change what the model computes (dropout, initialisation) are kept as they
//! are in [`Config::fields`] and not interpreted.

mod albert;
mod bert;
mod check;
mod clip;
mod error;
mod floats;
mod gpt2;
mod llama;
mod mamba;
mod mamba2;
mod opt;
mod rope;
mod vit;

use std::path::Path;

use lapidary_kernels::DType;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use self::albert::AlbertConfig;
pub use self::bert::{BertConfig, BertKind};
use self::check::Check;
pub use self::clip::{ClipConfig, ClipTextConfig, ClipVisionConfig};
pub use self::error::ConfigError;
pub use self::gpt2::Gpt2Config;
pub use self::llama::{ExpertsConfig, LlamaConfig, LlamaKind};
pub use self::mamba::MambaConfig;
pub use self::mamba2::Mamba2Config;
pub use self::opt::OptConfig;
pub use self::rope::{RopeConfig, RopeScaling};
pub use self::vit::{ImageSize, VitConfig, VitKind};
use crate::Limits;
use crate::files::read_text;

/// The file that describes a model in its directory.
pub const CONFIG_FILE: &str = "config.json";

/// A checked `config.json`.
///
/// ```
/// use std::path::Path;
/// use lapidary_model::huggingface::{Config, Family};
///
/// let text = r#"{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2}"#;
/// let config = Config::parse(Path::new("config.json"), text, &Default::default()).unwrap();
/// let Family::Gpt2(gpt2) = &config.family else { panic!("this is a GPT-2") };
/// assert_eq!((gpt2.n_layer, gpt2.n_embd), (2, 768));
///
/// let text = text.replace("}", r#", "n_head": 7}"#);
/// let error = Config::parse(Path::new("config.json"), &text, &Default::default()).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "config.json: n_head is 7, but must be a divisor of n_embd, 768",
/// );
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The classes of `transformers` that the weights are for, such as `GPT2LMHeadModel`: it says
    /// which head the model has.
    pub architectures: Vec<String>,
    /// The type that the weights were saved in, when the file says so.
    pub dtype: Option<DType>,
    /// The names of a classifier's classes.
    pub labels: Vec<String>,
    /// The model.
    pub family: Family,
    fields: Map<String, Value>,
}

/// A supported family with its settings.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Family {
    Albert(AlbertConfig),
    Gpt2(Gpt2Config),
    Opt(OptConfig),
    /// Llama, Mistral, Qwen2, Mixtral and OLMoE: one block with variations.
    Llama(LlamaConfig),
    /// BERT and RoBERTa.
    Bert(BertConfig),
    /// ViT and DeiT.
    Vit(VitConfig),
    Clip(Box<ClipConfig>),
    Mamba(MambaConfig),
    Mamba2(Mamba2Config),
}

/// Every `model_type` that loads.
pub const MODEL_TYPES: [&str; 15] = [
    "albert", "bert", "clip", "deit", "gpt2", "llama", "mamba", "mamba2", "mistral", "mixtral",
    "olmoe", "opt", "qwen2", "roberta", "vit",
];

impl Config {
    /// Reads a directory's `config.json`.
    pub fn read(directory: &Path, limits: &Limits) -> Result<Self, ConfigError> {
        let path = directory.join(CONFIG_FILE);
        let text = read_text(&path, limits.text_file_bytes)?;
        Self::parse(&path, &text, limits)
    }

    /// Parses the text of a `config.json`; `path` is for errors.
    ///
    /// # Errors
    /// When it isn't a JSON object, when its `model_type` is unknown, or when a field has the
    /// wrong type or a value outside its range: the error names the field, the value and what
    /// would be valid.
    pub fn parse(path: &Path, text: &str, limits: &Limits) -> Result<Self, ConfigError> {
        let fields =
            serde_json::from_str(&floats::named(text)).map_err(|error| ConfigError::Json {
                path: path.to_path_buf(),
                found: error.to_string(),
            })?;
        Self::from_fields(path, fields, limits)
    }

    /// Checks fields that were read or changed by a program; `path` is for errors.
    pub fn from_fields(
        path: &Path,
        fields: Map<String, Value>,
        limits: &Limits,
    ) -> Result<Self, ConfigError> {
        let check = Check::new(path, limits);
        let family = Family::new(&fields, &check)?;
        check.parameters(family.matrix_parameters())?;
        Ok(Self {
            architectures: check.read(&fields, "architectures")?.unwrap_or_default(),
            dtype: dtype(&fields, &check)?,
            labels: labels(&fields, &check)?,
            family,
            fields,
        })
    }

    /// Everything the file says, in its order, to be changed or written back.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The text of a `config.json` that says the same.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(self.fields.clone()))
    }

    /// The same of tensors that are stored in `dtype`, where the file names a type.
    pub fn stored_as(&self, dtype: DType) -> Self {
        let mut config = self.clone();
        if config.dtype.is_none_or(|named| named == dtype) {
            return config;
        }
        let name = match dtype {
            DType::F64 => "float64",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        for field in ["dtype", "torch_dtype"] {
            if let Some(value) = config.fields.get_mut(field) {
                *value = Value::from(name);
            }
        }
        config.dtype = Some(dtype);
        config
    }

    /// The `model_type`, as in the file.
    pub fn model_type(&self) -> &str {
        self.fields
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }
}

impl Family {
    fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let Some(model_type) = check.read::<String>(fields, "model_type")? else {
            return Err(check.wrong("model_type", "missing", supported()));
        };
        Ok(match model_type.as_str() {
            "albert" => Self::Albert(AlbertConfig::new(fields, check)?),
            "gpt2" => Self::Gpt2(Gpt2Config::new(fields, check)?),
            "opt" => Self::Opt(OptConfig::new(fields, check)?),
            "llama" => Self::Llama(LlamaConfig::new(LlamaKind::Llama, fields, check)?),
            "mistral" => Self::Llama(LlamaConfig::new(LlamaKind::Mistral, fields, check)?),
            "qwen2" => Self::Llama(LlamaConfig::new(LlamaKind::Qwen2, fields, check)?),
            "mixtral" => Self::Llama(LlamaConfig::new(LlamaKind::Mixtral, fields, check)?),
            "olmoe" => Self::Llama(LlamaConfig::new(LlamaKind::Olmoe, fields, check)?),
            "bert" => Self::Bert(BertConfig::new(BertKind::Bert, fields, check)?),
            "roberta" => Self::Bert(BertConfig::new(BertKind::Roberta, fields, check)?),
            "vit" => Self::Vit(VitConfig::new(VitKind::Vit, fields, check)?),
            "deit" => Self::Vit(VitConfig::new(VitKind::Deit, fields, check)?),
            "clip" => Self::Clip(Box::new(ClipConfig::new(fields, check)?)),
            "mamba" => Self::Mamba(MambaConfig::new(fields, check)?),
            "mamba2" => Self::Mamba2(Mamba2Config::new(fields, check)?),
            other => return Err(check.wrong("model_type", other, supported())),
        })
    }

    /// Parameters in embeddings and matrices, without biases, norms and heads: the bulk of a
    /// model, known before anything is allocated. Fields have been checked, so it can't overflow.
    pub fn matrix_parameters(&self) -> u128 {
        match self {
            Self::Albert(config) => config.matrix_parameters(),
            Self::Gpt2(config) => config.matrix_parameters(),
            Self::Opt(config) => config.matrix_parameters(),
            Self::Llama(config) => config.matrix_parameters(),
            Self::Bert(config) => config.matrix_parameters(),
            Self::Vit(config) => config.matrix_parameters(),
            Self::Clip(config) => config.matrix_parameters(),
            Self::Mamba(config) => config.matrix_parameters(),
            Self::Mamba2(config) => config.matrix_parameters(),
        }
    }
}

fn supported() -> String {
    format!("one of {}", MODEL_TYPES.join(", "))
}

/// The file's fields laid over a family's defaults. Fields that the family doesn't have are left
/// out; `aliases` are other names for some, and yield to the field's own name.
fn overlay<T: Serialize + DeserializeOwned>(
    defaults: T,
    aliases: &[(&str, &str)],
    fields: &Map<String, Value>,
    check: &Check,
) -> Result<T, ConfigError> {
    let mut merged = check.to_object(defaults)?;
    for (name, value) in &mut merged {
        let alias = aliases
            .iter()
            .find(|(_, own)| own == name)
            .map(|(alias, _)| *alias);
        let found = fields.get(name).or_else(|| fields.get(alias?));
        if let Some(found) = found {
            *value = found.clone();
        }
    }
    check.parse_object(merged)
}

/// `dtype`, or `torch_dtype` as it was called before transformers 5.
fn dtype(fields: &Map<String, Value>, check: &Check) -> Result<Option<DType>, ConfigError> {
    for name in ["dtype", "torch_dtype"] {
        let Some(found) = check.read::<String>(fields, name)? else {
            continue;
        };
        return match found.trim_start_matches("torch.") {
            "float64" => Ok(Some(DType::F64)),
            "float32" => Ok(Some(DType::F32)),
            "float16" => Ok(Some(DType::F16)),
            "bfloat16" => Ok(Some(DType::BF16)),
            "auto" => Ok(None),
            _ => Err(check.wrong(
                name,
                found,
                "one of float64, float32, float16, bfloat16, auto",
            )),
        };
    }
    Ok(None)
}

/// Class names from `id2label`, or as many numbered ones as `num_labels` says; transformers
/// assumes two.
fn labels(fields: &Map<String, Value>, check: &Check) -> Result<Vec<String>, ConfigError> {
    const MOST: usize = 1 << 20;
    let named: Option<Map<String, Value>> = check.read(fields, "id2label")?;
    let count = match &named {
        Some(named) => named.len(),
        None => check.read(fields, "num_labels")?.unwrap_or(2),
    };
    check.between("num_labels", count, 0..=MOST)?;
    let label = |id: usize| {
        let name = named
            .as_ref()
            .and_then(|named| named.get(&id.to_string())?.as_str());
        name.map_or_else(|| format!("LABEL_{id}"), str::to_string)
    };
    Ok((0..count).map(label).collect())
}

#[cfg(test)]
mod tests;
