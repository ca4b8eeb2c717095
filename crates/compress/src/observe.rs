//! Looking at what a model writes, one batch at a time: what methods do that need more than the
//! sums of a [`crate::Calibration`]. No activation outlives its batch.

use std::collections::BTreeMap;

use lapidary_kernels::Tensor;
use lapidary_model::{Model, Output, Pass};
use lapidary_signal::Trace;

use crate::data::{Batch, real_rows};
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// What one batch wrote.
pub(crate) struct Seen {
    sites: BTreeMap<String, Tensor>,
    /// The model's result.
    #[allow(dead_code, reason = "for methods that weigh by predictions")]
    pub(crate) output: Output,
    /// Real tokens of each sequence.
    pub(crate) lengths: Vec<usize>,
}

impl Seen {
    /// `[tokens, width]` at a site: real tokens only, the sequences one after another.
    pub(crate) fn rows(&self, site: &str) -> Result<&Tensor> {
        self.sites.get(site).ok_or_else(|| {
            Error::invalid(
                format!("site {site}"),
                "written by no module",
                "one that the model writes",
            )
        })
    }

    /// Rows of the last real token of each sequence.
    pub(crate) fn last(&self) -> Vec<u32> {
        let mut end = 0;
        self.lengths
            .iter()
            .filter(|length| **length > 0)
            .map(|length| {
                end += *length as u32;
                end - 1
            })
            .collect()
    }
}

/// Runs `model` over `data` and hands over what each batch wrote at `sites`.
pub(crate) fn observe(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    sites: &[String],
    mut body: impl FnMut(&Seen) -> Result<()>,
) -> Result<()> {
    let device = model.device();
    for batch in data.batches(batch, &device) {
        let batch = batch?;
        let mut trace = Trace::new();
        for site in sites {
            trace = trace.capture(site)?;
        }
        let output = model.forward(
            &batch.input,
            Pass {
                padding: batch.padding.as_ref(),
                trace: Some(&trace),
                ..Pass::default()
            },
        )?;
        let mut rows = BTreeMap::new();
        for (site, record) in trace.records() {
            let value = record.signal.into_value().detach();
            rows.insert(site, engine(real_rows(&value, batch.real.as_ref()))?);
        }
        body(&Seen {
            sites: rows,
            lengths: lengths(&batch, &output)?,
            output,
        })?;
    }
    Ok(())
}

/// Real tokens of each sequence: all that the model has, where nothing is padded.
fn lengths(batch: &Batch<'_>, output: &Output) -> Result<Vec<usize>> {
    if batch.real.is_some() {
        return Ok(batch
            .examples
            .iter()
            .map(|example| example.tokens())
            .collect());
    }
    let length = engine(output.hidden.value().dim(1))?;
    Ok(vec![length; batch.examples.len()])
}
