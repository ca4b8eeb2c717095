//! `lapidary inspect particles`: random particles under attention.

use crate::cli::Global;
use crate::output;
use anyhow::Result;
use clap::{Args, ValueEnum};
use lapidary_explain::analyses::clustering::{
    Dynamics, Ensemble, Film, Flow, Matrices, Scheme, particles_report, phases_report,
};
use lapidary_explain::report::Report;
use lapidary_train::generator;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FlowName {
    /// Softmax attention
    SelfAttention,
    /// Without the softmax's denominator
    Unnormalised,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum SchemeName {
    /// First order
    Euler,
    /// As a Transformer's block with its norm after the residual
    Block,
    /// Fourth order
    RungeKutta,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum MatricesName {
    /// All the identity
    Identity,
    /// Independent normal entries
    Gaussian,
    /// Symmetric, queries with keys the same as values
    Symmetric,
    /// Values that are minus the identity
    Repulsive,
}

#[derive(Args, Debug)]
pub struct Particles {
    /// Particles of a system
    #[arg(long, default_value_t = 32)]
    pub count: usize,
    /// Coordinates of a particle
    #[arg(long, default_value_t = 8)]
    pub dimension: usize,
    /// Inverse temperature; several, separated by commas, give a phase diagram
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1",
        allow_negative_numbers = true
    )]
    pub beta: Vec<f64>,
    /// Query, key and value matrices
    #[arg(long, value_enum, default_value = "identity")]
    pub matrices: MatricesName,
    /// Which flow
    #[arg(long, value_enum, default_value = "self-attention")]
    pub flow: FlowName,
    /// How steps are taken
    #[arg(long, value_enum, default_value = "euler")]
    pub scheme: SchemeName,
    /// Independent systems
    #[arg(long, default_value_t = 16)]
    pub systems: usize,
    /// How long they run
    #[arg(long, default_value_t = 30.0)]
    pub time: f64,
    /// Length of a step
    #[arg(long, default_value_t = 0.1)]
    pub step: f64,
    /// Particles with a larger inner product are one
    #[arg(long, default_value_t = 0.999)]
    pub threshold: f64,
    /// Also write an animated SVG of one system, coloured by cluster
    #[arg(long, value_name = "FILE.svg")]
    pub film: Option<PathBuf>,
}

pub fn run(arguments: &Particles, global: &Global) -> Result<Report> {
    let flow = match arguments.flow {
        FlowName::SelfAttention => Flow::SelfAttention,
        FlowName::Unnormalised => Flow::Unnormalised,
    };
    let ensemble = Ensemble {
        count: arguments.count,
        dimension: arguments.dimension,
        systems: arguments.systems,
        time: arguments.time,
        step: arguments.step,
        scheme: match arguments.scheme {
            SchemeName::Euler => Scheme::Euler,
            SchemeName::Block => Scheme::Block,
            SchemeName::RungeKutta => Scheme::RungeKutta,
        },
        threshold: arguments.threshold,
        seed: global.seed,
    };
    let matrices = match arguments.matrices {
        MatricesName::Identity => Matrices::Identity,
        MatricesName::Gaussian => Matrices::Gaussian,
        MatricesName::Symmetric => Matrices::Symmetric,
        MatricesName::Repulsive => Matrices::Repulsive,
    };
    // The same matrices at every temperature.
    let dynamics = |beta| {
        let mut generator = generator(global.seed);
        Dynamics::new(flow, beta)?.with_drawn(matrices, arguments.dimension, &mut generator)
    };
    if let Some(path) = &arguments.film {
        let [beta] = arguments.beta.as_slice() else {
            anyhow::bail!(
                "a film shows one temperature, but --beta has {}",
                arguments.beta.len()
            );
        };
        output::check_writable(path)?;
        let film = Film::new(&dynamics(*beta)?, &ensemble)?;
        output::write_text(path, &film.to_svg())?;
    }
    Ok(match arguments.beta.as_slice() {
        [beta] => particles_report(&dynamics(*beta)?, flow, &ensemble)?,
        betas => phases_report(dynamics, flow, betas, &ensemble)?,
    })
}
