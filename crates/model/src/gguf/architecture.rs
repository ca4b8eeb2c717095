//! What a model is called in GGUF, and where its parameters go.

use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_parts::position::{PositionSpec, RotaryScaling, RotarySpec};

use super::format::Value;
use crate::{AbsolutePosition, Error, HeadSpec, InputSpec, Model, Result};

/// A tensor of the file and the parameters that it is made of, one after another.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) parameters: Vec<String>,
    pub(super) order: Order,
}

/// In which order the rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    AsStored,
    /// Rows that a rotary position turns together next to each other, in heads of so many.
    NeighbouringPairs {
        head: usize,
    },
}

/// A model in GGUF's words.
pub(super) struct Described {
    pub(super) name: &'static str,
    pub(super) entries: Vec<(String, Value)>,
    pub(super) tensors: Vec<Named>,
}

/// Describes a model, or says what GGUF has no words for.
pub(super) fn describe(model: &Model) -> Result<Described> {
    let spec = model.spec();
    if let Some(path) = spec.low_rank.keys().next() {
        return Err(refused(path, "factorised", "dense: multiply it out first"));
    }
    let InputSpec::Tokens(input) = &spec.input else {
        return Err(refused("the input", "patches of images", "tokens"));
    };
    let HeadSpec::LanguageModel {
        tied,
        bias: false,
        transform: None,
    } = &spec.head
    else {
        return Err(refused(
            "the head",
            "another",
            "a language model's without bias",
        ));
    };
    if input.embedding_width.is_some() || input.norm.is_some() || input.token_types > 0 {
        let found = "narrower than the model, normed, or with types";
        return Err(refused("the embedding", found, "a plain table"));
    }
    let blocks = spec.expanded_blocks();
    let parts = blocks
        .iter()
        .enumerate()
        .map(|(index, block)| plain(index, block, spec.width))
        .collect::<Result<Vec<_>>>()?;
    let family = Family::of(&parts, input.position)?;
    let epsilon = family.epsilon(spec.final_norm.as_ref(), &parts)?;
    let mut entries = Vec::new();
    let name = family.name(&parts);
    let mut put = |key: &str, value: Value| entries.push((format!("{name}.{key}"), value));
    let each = |of: fn(&Plain<'_>) -> usize| {
        Value::each(parts.iter().map(|part| of(part) as u32).collect())
    };
    put("context_length", Value::U32(input.length as u32));
    put("embedding_length", Value::U32(spec.width as u32));
    put("block_count", Value::U32(parts.len() as u32));
    put("vocab_size", Value::U32(input.vocabulary as u32));
    put("feed_forward_length", each(|part| part.hidden));
    put("attention.head_count", each(|part| part.attention.heads));
    put(
        "attention.head_count_kv",
        each(|part| part.attention.groups()),
    );
    let (mut norms, mut tensors) = (Vec::new(), Vec::new());
    match &family {
        Family::Gpt2 => put("attention.layer_norm_epsilon", Value::F32(epsilon as f32)),
        Family::Llama(rotary) => {
            let head = parts.first().map_or(0, |part| part.head) as u32;
            put(
                "attention.layer_norm_rms_epsilon",
                Value::F32(epsilon as f32),
            );
            put("rope.dimension_count", Value::U32(head));
            put("rope.freq_base", Value::F32(rotary.theta as f32));
            put("attention.key_length", Value::U32(head));
            put("attention.value_length", Value::U32(head));
            if let RotaryScaling::Linear { factor } = rotary.scaling {
                put("rope.scaling.type", Value::text("linear"));
                put("rope.scaling.factor", Value::F32(factor as f32));
            }
        }
    }
    let one = |tensors: &mut Vec<Named>, name: String, parameter: String| {
        tensors.push(Named {
            name,
            parameters: vec![parameter],
            order: Order::AsStored,
        });
    };
    one(
        &mut tensors,
        "token_embd.weight".into(),
        "embeddings.tokens.weight".into(),
    );
    let shifted = matches!(family, Family::Gpt2);
    if shifted {
        let positions = "embeddings.positions.weight".into();
        one(&mut tensors, "position_embd.weight".into(), positions);
    }
    norms.push(("output_norm".to_owned(), "final_norm".to_owned()));
    for (index, part) in parts.iter().enumerate() {
        let (file, own) = (format!("blk.{index}"), format!("blocks.{index}"));
        norms.push((format!("{file}.attn_norm"), format!("{own}.attention_norm")));
        norms.push((
            format!("{file}.ffn_norm"),
            format!("{own}.feedforward_norm"),
        ));
        part.tensors(&family, &file, &own, &mut tensors);
    }
    for (file, own) in norms {
        one(
            &mut tensors,
            format!("{file}.weight"),
            format!("{own}.weight"),
        );
        if shifted {
            one(&mut tensors, format!("{file}.bias"), format!("{own}.bias"));
        }
    }
    if !tied {
        one(
            &mut tensors,
            "output.weight".into(),
            "head.output.weight".into(),
        );
    }
    Ok(Described {
        name,
        entries,
        tensors,
    })
}

/// What of a block differs from block to block.
struct Plain<'a> {
    attention: &'a MultiHeadSpec,
    feedforward: &'a FeedforwardSpec,
    norm: NormSpec,
    hidden: usize,
    /// Features of a head.
    head: usize,
}

/// A block that is attention and then a feed-forward part, each after a norm.
fn plain<'a>(index: usize, block: &'a BlockSpec, width: usize) -> Result<Plain<'a>> {
    let name = |part: &str| format!("{part} of block {index}");
    let ordinary = block.wiring == Wiring::PreNorm
        && block.cross_attention.is_none()
        && !block.shared
        && !block.shortcuts
        && block.layer_scale.is_none();
    if !ordinary {
        let found = "other than norm, part, sum; or shared, scaled, or with shortcuts";
        return Err(refused(&name("the wiring"), found, "pre-norm"));
    }
    let MixerSpec::MultiHead(attention) = &block.attention else {
        let found = block.attention.kind();
        return Err(refused(&name("the mixer"), found, "multi-head attention"));
    };
    let head = attention.head_width(width);
    let standard = attention
        .scale
        .is_none_or(|scale| (scale - 1.0 / (head as f64).sqrt()).abs() < 1e-12);
    if let Some(peculiarity) = attention.peculiarity() {
        return Err(refused(&name("attention"), peculiarity, "softmax"));
    }
    if !attention.causal
        || attention.window.is_some()
        || attention.query_key_norm.is_some()
        || attention.value_width.is_some_and(|value| value != head)
        || !standard
    {
        let found = "with a window, a norm of queries, another scale, or values of another width";
        return Err(refused(&name("attention"), found, "plain causal attention"));
    }
    let Some(feedforward) = &block.feedforward else {
        return Err(refused(&name("the feed-forward part"), "absent", "there"));
    };
    Ok(Plain {
        attention,
        feedforward,
        norm: block.norm,
        hidden: feedforward.hidden(),
        head,
    })
}

/// What was found in a block, and what was expected.
type Unlike = (&'static str, &'static str);

enum Family {
    Llama(RotarySpec),
    Gpt2,
}

impl Family {
    fn of(parts: &[Plain<'_>], position: AbsolutePosition) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(refused("the model", "without blocks", "one with blocks"));
        };
        let family = match (&first.attention.position, first.feedforward, position) {
            (PositionSpec::Rotary(rotary), FeedforwardSpec::Gated(_), AbsolutePosition::None) => {
                Self::Llama(rotary.clone())
            }
            (
                PositionSpec::None,
                FeedforwardSpec::Dense(_),
                AbsolutePosition::Learned {
                    offset: 0,
                    skip_padding: false,
                },
            ) => Self::Gpt2,
            _ => {
                let found = "of another family";
                let expected = "like Llama (rotary positions, gated feed-forward parts) or GPT-2 \
                                (a table of positions, dense ones)";
                return Err(refused("the model", found, expected));
            }
        };
        for (index, part) in parts.iter().enumerate() {
            family
                .check(part, first.head)
                .map_err(|(found, expected)| refused(&format!("block {index}"), found, expected))?;
        }
        Ok(family)
    }

    fn check(&self, part: &Plain<'_>, head: usize) -> std::result::Result<(), Unlike> {
        if part.head != head {
            return Err((
                "with heads of another width",
                "with heads as wide as the first's",
            ));
        }
        let attention = part.attention;
        match (self, part.feedforward) {
            (Self::Llama(rotary), FeedforwardSpec::Gated(gated)) => {
                let PositionSpec::Rotary(own) = &attention.position else {
                    return Err(("without rotary positions", "like the first"));
                };
                let known = matches!(
                    rotary.scaling,
                    RotaryScaling::None | RotaryScaling::Linear { .. }
                );
                if own != rotary || rotary.width.is_some() || rotary.kept.is_some() || !known {
                    return Err((
                        "with partial, pruned, rescaled or differing rotary positions",
                        "with whole ones, scaled linearly at most",
                    ));
                }
                let biased = attention.bias || attention.output_bias == Some(true) || gated.bias;
                match gated.activation == ActivationSpec::Silu && !biased {
                    true => Ok(()),
                    false => Err(("with biases or another activation than SiLU", "as in Llama")),
                }
            }
            (Self::Gpt2, FeedforwardSpec::Dense(dense)) => {
                let biased = attention.bias && attention.output_bias != Some(false) && dense.bias;
                match dense.activation == ActivationSpec::GeluTanh
                    && biased
                    && attention.groups() == attention.heads
                {
                    true => Ok(()),
                    false => Err((
                        "without biases, or another activation than GELU by tanh",
                        "as in GPT-2",
                    )),
                }
            }
            _ => Err(("with another feed-forward part", "like the first")),
        }
    }

    /// The epsilon that all norms share.
    fn epsilon(&self, last: Option<&NormSpec>, parts: &[Plain<'_>]) -> Result<f64> {
        let epsilon = match (self, last) {
            (Self::Llama(_), Some(NormSpec::Rms { epsilon }))
            | (Self::Gpt2, Some(NormSpec::Layer { epsilon })) => *epsilon,
            _ => {
                let expected = "root-mean-square norms, or layer norms beside a table of positions";
                return Err(refused("the final norm", "another or absent", expected));
            }
        };
        match parts.iter().all(|part| Some(&part.norm) == last) {
            true => Ok(epsilon),
            false => Err(refused(
                "a norm",
                "unlike the final one",
                "the same everywhere",
            )),
        }
    }

    /// Blocks that differ have an architecture of their own.
    fn name(&self, parts: &[Plain<'_>]) -> &'static str {
        let shape = |part: &Plain<'_>| (part.attention.heads, part.attention.groups(), part.hidden);
        let differ = parts.windows(2).any(|pair| match pair {
            [one, other] => shape(one) != shape(other),
            _ => false,
        });
        match (self, differ) {
            (Self::Gpt2, _) => "gpt2",
            (Self::Llama(_), true) => "deci",
            (Self::Llama(_), false) => "llama",
        }
    }
}

impl Plain<'_> {
    /// The matrices of a block, with their biases where the family has them.
    fn tensors(&self, family: &Family, file: &str, own: &str, into: &mut Vec<Named>) {
        let mut add = |name: &str, paths: &[&str], order: Order, bias: bool| {
            let kinds: &[&str] = if bias {
                &["weight", "bias"]
            } else {
                &["weight"]
            };
            for kind in kinds {
                into.push(Named {
                    name: format!("{file}.{name}.{kind}"),
                    parameters: paths
                        .iter()
                        .map(|path| format!("{own}.{path}.{kind}"))
                        .collect(),
                    order,
                });
            }
        };
        let stored = Order::AsStored;
        match family {
            Family::Gpt2 => {
                let all = ["attention.query", "attention.key", "attention.value"];
                add("attn_qkv", &all, stored, true);
                add("attn_output", &["attention.output"], stored, true);
                add("ffn_up", &["feedforward.up"], stored, true);
                add("ffn_down", &["feedforward.down"], stored, true);
            }
            Family::Llama(rotary) => {
                let turned = match rotary.interleaved {
                    true => stored,
                    false => Order::NeighbouringPairs { head: self.head },
                };
                add("attn_q", &["attention.query"], turned, false);
                add("attn_k", &["attention.key"], turned, false);
                add("attn_v", &["attention.value"], stored, false);
                add("attn_output", &["attention.output"], stored, false);
                add("ffn_gate", &["feedforward.gate"], stored, false);
                add("ffn_up", &["feedforward.up"], stored, false);
                add("ffn_down", &["feedforward.down"], stored, false);
            }
        }
    }
}

fn refused(what: &str, found: &str, expected: &str) -> Error {
    let what = format!("{what}, which GGUF has to have words for,");
    lapidary_parts::Error::spec(what, found, expected).into()
}
