//! The elementwise nonlinearities, as one vocabulary.

/// An elementwise nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x`.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `x Φ(x)` with the exact normal distribution function (Hendrycks & Gimpel, arXiv 1606.08415).
    Gelu,
    /// The tanh form of GELU, `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x σ(1.702 x)`, the GELU of CLIP.
    QuickGelu,
    /// `x σ(x)`, also called swish.
    Silu,
    /// Hyperbolic tangent.
    Tanh,
    /// `σ(x) = 1 / (1 + e^{-x})`.
    Sigmoid,
    /// `e^x`.
    Exp,
    /// `ln(1 + e^x)`.
    Softplus,
}

impl Activation {
    /// Every activation, for tests and listings.
    pub const ALL: [Self; 10] = [
        Self::Identity,
        Self::Relu,
        Self::Gelu,
        Self::GeluTanh,
        Self::QuickGelu,
        Self::Silu,
        Self::Tanh,
        Self::Sigmoid,
        Self::Exp,
        Self::Softplus,
    ];

    /// Whether `f(0) = 0`, so that `f(x) / x` is bounded near zero and the zero-origin secant
    /// `f(x) = (f(x)/x) · x` loses nothing.
    pub const fn passes_origin(self) -> bool {
        !matches!(self, Self::Sigmoid | Self::Exp | Self::Softplus)
    }
}
