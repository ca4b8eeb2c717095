//! Specs that cannot be built, and what is said of them: field, value and what would be valid.

mod approximate;
mod attention;
mod blocks;
mod feedforward;
mod kernels;
mod mixers;
mod patterns;
mod positions;
mod without_meaning;

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

/// Serde passes over what stands beside the kind of a variant without fields.
#[test]
fn kinds_without_fields_take_none() {
    fn refuse<T: serde::de::DeserializeOwned>(kinds: &[&str]) {
        for kind in kinds {
            let alone = format!("kind = \"{kind}\"");
            assert!(toml::from_str::<T>(&alone).is_ok(), "{kind}");
            let beside = toml::from_str::<T>(&format!("{alone}\ncount = 3"));
            let said = beside.err().map(|error| error.to_string());
            let said = said.unwrap_or_default();
            assert!(said.contains("unknown field `count`"), "{kind}: {said}");
        }
    }
    use lapidary_parts::attention::mechanism::{
        combiner, doubly_stochastic, fastmax, kernelized, lion, sparse, subsampled, topological,
    };
    use lapidary_parts::position::{RotaryScaling, fire};
    refuse::<MixerSpec>(&["absent"]);
    refuse::<MechanismSpec>(&["softmax"]);
    refuse::<NormSpec>(&["none"]);
    refuse::<PositionSpec>(&["none", "alibi", "kerple-logarithmic", "kerple-power"]);
    refuse::<RotaryScaling>(&["none"]);
    refuse::<fire::FireTransform>(&["logarithm", "linear"]);
    refuse::<combiner::CombinerForm>(&["log-sparse"]);
    refuse::<combiner::Summary>(&["largest"]);
    refuse::<doubly_stochastic::Operator>(&["softmax"]);
    refuse::<fastmax::Normalisation>(&["token", "none"]);
    refuse::<kernelized::Redraw>(&["pass", "never"]);
    refuse::<kernelized::SpectrumSpec>(&["gaussian", "generator"]);
    refuse::<lion::LionForm>(&["parallel", "recurrent"]);
    refuse::<sparse::SparsePattern>(&["log-sparse"]);
    refuse::<subsampled::Selection>(&["unbiased"]);
    refuse::<topological::FeatureMap>(&["relu", "square", "fourth"]);
    refuse::<topological::Metric>(&["spanning-tree", "shortest-paths"]);
    refuse::<lapidary_parts::organisation::vcc::Importance>(&["first"]);
}
