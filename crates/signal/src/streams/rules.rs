//! The rules that streams obey, and what they stand for.

use std::sync::Arc;

use crate::{Error, Result};

/// How a bias, or any other constant that is added, is shared among the streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasSplit {
    /// By `|S[k] · b|`. Not additive: the weights of a group of streams are not the sums of its
    /// members' weights, as their dot products may cancel.
    #[default]
    AbsoluteDot,
    /// By `|cos(S[k], b)|`; a stream of norm zero gets nothing.
    AbsoluteCosine,
    /// By `‖S[k]‖₂`.
    Norm,
    /// Equally over the streams that are not zero.
    Equal,
    /// All to the first stream.
    First,
    /// By the signed `S[k] · b`; unstable where the dot products cancel.
    Dot,
    /// Dropped: the streams no longer sum to the value.
    Drop,
    /// All to one additional, last stream.
    Extra,
}

impl BiasSplit {
    /// Every scheme.
    pub const ALL: [Self; 8] = [
        Self::AbsoluteDot,
        Self::AbsoluteCosine,
        Self::Norm,
        Self::Equal,
        Self::First,
        Self::Dot,
        Self::Drop,
        Self::Extra,
    ];

    /// The scheme's name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AbsoluteDot => "absdot",
            Self::AbsoluteCosine => "abssim",
            Self::Norm => "norm",
            Self::Equal => "equal",
            Self::First => "cls",
            Self::Dot => "dot",
            Self::Drop => "none",
            Self::Extra => "token",
        }
    }

    /// The scheme of that name.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|scheme| scheme.name() == name)
            .ok_or_else(|| {
                let names: Vec<_> = Self::ALL.iter().map(|scheme| scheme.name()).collect();
                Error::invalid("bias split", name, format!("one of {}", names.join(", ")))
            })
    }

    /// Whether a stream that is alone at its position keeps a bias added there to itself.
    pub(super) const fn stays_with_its_stream(self) -> bool {
        !matches!(self, Self::First | Self::Drop | Self::Extra)
    }
}

/// Where the bias of an attention block (`Σ_h b_V W_O + b_O`) is split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasSite {
    /// After the residual is added, by the sums; what DecompX's published code does. A value
    /// bias in the first layer stays with its own token.
    #[default]
    Residual,
    /// Among the attention's own outputs; what its paper writes.
    Attention,
}

/// The line that replaces an activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Slope {
    /// Through the origin and `(x, f(x))`; needs no intercept when `f(0) = 0`. Activations that
    /// do not pass the origin use the tangent.
    #[default]
    Secant,
    /// The tangent at `x`; its intercept `f(x) - f'(x) x` is split like a bias.
    Tangent,
}

/// How the product of two streamed values is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProductSplit {
    /// `½ (S_a b + a S_b)`: complete and symmetric.
    #[default]
    Half,
    /// The gate is a constant: `S_a b`.
    FreezeGate,
}

/// One rule for each kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamRules {
    /// Biases and other constants.
    pub bias: BiasSplit,
    /// Where attention's bias is split.
    pub bias_site: BiasSite,
    /// Activations.
    pub activation: Slope,
    /// Products of two signals.
    pub product: ProductSplit,
}

/// What the streams stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    pub(super) axis: usize,
    /// Stream of each position, or `None` where streams are not positions.
    pub(super) position_stream: Option<Arc<[usize]>>,
    count: usize,
}

impl Partition {
    /// One stream for each of `count` positions along axis 1 of `[batch, position, width]`.
    pub fn positions(count: usize) -> Self {
        Self {
            axis: 1,
            position_stream: Some((0..count).collect()),
            count,
        }
    }

    /// Position `i` belongs to stream `stream_of[i]`; there are `max + 1` streams.
    pub fn groups(stream_of: Vec<usize>) -> Self {
        let count = stream_of.iter().max().map_or(0, |last| last + 1);
        Self {
            axis: 1,
            position_stream: Some(stream_of.into()),
            count,
        }
    }

    /// `count` streams that whole values are assigned to, such as the modules of a model.
    pub fn components(count: usize) -> Self {
        Self {
            axis: 1,
            position_stream: None,
            count,
        }
    }
}

/// The streams of one forward pass: how many, what they stand for, and the rules they obey.
#[derive(Debug)]
pub struct StreamSpace {
    pub(super) partition: Partition,
    rules: StreamRules,
}

impl StreamSpace {
    /// A space for signals to join.
    pub fn new(partition: Partition, rules: StreamRules) -> Arc<Self> {
        Arc::new(Self { partition, rules })
    }

    /// Number of streams, the extra bias stream included.
    pub fn count(&self) -> usize {
        self.partition.count + usize::from(self.rules.bias == BiasSplit::Extra)
    }

    /// The rules in force.
    pub fn rules(&self) -> &StreamRules {
        &self.rules
    }
}
