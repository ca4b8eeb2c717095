//! From token ids or pixels to the first hidden vectors.

use crate::position::Positions;
use crate::resized::resized;
use crate::spec::{InputSpec, PatchInput, PatchPosition, Projected, TokenInput};
use lapidary_kernels::Tensor;
use lapidary_parts::dropout::{dropout, dropout_by_feature};
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

    /// The first hidden vectors; of patches those alone that are `visible` `[batch, patches]`, 1 = seen,
    /// where that is given.
    pub(crate) fn forward(
        &self,
        input: &Input,
        visible: Option<&Tensor>,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        match (self, input) {
            (Self::Tokens(_), _) if visible.is_some() => Err(Error::spec(
                "visible patches",
                "given",
                "absent for a model that reads tokens",
            )),
            (Self::Tokens(embedding), Input::Tokens { ids, token_types }) => {
                embedding.forward(ids, token_types.as_ref(), cx)
            }
            (Self::Patches(embedding), Input::Pixels(pixels)) => {
                embedding.forward(pixels, visible, cx)
            }
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

    /// How images are cut.
    pub(crate) fn patches(&self) -> Option<&PatchInput> {
        match self {
            Self::Tokens(_) => None,
            Self::Patches(embedding) => Some(&embedding.spec),
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
        let init = Init::USUAL;
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
        let x = match self.projection.as_ref().filter(|_| !early) {
            None => x,
            Some(projection) => {
                let x = cx.trace.site(format_args!("embeddings.sum"), x)?;
                x.linear(projection)?
            }
        };
        let site = format_args!("embeddings.dropout");
        match self.spec.dropout_by_feature {
            true => dropout_by_feature(&x, self.spec.dropout, site, cx),
            false => dropout(&x, self.spec.dropout, site, cx),
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
    /// Before and behind the projection.
    around: [Norm; 2],
    class_tokens: Option<Tensor>,
    /// `[width]`.
    mask_token: Option<Tensor>,
    /// `[tokens, width]`, where they are learned.
    positions: Option<Tensor>,
    norm: Norm,
}

impl PatchEmbedding {
    fn new(spec: &PatchInput, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let pixels = spec.pixels();
        let (site, around) = match &spec.around {
            None => ("pixels", [Norm::None, Norm::None]),
            Some(around) => (
                "normed_pixels",
                [
                    Norm::new(&around.pixels, pixels, parameters.at("pixel_norm"))?,
                    Norm::new(&around.patches, width, parameters.at("patch_norm"))?,
                ],
            ),
        };
        let projection = parameters.linear("patches", site, pixels, width, spec.bias)?;
        let init = Init::Normal {
            deviation: spec.deviation,
        };
        let class_tokens = match spec.class_tokens {
            0 => None,
            count => Some(parameters.tensor("class_tokens", &[count, width], init)?),
        };
        let mask_token = match spec.mask_token {
            true => {
                let small = Init::Normal { deviation: 0.02 };
                Some(parameters.tensor("mask_token", &[width], small)?)
            }
            false => None,
        };
        let positions = match spec.position {
            PatchPosition::Learned => {
                let tokens = spec.patches() + spec.class_tokens;
                let mut own = parameters.at("positions");
                Some(own.tensor("weight", &[tokens, width], init)?)
            }
            PatchPosition::SineCosine => None,
        };
        let norm = match &spec.norm {
            Some(norm) => Norm::new(norm, width, parameters.at("norm"))?,
            None => Norm::None,
        };
        Ok(Self {
            spec: spec.clone(),
            projection,
            around,
            class_tokens,
            mask_token,
            positions,
            norm,
        })
    }

    fn forward(
        &self,
        pixels: &Tensor,
        visible: Option<&Tensor>,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let cut = Signal::from(self.spec.cut(pixels)?);
        let (batch, _, _) = engine(cut.value().dims3())?;
        let cut = cx.trace.site(format_args!("embeddings.pixels"), cut)?;
        let [of_pixels, of_patches] = &self.around;
        let cut = match self.spec.around {
            None => cut,
            Some(_) => {
                let normed = of_pixels.forward(&cut)?;
                cx.trace
                    .site(format_args!("embeddings.normed_pixels"), normed)?
            }
        };
        let mut x = of_patches.forward(&cut.linear(&self.projection)?)?;
        if let Some(visible) = visible {
            x = self.masked(&x, visible)?;
        }
        if let Some(tokens) = &self.class_tokens {
            let (count, features) = engine(tokens.dims2())?;
            let tokens =
                engine(engine(tokens.unsqueeze(0))?.broadcast_as((batch, count, features)))?;
            x = Signal::concatenate(&[Signal::from(tokens), x], 1)?;
        }
        let positions = match &self.positions {
            Some(learned) => learned.clone(),
            None => waves(&self.spec, x.value())?,
        };
        let [height, width] = self.spec.image.map(|side| side / self.spec.patch.max(1));
        let before = self.spec.class_tokens;
        let positions = resized(&positions, before, [height, width], self.spec.grid(pixels)?)?;
        self.norm.forward(&x.add_constant(&positions)?)
    }

    /// `x` `[batch, patches, width]` with the mask token where a patch is not `visible`.
    fn masked(&self, x: &Signal, visible: &Tensor) -> Result<Signal> {
        let Some(token) = &self.mask_token else {
            let expected = "absent for a model without input.mask_token";
            return Err(Error::spec("visible patches", "given", expected));
        };
        let (batch, patches, _) = engine(x.value().dims3())?;
        if visible.dims() != [batch, patches] {
            let expected = format!("[{batch}, {patches}]");
            return Err(Error::spec(
                "shape of visible patches",
                visible.dims(),
                expected,
            ));
        }
        let keep = engine(engine(visible.to_dtype(x.dtype()))?.unsqueeze(2))?;
        let hidden = engine(engine(keep.affine(-1.0, 1.0))?.broadcast_mul(token))?;
        Ok(x.multiply_constant(&keep)?.add_constant(&hidden)?)
    }
}

/// [`PatchPosition::SineCosine`] `[tokens, width]` of images of the spec's size, of the kind of `like`
/// `[.., width]`.
fn waves(spec: &PatchInput, like: &Tensor) -> Result<Tensor> {
    let width = like.dims().last().copied().unwrap_or(0);
    let tokens = spec.class_tokens + spec.patches();
    let columns = (spec.image[1] / spec.patch).max(1);
    let quarter = width / 4;
    let mut table = vec![0f32; spec.class_tokens * width];
    for patch in 0..spec.patches() {
        for place in [patch % columns, patch / columns] {
            let angle = |i: usize| place as f64 / 10_000f64.powf(i as f64 / quarter as f64);
            table.extend((0..quarter).map(|i| angle(i).sin() as f32));
            table.extend((0..quarter).map(|i| angle(i).cos() as f32));
        }
    }
    let table = engine(Tensor::from_vec(table, (tokens, width), like.device()))?;
    engine(table.to_dtype(like.dtype()))
}
