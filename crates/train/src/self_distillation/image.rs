//! Images in memory, and parts of them at another size.

use crate::{Error, Result};

/// An image of `[channels, height, width]` numbers, as a model takes them.
///
/// ```
/// use lapidary_train::self_distillation::Image;
///
/// assert!(Image::new([1, 2, 2], vec![0.0, 1.0, 2.0, 3.0]).is_ok());
/// assert!(Image::new([1, 2, 2], vec![0.0]).is_err());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    shape: [usize; 3],
    pixels: Vec<f32>,
}

/// Part of an image in pixels, whose corners may lie between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// The upper edge.
    pub top: f64,
    /// The left edge.
    pub left: f64,
    /// From the upper edge to the lower.
    pub height: f64,
    /// From the left edge to the right.
    pub width: f64,
}

impl Image {
    /// An image of `shape` `[channels, height, width]`, row by row, channel after channel.
    ///
    /// # Errors
    /// When there are more or fewer numbers, or none.
    pub fn new(shape: [usize; 3], pixels: Vec<f32>) -> Result<Self> {
        let count = shape
            .iter()
            .try_fold(1usize, |count, side| count.checked_mul(*side));
        if pixels.is_empty() || count != Some(pixels.len()) {
            return Err(Error::Tensor {
                name: "image".to_owned(),
                detail: format!(
                    "{} numbers are not [channels, height, width] = {shape:?}, of one at least",
                    pixels.len()
                ),
            });
        }
        Ok(Self { shape, pixels })
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// All of it.
    pub fn whole(&self) -> Window {
        let [_, height, width] = self.shape;
        Window {
            top: 0.0,
            left: 0.0,
            height: height as f64,
            width: width as f64,
        }
    }

    /// What is in `window`, `[channels, height, width]` of another `height` and `width`: linear between the
    /// centres of pixels, level beyond the outermost.
    pub fn resampled(&self, window: Window, [height, width]: [usize; 2]) -> Vec<f32> {
        let [channels, from_height, from_width] = self.shape;
        let rows = places(window.top, window.height, height, from_height);
        let columns = places(window.left, window.width, width, from_width);
        let mut found = Vec::with_capacity(channels * height * width);
        for channel in self.pixels.chunks_exact(from_height * from_width) {
            for row in &rows {
                let [above, below] = row
                    .beside
                    .map(|at| &channel[at * from_width..][..from_width]);
                for column in &columns {
                    let [left, right] = column.beside;
                    let upper = mixed(above[left], above[right], column.share);
                    let lower = mixed(below[left], below[right], column.share);
                    found.push(mixed(upper, lower, row.share));
                }
            }
        }
        found
    }
}

/// Two pixels that a place lies between, and the share of the second.
struct Place {
    beside: [usize; 2],
    share: f32,
}

/// Where the centres of `count` pixels lie that divide `length` from `start`, among `from` pixels, one at
/// least.
fn places(start: f64, length: f64, count: usize, from: usize) -> Vec<Place> {
    let last = from - 1;
    (0..count)
        .map(|pixel| {
            let at = start + (pixel as f64 + 0.5) * (length / count as f64) - 0.5;
            let at = at.clamp(0.0, last as f64);
            let before = (at as usize).min(last);
            Place {
                beside: [before, (before + 1).min(last)],
                share: (at - before as f64) as f32,
            }
        })
        .collect()
}

fn mixed(a: f32, b: f32, share: f32) -> f32 {
    a + share * (b - a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_at_its_own_size_is_the_image() {
        let pixels: Vec<f32> = (0..2 * 3 * 5).map(|i| (i * i % 7) as f32).collect();
        let image = Image::new([2, 3, 5], pixels.clone()).unwrap();
        assert_eq!(image.resampled(image.whole(), [3, 5]), pixels);
    }

    #[test]
    fn a_ramp_stays_a_ramp_between_the_outermost_centres() {
        let image = Image::new([1, 1, 4], vec![0.0, 1.0, 2.0, 3.0]).unwrap();
        // Two pixels for each: centres at −¼, ¼, ¾, … and level beyond.
        let found = image.resampled(image.whole(), [2, 8]);
        let row = [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0];
        assert_eq!(found, [row, row].concat());
        // The second and third pixel alone.
        let window = Window {
            left: 1.0,
            width: 2.0,
            ..image.whole()
        };
        assert_eq!(image.resampled(window, [1, 2]), [1.0, 2.0]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        assert!(Image::new([0, 2, 2], Vec::new()).is_err());
        assert!(Image::new([usize::MAX, 2, 2], vec![0.0; 4]).is_err());
    }
}
