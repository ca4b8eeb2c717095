//! What is added to the embeddings of tokens for where they stand.

use crate::input::{engine, look_up};
use crate::spec::AbsolutePosition;
use lapidary_kernels::{DType, Tensor};
use lapidary_parts::parameters::{Init, Parameters};
use lapidary_parts::{Context, Error, Result};

/// [`AbsolutePosition`] with its tables.
#[derive(Debug)]
pub(crate) struct Positions {
    spec: AbsolutePosition,
    width: usize,
    /// One where positions are learned; of an axial kind those of rows, columns and channels.
    tables: Vec<Tensor>,
}

impl Positions {
    pub(crate) fn new(
        spec: AbsolutePosition,
        length: usize,
        width: usize,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let mut table = |name: &str, rows: usize, width: usize| {
            parameters.tensor(name, &[rows, width], Init::USUAL)
        };
        let tables = match spec {
            AbsolutePosition::None | AbsolutePosition::Sinusoidal => Vec::new(),
            AbsolutePosition::Learned { offset, .. } => {
                vec![table("weight", length + offset, width)?]
            }
            AbsolutePosition::Axial {
                columns,
                channels,
                row_width,
            } => {
                let rows = length.div_ceil(columns.saturating_mul(channels).max(1));
                let (of_rows, of_columns) = match row_width {
                    Some(row_width) => (row_width, width - row_width),
                    None => (width, width),
                };
                let mut tables = vec![
                    table("rows", rows, of_rows)?,
                    table("columns", columns, of_columns)?,
                ];
                if channels > 1 {
                    tables.push(table("channels", channels, width)?);
                }
                tables
            }
        };
        Ok(Self {
            spec,
            width,
            tables,
        })
    }

    /// What is added to `length` tokens from the context's offset on, `[length, width]` or
    /// `[batch, length, width]`, of the kind of `like`.
    pub(crate) fn of(
        &self,
        [batch, length]: [usize; 2],
        like: &Tensor,
        cx: &Context<'_>,
    ) -> Result<Option<Tensor>> {
        match self.spec {
            AbsolutePosition::None => Ok(None),
            AbsolutePosition::Sinusoidal => self.sinusoidal(length, like, cx).map(Some),
            AbsolutePosition::Learned {
                offset,
                skip_padding,
            } => self
                .learned([batch, length], offset, skip_padding, like, cx)
                .map(Some),
            AbsolutePosition::Axial {
                columns,
                channels,
                row_width,
            } => {
                let at = (cx.offset..cx.offset + length).collect::<Vec<_>>();
                let place = |of: &dyn Fn(usize) -> usize| -> Result<Tensor> {
                    let indices: Vec<u32> = at.iter().map(|t| of(*t) as u32).collect();
                    engine(Tensor::from_vec(indices, length, like.device()))
                };
                let indices = [
                    place(&|t| t / (columns * channels))?,
                    place(&|t| t / channels % columns)?,
                    place(&|t| t % channels)?,
                ];
                let each = self.tables.iter().zip(&indices);
                let each = each.map(|(table, at)| look_up(table, at));
                let each = each.collect::<Result<Vec<_>>>()?;
                if row_width.is_some() {
                    return Ok(Some(engine(Tensor::cat(&each, 1))?));
                }
                let mut sum: Option<Tensor> = None;
                for part in each {
                    sum = Some(match sum {
                        Some(sum) => engine(sum + part)?,
                        None => part,
                    });
                }
                Ok(sum)
            }
        }
    }

    fn learned(
        &self,
        [batch, length]: [usize; 2],
        offset: usize,
        skip_padding: bool,
        like: &Tensor,
        cx: &Context<'_>,
    ) -> Result<Tensor> {
        let [table] = self.tables.as_slice() else {
            return Err(Error::spec("table of positions", "absent", "built"));
        };
        match cx.key_padding.filter(|_| skip_padding) {
            Some(padding) => {
                let rows = rows_without_padding(padding, batch, length, cx.offset, offset)?;
                let rows = engine(Tensor::from_vec(rows, (batch, length), like.device()))?;
                look_up(table, &rows)
            }
            None => engine(table.narrow(0, offset + cx.offset, length)),
        }
    }

    fn sinusoidal(&self, length: usize, like: &Tensor, cx: &Context<'_>) -> Result<Tensor> {
        let half = self.width / 2;
        let values: Vec<f32> = (cx.offset..cx.offset + length)
            .flat_map(|t| (0..self.width).map(move |i| (t, i)))
            .map(|(t, i)| {
                let rate = 10_000f64.powf(-2.0 * (i / 2) as f64 / (2 * half) as f64);
                let angle = t as f64 * rate;
                let wave = match i.is_multiple_of(2) {
                    true => angle.sin(),
                    false => angle.cos(),
                };
                wave as f32
            })
            .collect();
        let table = engine(Tensor::from_vec(
            values,
            (length, self.width),
            like.device(),
        ))?;
        engine(table.to_dtype(like.dtype()))
    }
}

/// Rows of the position table when padding is not counted: real token `i` of a sequence takes
/// row `offset + i`, a pad row `offset − 1`.
fn rows_without_padding(
    padding: &Tensor,
    batch: usize,
    length: usize,
    earlier: usize,
    offset: usize,
) -> Result<Vec<u32>> {
    let keep = engine(engine(padding.to_dtype(DType::U8))?.to_vec2::<u8>())?;
    let mut rows = Vec::with_capacity(batch * length);
    for sequence in &keep {
        let mut seen = 0;
        for (index, kept) in sequence.iter().enumerate() {
            let row = if *kept == 0 {
                offset.saturating_sub(1)
            } else {
                offset + seen
            };
            seen += usize::from(*kept != 0);
            if index >= earlier {
                rows.push(row as u32);
            }
        }
    }
    if rows.len() != batch * length {
        let expected = format!("[{batch}, {}]", earlier + length);
        return Err(Error::spec(
            "attention_mask shape",
            padding.dims(),
            expected,
        ));
    }
    Ok(rows)
}
