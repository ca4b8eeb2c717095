//! What a block costs, and what is refused.

use super::*;

#[test]
fn the_cost_of_a_block_grows_with_the_number_of_means_alone() {
    let subject = Subject::new(
        VccSpec {
            size: 16,
            ..VccSpec::new(4, 3)
        },
        1,
    );
    let metered = |length: usize| {
        let meter = Meter::new();
        let x = random(&[1, length, WIDTH], 2);
        let x = Signal::from(x).into_metered(meter.clone());
        let trace = Trace::new();
        subject
            .organised(&subject.map, x, Given::default(), &trace)
            .unwrap();
        meter
    };
    let attention = |length: usize| metered(length).sites()["blocks.0.attention.mixed"].flops;
    for blocks in [20usize, 40, 80] {
        let r = 3 * 16 + (blocks - 3) + 4;
        // One more feature for the bias: heads of 4 and values of 3.
        let expected = (r * r * 2 * (2 * 4 + 2 * 3 + 5)) as u64;
        assert_eq!(attention(4 + 16 * blocks), expected);
    }
    // Everything else is linear: means, differences, the selection.
    let rest = |length: usize| {
        let meter = metered(length);
        let pairs = meter.sites()["blocks.0.attention.mixed"].flops;
        (meter.total().flops - pairs) as f64
    };
    let exponent = (rest(64_004) / rest(16_004)).ln() / 4f64.ln();
    assert!((exponent - 1.0).abs() < 0.05, "{exponent}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut VccSpec, &mut Vec<BlockSpec>), expected: &str| {
        let (mut spec, mut blocks) = (spec(2), vec![block(PositionSpec::None); 2]);
        change(&mut spec, &mut blocks);
        let model = Surroundings {
            blocks: &blocks,
            width: WIDTH,
            length: 64,
        };
        let spec = OrganisationSpec::VipCentric(spec);
        let said = spec
            .validate(&model, "organisation")
            .unwrap_err()
            .to_string();
        assert!(said.starts_with(expected), "{said}");
    };
    let attention = |block: &mut BlockSpec, change: &dyn Fn(&mut MultiHeadSpec)| {
        if let MixerSpec::MultiHead(attention) = &mut block.attention {
            change(attention);
        }
    };
    refused(&|spec, _| spec.fine = 0, "organisation.fine is 0");
    refused(&|spec, _| spec.vips = 0, "organisation.vips is 0");
    refused(&|spec, _| spec.size = 0, "organisation.size is 0");
    refused(
        &|spec, _| spec.segment_blocks = 3,
        "organisation.segment_blocks is 3",
    );
    refused(
        &|spec, _| spec.whole_blocks = vec![2],
        "organisation.whole_blocks is 2",
    );
    // What no block would hear of.
    refused(
        &|spec, _| spec.segment = 4,
        "organisation.segment is 4, but must be absent where segment_blocks is 0",
    );
    refused(
        &|spec, _| spec.segment_blocks = 2,
        "organisation.segment_blocks is 2, but must be fewer",
    );
    refused(
        &|spec, _| spec.whole_blocks = vec![0, 1],
        "organisation.whole_blocks is [0, 1], but must be fewer",
    );
    refused(
        &|spec, _| spec.exploration = 1.5,
        "organisation.exploration is 1.5",
    );
    refused(
        &|_, blocks| attention(&mut blocks[1], &|spec| spec.causal = true),
        "blocks.1.attention is \"causal\"",
    );
    refused(
        &|_, blocks| attention(&mut blocks[1], &|spec| spec.window = Some(3)),
        "blocks.1.attention.window is",
    );
    let local = Some(LocalFilter {
        side: 3,
        columns: None,
    });
    refused(
        &|_, blocks| attention(&mut blocks[1], &|spec| spec.local = local),
        "blocks.1.attention.local is",
    );
    refused(
        &|_, blocks| attention(&mut blocks[0], &|spec| spec.scale = Some(0.0)),
        "blocks.0.attention.scale is",
    );
    refused(
        &|_, blocks| attention(&mut blocks[0], &|spec| spec.position = PositionSpec::Alibi),
        "blocks.0.attention.position.kind is \"alibi\"",
    );
    refused(
        &|_, blocks| blocks[0].wiring = Wiring::PostNorm,
        "blocks.0.wiring is \"post-norm\"",
    );
    refused(
        &|_, blocks| blocks[0].attention = MixerSpec::Absent,
        "blocks.0.attention.kind is \"absent\"",
    );
    // Segments may know positions in any way.
    let segmented = VccSpec {
        segment_blocks: 1,
        ..spec(2)
    };
    let mut first = block(PositionSpec::Alibi);
    attention(&mut first, &|spec| spec.local = local);
    let subject = Subject::with(segmented, vec![first, block(PositionSpec::None)]);
    assert_eq!(subject.run(&tokens(9)).dims(), [BATCH, 9, WIDTH]);
}
