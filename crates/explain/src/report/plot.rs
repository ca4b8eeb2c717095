//! Line figures, kept as data and drawn as SVG.

use crate::{Error, Result};
use plotters::prelude::*;
use serde::Serialize;
use std::ops::Range;

/// One line of a figure.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points in order of x.
    pub points: Vec<(f64, f64)>,
}

/// A figure of lines.
#[derive(Clone, Debug, Serialize)]
pub struct Plot {
    /// Title.
    pub title: String,
    /// What x is.
    pub x: String,
    /// What y is.
    pub y: String,
    /// The lines.
    pub series: Vec<Series>,
}

const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 98, 190),
    RGBColor(214, 96, 14),
    RGBColor(38, 139, 84),
    RGBColor(160, 64, 150),
    RGBColor(110, 110, 110),
    RGBColor(190, 160, 20),
    RGBColor(20, 150, 165),
    RGBColor(190, 45, 60),
];

/// Width and height of a figure.
const SIZE: (u32, u32) = (760, 460);
/// More lines than this have their names beside the figure.
const INSIDE: usize = 10;
/// Width of the names beside it, and height of each.
const BESIDE: u32 = 210;
const NAME: u32 = 16;

/// The colour of a line among `count`.
fn colour(index: usize, count: usize) -> RGBAColor {
    match COLOURS.get(index) {
        Some(colour) if count <= INSIDE => colour.to_rgba(),
        // Far from those before it on the circle.
        _ => HSLColor((index * 137 % 360) as f64 / 360.0, 0.65, 0.42).to_rgba(),
    }
}

impl Plot {
    /// The figure as an SVG document.
    pub fn to_svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|reason| Error::Plot {
            title: self.title.clone(),
            reason,
        })?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> std::result::Result<(), String> {
        fn said<E: std::fmt::Display>(error: E) -> String {
            error.to_string()
        }
        let count = self.series.len();
        let aside = count > INSIDE;
        let (width, height) = match aside {
            true => (SIZE.0 + BESIDE, SIZE.1.max(NAME * (count as u32 + 3))),
            false => SIZE,
        };
        let whole = SVGBackend::with_string(svg, (width, height)).into_drawing_area();
        whole.fill(&WHITE).map_err(said)?;
        let (area, beside) = whole.split_horizontally(SIZE.0);
        let range = |values: &mut dyn Iterator<Item = f64>| {
            let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
            for value in values.filter(|value| value.is_finite()) {
                low = low.min(value);
                high = high.max(value);
            }
            if low > high {
                return 0.0..1.0;
            }
            // A line that is level lies in the middle of a range of its own size.
            let margin = match high - low {
                0.0 => high.abs().max(1.0) * 0.5,
                span => span * 0.05,
            };
            low - margin..high + margin
        };
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let x_range = range(&mut points().map(|point| point.0));
        let y_range = range(&mut points().map(|point| point.1));
        let legend = emptiest_corner(&x_range, &y_range, points());
        let (x_digits, y_digits) = (digits(&x_range), digits(&y_range));
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(58)
            .build_cartesian_2d(x_range, y_range)
            .map_err(said)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|x| format!("{x:.x_digits$}"))
            .y_label_formatter(&|y| format!("{y:.y_digits$}"))
            .light_line_style(WHITE)
            .draw()
            .map_err(said)?;
        for (index, series) in self.series.iter().enumerate() {
            let colour = colour(index, count);
            let finite = series
                .points
                .iter()
                .copied()
                .filter(|p| p.0.is_finite() && p.1.is_finite());
            chart
                .draw_series(LineSeries::new(finite.clone(), colour.stroke_width(2)))
                .map_err(said)?
                .label(&series.name)
                .legend(move |(x, y)| {
                    PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            chart
                .draw_series(finite.map(|point| Circle::new(point, 3, colour.filled())))
                .map_err(said)?;
        }
        if !aside {
            chart
                .configure_series_labels()
                .position(legend)
                .background_style(WHITE.mix(0.85))
                .border_style(BLACK.mix(0.3))
                .draw()
                .map_err(said)?;
            return whole.present().map_err(said);
        }
        for (index, series) in self.series.iter().enumerate() {
            let y = (NAME as usize * (index + 2)) as i32;
            let line =
                PathElement::new(vec![(4, y), (22, y)], colour(index, count).stroke_width(2));
            beside.draw(&line).map_err(said)?;
            let name = Text::new(series.name.as_str(), (28, y - 6), ("sans-serif", 12));
            beside.draw(&name).map_err(said)?;
        }
        whole.present().map_err(said)
    }
}

/// Decimals that tell a tenth of a range apart.
fn digits(range: &Range<f64>) -> usize {
    let step = (range.end - range.start) / 10.0;
    (-step.log10().floor()).clamp(0.0, 9.0) as usize
}

/// The corner with the fewest points.
fn emptiest_corner<'a>(
    x: &Range<f64>,
    y: &Range<f64>,
    points: impl Iterator<Item = &'a (f64, f64)>,
) -> SeriesLabelPosition {
    let middle = |range: &Range<f64>| (range.start + range.end) / 2.0;
    // Lower left, lower right, upper left, upper right.
    let mut counts = [0; 4];
    for point in points {
        let corner = usize::from(point.0 > middle(x)) + 2 * usize::from(point.1 > middle(y));
        if let Some(count) = counts.get_mut(corner) {
            *count += 1;
        }
    }
    let emptiest = (0..4).min_by_key(|corner| counts.get(*corner).copied());
    match emptiest.unwrap_or(3) {
        0 => SeriesLabelPosition::LowerLeft,
        1 => SeriesLabelPosition::LowerRight,
        2 => SeriesLabelPosition::UpperLeft,
        _ => SeriesLabelPosition::UpperRight,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_tell_values_apart_and_the_legend_keeps_clear() {
        assert_eq!(digits(&(0.0..100.0)), 0);
        assert_eq!(digits(&(0.95..1.05)), 2);
        let falling = [(0.0, 1.0), (0.4, 0.6), (0.45, 0.9), (1.0, 0.0)];
        let corner = emptiest_corner(&(0.0..1.0), &(0.0..1.0), falling.iter());
        assert!(matches!(corner, SeriesLabelPosition::LowerLeft));
        let level = Plot {
            title: "level".into(),
            x: "x".into(),
            y: "y".into(),
            series: vec![Series {
                name: "one".into(),
                points: vec![(0.0, 1.0), (1.0, 1.0)],
            }],
        };
        assert!(level.to_svg().unwrap().contains("one"));
    }

    /// Names that would hide the lines stand beside them, and no two lines are of one colour.
    #[test]
    fn many_lines_have_their_names_beside_the_figure() {
        let plot = |count: usize| Plot {
            title: "many".into(),
            x: "x".into(),
            y: "y".into(),
            series: (0..count)
                .map(|index| Series {
                    name: format!("line {index}"),
                    points: vec![(0.0, index as f64), (1.0, 2.0 * index as f64)],
                })
                .collect(),
        };
        let few = plot(INSIDE).to_svg().unwrap();
        assert!(
            few.starts_with("<svg width=\"760\" height=\"460\""),
            "{few}"
        );
        let many = plot(39).to_svg().unwrap();
        assert!(
            many.starts_with("<svg width=\"970\" height=\"672\""),
            "{many}"
        );
        assert!((0..39).all(|index| many.contains(&format!("line {index}\n"))));
        let colours: std::collections::BTreeSet<String> = (0..39)
            .map(|index| format!("{:?}", colour(index, 39)))
            .collect();
        assert_eq!(colours.len(), 39);
    }
}
