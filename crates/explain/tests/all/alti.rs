//! The exact properties of ALTI, ALTI-Logit, GlobEnc and the small baselines.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, close, model, tokens};
use lapidary_explain::mixing::{Contributions, rollout};
use lapidary_explain::{Explanation, Options, Question, Target, explainer, logit_updates, mixings};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_signal::Trace;
use std::collections::BTreeMap;

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

/// GATED with attention and feed-forward reading the same vector, as GPT-NeoX.
fn parallel() -> String {
    DECODER.replace("repeat = 2", "repeat = 2\nwiring = \"parallel\"")
}

fn explain(method: &str, model: &Model, target: Target, options: &Options) -> Explanation {
    let input = tokens(&IDS);
    let question = Question::new(model, &input);
    let method = explainer(method).unwrap();
    method.explain(&question, target, options).unwrap()
}

fn at(class: usize, foil: Option<usize>, position: Option<usize>) -> Target {
    Target::Score {
        class,
        foil,
        position,
    }
}

#[test]
fn everything_sums_to_the_logit() {
    for spec in [DECODER, GATED, &parallel()] {
        let model = model(spec, 5);
        for position in [None, Some(3)] {
            for (include_residual, trace_feedforward) in
                [(false, false), (true, false), (false, true), (true, true)]
            {
                let options = Options {
                    include_residual,
                    trace_feedforward,
                    ..Options::default()
                };
                let found = explain("alti-logit", &model, at(4, None, position), &options);
                let account = &found.account;
                let error = account.unattributed.abs() / account.explained.abs();
                assert!(error < 1e-10, "{options:?}: {account:?}");
                assert_eq!(account.attributed, found.scores.iter().sum::<f64>());
                let named = |name: &str| account.elsewhere.iter().any(|(n, _)| n == name);
                assert_eq!(named("embedding of the position"), !include_residual);
                assert_eq!(named("feed-forward parts"), !trace_feedforward);
            }
        }
    }
}

#[test]
fn in_single_precision_it_still_does() {
    let spec: ModelSpec = toml::from_str(DECODER).unwrap();
    let mut parameters: BTreeMap<String, Tensor> = model(DECODER, 5)
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.to_dtype(DType::F32).unwrap()))
        .collect();
    let model = Model::new(spec, &mut parameters).unwrap();
    let account = explain("alti-logit", &model, Target::class(4), &Options::default()).account;
    assert!(account.unattributed.abs() < 1e-4 * account.explained.abs());
}

#[test]
fn heads_and_blocks_sum_to_the_tokens_scores() {
    let model = model(DECODER, 5);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let target = at(4, Some(2), None);
    let updates = logit_updates(&question, &[target]).unwrap().pop().unwrap();
    let of_heads: f64 = updates
        .blocks
        .iter()
        .flat_map(|b| b.heads.iter().flatten())
        .sum();
    let scores = explain("alti-logit", &model, target, &Options::default()).scores;
    close(&[of_heads], &[scores.iter().sum()], 1e-12);
    assert_eq!(updates.blocks.len(), 2);
    assert_eq!(updates.blocks[0].heads.len(), 4);
    // What the first block's attention writes is traced through no mixing at all.
    let first = &updates.blocks[0];
    let by_position: Vec<f64> = (0..IDS.len())
        .map(|token| first.heads.iter().map(|head| head[token]).sum())
        .collect();
    close(&first.tokens, &by_position, 1e-12);
}

#[test]
fn several_targets_are_each_explained_as_alone() {
    let model = model(GATED, 6);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let targets = [
        at(4, None, Some(6)),
        at(1, Some(2), Some(2)),
        at(0, None, None),
    ];
    for method in [
        "alti",
        "alti-logit",
        "erasure",
        "gradient-l1",
        "gradient-l2",
    ] {
        let method = explainer(method).unwrap();
        let together = (method.explain)(&question, &targets, &Options::default()).unwrap();
        for (target, found) in targets.iter().zip(together) {
            let alone = method
                .explain(&question, *target, &Options::default())
                .unwrap();
            close(&found.scores, &alone.scores, 1e-11);
            close(
                &[found.account.explained],
                &[alone.account.explained],
                1e-12,
            );
        }
    }
}

#[test]
fn mixings_are_shares_and_causal_ones_see_nothing_later() {
    for spec in [DECODER, GATED, ENCODER, &parallel()] {
        let model = model(spec, 2);
        let input = tokens(&IDS);
        let each = mixings(&Question::new(&model, &input), Contributions::Alti).unwrap();
        let causal = spec != ENCODER;
        let mut all = each.clone();
        all.push(rollout(&each));
        for matrix in &all {
            for (token, row) in matrix.iter().enumerate() {
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(row.iter().all(|share| *share >= 0.0));
                if causal {
                    assert!(row[token + 1..].iter().all(|share| *share == 0.0));
                }
            }
        }
        assert!(
            each[0]
                .iter()
                .flatten()
                .filter(|share| **share > 0.01)
                .count()
                > 10
        );
    }
}

#[test]
fn tokens_after_the_position_get_exactly_nothing() {
    for method in ["alti", "alti-logit"] {
        for spec in [DECODER, GATED] {
            let model = model(spec, 2);
            let scores = explain(method, &model, at(4, None, Some(3)), &Options::default()).scores;
            assert_eq!(scores[4..], [0.0; 3], "{method}");
            assert!(scores[..3].iter().any(|score| score.abs() > 1e-3));
        }
    }
}

#[test]
fn a_contrast_is_the_difference_of_its_sides() {
    let model = model(DECODER, 3);
    let options = Options {
        include_residual: true,
        trace_feedforward: true,
        ..Options::default()
    };
    for method in ["alti-logit", "erasure"] {
        let of = |class, foil| explain(method, &model, at(class, foil, None), &options).scores;
        let (one, other) = (of(4, None), of(9, None));
        let difference: Vec<f64> = one.iter().zip(&other).map(|(a, b)| a - b).collect();
        close(&of(4, Some(9)), &difference, 1e-11);
    }
}

/// A group's key and value heads written out once for each query head give the same scores.
#[test]
fn grouped_heads_are_heads_that_share() {
    let grouped = model(GATED, 4);
    let mut parameters: BTreeMap<String, Tensor> = grouped.parameters().clone();
    for block in 0..2 {
        for name in ["key", "value"] {
            let name = format!("blocks.{block}.attention.{name}.weight");
            let weight = parameters[&name].reshape((2, 1, 4, 16)).unwrap();
            let each = weight.broadcast_as((2, 2, 4, 16)).unwrap();
            let each = each.contiguous().unwrap().reshape((16, 16)).unwrap();
            parameters.insert(name, each);
        }
    }
    let spec: ModelSpec = toml::from_str(&GATED.replace("groups = 2, ", "")).unwrap();
    let every = Model::new(spec, &mut parameters).unwrap();
    for method in ["alti", "alti-logit"] {
        let of = |model| explain(method, model, Target::class(4), &Options::default()).scores;
        close(&of(&grouped), &of(&every), 1e-11);
    }
}

#[test]
fn factorised_layers_are_multiplied_out() {
    let mut spec: ModelSpec = toml::from_str(DECODER).unwrap();
    spec.low_rank = BTreeMap::from([
        ("blocks.0.attention.output".to_owned(), 5),
        ("blocks.1.attention.value".to_owned(), 3),
    ]);
    let text = toml::to_string(&spec).unwrap();
    let account = explain(
        "alti-logit",
        &model(&text, 3),
        Target::class(1),
        &Options::default(),
    );
    assert!(account.account.unattributed.abs() < 1e-10 * account.account.explained.abs());
}

#[test]
fn padded_tokens_get_nothing_and_change_nothing() {
    let model = model(ENCODER, 8);
    let options = Options::default();
    for method in ["alti", "globenc", "erasure"] {
        let alone = explain(method, &model, Target::class(1), &options).scores;
        let mut ids = IDS.to_vec();
        ids.extend([0, 0]);
        let input = tokens(&ids);
        let padding = [1u8, 1, 1, 1, 1, 1, 1, 0, 0];
        let padding = Tensor::from_slice(&padding, (1, 9), &Device::Cpu).unwrap();
        let question = Question {
            padding: Some(&padding),
            ..Question::new(&model, &input)
        };
        let method = explainer(method).unwrap();
        let padded = method
            .explain(&question, Target::class(1), &options)
            .unwrap();
        close(&padded.scores[..7], &alone, 1e-11);
        assert_eq!(padded.scores[7..], [0.0; 2]);
    }
}

// ------------------------------------------------------------------ loops over every number

type Vector = Vec<f64>;

/// A model whose parts are read one number at a time.
struct Loops {
    model: Model,
    trace: Trace,
    heads: usize,
    groups: usize,
}

const WIDTH: usize = 16;
const HEAD: usize = 4;

impl Loops {
    fn new(spec: &str, groups: usize) -> Self {
        let model = model(spec, 9);
        let trace = Trace::new().capture("blocks.*").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&tokens(&IDS), pass).unwrap();
        Self {
            model,
            trace,
            heads: 4,
            groups,
        }
    }

    fn rows(&self, site: &str) -> Vec<Vector> {
        let value = self.trace.signal(site).unwrap().into_value();
        value.get(0).unwrap().to_vec2().unwrap()
    }

    fn vector(&self, name: &str) -> Vector {
        self.model.parameters()[name].to_vec1().unwrap()
    }

    /// `W v + b`.
    fn linear(&self, path: &str, v: &[f64]) -> Vector {
        let weight: Vec<Vector> = self.model.parameters()[&format!("{path}.weight")]
            .to_vec2()
            .unwrap();
        let bias = self.model.parameters().get(&format!("{path}.bias"));
        let bias: Vector = bias.map_or(vec![0.0; weight.len()], |b| b.to_vec1().unwrap());
        let dot = |row: &Vector| row.iter().zip(v).map(|(w, v)| w * v).sum::<f64>();
        weight
            .iter()
            .zip(bias)
            .map(|(row, b)| dot(row) + b)
            .collect()
    }

    /// `L(v)` with the deviation of `at`, and `β` besides when `shifted`.
    fn norm(&self, path: &str, v: &[f64], at: &[f64], shifted: bool) -> Vector {
        let gamma = self.vector(&format!("{path}.weight"));
        let layer = self
            .model
            .parameters()
            .contains_key(&format!("{path}.bias"));
        let mean = |v: &[f64]| v.iter().sum::<f64>() / WIDTH as f64;
        let (epsilon, centre) = if layer { (1e-5, mean(at)) } else { (1e-6, 0.0) };
        let squares: Vector = at.iter().map(|a| (a - centre).powi(2)).collect();
        let deviation = (mean(&squares) + epsilon).sqrt();
        let centre = if layer { mean(v) } else { 0.0 };
        let mut y: Vector = (0..WIDTH)
            .map(|i| gamma[i] * (v[i] - centre) / deviation)
            .collect();
        if shifted && layer {
            let beta = self.vector(&format!("{path}.bias"));
            y.iter_mut().zip(beta).for_each(|(y, b)| *y += b);
        }
        y
    }

    /// `T_t(x_j)`, `[query][key][width]`, from what attention reads.
    fn shares(&self, block: usize, read: &[Vector]) -> Vec<Vec<Vector>> {
        let path = format!("blocks.{block}.attention");
        let weights = self.trace.signal(&format!("{path}.weights")).unwrap();
        let weights = weights.into_value().get(0).unwrap();
        let weights: Vec<Vec<Vector>> = weights.to_vec3().unwrap();
        let output: Vec<Vector> = self.model.parameters()[&format!("{path}.output.weight")]
            .to_vec2()
            .unwrap();
        let values: Vec<Vector> = read
            .iter()
            .map(|v| self.linear(&format!("{path}.value"), v))
            .collect();
        let mut shares = vec![vec![vec![0.0; WIDTH]; read.len()]; read.len()];
        for t in 0..read.len() {
            for j in 0..read.len() {
                for (i, entry) in shares[t][j].iter_mut().enumerate() {
                    for (h, weights) in weights.iter().enumerate() {
                        let group = h * self.groups / self.heads;
                        for p in 0..HEAD {
                            let value = values[j][group * HEAD + p];
                            *entry += weights[t][j] * value * output[i][h * HEAD + p];
                        }
                    }
                }
            }
        }
        shares
    }
}

fn plus(a: &[f64], b: &[f64]) -> Vector {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// `max(0, ‖y‖₁ − ‖y − T̃‖₁)`, rows divided by their sums.
fn nearer(y: &[Vector], shares: &[Vec<Vector>]) -> Vec<Vector> {
    let length = |v: &[f64]| v.iter().map(|v| v.abs()).sum::<f64>();
    let row = |(y, shares): (&Vector, &Vec<Vector>)| {
        let raw: Vector = shares
            .iter()
            .map(|share| {
                let rest: Vector = y.iter().zip(share).map(|(y, s)| y - s).collect();
                (length(y) - length(&rest)).max(0.0)
            })
            .collect();
        let sum: f64 = raw.iter().sum();
        raw.into_iter().map(|c| c / sum).collect()
    };
    y.iter().zip(shares).map(row).collect()
}

#[test]
fn alti_logit_equals_loops_over_every_number() {
    for (spec, groups) in [(DECODER, 4), (GATED, 2)] {
        let loops = Loops::new(spec, groups);
        let t = IDS.len() - 1;
        let last = loops.rows("blocks.1.out");
        let table = match loops.model.parameters().get("head.output.weight") {
            Some(table) => table.clone(),
            None => loops.model.parameters()["embeddings.tokens.weight"].clone(),
        };
        let table: Vec<Vector> = table.to_vec2().unwrap();
        let update = |v: &Vector| {
            let v = loops.norm("final_norm", v, &last[t], false);
            v.iter().zip(&table[4]).map(|(v, u)| v * u).sum::<f64>()
        };
        let mut scores = vec![0.0; IDS.len()];
        let mut before: Vec<Vector> = (0..IDS.len())
            .map(|i| {
                (0..IDS.len())
                    .map(|j| f64::from(u8::from(i == j)))
                    .collect()
            })
            .collect();
        for block in 0..2 {
            let x = loops.rows(&format!("blocks.{block}.in"));
            let path = format!("blocks.{block}.attention_norm");
            let read: Vec<Vector> = x.iter().map(|x| loops.norm(&path, x, x, true)).collect();
            let mut shares = loops.shares(block, &read);
            for (j, share) in shares[t].iter().enumerate() {
                for (score, share_of_token) in scores.iter_mut().zip(&before[j]) {
                    *score += update(share) * share_of_token;
                }
            }
            for (token, x) in x.iter().enumerate() {
                shares[token][token] = plus(&shares[token][token], x);
            }
            let out = loops.rows(&format!("blocks.{block}.attention.out"));
            let y: Vec<Vector> = x.iter().zip(&out).map(|(x, o)| plus(x, o)).collect();
            before = rollout(&[before, nearer(&y, &shares)]);
        }
        let found = explain(
            "alti-logit",
            &loops.model,
            Target::class(4),
            &Options::default(),
        );
        close(&found.scores, &scores, 1e-10);
        let found = explain("alti", &loops.model, Target::class(4), &Options::default());
        close(&found.scores, &before[t], 1e-10);
    }
}

#[test]
fn alti_and_globenc_of_an_encoder_equal_loops_over_every_number() {
    let loops = Loops::new(ENCODER, 4);
    let (mut alti, mut globenc) = (Vec::new(), Vec::new());
    for block in 0..2 {
        let first = format!("blocks.{block}.attention_norm");
        let second = format!("blocks.{block}.feedforward_norm");
        let x = loops.rows(&format!("blocks.{block}.in"));
        let out = loops.rows(&format!("blocks.{block}.attention.out"));
        let sum: Vec<Vector> = x.iter().zip(&out).map(|(x, o)| plus(x, o)).collect();
        let y: Vec<Vector> = sum.iter().map(|s| loops.norm(&first, s, s, true)).collect();
        let written = loops.rows(&format!("blocks.{block}.feedforward.out"));
        let mut shares = loops.shares(block, &x);
        for (t, row) in shares.iter_mut().enumerate() {
            row[t] = plus(&row[t], &x[t]);
            for share in row {
                *share = loops.norm(&first, share, &sum[t], false);
            }
        }
        alti.push(nearer(&y, &shares));
        let lengths: Vec<Vector> = shares
            .iter()
            .enumerate()
            .map(|(t, row)| {
                let at = plus(&y[t], &written[t]);
                let length = |share: &Vector| {
                    let through = loops.norm(&second, share, &at, false);
                    through.iter().map(|v| v * v).sum::<f64>().sqrt()
                };
                let raw: Vector = row.iter().map(length).collect();
                let sum: f64 = raw.iter().sum();
                raw.into_iter().map(|c| c / sum).collect()
            })
            .collect();
        globenc.push(lengths);
    }
    for (method, matrices) in [("alti", alti), ("globenc", globenc)] {
        let found = explain(method, &loops.model, Target::class(1), &Options::default());
        close(&found.scores, &rollout(&matrices)[0], 1e-10);
        let options = Options {
            start_layer: 1,
            ..Options::default()
        };
        let found = explain(method, &loops.model, Target::class(1), &options);
        close(&found.scores, &matrices[1][0], 1e-10);
    }
}

// ------------------------------------------------------------------ the small baselines

fn logit(model: &Model, input: &Input, padding: Option<&Tensor>, class: usize) -> f64 {
    let pass = Pass {
        padding,
        ..Pass::default()
    };
    let logits = model.forward(input, pass).unwrap().into_logits().unwrap();
    logits
        .into_value()
        .get(0)
        .unwrap()
        .to_vec1::<f64>()
        .unwrap()[class]
}

#[test]
fn erasure_is_the_drop_of_single_passes() {
    let model = model(ENCODER, 7);
    let input = tokens(&IDS);
    let intact = logit(&model, &input, None, 2);
    let expected: Vector = (0..IDS.len())
        .map(|token| {
            let keep: Vec<u8> = (0..IDS.len()).map(|k| u8::from(k != token)).collect();
            let keep = Tensor::from_slice(&keep, (1, IDS.len()), &Device::Cpu).unwrap();
            intact - logit(&model, &input, Some(&keep), 2)
        })
        .collect();
    let found = explain("erasure", &model, Target::class(2), &Options::default());
    close(&found.scores, &expected, 1e-11);
}

#[test]
fn gradient_lengths_are_those_of_differences() {
    let model = model(ENCODER, 7);
    const STEP: f64 = 1e-5;
    let shifted = |token: usize, feature: usize, by: f64| {
        let trace = Trace::new()
            .replace("embeddings", move |_, signal| {
                let shape = signal.dims().to_vec();
                let mut shift = vec![0.0; shape.iter().product()];
                shift[token * WIDTH + feature] = by;
                let shift = Tensor::from_vec(shift, shape, &Device::Cpu).unwrap();
                Ok((signal.into_value() + shift).unwrap().into())
            })
            .unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let logits = model
            .forward(&tokens(&IDS), pass)
            .unwrap()
            .into_logits()
            .unwrap();
        logits
            .into_value()
            .get(0)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()[1]
    };
    let (mut ones, mut twos) = (Vec::new(), Vec::new());
    for token in 0..IDS.len() {
        let slopes: Vector = (0..WIDTH)
            .map(|f| (shifted(token, f, STEP) - shifted(token, f, -STEP)) / (2.0 * STEP))
            .collect();
        ones.push(slopes.iter().map(|s| s.abs()).sum());
        twos.push(slopes.iter().map(|s| s * s).sum::<f64>().sqrt());
    }
    let of = |method| explain(method, &model, Target::class(1), &Options::default()).scores;
    close(&of("gradient-l1"), &ones, 1e-7);
    close(&of("gradient-l2"), &twos, 1e-7);
}

#[test]
fn random_scores_are_their_seeds() {
    let model = model(DECODER, 1);
    let of = |seed| {
        let options = Options {
            seed,
            ..Options::default()
        };
        explain("random", &model, Target::class(1), &options).scores
    };
    assert_eq!(of(3), of(3));
    assert_ne!(of(3), of(4));
    assert_eq!(of(3).len(), IDS.len());
}

// ------------------------------------------------------------------ what is refused

fn refusal(method: &str, spec: &str, target: Target) -> String {
    let model = model(spec, 1);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let method = explainer(method).unwrap();
    let result = method.explain(&question, target, &Options::default());
    result.unwrap_err().to_string()
}

#[test]
fn what_is_not_defined_names_what_is() {
    let message = refusal("alti-logit", ENCODER, Target::class(0));
    assert!(
        message.contains("post-norm") && message.contains("globenc"),
        "{message}"
    );
    let message = refusal("globenc", DECODER, Target::class(0));
    assert!(message.contains("attention-rollout"), "{message}");
    let mamba = r#"
        width = 16
        [input]
        kind = "tokens"
        vocabulary = 20
        length = 12
        [[blocks]]
        attention = { kind = "mamba" }
        [head]
        kind = "language-model"
    "#;
    let message = refusal("alti", mamba, Target::class(0));
    assert!(
        message.contains("mamba") && message.contains("decompx"),
        "{message}"
    );
    let mean = DECODER.replace(
        "kind = \"language-model\"",
        "kind = \"pooled\"\npool = \"mean\"\nlabels = 3",
    );
    let message = refusal("alti-logit", &mean, Target::class(0));
    assert!(message.contains("is 7"), "{message}");
}

/// Weights say nothing of what a filter beside the heads adds: it would be missing from the sum without a word.
#[test]
fn filters_beside_heads_are_named() {
    let filtered = DECODER.replace("causal = true", "local = { side = 3 }");
    assert_ne!(filtered, DECODER);
    for method in ["alti", "alti-logit"] {
        assert_eq!(
            refusal(method, &filtered, Target::class(0)),
            "the attention of block 0 is heads with a filter beside them, but must be heads whose weights say all that \
             they mix; decompx, cp-lrp and gradient-x-input go through any part"
        );
    }
    let said = |spec| {
        let found = explain(
            "raw-attention",
            &model(spec, 1),
            Target::class(0),
            &Options::default(),
        );
        found
            .account
            .left_out
            .iter()
            .any(|left| left.starts_with("what filters beside the heads"))
    };
    assert!(said(&filtered) && !said(DECODER));
}

/// Attention that has no output matrix of its own: the sentence names the form that has one.
#[test]
fn outputs_without_a_matrix_of_their_own_are_named() {
    for wiring in ["replacing", "pre-norm"] {
        let of = |output: &str| {
            let heads = if output == "absent" { 1 } else { 4 };
            let fields =
                format!("heads = {heads}, sharing = \"all\", output = \"{output}\", bias = false");
            let attention = format!(
                "repeat = 2\nwiring = \"{wiring}\"\nattention = {{ kind = \"multi-head\", {fields}"
            );
            let spec = DECODER.replace(
                "repeat = 2\nattention = { kind = \"multi-head\", heads = 4",
                &attention,
            );
            assert_ne!(spec, DECODER);
            spec
        };
        for output in ["tied", "absent"] {
            for method in ["alti-logit", "alti"] {
                assert_eq!(
                    refusal(method, &of(output), Target::class(0)),
                    format!(
                        "the output of attention in block 0 is {output}, but must be own, whose matrix says what each \
                         head writes, in a block with a residual around each part; decompx, cp-lrp and \
                         gradient-x-input go through any part"
                    )
                );
            }
        }
        let own = of("own");
        match wiring {
            "replacing" => {
                let said = refusal("alti-logit", &own, Target::class(0));
                assert!(
                    said.starts_with("the wiring of block 0 is replacing"),
                    "{said}"
                );
            }
            _ => {
                let found = explain(
                    "alti-logit",
                    &model(&own, 1),
                    Target::class(0),
                    &Options::default(),
                );
                let account = found.account;
                assert!(account.unattributed.abs() < 1e-10 * account.explained.abs().max(1.0));
            }
        }
    }
}
