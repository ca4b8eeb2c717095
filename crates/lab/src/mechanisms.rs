//! The mechanisms of attention, each set up as it is compared with the others.

use lapidary_parts::attention::mechanism::linformer::{LinformerSpec, Projection, Sharing};
use lapidary_parts::attention::{MechanismSpec, QueryKeySharing};

/// One way to attend.
#[derive(Clone, Copy, Debug)]
pub struct Mechanism {
    /// Its name in tables.
    pub name: &'static str,
    /// Whether a token is kept from seeing later ones.
    pub causal: bool,
    /// Whether its cost grows with the square of the length.
    pub quadratic: bool,
    /// Which projections are one and the same.
    pub sharing: QueryKeySharing,
    spec: fn(usize) -> MechanismSpec,
}

impl Mechanism {
    /// Its spec for sequences of up to `length` tokens.
    pub fn spec(&self, length: usize) -> MechanismSpec {
        (self.spec)(length)
    }
}

const fn entry(
    name: &'static str,
    causal: bool,
    quadratic: bool,
    spec: fn(usize) -> MechanismSpec,
) -> Mechanism {
    Mechanism {
        name,
        causal,
        quadratic,
        sharing: QueryKeySharing::None,
        spec,
    }
}

static MECHANISMS: &[Mechanism] = &[
    entry("softmax", false, true, |_| MechanismSpec::Softmax),
    entry("softmax, causal", true, true, |_| MechanismSpec::Softmax),
    entry("linformer, 128 slots", false, false, |length| {
        MechanismSpec::Linformer(LinformerSpec {
            slots: 128,
            longest: length,
            sharing: Sharing::Headwise,
            projection: Projection::Learned,
        })
    }),
];

/// All of them, softmax first.
pub fn mechanisms() -> &'static [Mechanism] {
    MECHANISMS
}
