//! Full LRP: the deep Taylor rules of Chefer et al. (arXiv 2012.09838) down to the embeddings, or
//! to the pixels of an image. The outputs start with 1, and the rules keep it but for quotients
//! whose denominator vanishes.

use super::gradient::{Forward, token_sums};
use crate::error::engine;
use crate::explainer::Explainer;
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::{
    D, DType, Tensor, Var, backward, balanced_sum, linear, stabilised_reciprocal,
};
use lapidary_model::{InputSpec, PatchInput};
use lapidary_signal::Trace;
use lapidary_signal::relevance::RelevanceRules;

/// Full LRP in the list of explainers.
pub(crate) const FULL_LRP: Explainer = Explainer {
    name: "full-lrp",
    summary: "Relevance by positive parts, down to the embeddings",
    source: "Montavon et al. 2017, arXiv 1512.02479",
    unit: Unit::Token,
    explain: |question, targets, _| explain(question, targets),
};

/// Scores of the input's tokens: relevance of their embeddings, which starts with 1.
///
/// # Errors
/// When the model fails.
pub fn full_lrp(question: &Question<'_>, target: Target) -> Result<Explanation> {
    FULL_LRP.explain(question, target, &Options::default())
}

fn explain(question: &Question<'_>, targets: &[Target]) -> Result<Vec<Explanation>> {
    let forward = Forward::with_leaks(question, RelevanceRules::deep_taylor())?;
    let explain = |target: &Target| {
        let pulled = forward.relevance(*target)?;
        // What the outputs start with is what is shared.
        let seed = pulled.leaks.first().map_or(1.0, |leak| leak.arrived);
        let left_out = vec![
            "the size of the score: relevance starts with 1".to_owned(),
            "every bias".to_owned(),
        ];
        let scores = token_sums(&pulled.of_leaf)?;
        let explanation = Explanation::new(FULL_LRP.name, Unit::Token, scores, seed, left_out);
        Ok(explanation.with_leaks(pulled.leaks))
    };
    targets.iter().map(explain).collect()
}

/// Relevance of each pixel of the first image, summed over channels, row by row:
/// `height · width` numbers.
///
/// Positions take their share of the embeddings' sum, and the patch projection follows the z-box
/// rule between the least and the largest value of the image:
/// `z = x W − l W⁺ − h W⁻`, each pixel's part of it times `R / z`.
///
/// # Errors
/// When the model reads no patches, or through norms around their map, or fails.
pub fn full_lrp_pixels(question: &Question<'_>, target: Target) -> Result<Vec<f64>> {
    let InputSpec::Patches(spec) = &question.model.spec().input else {
        return Err(Error::invalid("input of the model", "tokens", "patches"));
    };
    if spec.around.is_some() {
        let expected = "absent: the rule of pixels is that of one linear map";
        return Err(Error::invalid("input.around", "given", expected));
    }
    let trace = Trace::new().capture("embeddings.pixels")?;
    let rules = RelevanceRules::deep_taylor();
    let forward = Forward::through(question, rules, None, trace)?;
    let of_tokens = forward.relevance(target)?.of_leaf;
    let first = |t: &Tensor| engine(t.narrow(0, 0, 1));
    // [1, patches, channels · patch · patch]
    let pixels = first(forward.trace.signal("embeddings.pixels")?.value())?;
    let parameter = |name: &str| {
        let found = question.model.parameters().get(name);
        found.ok_or_else(|| Error::invalid(format!("parameter {name}"), "absent", "there"))
    };
    let weight = dense_weight(question, "embeddings.patches")?;
    let bias = question.model.parameters().get("embeddings.patches.bias");
    let count = spec.patches();
    let positions = parameter("embeddings.positions.weight")?;
    let positions = engine(positions.narrow(0, spec.class_tokens, count))?;
    let embedded = linear(&pixels, &weight, bias)?;
    let positions = engine(engine(positions.unsqueeze(0))?.contiguous())?;
    let arrived = engine(first(&of_tokens)?.narrow(1, spec.class_tokens, count))?;
    let of_patches = share_of_first(&embedded, &positions, &arrived, rules.epsilon)?;
    let of_pixels = z_box(&pixels, &weight, &of_patches, rules.epsilon)?;
    in_rows(&of_pixels, spec)
}

/// The matrix of a layer, its factors multiplied out.
fn dense_weight(question: &Question<'_>, path: &str) -> Result<Tensor> {
    let find = |name: &str| question.model.parameters().get(&format!("{path}.{name}"));
    match (find("weight"), find("up"), find("down")) {
        (Some(weight), ..) => Ok(weight.detach()),
        (None, Some(up), Some(down)) => engine(up.detach().matmul(&down.detach())),
        _ => Err(Error::invalid(
            format!("weight of {path}"),
            "absent",
            "there",
        )),
    }
}

/// The part of `arrived` that a balanced sum of `a` and `b` gives to `a`.
fn share_of_first(a: &Tensor, b: &Tensor, arrived: &Tensor, epsilon: f64) -> Result<Tensor> {
    let a = engine(Var::from_tensor(&a.detach()))?;
    let sum = balanced_sum(a.as_tensor(), &b.detach(), epsilon)?;
    let gradients = engine(backward(&engine(
        engine(sum * arrived.detach())?.sum_all(),
    )?))?;
    let share = gradients.get(a.as_tensor()).cloned();
    share.ok_or_else(|| Error::invalid("relevance of the patches", "absent", "there"))
}

/// `x ⊙ Wᵀ S − l ⊙ W⁺ᵀ S − h ⊙ W⁻ᵀ S` with `S = R / (x W − l W⁺ − h W⁻)` and `l`, `h` the least
/// and largest of `x`.
fn z_box(x: &Tensor, weight: &Tensor, relevance: &Tensor, epsilon: f64) -> Result<Tensor> {
    let above = engine(weight.relu())?;
    let below = engine(weight - &above)?;
    let every = |number: Tensor| engine(number.broadcast_as(x.shape()));
    let flat = engine(x.flatten_all())?;
    let low = engine(every(engine(flat.min(0))?)?.contiguous())?;
    let high = engine(every(engine(flat.max(0))?)?.contiguous())?;
    let parts = [(x, weight), (&low, &above), (&high, &below)];
    let [z, from_low, from_high] = parts.map(|(x, weight)| linear(x, weight, None));
    let z = engine(engine(z? - from_low?)? - from_high?)?;
    let quotient = engine(relevance * stabilised_reciprocal(&z, epsilon, 0.0)?)?;
    let [own, of_low, of_high] = parts.map(|(x, weight)| {
        let back = linear(&quotient, &engine(engine(weight.t())?.contiguous())?, None)?;
        engine(x * back)
    });
    engine(engine(own? - of_low?)? - of_high?)
}

/// `[1, patches, channels · patch · patch]` summed over channels and laid out as the image.
fn in_rows(pixels: &Tensor, spec: &PatchInput) -> Result<Vec<f64>> {
    let [height, width] = spec.image;
    let patch = spec.patch;
    let shape = (spec.patches(), spec.channels, patch * patch);
    let summed = engine(engine(pixels.reshape(shape))?.sum(D::Minus2))?;
    let summed = engine(engine(summed.to_dtype(DType::F64))?.to_vec2::<f64>())?;
    let columns = width / patch;
    let mut image = vec![0.0; height * width];
    for (index, patch_values) in summed.iter().enumerate() {
        let (top, left) = (index / columns * patch, index % columns * patch);
        for (offset, value) in patch_values.iter().enumerate() {
            let at = (top + offset / patch) * width + left + offset % patch;
            if let Some(pixel) = image.get_mut(at) {
                *pixel = *value;
            }
        }
    }
    Ok(image)
}
