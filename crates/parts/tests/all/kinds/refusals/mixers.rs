//! Mixers other than heads: recurrent ones, and wavelets around another.

use super::*;

#[test]
fn impossible_mamba_is_refused() {
    let with_mamba = |mamba: MambaSpec| block(Wiring::PreNorm, LAYER, MixerSpec::Mamba(mamba));
    assert_refused([
        (
            with_mamba(MambaSpec {
                inner: Some(0),
                ..MambaSpec::default()
            }),
            "b.attention.inner is 0, but must be between 1 and 1048576",
        ),
        (
            with_mamba(MambaSpec {
                state: 0,
                ..MambaSpec::default()
            }),
            "b.attention.state is 0, but must be between 1 and 4096",
        ),
        (
            with_mamba(MambaSpec {
                taps: 0,
                ..MambaSpec::default()
            }),
            "b.attention.taps is 0, but must be between 1 and 1024",
        ),
        (
            with_mamba(MambaSpec {
                step_rank: Some(17),
                ..MambaSpec::default()
            }),
            "b.attention.step_rank is 17, but must be between 1 and 16",
        ),
    ]);
}

#[test]
fn impossible_mamba_of_heads_is_refused() {
    let with_mamba2 = |mamba: Mamba2Spec| block(Wiring::PreNorm, LAYER, MixerSpec::Mamba2(mamba));
    assert_refused([
        (
            with_mamba2(Mamba2Spec::default()),
            "b.attention.head_width is 64, but must be a divisor of the inner channels, 16",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 0,
                ..Mamba2Spec::default()
            }),
            "b.attention.head_width is 0, but must be a divisor of the inner channels, 16",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                groups: 3,
                ..Mamba2Spec::default()
            }),
            "b.attention.groups is 3, but must be a divisor of the heads, 4",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                state: 0,
                ..Mamba2Spec::default()
            }),
            "b.attention.state is 0, but must be between 1 and 4096",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                chunk: 0,
                ..Mamba2Spec::default()
            }),
            "b.attention.chunk is 0, but must be between 1 and 65536",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                norm: LAYER,
                ..Mamba2Spec::default()
            }),
            "b.attention.norm.kind is \"layer\", but must be rms or none",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                smallest_step: Some(0.2),
                largest_step: Some(0.1),
                ..Mamba2Spec::default()
            }),
            "b.attention.smallest_step is 0.2, but must be at most the largest, 0.1",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                largest_step: Some(f64::INFINITY),
                ..Mamba2Spec::default()
            }),
            "b.attention.largest_step is inf, but must be a number of at least 0",
        ),
    ]);
}

#[test]
fn impossible_wavelets_are_refused() {
    assert_refused([
        (
            block(
                Wiring::PreNorm,
                LAYER,
                MixerSpec::Wavelet(WaveletSpec::new(MixerSpec::MultiHead(MultiHeadSpec {
                    causal: true,
                    ..MultiHeadSpec::new(2)
                }))),
            ),
            "b.attention.inner.causal is true, but must be false: every coefficient is made of later \
             tokens too",
        ),
        (
            block(
                Wiring::PreNorm,
                LAYER,
                MixerSpec::Wavelet(WaveletSpec {
                    taps: 5,
                    ..WaveletSpec::new(MixerSpec::MultiHead(MultiHeadSpec::new(2)))
                }),
            ),
            "b.attention.taps is 5, but must be an even number of taps, or an adaptive lifting",
        ),
    ]);
}
