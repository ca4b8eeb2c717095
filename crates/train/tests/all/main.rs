//! Integration tests of training, in one program.

mod alignment;
mod beginning;
mod best;
mod documented;
mod language;
mod loss;
mod masked_patches;
mod masks;
mod mechanisms_recomputed;
mod run;
mod self_distillation;
mod state;
mod tasks;
mod white_box;
