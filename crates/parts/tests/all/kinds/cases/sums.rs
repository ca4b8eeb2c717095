//! Sums over features.

use super::*;

/// Blocks whose attention is a sum over features.
pub(super) fn linear() -> Vec<(&'static str, BlockSpec)> {
    let multi_head = |spec| block(Wiring::PreNorm, LAYER, MixerSpec::MultiHead(spec));
    let plain = |mechanism| multi_head(through(mechanism));
    let causal = |mechanism| {
        multi_head(MultiHeadSpec {
            causal: true,
            ..through(mechanism)
        })
    };
    let fourier = ReadOut::Fourier { smoothing: 0.6 };
    let positive = |stabilise| ReadOut::Positive { stabilise };
    let mixture = |components| SpectrumSpec::Mixture { components };
    let fastfood = |learned| SpectrumSpec::Fastfood { learned };
    vec![
        (
            "lion without decay",
            plain(MechanismSpec::Lion(lion(LionDecay::None))),
        ),
        (
            "lion with a decay for each head, causal",
            causal(MechanismSpec::Lion(lion(LionDecay::Constant))),
        ),
        (
            "lion with a decay for each token",
            plain(MechanismSpec::Lion(lion(LionDecay::Selective))),
        ),
        (
            "lion with a decay for each token, step by step, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                value_width: Some(3),
                ..through(MechanismSpec::Lion(LionSpec {
                    form: LionForm::Recurrent,
                    ..lion(LionDecay::Selective)
                }))
            }),
        ),
        (
            "lion with decays of each feature, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                ..through(MechanismSpec::Lion(LionSpec {
                    per_feature: true,
                    ..lion(LionDecay::Selective)
                }))
            }),
        ),
        (
            "lion with decays of each feature, in both directions",
            plain(MechanismSpec::Lion(LionSpec {
                per_feature: true,
                form: LionForm::Chunked { size: 2 },
                ..lion(LionDecay::Constant)
            })),
        ),
        (
            "lion laid out, with a class token",
            plain(MechanismSpec::Lion(LionSpec {
                form: LionForm::Parallel,
                class_token: true,
                ..lion(LionDecay::Constant)
            })),
        ),
        (
            "lion on an image",
            plain(MechanismSpec::Lion(LionSpec {
                image: Some(LionImage {
                    columns: 3,
                    curves: vec![Curve::Rows, Curve::Columns],
                }),
                ..lion(LionDecay::Selective)
            })),
        ),
        ("fastmax, causal", causal(fastmax(2, Normalisation::Token))),
        (
            "fastmax of first degree",
            plain(fastmax(1, Normalisation::Token)),
        ),
        (
            "fastmax that learns its polynomial, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                ..through(MechanismSpec::Fastmax(FastmaxSpec {
                    learned: true,
                    ..FastmaxSpec::default()
                }))
            }),
        ),
        (
            "fastmax of first degree that learns its slope",
            plain(MechanismSpec::Fastmax(FastmaxSpec {
                degree: 1,
                learned: true,
                normalisation: Normalisation::Max { limit: 0.8 },
                ..FastmaxSpec::default()
            })),
        ),
        (
            "fastmax by the longest",
            plain(fastmax(2, Normalisation::Max { limit: 0.8 })),
        ),
        (
            "fastmax as it comes, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                ..through(fastmax(2, Normalisation::None))
            }),
        ),
        (
            "waves of a mixture, causal",
            causal(kernelized(mixture(None), fourier)),
        ),
        (
            "waves of two mixtures",
            plain(kernelized(mixture(Some(2)), fourier)),
        ),
        (
            "exponentials of two mixtures, causal",
            causal(kernelized(mixture(Some(2)), positive(false))),
        ),
        (
            "exponentials of learned fastfood, causal",
            causal(kernelized(fastfood(Learned::All), positive(false))),
        ),
        (
            "waves of scaled fastfood",
            plain(kernelized(fastfood(Learned::Scaling), fourier)),
        ),
        (
            "exponentials of a generator, causal",
            causal(kernelized(SpectrumSpec::Generator, positive(false))),
        ),
        (
            "waves of a generator",
            plain(kernelized(SpectrumSpec::Generator, fourier)),
        ),
        (
            "exponentials kept in range",
            plain(kernelized(mixture(None), positive(true))),
        ),
        (
            "exponentials of normal frequencies",
            plain(kernelized(SpectrumSpec::Gaussian, positive(false))),
        ),
    ]
}
