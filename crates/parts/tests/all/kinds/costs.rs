//! Parameters and operations are those of the formulas.

mod sums;

use super::*;
use lapidary_kernels::operations_in_chunks;
use sums::*;

/// `(parameters, floating-point operations)` by the formulas of the parts' documentation, in
/// full: biases, activations and softmaxes too.
fn formulas(spec: &BlockSpec) -> (usize, usize) {
    let n = BATCH * LENGTH;
    let linear = |input: usize, output: usize, bias: bool, rows: usize| {
        let bias = if bias { output } else { 0 };
        (input * output + bias, rows * (2 * input * output + bias))
    };
    let norm = |spec: &NormSpec, width: usize, rows: usize| match spec {
        NormSpec::Layer { .. } => (2 * width, 8 * width * rows),
        NormSpec::Rms { .. } => (width, 5 * width * rows),
        NormSpec::None => (0, 0),
    };
    let mut parts: Vec<(usize, usize)> = Vec::new();
    match &spec.attention {
        MixerSpec::MultiHead(heads) => {
            let pairs = (0..LENGTH)
                .map(|i| {
                    let sees = |j: &usize| {
                        (!heads.causal || *j <= i)
                            && heads.window.is_none_or(|window| i.abs_diff(*j) < window)
                    };
                    (0..LENGTH).filter(sees).count()
                })
                .sum();
            parts.extend(attention_formulas(heads, pairs, LENGTH));
        }
        MixerSpec::Mamba(mamba) => {
            let (inner, state) = (mamba.inner(WIDTH), mamba.state);
            let rank = mamba.step_rank(WIDTH);
            let bias = usize::from(mamba.convolution_bias);
            parts.push(linear(WIDTH, 2 * inner, mamba.bias, n));
            parts.push((
                inner * (mamba.taps + bias),
                n * inner * (2 * mamba.taps + bias + 1),
            ));
            if mamba.scan {
                parts.push(linear(inner, rank + 2 * state, false, n));
                parts.push(linear(rank, inner, true, n));
                // Softplus; the recurrence; D ⊙ u and its sum.
                parts.push((0, n * inner * (1 + (1 + 7 * state) + 2)));
                parts.push((inner * (state + 1), 0));
            }
            // The gate's SiLU and product.
            parts.push((0, n * inner * 2));
            parts.push(linear(inner, WIDTH, mamba.bias, n));
        }
        MixerSpec::Mamba2(mamba) => {
            let (inner, heads) = (mamba.inner(WIDTH), mamba.heads(WIDTH));
            let convolved = mamba.convolved(WIDTH);
            let bias = usize::from(mamba.convolution_bias);
            parts.push(linear(WIDTH, mamba.projected(WIDTH), mamba.bias, n));
            parts.push((
                convolved * (mamba.taps + bias),
                n * convolved * (2 * mamba.taps + bias + 1),
            ));
            if mamba.scan {
                let (state, width) = (mamba.state, mamba.head_width);
                let products = operations_in_chunks(LENGTH, state, width, mamba.chunk) as usize;
                // The step's bias and softplus; Δ A and Δ B; D u and its sum.
                parts.push((3 * heads, n * heads * (2 + 1 + state)));
                parts.push((0, BATCH * heads * products + 2 * n * inner));
            }
            // The gate's SiLU and product.
            parts.push((0, n * inner * 2));
            parts.push(norm(&mamba.norm, inner, n));
            // Behind a norm of groups, γ is a product of its own.
            let apart = mamba.groups > 1 && mamba.norm != NormSpec::None;
            parts.push((0, usize::from(apart) * n * inner));
            parts.push(linear(inner, WIDTH, mamba.bias, n));
        }
        MixerSpec::Wavelet(wavelet) => parts.push(wavelet_formula(wavelet)),
        MixerSpec::Absent => {}
    }
    if spec.attention != MixerSpec::Absent {
        parts.push(norm(&spec.norm, WIDTH, n));
        parts.push((0, n * WIDTH));
    }
    // Both sides of the sum are multiplied by a number.
    if spec.coding_step.is_some() {
        parts.push((0, 2 * n * WIDTH));
    }
    // A number for each feature of each part's output.
    if spec.layer_scale.is_some() {
        let others = [spec.cross_attention.is_some(), spec.feedforward.is_some()];
        let scaled = 1 + others.into_iter().filter(|there| *there).count();
        parts.push((scaled * WIDTH, scaled * n * WIDTH));
    }
    if spec.shortcuts {
        parts.push(linear(WIDTH, WIDTH, false, n));
        if spec.feedforward.is_some() && spec.wiring == Wiring::PreNorm {
            parts.push(linear(WIDTH, WIDTH, false, n));
        }
    }
    if let Some(cross) = &spec.cross_attention {
        parts.extend(attention_formulas(cross, LENGTH * MEMORY, MEMORY));
        parts.push(norm(&spec.norm, WIDTH, n));
        parts.push((0, n * WIDTH));
    }
    if let Some(feedforward) = &spec.feedforward {
        match feedforward {
            FeedforwardSpec::Dense(dense) => {
                parts.push(linear(WIDTH, dense.hidden, dense.bias, n));
                parts.push((0, n * dense.hidden));
                parts.push(linear(dense.hidden, WIDTH, dense.bias, n));
            }
            FeedforwardSpec::Gated(gated) => {
                parts.push(linear(WIDTH, gated.hidden, gated.bias, n));
                parts.push(linear(WIDTH, gated.hidden, gated.bias, n));
                parts.push((0, 2 * n * gated.hidden));
                parts.push(linear(gated.hidden, WIDTH, gated.bias, n));
            }
            FeedforwardSpec::Mixture(mixture) => {
                let (hidden, experts) = (mixture.hidden, mixture.experts);
                parts.push(linear(WIDTH, experts, false, n));
                parts.push((0, 5 * n * experts));
                let run = n * mixture.active;
                parts.push((
                    experts * 3 * WIDTH * hidden,
                    run * (6 * WIDTH * hidden + 2 * hidden + WIDTH),
                ));
            }
            FeedforwardSpec::Linear(map) => parts.push(linear(WIDTH, WIDTH, map.bias, n)),
            FeedforwardSpec::SparseCode(code) => parts.push(match code.atoms {
                None => (WIDTH * WIDTH, n * (4 * WIDTH * WIDTH + 6 * WIDTH)),
                Some(atoms) => (
                    WIDTH * atoms,
                    n * (8 * WIDTH * atoms + 7 * atoms + 2 * WIDTH),
                ),
            }),
        }
        parts.push(norm(&spec.norm, WIDTH, n));
        // A reversed block has no second sum, but turns the sign of what attention gives.
        if spec.wiring != Wiring::Replacing {
            parts.push((0, n * WIDTH));
        }
    }
    parts
        .into_iter()
        .fold((0, 0), |(a, b), (c, d)| (a + c, b + d))
}

fn attention_formulas(spec: &MultiHeadSpec, pairs: usize, keys: usize) -> Vec<(usize, usize)> {
    let (heads, groups, width) = (spec.heads, spec.groups(), spec.head_width(WIDTH));
    let value_width = spec.value_width(WIDTH);
    // Rows that keys and values are made of, and whether what a bias adds to them is put right.
    let (rows, put_right) = match &spec.mechanism {
        MechanismSpec::Linformer(linformer) if linformer.project == Project::Tokens => {
            (linformer.slots, spec.bias)
        }
        _ => (keys, false),
    };
    let (queries, tokens, keys) = (BATCH * LENGTH, keys, BATCH * rows);
    let linear = |input: usize, output: usize, bias: bool, rows: usize| {
        let bias = if bias { output } else { 0 };
        (input * output + bias, rows * (2 * input * output + bias))
    };
    let own = |there: bool, layer: (usize, usize)| if there { layer } else { (0, 0) };
    let mut parts = vec![
        linear(WIDTH, heads * width, spec.bias, queries),
        own(
            spec.sharing == QueryKeySharing::None,
            linear(WIDTH, groups * width, spec.bias, keys),
        ),
        own(
            spec.sharing != QueryKeySharing::All,
            linear(WIDTH, groups * value_width, spec.bias, keys),
        ),
        match spec.output {
            OutputProjection::Own => linear(
                heads * value_width,
                WIDTH,
                spec.output_bias.unwrap_or(spec.bias),
                queries,
            ),
            OutputProjection::Tied => (0, linear(heads * value_width, WIDTH, false, queries).1),
            OutputProjection::Absent => (0, 0),
        },
        spec.local.map_or((0, 0), |local| {
            let taps = local
                .columns
                .map_or(local.side, |_| local.side * local.side);
            (heads * taps, queries * heads * (2 * taps + 1) * value_width)
        }),
        mechanism_formula(spec, pairs, tokens),
    ];
    if put_right {
        parts.push((0, keys * groups * (width + value_width)));
    }
    if let Some(QueryKeyNorm { norm, per_head }) = &spec.query_key_norm {
        let (parameters, operations) = match norm {
            NormSpec::Layer { .. } => (2, 8),
            NormSpec::Rms { .. } => (1, 5),
            NormSpec::None => (0, 0),
        };
        for count in [heads, groups] {
            let features = if *per_head { width } else { count * width };
            parts.push((parameters * features, operations * queries * count * width));
        }
    }
    if spec.position.rotary().is_some() {
        parts.push((0, 3 * queries * (heads + groups) * width));
    }
    match &spec.position {
        PositionSpec::None
        | PositionSpec::Rotary(_)
        | PositionSpec::Alibi
        | PositionSpec::Sandwich { .. } => {}
        PositionSpec::KerpleLogarithmic | PositionSpec::KerplePower => parts.push((2 * heads, 0)),
        PositionSpec::Fire(fire) => {
            let outputs = if spec.causal { heads } else { 2 * heads };
            let square = (fire.layers - 1) * (fire.hidden * fire.hidden + fire.hidden);
            parts.push((
                2 + 2 * fire.hidden + square + (fire.hidden + 1) * outputs,
                0,
            ));
        }
        PositionSpec::RelativeBuckets { buckets, .. } => parts.push((buckets * heads, 0)),
    }
    parts
}

/// Both ways of the transform, and attention of two heads in each band.
fn wavelet_formula(spec: &WaveletSpec) -> (usize, usize) {
    let (taps, rows) = (spec.taps, BATCH * WIDTH);
    let (mut parameters, mut operations) = match spec.family {
        Family::Fixed | Family::Lifting | Family::Fourier => (0, 0),
        Family::Adaptive => (taps * WIDTH, 0),
        Family::Orthogonal => (taps / 2 * WIDTH, 0),
        Family::AdaptiveLifting => (2 * taps * WIDTH, 0),
    };
    let mut bands = Vec::new();
    if spec.family == Family::Fourier {
        let n = LENGTH as f64;
        operations += 2 * rows * (2.5 * n * n.log2()) as usize;
        bands.push(2 * (LENGTH / 2 + 1));
    } else {
        let mut low = LENGTH.next_multiple_of(1 << spec.levels);
        for _ in 0..spec.levels {
            let half = low / 2;
            operations += rows
                * 2
                * match spec.family {
                    Family::Lifting => 7 * half,
                    Family::AdaptiveLifting => 2 * ((half + taps - 1) * 2 * taps + 3 * half),
                    _ => 4 * half * taps,
                };
            bands.push(half);
            low = half;
        }
        bands.push(low);
    }
    for n in bands {
        parameters += 4 * (WIDTH * WIDTH + WIDTH);
        operations += BATCH * n * 4 * (2 * WIDTH * WIDTH + WIDTH);
        operations += BATCH * n * n * 2 * (4 * WIDTH / 2 + 5);
    }
    (parameters, operations)
}

#[test]
fn counted_work_and_parameters_equal_the_formulas() {
    for case in Case::all() {
        let (parameters, operations) = formulas(&case.spec);
        let counted: usize = case.map.values().map(Tensor::elem_count).sum();
        assert_eq!(counted, parameters, "parameters of {}", case.name);
        if case.is_divided_by_content() {
            // Counted in `combiner_learned.rs`, where it is known who lies where.
            continue;
        }

        for sites in ["none", "*"] {
            let meter = Meter::new();
            let block = case.block(&case.map);
            let trace = Trace::new().capture(sites).unwrap();
            let memory = Signal::from(default_memory(BATCH)).into_metered(meter.clone());
            let cx = Context {
                memory: Some((&memory, None)),
                ..Context::new(&trace)
            };
            let x = Signal::from(tokens()).into_metered(meter.clone());
            block.forward(x, &cx, None).unwrap();
            let total = meter.total().flops as usize;
            assert_eq!(total, operations, "operations of {}", case.name);
        }
    }
}

/// What stands between the projections: parameters, and operations on `keys` keys a sequence, or
/// `pairs` of a query and a key that masks leave.
fn mechanism_formula(spec: &MultiHeadSpec, pairs: usize, keys: usize) -> (usize, usize) {
    let widths = spec.head_width(WIDTH) + spec.value_width(WIDTH);
    let heads = BATCH * spec.heads;
    match &spec.mechanism {
        MechanismSpec::Softmax => (0, heads * pairs * (2 * widths + 5)),
        MechanismSpec::DoublyStochastic(made) => {
            let squared = LENGTH * LENGTH;
            let (operations, parameters) = match &made.operator {
                Operator::Softmax => (5 * squared, 0),
                Operator::NormSoftmax { .. } => (15 * squared, 0),
                Operator::Sinkhorn {
                    iterations,
                    form: SinkhornForm::Log,
                    ..
                } => ((4 * iterations + 3) * squared, 0),
                Operator::Sinkhorn { iterations, .. } => ((2 * iterations + 3) * squared, 0),
                Operator::Qr { .. } => (4 * squared * LENGTH, 0),
                Operator::Circuit(circuit) => {
                    // Of 2ⁿ rows; half the layers are those of each part.
                    let (qubits, layers) = (circuit.qubits, circuit.layers);
                    let bricks = |layers| 4 * (qubits - 1) * layers;
                    let (angles, turns) = match circuit.ansatz {
                        Ansatz::Simple => (3 * qubits + bricks(layers), 1),
                        Ansatz::Parted => (3 * qubits + bricks(2 * layers), 1),
                        Ansatz::Centrosymmetric => (qubits + bricks(layers), 1),
                        Ansatz::Trotter => (3 * qubits + qubits * (qubits - 1), layers),
                    };
                    let learned = match circuit.training {
                        Training::Static => 0,
                        Training::Mixed | Training::Differentiable => angles,
                    };
                    (
                        angles + (6 * angles * turns + 3) * (1 << (2 * qubits)),
                        learned,
                    )
                }
            };
            (parameters, heads * (operations + 2 * squared * widths))
        }
        MechanismSpec::Topological(tree) => {
            let (width, values) = (spec.head_width(WIDTH), spec.value_width(WIDTH));
            let entries = 2 * LENGTH * width;
            let (features, mapped) = match tree.features {
                FeatureMap::Relu | FeatureMap::Square => (width, entries),
                FeatureMap::Fourth => (width, 2 * entries),
                FeatureMap::Exponential { count, .. } => {
                    let each = 2 * LENGTH * count * (2 * width + 3);
                    (count, 3 * entries + each)
                }
            };
            // Of a path of six, of three columns of two, and of a ring of eight; too small to be cut.
            let distances = match (&tree.columns, &tree.graph) {
                (None, None) => 6,
                (Some(_), _) | (_, Some(_)) => 5,
            };
            let laid_out = LENGTH * LENGTH * (2 * (features + values + 1) + 1);
            let rows = if tree.per_head { spec.heads } else { 1 };
            let each = mapped + laid_out + LENGTH * (values + 1);
            (3 * rows, heads * each + rows * distances * 6)
        }
        // Dense where nothing is drawn.
        MechanismSpec::Subsampled(subsampled) => {
            let inner = MultiHeadSpec {
                mechanism: (*subsampled.inner).clone(),
                ..spec.clone()
            };
            mechanism_formula(&inner, pairs, keys)
        }
        MechanismSpec::Linformer(linformer) => {
            let one = |slots: usize| match linformer.projection {
                Projection::Learned => (slots, slots * linformer.longest),
                Projection::Mean | Projection::Max => (1, 0),
                Projection::Convolution => (1, linformer.longest.div_ceil(slots)),
            };
            let by_head = match linformer.slots_by_head.as_slice() {
                [] => vec![linformer.slots; spec.heads],
                given => given.to_vec(),
            };
            let own = by_head.iter().map(|slots| one(*slots).1).sum::<usize>();
            let parameters = match linformer.sharing {
                Sharing::None => 2 * own,
                Sharing::Headwise => 2 * one(linformer.slots).1,
                Sharing::KeyValue | Sharing::Layerwise => one(linformer.slots).1,
            };
            let of_tokens = linformer.project == Project::Tokens;
            let each = by_head.iter().map(|&slots| {
                let projections = match of_tokens {
                    true => 0,
                    false => 2 * one(slots).0 * keys * widths,
                };
                projections + LENGTH * slots * (2 * widths + 5)
            });
            let shared = linformer.sharing != Sharing::Headwise;
            let projections = match (of_tokens, shared) {
                (false, _) => 0,
                (true, true) => 2 * one(linformer.slots).0 * keys * WIDTH,
                (true, false) => 2 * 2 * one(linformer.slots).0 * keys * WIDTH,
            };
            (parameters, BATCH * (projections + each.sum::<usize>()))
        }
        MechanismSpec::Lion(lion) => lion_formula(spec, lion, keys),
        MechanismSpec::Fastmax(fastmax) => {
            let learned = usize::from(fastmax.learned) * fastmax.degree * spec.heads;
            (learned, fastmax_formula(spec, fastmax, keys))
        }
        MechanismSpec::Kernelized(kernelized) => kernelized_formula(spec, kernelized, keys),
        MechanismSpec::Sparse(sparse) => {
            let merging = match sparse.pattern {
                SparsePattern::LogSparse | SparsePattern::Layout(_) => 0,
                _ => 2 * LENGTH * (2 * spec.value_width(WIDTH) + 4),
            };
            let met = (0..spec.heads).map(|head| pairs_of_pattern(sparse, head));
            let met = BATCH * met.sum::<usize>();
            (0, met * (2 * widths + 5) + heads * merging)
        }
        MechanismSpec::Reformer(reformer) => {
            let width = spec.head_width(WIDTH);
            let hashing = 2 * width * keys * reformer.rounds * reformer.buckets[0] / 2;
            // Under a causal mask the first token meets no other one, and itself in a part for that.
            let alone = usize::from(spec.causal);
            let merging = match reformer.rounds + alone {
                1 => 0,
                parts => parts * LENGTH * (2 * spec.value_width(WIDTH) + 4),
            };
            // Every chunk of the ring meets itself and the one before, and no token itself.
            let met = match reformer.chunk >= LENGTH {
                true => 2 * reformer.rounds * (pairs - LENGTH) + alone,
                false => reformer.rounds * LENGTH * (2 * reformer.chunk - 1),
            };
            (0, heads * (met * (2 * widths + 5) + hashing + merging))
        }
        MechanismSpec::Soft(soft) => soft_formula(spec, soft, keys),
        MechanismSpec::Ecoformer(ecoformer) => ecoformer_formula(spec, ecoformer, keys),
        MechanismSpec::Mra(mra) => (0, mra_formula(spec, mra)),
        MechanismSpec::Combiner(combiner) => {
            let value = spec.value_width(WIDTH);
            let pair = 2 * widths + 5;
            let merging = |parts: usize| parts * LENGTH * (2 * value + 4);
            // Features of what keys of rows are made of.
            let row_source = match combiner.summary {
                Summary::Projected {
                    of: RowSource::Values,
                } => value,
                _ => spec.head_width(WIDTH),
            };
            let operations = match combiner.form {
                CombinerForm::Fixed { segment: 2 } if spec.causal => {
                    (9 + 6 + 4) * pair + merging(2)
                }
                CombinerForm::Fixed { segment: 2 } => (12 + 12 + 6) * pair + merging(2),
                // 1 + the ones among the binary digits of 0 … 5; span 0 of two tokens, 0 of four. Those of one
                // token are that token.
                CombinerForm::LogSparse => (6 + 7 + (2 + 4)) * pair,
                // Columns of 1 + 2 + 3, rows of 1 before; the other column above, and its first two
                // beginnings; one side of each earlier row, the other being empty, and both ends
                // of one token of the two rows that have a later one.
                CombinerForm::Mixture {
                    columns: 2,
                    joint: false,
                } => {
                    let direct = 12 + 3;
                    let vertical = (direct + 4 + 6) * pair + merging(3);
                    let horizontal = (direct + 6 + 4) * pair + merging(3);
                    vertical + horizontal + 2 * LENGTH * value
                }
                CombinerForm::RowMajor { columns: 2 } => {
                    let keys = 8 * (2 * spec.head_width(WIDTH) + 2 * row_source + 5);
                    (9 + 6 + 8) * pair + merging(2) + keys
                }
                // Row and column, the other column above, and its first two beginnings.
                CombinerForm::Vertical { columns: 2 } => (12 + 3 + 4 + 6) * pair + merging(3),
                CombinerForm::Routed { .. } => 0,
                other => panic!("no formula for {other:?}"),
            };
            let width = spec.head_width(WIDTH);
            let (layer, pooled) = match combiner.summary {
                Summary::Largest => (0, 0),
                Summary::DeepSets { pooling } => {
                    let each = 2 * LENGTH * (2 * width * width + 2 * width);
                    // Both segments of two that a later one looks at.
                    let sums = if pooling == Pooling::Max {
                        0
                    } else {
                        2 * 4 * width
                    };
                    (2 * (width * width + width), each + sums)
                }
                // Both tokens of the two rows that later ones look at.
                Summary::Projected { .. } => (
                    width * (width + row_source) + 2 * width,
                    4 * (2 * width * (width + row_source) + 11 * width),
                ),
            };
            let centroids = match combiner.form {
                CombinerForm::Routed { clusters } => clusters * width,
                _ => 0,
            };
            (
                spec.heads * (layer + centroids),
                heads * (operations + pooled),
            )
        }
    }
}

fn soft_formula(spec: &MultiHeadSpec, soft: &SoftSpec, n: usize) -> (usize, usize) {
    let (heads, d, width) = (spec.heads, spec.head_width(WIDTH), spec.value_width(WIDTH));
    // Six tokens in windows of two, or two rows of three in squares of two.
    let (m, window) = match (soft.landmarks, soft.columns) {
        (Landmarks::Segments { count }, _) => (count, 0),
        (_, None) => (3, 2),
        (_, Some(3)) => (2, 4),
        other => panic!("no formula for {other:?}"),
    };
    let (parameters, landmarks) = match soft.landmarks {
        Landmarks::Convolution { .. } => {
            (window * d * d + 2 * d, m * (2 * window * d * d + 11 * d))
        }
        Landmarks::Mean { .. } | Landmarks::Segments { .. } => (0, n * d),
    };
    let taps = match (soft.local, soft.columns) {
        (None, _) => 0,
        (Some(side), None) => side,
        (Some(side), Some(_)) => side * side,
    };
    let near = if taps > 0 { (2 * taps + 1) * n } else { 0 };
    let normalising = if soft.normalised { 5 * m * m } else { 0 };
    let before = landmarks
        + (n * m + m * m) * (2 * d + 4)
        + soft.steps * (4 * m * m * m + 2 * m * m)
        + normalising;
    let after = (4 * n * m + 2 * m * m + near) * width;
    (parameters + heads * taps, BATCH * heads * (before + after))
}

fn ecoformer_formula(spec: &MultiHeadSpec, eco: &EcoformerSpec, n: usize) -> (usize, usize) {
    let (heads, d, width) = (spec.heads, spec.head_width(WIDTH), spec.value_width(WIDTH));
    let (m, bits) = (eco.anchors, eco.bits);
    let codes = n * (3 * d + m * (2 * d + 6) + 2 * m * bits);
    let sums = match (spec.causal, eco.released) {
        (true, _) => past(n, bits + 1, width + 1) + n * (width + 1),
        (false, false) => 4 * n * (bits + 1) * (width + 1) + n * (width + 1),
        (false, true) => n * (4 * bits * width + 3 * bits + 3 * width + 2),
    };
    let bandwidth = usize::from(eco.bandwidth == Bandwidth::Fitted);
    (
        heads * (m * (d + 1 + bits) + bandwidth),
        BATCH * heads * (codes + sums),
    )
}

fn mra_formula(spec: &MultiHeadSpec, mra: &MraSpec) -> usize {
    let (d, width) = (spec.head_width(WIDTH), spec.value_width(WIDTH));
    let pair = 2 * d + 2 * width + 5;
    let merging = 2 * LENGTH * (2 * width + 4);
    let operations = match (spec.causal, mra.scales.as_slice()) {
        // Nine blocks looked at, three on the diagonal refined.
        (false, [2, 1]) => 9 * 2 * d + LENGTH * (2 * d + width) + (6 + 3 * 4) * pair + merging,
        // Six blocks on and before the diagonal, five of them refined: triangles of three entries on it.
        (true, [2, 1]) => 6 * 2 * d + LENGTH * (d + width) + (1 + 3 * 3 + 2 * 4) * pair + merging,
        // Four blocks looked at and two refined, five of two tokens looked at and refined: the last
        // block of four is half empty.
        (false, [4, 2, 1]) => (4 + 5) * 2 * d + (8 + 4) * (2 * d + width) + 5 * 4 * pair,
        other => panic!("no formula for {other:?}"),
    };
    BATCH * spec.heads * operations
}

/// Pairs of a query and a key that a head meets in a sequence.
fn pairs_of_pattern(sparse: &SparseSpec, head: usize) -> usize {
    let sees = |i: usize, j: usize| match &sparse.pattern {
        SparsePattern::Strided { stride } => {
            let steps = [i - j < *stride, (i - j).is_multiple_of(*stride)];
            match sparse.steps {
                Steps::ByHead => steps[head % 2],
                _ => steps[0] || steps[1],
            }
        }
        SparsePattern::Fixed {
            stride,
            summaries: 1,
            groups,
        } => i / stride == j / stride || stride - 1 - j % stride == head % groups,
        SparsePattern::LogSparse => i == j || (i - j).is_power_of_two(),
        SparsePattern::Layout(layout) => match layout.heads[head][0].as_str() {
            "#" => true,
            letter => layout.masks[letter][i].as_bytes()[j] == b'#',
        },
        other => panic!("no formula for {other:?}"),
    };
    let pairs = (0..LENGTH).flat_map(|i| (0..=i).map(move |j| (i, j)));
    pairs.filter(|(i, j)| sees(*i, *j)).count()
}
