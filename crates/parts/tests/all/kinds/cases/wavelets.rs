//! Attention in bands of wavelets.

use super::*;

/// Attention in the space of coefficients.
pub(super) fn wavelets() -> Vec<(&'static str, BlockSpec)> {
    let inner = || MixerSpec::MultiHead(MultiHeadSpec::new(2));
    let wavelet = |family, levels, taps| {
        block(
            Wiring::PreNorm,
            LAYER,
            MixerSpec::Wavelet(WaveletSpec {
                family,
                levels,
                taps,
                ..WaveletSpec::new(inner())
            }),
        )
    };
    vec![
        ("wavelets, fixed", wavelet(Family::Fixed, 1, 4)),
        ("wavelets, adaptive", wavelet(Family::Adaptive, 2, 4)),
        ("wavelets, by angles", wavelet(Family::Orthogonal, 1, 8)),
        ("wavelets, lifted", wavelet(Family::Lifting, 2, 8)),
        (
            "wavelets, lifted by filters",
            wavelet(Family::AdaptiveLifting, 1, 3),
        ),
        ("waves", wavelet(Family::Fourier, 1, 8)),
    ]
}
