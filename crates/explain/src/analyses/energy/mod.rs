//! A Transformer as a memory of its training data (Niu, Bai, Deng & Han, Beyond Scaling Laws:
//! Understanding Transformer Performance with Associative Memory, 2024, arXiv 2405.08707).
//!
//! [`Patterns`] have energies that are low near them and steps that never raise these;
//! [`log_partition`] and [`loss_bound`] are the mass around the patterns and the loss that follows;
//! [`radii`], [`descent`] and [`memorised`] measure a model against its training data.

mod nearest;
mod partition;
mod patterns;
mod states;

pub use nearest::{Neighbour, nearest};
pub use partition::{
    log_gamma, log_lower_gamma, log_partition, log_sphere_area, loss_bound, unit_ball_radius,
};
pub use patterns::Patterns;
pub use states::{Descent, Radii, descent, loss, memorised, radii, states};

use crate::Result;
use crate::report::{Plot, Report, Series, Table};
use lapidary_model::Model;
use rand::Rng;

/// Held-out positions between those whose energies are measured.
const EVERY: usize = 4;

/// How a model's states lie around those of `training`, windows of one length; what its blocks do to
/// the energy of `held_out` windows; and how much it says by heart.
///
/// # Errors
/// As [`states`].
pub fn report(
    model: &Model,
    training: &[Vec<u32>],
    held_out: &[Vec<u32>],
    generator: &mut impl Rng,
) -> Result<Report> {
    let width = model.spec().width;
    let radii = radii(model, training, held_out, generator)?;
    let descent = descent(model, training, held_out, EVERY)?;
    let (exact, limit) = unit_ball_radius(width);
    let length = training.first().map_or(0, Vec::len);
    let continued = 32.min(length / 2).max(1);
    let mut distances = Table::new(
        "Distance to the nearest training state",
        &["from", "5 %", "median", "95 %", "median / unit-ball radius"],
    );
    let kinds = [
        ("held-out states", &radii.held_out),
        ("the same, coordinates dealt out anew", &radii.dealt),
        ("other training states", &radii.among_training),
    ];
    for (name, sorted) in kinds {
        let at = |share| Radii::quantile(sorted, share);
        distances.push([
            name.into(),
            at(0.05).into(),
            at(0.5).into(),
            at(0.95).into(),
            (at(0.5) / exact).into(),
        ]);
    }
    let mut blocks = Table::new(
        "Energy of held-out states among the training states after each block",
        &["block", "before", "after", "share that descends"],
    );
    for block in &descent {
        blocks.push([
            block.block.into(),
            block.before.into(),
            block.after.into(),
            block.descends.into(),
        ]);
    }
    let mut losses = Table::new("Loss, in nats for each token", &["of", "value"]);
    losses.push(["training windows".into(), loss(model, training)?.into()]);
    losses.push(["held-out windows".into(), loss(model, held_out)?.into()]);
    let radius = Radii::quantile(&radii.held_out, 0.5);
    if radius > 0.0 {
        let mass = log_partition(training.len() * length, width, radius)?;
        losses.push(["ln Z at the median radius".into(), mass.into()]);
        losses.push(["ln Z + 1/Z".into(), loss_bound(mass).into()]);
    }
    losses.push(["least value of ln Z + 1/Z".into(), 1.0.into()]);
    let curve = |name: &str, sorted: &[f64]| Series {
        name: name.to_owned(),
        points: (0..=50)
            .map(|step| f64::from(step) / 50.0)
            .map(|share| (Radii::quantile(sorted, share), share))
            .collect(),
    };
    Ok(Report {
        title: "The model as a memory".to_owned(),
        notes: vec![
            format!(
                "{} training and {} held-out windows of {length} tokens",
                training.len(),
                held_out.len()
            ),
            format!("unit-ball radius in {width} dimensions: {exact:.3} (√(n/2πe) = {limit:.3})"),
            format!(
                "says the last {continued} tokens of {:.1} % of the training windows by heart",
                100.0 * memorised(model, training, continued)?
            ),
            "ln Z takes the balls around training states to be disjoint".to_owned(),
        ],
        tables: vec![distances, blocks, losses],
        maps: Vec::new(),
        plots: vec![Plot {
            title: "Distance to the nearest training state".to_owned(),
            x: "distance".to_owned(),
            y: "share below".to_owned(),
            series: kinds
                .iter()
                .filter(|(_, sorted)| !sorted.is_empty())
                .map(|(name, sorted)| curve(name, sorted))
                .collect(),
        }],
        ..Report::default()
    })
}
