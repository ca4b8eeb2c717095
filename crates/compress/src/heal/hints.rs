//! Learning the original's residual stream, block by block.
//!
//! ```text
//! 1/n Σ_i ‖h_i − h'_π(i)‖² / ‖h'_π(i)‖²
//! ```
//!
//! over the student's `n` blocks, real tokens only, with `π(i)` the original's block that block `i` answers
//! to (hints: Romero et al. 2014, arXiv 1412.6550; hidden states of Transformers: Jiao et al. 2019, arXiv
//! 1909.10351). Each term is 1 for a stream of zeros, whatever the stream's size. A stream of another width is
//! mapped to the original's first, by what is trained with it ([`Projections`]).

use std::collections::BTreeMap;

use lapidary_kernels::{AdamW, DType, Tensor};
use lapidary_model::{Model, Output, Pass};
use lapidary_signal::Trace;

use super::projections::Projections;
use crate::calibration::equal;
use crate::data::{Batch, real_rows};
use crate::edit::block_of;
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// Blocks of a student, each with the original's that it answers to.
pub(super) type Pairs = Vec<(usize, usize)>;

/// What a student learns by hints.
#[derive(Clone, Debug)]
pub(super) struct Hints {
    pairs: Pairs,
    /// Where the streams have different widths.
    projections: Option<Projections>,
}

impl Hints {
    /// Where a student has fewer blocks, each answers to the original's with the same parameters, if all
    /// have one; else the student's blocks are spread evenly over the original's, the last on the last. Where
    /// it has another width, maps are fitted to batches of `batch` examples of `data`.
    ///
    /// # Errors
    /// When there is no block, or a model does not read the data.
    pub(super) fn new(
        student: &Model,
        teacher: &Model,
        data: &CalibrationData,
        batch: usize,
    ) -> Result<Self> {
        let [own, whole] = [student, teacher].map(|model| model.spec().expanded_blocks().len());
        if own == 0 || whole == 0 {
            let found = format!("{own} and {whole}");
            return Err(Error::invalid(
                "blocks of the model and its original",
                found,
                "at least one each, to learn by hints",
            ));
        }
        let same = match own < whole {
            true => same_blocks(student, teacher, own, whole)?,
            false => None,
        };
        let spread = || {
            let even = |block: usize| ((block + 1) * whole).div_ceil(own) - 1;
            (0..own).map(even).collect()
        };
        let blocks: Vec<usize> = same.unwrap_or_else(spread);
        let pairs: Pairs = blocks.into_iter().enumerate().collect();
        let projections = match student.spec().width == teacher.spec().width {
            true => None,
            false => Some(Projections::fitted(&pairs, student, teacher, data, batch)?),
        };
        Ok(Self { pairs, projections })
    }

    /// What trains the maps between streams of different widths, where there are any.
    pub(super) fn optimiser(&self, rate: f64) -> Result<Option<AdamW>> {
        let maps = self.projections.as_ref();
        maps.map(|maps| maps.optimiser(rate)).transpose()
    }

    /// A pass of the student, and what it says after each block, in the original's width.
    pub(super) fn student(
        &self,
        model: &Model,
        batch: &Batch<'_>,
    ) -> Result<(Output, Vec<Tensor>)> {
        let (output, streams) = seen(model, batch, self.pairs.iter().map(|(own, _)| *own))?;
        let streams = match &self.projections {
            None => streams,
            Some(maps) => maps.applied(&streams)?,
        };
        Ok((output, streams))
    }

    /// A pass of the original, and what it says after each block that one answers to.
    pub(super) fn teacher(
        &self,
        model: &Model,
        batch: &Batch<'_>,
    ) -> Result<(Output, Vec<Tensor>)> {
        seen(model, batch, self.pairs.iter().map(|(_, whole)| *whole))
    }
}

/// How far streams are from those that are wanted.
pub(super) fn distance(found: &[Tensor], wanted: &[Tensor]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (found, wanted) in found.iter().zip(wanted) {
        let wanted = engine(wanted.detach().to_dtype(found.dtype()))?;
        let squares = engine(engine(wanted.sqr())?.sum_all())?;
        let length = engine(engine(squares.to_dtype(DType::F64))?.to_scalar::<f64>())?;
        let error = engine(engine(engine(found - wanted)?.sqr())?.sum_all())?;
        let share = engine(error.affine(1.0 / length.max(f64::MIN_POSITIVE), 0.0))?;
        sum = Some(match sum {
            Some(sum) => engine(sum + share)?,
            None => share,
        });
    }
    let sum = sum.ok_or_else(|| Error::invalid("blocks to learn from", 0, "at least 1"))?;
    engine(sum.affine(1.0 / found.len() as f64, 0.0))
}

/// `[tokens, width]` after each of the blocks, in their order.
pub(super) fn seen(
    model: &Model,
    batch: &Batch<'_>,
    blocks: impl Iterator<Item = usize>,
) -> Result<(Output, Vec<Tensor>)> {
    let sites: Vec<String> = blocks.map(|block| format!("blocks.{block}.out")).collect();
    let mut trace = Trace::new();
    for site in &sites {
        trace = trace.capture(site)?;
    }
    let pass = Pass {
        padding: batch.padding.as_ref(),
        trace: Some(&trace),
        ..Pass::default()
    };
    let output = model.forward(&batch.input, pass)?;
    let records = trace.records();
    let streams = sites.iter().map(|site| {
        let record = records.get(site).ok_or_else(|| {
            Error::invalid(
                format!("site {site}"),
                "written by no module",
                "one that the model writes, to learn by hints",
            )
        })?;
        engine(real_rows(record.signal.value(), batch.real.as_ref()))
    });
    let streams = streams.collect::<Result<Vec<_>>>()?;
    Ok((output, streams))
}

/// For each block of the student the next of the original's with its parameters; nothing where one has
/// none.
fn same_blocks(
    student: &Model,
    teacher: &Model,
    own: usize,
    whole: usize,
) -> Result<Option<Vec<usize>>> {
    let mut found = Vec::with_capacity(own);
    let mut next = 0;
    for block in 0..own {
        let mut same = None;
        for candidate in next..whole {
            if alike(student, block, teacher, candidate)? {
                same = Some(candidate);
                break;
            }
        }
        let Some(candidate) = same else {
            return Ok(None);
        };
        found.push(candidate);
        next = candidate + 1;
    }
    Ok(Some(found))
}

/// Whether two blocks have the same parameters.
fn alike(one: &Model, block: usize, other: &Model, candidate: usize) -> Result<bool> {
    let of = |model: &Model, block: usize| -> BTreeMap<String, Tensor> {
        let parameters = model.parameters().iter();
        parameters
            .filter_map(|(name, tensor)| match block_of(name) {
                Some((number, rest)) if number == block => Some((rest.to_owned(), tensor.clone())),
                _ => None,
            })
            .collect()
    };
    let (one, other) = (of(one, block), of(other, candidate));
    if one.is_empty() || !one.keys().eq(other.keys()) {
        return Ok(false);
    }
    for (one, other) in one.values().zip(other.values()) {
        if !equal(Some(one), Some(other))? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::edit::Edit;
    use lapidary_kernels::Device;
    use lapidary_model::ModelSpec;

    pub(in crate::heal) fn model(blocks: usize, width: usize, seed: u64) -> Model {
        let spec: ModelSpec = toml::from_str(&format!(
            "width = {width}
            head = {{ kind = 'language-model' }}
            input = {{ kind = 'tokens', vocabulary = 8, length = 4 }}
            [[blocks]]
            repeat = {blocks}
            attention = {{ kind = 'multi-head', heads = 2, causal = true }}"
        ))
        .unwrap();
        Model::initialised(spec, seed, DType::F64, &Device::Cpu).unwrap()
    }

    #[test]
    fn blocks_answer_to_those_that_they_were() {
        let whole = model(5, 8, 1);
        let mut edit = Edit::of(&whole);
        edit.remove_blocks(&BTreeSet::from([1, 2])).unwrap();
        let cut = edit.finish().unwrap();
        let data = CalibrationData::windows([vec![1, 2, 3, 4], vec![5, 3, 1, 0]]).unwrap();
        let pairs = |student: &Model| Hints::new(student, &whole, &data, 2).unwrap().pairs;
        assert_eq!(pairs(&cut), [(0, 0), (1, 3), (2, 4)]);
        // Others are spread evenly.
        assert_eq!(pairs(&model(2, 8, 2)), [(0, 2), (1, 4)]);
        assert_eq!(
            pairs(&model(5, 8, 2)),
            [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
        );
        let maps = |student: &Model| {
            let hints = Hints::new(student, &whole, &data, 2).unwrap();
            hints.projections.is_some()
        };
        assert!(maps(&model(5, 16, 1)) && !maps(&model(2, 8, 2)));
    }
}
