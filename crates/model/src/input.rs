//! From token ids or pixels to the first hidden vectors.

use crate::position::Positions;
use crate::spec::{InputSpec, PatchInput, Projected, TokenInput};
use lapidary_kernels::Tensor;
use lapidary_parts::norm::Norm;
use lapidary_parts::parameters::{Init, Parameters};
use lapidary_parts::{Context, Error, Result};
use lapidary_signal::{Linear, Signal};

/// What a model is run on.
#[derive(Clone, Debug)]
pub enum Input {
    /// Token ids `[batch, length]` in `u32`, and their types.
    Tokens {
        /// Token ids.
        ids: Tensor,
        /// Token types `[batch, length]` in `u32`; all 0 when absent.
        token_types: Option<Tensor>,
    },
    /// Images `[batch, channels, height, width]`.
    Pixels(Tensor),
}

impl Input {
    /// Token ids `[batch, length]`, of type 0.
    pub fn tokens(ids: Tensor) -> Self {
        Self::Tokens {
            ids,
            token_types: None,
        }
    }
}

pub(crate) fn engine<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

/// The first layer of a model.
#[derive(Debug)]
pub(crate) enum Embedding {
    Tokens(TokenEmbedding),
    Patches(PatchEmbedding),
}

impl Embedding {
    pub(crate) fn new(spec: &InputSpec, width: usize, parameters: Parameters<'_>) -> Result<Self> {
        Ok(match spec {
            InputSpec::Tokens(spec) => Self::Tokens(TokenEmbedding::new(spec, width, parameters)?),
            InputSpec::Patches(spec) => {
                Self::Patches(PatchEmbedding::new(spec, width, parameters)?)
            }
        })
    }

    pub(crate) fn forward(&self, input: &Input, cx: &Context<'_>) -> Result<Signal> {
        match (self, input) {
            (Self::Tokens(embedding), Input::Tokens { ids, token_types }) => {
                embedding.forward(ids, token_types.as_ref(), cx)
            }
            (Self::Patches(embedding), Input::Pixels(pixels)) => embedding.forward(pixels, cx),
            (Self::Tokens(_), Input::Pixels(_)) => Err(Error::spec(
                "input",
                "pixel_values",
                "input_ids for this model",
            )),
            (Self::Patches(_), Input::Tokens { .. }) => Err(Error::spec(
                "input",
                "input_ids",
                "pixel_values for this model",
            )),
        }
    }

    /// The embedding table `[vocabulary, embedding width]`.
    pub(crate) fn table(&self) -> Option<&Tensor> {
        match self {
            Self::Tokens(embedding) => Some(&embedding.tokens),
            Self::Patches(_) => None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct TokenEmbedding {
    spec: TokenInput,
    tokens: Tensor,
    projection: Option<Linear>,
    positions: Positions,
    token_types: Option<Tensor>,
    norm: Norm,
}

impl TokenEmbedding {
    fn new(spec: &TokenInput, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let init = Init::Normal { deviation: 0.02 };
        let table_width = spec.embedding_width.unwrap_or(width);
        let tokens =
            parameters
                .at("tokens")
                .tensor("weight", &[spec.vocabulary, table_width], init)?;
        let (site, bias, added) = match spec.projected {
            Projected::Token => ("tokens", false, width),
            Projected::Sum => ("sum", true, table_width),
        };
        let projection = match spec.embedding_width {
            Some(from) => Some(parameters.linear("projection", site, from, width, bias)?),
            None => None,
        };
        // What is added to the token's row has the width of the sum.
        let width = added;
        let at = parameters.at("positions");
        let positions = Positions::new(spec.position, spec.length, width, at)?;
        let token_types = match spec.token_types {
            0 => None,
            count => Some(
                parameters
                    .at("token_types")
                    .tensor("weight", &[count, width], init)?,
            ),
        };
        let norm = match &spec.norm {
            Some(norm) => Norm::new(norm, width, parameters.at("norm"))?,
            None => Norm::None,
        };
        Ok(Self {
            spec: spec.clone(),
            tokens,
            projection,
            positions,
            token_types,
            norm,
        })
    }

    fn forward(
        &self,
        ids: &Tensor,
        token_types: Option<&Tensor>,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let (batch, length) = engine(ids.dims2())?;
        let end = cx.offset + length;
        if length == 0 {
            return Err(Error::spec("input length", 0, "at least 1 token"));
        }
        if end > self.spec.length {
            return Err(Error::spec(
                "input length",
                end,
                format!(
                    "at most {} tokens, the length of the model",
                    self.spec.length
                ),
            ));
        }
        check_ids("input_ids", ids, self.spec.vocabulary)?;
        let mut x = Signal::from(look_up(&self.tokens, ids)?);
        let early = self.spec.projected == Projected::Token;
        if let Some(projection) = self.projection.as_ref().filter(|_| early) {
            x = cx.trace.site(format_args!("embeddings.tokens"), x)?;
            x = x.linear(projection)?;
        }
        if let Some(table) = &self.token_types {
            let types = match token_types {
                Some(types) => {
                    check_ids("token_type_ids", types, self.spec.token_types)?;
                    look_up(table, types)?
                }
                None => engine(table.narrow(0, 0, 1))?,
            };
            x = x.add_constant(&types)?;
        } else if token_types.is_some() {
            return Err(Error::spec(
                "token_type_ids",
                "given",
                "absent: this model has no token types",
            ));
        }
        let like = x.value();
        if let Some(positions) = self.positions.of([batch, length], like, cx)? {
            x = x.add_constant(&positions)?;
        }
        let x = self.norm.forward(&x)?;
        match self.projection.as_ref().filter(|_| !early) {
            None => Ok(x),
            Some(projection) => {
                let x = cx.trace.site(format_args!("embeddings.sum"), x)?;
                Ok(x.linear(projection)?)
            }
        }
    }
}

fn check_ids(what: &str, ids: &Tensor, count: usize) -> Result<()> {
    let largest = engine(engine(engine(ids.flatten_all())?.max(0))?.to_scalar::<u32>())?;
    if largest as usize >= count {
        return Err(Error::spec(what, largest, format!("below {count}")));
    }
    Ok(())
}

/// Rows of `table` `[rows, width]` at `ids` `[.., ]`, giving `[.., width]`.
pub(crate) fn look_up(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    Ok(lapidary_kernels::embedding(table, ids)?)
}

#[derive(Debug)]
pub(crate) struct PatchEmbedding {
    spec: PatchInput,
    projection: Linear,
    class_tokens: Option<Tensor>,
    positions: Tensor,
    norm: Norm,
}

impl PatchEmbedding {
    fn new(spec: &PatchInput, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let init = Init::Normal { deviation: 0.02 };
        let features = spec.channels * spec.patch * spec.patch;
        let projection = parameters.linear("patches", "pixels", features, width, spec.bias)?;
        let class_tokens = match spec.class_tokens {
            0 => None,
            count => Some(parameters.tensor("class_tokens", &[count, width], init)?),
        };
        let tokens = spec.patches() + spec.class_tokens;
        let positions = parameters
            .at("positions")
            .tensor("weight", &[tokens, width], init)?;
        let norm = match &spec.norm {
            Some(norm) => Norm::new(norm, width, parameters.at("norm"))?,
            None => Norm::None,
        };
        Ok(Self {
            spec: spec.clone(),
            projection,
            class_tokens,
            positions,
            norm,
        })
    }

    fn forward(&self, pixels: &Tensor, cx: &Context<'_>) -> Result<Signal> {
        let [height, width] = self.spec.image;
        let (channels, patch) = (self.spec.channels, self.spec.patch);
        let batch = match pixels.dims() {
            [batch, c, h, w] if [*c, *h, *w] == [channels, height, width] => *batch,
            found => {
                let expected = format!("[batch, {channels}, {height}, {width}]");
                return Err(Error::spec("pixel_values shape", found, expected));
            }
        };
        let (rows, columns) = (height / patch, width / patch);
        // [batch, channels, rows, patch, columns, patch] -> [batch, rows, columns, channels,
        // patch, patch], so that a patch is one row of pixels in the order of a convolution.
        let cut = engine(pixels.reshape(vec![batch, channels, rows, patch, columns, patch]))?;
        let cut = engine(cut.permute(vec![0, 2, 4, 1, 3, 5]))?;
        let cut = engine(cut.reshape((batch, rows * columns, channels * patch * patch)))?;
        let cut = Signal::from(cut);
        let cut = cx.trace.site(format_args!("embeddings.pixels"), cut)?;
        let mut x = cut.linear(&self.projection)?;
        if let Some(tokens) = &self.class_tokens {
            let (count, features) = engine(tokens.dims2())?;
            let tokens =
                engine(engine(tokens.unsqueeze(0))?.broadcast_as((batch, count, features)))?;
            x = Signal::concatenate(&[Signal::from(tokens), x], 1)?;
        }
        self.norm.forward(&x.add_constant(&self.positions)?)
    }
}
