//! Fields on trees, multiplied by functions of the distance (Choromanski et al., Fast Tree-Field
//! Integrators, 2024, arXiv 2406.15881): `Y_i = Σ_j f(dist(i, j)) X_j` for a field `X` of one row of
//! numbers for each vertex, without the matrix.
//!
//! - [`Tree`]: a weighted tree; [`Graph`]: what it spans, and shortest paths there.
//! - [`IntegratorTree`]: a tree cut in two at a vertex again and again, both sides with a quarter of
//!   the vertices at least, which does the multiplying.
//! - [`Function`]: `f`, by classes whose products are cheap.
//! - [`Blocked`]: matrices of a rational function of sums, in blocks of low rank.
//! - [`Graph::hierarchy`] and [`Distortion`]: trees over a graph beside the spanning one, and how far
//!   distances are from the graph's.
//! - [`RationalFit`]: a function that makes a tree's distances those of its graph.
//!
//! It stands in this crate because it is a factorisation with no network in it: a structured matrix,
//! written as a short sum of sparse ones times small ones of low rank or of Hankel's form.

mod blocked;
mod function;
mod graph;
mod hierarchical;
mod integrator;
mod learn;
mod product;

pub use blocked::{Blocked, TOLERANCE};
pub use function::Function;
pub use graph::{Graph, Tree};
pub use hierarchical::{Distortion, Hierarchy};
pub use integrator::{IntegratorTree, Leaf, Side, Split};
pub use learn::RationalFit;
pub use product::hankel;
