//! Vcc: VIP tokens and blocks of the others.
#![allow(clippy::panic, clippy::unwrap_used)]

mod compression;
mod gradients;
mod limits;
mod selection;
mod tokens;

use std::sync::Arc;

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, random, values,
};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{LocalFilter, MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::vcc::store::TokenStore;
use lapidary_parts::organisation::vcc::{Importance, Selection, VccOutput, VccSpec};
use lapidary_parts::organisation::{Organisation, OrganisationSpec, Organised, Read, Surroundings};
use lapidary_parts::parameters::Parameters;
use lapidary_parts::position::PositionSpec;
use lapidary_parts::{Context, Result};
use lapidary_signal::meter::Meter;
use lapidary_signal::relevance::{RelevanceRules, relevance_of};
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules};
use lapidary_signal::{Signal, Trace};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WIDTH: usize = 6;
const BATCH: usize = 2;
/// Two VIPs and five blocks of three.
const LENGTH: usize = 17;

fn block(position: PositionSpec) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        shared: false,
        wiring: Wiring::PreNorm,
        norm: NormSpec::default(),
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        attention: MixerSpec::MultiHead(MultiHeadSpec {
            position,
            ..MultiHeadSpec::new(2)
        }),
        cross_attention: None,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 8,
            activation: ActivationSpec::Gelu,
            bias: true,
        })),
        shortcuts: false,
        dropout: 0.0,
    }
}

fn spec(fine: usize) -> VccSpec {
    VccSpec {
        size: 3,
        ..VccSpec::new(2, fine)
    }
}

const BUCKETS: PositionSpec = PositionSpec::RelativeBuckets {
    buckets: 8,
    max_distance: 20,
};

struct Subject {
    spec: VccSpec,
    blocks: Vec<BlockSpec>,
    map: Map,
}

#[derive(Clone, Copy, Default)]
struct Given<'a> {
    keep: Option<&'a Tensor>,
    draw: Option<u64>,
    ids: Option<&'a Tensor>,
    token_types: Option<&'a Tensor>,
}

impl Subject {
    fn new(spec: VccSpec, blocks: usize) -> Self {
        Self::with(spec, vec![block(PositionSpec::None); blocks])
    }

    fn with(spec: VccSpec, blocks: Vec<BlockSpec>) -> Self {
        let mut subject = Self {
            spec,
            blocks,
            map: Map::new(),
        };
        let organisation = OrganisationSpec::VipCentric(subject.spec.clone());
        organisation
            .validate(&subject.model(), "organisation")
            .unwrap();
        subject.map = draw(3, |p| subject.modules(p));
        subject
    }

    fn model(&self) -> Surroundings<'_> {
        Surroundings {
            blocks: &self.blocks,
            width: WIDTH,
            length: 1 << 10,
        }
    }

    fn modules(&self, mut root: Parameters<'_>) -> Result<(Organisation, Vec<Arc<Block>>)> {
        let mut blocks = Vec::new();
        for (index, spec) in self.blocks.iter().enumerate() {
            let mut all = root.at("blocks");
            blocks.push(Arc::new(Block::new(spec, WIDTH, all.at(index))?));
        }
        let spec = OrganisationSpec::VipCentric(self.spec.clone());
        let organisation = Organisation::new(&spec, &self.model(), root.at("organisation"))?;
        Ok((organisation, blocks))
    }

    fn organised(
        &self,
        map: &Map,
        x: Signal,
        given: Given<'_>,
        trace: &Trace,
    ) -> Result<Organised> {
        let (organisation, blocks) = build(map, |p| self.modules(p))?;
        let cx = Context {
            key_padding: given.keep,
            draw: given.draw,
            ..Context::new(trace)
        };
        let read = Read {
            ids: given.ids,
            token_types: given.token_types,
        };
        organisation.forward(x, &blocks, read, &cx, None, None)
    }

    fn pass(&self, x: &Tensor, given: Given<'_>, sites: &str) -> (Tensor, Trace) {
        let trace = Trace::new().capture(sites).unwrap();
        let x = Signal::from(x.clone());
        let y = self.organised(&self.map, x, given, &trace).unwrap();
        (y.hidden.into_value(), trace)
    }

    fn run(&self, x: &Tensor) -> Tensor {
        self.pass(x, Given::default(), "none").0
    }

    /// The blocks one after the other on the whole sequence.
    fn plain(&self, map: &Map, x: &Tensor, keep: Option<&Tensor>) -> Tensor {
        let (_, blocks) = build(map, |p| self.modules(p)).unwrap();
        let trace = Trace::new();
        let cx = Context {
            key_padding: keep,
            ..Context::new(&trace)
        };
        let mut x = Signal::from(x.clone());
        for block in &blocks {
            x = block.forward(x, &cx, None).unwrap();
        }
        x.into_value()
    }

    fn silence(&mut self, names: &[&str]) {
        for (name, tensor) in &mut self.map {
            if names.iter().any(|part| name.contains(part)) {
                *tensor = tensor.zeros_like().unwrap();
            }
        }
    }
}

fn tokens(length: usize) -> Tensor {
    random(&[BATCH, length, WIDTH], 1)
}

fn rows(x: &Tensor, start: usize, count: usize) -> Tensor {
    x.narrow(1, start, count).unwrap()
}

fn mask(rows: &[Vec<u8>]) -> Tensor {
    let shape = (rows.len(), rows[0].len());
    Tensor::from_vec(rows.concat(), shape, &Device::Cpu).unwrap()
}

/// The fine blocks of each sequence at a block of the model, by what it captured.
fn fine_blocks(trace: &Trace, site: &str, count: usize) -> Vec<Vec<usize>> {
    let importance = trace.signal(site).unwrap().into_value();
    let rows = importance.to_vec2::<f64>().unwrap();
    rows.iter()
        .map(|row| {
            let mut blocks: Vec<usize> = (0..row.len()).collect();
            blocks.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            blocks.truncate(count);
            blocks
        })
        .collect()
}
