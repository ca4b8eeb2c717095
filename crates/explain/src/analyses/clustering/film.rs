//! A film of one system: an animated SVG that needs no network and no script.

use super::dynamics::Dynamics;
use super::ensemble::Ensemble;
use super::particles::{Particles, dot};
use crate::{Error, Result};
use lapidary_factor::{Matrix, thin_svd};
use std::fmt::Write as _;

/// Most frames; a longer course is shown at fewer times.
const MOST_FRAMES: usize = 120;

/// Most points of all frames together, so that the file stays small.
const MOST_POINTS: usize = 1 << 17;

/// Most frames that the principal axes are taken of.
const AXES_FROM: usize = 9;

/// Seconds that the film runs before it begins again.
const SECONDS: f64 = 12.0;

/// Half of the picture's width.
const HALF: f64 = 240.0;

/// Length of a unit vector in the picture.
const RADIUS: f64 = 210.0;

/// A system at some times, as seen in a plane.
#[derive(Clone, Debug, PartialEq)]
pub struct Film {
    /// The times.
    pub times: Vec<f64>,
    /// Where each particle is, `[time][particle]`, within the unit disc.
    pub points: Vec<Vec<[f64; 2]>>,
    /// The first particle of each particle's cluster, `[time][particle]`.
    pub clusters: Vec<Vec<usize>>,
    title: String,
}

impl Film {
    /// The first system of an ensemble. Two coordinates are shown as they are; of more, the two
    /// principal axes of the particles over the whole course (about the origin, so that the unit
    /// sphere becomes the unit disc).
    ///
    /// # Errors
    /// As [`Ensemble::course`]; when there are too many particles for a film.
    pub fn new(dynamics: &Dynamics, ensemble: &Ensemble) -> Result<Self> {
        let frames = ensemble.frames(dynamics, MOST_FRAMES)?;
        let points = frames.len() * ensemble.count;
        if points > MOST_POINTS {
            return Err(Error::invalid(
                "particles of a film",
                ensemble.count,
                format!("at most {}", MOST_POINTS / frames.len().max(1)),
            ));
        }
        let axes = axes(&frames)?;
        let seen = |particles: &Particles| particles.iter().map(|x| axes.seen(x)).collect();
        Ok(Self {
            times: frames.iter().map(|(time, _)| *time).collect(),
            points: frames.iter().map(|(_, frame)| seen(frame)).collect(),
            clusters: frames
                .iter()
                .map(|(_, frame)| frame.components(ensemble.threshold))
                .collect(),
            title: format!(
                "{} particles in {} dimensions, beta {}",
                ensemble.count,
                ensemble.dimension,
                dynamics.beta()
            ),
        })
    }

    /// The film. A particle's colour is that of the first particle of its cluster, so that colours
    /// go as clusters merge.
    pub fn to_svg(&self) -> String {
        let side = 2.0 * HALF;
        let last = self.times.last().copied().unwrap_or(0.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {side} {}\" width=\"{side}\" \
             font-family=\"sans-serif\" role=\"img\">\n<title>{}, time 0 to {last:.1}</title>\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <circle cx=\"{HALF}\" cy=\"{HALF}\" r=\"{RADIUS}\" fill=\"none\" stroke=\"#bbb\"/>\n",
            side + 40.0,
            self.title,
        );
        let count = self.points.first().map_or(0, Vec::len);
        for particle in 0..count {
            self.particle(&mut svg, particle, count);
        }
        // What has passed of the time, as a bar.
        let _ = writeln!(
            svg,
            "<rect x=\"30\" y=\"{side}\" width=\"{}\" height=\"4\" fill=\"#eee\"/>\
             <rect x=\"30\" y=\"{side}\" width=\"0\" height=\"4\" fill=\"#555\">\
             <animate attributeName=\"width\" values=\"0;{}\" {TIMING}/></rect>\
             <text x=\"30\" y=\"{}\" font-size=\"12\">time 0</text>\
             <text x=\"{}\" y=\"{}\" font-size=\"12\" text-anchor=\"end\">{last:.1}</text>\n</svg>",
            side - 60.0,
            side - 60.0,
            side + 22.0,
            side - 30.0,
            side + 22.0,
            TIMING = timing(),
        );
        svg
    }

    fn particle(&self, svg: &mut String, particle: usize, count: usize) {
        let place = |axis: usize| -> Vec<String> {
            let sign = if axis == 0 { 1.0 } else { -1.0 };
            self.points
                .iter()
                .filter_map(|frame| Some(frame.get(particle)?[axis]))
                .map(|x| format!("{:.1}", HALF + sign * RADIUS * x))
                .collect()
        };
        // Colours where they change, each with the share of the time at which it begins.
        let frames = self.clusters.len().max(2) - 1;
        let mut colours: Vec<(f64, String)> = Vec::new();
        for (frame, clusters) in self.clusters.iter().enumerate() {
            let colour = hue(clusters.get(particle).copied().unwrap_or(0), count);
            if colours.last().is_none_or(|(_, last)| *last != colour) {
                colours.push((frame as f64 / frames as f64, colour));
            }
        }
        let [xs, ys] = [place(0), place(1)];
        let first = |values: &[String]| values.first().cloned().unwrap_or_default();
        let fill = colours.first().map_or("", |(_, colour)| colour.as_str());
        let _ = write!(
            svg,
            "<circle cx=\"{}\" cy=\"{}\" r=\"6\" fill=\"{fill}\" fill-opacity=\"0.8\">",
            first(&xs),
            first(&ys)
        );
        for (name, values) in [("cx", xs), ("cy", ys)] {
            let _ = write!(
                svg,
                "<animate attributeName=\"{name}\" values=\"{}\" {}/>",
                values.join(";"),
                timing()
            );
        }
        if colours.len() > 1 {
            let (times, values): (Vec<String>, Vec<String>) = colours
                .into_iter()
                .map(|(time, colour)| (format!("{time:.4}"), colour))
                .unzip();
            let _ = write!(
                svg,
                "<animate attributeName=\"fill\" calcMode=\"discrete\" keyTimes=\"{}\" \
                 values=\"{}\" {}/>",
                times.join(";"),
                values.join(";"),
                timing()
            );
        }
        svg.push_str("</circle>\n");
    }
}

fn timing() -> String {
    format!("dur=\"{SECONDS}s\" repeatCount=\"indefinite\"")
}

fn hue(cluster: usize, count: usize) -> String {
    let degrees = 360.0 * cluster as f64 / count.max(1) as f64;
    // Every other one darker, so that neighbours differ.
    let lightness = if cluster.is_multiple_of(2) { 55 } else { 35 };
    format!("hsl({degrees:.0},75%,{lightness}%)")
}

/// Two orthonormal vectors; without them, the first two coordinates.
struct Axes(Option<[Vec<f64>; 2]>);

impl Axes {
    fn seen(&self, x: &[f64]) -> [f64; 2] {
        match &self.0 {
            Some([first, second]) => [dot(x, first), dot(x, second)],
            None => {
                let at = |index: usize| x.get(index).copied().unwrap_or(0.0);
                [at(0), at(1)]
            }
        }
    }
}

/// The two right singular vectors with the largest values, of some frames' points as rows.
fn axes(frames: &[(f64, Particles)]) -> Result<Axes> {
    let dimension = frames.first().map_or(0, |(_, frame)| frame.dimension());
    if dimension <= 2 {
        return Ok(Axes(None));
    }
    let every = frames.len().div_ceil(AXES_FROM).max(1);
    let rows: Vec<&[f64]> = frames
        .iter()
        .step_by(every)
        .flat_map(|(_, frame)| frame.iter())
        .collect();
    let points = Matrix::from_fn(rows.len(), dimension, |i, j| {
        rows.get(i)
            .and_then(|row| row.get(j))
            .copied()
            .unwrap_or(0.0)
    });
    let right = thin_svd(points.as_ref())?.vt;
    // A single point in a single frame has one axis: the other is then zero.
    let axis = |index: usize| -> Vec<f64> {
        match index < right.nrows() {
            true => right.row(index).iter().copied().collect(),
            false => vec![0.0; dimension],
        }
    };
    Ok(Axes(Some([axis(0), axis(1)])))
}
