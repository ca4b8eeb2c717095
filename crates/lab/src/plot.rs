//! Line figures, kept as data and drawn as SVG.

use crate::{Error, Result};
use plotters::prelude::*;
use serde::Serialize;

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
        let area = SVGBackend::with_string(svg, (760, 460)).into_drawing_area();
        area.fill(&WHITE).map_err(said)?;
        let range = |values: &mut dyn Iterator<Item = f64>| {
            let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
            for value in values.filter(|value| value.is_finite()) {
                low = low.min(value);
                high = high.max(value);
            }
            if low > high {
                return 0.0..1.0;
            }
            let margin = ((high - low) * 0.05).max(1e-9);
            low - margin..high + margin
        };
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(58)
            .build_cartesian_2d(
                range(&mut points().map(|point| point.0)),
                range(&mut points().map(|point| point.1)),
            )
            .map_err(said)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .light_line_style(WHITE)
            .draw()
            .map_err(said)?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let finite = series
                .points
                .iter()
                .copied()
                .filter(|p| p.0.is_finite() && p.1.is_finite());
            chart
                .draw_series(LineSeries::new(finite.clone(), colour.stroke_width(2)))
                .map_err(said)?
                .label(&series.name)
                .legend(|(x, y)| {
                    PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            chart
                .draw_series(finite.map(|point| Circle::new(point, 3, colour.filled())))
                .map_err(said)?;
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(said)?;
        area.present().map_err(said)
    }
}
