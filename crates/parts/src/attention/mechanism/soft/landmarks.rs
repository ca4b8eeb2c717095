//! A few points in the place of all queries.

use super::SoftSpec;
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{
    Activation, Device, RowPooling, Shape, Tensor, activate, layer_norm, linear, pooled_rows,
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

    /// The window that each of `length` tokens is in.
    fn owners(self, ratio: usize, length: usize) -> impl Iterator<Item = usize> {
        let [high, wide] = self.window(ratio);
        let across = self.columns.div_ceil(wide);
        (0..length).map(move |token| {
            let (row, column) = (token / self.columns, token % self.columns);
            row / high * across + column / wide
        })
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
    /// `[batch, 1, landmark, 1]`, 0 for those that stand for no token; nothing where all do.
    pub(super) kept: Option<Tensor>,
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

    /// Landmarks of queries `q` `[batch, heads, length, head_width]`, of those that are `real` in each
    /// sequence where pads are among them. What is learned is of queries multiplied by `root`, and its
    /// landmarks are divided by it again.
    pub(super) fn points(
        &self,
        q: &Tensor,
        root: f64,
        real: Option<&[Vec<bool>]>,
        grid: Grid,
    ) -> Result<Points> {
        let (batch, _, length, width) = tensor(q.dims4())?;
        let owners = |ratio: usize| {
            let owners: Vec<usize> = grid.owners(ratio, length).collect();
            (0..batch).flat_map(move |sequence| {
                let real = real.and_then(|real| real.get(sequence));
                let of = owners.iter().enumerate().map(|(token, owner)| {
                    let is_real = real.is_none_or(|real| real.get(token) == Some(&true));
                    is_real.then_some(*owner)
                });
                of.collect::<Vec<_>>()
            })
        };
        let groups = |of: Vec<Option<usize>>, count| Groups::new(&of, length, count);
        match self {
            Self::Mean { ratio } => {
                let groups = groups(owners(*ratio).collect(), grid.windows(*ratio));
                Ok(Points {
                    points: groups.means(q)?,
                    kept: groups.used(q)?,
                    operations: length * width,
                })
            }
            Self::Convolution {
                ratio,
                weight,
                norm: [scale, shift],
            } => {
                let windows = grid.windows(*ratio);
                let groups = groups(owners(*ratio).collect(), windows);
                let mapped = mapped(q, real, grid, weight, *ratio)?;
                let normed = layer_norm(
                    &tensor(mapped * root)?,
                    Some(scale),
                    Some(shift),
                    NORM_EPSILON,
                )?;
                let places = grid.window(*ratio).into_iter().product::<usize>();
                Ok(Points {
                    points: tensor(activate(&normed, Activation::Gelu)? / root)?,
                    kept: groups.used(q)?,
                    operations: windows * (2 * places * width * width + 11 * width),
                })
            }
            Self::Segments { count } => {
                let count = (*count).min(length).max(1);
                let groups = groups(segments(batch, length, count, real), count);
                Ok(Points {
                    points: groups.means(q)?,
                    kept: groups.used(q)?,
                    operations: length * width,
                })
            }
        }
    }
}

/// The tokens of each of `count` groups of each sequence.
struct Groups {
    members: Vec<Vec<usize>>,
    count: usize,
}

impl Groups {
    /// Of the group that each token of each sequence is in, `[batch, length]`.
    fn new(of: &[Option<usize>], length: usize, count: usize) -> Self {
        let mut members = vec![Vec::new(); of.len() / length.max(1) * count];
        for (at, group) in of.iter().enumerate() {
            let (sequence, token) = (at / length, at % length);
            if let Some(group) = group
                && let Some(members) = members.get_mut(sequence * count + group)
            {
                members.push(token);
            }
        }
        Self { members, count }
    }

    /// The mean of each group, `[batch, heads, group, width]`, of `q` `[batch, heads, length, width]`; zeros for
    /// one without tokens.
    fn means(&self, q: &Tensor) -> Result<Tensor> {
        let (batch, heads, length, width) = tensor(q.dims4())?;
        let (mut rows, mut ends) = (Vec::new(), Vec::new());
        for (sequence, members) in self.members.chunks(self.count.max(1)).enumerate() {
            for head in 0..heads {
                let first = (sequence * heads + head) * length;
                for members in members {
                    rows.extend(members.iter().map(|token| (first + token) as u32));
                    ends.push(rows.len());
                }
            }
        }
        let means = pooled_rows(q, rows, ends, RowPooling::Mean)?;
        tensor(means.reshape((batch, heads, self.count, width)))
    }

    /// 1 for groups that have a token, `[batch, 1, group, 1]`; nothing where all of them do.
    fn used(&self, like_this: &Tensor) -> Result<Option<Tensor>> {
        let used = self.members.iter().map(|group| !group.is_empty());
        let used: Vec<f64> = used.map(|used| f64::from(u8::from(used))).collect();
        if !used.contains(&0.0) {
            return Ok(None);
        }
        let batch = used.len() / self.count.max(1);
        let shape = (batch, 1, self.count, 1);
        Ok(Some(like(used, shape, like_this)?))
    }
}

/// Numbers as a tensor on the device and of the type of `x`.
pub(super) fn like(values: Vec<f64>, shape: impl Into<Shape>, x: &Tensor) -> Result<Tensor> {
    let values = tensor(Tensor::from_vec(values, shape.into(), &Device::Cpu))?;
    tensor(tensor(values.to_dtype(x.dtype()))?.to_device(x.device()))
}

/// Windows of queries under the learned map, `[batch, heads, window, head_width]`.
fn mapped(
    q: &Tensor,
    real: Option<&[Vec<bool>]>,
    grid: Grid,
    weight: &Tensor,
    ratio: usize,
) -> Result<Tensor> {
    let (batch, heads, length, width) = tensor(q.dims4())?;
    let q = match real {
        None => q.clone(),
        Some(real) => {
            let kept = real.iter().flatten().map(|real| f64::from(u8::from(*real)));
            let kept = like(kept.collect(), (batch, 1, length, 1), q)?;
            tensor(q.broadcast_mul(&kept))?
        }
    };
    let windows = grid.windows(ratio);
    let places = grid.window(ratio).into_iter().product::<usize>();
    let cut = grid.cut(&q, ratio)?;
    let cut = tensor(cut.reshape((batch, heads, windows, places * width)))?;
    // Features of a place lie together here, those of a filter apart.
    let weight = tensor(weight.reshape((width, width, places)))?;
    let weight = tensor(tensor(weight.transpose(1, 2))?.contiguous())?;
    let weight = tensor(weight.reshape((width, places * width)))?;
    Ok(linear(&cut, &weight, None)?)
}

/// Which of `count` equal parts of the real tokens of its sequence each token is in.
fn segments(
    batch: usize,
    length: usize,
    count: usize,
    real: Option<&[Vec<bool>]>,
) -> Vec<Option<usize>> {
    let mut owners = Vec::with_capacity(batch * length);
    for sequence in 0..batch {
        let real = real.and_then(|real| real.get(sequence));
        let is_real = |token: usize| real.is_none_or(|real| real.get(token) == Some(&true));
        let tokens = (0..length).filter(|token| is_real(*token)).count();
        let parts = count.min(tokens);
        let mut before = 0;
        owners.extend((0..length).map(|token| {
            is_real(token).then(|| {
                before += 1;
                (before - 1) * parts / tokens
            })
        }));
    }
    owners
}

/// Refuses filters without a middle.
pub(super) fn odd(field: String, taps: usize, most: usize) -> Result<()> {
    match taps % 2 == 1 && taps <= most {
        true => Ok(()),
        false => Err(Error::spec(field, taps, format!("odd and at most {most}"))),
    }
}
