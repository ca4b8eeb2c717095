//! Integration tests of the parts, in one program; the one that counts the bytes it allocates stands alone.

mod combiner;
mod common;
mod decoding;
mod doubly_stochastic;
mod drop_path;
mod ecoformer;
mod fastmax;
mod fit;
mod golden;
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
mod subsampled;
mod topological;
mod vcc;
mod wavelet;
mod white_box;
