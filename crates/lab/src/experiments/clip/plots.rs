//! Figures.

use super::measures::marks;
use super::study::{Found, TEXTS};
use crate::experiments::mean;
use crate::{Plot, Result, Series};
use lapidary_explain::clip::{Component, HeadName, ImageTower};

/// Shape accuracy as the attention of more and more layers is mean-ablated, from the first.
pub fn ablations(
    tower: &ImageTower<'_>,
    shape_accuracy: &dyn Fn(&[bool]) -> Result<f64>,
) -> Result<Plot> {
    let line = |name: &str, feedforward: bool| -> Result<Series> {
        let mut points = Vec::new();
        for layers in 0..=tower.depth() {
            let ablated = marks(tower, |component| match component {
                Component::Head { layer, .. } => *layer < layers,
                _ => feedforward,
            });
            points.push((layers as f64, shape_accuracy(&ablated)?));
        }
        Ok(Series {
            name: name.to_owned(),
            points,
        })
    };
    Ok(Plot {
        title: "Attention of the first layers mean-ablated".to_owned(),
        x: "layers".to_owned(),
        y: "shape accuracy".to_owned(),
        series: vec![
            line("the rest as it is", false)?,
            line("feed-forward parts ablated too", true)?,
        ],
    })
}

/// Variance that the first texts hold, averaged over heads.
pub fn spans(found: &Found, at_random: &Found) -> Plot {
    let line = |name: &str, found: &Found| {
        let at = |count: usize| {
            let of = |head: &HeadName| head.span.shares.iter().take(count).sum::<f64>();
            (count as f64, mean(found.heads.iter().map(of)))
        };
        Series {
            name: name.to_owned(),
            points: (0..=TEXTS).map(at).collect(),
        }
    };
    Plot {
        title: "What a head says, in a few texts".to_owned(),
        x: "texts".to_owned(),
        y: "share of the variance, mean over heads".to_owned(),
        series: vec![line("trained", found), line("untrained", at_random)],
    }
}

/// Direct effects by layer.
pub fn parts(found: &Found) -> Plot {
    let line = |kind: &str| {
        let of_kind = found
            .effects
            .iter()
            .filter(|(part, _)| part.starts_with(kind));
        Series {
            name: kind.to_owned(),
            points: of_kind
                .enumerate()
                .map(|(layer, (_, share))| (layer as f64, *share))
                .collect(),
        }
    };
    Plot {
        title: "Direct effects".to_owned(),
        x: "layer".to_owned(),
        y: "share of what differs between pictures".to_owned(),
        series: vec![line("attention"), line("feedforward")],
    }
}
