//! Which tokens are VIPs, pads, and blocks of the model that see them otherwise.

use super::*;

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
    let plain = subject.plain(&subject.map, &x, None);
    let whole = |output| Subject {
        spec: VccSpec {
            fine: 9,
            output,
            ..spec(4)
        },
        blocks: subject.blocks.clone(),
        map: subject.map.clone(),
    };
    let (y, _) = whole(VccOutput::Tokens).pass(&left, given, "none");
    assert_near(&rows(&y, 10, LENGTH), &plain, 1e-12, "pads to the left");
    let (vips, _) = whole(VccOutput::Vips).pass(&left, given, "none");
    assert_near(&vips, &rows(&plain, 0, 2), 1e-12, "VIPs behind pads");
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
