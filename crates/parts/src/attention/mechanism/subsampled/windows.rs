//! Windows of queries and the keys that each reads, near ones more often.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// `0 … length − 1`, each moved by at most `2 radius` places: sorted by `j + radius · u_j`.
fn shuffled(length: usize, radius: f64, generator: &mut ChaCha8Rng) -> Vec<usize> {
    let mut keys: Vec<(f64, usize)> = (0..length)
        .map(|j| (j as f64 + radius * generator.random_range(-1.0..=1.0), j))
        .collect();
    keys.sort_by(|a, b| a.0.total_cmp(&b.0));
    keys.into_iter().map(|(_, j)| j).collect()
}

/// `length` places cut into windows of `size` or more, less than twice as many.
fn cut(length: usize, size: usize) -> Vec<std::ops::Range<usize>> {
    let count = (length / size.max(1)).max(1);
    let bound = |window: usize| window * length / count;
    (0..count)
        .map(|window| bound(window)..bound(window + 1))
        .collect()
}

pub(super) fn line_windows(
    kept: usize,
    length: usize,
    causal: bool,
    radius: f64,
    generator: &mut ChaCha8Rng,
) -> Vec<[Vec<usize>; 2]> {
    let order = shuffled(length, radius, generator);
    // Where all keys are kept nobody may miss one.
    let size = match causal && kept < length {
        true => kept.div_ceil(2),
        false => kept,
    };
    let windows = cut(length, size);
    let first = |window: usize| {
        let window = if causal {
            window.saturating_sub(1)
        } else {
            window
        };
        windows.get(window).map_or(0, |range| range.start)
    };
    let each = windows.iter().enumerate().map(|(window, range)| {
        let keys = order.get(first(window)..range.end).unwrap_or_default();
        [range.clone().collect(), keys.to_vec()]
    });
    each.collect()
}

pub(super) fn image_windows(
    kept: usize,
    length: usize,
    columns: usize,
    radius: f64,
    generator: &mut ChaCha8Rng,
) -> Vec<[Vec<usize>; 2]> {
    let lines = length.div_ceil(columns);
    let mut order: Vec<usize> = (0..length).collect();
    let rows = (0..lines).map(|row| {
        let cells = row * columns..((row + 1) * columns).min(length);
        cells.collect::<Vec<_>>()
    });
    let along = (0..columns).map(|column| (column..length).step_by(columns).collect());
    for line in rows.chain(along) {
        let before: Vec<usize> = line.iter().map(|&cell| order[cell]).collect();
        let moved = shuffled(line.len(), radius, generator);
        for (&cell, from) in line.iter().zip(moved) {
            order[cell] = before[from];
        }
    }
    // As near to a square as the image is wide and high: what it lacks in one, a window has in the other.
    let high = ((kept as f64).sqrt().round() as usize).clamp(1, lines.max(1));
    let wide = kept.div_ceil(high).clamp(1, columns);
    let high = high.max(kept.div_ceil(wide));
    let mut windows = Vec::new();
    for down in cut(lines, high) {
        for across in cut(columns, wide) {
            let cells = down.clone().flat_map(|row| {
                let cells = across.clone().map(move |column| row * columns + column);
                cells.filter(|cell| *cell < length)
            });
            let queries: Vec<usize> = cells.collect();
            let keys = queries.iter().map(|&cell| order[cell]).collect();
            windows.push([queries, keys]);
        }
    }
    windows
}
