//! FIT: groups of tokens and their latents.
#![allow(clippy::panic, clippy::unwrap_used)]

mod cost;
mod decoding;
mod denoiser;
mod images;
mod refusals;

use std::sync::Arc;

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, random,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::fit::{FitOutput, FitSpec, GroupPositions, LatentPositions};
use lapidary_parts::organisation::{Organisation, OrganisationSpec, Read, Surroundings};
use lapidary_parts::parameters::Parameters;
use lapidary_parts::state::DecodeState;
use lapidary_parts::{Context, Result};
use lapidary_signal::relevance::{RelevanceRules, relevance_of};
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules};
use lapidary_signal::{Signal, Trace};

const WIDTH: usize = 8;

const LATENT: usize = 4;

const BATCH: usize = 2;

fn block(hidden: usize, heads: usize, causal: bool) -> BlockSpec {
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
            causal,
            ..MultiHeadSpec::new(heads)
        }),
        cross_attention: None,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden,
            activation: ActivationSpec::Gelu,
            bias: true,
        })),
        shortcuts: false,
        dropout: 0.0,
    }
}

/// `t` groups of 4 with two latents of width 4, and as many local blocks as the layout says.
fn spec(layout: &str, groups: usize, causal: bool) -> FitSpec {
    let has_globals = layout.contains(")1") || layout.contains(")2");
    FitSpec {
        layout: layout.to_owned(),
        group: 4,
        groups,
        latents: if has_globals { 2 } else { 0 },
        width: has_globals.then_some(LATENT),
        block: has_globals.then(|| Box::new(block(8, 2, causal))),
        exchange_heads: None,
        read_feedforward: None,
        positions: GroupPositions::default(),
        latent_positions: LatentPositions::default(),
        tiles: None,
        condition: 0,
        output: FitOutput::Tokens,
    }
}

struct Subject {
    spec: FitSpec,
    blocks: Vec<BlockSpec>,
    map: Map,
}

/// What a pass is given.
#[derive(Clone, Copy, Default)]
struct Given<'a> {
    keep: Option<&'a Tensor>,
    memory: Option<&'a Tensor>,
    memory_keep: Option<&'a Tensor>,
    sites: Option<&'a str>,
    dropout_seed: Option<u64>,
}

impl Subject {
    fn new(spec: FitSpec, causal: bool) -> Self {
        let stages = spec.stages().unwrap();
        let locals = stages.iter().map(|stage| stage.local).sum();
        Self::with(spec, vec![block(12, 4, causal); locals])
    }

    fn with(spec: FitSpec, blocks: Vec<BlockSpec>) -> Self {
        let mut subject = Self {
            spec,
            blocks,
            map: Map::new(),
        };
        let organisation = OrganisationSpec::Interleaved(subject.spec.clone());
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
            length: self.spec.group * self.spec.groups,
        }
    }

    fn modules(&self, mut root: Parameters<'_>) -> Result<(Organisation, Vec<Arc<Block>>)> {
        let mut blocks = Vec::new();
        for (index, spec) in self.blocks.iter().enumerate() {
            let mut all = root.at("blocks");
            blocks.push(Arc::new(Block::new(spec, WIDTH, all.at(index))?));
        }
        let spec = OrganisationSpec::Interleaved(self.spec.clone());
        let organisation = Organisation::new(&spec, &self.model(), root.at("organisation"))?;
        Ok((organisation, blocks))
    }

    fn signal(&self, map: &Map, x: Signal, given: Given<'_>, trace: &Trace) -> Result<Signal> {
        let (organisation, blocks) = build(map, |p| self.modules(p))?;
        let memory = given.memory.map(|memory| Signal::from(memory.clone()));
        let cx = Context {
            key_padding: given.keep,
            memory: memory.as_ref().map(|memory| (memory, given.memory_keep)),
            dropout_seed: given.dropout_seed,
            ..Context::new(trace)
        };
        let organised = organisation.forward(x, &blocks, Read::default(), &cx, None, None)?;
        Ok(organised.hidden)
    }

    fn pass(&self, x: &Tensor, given: Given<'_>) -> (Tensor, Trace) {
        let trace = Trace::new().capture(given.sites.unwrap_or("none")).unwrap();
        let x = Signal::from(x.clone());
        let y = self.signal(&self.map, x, given, &trace).unwrap();
        (y.into_value(), trace)
    }

    fn run(&self, x: &Tensor) -> Tensor {
        self.pass(x, Given::default()).0
    }

    /// The tokens in steps of these lengths, each going on from those before.
    fn decode(&self, x: &Tensor, steps: &[usize], trace: &Trace) -> Result<(Tensor, DecodeState)> {
        let (organisation, blocks) = build(&self.map, |p| self.modules(p))?;
        let mut state = DecodeState::new(blocks.len());
        let mut outputs = Vec::new();
        for &step in steps {
            let cx = Context {
                offset: state.length,
                ..Context::new(trace)
            };
            let piece = Signal::from(rows(x, state.length, step));
            let state_now = Some(&mut state);
            let organised =
                organisation.forward(piece, &blocks, Read::default(), &cx, None, state_now)?;
            outputs.push(organised.hidden.into_value());
            state.length += step;
        }
        Ok((Tensor::cat(&outputs, 1).unwrap(), state))
    }

    /// Sets parameters whose names contain one of these to zero.
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

/// The same with another token at `place`.
fn perturbed(x: &Tensor, place: usize) -> Tensor {
    let length = x.dims()[1];
    let other = random(&[BATCH, 1, WIDTH], 50 + place as u64);
    let mut parts = Vec::new();
    if place > 0 {
        parts.push(x.narrow(1, 0, place).unwrap());
    }
    parts.push(other);
    if place + 1 < length {
        parts.push(x.narrow(1, place + 1, length - place - 1).unwrap());
    }
    Tensor::cat(&parts, 1).unwrap()
}

fn rows(x: &Tensor, start: usize, count: usize) -> Tensor {
    x.narrow(1, start, count).unwrap()
}

#[test]
fn one_group_without_latents_is_the_plain_encoder() {
    let subject = Subject::new(spec("(2)", 1, false), false);
    let x = tokens(4);
    let (_, blocks) = build(&subject.map, |p| subject.modules(p)).unwrap();
    let trace = Trace::new();
    let table = &subject.map["organisation.positions.weight"];
    let mut plain = Signal::from(x.broadcast_add(table).unwrap());
    for block in &blocks {
        plain = block.forward(plain, &Context::new(&trace), None).unwrap();
    }
    assert_near(&subject.run(&x), plain.value(), 1e-12, "plain encoder");
}

#[test]
fn without_writing_groups_do_not_hear_of_each_other() {
    let mut subject = Subject::new(spec("(1)1(1)1(1)", 3, false), false);
    let x = tokens(12);
    let other = perturbed(&x, 6);
    let sites = Given {
        sites: Some("blocks.*.out"),
        ..Given::default()
    };
    let first = |trace: &Trace, block: usize| -> Tensor {
        let all = trace.signal(&format!("blocks.{block}.out")).unwrap();
        let all = all.value().reshape((BATCH, 12, WIDTH)).unwrap();
        rows(&all, 0, 4)
    };
    let (_, before) = subject.pass(&x, sites);
    let (_, after) = subject.pass(&other, sites);
    // With writes, what the first group is changes from the second stage on.
    assert_eq!(difference(&first(&before, 0), &first(&after, 0)), 0.0);
    assert!(difference(&first(&before, 1), &first(&after, 1)) > 1e-6);

    subject.silence(&["write.0.attention.output", "write.1.attention.output"]);
    let (y, changed) = (subject.run(&x), subject.run(&other));
    for group in [0, 2] {
        let found = difference(&rows(&y, 4 * group, 4), &rows(&changed, 4 * group, 4));
        assert_eq!(found, 0.0, "group {group}");
    }
    assert!(difference(&rows(&y, 4, 4), &rows(&changed, 4, 4)) > 1e-3);
}

#[test]
fn permuted_groups_with_their_latents_give_permuted_outputs() {
    let subject = Subject::new(spec("(1)2(1)1", 3, false), false);
    let order = [2usize, 0, 1];
    let permuted = |x: &Tensor, dim: usize, size: usize| {
        let each = order.map(|group| x.narrow(dim, group * size, size).unwrap());
        Tensor::cat(&each, dim).unwrap()
    };
    let x = tokens(12);
    let mut other = Subject::new(spec("(1)2(1)1", 3, false), false);
    let latents = &subject.map["organisation.latents.weight"];
    let latents = permuted(latents, 0, 2);
    other.map = subject.map.clone();
    other
        .map
        .insert("organisation.latents.weight".to_owned(), latents);
    let sites = Given {
        sites: Some("organisation.latents"),
        ..Given::default()
    };
    let (y, trace) = subject.pass(&x, sites);
    let (moved, moved_trace) = other.pass(&permuted(&x, 1, 4), sites);
    assert_near(&moved, &permuted(&y, 1, 4), 1e-12, "tokens");
    let z = |trace: &Trace| trace.signal("organisation.latents").unwrap().into_value();
    assert_near(
        &z(&moved_trace),
        &permuted(&z(&trace), 1, 2),
        1e-12,
        "latents",
    );
    // It is the latents that know their group.
    assert!(difference(&subject.run(&permuted(&x, 1, 4)), &permuted(&y, 1, 4)) > 1e-4);
}

#[test]
fn no_token_of_a_causal_model_hears_of_a_later_one() {
    let subject = Subject::new(spec("(1)2(1)1(1)", 4, true), true);
    let x = tokens(16);
    let y = subject.run(&x);
    for place in 0..16 {
        let other = subject.run(&perturbed(&x, place));
        for seen in 0..16 {
            let found = difference(&rows(&y, seen, 1), &rows(&other, seen, 1));
            match seen < place {
                true => assert_eq!(found, 0.0, "token {seen} hears of {place}"),
                false => assert!(found > 1e-9, "token {seen} does not hear of {place}"),
            }
        }
    }
}

/// Without the shift a token hears of later ones of its own group by way of the latents: the test
/// above would tell.
#[test]
fn latents_of_a_group_know_all_of_it() {
    let subject = Subject::new(spec("(1)1(1)", 4, true), true);
    let x = tokens(16);
    let sites = Given {
        sites: Some("organisation.latents"),
        ..Given::default()
    };
    let z = |x: &Tensor| {
        let (_, trace) = subject.pass(x, sites);
        trace.signal("organisation.latents").unwrap().into_value()
    };
    let (before, after) = (z(&x), z(&perturbed(&x, 7)));
    // Latents 2 and 3 are those of the group of token 7; both hear of it, earlier ones do not.
    assert_eq!(difference(&rows(&before, 0, 2), &rows(&after, 0, 2)), 0.0);
    for latent in 2..8 {
        assert!(difference(&rows(&before, latent, 1), &rows(&after, latent, 1)) > 1e-9);
    }
}

#[test]
fn the_first_groups_alone_give_what_they_give_among_all() {
    let subject = Subject::new(spec("(1)2(1)1(1)", 4, true), true);
    let x = tokens(16);
    let whole = subject.run(&x);
    for length in 1..16 {
        let alone = subject.run(&rows(&x, 0, length));
        assert_near(&alone, &rows(&whole, 0, length), 1e-12, "a prefix");
    }
}

/// Parts of blocks are left out in training, reading and writing never.
#[test]
fn paths_between_tokens_and_latents_are_not_dropped() {
    let drops = |block: BlockSpec| BlockSpec {
        drop_path: 1.0 - 1e-9,
        ..block
    };
    let mut fit = spec("(1)1(1)", 3, false);
    fit.block = fit.block.map(|block| Box::new(drops(*block)));
    let mut subject = Subject::with(fit, vec![drops(block(12, 4, false)); 2]);
    let x = tokens(12);
    let trained = Given {
        dropout_seed: Some(4),
        ..Given::default()
    };
    let (found, _) = subject.pass(&x, trained);
    assert!(difference(&found, &subject.run(&x)) > 1e-3);
    subject.silence(&["blocks.", "organisation.global."]);
    assert_near(
        &found,
        &subject.run(&x),
        1e-12,
        "without any part of a block",
    );
    subject.silence(&["organisation.write."]);
    assert!(difference(&found, &subject.run(&x)) > 1e-3);
}

#[test]
fn pads_change_nothing() {
    for causal in [false, true] {
        let subject = Subject::new(spec("(1)1(1)2(1)", 4, causal), causal);
        let x = tokens(7);
        let alone = subject.run(&x);
        let junk = random(&[BATCH, 9, WIDTH], 8);
        let padded = Tensor::cat(&[&x, &junk], 1).unwrap();
        let keep: Vec<u8> = (0..BATCH * 16).map(|at| u8::from(at % 16 < 7)).collect();
        let keep = Tensor::from_vec(keep, (BATCH, 16), &Device::Cpu).unwrap();
        let given = Given {
            keep: Some(&keep),
            ..Given::default()
        };
        let (y, _) = subject.pass(&padded, given);
        assert_near(&rows(&y, 0, 7), &alone, 1e-12, "pads");
    }
}

/// Each sequence of a batch is as long as its own pads say: one has two groups, the other four.
#[test]
fn sequences_of_different_numbers_of_groups_share_a_batch() {
    for causal in [false, true] {
        let subject = Subject::new(spec("(1)1(1)2(1)", 4, causal), causal);
        let x = tokens(16);
        for lengths in [[7, 14], [14, 7]] {
            let keep = lengths.map(|length| (0..16).map(move |at| u8::from(at < length)));
            let keep: Vec<u8> = keep.into_iter().flatten().collect();
            let keep = Tensor::from_vec(keep, (BATCH, 16), &Device::Cpu).unwrap();
            let given = Given {
                keep: Some(&keep),
                ..Given::default()
            };
            let (y, _) = subject.pass(&x, given);
            for (row, length) in lengths.into_iter().enumerate() {
                let own = |x: &Tensor| rows(&x.narrow(0, row, 1).unwrap(), 0, length);
                let alone = subject.run(&own(&x));
                assert_near(&own(&y), &alone, 1e-12, &format!("{length} tokens"));
            }
        }
    }
}

#[test]
fn gradients_equal_central_differences() {
    let mut feedforward = spec("(1)1(1)1", 2, false);
    feedforward.read_feedforward = block(6, 1, false).feedforward;
    feedforward.output = FitOutput::Latents;
    feedforward.width = Some(WIDTH);
    let cases = [
        (spec("(1)1(1)", 2, false), false, 8),
        (spec("(1)1(1)", 2, true), true, 7),
        (feedforward, false, 8),
    ];
    for (spec, causal, length) in cases {
        let subject = Subject::new(spec, causal);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), tokens(length));
        let error = gradient_error(&inputs, 2, |inputs| {
            let x = Signal::from(inputs["x"].clone());
            let trace = Trace::new();
            let y = subject.signal(inputs, x, Given::default(), &trace);
            contracted(y.unwrap().value())
        });
        assert!(error < 1e-6, "causal {causal}: {error:e}");
    }
}

#[test]
fn lenses_follow_tokens_through_latents() {
    for causal in [false, true] {
        let subject = Subject::new(spec("(1)1(1)", 2, causal), causal);
        let x = tokens(7);
        let trace = Trace::new().follow_conservation();
        let rules = |bias| StreamRules {
            bias,
            ..StreamRules::default()
        };
        let streamed = |bias, trace: &Trace| {
            let partition = Partition::positions(7);
            let x = Signal::from(x.clone())
                .into_streams(partition, rules(bias))
                .unwrap();
            subject
                .signal(&subject.map, x, Given::default(), trace)
                .unwrap()
        };
        let y = streamed(StreamRules::default().bias, &trace);
        assert_near(y.value(), &subject.run(&x), 1e-12, "value under streams");
        for (site, error) in trace.conservation() {
            assert!(error < 1e-10, "{site}: {error:e}");
        }
        let contributions = streamed(BiasSplit::Drop, &Trace::new())
            .contributions()
            .unwrap();
        let (x, leaf) = Signal::from(x.clone())
            .into_relevance(RelevanceRules::value_only())
            .unwrap();
        let y = subject
            .signal(&subject.map, x, Given::default(), &Trace::new())
            .unwrap();
        let pick = |t: &Tensor| {
            let t = t.narrow(t.rank() - 1, 3, 1).unwrap();
            t.narrow(t.rank() - 2, 6, 1).unwrap()
        };
        let gradients = pick(y.value()).sum_all().unwrap().backward().unwrap();
        let relevance = relevance_of(leaf.as_tensor(), &gradients).unwrap();
        let relevance = relevance.sum(2).unwrap().t().unwrap();
        let expected = pick(&contributions).reshape((7, BATCH)).unwrap();
        assert_near(
            &relevance.contiguous().unwrap(),
            &expected,
            1e-10,
            "relevance",
        );
    }
}
