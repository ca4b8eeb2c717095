//! Layouts of blocks against dense attention under a mask that is read off their characters.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Subject, WIDTH, dot, mask, softmax, spec,
};
use crate::common::{assert_near, contracted, gradient_error, random, values};
use lapidary_kernels::{Device, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::sparse::{BlockLayout, SparsePattern, SparseSpec, Steps};
use lapidary_parts::state::MixerState;
use lapidary_signal::{Signal, Trace};

fn subject(layout: &BlockLayout) -> Subject {
    let pattern = SparsePattern::Layout(layout.clone());
    let steps = Steps::Merged;
    let mechanism = MechanismSpec::Sparse(SparseSpec { pattern, steps });
    Subject::new(spec(mechanism, true), 4)
}

fn owned(rows: &[&str]) -> Vec<String> {
    rows.iter().map(|row| (*row).to_owned()).collect()
}

/// Rows that meet nothing, one block, several, and two masks; the second head has another layout.
fn drawn(block: usize) -> BlockLayout {
    let mask = |rule: fn(usize, usize) -> bool| -> Vec<String> {
        let row = |i: usize| {
            (0..block)
                .map(|j| if rule(i, j) { '#' } else { '.' })
                .collect()
        };
        (0..block).map(row).collect()
    };
    BlockLayout {
        block,
        heads: vec![
            owned(&["#", ".a", "...", "b##b", "#...b", "######"]),
            owned(&["a", "##", "#.#", "..b#", ".....", "#..#.a"]),
        ],
        masks: BTreeMap::from([
            (
                "a".to_owned(),
                mask(|i, j| i != 3 && (i * 5 + j * 3) % 7 < 4),
            ),
            ("b".to_owned(), mask(|i, j| i.abs_diff(j) < 3)),
        ]),
    }
}

/// Whether a head's query sees a key, by the characters alone.
fn sees(layout: &BlockLayout, head: usize, i: usize, j: usize) -> bool {
    if j > i {
        return false;
    }
    let rows = &layout.heads[head.min(layout.heads.len() - 1)];
    match &rows[i / layout.block][j / layout.block..][..1] {
        "." => false,
        "#" => true,
        letter => &layout.masks[letter][i % layout.block][j % layout.block..][..1] == "#",
    }
}

fn layouts() -> Vec<(BlockLayout, usize)> {
    let one = BlockLayout {
        block: 8,
        heads: vec![owned(&["#", "##", ".##", "#.##"])],
        masks: BTreeMap::new(),
    };
    vec![
        (drawn(8), 48),
        (drawn(8), 43),
        (drawn(8), 5),
        (drawn(16), 91),
        (drawn(32), 130),
        (drawn(64), 200),
        (one, 29),
    ]
}

#[test]
fn equals_dense_attention_under_the_layout() {
    for (layout, length) in layouts() {
        let x = random(&[2, length, WIDTH], 1);
        let run = subject(&layout).run(&x, Given::default());
        let expected = |batch: usize, head: usize, i: usize| {
            let q = run.query(batch, head, i);
            let score = |j: usize| match sees(&layout, head, i, j) {
                true => dot(q, run.key(batch, head, j)) / (HEAD_WIDTH as f64).sqrt(),
                false => f64::NEG_INFINITY,
            };
            softmax(&(0..length).map(score).collect::<Vec<_>>())
        };
        run.check(2, expected, 1e-12, &format!("{layout:?} at {length}"));
    }
}

/// Of queries, keys and values that are laid out and masked: the gradient of the input is the same.
#[test]
fn gradients_equal_those_of_dense_attention() {
    let (layout, length) = (drawn(8), 43);
    let subject = subject(&layout);
    let x = Var::from_tensor(&random(&[1, length, WIDTH], 1)).unwrap();
    let gradient = |y: &Tensor| {
        let found = contracted(y).backward().unwrap();
        found.get(x.as_tensor()).unwrap().clone()
    };
    let own = subject.output(x.as_tensor(), Given::default());
    let project = |name: &str, x: &Tensor| {
        let weight = subject.map[&format!("{name}.weight")].t().unwrap();
        let y = x.matmul(&weight).unwrap();
        match subject.map.get(&format!("{name}.bias")) {
            Some(bias) => y.broadcast_add(bias).unwrap(),
            None => y,
        }
    };
    let rows = x.as_tensor().squeeze(0).unwrap();
    let [q, k, v] = ["query", "key", "value"].map(|name| project(name, &rows));
    let mut mixed = Vec::new();
    for head in 0..HEADS {
        let of = |x: &Tensor| x.narrow(1, head * HEAD_WIDTH, HEAD_WIDTH).unwrap();
        let seen = (0..length).flat_map(|i| (0..length).map(move |j| (i, j)));
        let seen: Vec<f64> = seen
            .map(|(i, j)| f64::from(u8::from(sees(&layout, head, i, j))))
            .collect();
        let seen = Tensor::from_vec(seen, (length, length), &Device::Cpu).unwrap();
        let scores = of(&q).matmul(&of(&k).t().unwrap()).unwrap();
        let scores = (scores / (HEAD_WIDTH as f64).sqrt()).unwrap();
        let weights = (scores.exp().unwrap() * &seen).unwrap();
        let total = weights.sum_keepdim(1).unwrap();
        // Where nothing is seen everything is zero.
        let total = (&total + total.eq(0.0).unwrap().to_dtype(total.dtype()).unwrap()).unwrap();
        mixed.push(
            weights
                .broadcast_div(&total)
                .unwrap()
                .matmul(&of(&v))
                .unwrap(),
        );
    }
    let mixed = Tensor::cat(&mixed, 1).unwrap();
    let dense = project("output", &mixed).unsqueeze(0).unwrap();
    assert_near(&own, &dense, 1e-12, "forward");
    assert_near(&gradient(&own), &gradient(&dense), 1e-11, "backward");
}

#[test]
fn gradients_equal_central_differences() {
    let layout = drawn(8);
    let subject = subject(&layout);
    let mut inputs = subject.map.clone();
    inputs.insert("x".to_owned(), random(&[1, 35, WIDTH], 1));
    let error = gradient_error(&inputs, 5, |inputs| {
        let subject = Subject {
            spec: subject.spec.clone(),
            map: inputs.clone(),
        };
        contracted(&subject.output(&inputs["x"], Given::default()))
    });
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn decoding_equals_the_parallel_pass() {
    let x = random(&[2, 45, WIDTH], 1);
    let subject = subject(&drawn(8));
    let whole = subject.output(&x, Given::default());
    for chunks in [&[1; 45][..], &[3, 14, 1, 20, 7], &[44, 1]] {
        assert_near(&subject.decode(&x, chunks), &whole, 1e-12, "decoded");
    }
}

/// What no later row names is forgotten.
#[test]
fn caches_hold_what_later_rows_name() {
    let layout = BlockLayout {
        block: 8,
        heads: vec![owned(&[
            "#", "##", "..#", "..##", "...##", "....##", "#....##",
        ])],
        masks: BTreeMap::new(),
    };
    let x = random(&[1, 47, WIDTH], 1);
    let attention = subject(&layout).attention();
    let (trace, mut state) = (Trace::new(), MixerState::Empty);
    for offset in 0..47 {
        let cx = Context {
            offset,
            ..Context::new(&trace)
        };
        let here = Signal::from(x.narrow(1, offset, 1).unwrap());
        attention.forward(&here, &cx, Some(&mut state)).unwrap();
    }
    let MixerState::Kept(kept) = &state else {
        panic!("{state:?}");
    };
    // Row 6 asks for the first block again; the second is not named behind row 1.
    let held = kept.places();
    let needed = (0..8).chain(32..47);
    for place in needed {
        assert!(held.contains(&place), "{held:?}");
    }
    assert!(!held.contains(&8) && held.len() < 47, "{held:?}");
}

#[test]
fn pads_are_not_there() {
    let (x, junk) = (random(&[1, 21, WIDTH], 1), random(&[1, 3, WIDTH], 2));
    let subject = subject(&drawn(8));
    let alone = subject.output(&x, Given::default());
    let padded = Tensor::cat(&[&junk, &x], 1).unwrap();
    let keep: Vec<u8> = (0..24).map(|j| u8::from(j >= 3)).collect();
    let keep = mask(&[&keep]);
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let y = subject.output(&padded, given).narrow(1, 3, 21).unwrap();
    assert_near(&y, &alone, 1e-12, "padded");
}

/// Pairs of blocks that do not meet cost nothing.
#[test]
fn operations_are_those_of_the_blocks() {
    let (layout, length) = (drawn(8), 43);
    let tokens = (0..HEADS).flat_map(|head| (0..length).map(move |i| (head, i)));
    let pairs = tokens.map(|(head, i)| (0..=i).filter(|&j| sees(&layout, head, i, j)).count());
    let pairs = pairs.sum::<usize>() as u64;
    // Rows of one, two, three or four and of six blocks are laid out apart.
    let merging = (4 * HEADS * length * (2 * HEAD_WIDTH + 4)) as u64;
    let found = subject(&layout).mixing_operations(length);
    assert_eq!(found, pairs * (4 * HEAD_WIDTH + 5) as u64 + merging);
    // A band of blocks, of which there are ever more, is linear.
    let band = |blocks: usize| BlockLayout {
        block: 8,
        heads: vec![
            (0..blocks)
                .map(|row| {
                    (0..=row)
                        .map(|c| if c + 2 > row { '#' } else { '.' })
                        .collect()
                })
                .collect(),
        ],
        masks: BTreeMap::new(),
    };
    let work = |blocks: usize| subject(&band(blocks)).mixing_operations(8 * blocks) as f64;
    let exponent = (work(64) / work(32)).log2();
    assert!((exponent - 1.0).abs() < 0.05, "{exponent}");
}

#[test]
fn more_tokens_than_the_layout_has_are_refused() {
    let subject = subject(&drawn(8));
    let x = Signal::from(random(&[1, 49, WIDTH], 1));
    let trace = Trace::new();
    let error = subject.attention().forward(&x, &Context::new(&trace), None);
    let said = error.unwrap_err().to_string();
    assert!(
        said.contains("is 49, but must be at most 48, those of the layout"),
        "{said}"
    );
    assert!(
        values(&subject.output(&random(&[1, 48, WIDTH], 1), Given::default())).len() == 48 * WIDTH
    );
}
