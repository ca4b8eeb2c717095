//! What heads write on average, which stands in for a head that is taken out.

use std::collections::BTreeMap;

use super::node::{Place, attentions};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;

/// Mean values of heads over a reference corpus, by place.
#[derive(Clone, Debug, Default)]
pub struct Means {
    /// `[length, features]`, or `[1, features]` for the mean over positions too, by site.
    by_site: BTreeMap<String, Tensor>,
    length: Option<usize>,
}

impl Means {
    /// Means of zero: what a head writes is compared with nothing.
    pub fn zero() -> Self {
        Self::default()
    }

    /// Means over `inputs` for each position, as prompts of one template ask for.
    ///
    /// # Errors
    /// When the inputs differ in length, there are none, or the model has blocks without heads.
    pub fn by_position(model: &Model, inputs: &[&Input]) -> Result<Self> {
        Self::over(model, inputs, true)
    }

    /// Means over all positions of `inputs`.
    ///
    /// # Errors
    /// When there are no inputs, or the model has blocks without heads.
    pub fn over_positions(model: &Model, inputs: &[&Input]) -> Result<Self> {
        Self::over(model, inputs, false)
    }

    fn over(model: &Model, inputs: &[&Input], by_position: bool) -> Result<Self> {
        attentions(model)?;
        if inputs.is_empty() {
            return Err(Error::invalid("inputs to average over", "none", "some"));
        }
        let mut length = None;
        let mut rows = 0;
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        for input in inputs {
            let trace = Trace::new().capture("blocks.*.attention.{mixed,query,key,value}")?;
            let pass = Pass {
                trace: Some(&trace),
                ..Pass::default()
            };
            model.forward(input, pass)?;
            for (index, (site, record)) in trace.records().into_iter().enumerate() {
                // [batch, length, features]
                let value = record.signal.into_value().detach();
                let (batch, tokens, _) = engine(value.dims3())?;
                if by_position && *length.get_or_insert(tokens) != tokens {
                    let expected = "the same for all, or means over positions";
                    return Err(Error::invalid("length of an input", tokens, expected));
                }
                if index == 0 {
                    rows += if by_position { batch } else { batch * tokens };
                }
                let sum = match by_position {
                    true => engine(value.sum(0))?,
                    false => engine(engine(value.sum((0, 1)))?.unsqueeze(0))?,
                };
                let sum = match sums.remove(&site) {
                    Some(before) => engine(before + sum)?,
                    None => sum,
                };
                sums.insert(site, sum);
            }
        }
        let mean = |(site, sum): (String, Tensor)| Ok((site, engine(sum / rows as f64)?));
        Ok(Self {
            by_site: sums.into_iter().map(mean).collect::<Result<_>>()?,
            length,
        })
    }

    /// The mean at a place, `[length | 1, features]`; `None` for zero.
    pub(super) fn at(&self, place: Place, block: usize, length: usize) -> Result<Option<Tensor>> {
        if let Some(own) = self.length.filter(|own| *own != length) {
            let expected = format!("{own}, as of the inputs that were averaged over");
            return Err(Error::invalid("length of a prompt", length, expected));
        }
        Ok(self.by_site.get(&place.site(block)).cloned())
    }

    /// `value` `[.., length, features]` less the mean there.
    pub(super) fn less(&self, value: &Tensor, place: Place, block: usize) -> Result<Tensor> {
        let length = value.dims().iter().rev().nth(1).copied().unwrap_or(0);
        match self.at(place, block, length)? {
            Some(mean) => engine(value.broadcast_sub(&mean)),
            None => Ok(value.clone()),
        }
    }
}
