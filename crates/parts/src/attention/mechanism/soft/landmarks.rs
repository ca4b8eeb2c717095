//! A few points in the place of all queries.

use super::SoftSpec;
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{
    Activation, DType, Device, Shape, Tensor, activate, layer_norm, linear, matmul,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_RATIO: usize = 1 << 10;
const MAX_COUNT: usize = 1 << 16;
const NORM_EPSILON: f64 = 1e-5;

/// What landmarks are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Landmarks {
    /// Windows of `ratio` tokens, or of `ratio` by `ratio` on an image, by one learned map for all
    /// heads, layer norm and GELU.
    Convolution {
        /// Side of a window.
        ratio: usize,
    },
    /// The means of such windows.
    Mean {
        /// Side of a window.
        ratio: usize,
    },
    /// The means of so many equal parts of the sequence, however long it is.
    Segments {
        /// Landmarks.
        count: usize,
    },
}

impl Landmarks {
    pub(super) fn validate(self, field: &str) -> Result<()> {
        match self {
            Self::Convolution { ratio } | Self::Mean { ratio } => {
                bounded(format!("{field}.ratio"), ratio, 1..=MAX_RATIO)
            }
            Self::Segments { count } => bounded(format!("{field}.count"), count, 1..=MAX_COUNT),
        }
    }
}

/// How the tokens of a sequence lie: in rows of an image, or in a line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) is_line: bool,
}

impl Grid {
    pub(super) fn new(spec: &SoftSpec, length: usize) -> Self {
        match spec.columns {
            None => Self {
                rows: 1,
                columns: length,
                is_line: true,
            },
            Some(columns) => Self {
                rows: length.div_ceil(columns),
                columns,
                is_line: false,
            },
        }
    }

    /// Height and width of a window with sides of `ratio`.
    fn window(self, ratio: usize) -> [usize; 2] {
        match self.is_line {
            true => [1, ratio],
            false => [ratio; 2],
        }
    }

    /// Windows of the grid.
    fn windows(self, ratio: usize) -> usize {
        let [height, width] = self.window(ratio);
        self.rows.div_ceil(height) * self.columns.div_ceil(width)
    }

    /// `[batch, heads, rows, columns, width]` of `x` `[batch, heads, length, width]`, zeros behind the
    /// last token.
    pub(super) fn lay(self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let (batch, heads, length, width) = x.dims4()?;
        let x = x.pad_with_zeros(2, 0, self.rows * self.columns - length)?;
        Ok(x.contiguous()?
            .reshape((batch, heads, self.rows, self.columns, width))?)
    }

    /// `x` `[batch, heads, length, width]` by windows, `[batch, heads, window, place, width]`, zeros
    /// where there is no token.
    fn cut(self, x: &Tensor, ratio: usize) -> lapidary_kernels::Result<Tensor> {
        let (batch, heads, _, width) = x.dims4()?;
        let [high, wide] = self.window(ratio);
        let (down, across) = (self.rows.div_ceil(high), self.columns.div_ceil(wide));
        let x = self.lay(x)?;
        let x = x.pad_with_zeros(2, 0, down * high - self.rows)?;
        let x = x.pad_with_zeros(3, 0, across * wide - self.columns)?;
        let x = x
            .contiguous()?
            .reshape(&[batch * heads, down, high, across, wide, width][..])?;
        let x = x.permute(vec![0, 1, 3, 2, 4, 5])?.contiguous()?;
        Ok(x.reshape((batch, heads, down * across, high * wide, width))?)
    }
}

/// Landmarks of the sequences of a pass.
pub(super) struct Points {
    /// `[batch, heads, landmark, head_width]`.
    pub(super) points: Tensor,
    /// `[batch, 1, landmark, 1]`, 0 for those that stand for no token.
    pub(super) kept: Tensor,
    /// Operations of one head of one sequence.
    pub(super) operations: usize,
}

/// The map from queries to landmarks.
#[derive(Debug)]
pub(super) enum Pooling {
    Convolution {
        ratio: usize,
        /// `[head_width, head_width, ratio]`, or `[head_width, head_width, ratio, ratio]`.
        weight: Tensor,
        norm: [Tensor; 2],
    },
    Mean {
        ratio: usize,
    },
    Segments {
        count: usize,
    },
}

impl Pooling {
    pub(super) fn new(
        spec: &SoftSpec,
        width: usize,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        Ok(match spec.landmarks {
            Landmarks::Convolution { ratio } => {
                let line = [width, width, ratio];
                let image = [width, width, ratio, ratio];
                let (shape, inputs) = match spec.columns {
                    None => (&line[..], width * ratio),
                    Some(_) => (&image[..], width * ratio * ratio),
                };
                let start = Init::Normal {
                    deviation: 1.0 / (inputs as f64).sqrt(),
                };
                Self::Convolution {
                    ratio,
                    weight: parameters.tensor("weight", shape, start)?,
                    norm: [
                        parameters.tensor("norm.weight", &[width], Init::Ones)?,
                        parameters.tensor("norm.bias", &[width], Init::Zeros)?,
                    ],
                }
            }
            Landmarks::Mean { ratio } => Self::Mean { ratio },
            Landmarks::Segments { count } => Self::Segments { count },
        })
    }

    /// Landmarks of queries `q` `[batch, heads, length, head_width]` that are zero where `kept`
    /// `[batch, 1, length, 1]` is.
    pub(super) fn points(&self, q: &Tensor, kept: &Tensor, grid: Grid) -> Result<Points> {
        let (batch, heads, length, width) = tensor(q.dims4())?;
        match self {
            Self::Mean { ratio } => {
                let sums = tensor(grid.cut(q, *ratio)?.sum(3))?;
                let counts = tensor(grid.cut(kept, *ratio)?.sum(3))?;
                Ok(Points {
                    points: tensor(sums.broadcast_div(&tensor(counts.maximum(1.0))?))?,
                    kept: tensor(counts.minimum(1.0))?,
                    operations: length * width,
                })
            }
            Self::Convolution {
                ratio,
                weight,
                norm: [scale, shift],
            } => {
                let windows = grid.windows(*ratio);
                let places = grid.window(*ratio).into_iter().product::<usize>();
                let cut = grid.cut(q, *ratio)?;
                let cut = tensor(cut.reshape((batch, heads, windows, places * width)))?;
                // Features of a place lie together here, those of a filter apart.
                let weight = tensor(weight.reshape((width, width, places)))?;
                let weight = tensor(tensor(weight.transpose(1, 2))?.contiguous())?;
                let weight = tensor(weight.reshape((width, places * width)))?;
                let mapped = linear(&cut, &weight, None)?;
                let normed = layer_norm(&mapped, Some(scale), Some(shift), NORM_EPSILON)?;
                let counts = tensor(grid.cut(kept, *ratio)?.sum(3))?;
                Ok(Points {
                    points: activate(&normed, Activation::Gelu)?,
                    kept: tensor(counts.minimum(1.0))?,
                    operations: windows * (2 * places * width * width + 9 * width),
                })
            }
            Self::Segments { count } => {
                let count = (*count).min(length).max(1);
                let (shares, used) = shares(kept, count)?;
                let used = like(used, (batch, 1, count, 1), q)?;
                let shares = like(shares, (batch, 1, count, length), q)?;
                Ok(Points {
                    points: matmul(&shares, q)?,
                    kept: used,
                    operations: 2 * count * length * width,
                })
            }
        }
    }
}

/// Numbers as a tensor on the device and of the type of `x`.
pub(super) fn like(values: Vec<f64>, shape: impl Into<Shape>, x: &Tensor) -> Result<Tensor> {
    let values = tensor(Tensor::from_vec(values, shape.into(), &Device::Cpu))?;
    tensor(tensor(values.to_dtype(x.dtype()))?.to_device(x.device()))
}

/// What each real token has of each of `count` equal parts of its sequence, `[batch, count, length]`,
/// and which parts have any, `[batch, count]`.
fn shares(kept: &Tensor, count: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let (batch, _, length, _) = tensor(kept.dims4())?;
    let kept = tensor(tensor(kept.to_dtype(DType::F64))?.reshape((batch, length)))?;
    let (mut shares, mut used) = (Vec::new(), Vec::new());
    for kept in tensor(kept.to_vec2::<f64>())? {
        let real: Vec<usize> = (0..length)
            .filter(|&place| kept.get(place).is_some_and(|kept| *kept > 0.0))
            .collect();
        let parts = count.min(real.len());
        for part in 0..count {
            let mut row = vec![0.0; length];
            let mine = (0..real.len()).filter(|token| token * parts / real.len() == part);
            let mine: Vec<usize> = mine.collect();
            for &token in &mine {
                if let Some(share) = real.get(token).and_then(|&place| row.get_mut(place)) {
                    *share = 1.0 / mine.len() as f64;
                }
            }
            used.push(f64::from(u8::from(!mine.is_empty())));
            shares.extend(row);
        }
    }
    Ok((shares, used))
}

/// Refuses filters without a middle.
pub(super) fn odd(field: String, taps: usize, most: usize) -> Result<()> {
    match taps % 2 == 1 && taps <= most {
        true => Ok(()),
        false => Err(Error::spec(field, taps, format!("odd and at most {most}"))),
    }
}
