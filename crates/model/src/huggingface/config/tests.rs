//! Configs of the fixtures, transformers' own defaults, and what is refused.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::Checkpoint;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn parse(value: Value) -> Result<Config, ConfigError> {
    Config::parse(
        Path::new("config.json"),
        &value.to_string(),
        &Limits::default(),
    )
}

fn error(value: Value) -> String {
    parse(value).unwrap_err().to_string()
}

#[test]
fn every_fixture_parses_and_sizes_its_checkpoint() {
    for entry in fs::read_dir(fixtures().join("families")).unwrap() {
        let directory = entry.unwrap().path();
        if !directory.is_dir() {
            continue;
        }
        let config = Config::read(&directory, &Limits::default()).unwrap();
        assert_eq!(config.architectures.len(), 1);
        assert!(config.dtype.is_some(), "{directory:?}");
        let checkpoint = Checkpoint::open(&directory, &Limits::default()).unwrap();
        let stored: usize = checkpoint
            .names()
            .map(|name| checkpoint.info(name).unwrap().elements())
            .sum();
        let computed = config.family.matrix_parameters();
        // What is stored beyond matrices: biases, norms, heads, buffers, tied copies.
        assert!(
            computed <= stored as u128,
            "{directory:?}: {computed} > {stored}"
        );
        assert!(
            computed * 10 >= stored as u128 * 6,
            "{directory:?}: {computed} of {stored}"
        );
    }
}

#[test]
fn defaults_are_those_of_transformers() {
    let golden = fs::read_to_string(fixtures().join("text/config_defaults.json")).unwrap();
    let golden: Map<String, Value> = serde_json::from_str(&golden).unwrap();
    for model_type in MODEL_TYPES {
        let said = parse(golden[model_type].clone()).unwrap();
        let silent = parse(json!({"model_type": model_type})).unwrap();
        assert_eq!(silent.family, said.family, "{model_type}");
        assert_eq!(silent.labels, said.labels, "{model_type}");
    }
}

/// As written by transformers 5, and by earlier ones, which is no JSON.
#[test]
fn infinity_is_read_in_both_spellings() {
    for limit in [r#"{"__float__": "Infinity"}"#, "Infinity"] {
        let text = format!(r#"{{"model_type": "mamba2", "time_step_limit": [0.25, {limit}]}}"#);
        let config = Config::parse(Path::new("config.json"), &text, &Limits::default()).unwrap();
        let Family::Mamba2(mamba) = &config.family else {
            panic!("{config:?}");
        };
        assert_eq!(mamba.time_step_limit, [0.25, f64::INFINITY]);
        // What is written back is JSON, and says the same.
        let again = Config::parse(
            Path::new("config.json"),
            &config.to_json(),
            &Limits::default(),
        );
        assert_eq!(again.unwrap().family, config.family);
    }
}

#[test]
fn rope_is_read_in_all_spellings() {
    let rope = |fields: Value| {
        let mut config = json!({"model_type": "llama"});
        config
            .as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        match parse(config).unwrap().family {
            Family::Llama(llama) => llama.rope,
            other => panic!("{other:?}"),
        }
    };
    let linear = RopeConfig {
        theta: 500.0,
        scaling: RopeScaling::Linear { factor: 2.0 },
    };
    assert_eq!(
        rope(json!({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}})),
        linear
    );
    assert_eq!(
        rope(json!({"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2}})),
        linear
    );
    assert_eq!(
        rope(json!({"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2}})),
        linear
    );
    assert_eq!(
        rope(json!({"rope_scaling": null, "rope_theta": 500.0})).scaling,
        RopeScaling::None
    );
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    assert_eq!(
        rope(json!({"rope_scaling": llama3})).scaling,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 2048,
        }
    );
}

#[test]
fn windows_are_those_of_each_look_alike() {
    let windows = |fields: Value| match parse(fields).unwrap().family {
        Family::Llama(llama) => llama.windows,
        other => panic!("{other:?}"),
    };
    let base = json!({"model_type": "qwen2", "num_hidden_layers": 3, "max_window_layers": 2, "sliding_window": 7});
    assert_eq!(windows(base.clone()), [None; 3]);
    let mut sliding = base;
    sliding["use_sliding_window"] = json!(true);
    assert_eq!(windows(sliding.clone()), [None, None, Some(7)]);
    sliding["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention"]);
    assert_eq!(windows(sliding), [Some(7), None, None]);
    assert_eq!(
        windows(json!({"model_type": "mistral", "num_hidden_layers": 2})),
        [Some(4096); 2]
    );
}

#[test]
fn what_is_wrong_is_named_with_what_would_be_right() {
    let cases = [
        (
            json!({}),
            "model_type is missing, but must be one of albert, bert, clip, deit",
        ),
        (
            json!({"model_type": "bart"}),
            "model_type is bart, but must be one of albert, bert, clip, deit",
        ),
        (
            json!({"model_type": "gpt2", "n_embd": 1_000_000_000_000u64}),
            "n_embd is 1000000000000, but must be between 1 and 1048576",
        ),
        (
            json!({"model_type": "gpt2", "n_embd": 0}),
            "n_embd is 0, but must be between 1 and",
        ),
        (
            json!({"model_type": "gpt2", "n_layer": -2}),
            "n_layer is -2, but must be a whole number that is not negative",
        ),
        (
            json!({"model_type": "gpt2", "n_layer": "two"}),
            "n_layer is \"two\", but must be a whole number that is not negative",
        ),
        (
            json!({"model_type": "bert", "num_attention_heads": 5}),
            "num_attention_heads is 5, but must be a divisor of hidden_size, 768",
        ),
        (
            json!({"model_type": "llama", "num_key_value_heads": 3}),
            "num_key_value_heads is 3, but must be a divisor of num_attention_heads, 32",
        ),
        (
            json!({"model_type": "llama", "num_key_value_heads": 0}),
            "num_key_value_heads is 0",
        ),
        (
            json!({"model_type": "llama", "head_dim": 7}),
            "head_dim is 7, but must be an even number",
        ),
        (
            json!({"model_type": "llama", "rope_scaling": {"type": "yarn"}}),
            "rope_scaling.rope_type is yarn, but must be one of default, linear, llama3",
        ),
        (
            json!({"model_type": "llama", "rope_scaling": {"type": "linear"}}),
            "rope_scaling.factor is missing, but must be a positive number",
        ),
        (
            json!({"model_type": "mixtral", "num_experts_per_tok": 9}),
            "num_experts_per_tok is 9, but must be between 1 and 8",
        ),
        (
            json!({"model_type": "bert", "hidden_act": "mish"}),
            "hidden_act is \"mish\", but must be one of gelu",
        ),
        (
            json!({"model_type": "clip", "text_config": {"num_attention_heads": 7}}),
            "text_config.num_attention_heads is 7, but must be a divisor of text_config.hidden_size, 512",
        ),
        (
            json!({"model_type": "clip", "vision_config": []}),
            "vision_config is [], but must be a map",
        ),
        (
            json!({"model_type": "vit", "patch_size": 300}),
            "patch_size is 300, but must be between 1 and 224",
        ),
        (
            json!({"model_type": "vit", "image_size": "big"}),
            "image_size is \"big\", but must be a size",
        ),
        (
            json!({"model_type": "mamba", "expand": 1e300}),
            "expand times hidden_size is",
        ),
        (
            json!({"model_type": "mamba", "time_step_rank": "some"}),
            "must be a whole number or \"auto\"",
        ),
        (
            json!({"model_type": "mamba2", "num_heads": 7}),
            "num_heads times head_dim is 448, but must be expand times hidden_size, 8192",
        ),
        (
            json!({"model_type": "mamba2", "n_groups": 3}),
            "n_groups is 3, but must be a divisor of num_heads, 128",
        ),
        (
            json!({"model_type": "mamba2", "time_step_limit": [0.5, 0.1]}),
            "time_step_limit is [0.5, 0.1], but must be two numbers of at least 0",
        ),
        (
            json!({"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "much"}]}),
            "time_step_limit",
        ),
        (
            json!({"model_type": "bert", "layer_norm_eps": -1.0}),
            "layer_norm_eps is -1, but must be between 0 and 1",
        ),
        (
            json!({"model_type": "bert", "dtype": "int8"}),
            "dtype is int8, but must be one of float64",
        ),
        (
            json!({"model_type": "llama", "hidden_size": 1 << 20, "num_hidden_layers": 4096}),
            "asks for about",
        ),
        (
            json!({"model_type": "roberta", "max_position_embeddings": 2}),
            "more than pad_token_id + 1",
        ),
    ];
    for (config, expected) in cases {
        let message = error(config);
        assert!(
            message.contains(expected),
            "{message}\ndoes not say\n{expected}"
        );
        assert!(!message.contains('\n'), "{message}");
    }
    let message = Config::parse(Path::new("c.json"), "[1]", &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("c.json is not a JSON object: "),
        "{message}"
    );
    let deep = "[".repeat(100_000);
    assert!(Config::parse(Path::new("c.json"), &deep, &Limits::default()).is_err());
}

#[test]
fn fields_are_kept_and_written_back() {
    let config =
        parse(json!({"model_type": "opt", "hidden_size": 96, "custom": {"kept": [1]}})).unwrap();
    let again = Config::parse(Path::new("again"), &config.to_json(), &Limits::default()).unwrap();
    assert_eq!(config, again);
    assert_eq!(again.fields()["custom"]["kept"][0], 1);
    assert_eq!(again.model_type(), "opt");
    let Family::Opt(opt) = again.family else {
        panic!("not OPT")
    };
    assert_eq!(
        opt.word_embed_proj_dim, 96,
        "follows the width when it isn't given"
    );
}

#[test]
fn labels_come_by_name_or_number() {
    let named = json!({"model_type": "bert", "id2label": {"1": "yes", "0": "no"}});
    assert_eq!(parse(named).unwrap().labels, ["no", "yes"]);
    let counted = json!({"model_type": "bert", "num_labels": 3});
    assert_eq!(
        parse(counted).unwrap().labels,
        ["LABEL_0", "LABEL_1", "LABEL_2"]
    );
    assert!(
        error(json!({"model_type": "bert", "num_labels": 1u64 << 40})).contains("num_labels is")
    );
}

/// A JSON value of any kind, small.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0usize..20).prop_map(Value::from),
        "[a-z_0-9]{0,10}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_text_never_panics(text in ".{0,200}") {
        let _ = Config::parse(Path::new("x"), &text, &Limits::default());
    }

    /// Any value in any of the fields that transformers writes.
    #[test]
    fn any_field_value_never_panics(
        family in 0..MODEL_TYPES.len(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
    ) {
        let golden = fs::read_to_string(fixtures().join("text/config_defaults.json")).unwrap();
        let golden: Value = serde_json::from_str(&golden).unwrap();
        let mut fields = golden[MODEL_TYPES[family]].as_object().unwrap().clone();
        let names: Vec<String> = fields.keys().filter(|name| *name != "model_type").cloned().collect();
        for (index, value) in changes {
            fields.insert(names[index.index(names.len())].clone(), value);
        }
        let _ = Config::from_fields(Path::new("x"), fields, &Limits::default());
    }
}
