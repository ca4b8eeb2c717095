//! The residual stream made narrower: every matrix that reads it loses columns, every matrix that
//! writes it loses rows, after a change of basis that makes the loss small (SliceGPT: Ashkboos et
//! al. 2024, arXiv 2401.15024).
//!
//! Row vectors, width `D`, cut to `d`. At each *site* `s` (the embeddings, and the stream after
//! each part) there is a basis `Q_s` `[D, d]`, `Q_sᵀ Q_s = I`, and the stream `h` is carried as
//! `h Q_s`:
//!
//! ```text
//! embeddings      E   ←  E Q_0
//! readers of s    W   ←  W Q_s              (x Wᵀ becomes (x Q_s)(W Q_s)ᵀ)
//! writers to t    W   ←  Q_tᵀ W,  b ← b Q_t
//! shortcut s → t  S   =  Q_sᵀ Q_t           (h Q_s S = h Q_s Q_sᵀ Q_t)
//! ```
//!
//! A norm commutes with this when it is `x √D / ‖x‖`, without gain and without a mean: [`fold`]
//! makes it so. It divides by the original `D`, which a norm over `d` features does when its gain
//! is `√(D/d)` and its epsilon `ε D/d`:
//!
//! ```text
//! √(D/d) x / √(‖x‖²/d + ε D/d)  =  x / √(‖x‖²/D + ε)
//! ```
//!
//! What differs between methods is which `Q_s` they choose ([`Directions`]), and whether there is
//! one for each site, which needs shortcuts ([`BlockSpec::shortcuts`]), or one for all, which makes
//! every shortcut the identity and leaves a stock architecture. Only the column space of a map
//! matters: with any invertible `R`, `(h Q R)(R⁻¹ Qᵀ) = h Q Qᵀ`.
//!
//! [`BlockSpec::shortcuts`]: lapidary_parts::block::BlockSpec::shortcuts

mod coordinates;
mod cut;
mod directions;
mod drift;
mod fold;
mod layout;
mod plan;
mod sinkhorn;
mod transport;
mod walk;

pub(crate) use plan::{
    COORDINATE_MAGNITUDE, DOTRESIZE, DOTRESIZE_SHARED, SLICEGPT, SLICEGPT_SHARED,
};

pub use coordinates::{Coordinates, Selector};
pub use directions::{Choice, Directions, Leading, Principal, Random, Stream, Trailing};
pub use drift::Drift;
pub use plan::{SliceSettings, Sliced, parameters_after, slice};
pub use sinkhorn::{Transported, transport_plan};
pub use transport::{Distance, Transport, orthonormal};
