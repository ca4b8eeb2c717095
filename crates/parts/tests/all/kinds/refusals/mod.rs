//! Specs that cannot be built, and what is said of them: field, value and what would be valid.

mod approximate;
mod attention;
mod blocks;
mod feedforward;
mod kernels;
mod mixers;
mod patterns;
mod positions;

use super::*;

/// Checks what is said of each spec.
#[track_caller]
fn assert_refused(table: impl IntoIterator<Item = (BlockSpec, &'static str)>) {
    for (spec, message) in table {
        assert_eq!(spec.validate(WIDTH, "b").unwrap_err().to_string(), message);
    }
}

fn with_heads(heads: MultiHeadSpec) -> BlockSpec {
    block(Wiring::PreNorm, LAYER, MixerSpec::MultiHead(heads))
}

/// Heads, and behind them these, which read another sequence.
fn with_cross(cross: MultiHeadSpec) -> BlockSpec {
    BlockSpec {
        cross_attention: Some(cross),
        ..with_heads(MultiHeadSpec::new(2))
    }
}

#[test]
fn unknown_fields_are_refused() {
    let unknown = r#"{"attention": {"kind": "multi-head", "heads": 2, "head": 3}}"#;
    let error = serde_json::from_str::<BlockSpec>(unknown).unwrap_err();
    assert!(
        error.to_string().contains("unknown field `head`"),
        "{error}"
    );
}
