//! From the last hidden vectors to scores.

use std::sync::Arc;

use crate::input::{Embedding, Input};
use crate::spec::{HeadSpec, HeadTransform, Pool};
use lapidary_kernels::{Activation, D, DType, Tensor};
use lapidary_parts::norm::Norm;
use lapidary_parts::parameters::{Init, Parameters};
use lapidary_parts::{Context, Error, Result};
use lapidary_signal::{Linear, Signal, Trace, Weight};

fn engine<T, E: Into<lapidary_kernels::Error>>(result: std::result::Result<T, E>) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

/// Sites of a language model's head, written where it has such a layer.
const TRANSFORMED: &str = "transformed";
const PROJECTED: &str = "projected";

/// The site of the second pooled vector, for [`Pool::FirstTwo`].
const SECOND: &str = "head.second";

/// The last layer of a model.
#[derive(Debug)]
pub(crate) enum Head {
    None,
    LanguageModel {
        transform: Option<Box<(Linear, Activation, Norm)>>,
        projection: Option<Linear>,
        output: Linear,
    },
    Pooled {
        pool: Pool,
        norm: Norm,
        hidden: Option<(Linear, Activation)>,
        /// One, or for [`Pool::FirstTwo`] two.
        outputs: Vec<Linear>,
    },
    Pixels {
        /// Tokens before those of patches.
        before: usize,
        output: Linear,
    },
}

/// What the head makes.
#[derive(Default)]
pub(crate) struct HeadOutput {
    pub(crate) pooled: Option<Signal>,
    pub(crate) logits: Option<Signal>,
    pub(crate) pixels: Option<Signal>,
}

impl Head {
    /// For a model of `width` whose head reads vectors of `read`.
    pub(crate) fn new(
        spec: &HeadSpec,
        [width, read]: [usize; 2],
        embedding: &Embedding,
        mut root: Parameters<'_>,
    ) -> Result<Self> {
        match spec {
            HeadSpec::None => Ok(Self::None),
            HeadSpec::Pixels => {
                let patches = embedding
                    .patches()
                    .ok_or_else(|| Error::spec("head.kind", "pixels", "a head for tokens"))?;
                // Named from the root, where its input's site is.
                let from = "pixels.in";
                Ok(Self::Pixels {
                    before: patches.class_tokens,
                    output: root.linear("head.output", from, read, patches.pixels(), true)?,
                })
            }
            HeadSpec::LanguageModel {
                tied,
                bias,
                transform,
            } => {
                let table = embedding.table().ok_or_else(|| {
                    Error::spec("head.kind", "language-model", "a head for patches")
                })?;
                let (vocabulary, table_width) = engine(table.dims2())?;
                let mut parameters = root.at("head");
                let mut site = "in";
                let transform = match transform {
                    None => None,
                    Some(HeadTransform {
                        activation,
                        norm,
                        narrows,
                    }) => {
                        let to = if *narrows { table_width } else { read };
                        let dense = parameters.linear("transform", site, read, to, true)?;
                        site = TRANSFORMED;
                        let norm = Norm::new(norm, to, parameters.at("norm"))?;
                        Some(Box::new((dense, (*activation).into(), norm)))
                    }
                };
                // An output of its own reads more than the model's width as it comes.
                let scored = match !*tied && table_width == width && !spec.narrows() {
                    true => read,
                    false => table_width,
                };
                let projection = if scored == read || spec.narrows() {
                    None
                } else {
                    let linear = parameters.linear("projection", site, read, scored, false)?;
                    site = PROJECTED;
                    Some(linear)
                };
                let output = if *tied {
                    let bias = match bias {
                        true => Some(parameters.at("output").tensor(
                            "bias",
                            &[vocabulary],
                            Init::Zeros,
                        )?),
                        false => None,
                    };
                    Linear::from_weight(Weight::dense(table.clone()), bias)?
                } else {
                    parameters.linear("output", site, scored, vocabulary, *bias)?
                };
                Ok(Self::LanguageModel {
                    transform,
                    projection,
                    output,
                })
            }
            HeadSpec::Pooled {
                pool,
                norm,
                hidden,
                labels,
                bias,
            } => {
                let mut parameters = root.at("head");
                let norm = match norm {
                    Some(norm) => Norm::new(norm, read, parameters.at("norm"))?,
                    None => Norm::None,
                };
                let hidden = match hidden {
                    Some(activation) => Some((
                        parameters.linear("hidden", "in", read, read, true)?,
                        (*activation).into(),
                    )),
                    None => None,
                };
                let mut outputs = Vec::new();
                if let Some(labels) = *labels {
                    // Named from the root, where the pooled vector's site is.
                    outputs.push(root.linear("head.output", "pooled", read, labels, *bias)?);
                    if *pool == Pool::FirstTwo {
                        let second = "head.second_output";
                        outputs.push(root.linear(second, SECOND, read, labels, *bias)?);
                    }
                }
                Ok(Self::Pooled {
                    pool: *pool,
                    norm,
                    hidden,
                    outputs,
                })
            }
        }
    }

    /// Scores of `hidden` `[batch, length, width]`.
    pub(crate) fn forward(
        &self,
        hidden: &Signal,
        input: &Input,
        cx: &Context<'_>,
    ) -> Result<HeadOutput> {
        match self {
            Self::None => Ok(HeadOutput::default()),
            Self::Pixels { before, output } => {
                let length = hidden.dims().get(1).copied().unwrap_or(0);
                let patches = hidden.narrow(1, *before, length.saturating_sub(*before))?;
                let patches = cx.trace.site(format_args!("pixels.in"), patches)?;
                let pixels = cx
                    .trace
                    .site(format_args!("pixels"), patches.linear(output)?)?;
                Ok(HeadOutput {
                    pixels: Some(pixels),
                    ..HeadOutput::default()
                })
            }
            Self::LanguageModel { .. } => Ok(HeadOutput {
                logits: Some(self.scores(hidden, cx)?),
                ..HeadOutput::default()
            }),
            Self::Pooled {
                pool: Pool::FirstTwo,
                outputs,
                ..
            } => {
                let at = |index| -> Result<Signal> { Ok(hidden.narrow(1, index, 1)?.squeeze(1)?) };
                let first = cx.trace.site(format_args!("pooled"), at(0)?)?;
                let second = cx.trace.site(format_args!("{SECOND}"), at(1)?)?;
                let [one, two] = outputs.as_slice() else {
                    return Err(Error::spec("head.labels", "absent", "a number"));
                };
                let logits = first
                    .linear_scores(one)?
                    .add(&second.linear_scores(two)?)?
                    .scale(0.5)?;
                let logits = cx.trace.site(format_args!("logits"), logits)?;
                Ok(HeadOutput {
                    pooled: Some(first),
                    logits: Some(logits),
                    pixels: None,
                })
            }
            Self::Pooled {
                pool,
                norm,
                hidden: dense,
                outputs,
            } => {
                let x = norm.forward(&pool_tokens(*pool, hidden, input, cx)?)?;
                let mut x = cx.trace.site(format_args!("head.in"), x)?;
                if let Some((dense, activation)) = dense {
                    x = x.linear(dense)?.activate(*activation)?;
                }
                let pooled = cx.trace.site(format_args!("pooled"), x)?;
                let logits = match outputs.first() {
                    Some(output) => Some(
                        cx.trace
                            .site(format_args!("logits"), pooled.linear_scores(output)?)?,
                    ),
                    None => None,
                };
                Ok(HeadOutput {
                    pooled: Some(pooled),
                    logits,
                    pixels: None,
                })
            }
        }
    }
}

impl Head {
    /// Scores of `hidden` `[batch, length, width]` by a language model's head, each position by itself.
    fn scores(&self, hidden: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let Self::LanguageModel {
            transform,
            projection,
            output,
        } = self
        else {
            return Err(Error::spec("head.kind", "another", "language-model"));
        };
        let mut x = cx.trace.site(format_args!("head.in"), hidden.clone())?;
        if let Some((dense, activation, norm)) = transform.as_deref() {
            x = norm.forward(&x.linear(dense)?.activate(*activation)?)?;
            x = cx.trace.site(format_args!("head.{TRANSFORMED}"), x)?;
        }
        if let Some(projection) = projection {
            x = x.linear(projection)?;
            x = cx.trace.site(format_args!("head.{PROJECTED}"), x)?;
        }
        Ok(cx
            .trace
            .site(format_args!("logits"), x.linear_scores(output)?)?)
    }
}

/// The head of a language model by itself: see [`Model::scorer`](crate::Model::scorer).
#[derive(Clone, Debug)]
pub struct Scorer(Arc<Head>);

impl Scorer {
    pub(crate) fn new(head: &Arc<Head>) -> Result<Self> {
        match **head {
            Head::LanguageModel { .. } => Ok(Self(head.clone())),
            _ => Err(Error::spec("head.kind", "another", "language-model")),
        }
    }

    /// Scores `[batch, length, vocabulary]` of `hidden` `[batch, length, width]`, each position by itself.
    ///
    /// # Errors
    /// When the width is not that of what the head reads.
    pub fn scores(&self, hidden: &Signal) -> Result<Signal> {
        self.0.scores(hidden, &Context::new(&Trace::new()))
    }
}

/// `[batch, length, width] -> [batch, width]`.
fn pool_tokens(pool: Pool, hidden: &Signal, input: &Input, cx: &Context<'_>) -> Result<Signal> {
    let (batch, length, _) = engine(hidden.value().dims3())?;
    let keep = match cx.key_padding {
        Some(padding) => engine(engine(padding.to_dtype(DType::U8))?.to_vec2::<u8>())?,
        None => vec![vec![1; length]; batch],
    };
    let chosen: Vec<usize> = match pool {
        Pool::First | Pool::FirstTwo => return Ok(hidden.narrow(1, 0, 1)?.squeeze(1)?),
        Pool::Mean => {
            let weights: Vec<f64> = keep
                .iter()
                .flat_map(|row| {
                    let count = row.iter().filter(|kept| **kept != 0).count().max(1) as f64;
                    row.iter()
                        .map(move |kept| f64::from(u8::from(*kept != 0)) / count)
                })
                .collect();
            let weights = engine(Tensor::from_vec(
                weights,
                (batch, length, 1),
                hidden.device(),
            ))?;
            let weights = engine(weights.to_dtype(hidden.dtype()))?;
            return Ok(hidden.weighted_sum(&weights, 1)?);
        }
        Pool::Last => keep
            .iter()
            .map(|row| row.iter().rposition(|kept| *kept != 0).unwrap_or(0))
            .collect(),
        Pool::AtToken(id) => {
            let Input::Tokens { ids, .. } = input else {
                return Err(Error::spec("head.pool", pool, "first or mean for pixels"));
            };
            let rows = engine(ids.to_vec2::<u32>())?;
            let first = |row: &Vec<u32>| row.iter().position(|token| *token == id).unwrap_or(0);
            rows.iter().map(first).collect()
        }
        Pool::HighestId => {
            let Input::Tokens { ids, .. } = input else {
                return Err(Error::spec(
                    "head.pool",
                    "highest-id",
                    "first or mean for pixels",
                ));
            };
            // `argmax` gives the first of equal ids, as CLIP's text model expects.
            let chosen = engine(engine(ids.argmax(D::Minus1))?.to_vec1::<u32>())?;
            chosen.into_iter().map(|index| index as usize).collect()
        }
    };
    let mut rows = Vec::with_capacity(batch);
    for (example, index) in chosen.into_iter().enumerate() {
        rows.push(
            hidden
                .narrow(0, example, 1)?
                .narrow(1, index, 1)?
                .squeeze(1)?,
        );
    }
    Ok(Signal::concatenate(&rows, 0)?)
}
