//! Attention's weights, and which products of its matrices count.

use super::{
    D, H, Head, K, Matrix, N, Reference, attention, block_with, columns, drawn, identity, matrix,
    multi_head, run, times, tokens, tokens_of, transposed, weights,
};
use crate::common::{assert_near, build, difference, draw, random, tensor, values};
use lapidary_kernels::Tensor;
use lapidary_parts::Context;
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec};
use lapidary_signal::{Signal, Trace};

#[test]
fn attention_weights_are_positive_and_sum_to_one() {
    let spec = block_with(attention());
    let weights = weights(&spec, &drawn(&spec), &tokens());
    assert_eq!(weights.dims(), [1, H, N, N]);
    assert!(values(&weights).iter().all(|w| *w > 0.0));
    let sums = weights.sum(3).unwrap();
    assert_near(&sums, &sums.ones_like().unwrap(), 1e-12, "sums");
}

#[test]
fn without_query_or_key_weights_attention_is_uniform() {
    let spec = block_with(attention());
    for name in ["attention.query.weight", "attention.key.weight"] {
        let mut map = drawn(&spec);
        map.insert(name.to_owned(), map[name].zeros_like().unwrap());
        let weights = weights(&spec, &map, &tokens());
        let uniform = (weights.ones_like().unwrap() / N as f64).unwrap();
        assert_near(&weights, &uniform, 1e-12, name);
    }
}

#[test]
fn a_large_scale_picks_the_best_key_alone() {
    let spec = block_with(attention());
    let hard = block_with(MultiHeadSpec {
        scale: Some(1e6),
        ..attention()
    });
    let map = drawn(&spec);
    let soft = values(&weights(&spec, &map, &tokens()));
    let hard = values(&weights(&hard, &map, &tokens()));
    for (soft, hard) in soft.chunks(N).zip(hard.chunks(N)) {
        let best = (0..N).max_by(|a, b| soft[*a].total_cmp(&soft[*b])).unwrap();
        for (key, weight) in hard.iter().enumerate() {
            assert_eq!(*weight, f64::from(u8::from(key == best)));
        }
    }
}

#[test]
fn the_scale_is_a_rescaling_of_the_query_weights() {
    let map = drawn(&block_with(attention()));
    let unscaled = block_with(MultiHeadSpec {
        scale: Some(1.0),
        ..attention()
    });
    let mut scaled = map.clone();
    let query = (&map["attention.query.weight"] / (K as f64).sqrt()).unwrap();
    scaled.insert("attention.query.weight".to_owned(), query);
    let expected = run(&block_with(attention()), &map, &tokens());
    assert_near(
        &run(&unscaled, &scaled, &tokens()),
        &expected,
        1e-12,
        "scale",
    );
}

#[test]
fn a_constant_added_to_all_keys_changes_nothing_and_to_queries_does() {
    let spec = block_with(MultiHeadSpec {
        bias: true,
        ..attention()
    });
    let map = drawn(&spec);
    let before = weights(&spec, &map, &tokens());
    let moved = |name: &str| {
        let mut map = map.clone();
        let constant = random(&[D], 23);
        map.insert(name.to_owned(), (&map[name] + constant).unwrap());
        weights(&spec, &map, &tokens())
    };
    assert_near(&moved("attention.key.bias"), &before, 1e-12, "keys");
    assert!(difference(&moved("attention.query.bias"), &before) > 1e-2);
}

#[test]
fn only_the_product_of_query_and_key_weights_matters() {
    let spec = block_with(attention());
    let map = drawn(&spec);
    // Near enough to three times the identity to be invertible.
    let r = matrix(&(random(&[K, K], 24) + (identity(K) * 3.0).unwrap()).unwrap());
    let r_inverse_transposed = transposed(&inverse(&r));
    let each_head = |name: &str, by: &Matrix| {
        let weight = matrix(&map[name]);
        let rows: Matrix = weight
            .chunks(K)
            .flat_map(|u| times(by, &u.to_vec()))
            .collect();
        tensor(rows.concat(), &[D, D])
    };
    let mut changed = map.clone();
    for (name, by) in [
        ("attention.query.weight", &r),
        ("attention.key.weight", &r_inverse_transposed),
    ] {
        changed.insert(name.to_owned(), each_head(name, by));
    }
    let expected = weights(&spec, &map, &tokens());
    assert_near(&weights(&spec, &changed, &tokens()), &expected, 1e-10, "R");
}

/// Gauss–Jordan elimination with pivots.
fn inverse(a: &Matrix) -> Matrix {
    let n = a.len();
    let mut rows: Matrix = a.clone();
    for (i, row) in rows.iter_mut().enumerate() {
        row.extend((0..n).map(|j| f64::from(u8::from(i == j))));
    }
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|i, j| rows[*i][column].abs().total_cmp(&rows[*j][column].abs()))
            .unwrap();
        rows.swap(column, pivot);
        let scale = rows[column][column];
        rows[column].iter_mut().for_each(|x| *x /= scale);
        let pivot_row = rows[column].clone();
        for (i, row) in rows.iter_mut().enumerate() {
            if i != column {
                let factor = row[column];
                row.iter_mut()
                    .zip(&pivot_row)
                    .for_each(|(x, p)| *x -= factor * p);
            }
        }
    }
    rows.into_iter().map(|row| row[n..].to_vec()).collect()
}

fn rank(a: &Matrix) -> usize {
    let mut rows = a.clone();
    let mut rank = 0;
    for column in 0..rows[0].len() {
        let Some(pivot) = (rank..rows.len())
            .max_by(|i, j| rows[*i][column].abs().total_cmp(&rows[*j][column].abs()))
        else {
            break;
        };
        if rows[pivot][column].abs() < 1e-9 {
            continue;
        }
        rows.swap(rank, pivot);
        let pivot_row = rows[rank].clone();
        for row in rows.iter_mut().skip(rank + 1) {
            let factor = row[column] / pivot_row[column];
            row.iter_mut()
                .zip(&pivot_row)
                .for_each(|(x, p)| *x -= factor * p);
        }
        rank += 1;
    }
    rank
}

#[test]
fn factored_values_have_low_rank_and_wide_heads_reach_all_value_maps() {
    // V_h = W_O,h W_V,h with the usual inner size.
    let spec = block_with(attention());
    let map = drawn(&spec);
    let reference = Reference {
        spec: &spec,
        map: &map,
    };
    for head in reference.heads() {
        assert_eq!(rank(&head.v), K);
    }
    // Any V_h: a head as wide as the tokens, with W_V,h = V_h and W_O,h = 1.
    let wide = MultiHeadSpec {
        head_width: Some(D),
        ..attention()
    };
    let value = random(&[H * D, D], 25);
    let output = Tensor::cat(&[identity(D), identity(D)], 1).unwrap();
    let mut map = draw(12, |p| MultiHeadAttention::new(&wide, D, p));
    map.insert("value.weight".to_owned(), value.clone());
    map.insert("output.weight".to_owned(), output);
    let heads: Vec<Head> = (0..H)
        .map(|h| {
            let rows = |t: &Tensor| matrix(&t.narrow(0, h * D, D).unwrap());
            Head {
                u_query: rows(&map["query.weight"]),
                u_key: rows(&map["key.weight"]),
                v: rows(&value),
            }
        })
        .collect();
    assert!(heads.iter().all(|head| rank(&head.v) == D));
    let x = columns(&tokens());
    let expected = multi_head(&heads, &x, &x, 1.0 / (D as f64).sqrt(), |_, _| true);
    let trace = Trace::new();
    let part = build(&map, |p| MultiHeadAttention::new(&wide, D, p)).unwrap();
    let y = part.forward(&Signal::from(tokens()), &Context::new(&trace), None);
    assert_near(
        y.unwrap().value(),
        &tokens_of(&expected),
        1e-10,
        "full rank",
    );
}

#[test]
fn keys_and_values_from_elsewhere_make_cross_attention() {
    let spec = attention();
    let map = draw(13, |p| MultiHeadAttention::over_memory(&spec, D, p));
    let part = build(&map, |p| MultiHeadAttention::over_memory(&spec, D, p)).unwrap();
    let memory = random(&[1, 3, D], 26);
    let trace = Trace::new();
    let y = part
        .cross(
            &Signal::from(tokens()),
            &Signal::from(memory.clone()),
            None,
            &Context::new(&trace),
        )
        .unwrap();
    let block = block_with(spec);
    let named = map
        .iter()
        .map(|(name, t)| (format!("attention.{name}"), t.clone()))
        .collect();
    let heads = Reference {
        spec: &block,
        map: &named,
    }
    .heads();
    let scale = 1.0 / (K as f64).sqrt();
    let expected = multi_head(
        &heads,
        &columns(&memory),
        &columns(&tokens()),
        scale,
        |_, _| true,
    );
    assert_near(y.value(), &tokens_of(&expected), 1e-10, "cross");
}
