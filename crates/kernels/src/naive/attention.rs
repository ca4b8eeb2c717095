//! Attention of every kind with its scores laid out.

use super::{MASKED, keep_to_bias, quotients, repeat_groups, softmax};
use crate::{
    Attended, AttentionOptions, AttentionPart, BlockPart, D, Direction, ExponentialMeans,
    PartOptions, Result, ScoreBias, SinkhornOptions, SoftmaxMask, Tensor, TreeFeatures, TreeMask,
};

/// The attention weights `softmax(scale · Q Kᵀ + bias)`, `[batch, heads, query, key]`.
pub fn attention_weights(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let k = repeat_groups(k, q.dim(1)?)?;
    let scores = (q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)? * options.scale)?;
    attention_softmax(&scores, options)
}

/// The weights that scaled scores `[batch, heads, query, key]` give once the bias is added and
/// the masks are put on.
pub fn attention_softmax(scores: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    softmax(&masked_scores(scores, options)?, &SoftmaxMask::default())
}

/// Scaled scores with the bias added and what is masked at `-∞`.
fn masked_scores(scores: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let (batch, _, queries, keys) = scores.dims4()?;
    let mut scores = match &options.bias {
        Some(bias) => scores.broadcast_add(&bias.laid_out(queries, keys)?)?,
        None => scores.clone(),
    };
    let offset = options.query_offset;
    scores = scores.broadcast_add(&keep_to_bias(
        queries,
        keys,
        scores.dtype(),
        scores.device(),
        |i, j| {
            (!options.causal || j <= i + offset)
                && options.window.is_none_or(|w| (i + offset).abs_diff(j) < w)
        },
    )?)?;
    if let Some(keep) = &options.key_padding {
        let keep = keep.reshape((batch, 1, 1, keys))?;
        let zero = Tensor::zeros((batch, 1, 1, keys), scores.dtype(), scores.device())?;
        let masked = zero.affine(1.0, MASKED)?;
        scores = scores.broadcast_add(&keep.where_cond(&zero, &masked)?)?;
    }
    Ok(scores)
}

/// Rows `[queries, width + 1]` of [`crate::Attended`], from those of two parts.
pub(crate) fn merged_rows(parts: [&Tensor; 2], of: [&[u32]; 2]) -> Result<Tensor> {
    let mut gathered = Vec::new();
    for (rows, of) in parts.into_iter().zip(of) {
        let (count, columns) = rows.dims2()?;
        let (queries, width) = (of.len(), columns - 1);
        let nothing = Tensor::zeros((1, width), rows.dtype(), rows.device())?;
        let none = Tensor::full(f64::NEG_INFINITY, (1, 1), rows.device())?;
        let nothing = Tensor::cat(&[nothing, none.to_dtype(rows.dtype())?], 1)?;
        let of = of.iter().map(|&row| row.min(count as u32)).collect();
        let of = Tensor::from_vec(of, queries, rows.device())?;
        let all = Tensor::cat(&[rows, &nothing], 0)?.index_select(&of, 0)?;
        gathered.push(AttentionPart {
            output: all.narrow(1, 0, width)?.reshape((1, 1, queries, width))?,
            log_sums: all.narrow(1, width, 1)?.reshape((1, 1, queries))?,
        });
    }
    let merged = AttentionPart::merged(&gathered)?;
    let queries = merged.log_sums.elem_count();
    let output = merged.output.reshape((queries, ()))?;
    Ok(Tensor::cat(
        &[output, merged.log_sums.reshape((queries, 1))?],
        1,
    )?)
}

/// Rows `[queries, width + 1]` of [`crate::BlockAttention`], log-sums behind outputs: all blocks of a part as
/// long as the longest, with their scores laid out.
pub(crate) fn block_rows<'a>(
    [q, k, v]: [&Tensor; 3],
    parts: impl Iterator<Item = &'a BlockPart>,
    scale: f64,
) -> Result<Tensor> {
    let queries = q.dim(0)?;
    let nothing = Tensor::zeros((1, v.dim(1)? + 1), q.dtype(), q.device())?;
    let nowhere = vec![Attended::NOWHERE; queries];
    let in_order: Vec<u32> = (0..queries as u32).collect();
    let mut merged = merged_rows([&nothing, &nothing], [&nowhere, &nowhere])?;
    for part in parts {
        if let Some((rows, of)) = laid_out_blocks([q, k, v], part, scale)? {
            merged = merged_rows([&merged, &rows], [&in_order, &of])?;
        }
    }
    Ok(merged)
}

/// The rows of one part, and which row each query has; nothing where no query meets a key.
fn laid_out_blocks(
    [q, k, v]: [&Tensor; 3],
    part: &BlockPart,
    scale: f64,
) -> Result<Option<(Tensor, Vec<u32>)>> {
    let starts = std::iter::once(&[0; 2]).chain(&part.ends);
    let blocks = starts.zip(&part.ends);
    let blocks: Vec<_> = blocks.map(|(a, b)| [a[0]..b[0], a[1]..b[1]]).collect();
    let most = |side: usize| blocks.iter().map(|block| block[side].len()).max();
    let (queries, keys) = (most(0).unwrap_or(0), most(1).unwrap_or(0));
    if queries == 0 || keys == 0 {
        return Ok(None);
    }
    let (mut query_rows, mut key_rows) = (Vec::new(), Vec::new());
    let (mut bias, mut pair) = (Vec::new(), 0);
    let mut back = vec![Attended::NOWHERE; q.dim(0)?];
    for (number, [of, over]) in (0..).zip(&blocks) {
        for (place, row) in (number * queries..).zip(&part.queries.rows[of.clone()]) {
            back[*row as usize] = place as u32;
        }
        query_rows.extend_from_slice(&part.queries.rows[of.clone()]);
        query_rows.resize((number + 1) * queries, 0);
        key_rows.extend_from_slice(&part.keys.rows[over.clone()]);
        key_rows.resize((number + 1) * keys, 0);
        for query in of.clone() {
            for key in over.clone() {
                bias.push(pair_bias(part, [query, key], pair));
                pair += 1;
            }
            bias.resize(bias.len() + keys - over.len(), MASKED);
        }
        bias.resize((number + 1) * queries * keys, MASKED);
    }
    let gathered = |x: &Tensor, rows: Vec<u32>, each: usize| -> Result<Tensor> {
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, x.device())?;
        Ok(x.index_select(&rows, 0)?
            .reshape((count / each, 1, each, ()))?)
    };
    let bias = Tensor::from_vec(bias, (blocks.len(), 1, queries, keys), q.device())?;
    let options = PartOptions::new(AttentionOptions {
        scale,
        bias: Some(ScoreBias::Pairs(bias.to_dtype(q.dtype())?)),
        ..AttentionOptions::new(1)
    });
    let part = attention_part(
        &gathered(&q.contiguous()?, query_rows, queries)?,
        &gathered(&k.contiguous()?, key_rows.clone(), keys)?,
        &gathered(&v.contiguous()?, key_rows, keys)?,
        &options,
    )?;
    let both = Tensor::cat(&[part.output, part.log_sums.unsqueeze(3)?], 3)?;
    Ok(Some((both.reshape((blocks.len() * queries, ()))?, back)))
}

/// What is added to the score of a listed query and key, which are such a pair.
fn pair_bias(part: &BlockPart, [query, key]: [usize; 2], pair: usize) -> f64 {
    let (i, j) = (part.queries.positions[query], part.keys.positions[key]);
    let outside = |window: usize| i.abs_diff(j) as usize >= window;
    let hidden = part.hidden.binary_search(&[query as u32, key as u32]);
    if (part.causal && j > i) || part.window.is_some_and(outside) || hidden.is_ok() {
        return MASKED;
    }
    let own = if i == j { part.own } else { 0.0 };
    let bias = |all: &[f64], at: usize| all.get(at).copied().unwrap_or(0.0);
    own + bias(&part.key_bias, key) + bias(&part.pair_bias, pair)
}

/// [`crate::attention_part`], with its scores laid out.
pub fn attention_part(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &PartOptions,
) -> Result<AttentionPart> {
    let (batch, heads, queries, _) = q.dims4()?;
    let k = repeat_groups(k, heads)?;
    let keys = k.dim(2)?;
    let plain = &options.attention;
    let scores = (q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)? * plain.scale)?;
    let scores = match &options.positions {
        None => masked_scores(&scores, plain)?,
        Some([query, key]) => {
            let (query, key) = (query.to_vec2::<u32>()?, key.to_vec2::<u32>()?);
            let mut added = Vec::with_capacity(batch * queries * keys);
            for (query, key) in query.iter().zip(&key) {
                for i in query {
                    added.extend(key.iter().map(|j| {
                        let window = plain.window.unwrap_or(usize::MAX);
                        match (plain.causal && j > i, i.abs_diff(*j) as usize >= window) {
                            (false, false) => 0.0,
                            _ => MASKED,
                        }
                    }));
                }
            }
            let added = Tensor::from_vec(added, (batch, 1, queries, keys), q.device())?;
            let unordered = AttentionOptions {
                causal: false,
                window: None,
                ..plain.clone()
            };
            let scores = scores.broadcast_add(&added.to_dtype(scores.dtype())?)?;
            masked_scores(&scores, &unordered)?
        }
    };
    // Finite, so that a query that sees nothing gets zeros and not 0/0.
    let maximum = scores.max_keepdim(D::Minus1)?.maximum(-1e30)?.detach();
    let weights = scores.broadcast_sub(&maximum)?.exp()?;
    let total = weights.sum_keepdim(D::Minus1)?;
    let total = total.maximum(f64::from(f32::MIN_POSITIVE))?;
    let v = repeat_groups(v, heads)?.contiguous()?;
    Ok(AttentionPart {
        output: weights.matmul(&v)?.broadcast_div(&total)?,
        log_sums: (total.log()? + maximum)?.squeeze(3)?,
    })
}

/// [`crate::causal_exponential_means`], with features and weights laid out.
pub fn causal_exponential_means(
    [q, k, v]: [&Tensor; 3],
    frequencies: &Tensor,
    options: &ExponentialMeans,
) -> Result<Tensor> {
    let (batch, heads, length, width) = q.dims4()?;
    let count = frequencies.dim(D::Minus2)?;
    let across = frequencies.broadcast_as((batch, heads, count, width))?;
    let across = across.transpose(2, 3)?.contiguous()?;
    let features = |x: &Tensor| -> Result<Tensor> {
        let squares = (x.sqr()?.sum_keepdim(3)? * options.decay)?;
        let exponents = x.contiguous()?.matmul(&across)?.broadcast_sub(&squares)?;
        Ok((exponents.exp()? / (count as f64).sqrt())?)
    };
    let mut of_keys = features(k)?;
    if let Some(keep) = &options.keep {
        let keep = Tensor::from_vec(keep.clone(), (batch, 1, length, 1), k.device())?;
        of_keys = of_keys.broadcast_mul(&keep.to_dtype(k.dtype())?)?;
    }
    linear_means(&features(q)?, &of_keys, v, options.epsilon, true)
}

/// [`crate::sinkhorn_attention`], with its weights laid out.
pub fn sinkhorn_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &SinkhornOptions,
) -> Result<Tensor> {
    let (batch, _, length, _) = q.dims4()?;
    let there = match &options.keep {
        Some(keep) => keep.reshape((batch, 1, length, 1))?.to_dtype(q.dtype())?,
        None => Tensor::ones((batch, 1, length, 1), q.dtype(), q.device())?,
    };
    let sides = [there.clone(), there.transpose(2, 3)?.contiguous()?];
    let pairs = sides[0].broadcast_mul(&sides[1])?;
    let scores = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let scores = (scores * options.scale)?.broadcast_mul(&pairs)?;
    let scores = scores.broadcast_add(&pairs.affine(1e30, -1e30)?)?;
    let mut logs = scores.clone();
    let mut before: Option<Tensor> = None;
    for iteration in 0..options.iterations {
        // Rows in even ones, which sum over columns.
        let side = iteration % 2;
        let shifted = match &before {
            Some(before) => scores.broadcast_add(before)?,
            None => scores.clone(),
        };
        let largest = shifted.max_keepdim(3 - side)?.detach();
        let sum = shifted.broadcast_sub(&largest)?.exp()?;
        let sum = (sum.sum_keepdim(3 - side)?.log()? + largest)?;
        let found = sum.neg()?.broadcast_mul(&sides[side])?;
        if iteration + 2 >= options.iterations {
            logs = logs.broadcast_add(&found)?;
        }
        before = Some(found);
    }
    let weights = logs.exp()?.broadcast_mul(&pairs)?;
    Ok(weights.matmul(&v.contiguous()?)?)
}

/// [`crate::decayed_attention`], with its scores laid out.
pub fn decayed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: &Tensor,
    is_causal: bool,
) -> Result<Tensor> {
    let (batch, heads, length, _) = q.dims4()?;
    let through = super::cumulative_sum(log_decay, 2)?;
    let until = (&through - log_decay)?;
    let differences = |of: &Tensor| of.unsqueeze(3)?.broadcast_sub(&of.unsqueeze(2)?);
    // The other halves have grown instead of decayed.
    let past = differences(&until)?.minimum(0.0)?.exp()?;
    let future = differences(&through)?.neg()?.minimum(0.0)?.exp()?;
    let below = Tensor::tril2(length, q.dtype(), q.device())?;
    let above = below.affine(-1.0, 1.0)?;
    let mut mask = past.broadcast_mul(&below)?;
    if !is_causal {
        mask = (mask + future.broadcast_mul(&above)?)?;
    }
    let scores = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let ones = Tensor::ones((batch, heads, length, 1), v.dtype(), v.device())?;
    let values = Tensor::cat(&[v, &ones], 3)?.contiguous()?;
    Ok((scores * mask)?.matmul(&values)?)
}

/// [`crate::tree_attention`], with features and the mask laid out.
pub fn tree_attention(
    [q, k, v]: [&Tensor; 3],
    phi: TreeFeatures,
    mask: &TreeMask,
) -> Result<Tensor> {
    let (q, k) = (phi.laid_out(q)?, phi.laid_out(k)?);
    let (batch, heads, tokens, _) = q.dims4()?;
    let values = mask.values.to_device(q.device())?.to_dtype(q.dtype())?;
    let places = Tensor::from_vec(mask.pairs.table(), tokens * tokens, q.device())?;
    let laid_out = values.index_select(&places, 1)?;
    let laid_out = laid_out.reshape((1, values.dim(0)?, tokens, tokens))?;
    let scores = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let ones = Tensor::ones((batch, heads, tokens, 1), v.dtype(), v.device())?;
    let values = Tensor::cat(&[v, &ones], 3)?.contiguous()?;
    Ok(scores.broadcast_mul(&laid_out)?.matmul(&values)?)
}

/// [`crate::landmark_attention`], with the kernel laid out by differences.
pub fn landmark_attention(
    queries: &Tensor,
    landmarks: &Tensor,
    middle: &Tensor,
    values: &Tensor,
    rate: f64,
    kept: Option<&Tensor>,
) -> Result<Tensor> {
    let apart = queries
        .unsqueeze(3)?
        .broadcast_sub(&landmarks.unsqueeze(2)?)?;
    let mut kernel = (apart.sqr()?.sum(4)? * -rate)?.exp()?;
    if let Some(kept) = kept {
        let kept = kept.unsqueeze(1)?.unsqueeze(3)?.to_dtype(kernel.dtype())?;
        kernel = kernel.broadcast_mul(&kept)?;
    }
    let collected = kernel.t()?.contiguous()?.matmul(&values.contiguous()?)?;
    Ok(kernel.matmul(&middle.contiguous()?.matmul(&collected)?)?)
}

/// [`crate::linear_attention`], with its scores laid out.
pub fn linear_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: Option<&Tensor>,
    direction: Direction,
) -> Result<Tensor> {
    let (batch, heads, length, _) = q.dims4()?;
    let scores = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let sees = |i: usize, j: usize| match direction {
        Direction::Past => j <= i,
        Direction::Future => j >= i,
    };
    let kept: Vec<f64> = (0..length * length)
        .map(|at| f64::from(u8::from(sees(at / length, at % length))))
        .collect();
    let kept = Tensor::from_vec(kept, (length, length), q.device())?.to_dtype(q.dtype())?;
    let kept = match log_decay {
        None => kept.broadcast_as(scores.shape())?,
        Some(decay) => {
            // C_i, as a product with a triangle of ones.
            let below = (0..length * length)
                .map(|at| f64::from(u8::from(at / length <= at % length)))
                .collect::<Vec<f64>>();
            let below = Tensor::from_vec(below, (length, length), q.device())?;
            let below = below.to_dtype(q.dtype())?;
            let flat = decay.contiguous()?.reshape((batch * heads, length))?;
            let sums = flat.matmul(&below)?.reshape((batch, heads, length, 1))?;
            let distance = sums.broadcast_sub(&sums.transpose(2, 3)?)?;
            let distance = match direction {
                Direction::Past => distance,
                Direction::Future => distance.neg()?,
            };
            // What is on the wrong side has grown instead of decayed.
            distance.minimum(0.0)?.exp()?.broadcast_mul(&kept)?
        }
    };
    Ok((scores * kept)?.matmul(&v.contiguous()?)?)
}

/// [`crate::linear_means`], or [`crate::causal_linear_means`], with their scores laid out.
pub fn linear_means(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    epsilon: f64,
    causal: bool,
) -> Result<Tensor> {
    let (batch, heads, keys, _) = v.dims4()?;
    let ones = Tensor::ones((batch, heads, keys, 1), v.dtype(), v.device())?;
    let values = Tensor::cat(&[v, &ones], 3)?.contiguous()?;
    let sums = match causal {
        true => linear_attention(q, k, &values, None, Direction::Past)?,
        false => {
            let scores = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
            scores.matmul(&values)?
        }
    };
    quotients(&sums, epsilon)
}

/// [`crate::PolynomialAttention::sums`], with its scores laid out.
pub fn polynomial_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    [constant, linear, square]: [f64; 3],
    causal: bool,
) -> Result<Tensor> {
    let inner = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let scores = ((inner.sqr()? * square)? + inner.affine(linear, constant)?)?;
    let scores = match causal {
        false => scores,
        true => {
            let length = q.dim(2)?;
            let kept: Vec<f64> = (0..length * length)
                .map(|at| f64::from(u8::from(at % length <= at / length)))
                .collect();
            let kept = Tensor::from_vec(kept, (length, length), q.device())?;
            scores.broadcast_mul(&kept.to_dtype(q.dtype())?)?
        }
    };
    Ok(scores.matmul(&v.contiguous()?)?)
}

/// `softmax(scale · Q Kᵀ + bias) V`, `[batch, heads, query, value_width]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let weights = attention_weights(q, k, options)?;
    Ok(weights.matmul(&repeat_groups(v, q.dim(1)?)?.contiguous()?)?)
}

/// [`crate::linear_attention_by_feature`], position by position.
pub fn linear_attention_by_feature(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: &Tensor,
    direction: Direction,
) -> Result<Tensor> {
    let length = q.dim(2)?;
    let mut order: Vec<usize> = (0..length).collect();
    if direction == Direction::Future {
        order.reverse();
    }
    let at = |x: &Tensor, position: usize| x.narrow(2, position, 1)?.contiguous();
    let (mut state, mut sums): (Option<Tensor>, _) = (None, Vec::with_capacity(length));
    for position in order {
        let added = at(k, position)?
            .transpose(2, 3)?
            .broadcast_mul(&at(v, position)?)?;
        let sum = match state {
            None => added,
            Some(before) => {
                let between = match direction {
                    Direction::Past => position,
                    Direction::Future => position + 1,
                };
                let fade = at(log_decay, between)?.exp()?.transpose(2, 3)?;
                (before.broadcast_mul(&fade)? + added)?
            }
        };
        sums.push(at(q, position)?.matmul(&sum)?);
        state = Some(sum);
    }
    if direction == Direction::Future {
        sums.reverse();
    }
    match sums.is_empty() {
        true => Ok(v.clone()),
        false => Ok(Tensor::cat(&sums, 2)?),
    }
}
