//! Which layers a method may touch.

use globset::{Glob, GlobMatcher};
use lapidary_model::{InputSpec, Model};
use lapidary_parts::parameters::LinearInfo;
use serde::{Deserialize, Serialize};

use crate::sites::TOKEN_IDS;
use crate::{Error, Result};

/// Path of the table of token embeddings, seen as a layer: its input is a vector with a single
/// one, as long as the vocabulary, and its stored matrix is transposed.
pub(crate) const TABLE: &str = "embeddings.tokens";

/// A matrix that a method may replace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its path: a linear layer's, or `embeddings.tokens`.
    pub path: String,
    /// The site that writes what it reads; `input_ids` for the table of embeddings.
    pub input_site: String,
    /// Width of the input.
    pub input: usize,
    /// Width of the output.
    pub output: usize,
    /// Rank, where it is factorised already.
    pub rank: Option<usize>,
}

impl Layer {
    /// Every layer of a model: the table of token embeddings, then linear layers in order.
    pub(crate) fn all(model: &Model) -> Vec<Self> {
        let table = table(model).ok();
        let linears = model.linears().iter().map(layer);
        table.into_iter().chain(linears).collect()
    }

    /// Name of the parameter that holds the dense matrix of the layer at `path`.
    pub(crate) fn weight_name(path: &str) -> String {
        format!("{path}.weight")
    }

    /// Whether it is the table of token embeddings.
    pub fn is_table(&self) -> bool {
        self.path == TABLE
    }

    /// Weights as it is now, without bias.
    pub fn weights(&self) -> usize {
        match self.rank {
            Some(rank) => lapidary_factor::rank::parameters(self.input, self.output, rank),
            None => self.input * self.output,
        }
    }
}

/// The layers to compress, by globs over the paths in [`Model::linears`] (`*` also crosses
/// dots).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Selection {
    /// A layer is chosen when any of these matches it.
    pub layers: Vec<String>,
    /// Whether the table of token embeddings is factorised too. A language model's stays whole
    /// in any case, since its head reads the table or has its width.
    pub embeddings: bool,
}

impl Default for Selection {
    /// Every linear layer of every block, no embeddings and no head.
    fn default() -> Self {
        Self::layers(["blocks.*"])
    }
}

impl Selection {
    /// The layers that match any of `globs`.
    pub fn layers<'a>(globs: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            layers: globs.into_iter().map(str::to_owned).collect(),
            embeddings: false,
        }
    }

    /// The chosen layers: the table of embeddings first, then linear layers in the model's
    /// order. A glob that matches no layer is an error.
    pub fn chosen(&self, model: &Model) -> Result<Vec<Layer>> {
        let matchers = self
            .layers
            .iter()
            .map(|glob| matcher(glob))
            .collect::<Result<Vec<_>>>()?;
        for matcher in &matchers {
            if !model.linears().iter().any(|l| matcher.is_match(&l.path)) {
                let paths: Vec<&str> = model.linears().iter().map(|l| l.path.as_str()).collect();
                return Err(Error::invalid(
                    "layer pattern",
                    format!("{:?}, which matches no layer", matcher.glob().glob()),
                    match paths.as_slice() {
                        [] => "for a model with linear layers".to_owned(),
                        [only] => format!("one that matches {only}"),
                        [first, .., last] => format!("one that matches {first} .. {last}"),
                    },
                ));
            }
        }
        let linears = model
            .linears()
            .iter()
            .filter(|linear| matchers.iter().any(|m| m.is_match(&linear.path)))
            .map(layer);
        let table = match self.embeddings {
            true => Some(table(model)?),
            false => None,
        };
        Ok(table.into_iter().chain(linears).collect())
    }
}

fn layer(linear: &LinearInfo) -> Layer {
    Layer {
        path: linear.path.clone(),
        input_site: linear.input_site.clone(),
        input: linear.input,
        output: linear.output,
        rank: linear.rank,
    }
}

fn table(model: &Model) -> Result<Layer> {
    let InputSpec::Tokens(tokens) = &model.spec().input else {
        return Err(Error::invalid(
            "input",
            "patches",
            "tokens, for a model whose embeddings are factorised",
        ));
    };
    Ok(Layer {
        path: TABLE.to_owned(),
        input_site: TOKEN_IDS.to_owned(),
        input: tokens.vocabulary,
        output: model.spec().width,
        rank: tokens.embedding_width,
    })
}

fn matcher(glob: &str) -> Result<GlobMatcher> {
    Ok(Glob::new(glob)
        .map_err(|error| {
            Error::invalid(
                "layer pattern",
                format!("{glob:?}"),
                format!("a glob: {error}"),
            )
        })?
        .compile_matcher())
}
