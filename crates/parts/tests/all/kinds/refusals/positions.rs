//! Rotations, biases and the pairs that are kept of them.

use super::*;
use lapidary_parts::position::fire::FireTransform;

/// Heads with these positions.
fn with_position(position: PositionSpec) -> BlockSpec {
    with_heads(MultiHeadSpec {
        position,
        ..MultiHeadSpec::new(2)
    })
}

#[test]
fn impossible_positions_are_refused() {
    let llama3 = |low: f64, high: f64, original_length: usize| {
        with_position(rotary(
            false,
            None,
            RotaryScaling::Llama3 {
                factor: 8.0,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_length,
            },
        ))
    };
    let buckets = |buckets, max_distance| {
        with_position(PositionSpec::RelativeBuckets {
            buckets,
            max_distance,
        })
    };
    assert_refused([
        (
            with_position(PositionSpec::Fire(FireSpec {
                layers: 3,
                ..FireSpec::default()
            })),
            "b.attention.position.layers is 3, but must be between 1 and 2",
        ),
        (
            with_position(PositionSpec::Sandwich { width: 0 }),
            "b.attention.position.width is 0, but must be between 2 and 65536",
        ),
        (
            with_position(rotary(false, Some(3), RotaryScaling::None)),
            "b.attention.position.width is 3, but must be an even number of at most 4, the width of a head",
        ),
        (
            with_position(rotary(false, None, RotaryScaling::Linear { factor: 0.0 })),
            "b.attention.position.scaling.factor is 0.0, but must be a positive number",
        ),
        (
            llama3(0.0, 4.0, 64),
            "b.attention.position.scaling.low_frequency_factor is 0.0, but must be a positive number",
        ),
        (
            llama3(4.0, 4.0, 64),
            "b.attention.position.scaling.high_frequency_factor is 4.0, but must be above the low_frequency_factor 4",
        ),
        (
            llama3(1.0, 4.0, 0),
            "b.attention.position.scaling.original_length is 0, but must be at least 1",
        ),
        (
            buckets(2, 100),
            "b.attention.position.buckets is 2, but must be between 4 and 4096",
        ),
        (
            buckets(32, 8),
            "b.attention.position.max_distance is 8, but must be above 8, the distances that have a bucket of their own",
        ),
    ]);
}

#[test]
fn impossible_kept_pairs_are_refused() {
    let kept = |of, width, groups| {
        PositionSpec::Rotary(RotarySpec {
            width,
            kept: Some(KeptPairs { of, groups }),
            ..RotarySpec::default()
        })
    };
    assert_refused([
        (
            with_position(kept(8, None, vec![vec![0, 1]])),
            "number of lists in b.attention.position.kept.groups is 1, but must be 2, one list for each group of keys",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 1], vec![3]])),
            "b.attention.position.kept.groups.1 is [3], but must be 2 rising indices below 4",
        ),
        (
            with_position(kept(8, None, vec![vec![1, 0], vec![2, 3]])),
            "b.attention.position.kept.groups.0 is [1, 0], but must be 2 rising indices below 4",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 4], vec![2, 3]])),
            "b.attention.position.kept.groups.0 is [0, 4], but must be 2 rising indices below 4",
        ),
        (
            with_position(kept(8, None, vec![vec![], vec![]])),
            "b.attention.position.kept.groups.0 is [], but must be 1 rising indices below 4",
        ),
        (
            with_position(kept(7, None, vec![vec![0], vec![1]])),
            "b.attention.position.kept.of is 7, but must be an even number of at most 1048576",
        ),
        (
            with_position(kept(8, Some(2), vec![vec![0, 1], vec![1, 2]])),
            "b.attention.position.width is 2, but must be absent or 4, two for each kept pair",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 1, 2], vec![1, 2, 3]])),
            "b.attention.position.width is 6, but must be an even number of at most 4, the width of a head",
        ),
    ]);
}

/// Powers of positions have to be numbers in single precision.
#[test]
fn powers_that_overflow_are_refused() {
    for exponent in [0.0, 5.5, f64::NAN, f64::INFINITY] {
        let fire = FireSpec {
            transform: FireTransform::Power { exponent },
            ..FireSpec::default()
        };
        let said = with_position(PositionSpec::Fire(fire)).validate(WIDTH, "b");
        let said = said.unwrap_err().to_string();
        assert!(
            said.starts_with("b.attention.position.transform.exponent is "),
            "{said}"
        );
        assert!(said.contains("above 0 and at most 5"), "{said}");
    }
    let fire = FireSpec {
        transform: FireTransform::Power { exponent: 5.0 },
        ..FireSpec::default()
    };
    assert!(
        with_position(PositionSpec::Fire(fire))
            .validate(WIDTH, "b")
            .is_ok()
    );
}
