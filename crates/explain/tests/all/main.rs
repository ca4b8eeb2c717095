//! Integration tests of the methods of explanation, in one program.

mod alti;
mod autoencoder;
mod autoencoder_data;
mod autoencoder_golden;
mod brute_force;
mod channels;
mod chefer;
mod clip;
mod clip_golden;
mod clustering;
mod common;
mod contextual;
mod contextual_golden;
mod decompx;
mod energy;
mod evaluation;
mod geometry;
mod golden;
mod golden_alti;
mod layer_scale;
mod linearity;
mod organised;
mod relevance;
mod relevance_golden;
mod squashing;
