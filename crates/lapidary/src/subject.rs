//! What is looked at: one input to one model, with a name for each of its positions.

use anyhow::{Result, bail, ensure};
use lapidary_explain::Question;
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, InputSpec, Model, Package};

use crate::cli::{Global, SubjectArguments};
use crate::commands::explain::readable;
use crate::loading;
use crate::tensors::Tensors;

pub struct Subject<'a> {
    pub model: &'a Model,
    pub input: Input,
    /// `[1, length]`, 1 = keep
    pub padding: Option<Tensor>,
    /// One for each position.
    pub names: Vec<String>,
}

impl<'a> Subject<'a> {
    /// What the command line names.
    pub fn new(
        arguments: &SubjectArguments,
        package: &'a Package,
        global: &Global,
    ) -> Result<Self> {
        match (&arguments.text, &arguments.tokens, &arguments.input) {
            (Some(text), ..) => Self::text(package, text),
            (None, Some(ids), _) => Self::tokens(package, ids),
            (None, None, Some(path)) => {
                Self::tensors(package, &Tensors::read(path, &loading::device(global)?)?)
            }
            (None, None, None) => bail!("give --text, --tokens or --input"),
        }
    }

    fn text(package: &'a Package, text: &str) -> Result<Self> {
        let model = package.text_model()?;
        let encoding = loading::encode(package, model, text)?;
        let token_types = match takes_types(model) {
            true => Some(loading::row(&encoding.type_ids, model)?),
            false => None,
        };
        Ok(Self {
            model,
            input: Input::Tokens {
                ids: loading::row(&encoding.ids, model)?,
                token_types,
            },
            padding: None,
            names: encoding.tokens,
        })
    }

    fn tokens(package: &'a Package, ids: &[u32]) -> Result<Self> {
        ensure!(!ids.is_empty(), "no token ids were given");
        let model = package.text_model()?;
        Ok(Self {
            model,
            input: Input::tokens(loading::row(ids, model)?),
            padding: None,
            names: token_names(package, ids),
        })
    }

    fn tensors(package: &'a Package, tensors: &Tensors) -> Result<Self> {
        let models = package.towers.iter().map(|tower| &tower.model);
        let found = models
            .filter_map(|model| Some((model, tensors.input(model)?)))
            .next();
        let Some((model, input)) = found else {
            let wanted = package.towers.first().map(|t| Tensors::wanted(&t.model));
            bail!(
                "{} is missing from the input",
                wanted.unwrap_or("input_ids")
            );
        };
        let (values, names) = match &input {
            Input::Tokens { ids, .. } => {
                let first = ids.get(0)?.to_vec1::<u32>()?;
                (ids, token_names(package, &first))
            }
            Input::Pixels(pixels) => (pixels, patch_names(model)),
        };
        let batch = values.dim(0)?;
        ensure!(
            batch == 1,
            "the input has a batch of {batch}, but must have one example to explain"
        );
        let padding = match input {
            Input::Tokens { .. } => tensors.padding.clone(),
            Input::Pixels(_) => None,
        };
        Ok(Self {
            model,
            input,
            padding,
            names,
        })
    }

    /// The input as a question to the model.
    pub fn question(&self) -> Question<'_> {
        Question {
            model: self.model,
            input: &self.input,
            padding: self.padding.as_ref(),
        }
    }

    /// The names as people read them.
    pub fn readable_names(&self) -> Vec<String> {
        self.names.iter().map(|name| readable(name)).collect()
    }

    /// Rows and columns of patches, for an image.
    pub fn patch_grid(&self) -> Option<(usize, usize)> {
        let InputSpec::Patches(spec) = &self.model.spec().input else {
            return None;
        };
        let [rows, columns] = spec.image.map(|size| size / spec.patch.max(1));
        Some((rows, columns))
    }

    /// The last position that is not padding.
    pub fn last(&self) -> Result<usize> {
        let Some(padding) = &self.padding else {
            return Ok(self.names.len().saturating_sub(1));
        };
        let keep = padding.get(0)?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        Ok(keep.iter().rposition(|kept| *kept != 0).unwrap_or(0))
    }
}

fn takes_types(model: &Model) -> bool {
    match &model.spec().input {
        InputSpec::Tokens(tokens) => tokens.token_types > 0,
        InputSpec::Patches(_) => false,
    }
}

fn token_names(package: &Package, ids: &[u32]) -> Vec<String> {
    let tokenizer = package.tokenizer.as_ref();
    let name = |id: &u32| tokenizer.and_then(|tokenizer| tokenizer.token_of(*id));
    ids.iter()
        .map(|id| name(id).unwrap_or_else(|| format!("[{id}]")))
        .collect()
}

/// Class tokens, then patches by row and column, as the model lines them up.
fn patch_names(model: &Model) -> Vec<String> {
    let InputSpec::Patches(spec) = &model.spec().input else {
        return Vec::new();
    };
    let [height, width] = spec.image.map(|size| size / spec.patch.max(1));
    let class = (0..spec.class_tokens).map(|index| match index {
        0 => "[class]".to_owned(),
        index => format!("[class {index}]"),
    });
    let patches = (0..height)
        .flat_map(|row| (0..width).map(move |column| format!("row {row} column {column}")));
    class.chain(patches).collect()
}
