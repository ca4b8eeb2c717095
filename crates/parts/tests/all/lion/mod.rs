//! LION against its definition.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod by_feature;
mod by_head;

use crate::common::{Map, build, draw, random};
use lapidary_kernels::Tensor;
use lapidary_parts::Context;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::lion::LionSpec;
use lapidary_parts::attention::mechanism::{Describe, Heads, Mechanism, MechanismPass};
use lapidary_signal::{Mixing, Trace};

const HEADS: usize = 2;
const FEATURES: usize = 4;
const WIDTH: usize = 8;

fn heads(causal: bool) -> Heads {
    Heads {
        width: WIDTH,
        heads: HEADS,
        head_width: FEATURES,
        value_width: FEATURES,
        causal,
        scale: 0.5,
        sharing: QueryKeySharing::None,
    }
}

/// Queries, keys, values and the tokens that they come from.
#[derive(Clone)]
struct Given {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
}

impl Given {
    fn new(batch: usize, length: usize) -> Self {
        Self {
            q: random(&[batch, HEADS, length, FEATURES], 1),
            k: random(&[batch, HEADS, length, FEATURES], 2),
            v: random(&[batch, HEADS, length, 3], 3),
            tokens: random(&[batch, length, WIDTH], 4),
        }
    }

    fn each(&self, change: impl Fn(&Tensor, usize) -> Tensor) -> Self {
        Self {
            q: change(&self.q, 2),
            k: change(&self.k, 2),
            v: change(&self.v, 2),
            tokens: change(&self.tokens, 1),
        }
    }
}

fn parameters(spec: &LionSpec) -> Map {
    draw(7, |p| spec.build(&heads(false), p).map(|_| ()))
}

fn module(spec: &LionSpec, causal: bool, map: &Map) -> Box<dyn Mechanism> {
    spec.validate(&heads(causal), "lion").unwrap();
    build(map, |p| spec.build(&heads(causal), p)).unwrap()
}

fn with<R>(
    given: &Given,
    keep: Option<&Tensor>,
    use_it: impl FnOnce(&MechanismPass<'_>) -> R,
) -> R {
    let trace = Trace::new();
    let context = Context::new(&trace);
    use_it(&MechanismPass {
        path: "lion",
        tokens: &given.tokens,
        keep,
        offset: 0,
        context: &context,
    })
}

fn mixing(spec: &LionSpec, causal: bool, map: &Map, given: &Given) -> Box<dyn Mixing> {
    let module = module(spec, causal, map);
    with(given, None, |pass| module.mixing(&given.q, &given.k, pass)).unwrap()
}

fn run(spec: &LionSpec, causal: bool, map: &Map, given: &Given) -> Tensor {
    mixing(spec, causal, map, given).mix(&given.v).unwrap()
}
