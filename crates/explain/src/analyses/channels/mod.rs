//! Which head talks to which, through which direction (Merullo, Eickhoff & Pavlick, Talking Heads:
//! Understanding Inter-layer Communication in Transformer Language Models, 2024, arXiv
//! 2406.09519).
//!
//! Heads come from a model with the norm before them folded in ([`Heads`], [`Head`]); what each
//! writes falls into rank-one [`Components`], which each later head reads more or less
//! ([`Reader`]); those that stand out are [`channels`]. [`scale_components`] turns one up or off in
//! the weights, [`Steering`] moves the residual stream within its span, [`inhibition_score`]
//! measures what that does to a head that moves names.

mod components;
mod detection;
mod editing;
mod folding;
mod heads;
mod steering;

pub use components::{Components, Composition, Reader};
pub use detection::{Channel, ChannelOptions, ReaderScores, RotationNull, channels, each_reader};
pub use editing::{ComponentEdit, keep_only, scale_components};
pub use folding::fold_norms;
pub use heads::{Head, HeadId, Heads};
pub use steering::{Inhibition, NamePrompt, Steering, SweepPoint, inhibition_score, sweep};

use crate::Result;
use crate::report::{Map, Report, Table};
use detection::Search;
use lapidary_model::Model;
use rand::Rng;

/// Heads up to which the head graph is drawn as maps.
const MOST_MAPPED: usize = 96;

/// The channels of a model as a table, the `top` most outstanding, and which head reads which as
/// maps.
///
/// # Errors
/// As [`channels`] and [`Heads::of`].
pub fn report(
    model: &Model,
    options: &ChannelOptions,
    top: usize,
    generator: &mut impl Rng,
) -> Result<Report> {
    let heads = Heads::of(model)?;
    let ids = heads.ids();
    let search = Search::new(&heads, options, generator)?;
    let mut graph = Graph::new(&ids);
    let mut found = Vec::new();
    let (mut looked_at, mut chance) = (0, (0.0, 0usize));
    each_reader(&heads, |scores| {
        looked_at += scores.scores.len();
        chance = (chance.0 + scores.spread().0, chance.1 + 1);
        graph.add(scores);
        found.extend(search.channels(scores)?);
        Ok(())
    })?;
    found.sort_by(|a: &Channel, b| b.z.total_cmp(&a.z));
    let mut table = Table::new(
        "Channels, the most outstanding first",
        &[
            "writes",
            "component",
            "share",
            "reads",
            "as",
            "score",
            "z",
            "p",
        ],
    );
    for channel in found.iter().take(top) {
        table.push([
            channel.writer.to_string().into(),
            channel.component.into(),
            channel.share.into(),
            channel.reader.to_string().into(),
            channel.composition.name().into(),
            channel.score.into(),
            channel.z.into(),
            channel.p.into(),
        ]);
    }
    let mut notes = vec![
        format!(
            "{} heads; {looked_at} pairs of a component and a reader, mean score {:.4}, chance \
             1/√width = {:.4}",
            ids.len(),
            chance.0 / chance.1.max(1) as f64,
            1.0 / (model.spec().width as f64).sqrt(),
        ),
        format!(
            "{} stand out by {} deviations; p counts {} random rotations and is not corrected \
             for the number of pairs",
            found.len(),
            options.threshold,
            options.draws
        ),
    ];
    notes.extend(heads.notes());
    Ok(Report {
        title: "Channels between heads".to_owned(),
        notes,
        tables: vec![table],
        maps: if ids.len() <= MOST_MAPPED {
            graph.maps()
        } else {
            Vec::new()
        },
        plots: Vec::new(),
        ..Report::default()
    })
}

/// Composition scores of whole heads and of their strongest-read components.
struct Graph<'a> {
    ids: &'a [HeadId],
    /// For each composition `[writer][reader]`: of whole heads, of the best component.
    scores: [[Vec<Vec<f64>>; 2]; 3],
}

impl<'a> Graph<'a> {
    fn new(ids: &'a [HeadId]) -> Self {
        let empty = || vec![vec![0.0; ids.len()]; ids.len()];
        Self {
            ids,
            scores: Composition::ALL.map(|_| [empty(), empty()]),
        }
    }

    fn add(&mut self, of: &ReaderScores<'_>) {
        let kind = of.reader.composition as usize;
        let place = |id: HeadId| self.ids.binary_search(&id).ok();
        for (writer, scores) in of.by_writer() {
            let (Some(row), Some(column)) = (place(writer.head), place(of.reader.head)) else {
                continue;
            };
            let squares = writer.strengths.iter().zip(scores);
            let whole = squares
                .map(|(s, score)| (s * score).powi(2))
                .sum::<f64>()
                .sqrt();
            let best = scores.iter().copied().fold(0.0, f64::max);
            let values = [whole / writer.norm().max(f64::MIN_POSITIVE), best];
            for (map, value) in self.scores[kind].iter_mut().zip(values) {
                map[row][column] = value;
            }
        }
    }

    fn maps(self) -> Vec<Map> {
        let names: Vec<String> = self.ids.iter().map(ToString::to_string).collect();
        let named = |kind: Composition, what: &str, values: Vec<Vec<f64>>| Map {
            title: format!("{kind} composition {what}: rows write, columns read"),
            rows: names.clone(),
            columns: names.clone(),
            values,
        };
        let both = Composition::ALL.into_iter().zip(self.scores);
        both.flat_map(|(kind, [whole, best])| {
            [
                named(kind, "of whole heads", whole),
                named(kind, "of the component that is read most", best),
            ]
        })
        .collect()
    }
}
