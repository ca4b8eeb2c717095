//! The catalogue of parts, with costs that are measured and not looked up.
//!
//! Each entry is one block, or one norm or position inside a block, built and run under the
//! meter at two lengths; the growth exponent is the slope between them on logarithmic axes.

use std::time::Instant;

use crate::Result;
use crate::error::engine;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Input, InputSpec, Model, ModelSpec, Pass, TokenInput,
};
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};
use lapidary_parts::attention::mechanism::doubly_stochastic::{DoublyStochasticSpec, Operator};
use lapidary_parts::attention::mechanism::linformer::LinformerSpec;
use lapidary_parts::attention::mechanism::mra::MraSpec;
use lapidary_parts::attention::mechanism::reformer::ReformerSpec;
use lapidary_parts::attention::mechanism::soft::{Landmarks, SoftSpec};
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_parts::attention::mechanism::subsampled::SubsampledSpec;
use lapidary_parts::attention::mechanism::topological::TopologicalSpec;
use lapidary_parts::attention::wavelet::{Family, WaveletSpec};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec, GatedSpec, MixtureSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::fit::FitSpec;
use lapidary_parts::organisation::vcc::VccSpec;
use lapidary_parts::position::{PositionSpec, RotarySpec};
use lapidary_parts::recurrent::{Mamba2Spec, MambaSpec};
use lapidary_signal::Trace;
use lapidary_signal::meter::Meter;
use serde::Serialize;

/// One part, measured.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// The family: attention, feedforward, norm, position, wiring or organisation.
    pub family: &'static str,
    /// The kind's name in a spec.
    pub kind: &'static str,
    /// What it is, and the paper it is from.
    pub description: &'static str,
    /// Parameters of the block that holds it.
    pub parameters: usize,
    /// Floating-point operations of one sequence of the given length.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Most bytes alive at one time.
    pub peak_bytes: u64,
    /// Exponent with which operations grow with the length.
    pub growth: f64,
    /// Median milliseconds of a forward pass.
    pub milliseconds: f64,
}

struct Candidate {
    family: &'static str,
    kind: &'static str,
    description: &'static str,
    position: AbsolutePosition,
    block: BlockSpec,
    organisation: Option<OrganisationSpec>,
}

/// Measures every part at `width` and `length`, with heads of 64 where the width allows.
pub fn catalogue(width: usize, length: usize) -> Result<Vec<Entry>> {
    candidates(width, 2 * length)
        .into_iter()
        .map(|candidate| measure(candidate, width, length))
        .collect()
}

fn heads(width: usize) -> usize {
    (1..=(width / 64).max(1))
        .rev()
        .find(|heads| width.is_multiple_of(*heads))
        .unwrap_or(1)
}

/// A block whose only part is the mixer, so that what is measured is the mixer's.
fn mixer_block(attention: MixerSpec) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        wiring: Wiring::PreNorm,
        norm: NormSpec::None,
        attention,
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: None,
        dropout: 0.0,
    }
}

/// Every part, for sequences of up to `longest` tokens.
fn candidates(width: usize, longest: usize) -> Vec<Candidate> {
    let heads = heads(width);
    let base = MultiHeadSpec {
        causal: true,
        ..MultiHeadSpec::new(heads)
    };
    let attention = |spec: MultiHeadSpec| mixer_block(MixerSpec::MultiHead(spec));
    let positioned = |position| {
        attention(MultiHeadSpec {
            position,
            ..base.clone()
        })
    };
    let through = |mechanism| {
        attention(MultiHeadSpec {
            mechanism,
            ..base.clone()
        })
    };
    let with = |feedforward| BlockSpec {
        feedforward: Some(feedforward),
        ..attention(base.clone())
    };
    let norm = |norm| BlockSpec {
        norm,
        ..attention(base.clone())
    };
    let dense = || {
        FeedforwardSpec::Dense(DenseSpec {
            hidden: 4 * width,
            activation: Default::default(),
            bias: true,
        })
    };
    let wired = |wiring| BlockSpec {
        wiring,
        norm: NormSpec::default(),
        ..with(dense())
    };
    let learned = AbsolutePosition::Learned {
        offset: 0,
        skip_padding: false,
    };
    let none = AbsolutePosition::None;
    let silu = lapidary_parts::activation::ActivationSpec::Silu;
    let hidden = (8 * width / 3).max(1);
    let grouped = (1..=heads)
        .find(|groups| heads.is_multiple_of(*groups))
        .unwrap_or(1);
    let entry = |family, kind, description, position, block| Candidate {
        family,
        kind,
        description,
        position,
        block,
        organisation: None,
    };
    let organised = |kind, description, organisation| Candidate {
        organisation: Some(organisation),
        ..entry(
            "organisation",
            kind,
            description,
            none,
            BlockSpec {
                repeat: 2,
                ..attention(MultiHeadSpec::new(heads))
            },
        )
    };
    vec![
        entry(
            "attention",
            "multi-head",
            "softmax attention, bidirectional (Vaswani et al., 2017)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "multi-head, causal",
            "a token sees itself and earlier ones",
            none,
            attention(base.clone()),
        ),
        entry(
            "attention",
            "multi-head, grouped",
            "heads share keys and values (Ainslie et al., 2023)",
            none,
            attention(MultiHeadSpec {
                groups: Some(grouped),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "multi-head, window 64",
            "a token sees the nearest 64 (Beltagy et al., 2020)",
            none,
            attention(MultiHeadSpec {
                window: Some(64),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "linformer, 64 slots",
            "keys and values projected along the sequence (Wang et al., 2020)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::Linformer(LinformerSpec::new(64, longest)),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "lion",
            "linear attention in both directions with a selective decay (Afzal et al., 2025)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::Lion(Default::default()),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "fastmax",
            "a polynomial of second degree of the scores, factorised (Gerami et al., 2024)",
            none,
            through(MechanismSpec::Fastmax(Default::default())),
        ),
        entry(
            "attention",
            "kernelized",
            "random features of a learned kernel (Chowdhury et al., 2021)",
            none,
            through(MechanismSpec::Kernelized(Default::default())),
        ),
        entry(
            "attention",
            "sparse, strided by 16",
            "the last 16 and every 16th before (Child et al., 2019)",
            none,
            through(MechanismSpec::Sparse(SparseSpec {
                pattern: SparsePattern::Strided { stride: 16 },
                steps: Steps::Merged,
            })),
        ),
        entry(
            "attention",
            "sparse, fixed by 16",
            "its block of 16 and the last 2 of every block (Child et al., 2019)",
            none,
            through(MechanismSpec::Sparse(SparseSpec {
                pattern: SparsePattern::Fixed {
                    stride: 16,
                    summaries: 2,
                    groups: 1,
                },
                steps: Steps::Merged,
            })),
        ),
        entry(
            "attention",
            "reformer, chunks of 32",
            "tokens that hash alike, in two rounds (Kitaev et al., 2020)",
            none,
            attention(MultiHeadSpec {
                sharing: QueryKeySharing::QueryKey,
                mechanism: MechanismSpec::Reformer(ReformerSpec {
                    rounds: 2,
                    buckets: vec![16],
                    ..ReformerSpec::new(32)
                }),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "combiner, segments of 16",
            "its segment, all earlier ones in summary (Ren et al., 2021)",
            none,
            through(MechanismSpec::Combiner(CombinerSpec::new(
                CombinerForm::Fixed { segment: 16 },
            ))),
        ),
        entry(
            "attention",
            "combiner, log-sparse",
            "itself, and spans that double before it (Ren et al., 2021)",
            none,
            through(MechanismSpec::Combiner(CombinerSpec::new(
                CombinerForm::LogSparse,
            ))),
        ),
        entry(
            "attention",
            "subsampled, a quarter",
            "a random quarter of the keys, in training (Hussain et al., 2023)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::Subsampled(SubsampledSpec::default()),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "doubly stochastic, sinkhorn",
            "rows and columns normalised in turns, three times (Sander et al., 2022)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::DoublyStochastic(DoublyStochasticSpec::default()),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "doubly stochastic, qr",
            "the squares of an orthogonal factor of the scores (Born et al., 2025)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::DoublyStochastic(DoublyStochasticSpec {
                    operator: Operator::Qr { seed: 0 },
                }),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "topological",
            "linear attention by the distance on a path (Choromanski et al., 2024)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::Topological(TopologicalSpec::default()),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "soft, 32 landmarks",
            "a Gaussian kernel factored through means of segments (Lu et al., 2022)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                sharing: QueryKeySharing::QueryKey,
                mechanism: MechanismSpec::Soft(SoftSpec::new(Landmarks::Segments { count: 32 })),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "ecoformer",
            "what codes of 16 bits have in common (Liu et al., 2022)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                sharing: QueryKeySharing::QueryKey,
                mechanism: MechanismSpec::Ecoformer(Default::default()),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "mra, blocks of 16",
            "blocks of 16 by one value, two in a row in full (Zeng et al., 2022)",
            none,
            attention(MultiHeadSpec {
                causal: false,
                mechanism: MechanismSpec::Mra(MraSpec::new(16, 2)),
                ..base.clone()
            }),
        ),
        entry(
            "attention",
            "wavelet",
            "attention in two bands of wavelet coefficients, learned filters (Zhuang et al., 2022)",
            none,
            mixer_block(MixerSpec::Wavelet(WaveletSpec {
                family: Family::Adaptive,
                ..WaveletSpec::new(MixerSpec::MultiHead(MultiHeadSpec::new(heads)))
            })),
        ),
        entry(
            "attention",
            "mamba",
            "selective state-space recurrence (Gu & Dao, 2023)",
            none,
            mixer_block(MixerSpec::Mamba(MambaSpec::default())),
        ),
        entry(
            "attention",
            "mamba2",
            "state-space recurrence of heads (Dao & Gu, 2024)",
            none,
            mixer_block(MixerSpec::Mamba2(Mamba2Spec {
                head_width: width / heads,
                ..Mamba2Spec::default()
            })),
        ),
        entry(
            "feedforward",
            "dense",
            "two linear layers around GELU (Vaswani et al., 2017)",
            none,
            with(dense()),
        ),
        entry(
            "feedforward",
            "gated",
            "gated linear unit (Shazeer, 2020)",
            none,
            with(FeedforwardSpec::Gated(GatedSpec {
                hidden,
                activation: silu,
                bias: false,
            })),
        ),
        entry(
            "feedforward",
            "mixture",
            "two of eight gated experts for each token (Jiang et al., 2024)",
            none,
            with(FeedforwardSpec::Mixture(MixtureSpec {
                hidden,
                experts: 8,
                active: 2,
                activation: silu,
                normalise: true,
            })),
        ),
        entry(
            "feedforward",
            "sparse-code",
            "one step towards a sparse code in a square dictionary (Yu et al., 2023)",
            none,
            BlockSpec {
                wiring: Wiring::Replacing,
                ..with(FeedforwardSpec::SparseCode(Default::default()))
            },
        ),
        entry(
            "norm",
            "layer",
            "layer norm (Ba et al., 2016)",
            none,
            norm(NormSpec::default()),
        ),
        entry(
            "norm",
            "rms",
            "root-mean-square norm (Zhang & Sennrich, 2019)",
            none,
            norm(NormSpec::Rms { epsilon: 1e-6 }),
        ),
        entry(
            "position",
            "learned",
            "a table added to the embeddings",
            learned,
            attention(base.clone()),
        ),
        entry(
            "position",
            "axial",
            "a learned table for rows of 16 tokens and one for columns, summed (Child et al., 2019)",
            AbsolutePosition::Axial {
                columns: longest.min(16),
                channels: 1,
                row_width: None,
            },
            attention(base.clone()),
        ),
        entry(
            "position",
            "sinusoidal",
            "sines added to the embeddings (Vaswani et al., 2017)",
            AbsolutePosition::Sinusoidal,
            attention(base.clone()),
        ),
        entry(
            "position",
            "rotary",
            "queries and keys rotated by position (Su et al., 2021)",
            none,
            positioned(PositionSpec::Rotary(RotarySpec::default())),
        ),
        entry(
            "position",
            "alibi",
            "a penalty proportional to distance (Press et al., 2021)",
            none,
            positioned(PositionSpec::Alibi),
        ),
        entry(
            "position",
            "relative-buckets",
            "a learned bias per distance bucket (Raffel et al., 2019)",
            none,
            positioned(PositionSpec::RelativeBuckets {
                buckets: 32,
                max_distance: 128,
            }),
        ),
        entry(
            "position",
            "kerple-logarithmic",
            "a learned logarithmic penalty of the distance (Chi et al., 2022)",
            none,
            positioned(PositionSpec::KerpleLogarithmic),
        ),
        entry(
            "position",
            "kerple-power",
            "a learned power of the distance (Chi et al., 2022)",
            none,
            positioned(PositionSpec::KerplePower),
        ),
        entry(
            "position",
            "sandwich",
            "the product of two sinusoidal embeddings (Chi et al., 2023)",
            none,
            positioned(PositionSpec::Sandwich { width: 128 }),
        ),
        entry(
            "position",
            "fire",
            "a small network of the distance relative to the position (Li et al., 2023)",
            none,
            positioned(PositionSpec::Fire(Default::default())),
        ),
        entry(
            "wiring",
            "pre-norm",
            "norms before the parts (Xiong et al., 2020)",
            none,
            wired(Wiring::PreNorm),
        ),
        entry(
            "wiring",
            "post-norm",
            "norms after the residual sums (Vaswani et al., 2017)",
            none,
            wired(Wiring::PostNorm),
        ),
        entry(
            "wiring",
            "parallel",
            "both parts read the same input (Wang & Komatsuzaki, 2021)",
            none,
            wired(Wiring::Parallel),
        ),
        entry(
            "wiring",
            "replacing",
            "the second part's output takes the place of the stream (Yu et al., 2023)",
            none,
            wired(Wiring::Replacing),
        ),
        entry(
            "wiring",
            "reversed",
            "the second part first, and attention taken off: CRATE's decoder (Yu et al., 2023)",
            none,
            wired(Wiring::Reversed),
        ),
        organised(
            "interleaved, (1)1(1) in groups of 32",
            "groups of tokens, two latents each that meet in a global block (Chen & Li, 2023)",
            OrganisationSpec::Interleaved(FitSpec {
                layout: "(1)1(1)".to_owned(),
                group: 32,
                groups: longest.div_ceil(32).max(1),
                latents: 2,
                width: None,
                block: Some(Box::new(attention(MultiHeadSpec::new(heads)))),
                exchange_heads: None,
                read_feedforward: None,
                positions: Default::default(),
                latent_positions: Default::default(),
                tiles: None,
                condition: 0,
                output: Default::default(),
            }),
        ),
        organised(
            "vip-centric, 4 blocks of 16 in full",
            "16 tokens in full, all others compressed but for what they attend to (Zeng et al., 2023)",
            OrganisationSpec::VipCentric(VccSpec::new(16, 4)),
        ),
        Candidate {
            block: wired(Wiring::PreNorm),
            ..organised(
                "reversible",
                "two streams, of which the last are enough to train by (Gomez et al., 2017)",
                OrganisationSpec::Reversible(Default::default()),
            )
        },
    ]
}

const VOCABULARY: usize = 64;

fn measure(candidate: Candidate, width: usize, length: usize) -> Result<Entry> {
    let spec = ModelSpec {
        width,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: VOCABULARY,
            length: 2 * length,
            position: candidate.position,
            token_types: 0,
            norm: None,
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks: vec![candidate.block],
        final_norm: None,
        head: HeadSpec::None,
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: candidate.organisation,
        initial: Default::default(),
    };
    let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
    let short = metered(&model, length)?;
    let long = metered(&model, 2 * length)?;
    let input = tokens(&model, length)?;
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let started = Instant::now();
            model.forward(&input, drawing())?;
            Ok(started.elapsed().as_secs_f64() * 1e3)
        })
        .collect::<Result<_>>()?;
    times.sort_by(f64::total_cmp);
    let embedding = VOCABULARY * width;
    Ok(Entry {
        family: candidate.family,
        kind: candidate.kind,
        description: candidate.description,
        parameters: model.parameter_count().saturating_sub(embedding),
        flops: short.total().flops,
        bytes: short.total().bytes,
        peak_bytes: short.peak_live_bytes(),
        growth: (long.total().flops as f64 / short.total().flops.max(1) as f64).log2(),
        milliseconds: times.get(times.len() / 2).copied().unwrap_or(f64::NAN),
    })
}

fn tokens(model: &Model, length: usize) -> Result<Input> {
    let vocabulary = model.spec().vocabulary().unwrap_or(VOCABULARY).max(1);
    let ids: Vec<u32> = (0..length).map(|i| (i * 7 % vocabulary) as u32).collect();
    Ok(Input::tokens(engine(Tensor::from_vec(
        ids,
        (1, length),
        &Device::Cpu,
    ))?))
}

pub(crate) fn metered(model: &Model, length: usize) -> Result<std::sync::Arc<Meter>> {
    let meter = Meter::new();
    let start = meter.clone();
    let trace = Trace::new().replace("embeddings", move |_, signal| {
        Ok(signal.into_metered(start.clone()))
    })?;
    model.forward(
        &tokens(model, length)?,
        Pass {
            trace: Some(&trace),
            ..drawing()
        },
    )?;
    Ok(meter)
}

/// A pass in which mixers draw, as in training.
fn drawing<'a>() -> Pass<'a> {
    Pass {
        draw: Some(0),
        ..Pass::default()
    }
}
