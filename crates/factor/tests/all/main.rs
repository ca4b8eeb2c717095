//! Integration tests of the factorisations, in one program.

mod decompositions;
mod trees;
mod weighted;
