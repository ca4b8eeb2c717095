//! Groups that are tiles of a grid, and conditions before them.

use super::{BATCH, Given, Subject, WIDTH, rows, spec, tokens};
use crate::common::{assert_near, difference, random};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::organisation::fit::{FitSpec, GroupPositions, Tiles};
use lapidary_signal::{Signal, Trace};

#[test]
fn tiles_are_groups_of_a_grid() {
    // A grid of 4 × 6 in tiles of 2 × 2... rows first.
    let tiled = FitSpec {
        tiles: Some(Tiles {
            columns: 6,
            height: 2,
            width: 2,
        }),
        positions: GroupPositions::Grid,
        ..spec("(1)1(1)", 6, false)
    };
    let plain = FitSpec {
        tiles: None,
        ..tiled.clone()
    };
    let (tiled, mut plain) = (Subject::new(tiled, false), Subject::new(plain, false));
    plain.map = tiled.map.clone();
    let mut order = Vec::new();
    for tile_row in 0..2 {
        for tile_column in 0..3 {
            for (row, column) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                order.push((6 * (2 * tile_row + row) + 2 * tile_column + column) as u32);
            }
        }
    }
    let order = Tensor::new(order.as_slice(), &Device::Cpu).unwrap();
    let in_order = |x: &Tensor| x.index_select(&order, 1).unwrap();
    let x = tokens(24);
    assert_near(
        &in_order(&tiled.run(&x)),
        &plain.run(&in_order(&x)),
        1e-12,
        "tiles",
    );
    let keep = Tensor::from_vec(
        (0..BATCH * 24)
            .map(|at| u8::from(at % 5 != 0))
            .collect::<Vec<_>>(),
        (BATCH, 24),
        &Device::Cpu,
    )
    .unwrap();
    let kept = in_order(&keep);
    let given = |keep| Given {
        keep,
        ..Given::default()
    };
    let (a, _) = tiled.pass(&x, given(Some(&keep)));
    let (b, _) = plain.pass(&in_order(&x), given(Some(&kept)));
    assert_near(&in_order(&a), &b, 1e-12, "tiles with pads");
}

#[test]
fn conditions_stand_before_the_tokens_of_their_group() {
    let conditioned = FitSpec {
        condition: 2,
        ..spec("(1)", 3, false)
    };
    let subject = Subject::new(conditioned, false);
    let x = tokens(12);
    let memory = random(&[BATCH, 6, WIDTH], 5);
    let given = |memory| Given {
        memory: Some(memory),
        ..Given::default()
    };
    let (y, _) = subject.pass(&x, given(&memory));
    assert_eq!(y.dims(), [BATCH, 12, WIDTH]);
    let changed = Tensor::cat(&[&rows(&memory, 0, 4), &random(&[BATCH, 2, WIDTH], 6)], 1).unwrap();
    let (other, _) = subject.pass(&x, given(&changed));
    assert_eq!(difference(&rows(&y, 0, 8), &rows(&other, 0, 8)), 0.0);
    assert!(difference(&rows(&y, 8, 4), &rows(&other, 8, 4)) > 1e-3);
    let signal = Signal::from(x.clone());
    let without = subject.signal(&subject.map, signal, Given::default(), &Trace::new());
    assert!(without.unwrap_err().to_string().contains("memory"));
    let short = rows(&memory, 0, 4);
    let signal = Signal::from(x);
    let wrong = subject.signal(&subject.map, signal, given(&short), &Trace::new());
    assert!(
        wrong
            .unwrap_err()
            .to_string()
            .contains("2 conditions for every group")
    );
}

/// Neither tokens nor latents hear of them.
#[test]
fn conditions_that_are_pads_are_not_there() {
    let of = |condition| {
        let spec = FitSpec {
            condition,
            ..spec("(1)1(1)", 3, false)
        };
        Subject::new(spec, false)
    };
    let (two, mut one) = (of(2), of(1));
    one.map = two.map.clone();
    let x = tokens(12);
    let mask =
        |row: &[u8]| Tensor::from_vec(row.repeat(BATCH), (BATCH, row.len()), &Device::Cpu).unwrap();
    // The second condition of every group is a pad, and so are some tokens.
    let conditions = mask(&[1, 0, 1, 0, 1, 0]);
    let tokens = mask(&[1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1]);
    let memory = random(&[BATCH, 6, WIDTH], 5);
    let first = Tensor::new(&[0u32, 2, 4], &Device::Cpu).unwrap();
    let first = memory.index_select(&first, 1).unwrap();
    for keep in [None, Some(&tokens)] {
        let given = |memory, memory_keep| Given {
            keep,
            memory: Some(memory),
            memory_keep,
            ..Given::default()
        };
        let (padded, _) = two.pass(&x, given(&memory, Some(&conditions)));
        let (alone, _) = one.pass(&x, given(&first, None));
        assert_near(&padded, &alone, 1e-12, "conditions with pads");
    }
}
