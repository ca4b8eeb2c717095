//! Integration tests of models, in one program; those that count the bytes they allocate stand alone.

mod axial;
mod documented;
mod families;
mod gguf;
mod initial;
mod input_dropout;
mod masked_autoencoder;
mod organised;
mod patch_norms;
mod reversible;
mod self_ensemble;
mod shared;
