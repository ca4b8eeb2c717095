//! The residual stream in other bases, and made narrower.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bases;
mod families;
mod methods;
mod transport;

use crate::common::{DECODER, GATED, altered};
use lapidary_compress::CalibrationData;
use lapidary_compress::slicing::{Directions, slice};
use lapidary_kernels::Tensor;
use lapidary_model::Model;

/// As GPT-NeoX: attention and feed-forward part side by side, two layer norms.
const PARALLEL: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
wiring = "parallel"
attention = { kind = "multi-head", heads = 4, causal = true, position = { kind = "rotary" } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
tied = false
"#;

/// Experts behind RMS norms.
const MIXTURE: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, causal = true, bias = false, position = { kind = "rotary" } }
feedforward = { kind = "mixture", hidden = 10, experts = 3, active = 2 }
[head]
kind = "language-model"
"#;

/// As Mamba, whose only part is a recurrence.
const RECURRENT: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "mamba" }
[head]
kind = "language-model"
"#;

/// As the narrow OPT, whose table has another width than the stream.
const PROJECTED: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
embedding_width = 6
position = { kind = "learned", offset = 2, skip_padding = true }
[[blocks]]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 24, activation = "relu" }
[head]
kind = "language-model"
"#;

/// Layer norms with shifts before layers without biases, and a pooled head.
const POOLED: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
token_types = 2
[[blocks]]
attention = { kind = "multi-head", heads = 4, bias = false }
feedforward = { kind = "gated", hidden = 10 }
[[blocks]]
attention = { kind = "multi-head", heads = 2, head_width = 6, output_bias = false }
feedforward = { kind = "dense", hidden = 12, bias = false }
[head]
kind = "pooled"
pool = "mean"
labels = 3
bias = false
"#;

/// Positions that both blocks have from one network, which stands beside them.
const SHARED_POSITIONS: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, causal = true, position = { kind = "fire", shared = true } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
"#;

const ALL: [(&str, &str); 8] = [
    ("decoder", DECODER),
    ("gated", GATED),
    ("parallel", PARALLEL),
    ("mixture", MIXTURE),
    ("recurrent", RECURRENT),
    ("projected", PROJECTED),
    ("pooled", POOLED),
    ("shared positions", SHARED_POSITIONS),
];

fn cut(model: &Model, data: &CalibrationData, width: usize, by: &dyn Directions) -> Model {
    slice(model, data, width, false, by, 8).unwrap().model
}

/// The same model, with everything that writes the stream passed through `map` `[16, 16]`.
fn confined(model: &Model, map: &Tensor) -> Model {
    let mut confined = Model::new(model.spec().clone(), &mut model.parameters().clone()).unwrap();
    let names: Vec<String> = model.parameters().keys().cloned().collect();
    for name in names {
        let table = name.starts_with("embeddings.") && !name.starts_with("embeddings.projection");
        let writer = [".output.", ".down.", "embeddings.projection."];
        if table {
            if model.parameters()[&name].dims()[1] == 16 {
                confined = altered(&confined, &name, |w| w.matmul(map).unwrap());
            }
        } else if writer.iter().any(|part| name.contains(part)) && !name.starts_with("head.") {
            confined = altered(&confined, &name, |w| match w.rank() {
                2 => map.t().unwrap().contiguous().unwrap().matmul(w).unwrap(),
                _ => {
                    let row = w.unsqueeze(0).unwrap().matmul(map).unwrap();
                    row.squeeze(0).unwrap()
                }
            });
        }
    }
    confined
}
