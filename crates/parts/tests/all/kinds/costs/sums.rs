//! Of mechanisms that keep sums over tokens.

use super::super::*;

/// Sums over the past of one head and sequence: no longer than a chunk.
pub(super) fn past(n: usize, features: usize, width: usize) -> usize {
    2 * n * n * (features + width) + 4 * n * features * width
}

pub(super) fn lion_formula(spec: &MultiHeadSpec, lion: &LionSpec, n: usize) -> (usize, usize) {
    let (heads, features) = (spec.heads, spec.head_width(WIDTH));
    let (values, width) = (spec.value_width(WIDTH), spec.value_width(WIDTH) + 1);
    let curves = lion.image.as_ref().map_or(1, |image| image.curves.len());
    let own = if lion.per_feature { features } else { 1 };
    let (parameters, logits) = match lion.decay {
        LionDecay::None => (0, 0),
        LionDecay::Constant => (curves * heads * own, 0),
        LionDecay::Selective => (
            curves * heads * own * (WIDTH + 1),
            curves * own * (2 * WIDTH + 2),
        ),
    };
    let each = if lion.decay == LionDecay::None { 3 } else { 5 };
    // All positions are one chunk, or every two of them.
    let chunk = match lion.form {
        LionForm::Chunked { size: 2 } => 2,
        _ => n,
    };
    let by_half = n * (chunk + 1) * (features + width) + 4 * n * features * width;
    let direction = if lion.per_feature {
        by_half
    } else {
        past(n, features, width)
    };
    let both = match lion.per_feature {
        true => 2 * direction + n * (2 * features + 4 * width),
        // A chunk meets itself once, and reads two sums.
        false => direction + 4 * n * features * width,
    };
    let sums = match (spec.causal, lion.decay, lion.form) {
        (true, _, LionForm::Recurrent) => n * past(1, features, width),
        (true, ..) => direction,
        (false, _, LionForm::Parallel) => n * n * (2 * (features + width) + 8 * curves),
        (false, LionDecay::None, _) => 4 * n * features * width,
        (false, ..) => curves * both,
    };
    let before = n * (2 * each * features + logits);
    (
        parameters,
        BATCH * heads * (before + sums + n * (values + 1)),
    )
}

pub(super) fn fastmax_formula(spec: &MultiHeadSpec, fastmax: &FastmaxSpec, n: usize) -> usize {
    let (d, width) = (spec.head_width(WIDTH), spec.value_width(WIDTH) + 1);
    let before = match fastmax.normalisation {
        Normalisation::None => n * d,
        Normalisation::Token => 12 * n * d,
        Normalisation::Max { .. } => 8 * n * d,
    };
    // Queries are multiplied by what is learned, and in degree two have a feature more.
    let before = before + usize::from(fastmax.learned) * n * d;
    let d = d + usize::from(fastmax.learned && fastmax.degree == 2);
    let monomials = 1 + d + (fastmax.degree - 1) * d * (d + 1) / 2;
    let within = if spec.causal {
        n * n * (2 * d + 4 + 2 * width)
    } else {
        0
    };
    let sums = 2 * n * monomials * (2 * width + 2) + within;
    BATCH * spec.heads * (before + sums + n * width)
}

pub(super) fn kernelized_formula(
    spec: &MultiHeadSpec,
    kernelized: &KernelizedSpec,
    n: usize,
) -> (usize, usize) {
    let (heads, d) = (spec.heads, spec.head_width(WIDTH));
    let (values, width) = (spec.value_width(WIDTH), spec.value_width(WIDTH) + 1);
    // Four features: the power of two from 4 ln 4 = 5.5 on, or one frequency for each.
    let (components, count, projection, parameters) = match &kernelized.spectrum {
        SpectrumSpec::Gaussian => (None, 8, 8 * 2 * d, 0),
        SpectrumSpec::Mixture { components } => {
            let each = components.unwrap_or(1);
            let spread = match kernelized.features {
                ReadOut::Fourier { .. } => d * d,
                ReadOut::Positive { .. } => d,
            };
            let weights = components.map_or(0, |components| heads * components);
            let parameters = heads * each * (d + spread) + weights;
            (*components, 8, each * 8 * 2 * d, parameters)
        }
        SpectrumSpec::Fastfood { learned } => {
            let diagonals = match learned {
                Learned::None => 0,
                Learned::Scaling => 1,
                Learned::All => 3,
            };
            (None, d, d * (2 * 2 + 4), diagonals * heads * d)
        }
        SpectrumSpec::Generator => {
            let layer = |input: usize, output: usize| input * output + output;
            let hidden = layer(d / 2, 2 * d) + 4 * d + layer(2 * d, 4 * d) + 8 * d;
            (None, 8, 8 * 2 * d, hidden + layer(4 * d, d))
        }
    };
    let features = match kernelized.features {
        ReadOut::Fourier { .. } => 2 * count + 1,
        ReadOut::Positive { .. } => count,
    };
    let sums = match spec.causal {
        true => past(n, features, width),
        false => 4 * n * features * width,
    };
    let averaged = if components.is_some() { 3 } else { 1 };
    let each = components.unwrap_or(1);
    let after = n * (averaged * values + 1);
    let before = 2 * n * (projection + 2 * features);
    (parameters, BATCH * heads * (before + each * (sums + after)))
}
