//! Sums of a few rows of a few signals.

use crate::error::tensor;
use crate::meter::bytes_of;
use crate::{Error, Lens, Result, Signal};
use lapidary_kernels::{RowSums, RowTerm, Tensor, summed_rows};

impl Signal {
    /// The rows that `sums` says of `sources` `[rows, width]`: gathered, weighted and added up, `[rows, width]`.
    ///
    /// One kernel where no lens looks at the terms; otherwise a sum of what each source gives, a linear map of it.
    ///
    /// # Errors
    /// When there is no source, shapes don't fit, or a term names a row that is not there.
    pub fn summed_rows(sources: &[&Self], sums: RowSums) -> Result<Self> {
        let looked_at = |lens: &Lens| !matches!(lens, Lens::Plain | Lens::Meter(..));
        if sources.iter().any(|source| looked_at(&source.lens)) {
            return Self::sums_of_each(sources, &sums);
        }
        let values: Vec<&Tensor> = sources.iter().map(|source| &source.value).collect();
        let terms = sums.terms().len();
        let value = summed_rows(&values, sums)?;
        let metered = sources.iter().find_map(|source| match &source.lens {
            Lens::Meter(meter, _) => Some(meter),
            _ => None,
        });
        let Some(meter) = metered else {
            return Ok(Self::from(value));
        };
        let width = value.dims().last().copied().unwrap_or(0);
        let read = terms * width;
        let bytes = (read * value.dtype().size_in_bytes()) as u64 + bytes_of(&value);
        meter.count(2 * read as u64, bytes);
        Ok(Self::from(value).into_metered(meter.clone()))
    }

    fn sums_of_each(sources: &[&Self], sums: &RowSums) -> Result<Self> {
        let mut total: Option<Self> = None;
        for (index, source) in sources.iter().enumerate() {
            if !sums.terms().iter().any(|term| term.source == index) {
                continue;
            }
            let own = sums
                .filtered(|term| (term.source == index).then_some(RowTerm { source: 0, ..term }));
            let part = source.summed(
                2,
                &|t, shift| match shift {
                    0 => Ok(summed_rows(&[t], own.clone())?),
                    _ => {
                        let streams = tensor(t.dim(0))?;
                        let each = (0..streams).map(|stream| {
                            Ok(summed_rows(&[&tensor(t.get(stream))?], own.clone())?)
                        });
                        tensor(Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0))
                    }
                },
                |axis| (axis != 0).then_some(axis),
            )?;
            total = Some(match total {
                None => part,
                Some(total) => total.add(&part)?,
            });
        }
        match (total, sources) {
            (Some(total), _) => Ok(total),
            // No terms at all.
            (None, [first, ..]) => Ok(Self::from(
                summed_rows(&[&first.value], sums.clone())?.detach(),
            )),
            (None, []) => Err(Error::invalid("sources of rows", 0, "at least 1")),
        }
    }
}
