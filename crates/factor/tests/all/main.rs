//! Integration tests of the factorisations, in one program.

mod decompositions;
mod tree_metrics;
mod trees;
mod weighted;
