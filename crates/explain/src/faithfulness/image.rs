//! Measures of heat maps over images, as in Chefer et al. (arXiv 2012.09838): perturbation,
//! insertion and deletion, and segmentation.
//!
//! Images are `channels · height · width` numbers, rows of rows, before they are normalised; heat
//! maps are `height · width` numbers.

use crate::{Error, Result};

/// Which pixels go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// Those of the highest heat: the positive test, in which a good map loses the class quickly.
    Highest,
    /// Those of the lowest heat: the negative test.
    Lowest,
}

/// Values over fractions of removed (or inserted) pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Fractions of the pixels, rising.
    pub fractions: Vec<f64>,
    /// What was measured at each.
    pub values: Vec<f64>,
}

impl Curve {
    /// The area under the curve by the trapezoid rule.
    pub fn area(&self) -> f64 {
        let points: Vec<_> = self.fractions.iter().zip(&self.values).collect();
        let below = |two: &[(&f64, &f64)]| match two {
            [(x, y), (next_x, next_y)] => (*next_x - *x) * (*y + *next_y) / 2.0,
            _ => 0.0,
        };
        points.windows(2).map(below).sum()
    }

    /// The mean of the values.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len().max(1) as f64
    }
}

/// Pixels by heat; of equal ones the earlier first.
pub fn order(heat: &[f64], first: First) -> Vec<usize> {
    let mut order: Vec<usize> = (0..heat.len()).collect();
    let of = |index: &usize| heat.get(*index).copied().unwrap_or(0.0);
    match first {
        First::Highest => order.sort_by(|a, b| of(b).total_cmp(&of(a))),
        First::Lowest => order.sort_by(|a, b| of(a).total_cmp(&of(b))),
    }
    order
}

/// `image` with some pixels set to 0 in every channel.
///
/// # Errors
/// When the image is no number of channels as large as the heat map.
pub fn without(image: &[f32], pixels: &[usize], area: usize) -> Result<Vec<f32>> {
    check_channels(image, area)?;
    let mut image = image.to_vec();
    for channel in image.chunks_mut(area) {
        for pixel in pixels {
            if let Some(value) = channel.get_mut(*pixel) {
                *value = 0.0;
            }
        }
    }
    Ok(image)
}

fn check_channels(image: &[f32], area: usize) -> Result<()> {
    if area > 0 && image.len().is_multiple_of(area) {
        return Ok(());
    }
    Err(Error::invalid(
        "length of an image",
        image.len(),
        format!("a multiple of {area}, the length of its heat map"),
    ))
}

/// An image with its heat map and its class.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    /// `channels · height · width`
    pub image: &'a [f32],
    /// `height · width`
    pub heat: &'a [f64],
    /// The class that is right, or whose probability is followed.
    pub class: usize,
}

/// Tenths of the pixels that the perturbation test removes.
const TENTHS: std::ops::RangeInclusive<usize> = 1..=9;

/// The perturbation test: for each fraction 0.1, …, 0.9, that many pixels (rounded down) of each
/// image are set to 0 and the share of images whose class scores highest is measured.
///
/// `predict` gets images and gives the scores of their classes.
///
/// # Errors
/// When a heat map does not fit its image, or `predict` fails.
pub fn perturbation<E: From<Error>>(
    examples: &[Example<'_>],
    first: First,
    mut predict: impl FnMut(&[Vec<f32>]) -> std::result::Result<Vec<Vec<f64>>, E>,
) -> std::result::Result<Curve, E> {
    let mut curve = Curve {
        fractions: Vec::new(),
        values: Vec::new(),
    };
    for tenths in TENTHS {
        let images = perturbed(examples, first, tenths)?;
        let scores = predict(&images)?;
        let right = examples
            .iter()
            .zip(&scores)
            .filter(|(example, scores)| is_highest(scores, example.class))
            .count();
        curve.fractions.push(tenths as f64 / 10.0);
        curve
            .values
            .push(right as f64 / examples.len().max(1) as f64);
    }
    Ok(curve)
}

fn perturbed(examples: &[Example<'_>], first: First, tenths: usize) -> Result<Vec<Vec<f32>>> {
    let one = |example: &Example<'_>| {
        let order = order(example.heat, first);
        let count = order.len() * tenths / 10;
        without(
            example.image,
            order.get(..count).unwrap_or(&order),
            order.len(),
        )
    };
    examples.iter().map(one).collect()
}

fn is_highest(scores: &[f64], class: usize) -> bool {
    let own = scores.get(class).copied();
    own.is_some_and(|own| {
        let others = scores
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != class);
        // Of equal scores the first class is predicted.
        others
            .into_iter()
            .all(|(other, score)| *score < own || (*score == own && other > class))
    })
}

/// Deletion: the mean probability of the class as the hottest pixels are set to 0, from none to
/// all in tenths. Insertion: the same from a blank image to the whole one.
///
/// `predict` gets images and gives the probabilities of their classes.
///
/// # Errors
/// As [`perturbation`].
pub fn deletion_and_insertion<E: From<Error>>(
    examples: &[Example<'_>],
    mut predict: impl FnMut(&[Vec<f32>]) -> std::result::Result<Vec<Vec<f64>>, E>,
) -> std::result::Result<(Curve, Curve), E> {
    let mut measure = |first: First, tenths_removed: usize| {
        let images = perturbed(examples, first, tenths_removed)?;
        let probabilities = predict(&images)?;
        let of_class = examples.iter().zip(&probabilities);
        let sum: f64 = of_class
            .map(|(example, all)| all.get(example.class).copied().unwrap_or(0.0))
            .sum();
        Ok::<_, E>(sum / examples.len().max(1) as f64)
    };
    let fractions: Vec<f64> = (0..=10).map(|tenths| f64::from(tenths) / 10.0).collect();
    let deleted = (0..=10).map(|tenths| measure(First::Highest, tenths));
    let deletion = deleted.collect::<std::result::Result<Vec<f64>, E>>()?;
    // What is left when the coldest are gone is what was inserted.
    let inserted = (0..=10).map(|tenths| measure(First::Lowest, 10 - tenths));
    let insertion = inserted.collect::<std::result::Result<Vec<f64>, E>>()?;
    let curve = |values| Curve {
        fractions: fractions.clone(),
        values,
    };
    Ok((curve(deletion), curve(insertion)))
}

/// A heat map scaled to `[0, 1]`; a flat one is 0.
pub fn min_max(heat: &[f64]) -> Vec<f64> {
    let least = heat.iter().copied().fold(f64::INFINITY, f64::min);
    let range = heat.iter().copied().fold(f64::NEG_INFINITY, f64::max) - least;
    let scale = |value: &f64| match range > 0.0 {
        true => (value - least) / range,
        false => 0.0,
    };
    heat.iter().map(scale).collect()
}

/// A map `[rows, columns]` enlarged `factor` times by bilinear interpolation between the centres
/// of its cells; beyond the outermost centres it is constant.
///
/// # Errors
/// When the map is not `rows · columns` long, or nothing is left of it.
///
/// ```
/// use lapidary_explain::faithfulness::image::enlarge;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// assert_eq!(enlarge(&[0.0, 1.0], 1, 2, 2)?, [0.0, 0.25, 0.75, 1.0].repeat(2));
/// # Ok(()) }
/// ```
pub fn enlarge(heat: &[f64], rows: usize, columns: usize, factor: usize) -> Result<Vec<f64>> {
    if heat.is_empty() || heat.len() != rows * columns || factor == 0 {
        return Err(Error::invalid(
            "length of a heat map",
            heat.len(),
            format!("{rows} rows of {columns}, enlarged at least once"),
        ));
    }
    let to = [rows * factor, columns * factor];
    Ok(interpolated(heat, [rows, columns], to))
}

/// A map `[rows, columns]` at another size, pixel centres aligned; beyond the outermost centres it
/// is level.
pub(crate) fn interpolated(
    heat: &[f64],
    [rows, columns]: [usize; 2],
    [to_rows, to_columns]: [usize; 2],
) -> Vec<f64> {
    // The two cells that a pixel lies between, and the weight of the second.
    let between = |pixel: usize, cells: usize, pixels: usize| {
        let last = cells.saturating_sub(1);
        let centre = (pixel as f64 + 0.5) * cells as f64 / pixels as f64 - 0.5;
        let centre = centre.clamp(0.0, last as f64);
        let cell = (centre as usize).min(last);
        (cell, (cell + 1).min(last), centre - cell as f64)
    };
    let at = |row: usize, column: usize| heat.get(row * columns + column).copied().unwrap_or(0.0);
    let mut image = Vec::with_capacity(to_rows.saturating_mul(to_columns));
    for y in 0..to_rows {
        let (above, below, down) = between(y, rows, to_rows);
        for x in 0..to_columns {
            let (left, right, across) = between(x, columns, to_columns);
            let on = |row| at(row, left) * (1.0 - across) + at(row, right) * across;
            image.push(on(above) * (1.0 - down) + on(below) * down);
        }
    }
    image
}

/// How heat maps segment images, over a data set.
#[derive(Clone, Debug, Default)]
pub struct Segmentation {
    /// `[background, foreground]`: pixels that both the map and the truth call so.
    both: [u64; 2],
    /// Pixels that either calls so.
    either: [u64; 2],
    right: u64,
    pixels: u64,
    precisions: Vec<f64>,
}

impl Segmentation {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one image: its heat, and where the object is.
    ///
    /// # Errors
    /// When the lengths differ.
    pub fn add(&mut self, heat: &[f64], truth: &[bool]) -> Result<()> {
        if heat.len() != truth.len() || heat.is_empty() {
            return Err(Error::invalid(
                "length of a heat map",
                heat.len(),
                format!("{}, as the truth, and not 0", truth.len()),
            ));
        }
        let soft = min_max(heat);
        let threshold = soft.iter().sum::<f64>() / soft.len() as f64;
        for (value, truth) in soft.iter().zip(truth) {
            let said = *value > threshold;
            self.pixels += 1;
            self.right += u64::from(said == *truth);
            for (class, (both, either)) in self.both.iter_mut().zip(&mut self.either).enumerate() {
                let is = |foreground: bool| usize::from(foreground) == class;
                *both += u64::from(is(said) && is(*truth));
                *either += u64::from(is(said) || is(*truth));
            }
        }
        let inverse: Vec<f64> = soft.iter().map(|value| 1.0 - value).collect();
        let background: Vec<bool> = truth.iter().map(|truth| !truth).collect();
        let classes = [
            average_precision(&soft, truth),
            average_precision(&inverse, &background),
        ];
        let there: Vec<f64> = classes.into_iter().flatten().collect();
        if !there.is_empty() {
            let mean = there.iter().sum::<f64>() / there.len() as f64;
            self.precisions.push(mean);
        }
        Ok(())
    }

    /// The share of pixels on the right side of each map's mean.
    pub fn pixel_accuracy(&self) -> f64 {
        self.right as f64 / self.pixels.max(1) as f64
    }

    /// Intersection over union, both accumulated over the data set, averaged over background and
    /// foreground.
    pub fn mean_intersection_over_union(&self) -> f64 {
        let each = self.both.iter().zip(&self.either);
        let sum: f64 = each
            .map(|(both, either)| *both as f64 / (*either).max(1) as f64)
            .sum();
        sum / 2.0
    }

    /// Average precision of the soft map for foreground and of its inverse for background,
    /// averaged over both and over images.
    pub fn mean_average_precision(&self) -> f64 {
        self.precisions.iter().sum::<f64>() / self.precisions.len().max(1) as f64
    }
}

/// `Σ_n (R_n − R_{n−1}) P_n` over the thresholds at which recall changes, pixels of equal score
/// together; none where there is nothing to find.
pub fn average_precision(scores: &[f64], truth: &[bool]) -> Option<f64> {
    let mut ranked: Vec<(f64, bool)> = scores.iter().copied().zip(truth.iter().copied()).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let total = ranked.iter().filter(|(_, truth)| *truth).count();
    if total == 0 {
        return None;
    }
    let (mut seen, mut found, mut precision) = (0, 0, 0.0);
    for tied in ranked.chunk_by(|a, b| a.0 == b.0) {
        let hits = tied.iter().filter(|(_, truth)| *truth).count();
        seen += tied.len();
        found += hits;
        precision += hits as f64 / total as f64 * found as f64 / seen as f64;
    }
    Some(precision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_trapezoids() {
        let curve = Curve {
            fractions: vec![0.1, 0.2, 0.4],
            values: vec![1.0, 0.5, 0.0],
        };
        assert!((curve.area() - (0.075 + 0.05)).abs() < 1e-12);
        assert!((curve.mean() - 0.5).abs() < 1e-12);
    }

    /// A model of two classes that says 1 while the pixel of value 9 is there.
    fn sees_nine(images: &[Vec<f32>]) -> Result<Vec<Vec<f64>>> {
        let one = |image: &Vec<f32>| match image.contains(&9.0) {
            true => vec![0.25, 0.75],
            false => vec![1.0, 0.0],
        };
        Ok(images.iter().map(one).collect())
    }

    /// Ten pixels of two channels: nine stands in the second channel at pixel 3.
    fn image() -> Vec<f32> {
        let mut image = vec![1.0; 20];
        image[13] = 9.0;
        image
    }

    fn heat(of_three: f64) -> Vec<f64> {
        let mut heat: Vec<f64> = (0..10).map(f64::from).collect();
        heat[3] = of_three;
        heat
    }

    #[test]
    fn perturbation_removes_the_highest_or_the_lowest_first() {
        let (image, hot, cold) = (image(), heat(20.0), heat(-1.0));
        let run = |heat: &[f64], first| {
            let example = Example {
                image: &image,
                heat,
                class: 1,
            };
            perturbation(&[example], first, sees_nine).unwrap()
        };
        let lost = run(&hot, First::Highest);
        assert_eq!(lost.fractions.len(), 9);
        assert_eq!(lost.values, [0.0; 9]);
        assert_eq!(run(&cold, First::Highest).values, [1.0; 9]);
        assert_eq!(run(&hot, First::Lowest).area(), 0.8);
        assert_eq!(run(&cold, First::Lowest).mean(), 0.0);
        // In its own place it is the fourth from below: gone from 0.4 on.
        let own = run(&heat(3.0), First::Lowest).values;
        assert_eq!(own, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let short = Example {
            image: &image[..7],
            heat: &hot,
            class: 1,
        };
        assert!(perturbation(&[short], First::Highest, sees_nine).is_err());
    }

    #[test]
    fn deletion_and_insertion_follow_the_probability() {
        let (image, hot) = (image(), heat(20.0));
        let example = Example {
            image: &image,
            heat: &hot,
            class: 1,
        };
        let (deletion, insertion) = deletion_and_insertion(&[example], sees_nine).unwrap();
        let mut expected = [0.0; 11];
        expected[0] = 0.75;
        assert_eq!(deletion.values, expected);
        let mut expected = [0.75; 11];
        expected[0] = 0.0;
        assert_eq!(insertion.values, expected);
        assert!((deletion.area() - 0.0375).abs() < 1e-12);
        assert!((insertion.area() - (0.75 - 0.0375)).abs() < 1e-12);
    }

    #[test]
    fn maps_are_enlarged_between_the_centres_of_their_cells() {
        let row = enlarge(&[0.0, 1.0], 1, 2, 2).unwrap();
        let expected = [0.0, 0.25, 0.75, 1.0];
        assert_eq!(row, [expected, expected].concat());
        let square = enlarge(&[0.0, 1.0, 2.0, 3.0], 2, 2, 2).unwrap();
        // Second row, second column: a quarter of the way in both directions.
        assert!((square[5] - (0.25 + 0.5)).abs() < 1e-12);
        assert_eq!(enlarge(&[1.0, 2.0], 2, 1, 1).unwrap(), [1.0, 2.0]);
        assert!(enlarge(&[1.0], 2, 1, 2).is_err());
        assert_eq!(min_max(&[2.0, 4.0, 3.0]), [0.0, 1.0, 0.5]);
        assert_eq!(min_max(&[2.0, 2.0]), [0.0, 0.0]);
    }

    #[test]
    fn average_precision_groups_equal_scores() {
        let found = average_precision(&[0.9, 0.8, 0.7, 0.1], &[true, false, true, false]).unwrap();
        assert!((found - (0.5 + 0.5 * 2.0 / 3.0)).abs() < 1e-12);
        let tied = average_precision(&[0.5, 0.5, 0.1], &[true, false, false]).unwrap();
        assert!((tied - 0.5).abs() < 1e-12);
        assert_eq!(average_precision(&[0.5], &[false]), None);
    }

    #[test]
    fn segmentation_accumulates_over_images() {
        let mut found = Segmentation::new();
        // Above the mean 0.5: the first two. One of them is the object.
        found
            .add(&[1.0, 1.0, 0.0, 0.0], &[true, false, false, false])
            .unwrap();
        assert!((found.pixel_accuracy() - 0.75).abs() < 1e-12);
        // Background 2 of 3, foreground 1 of 2.
        let iou = found.mean_intersection_over_union();
        assert!((iou - (2.0 / 3.0 + 0.5) / 2.0).abs() < 1e-12);
        // Foreground: one of two tied. Background: two of two, then three of four.
        let precision = (0.5 + (2.0 / 3.0 + 1.0 / 3.0 * 0.75)) / 2.0;
        assert!((found.mean_average_precision() - precision).abs() < 1e-12);
        found
            .add(&[3.0, 2.0, 1.0, 0.0], &[true, true, false, false])
            .unwrap();
        assert!((found.pixel_accuracy() - 7.0 / 8.0).abs() < 1e-12);
        let iou = found.mean_intersection_over_union();
        assert!((iou - (4.0 / 5.0 + 3.0 / 4.0) / 2.0).abs() < 1e-12);
        assert!((found.mean_average_precision() - (precision + 1.0) / 2.0).abs() < 1e-12);
        assert!(found.add(&[1.0], &[true, false]).is_err());
    }
}
