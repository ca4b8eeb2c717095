//! `lapidary inspect`: a model as a whole, or many inputs at once. One file for each analysis.

pub mod attention;
pub mod autoencoder;
pub mod channels;
pub mod circuit;
pub mod clip;
pub mod clusters;
pub mod collapse;
pub mod components;
pub mod curvature;
pub mod energy;
pub mod entropy;
pub mod geometry;
pub mod linearity;
pub mod particles;
pub mod prefix_induction;

use crate::cli::{Analysis, Global, Inspect};
use crate::{output, report};
use anyhow::Result;

pub fn run(arguments: &Inspect, global: &Global) -> Result<()> {
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    let found = match &arguments.analysis {
        Analysis::Attention(arguments) => attention::run(arguments, global)?,
        Analysis::Collapse(arguments) => collapse::run(arguments, global)?,
        Analysis::Geometry(arguments) => geometry::run(arguments, global)?,
        Analysis::Channels(arguments) => channels::run(arguments, global)?,
        Analysis::Clusters(arguments) => clusters::run(arguments, global)?,
        Analysis::Components(arguments) => components::run(arguments, global)?,
        Analysis::Curvature(arguments) => curvature::run(arguments, global)?,
        Analysis::Energy(arguments) => energy::run(arguments, global)?,
        Analysis::Entropy(arguments) => entropy::run(arguments, global)?,
        Analysis::Linearity(arguments) => linearity::run(arguments, global)?,
        Analysis::Particles(arguments) => particles::run(arguments, global)?,
        Analysis::PrefixInduction(arguments) => prefix_induction::run(arguments, global)?,
        Analysis::Sae(arguments) => autoencoder::inspect(arguments, global)?,
        Analysis::SaeTrain(arguments) => autoencoder::train_one(arguments, global)?,
        Analysis::Clip(arguments) => clip::run(arguments, global)?,
        Analysis::Circuit(arguments) => circuit::run(arguments, global)?,
    };
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&found)?)?;
    }
    if global.json {
        return output::print_json(&found);
    }
    output::print(&report::analysis_text(&found))
}
