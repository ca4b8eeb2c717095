//! Integration tests of the parts, in one program; the one that counts the bytes it allocates stands alone.

mod circuits;
mod combiner;
mod common;
mod decoding;
mod doubly_stochastic;
mod ecoformer;
mod fastmax;
mod fit;
mod golden;
mod hash_search;
mod introduction;
mod kernelized;
mod kinds;
mod linformer;
mod lion;
mod mra;
mod positions;
mod reformer;
mod soft;
mod sparse_attention;
mod sparse_layout;
mod subsampled;
mod topological;
mod vcc;
mod wavelet;
mod white_box;
