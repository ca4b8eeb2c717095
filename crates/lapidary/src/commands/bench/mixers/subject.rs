//! What a row times, made ready to be run again and again.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use lapidary_kernels::{AttentionOptions, DType, Device, Tensor, Var, attention};
use lapidary_lab::mechanisms::{Mechanism, attention_in_bands, mixing_alone};
use lapidary_model::Initialiser;
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::Heads;
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::block::Block;
use lapidary_parts::organisation::{Organisation, OrganisationSpec, Read, Surroundings};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_parts::position::{Position, PositionSpec, Span};
use lapidary_signal::{Signal, Trace};

use super::candidates::{Candidate, Subject};

/// One pass over what is given, which gives what is mixed.
pub(super) type Pass = Box<dyn Fn() -> Result<Tensor>>;

/// The sequences of a row.
#[derive(Clone, Copy)]
pub(super) struct Sequences {
    pub(super) batch: usize,
    pub(super) length: usize,
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) seed: u64,
    /// Whether there is a gradient for what is given and what is learned.
    pub(super) differentiated: bool,
}

/// Gives initial values, as variables where they are learned.
struct Source {
    values: Initialiser,
    learned: bool,
}

impl ParameterSource for Source {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let values = self.values.parameter(name, shape, init)?;
        match self.learned {
            false => Ok(values),
            true => {
                let variable = Var::from_tensor(&values).map_err(lapidary_kernels::Error::from)?;
                Ok(variable.as_tensor().clone())
            }
        }
    }
}

impl Sequences {
    fn head_width(&self) -> usize {
        self.width / self.heads
    }

    /// A module with parameters that are learned or constant.
    fn build<T>(
        &self,
        learned: bool,
        make: impl FnOnce(Parameters<'_>) -> lapidary_parts::Result<T>,
    ) -> Result<T> {
        let mut source = Source {
            values: Initialiser::new(self.seed, DType::F32, Device::Cpu),
            learned: learned && self.differentiated,
        };
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        Ok(make(Parameters::new(&mut source, &ranks, &mut linears))?)
    }

    /// Numbers between −1 and 1, `[batch, length, heads, head_width]`.
    fn drawn(&self, seed: u64) -> Result<Tensor> {
        let shape = (self.batch, self.length, self.heads, self.head_width());
        let mut random = lapidary_train::generator(self.seed ^ seed);
        let count = self.batch * self.length * self.width;
        let values: Vec<f32> = (0..count)
            .map(|_| rand::RngExt::random_range(&mut random, -1.0..1.0f32))
            .collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn given(&self, values: &Tensor) -> Result<Tensor> {
        Ok(match self.differentiated {
            false => values.clone(),
            true => Var::from_tensor(values)?.as_tensor().clone(),
        })
    }

    /// Tokens `[batch, length, width]`.
    fn tokens(&self) -> Result<Tensor> {
        let drawn = self.drawn(9)?;
        Ok(drawn.reshape((self.batch, self.length, self.width))?)
    }

    /// Queries, keys and values as projections leave them, heads side by side.
    fn projected(&self, sharing: QueryKeySharing) -> Result<Projected> {
        let [q, k, v] = [self.drawn(1)?, self.drawn(2)?, self.drawn(3)?];
        let k = match sharing.is_none() {
            true => k,
            false => q.clone(),
        };
        Ok(Projected([
            self.given(&q)?,
            self.given(&k)?,
            self.given(&v)?,
        ]))
    }
}

/// `[batch, length, heads, head_width]` each.
struct Projected([Tensor; 3]);

impl Projected {
    /// `[batch, heads, length, head_width]` each.
    fn split(&self) -> Result<[Tensor; 3]> {
        let [q, k, v] = &self.0;
        Ok([q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?])
    }
}

impl Candidate {
    /// Makes it ready for such sequences.
    pub(super) fn pass(&self, sequences: &Sequences) -> Result<Pass> {
        match &self.subject {
            Subject::Mechanism(mechanism) => by_mechanism(mechanism, sequences),
            Subject::Bands => {
                let projected = sequences.projected(QueryKeySharing::None)?;
                Ok(Box::new(move || -> Result<Tensor> {
                    let [q, k, v] = projected.split()?;
                    Ok(attention_in_bands([&q, &k, &v])?)
                }))
            }
            Subject::Biased(position) => biased(position, self.causal, sequences),
            Subject::Attention(spec) => projecting(&spec(sequences.heads), sequences),
            Subject::Block(organisation) => block(*organisation, sequences),
        }
    }
}

fn by_mechanism(mechanism: &Mechanism, sequences: &Sequences) -> Result<Pass> {
    let projected = sequences.projected(mechanism.sharing)?;
    let head_width = sequences.head_width();
    let spec = mechanism.spec(sequences.length);
    let Some(described) = spec.spec() else {
        let options = AttentionOptions {
            causal: mechanism.causal,
            ..AttentionOptions::new(head_width)
        };
        return Ok(Box::new(move || -> Result<Tensor> {
            let [q, k, v] = projected.split()?;
            Ok(attention(&q, &k, &v, &options)?)
        }));
    };
    let heads = Heads {
        width: sequences.width,
        heads: sequences.heads,
        head_width,
        value_width: head_width,
        causal: mechanism.causal,
        scale: 1.0 / (head_width as f64).sqrt(),
        sharing: mechanism.sharing,
    };
    described.validate(&heads, "mechanism")?;
    let module = sequences.build(false, |parameters| described.build(&heads, parameters))?;
    let tokens = sequences.tokens()?;
    Ok(Box::new(move || -> Result<Tensor> {
        let [q, k, v] = projected.split()?;
        Ok(mixing_alone(module.as_ref(), [&q, &k], &tokens, None)?.mix(&v)?)
    }))
}

fn biased(spec: &PositionSpec, causal: bool, sequences: &Sequences) -> Result<Pass> {
    let (heads, head_width) = (sequences.heads, sequences.head_width());
    spec.validate(heads, head_width, causal, "position")?;
    let position = sequences.build(true, |parameters| {
        Position::new(spec, (heads, heads), head_width, causal, parameters)
    })?;
    let projected = sequences.projected(QueryKeySharing::None)?;
    let span = Span {
        queries: sequences.length,
        keys: sequences.length,
        offset: 0,
        draw: None,
    };
    Ok(Box::new(move || -> Result<Tensor> {
        let [q, k, v] = projected.split()?;
        let options = AttentionOptions {
            causal,
            bias: position.bias(span, DType::F32, &Device::Cpu)?,
            ..AttentionOptions::new(head_width)
        };
        Ok(attention(&q, &k, &v, &options)?)
    }))
}

fn projecting(spec: &MultiHeadSpec, sequences: &Sequences) -> Result<Pass> {
    spec.validate(sequences.width, "attention")?;
    let module = sequences.build(true, |mut parameters| {
        MultiHeadAttention::new(spec, sequences.width, parameters.at("attention"))
    })?;
    let tokens = Signal::from(sequences.given(&sequences.tokens()?)?);
    Ok(Box::new(move || -> Result<Tensor> {
        let trace = Trace::new();
        let mixed = module.forward(&tokens, &Context::new(&trace), None)?;
        Ok(mixed.into_value())
    }))
}

fn block(
    organised: fn(&Surroundings<'_>) -> Option<OrganisationSpec>,
    sequences: &Sequences,
) -> Result<Pass> {
    let width = sequences.width;
    let spec = super::super::block(width, MultiHeadSpec::new(sequences.heads));
    spec.validate(width, "block")?;
    let model = Surroundings {
        blocks: std::slice::from_ref(&spec),
        width,
        length: sequences.length,
    };
    let organisation = organised(&model);
    if let Some(organisation) = &organisation {
        organisation.validate(&model, "organisation")?;
    }
    let (blocks, organisation) = sequences.build(true, |mut parameters| {
        let block = Block::new(&spec, width, parameters.at("block"))?;
        let organisation = match &organisation {
            None => None,
            Some(spec) => {
                let own = parameters.at("organisation");
                Some(Organisation::new(spec, &model, own)?)
            }
        };
        Ok(([Arc::new(block)], organisation))
    })?;
    let tokens = Signal::from(sequences.given(&sequences.tokens()?)?);
    Ok(Box::new(move || -> Result<Tensor> {
        let trace = Trace::new();
        let (x, context) = (tokens.clone(), Context::new(&trace));
        let y = match &organisation {
            Some(organisation) => {
                let read = Read::default();
                let organised = organisation.forward(x, &blocks, read, &context, None, None)?;
                organised.hidden
            }
            None => {
                let [block] = &blocks;
                block.forward(x, &context, None)?
            }
        };
        Ok(y.into_value())
    }))
}
