//! What every kind of part must keep, checked on blocks that use each of them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod cases;
mod costs;
mod lenses;
mod refusals;

use std::collections::{BTreeMap, BTreeSet};

use crate::common;
use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, is_finite, random,
};
use cases::*;
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::mechanism::combiner::{
    CombinerForm, CombinerSpec, Pooling, RowSource, Summary,
};
use lapidary_parts::attention::mechanism::doubly_stochastic::{
    Ansatz, CircuitSpec, DoublyStochasticSpec, Operator, Over, SinkhornForm, Statistic, Training,
};
use lapidary_parts::attention::mechanism::ecoformer::{Bandwidth, EcoformerSpec};
use lapidary_parts::attention::mechanism::fastmax::{FastmaxSpec, Normalisation};
use lapidary_parts::attention::mechanism::kernelized::{
    KernelizedSpec, Learned, ReadOut, SpectrumSpec,
};
use lapidary_parts::attention::mechanism::linformer::{
    LinformerSpec, Project, Projection, Sharing,
};
use lapidary_parts::attention::mechanism::lion::{Curve, LionDecay, LionForm, LionImage, LionSpec};
use lapidary_parts::attention::mechanism::mra::{MraSpec, Tiles};
use lapidary_parts::attention::mechanism::reformer::{ReformerSpec, Rotations};
use lapidary_parts::attention::mechanism::soft::{Landmarks, SoftSpec};
use lapidary_parts::attention::mechanism::sparse::{BlockLayout, SparsePattern, SparseSpec, Steps};
use lapidary_parts::attention::mechanism::subsampled::{Selection, SubsampledSpec};
use lapidary_parts::attention::mechanism::topological::{
    FeatureMap, GraphSpec, Mask, Metric, TopologicalSpec,
};
use lapidary_parts::attention::wavelet::{Family, WaveletSpec};
use lapidary_parts::attention::{
    LocalFilter, MechanismSpec, MixerSpec, MultiHeadSpec, OutputProjection, QueryKeyNorm,
    QueryKeySharing,
};
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::coding_step::CodingStep;
use lapidary_parts::feedforward::{
    DenseSpec, FeedforwardSpec, GatedSpec, LinearSpec, Mixture, MixtureSpec, SparseCodeSpec,
};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::position::{FireSpec, KeptPairs, PositionSpec, RotaryScaling, RotarySpec};
use lapidary_parts::recurrent::{Mamba2Spec, MambaSpec};
use lapidary_parts::state::MixerState;
use lapidary_parts::{Context, Result};
use lapidary_signal::meter::Meter;
use lapidary_signal::relevance::{ActivationRule, AttentionRule, RelevanceRules, relevance_of};
use lapidary_signal::streams::{BiasSplit, Partition, ProductSplit, Slope, StreamRules};
use lapidary_signal::{Signal, Trace};

const WIDTH: usize = 8;
const BATCH: usize = 2;
const LENGTH: usize = 6;
const MEMORY: usize = 4;

/// Names the variants of a spec. A new variant doesn't compile until it is named here, and then
/// fails `every_kind_has_a_case` until a case below uses it.
macro_rules! kinds {
    ($name:ident, $all:ident, $spec:ident: $($variant:ident),+) => {
        const $all: &[&str] = &[$(concat!(stringify!($spec), "::", stringify!($variant))),+];

        fn $name(spec: &$spec) -> &'static str {
            match spec {
                $($spec::$variant { .. } => {
                    concat!(stringify!($spec), "::", stringify!($variant))
                })+
            }
        }
    };
}

kinds!(mixer, MIXERS, MixerSpec: MultiHead, Mamba, Mamba2, Wavelet, Absent);
kinds!(feedforward, FEEDFORWARDS, FeedforwardSpec: Dense, Gated, Mixture, Linear, SparseCode);
kinds!(norm, NORMS, NormSpec: Layer, Rms, None);
kinds!(position, POSITIONS, PositionSpec:
    None, Rotary, Alibi, RelativeBuckets, KerpleLogarithmic, KerplePower, Sandwich, Fire);
kinds!(mechanism, MECHANISMS, MechanismSpec:
    Softmax, Linformer, Lion, Fastmax, Kernelized, Sparse, Reformer, Combiner,
    DoublyStochastic, Subsampled, Topological, Soft, Ecoformer, Mra);
kinds!(scaling, SCALINGS, RotaryScaling: None, Linear, Llama3);
kinds!(wiring, WIRINGS, Wiring: PreNorm, PostNorm, Parallel, Replacing, Reversed);
kinds!(activation, ACTIVATIONS, ActivationSpec:
    Identity, Relu, Gelu, GeluTanh, QuickGelu, Silu, Tanh, Sigmoid);

#[test]
fn every_kind_has_a_case() {
    let mut used = BTreeSet::new();
    for (_, spec) in cases() {
        used.insert(wiring(&spec.wiring));
        used.insert(norm(&spec.norm));
        used.insert(mixer(&spec.attention));
        if let MixerSpec::MultiHead(heads) = &spec.attention {
            used.insert(position(&heads.position));
            used.insert(mechanism(&heads.mechanism));
            if let PositionSpec::Rotary(rotary) = &heads.position {
                used.insert(scaling(&rotary.scaling));
            }
        }
        if let Some(part) = &spec.feedforward {
            used.insert(feedforward(part));
            used.extend(match part {
                FeedforwardSpec::Dense(dense) => Some(activation(&dense.activation)),
                FeedforwardSpec::Gated(gated) => Some(activation(&gated.activation)),
                FeedforwardSpec::Mixture(mixture) => Some(activation(&mixture.activation)),
                FeedforwardSpec::Linear(_) | FeedforwardSpec::SparseCode(_) => None,
            });
        }
        if let MixerSpec::Mamba(mamba) = &spec.attention {
            used.insert(activation(&mamba.activation));
        }
        if let MixerSpec::Mamba2(mamba) = &spec.attention {
            used.insert(activation(&mamba.activation));
        }
    }
    let all = [
        MIXERS,
        FEEDFORWARDS,
        NORMS,
        POSITIONS,
        MECHANISMS,
        SCALINGS,
        WIRINGS,
        ACTIVATIONS,
    ];
    for kind in all.into_iter().flatten() {
        assert!(used.contains(kind), "no case uses {kind}");
    }
}

/// A case with drawn parameters.
struct Case {
    name: &'static str,
    spec: BlockSpec,
    map: Map,
}

/// What a pass is given beside the tokens.
#[derive(Clone, Copy, Default)]
struct Given<'a> {
    padding: Option<&'a Tensor>,
    offset: usize,
    dropout_seed: Option<u64>,
    memory: Option<&'a Tensor>,
    memory_padding: Option<&'a Tensor>,
}

impl Case {
    fn all() -> Vec<Self> {
        cases()
            .into_iter()
            .map(|(name, spec)| {
                spec.validate(WIDTH, "block").unwrap();
                let map = draw(5, |p| Block::new(&spec, WIDTH, p));
                Self { name, spec, map }
            })
            .collect()
    }

    fn block(&self, map: &Map) -> Block {
        build(map, |p| Block::new(&self.spec, WIDTH, p)).unwrap()
    }

    /// One pass of `x` through the block, with a memory where one is needed.
    fn pass(
        &self,
        block: &Block,
        x: Signal,
        given: Given<'_>,
        trace: &Trace,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let dtype = x.dtype();
        let memory = match given.memory {
            Some(memory) => memory.clone(),
            None => default_memory(x.dims()[0]),
        };
        let memory = Signal::from(memory.to_dtype(dtype).unwrap());
        let cx = Context {
            trace,
            key_padding: given.padding,
            offset: given.offset,
            dropout_seed: given.dropout_seed,
            memory: Some((&memory, given.memory_padding)),
            ..Context::new(trace)
        };
        block.forward(x, &cx, state)
    }

    fn run(&self, x: &Tensor) -> Tensor {
        self.run_given(x, Given::default())
    }

    fn run_given(&self, x: &Tensor, given: Given<'_>) -> Tensor {
        let block = self.block(&self.map);
        let x = Signal::from(x.clone());
        let y = self.pass(&block, x, given, &Trace::new(), None).unwrap();
        y.into_value()
    }

    fn is_softmax(&self) -> bool {
        match &self.spec.attention {
            MixerSpec::MultiHead(heads) if heads.local.is_some() => false,
            MixerSpec::MultiHead(heads) => match &heads.mechanism {
                // Dense where nothing is drawn.
                MechanismSpec::Subsampled(spec) => spec.inner.is_softmax(),
                mechanism => mechanism.is_softmax(),
            },
            // A Fourier transform is a mixing of its own.
            MixerSpec::Wavelet(wavelet) => wavelet.family != Family::Fourier,
            MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) | MixerSpec::Absent => true,
        }
    }

    /// Whether tokens mean something else where they are moved.
    fn knows_where_it_stands(&self) -> bool {
        let MixerSpec::MultiHead(heads) = &self.spec.attention else {
            return false;
        };
        matches!(heads.position, PositionSpec::Fire(_))
            || heads.local.is_some()
            || match &heads.mechanism {
                MechanismSpec::Linformer(_) => true,
                MechanismSpec::Lion(lion) => lion.class_token || lion.image.is_some(),
                // Entries of scores are angles in order, and noise is added by place.
                MechanismSpec::DoublyStochastic(spec) => {
                    matches!(spec.operator, Operator::Circuit(_) | Operator::Qr { .. })
                }
                MechanismSpec::Topological(spec) => spec.columns.is_some() || spec.graph.is_some(),
                MechanismSpec::Subsampled(spec) => {
                    matches!(*spec.inner, MechanismSpec::Linformer(_))
                }
                MechanismSpec::Soft(soft) => {
                    soft.local.is_some() || !matches!(soft.landmarks, Landmarks::Segments { .. })
                }
                _ => false,
            }
    }

    /// Whether later tokens change the order in which earlier ones are added up.
    fn sorts_tokens(&self) -> bool {
        self.is_divided_by_content()
            || matches!(&self.spec.attention, MixerSpec::MultiHead(heads)
                if matches!(heads.mechanism, MechanismSpec::Reformer(_)))
    }

    /// Whether weights are made of signs, whose gradient is another function's.
    fn takes_signs(&self) -> bool {
        matches!(&self.spec.attention, MixerSpec::MultiHead(heads)
            if matches!(heads.mechanism, MechanismSpec::Ecoformer(_)))
    }

    /// Whether which tokens meet is decided by what they say, and not by where they stand.
    fn is_divided_by_content(&self) -> bool {
        matches!(&self.spec.attention, MixerSpec::MultiHead(heads)
            if matches!(&heads.mechanism, MechanismSpec::Combiner(combiner)
                if matches!(combiner.form, CombinerForm::Routed { .. })))
    }

    fn is_mamba_with_bias(&self) -> bool {
        match &self.spec.attention {
            MixerSpec::Mamba(mamba) => mamba.bias && mamba.taps > 1,
            MixerSpec::Mamba2(mamba) => mamba.bias && mamba.taps > 1,
            _ => false,
        }
    }
}

fn default_memory(batch: usize) -> Tensor {
    let one = random(&[1, MEMORY, WIDTH], 9);
    one.broadcast_as((batch, MEMORY, WIDTH))
        .unwrap()
        .contiguous()
        .unwrap()
}

fn tokens() -> Tensor {
    random(&[BATCH, LENGTH, WIDTH], 1)
}

fn rows(x: &Tensor, start: usize, count: usize) -> Tensor {
    x.narrow(1, start, count).unwrap()
}

fn mask(rows: &[&[u8]]) -> Tensor {
    let shape = (rows.len(), rows[0].len());
    Tensor::from_vec(rows.concat(), shape, &Device::Cpu).unwrap()
}

#[test]
fn outputs_are_finite_and_single_precision_agrees() {
    for case in Case::all() {
        let y = case.run(&tokens());
        assert_eq!(y.dims(), [BATCH, LENGTH, WIDTH]);
        assert!(is_finite(&y), "{}", case.name);
        let single: Map = case
            .map
            .iter()
            .map(|(name, t)| (name.clone(), t.to_dtype(DType::F32).unwrap()))
            .collect();
        let x = Signal::from(tokens().to_dtype(DType::F32).unwrap());
        let block = case.block(&single);
        let in_single = case.pass(&block, x, Given::default(), &Trace::new(), None);
        let in_single = in_single.unwrap().into_value().to_dtype(DType::F64);
        assert_near(&in_single.unwrap(), &y, 1e-4, case.name);
    }
}

#[test]
fn gradients_equal_central_differences() {
    for case in Case::all() {
        let mut inputs = case.map.clone();
        inputs.insert("x".to_owned(), tokens());
        inputs.insert("memory".to_owned(), default_memory(BATCH));
        if case.takes_signs() {
            // What comes before the signs has a gradient of its own: see the mechanism's tests.
            inputs.retain(|name, _| {
                !(name == "x" || name.contains("query") || name.contains("norm"))
            });
        }
        let error = gradient_error(&inputs, 6, |inputs| {
            let mut map = case.map.clone();
            map.extend(inputs.clone());
            let block = case.block(&map);
            let given = Given {
                memory: Some(&inputs["memory"]),
                ..Given::default()
            };
            let x = inputs.get("x").cloned().unwrap_or_else(tokens);
            let x = Signal::from(x);
            let y = case.pass(&block, x, given, &Trace::new(), None).unwrap();
            contracted(y.value())
        });
        assert!(error < 1e-6, "{}: {error:e}", case.name);
    }
}

/// Training changes parameters where they are: whatever is made of them when a block is built stays behind.
#[test]
fn parameters_that_change_after_a_block_is_built_count() {
    for case in Case::all() {
        let each = case.map.iter();
        let variables: BTreeMap<&String, Var> = each
            .map(|(name, value)| (name, Var::from_tensor(value).unwrap()))
            .collect();
        let live = variables.iter();
        let live = live.map(|(name, var)| ((*name).clone(), var.as_tensor().clone()));
        let block = case.block(&live.collect());
        let mut changed = Map::new();
        for (name, var) in &variables {
            let value = (var.as_tensor() * 1.1).unwrap().detach();
            var.set(&value).unwrap();
            changed.insert((*name).clone(), value);
        }
        let x = || Signal::from(tokens());
        let run = |block: &Block| {
            let y = case.pass(block, x(), Given::default(), &Trace::new(), None);
            y.unwrap().into_value()
        };
        let anew = case.block(&changed);
        assert_near(&run(&block), &run(&anew), 1e-12, case.name);
    }
}

#[test]
fn causal_kinds_do_not_see_the_future_and_others_do() {
    for case in Case::all() {
        let x = tokens();
        let kept = 3;
        let later = random(&[BATCH, LENGTH - kept, WIDTH], 2);
        let other = Tensor::cat(&[&rows(&x, 0, kept), &later], 1).unwrap();
        let before = rows(&case.run(&x), 0, kept);
        let after = rows(&case.run(&other), 0, kept);
        let found = difference(&before, &after);
        if case.spec.attention.is_causal() {
            let rounding = if case.sorts_tokens() { 1e-12 } else { 0.0 };
            assert!(found <= rounding, "{}: {found:e}", case.name);
        } else {
            assert!(found > 1e-3, "{}", case.name);
        }
    }
}

#[test]
fn padding_changes_nothing_for_real_tokens() {
    for case in Case::all() {
        // A coefficient is made of pads too, zeroed: `wavelet.rs` says by how much.
        if let MixerSpec::Wavelet(_) = case.spec.attention {
            continue;
        }
        let short = random(&[1, 4, WIDTH], 3);
        let long = rows(&random(&[1, LENGTH, WIDTH], 4), 0, LENGTH);
        let junk = random(&[1, 2, WIDTH], 6);
        let alone = case.run(&short);
        let right = Tensor::cat(&[&short, &junk], 1).unwrap();
        let batch = Tensor::cat(&[&right, &long], 0).unwrap();
        let keep = mask(&[&[1, 1, 1, 1, 0, 0], &[1; 6]]);
        let given = Given {
            padding: Some(&keep),
            ..Given::default()
        };
        let y = case.run_given(&batch, given);
        let padded = rows(&y.narrow(0, 0, 1).unwrap(), 0, 4);
        assert_near(&padded, &alone, 1e-12, case.name);
        let whole = y.narrow(0, 1, 1).unwrap();
        assert_near(&whole, &case.run(&long), 1e-12, case.name);

        // To the left too, where positions are relative. As in transformers, Mamba's input bias
        // reaches the first tokens through the convolution.
        if case.is_mamba_with_bias() || case.knows_where_it_stands() {
            continue;
        }
        let left = Tensor::cat(&[&junk, &short], 1).unwrap();
        let keep = mask(&[&[0, 0, 1, 1, 1, 1]]);
        let given = Given {
            padding: Some(&keep),
            ..Given::default()
        };
        let padded = rows(&case.run_given(&left, given), 2, 4);
        assert_near(&padded, &alone, 1e-12, case.name);
    }
}

#[test]
fn padding_of_the_memory_changes_nothing() {
    for case in Case::all() {
        let x = tokens();
        let memory = default_memory(BATCH);
        let junk = random(&[BATCH, 1, WIDTH], 7);
        let longer = Tensor::cat(&[&memory, &junk], 1).unwrap();
        let keep = mask(&[[1, 1, 1, 1, 0].as_slice(); BATCH]);
        let padded = case.run_given(
            &x,
            Given {
                memory: Some(&longer),
                memory_padding: Some(&keep),
                ..Given::default()
            },
        );
        assert_near(&padded, &case.run(&x), 1e-12, case.name);
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for case in Case::all() {
        let x = tokens();
        let together = case.run(&x);
        for row in 0..BATCH {
            let alone = case.run(&x.narrow(0, row, 1).unwrap());
            let found = together.narrow(0, row, 1).unwrap();
            assert_near(&found, &alone, 1e-12, case.name);
        }
    }
}

#[test]
fn decoding_equals_the_whole_pass() {
    let x = tokens();
    let keep = mask(&[&[0, 0, 1, 1, 1, 1], &[1; 6]]);
    for case in Case::all().iter().filter(|c| c.spec.attention.is_causal()) {
        let block = case.block(&case.map);
        for padding in [None, Some(&keep)] {
            let whole = case.run_given(
                &x,
                Given {
                    padding,
                    ..Given::default()
                },
            );
            for chunks in [[1; LENGTH].as_slice(), &[2, 1, 3], &[5, 1], &[LENGTH]] {
                let mut state = MixerState::Empty;
                let mut offset = 0;
                let mut outputs = Vec::new();
                for &count in chunks {
                    let so_far = padding.map(|keep| rows(keep, 0, offset + count));
                    let given = Given {
                        padding: so_far.as_ref(),
                        offset,
                        ..Given::default()
                    };
                    let here = Signal::from(rows(&x, offset, count));
                    let y = case.pass(&block, here, given, &Trace::new(), Some(&mut state));
                    outputs.push(y.unwrap().into_value());
                    offset += count;
                }
                let stepped = Tensor::cat(&outputs, 1).unwrap();
                let what = format!("{} in chunks of {chunks:?}", case.name);
                assert_near(&stepped, &whole, 1e-10, &what);
            }
        }
    }
}

/// What is given to a chunk under a lens is what the whole pass gives its tokens, earlier ones
/// being constants.
#[test]
fn decoding_keeps_the_lens() {
    let x = tokens();
    for case in Case::all().iter().filter(|c| c.spec.attention.is_causal()) {
        let block = case.block(&case.map);
        let trace = Trace::new();
        let mut state = MixerState::Empty;
        let first = Signal::from(rows(&x, 0, 4));
        case.pass(&block, first, Given::default(), &trace, Some(&mut state))
            .unwrap();
        let rest = Signal::from(rows(&x, 4, 2))
            .into_streams(Partition::positions(2), StreamRules::default())
            .unwrap();
        let given = Given {
            offset: 4,
            ..Given::default()
        };
        let y = case
            .pass(&block, rest, given, &trace, Some(&mut state))
            .unwrap();
        assert_near(y.value(), &rows(&case.run(&x), 4, 2), 1e-10, case.name);
        let error = y.conservation_error().unwrap().unwrap();
        assert!(error < 1e-10, "{}: {error:e}", case.name);
    }
}

#[test]
fn specs_survive_json_and_toml() {
    for case in Case::all() {
        let json = serde_json::to_string(&case.spec).unwrap();
        let back: BlockSpec = serde_json::from_str(&json).unwrap();
        assert_eq!(back, case.spec, "{json}");
        let toml = toml::to_string(&case.spec).unwrap();
        let back: BlockSpec = toml::from_str(&toml).unwrap();
        assert_eq!(back, case.spec, "{toml}");
    }
}

#[test]
fn linears_are_listed_with_the_sites_they_read() {
    for case in Case::all() {
        let mut map = case.map.clone();
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let parameters =
            lapidary_parts::parameters::Parameters::new(&mut map, &ranks, &mut linears);
        let block = Block::new(&case.spec, WIDTH, parameters).unwrap();
        let trace = Trace::new().capture("*").unwrap();
        let x = Signal::from(tokens());
        case.pass(&block, x, Given::default(), &trace, None)
            .unwrap();
        let records = trace.records();
        assert!(!linears.is_empty());
        for linear in linears {
            // A block at the root of a model writes its own sites after a dot.
            let own = format!(".{}", linear.input_site);
            let record = records.get(&linear.input_site).or(records.get(&own));
            // An expert that no token was sent to writes nothing.
            let Some(record) = record else {
                assert!(linear.path.contains("experts"), "{linear:?}");
                continue;
            };
            assert_eq!(
                record.signal.dims().last(),
                Some(&linear.input),
                "{linear:?}"
            );
        }
    }
}

#[test]
fn dropout_is_seeded_and_keeps_the_expectation() {
    let spec = BlockSpec {
        dropout: 0.2,
        ..block(
            Wiring::PreNorm,
            LAYER,
            MixerSpec::MultiHead(MultiHeadSpec {
                dropout: 0.3,
                ..MultiHeadSpec::new(2)
            }),
        )
    };
    // What follows the masks is linear, so the mean over masks is the pass without any.
    let case = Case {
        name: "dropout",
        map: draw(5, |p| Block::new(&spec, WIDTH, p)),
        spec,
    };
    let x = random(&[1, 3, WIDTH], 1);
    let with = |seed| {
        let given = Given {
            dropout_seed: Some(seed),
            ..Given::default()
        };
        case.run_given(&x, given)
    };
    let evaluated = case.run(&x);
    assert_eq!(difference(&with(1), &with(1)), 0.0);
    assert!(difference(&with(1), &with(2)) > 1e-3);
    assert!(difference(&with(1), &evaluated) > 1e-3);
    let runs = 4000;
    let mut sum = evaluated.zeros_like().unwrap();
    let mut squares = evaluated.zeros_like().unwrap();
    for seed in 0..runs {
        let y = with(seed);
        squares = (squares + (&y - &evaluated).unwrap().sqr().unwrap()).unwrap();
        sum = (sum + y).unwrap();
    }
    let mean = (sum / runs as f64).unwrap();
    let deviation = common::values(&(squares / runs as f64).unwrap());
    let errors = common::values(&(mean - &evaluated).unwrap());
    for (error, variance) in errors.into_iter().zip(deviation) {
        // Five standard errors.
        assert!(
            error.abs() < 5.0 * (variance / runs as f64).sqrt(),
            "{error}"
        );
    }
}

/// An expert sees the tokens whose best it is among, and no others.
#[test]
fn experts_run_on_the_tokens_sent_to_them_alone() {
    let spec = MixtureSpec {
        hidden: 6,
        experts: 5,
        active: 2,
        activation: ActivationSpec::Silu,
        normalise: true,
    };
    let map = draw(8, |p| Mixture::new(&spec, WIDTH, p));
    let sites = |map: &Map| {
        let mixture = build(map, |p| Mixture::new(&spec, WIDTH, p)).unwrap();
        let trace = Trace::new().capture("*").unwrap();
        let x = Signal::from(tokens());
        mixture.forward(&x, &Context::new(&trace)).unwrap();
        trace
    };
    let trace = sites(&map);
    let probabilities = trace.signal(".router").unwrap();
    assert_eq!(probabilities.dims(), [BATCH, LENGTH, spec.experts]);
    let probabilities = common::values(probabilities.value());
    let records = trace.records();
    for expert in 0..spec.experts {
        let chosen: Vec<u32> = (0u32..)
            .zip(probabilities.chunks(spec.experts))
            .filter(|(_, p)| p.iter().filter(|other| **other > p[expert]).count() < spec.active)
            .map(|(token, _)| token)
            .collect();
        let Some(record) = records.get(&format!("experts.{expert}.in")) else {
            assert!(chosen.is_empty());
            continue;
        };
        let chosen = Tensor::new(chosen.as_slice(), &Device::Cpu).unwrap();
        let flat = tokens().reshape((BATCH * LENGTH, WIDTH)).unwrap();
        let expected = flat.index_select(&chosen, 0).unwrap();
        assert_near(record.signal.value(), &expected, 0.0, "tokens of an expert");
    }

    // Where all are equal, the first ones are taken.
    let mut tied = map;
    let router = tied["router.weight"].zeros_like().unwrap();
    tied.insert("router.weight".to_owned(), router);
    let records = sites(&tied).records();
    for expert in 0..spec.experts {
        let ran = records.contains_key(&format!("experts.{expert}.in"));
        assert_eq!(ran, expert < spec.active);
    }
}
