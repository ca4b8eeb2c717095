//! Integration tests of the search, in one program.

mod rducb_golden;
mod trajectories;
