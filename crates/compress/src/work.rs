//! What a pass costs where zeros are left out: a stand-in for energy, which nothing here measures.

use std::collections::BTreeSet;

use lapidary_kernels::{DType, SparseSizes, Tensor};
use lapidary_model::{Input, InputSpec, Model, Pass};
use lapidary_signal::Trace;
use lapidary_signal::meter::Meter;

use crate::error::engine;
use crate::{Error, Layer, Result};

/// Work of one pass over one sequence, from the embeddings on.
///
/// Of linear layers only entries that are not zero are multiplied, and each matrix is read once, stored as
/// is smallest: with its zeros, as a bitmap with values, or as compressed sparse rows. Everything else is as
/// [`Meter`] counts it: attention, norms and activations with what they read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Floating-point operations, a multiply-add being two.
    pub operations: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

impl Work {
    /// The work on a sequence of `length` tokens.
    ///
    /// ```
    /// use lapidary_compress::Work;
    /// use lapidary_kernels::{DType, Device};
    /// use lapidary_model::{Model, ModelSpec};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let spec: ModelSpec = toml::from_str(r#"
    ///     width = 8
    ///     input = { kind = "tokens", vocabulary = 16, length = 8 }
    ///     head = { kind = "language-model" }
    ///     [[blocks]]
    ///     attention = { kind = "multi-head", heads = 2, causal = true }
    /// "#)?;
    /// let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
    /// // Attention's four maps and the scores of 16 words are multiplied at the least.
    /// assert!(Work::of(&model, 4)?.operations > 2 * 4 * (4 * 8 * 8 + 16 * 8));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the model does not read tokens, or not as many.
    pub fn of(model: &Model, length: usize) -> Result<Self> {
        let InputSpec::Tokens(_) = &model.spec().input else {
            return Err(Error::invalid("input", "patches", "tokens, to count work"));
        };
        let most = model.spec().length();
        if !(1..=most).contains(&length) {
            let expected = format!("between 1 and {most}, the model's length");
            return Err(Error::invalid("tokens of a pass", length, expected));
        }
        let layers: Vec<_> = model
            .linears()
            .iter()
            .filter(|linear| linear.rank.is_none() && !linear.path.starts_with("embeddings."))
            .collect();
        let meter = Meter::new();
        let start = meter.clone();
        let mut trace = Trace::new().replace("embeddings", move |_, signal| {
            Ok(signal.into_metered(start.clone()))
        })?;
        let sites: BTreeSet<&str> = layers.iter().map(|l| l.input_site.as_str()).collect();
        for site in sites {
            trace = trace.capture(site)?;
        }
        let ids = Tensor::zeros((1, length), DType::U32, &model.device());
        model.forward(
            &Input::tokens(engine(ids)?),
            Pass {
                trace: Some(&trace),
                ..Pass::default()
            },
        )?;
        let total = meter.total();
        let (mut operations, mut bytes) = (total.flops, total.bytes);
        let records = trace.records();
        for linear in layers {
            let Some(weight) = model.parameters().get(&Layer::weight_name(&linear.path)) else {
                continue;
            };
            let rows = records.get(&linear.input_site).map_or(0, |record| {
                record.signal.value().elem_count() / linear.input.max(1)
            });
            let entries = entries(weight)?;
            let zeros = (linear.input * linear.output).saturating_sub(entries);
            operations = operations.saturating_sub(2 * (zeros * rows) as u64);
            let value = weight.dtype().size_in_bytes();
            let sizes = SparseSizes::of(linear.output, linear.input, entries, value, false);
            if rows > 0 {
                let least = sizes.dense.min(sizes.bitmap).min(sizes.csr);
                bytes = bytes.saturating_sub((sizes.dense - least) as u64);
            }
        }
        Ok(Self { operations, bytes })
    }
}

/// Entries that are not zero.
fn entries(weight: &Tensor) -> Result<usize> {
    let values = engine(weight.detach().to_dtype(DType::F64))?;
    let values = engine(engine(values.flatten_all())?.to_vec1::<f64>())?;
    Ok(values.iter().filter(|value| **value != 0.0).count())
}
