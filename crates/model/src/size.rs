//! How large a model a spec asks for, known before any of it is made.

use std::collections::BTreeMap;

use crate::head::Head;
use crate::input::Embedding;
use crate::spec::ModelSpec;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::{Block, BlockSpec};
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::norm::Norm;
use lapidary_parts::organisation::{Organisation, Surroundings};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_parts::{Error, Result};

/// Parameters of any model, wherever they come from: above every published one.
const MAX_PARAMETERS: u64 = 1 << 41;

/// Linear layers of any model: above every published mixture of experts.
const MAX_LINEARS: usize = 1 << 18;

/// Parameters that are given initial values: 16 GiB of them, and training needs four times that.
const MAX_MADE: u64 = 1 << 32;

/// Counts what it is asked for, by name. Each tensor is a single number, seen as often as its shape says.
#[derive(Default)]
struct Counter(BTreeMap<String, u64>);

impl ParameterSource for Counter {
    fn parameter(&mut self, name: &str, shape: &[usize], _: Init) -> Result<Tensor> {
        let count = shape
            .iter()
            .fold(1, |count: u64, side| count.saturating_mul(*side as u64));
        self.0.insert(name.to_owned(), count);
        let number = Tensor::zeros((), DType::F32, &Device::Cpu);
        let tensor = number.and_then(|number| number.broadcast_as(shape));
        Ok(tensor.map_err(lapidary_kernels::Error::from)?)
    }
}

/// The numbers of parameters that `build` asks for, by name.
fn asked(build: impl FnOnce(Parameters<'_>) -> Result<()>) -> Result<BTreeMap<String, u64>> {
    let mut counter = Counter::default();
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    build(Parameters::new(&mut counter, &ranks, &mut linears))?;
    Ok(counter.0)
}

/// How many they are together.
fn counted(build: impl FnOnce(Parameters<'_>) -> Result<()>) -> Result<u64> {
    Ok(sum(asked(build)?.values()))
}

fn sum<'a>(counts: impl Iterator<Item = &'a u64>) -> u64 {
    counts.fold(0, |sum: u64, count| sum.saturating_add(*count))
}

/// At least as many linear layers as the block has.
fn linears(block: &BlockSpec) -> usize {
    const WITHOUT_EXPERTS: usize = 12;
    let bands = match &block.attention {
        MixerSpec::Wavelet(wavelet) => 4 * wavelet.bands(),
        _ => 0,
    };
    let experts = match &block.feedforward {
        Some(FeedforwardSpec::Mixture(mixture)) => mixture.experts.saturating_mul(3),
        _ => 0,
    };
    experts.saturating_add(bands + WITHOUT_EXPERTS)
}

impl ModelSpec {
    /// Parameters of the model with every layer dense, tied ones counted once. Nothing of their
    /// size is allocated.
    pub fn parameter_count(&self) -> Result<u64> {
        let (width, read) = (self.width, self.read_width());
        let mut total = counted(|mut root| {
            let embedding = Embedding::new(&self.input, width, root.at("embeddings"))?;
            if let Some(norm) = &self.final_norm {
                Norm::new(norm, read, root.at("final_norm"))?;
            }
            Head::new(&self.head, [width, read], &embedding, root).map(|_| ())
        })?;
        // What several blocks share stands beside them, and is one.
        let mut beside = BTreeMap::new();
        for block in &self.blocks {
            let build =
                |mut root: Parameters<'_>| Block::new(block, width, root.at("block")).map(|_| ());
            let (own, shared): (BTreeMap<_, _>, BTreeMap<_, _>) = asked(build)?
                .into_iter()
                .partition(|(name, _)| name.starts_with("block."));
            let stored = if block.shared { 1 } else { block.repeat as u64 };
            total = total.saturating_add(sum(own.values()).saturating_mul(stored));
            beside.extend(shared);
        }
        total = total.saturating_add(sum(beside.values()));
        if let Some(organisation) = &self.organisation {
            let blocks = self.expanded_blocks();
            let model = Surroundings {
                blocks: &blocks,
                width,
                length: self.length(),
            };
            let own = counted(|mut root| {
                Organisation::new(organisation, &model, root.at("organisation")).map(|_| ())
            })?;
            total = total.saturating_add(own);
        }
        Ok(total)
    }

    /// Refuses what no machine could hold. The fields have been checked one by one.
    pub(crate) fn validate_size(&self) -> Result<()> {
        let layers = self.blocks.iter().fold(0, |sum: usize, block| {
            sum.saturating_add(block.repeat.saturating_mul(linears(block)))
        });
        let own = self.organisation.as_ref().map_or(0, |organisation| {
            let (block, count, others) = organisation.own();
            let each = block.map_or(0, linears);
            each.saturating_mul(count).saturating_add(others)
        });
        let layers = layers.saturating_add(own);
        if layers > MAX_LINEARS {
            let expected = format!("blocks of at most {MAX_LINEARS} linear layers");
            return Err(Error::spec("number of linear layers", layers, expected));
        }
        self.refuse_more_than(MAX_PARAMETERS)
    }

    /// Refuses an invalid spec, and one with more parameters than are given initial values
    /// (4 294 967 296).
    pub fn check_can_be_made(&self) -> Result<()> {
        self.validate()?;
        self.refuse_more_than(MAX_MADE)
    }

    /// As [`ModelSpec::check_can_be_made`], where the parameters of `known` are there.
    pub(crate) fn check_rest_can_be_made(&self, known: &Self) -> Result<()> {
        self.validate()?;
        let known = known.parameter_count()?;
        let made = self.parameter_count()?.saturating_sub(known);
        if made > MAX_MADE {
            let expected = format!("at most {MAX_MADE}");
            return Err(Error::spec("number of new parameters", made, expected));
        }
        Ok(())
    }

    fn refuse_more_than(&self, most: u64) -> Result<()> {
        let parameters = self.parameter_count()?;
        if parameters > most {
            return Err(Error::spec(
                "number of parameters",
                parameters,
                format!("at most {most}"),
            ));
        }
        Ok(())
    }
}
