//! Vcc: VIP tokens and blocks of the others.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, random, values,
};
use lapidary_kernels::{Device, Tensor, Var};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::vcc::store::DifferenceStore;
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

#[test]
fn nothing_is_lost_in_compression() {
    let mut subject = Subject::new(spec(2), 3);
    subject.silence(&["attention.output", "feedforward.down"]);
    let mut generator = ChaCha8Rng::seed_from_u64(1);
    for length in [3, 4, 17, 18, 19, 40] {
        let x = tokens(length);
        assert_near(&subject.run(&x), &x, 1e-12, "without pads");
        let mut drawn = || -> Vec<u8> {
            (0..length)
                .map(|_| u8::from(generator.random_bool(0.6)))
                .collect()
        };
        let keep = mask(&[drawn(), drawn()]);
        let given = Given {
            keep: Some(&keep),
            ..Given::default()
        };
        let (y, _) = subject.pass(&x, given, "none");
        assert_near(&y, &x, 1e-12, "with pads");
    }
}

#[test]
fn with_every_block_in_full_it_is_the_plain_encoder() {
    for position in [PositionSpec::None, BUCKETS] {
        let subject = Subject::with(spec(5), vec![block(position); 2]);
        let x = tokens(LENGTH);
        assert_near(
            &subject.run(&x),
            &subject.plain(&subject.map, &x, None),
            1e-12,
            "plain",
        );
        let keep = mask(&[[vec![1; 11], vec![0; 6]].concat(), vec![1; LENGTH]]);
        let given = Given {
            keep: Some(&keep),
            ..Given::default()
        };
        let (y, _) = subject.pass(&x, given, "none");
        let plain = subject.plain(&subject.map, &x, Some(&keep));
        assert_near(&rows(&y, 0, 11), &rows(&plain, 0, 11), 1e-12, "with pads");
        // Gradients too.
        let gradients = |compressed: bool| {
            let variables: Vec<(String, Var)> = subject
                .map
                .iter()
                .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
                .collect();
            let live: Map = variables
                .iter()
                .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
                .collect();
            let y = match compressed {
                true => {
                    let x = Signal::from(x.clone());
                    let trace = Trace::new();
                    let y = subject.organised(&live, x, Given::default(), &trace);
                    y.unwrap().hidden.into_value()
                }
                false => subject.plain(&live, &x, None),
            };
            let found = contracted(&y).backward().unwrap();
            let each = variables.into_iter().map(|(name, var)| {
                let gradient = found.get(var.as_tensor()).unwrap().clone();
                (name, gradient)
            });
            each.collect::<Map>()
        };
        let plain = gradients(false);
        for (name, gradient) in gradients(true) {
            assert_near(&gradient, &plain[&name], 1e-10, &name);
        }
    }
}

#[test]
fn blocks_of_equal_tokens_are_attended_to_as_the_tokens_are() {
    let base = tokens(LENGTH);
    let equal = |t: usize| if t < 2 { t } else { 2 + (t - 2) / 3 * 3 };
    let same: Vec<u32> = (0..LENGTH).map(|t| equal(t) as u32).collect();
    let same = Tensor::new(same.as_slice(), &Device::Cpu).unwrap();
    let x = base.index_select(&same, 1).unwrap();
    let corrected = Subject::new(spec(1), 2);
    let plain = corrected.plain(&corrected.map, &x, None);
    assert_near(&corrected.run(&x), &plain, 1e-12, "with the correction");
    let mut uncorrected = Subject::new(
        VccSpec {
            scale_correction: false,
            ..spec(1)
        },
        2,
    );
    uncorrected.map.clone_from(&corrected.map);
    assert!(difference(&uncorrected.run(&x), &plain) > 1e-3);
    // A block that isn't full counts as often as it has real tokens.
    let keep = mask(&[[vec![1; 12], vec![0; 5]].concat(), vec![1; LENGTH]]);
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let (y, _) = corrected.pass(&x, given, "none");
    let plain = corrected.plain(&corrected.map, &x, Some(&keep));
    assert_near(
        &rows(&y, 0, 12),
        &rows(&plain, 0, 12),
        1e-12,
        "a block with pads",
    );
}

#[test]
fn what_is_not_refined_moves_as_one() {
    let subject = Subject::new(spec(2), 1);
    let x = tokens(LENGTH);
    let (y, trace) = subject.pass(&x, Given::default(), "blocks.0.importance");
    let fine = fine_blocks(&trace, "blocks.0.importance", 2);
    for (sequence, fine) in fine.iter().enumerate() {
        for block in 0..5 {
            let of = |x: &Tensor, t: usize| rows(x, 2 + 3 * block + t, 1).get(sequence).unwrap();
            let moved = |t: usize| {
                let (before, after) = (of(&x, t), of(&y, t));
                let other = ((of(&x, 0) - before).unwrap() - (of(&y, 0) - after).unwrap()).unwrap();
                values(&other)
                    .into_iter()
                    .fold(0.0, |m: f64, v| m.max(v.abs()))
            };
            let changed = difference(&of(&x, 0), &of(&y, 0));
            assert!(changed > 1e-3, "block {block} doesn't move");
            let apart = moved(1).max(moved(2));
            match fine.contains(&block) {
                true => assert!(apart > 1e-3, "fine block {block} moves as one"),
                false => assert!(apart < 1e-12, "coarse block {block}: {apart:e}"),
            }
        }
    }
}

/// Scores of the short sequence that a block sees, written out: `s q k + ln count + bias of distance`.
#[test]
fn attention_counts_tokens_and_knows_mean_positions() {
    let subject = Subject::with(spec(1), vec![block(BUCKETS)]);
    let x = tokens(LENGTH);
    let sites = "blocks.0.{importance,attention.{query,key,weights}}";
    let (_, trace) = subject.pass(&x, Given::default(), sites);
    let flat = |site: &str| values(trace.signal(&format!("blocks.0.{site}")).unwrap().value());
    let (q, k, weights) = (
        flat("attention.query"),
        flat("attention.key"),
        flat("attention.weights"),
    );
    let table = &subject.map["blocks.0.attention.position.buckets"];
    let table = table.to_vec2::<f64>().unwrap();
    let fine = fine_blocks(&trace, "blocks.0.importance", 1);
    let short = 3 + 4 + 2;
    for sequence in 0..BATCH {
        let first = fine[sequence][0];
        let mut places: Vec<usize> = (0..3).map(|t| 2 + 3 * first + t).collect();
        let mut counts = vec![1.0f64; 3];
        for block in (0..5).filter(|block| *block != first) {
            places.push(2 + 3 * block + 1);
            counts.push(3.0);
        }
        places.extend([0, 1]);
        counts.extend([1.0, 1.0]);
        // Distances up to 20 in 8 buckets: 4 for each direction, 2 of them exact.
        let bucket = |key: usize, query: usize| {
            let base = if key > query { 4 } else { 0 };
            let apart = key.abs_diff(query);
            let within = match apart {
                0 | 1 => apart,
                _ => {
                    let log = (apart as f64 / 2.0).ln() / 10f64.ln();
                    (2 + (log * 2.0) as usize).min(3)
                }
            };
            base + within
        };
        for head in 0..2 {
            for i in 0..short {
                let at =
                    |x: &[f64], t: usize, f: usize| x[(sequence * short + t) * 6 + head * 3 + f];
                let scores: Vec<f64> = (0..short)
                    .map(|j| {
                        let product: f64 = (0..3).map(|f| at(&q, i, f) * at(&k, j, f)).sum();
                        product / 3f64.sqrt()
                            + counts[j].ln()
                            + table[bucket(places[j], places[i])][head]
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|score| score.exp()).sum();
                for (j, score) in scores.iter().enumerate() {
                    let found = weights[((sequence * 2 + head) * short + i) * short + j];
                    assert!((found - score.exp() / sum).abs() < 1e-10, "{i} to {j}");
                }
            }
        }
    }
}

/// The score of a block is what the VIP tokens give its mean, by this block's norm, queries and keys.
#[test]
fn blocks_are_chosen_by_what_vips_attend_to() {
    let subject = Subject::new(spec(2), 1);
    let x = tokens(LENGTH);
    let (_, trace) = subject.pass(&x, Given::default(), "blocks.0.importance");
    let found = values(trace.signal("blocks.0.importance").unwrap().value());
    let of = |name: &str| values(&subject.map[&format!("blocks.0.{name}")]);
    let (weight, bias) = (of("attention_norm.weight"), of("attention_norm.bias"));
    let projected = |x: &[f64], name: &str| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / 6.0;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 6.0;
        let normed: Vec<f64> = (0..6)
            .map(|f| (x[f] - mean) / (variance + 1e-5).sqrt() * weight[f] + bias[f])
            .collect();
        let (w, b) = (
            of(&format!("attention.{name}.weight")),
            of(&format!("attention.{name}.bias")),
        );
        (0..6)
            .map(|o| b[o] + (0..6).map(|i| w[o * 6 + i] * normed[i]).sum::<f64>())
            .collect()
    };
    let x = values(&x);
    for sequence in 0..BATCH {
        let token = |t: usize| &x[(sequence * LENGTH + t) * 6..][..6];
        let means: Vec<Vec<f64>> = (0..5)
            .map(|block| {
                let mean =
                    |f: usize| (0..3).map(|t| token(2 + 3 * block + t)[f]).sum::<f64>() / 3.0;
                (0..6).map(mean).collect()
            })
            .collect();
        let mut expected = [0.0; 5];
        for vip in 0..2 {
            let q = projected(token(vip), "query");
            for head in 0..2 {
                let scores: Vec<f64> = means
                    .iter()
                    .map(|mean| {
                        let k = projected(mean, "key");
                        let product: f64 = (0..3).map(|f| q[head * 3 + f] * k[head * 3 + f]).sum();
                        (product / 3f64.sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for (all, score) in expected.iter_mut().zip(&scores) {
                    *all += score / sum / 4.0;
                }
            }
        }
        for (block, expected) in expected.iter().enumerate() {
            assert!((found[sequence * 5 + block] - expected).abs() < 1e-10);
        }
    }
}

/// Weights are 1, and what makes a token's weight larger makes a fine block more important and a coarse
/// one less.
#[test]
fn straight_through_weights_teach_the_selection() {
    let mut subject = Subject::new(spec(2), 1);
    // The scores' share in the gradient taken out: attention writes nothing.
    subject.silence(&["attention.output"]);
    let x = tokens(LENGTH);
    let trace = Trace::new().tap("blocks.0.importance").unwrap();
    let signal = Signal::from(x.clone());
    let y = subject.organised(&subject.map, signal, Given::default(), &trace);
    let y = y.unwrap().hidden.into_value();
    assert_near(&y, &subject.run(&x), 0.0, "a tap changes nothing");
    let change = (&y - &x).unwrap();
    let loss = (&y * change.detach()).unwrap().sum_all().unwrap();
    let record = trace.record("blocks.0.importance").unwrap();
    let gradient = record.gradient(&loss.backward().unwrap()).unwrap();
    let gradient = gradient.to_vec2::<f64>().unwrap();
    let importance = record.signal.value().to_vec2::<f64>().unwrap();
    for (gradient, importance) in gradient.iter().zip(&importance) {
        let mut blocks: Vec<usize> = (0..5).collect();
        blocks.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
        for (rank, block) in blocks.into_iter().enumerate() {
            match rank < 2 {
                true => assert!(gradient[block] > 1e-6, "fine: {}", gradient[block]),
                false => assert!(gradient[block] < -1e-6, "coarse: {}", gradient[block]),
            }
        }
    }
}

#[test]
fn the_order_of_blocks_says_nothing_to_vips() {
    let subject = Subject::new(spec(2), 3);
    let x = tokens(LENGTH);
    let order = [3usize, 0, 4, 2, 1];
    let blocks = order.map(|block| rows(&x, 2 + 3 * block, 3));
    let mut parts = vec![rows(&x, 0, 2)];
    parts.extend(blocks);
    let permuted = Tensor::cat(&parts, 1).unwrap();
    let (y, moved) = (subject.run(&x), subject.run(&permuted));
    assert_near(&rows(&moved, 0, 2), &rows(&y, 0, 2), 1e-12, "VIPs");
    let vips = Subject {
        spec: VccSpec {
            output: VccOutput::Vips,
            ..spec(2)
        },
        blocks: subject.blocks.clone(),
        map: subject.map.clone(),
    };
    assert_near(&vips.run(&x), &rows(&y, 0, 2), 0.0, "VIPs alone");
}

#[test]
fn pads_are_never_preferred_and_contribute_nothing() {
    let subject = Subject::new(spec(4), 2);
    let x = tokens(LENGTH);
    let alone = subject.run(&x);
    let junk = random(&[BATCH, 10, WIDTH], 8);
    let long = Tensor::cat(&[&x, &(junk * 10.0).unwrap()], 1).unwrap();
    let keep = mask(&vec![[vec![1; LENGTH], vec![0; 10]].concat(); BATCH]);
    for draw in [None, Some(7)] {
        // At random too, blocks of pads come last.
        let chosen = Subject {
            spec: VccSpec {
                exploration: 0.0,
                selection: match draw {
                    None => Selection::Attention,
                    Some(_) => Selection::Random,
                },
                fine: 5,
                ..spec(4)
            },
            blocks: subject.blocks.clone(),
            map: subject.map.clone(),
        };
        let given = Given {
            keep: Some(&keep),
            draw,
            ..Given::default()
        };
        let (y, _) = chosen.pass(&long, given, "none");
        let plain = subject.plain(&subject.map, &x, None);
        assert_near(
            &rows(&y, 0, LENGTH),
            &plain,
            1e-12,
            "all real blocks are fine",
        );
    }
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let (y, _) = subject.pass(&long, given, "none");
    assert_near(&rows(&y, 0, LENGTH), &alone, 1e-12, "pads");
    // To the left too, VIPs being the first real tokens.
    let left = Tensor::cat(&[&rows(&long, LENGTH, 10), &x], 1).unwrap();
    let keep = mask(&vec![[vec![0; 10], vec![1; LENGTH]].concat(); BATCH]);
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let (y, _) = subject.pass(&left, given, "blocks.0.importance");
    assert!(values(&y).iter().all(|v| v.is_finite()));
}

#[test]
fn the_cost_of_a_block_grows_with_the_number_of_means_alone() {
    let subject = Subject::new(
        VccSpec {
            size: 16,
            ..VccSpec::new(4, 3)
        },
        1,
    );
    let metered = |length: usize| {
        let meter = Meter::new();
        let x = random(&[1, length, WIDTH], 2);
        let x = Signal::from(x).into_metered(meter.clone());
        let trace = Trace::new();
        subject
            .organised(&subject.map, x, Given::default(), &trace)
            .unwrap();
        meter
    };
    let attention = |length: usize| metered(length).sites()["blocks.0.attention.mixed"].flops;
    for blocks in [20usize, 40, 80] {
        let r = 3 * 16 + (blocks - 3) + 4;
        // One more feature for the bias: heads of 4 and values of 3.
        let expected = (r * r * 2 * (2 * 4 + 2 * 3 + 5)) as u64;
        assert_eq!(attention(4 + 16 * blocks), expected);
    }
    // Everything else is linear: means, differences, the selection.
    let rest = |length: usize| {
        let meter = metered(length);
        let pairs = meter.sites()["blocks.0.attention.mixed"].flops;
        (meter.total().flops - pairs) as f64
    };
    let exponent = (rest(64_004) / rest(16_004)).ln() / 4f64.ln();
    assert!((exponent - 1.0).abs() < 0.05, "{exponent}");
}

#[test]
fn passes_repeat_and_draws_explore() {
    let exploring = Subject::new(
        VccSpec {
            exploration: 1.0,
            ..spec(2)
        },
        2,
    );
    let x = tokens(LENGTH);
    let drawn = |draw| {
        let given = Given {
            draw,
            ..Given::default()
        };
        exploring.pass(&x, given, "none").0
    };
    assert_eq!(values(&drawn(None)), values(&drawn(None)));
    assert_eq!(values(&drawn(Some(1))), values(&drawn(Some(1))));
    let others = (2..10).filter(|seed| difference(&drawn(Some(*seed)), &drawn(Some(1))) > 1e-9);
    assert!(others.count() > 3);
    // Without a draw it doesn't explore.
    let settled = Subject::new(spec(2), 2);
    assert_near(&drawn(None), &settled.run(&x), 0.0, "evaluation");
}

#[test]
fn vips_are_those_that_are_said_to_be() {
    let x = tokens(LENGTH);
    let mut ids = vec![vec![1u32; LENGTH]; BATCH];
    ids[0][5] = 9;
    ids[0][11] = 9;
    ids[1][16] = 9;
    ids[1][3] = 9;
    let ids = Tensor::from_vec(ids.concat(), (BATCH, LENGTH), &Device::Cpu).unwrap();
    let named = |importance| {
        Subject::new(
            VccSpec {
                importance,
                output: VccOutput::Vips,
                ..spec(2)
            },
            1,
        )
    };
    let by_id = named(Importance::Token { id: 9 });
    let given = Given {
        ids: Some(&ids),
        ..Given::default()
    };
    let (vips, _) = by_id.pass(&x, given, "none");
    // The same sequences with those tokens first.
    let reordered = |row: usize, first: [u32; 2]| {
        let others = (0..LENGTH as u32).filter(|t| !first.contains(t));
        let order: Vec<u32> = first.into_iter().chain(others).collect();
        let order = Tensor::new(order.as_slice(), &Device::Cpu).unwrap();
        x.narrow(0, row, 1)
            .unwrap()
            .index_select(&order, 1)
            .unwrap()
    };
    let moved = Tensor::cat(&[reordered(0, [5, 11]), reordered(1, [3, 16])], 0).unwrap();
    let first = named(Importance::First);
    assert_near(&vips, &first.run(&moved), 1e-12, "by id");
    let by_type = named(Importance::TokenType { id: 9 });
    let given = Given {
        token_types: Some(&ids),
        ..Given::default()
    };
    assert_near(&by_type.pass(&x, given, "none").0, &vips, 0.0, "by type");
    let said = by_type.organised(
        &by_type.map,
        Signal::from(x.clone()),
        Given::default(),
        &Trace::new(),
    );
    assert!(
        said.unwrap_err()
            .to_string()
            .contains("token types is \"absent\"")
    );

    // More of them than slots, and none at all: everything stays at its place.
    let mut silent = Subject::new(
        VccSpec {
            importance: Importance::Token { id: 1 },
            ..spec(2)
        },
        2,
    );
    silent.silence(&["attention.output", "feedforward.down"]);
    let none = (ids.zeros_like()).unwrap();
    for ids in [&ids, &none] {
        let given = Given {
            ids: Some(ids),
            ..Given::default()
        };
        assert_near(&silent.pass(&x, given, "none").0, &x, 1e-12, "places");
    }
}

#[test]
fn segments_and_whole_blocks_stand_among_compressed_ones() {
    // Segments of 5, then compressed, whole, compressed; with every block in full, all but the first
    // are plain.
    let mixed = Subject::new(
        VccSpec {
            segment_blocks: 1,
            segment: 5,
            whole_blocks: vec![2],
            ..spec(5)
        },
        4,
    );
    let x = tokens(LENGTH);
    let (_, blocks) = build(&mixed.map, |p| mixed.modules(p)).unwrap();
    let trace = Trace::new();
    let cx = Context::new(&trace);
    let segments: Vec<Tensor> = [(0, 5), (5, 5), (10, 5), (15, 2)]
        .into_iter()
        .map(|(start, count)| {
            let segment = Signal::from(rows(&x, start, count));
            blocks[0].forward(segment, &cx, None).unwrap().into_value()
        })
        .collect();
    let mut expected = Signal::from(Tensor::cat(&segments, 1).unwrap());
    for block in &blocks[1..] {
        expected = block.forward(expected, &cx, None).unwrap();
    }
    assert_near(&mixed.run(&x), expected.value(), 1e-12, "mixed stack");
    // And with coarse blocks it is something else, of the same shape.
    let coarse = Subject {
        spec: VccSpec {
            fine: 1,
            ..mixed.spec.clone()
        },
        blocks: mixed.blocks.clone(),
        map: mixed.map.clone(),
    };
    assert!(difference(&coarse.run(&x), expected.value()) > 1e-6);
}

#[test]
fn gradients_equal_central_differences_where_nothing_is_chosen() {
    let subject = Subject::new(
        VccSpec {
            segment_blocks: 1,
            segment: 4,
            ..spec(5)
        },
        3,
    );
    let mut inputs = subject.map.clone();
    inputs.insert("x".to_owned(), tokens(LENGTH));
    let error = gradient_error(&inputs, 2, |inputs| {
        let x = Signal::from(inputs["x"].clone());
        let trace = Trace::new();
        let y = subject.organised(inputs, x, Given::default(), &trace);
        contracted(y.unwrap().hidden.value())
    });
    assert!(error < 1e-6, "{error:e}");
}

/// With coarse blocks the selection has a gradient of its own; what isn't the selection's is the
/// derivative.
#[test]
fn gradients_of_what_is_not_the_selection_equal_central_differences() {
    let subject = Subject::new(spec(2), 2);
    let last = "blocks.1.feedforward.down.weight";
    let inputs = Map::from([(last.to_owned(), subject.map[last].clone())]);
    let error = gradient_error(&inputs, 6, |inputs| {
        let mut map = subject.map.clone();
        map.extend(inputs.clone());
        let trace = Trace::new();
        let y = subject.organised(&map, Signal::from(tokens(LENGTH)), Given::default(), &trace);
        contracted(y.unwrap().hidden.value())
    });
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn lenses_follow_tokens_through_means() {
    let subject = Subject::new(spec(2), 2);
    let x = tokens(LENGTH);
    let streamed = |bias, trace: &Trace| {
        let rules = StreamRules {
            bias,
            ..StreamRules::default()
        };
        let x = Signal::from(x.clone()).into_streams(Partition::positions(LENGTH), rules);
        let y = subject.organised(&subject.map, x.unwrap(), Given::default(), trace);
        y.unwrap().hidden
    };
    let trace = Trace::new().follow_conservation();
    let y = streamed(StreamRules::default().bias, &trace);
    assert_near(y.value(), &subject.run(&x), 1e-12, "value under streams");
    for (site, error) in trace.conservation() {
        assert!(error < 1e-10, "{site}: {error:e}");
    }
    let contributions = streamed(BiasSplit::Drop, &Trace::new())
        .contributions()
        .unwrap();
    let (signal, leaf) = Signal::from(x.clone())
        .into_relevance(RelevanceRules::value_only())
        .unwrap();
    let y = subject
        .organised(&subject.map, signal, Given::default(), &Trace::new())
        .unwrap()
        .hidden;
    for token in [0, 1, 9, LENGTH - 1] {
        let pick = |t: &Tensor| {
            let t = t.narrow(t.rank() - 1, 3, 1).unwrap();
            t.narrow(t.rank() - 2, token, 1).unwrap()
        };
        let gradients = pick(y.value()).sum_all().unwrap().backward().unwrap();
        let relevance = relevance_of(leaf.as_tensor(), &gradients).unwrap();
        let relevance = relevance.sum(2).unwrap().t().unwrap().contiguous().unwrap();
        let expected = pick(&contributions).reshape((LENGTH, BATCH)).unwrap();
        assert_near(&relevance, &expected, 1e-10, "relevance");
    }
}

#[test]
fn the_store_writes_what_changed_and_nothing_else() {
    let rows = |start: usize, count: usize| {
        let each = (start..start + count).flat_map(|row| [row as f64, 0.5]);
        let flat: Vec<f64> = each.collect();
        Signal::from(Tensor::from_vec(flat, (count, 2), &Device::Cpu).unwrap())
    };
    let mut store = DifferenceStore::new(rows(0, 6)).unwrap();
    let mut expected: Vec<f64> = (0..6).map(f64::from).collect();
    let mut generator = ChaCha8Rng::seed_from_u64(4);
    for step in 1..30 {
        let mut blocks: Vec<usize> = (0..6).collect();
        blocks.shuffle(&mut generator);
        blocks.truncate(2);
        let fresh = 100 * step;
        store.write(&blocks, rows(fresh, 2)).unwrap();
        for (block, value) in blocks.iter().zip(fresh..) {
            expected[*block] = value as f64;
        }
        let order = [4usize, 1, 1, 0, 5, 3, 2];
        let found = store
            .read(&order)
            .unwrap()
            .into_value()
            .to_vec2::<f64>()
            .unwrap();
        for (row, block) in found.iter().zip(order) {
            assert_eq!(row[0], expected[block]);
        }
    }
    // Pieces that nothing is read from any more are let go: at most the first and one per block.
    assert!(store.rows() <= 6 + 2 * 6, "{}", store.rows());
    assert!(store.read(&[6]).is_err());
    assert!(store.write(&[7], rows(0, 1)).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut VccSpec, &mut Vec<BlockSpec>), expected: &str| {
        let (mut spec, mut blocks) = (spec(2), vec![block(PositionSpec::None); 2]);
        change(&mut spec, &mut blocks);
        let model = Surroundings {
            blocks: &blocks,
            width: WIDTH,
            length: 64,
        };
        let spec = OrganisationSpec::VipCentric(spec);
        let said = spec
            .validate(&model, "organisation")
            .unwrap_err()
            .to_string();
        assert!(said.starts_with(expected), "{said}");
    };
    let attention = |block: &mut BlockSpec, change: &dyn Fn(&mut MultiHeadSpec)| {
        if let MixerSpec::MultiHead(attention) = &mut block.attention {
            change(attention);
        }
    };
    refused(&|spec, _| spec.fine = 0, "organisation.fine is 0");
    refused(&|spec, _| spec.vips = 0, "organisation.vips is 0");
    refused(&|spec, _| spec.size = 0, "organisation.size is 0");
    refused(
        &|spec, _| spec.segment_blocks = 3,
        "organisation.segment_blocks is 3",
    );
    refused(
        &|spec, _| spec.whole_blocks = vec![2],
        "organisation.whole_blocks is 2",
    );
    refused(
        &|spec, _| spec.exploration = 1.5,
        "organisation.exploration is 1.5",
    );
    refused(
        &|_, blocks| attention(&mut blocks[1], &|spec| spec.causal = true),
        "blocks.1.attention is \"causal\"",
    );
    refused(
        &|_, blocks| attention(&mut blocks[1], &|spec| spec.window = Some(3)),
        "blocks.1.attention.window is",
    );
    refused(
        &|_, blocks| attention(&mut blocks[0], &|spec| spec.position = PositionSpec::Alibi),
        "blocks.0.attention.position.kind is \"alibi\"",
    );
    refused(
        &|_, blocks| blocks[0].wiring = Wiring::PostNorm,
        "blocks.0.wiring is \"post-norm\"",
    );
    refused(
        &|_, blocks| blocks[0].attention = MixerSpec::Absent,
        "blocks.0.attention.kind is \"absent\"",
    );
    // Segments may know positions in any way.
    let segmented = VccSpec {
        segment_blocks: 1,
        ..spec(2)
    };
    Subject::with(
        segmented,
        vec![block(PositionSpec::Alibi), block(PositionSpec::None)],
    );
}
