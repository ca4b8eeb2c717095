//! Resizing with the filters of image libraries: each output pixel is a weighted mean of the
//! input pixels under a filter that is stretched when the picture shrinks, along one axis after
//! the other.

use super::Picture;

/// Which filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// Keys' cubic with `a = −1/2` (Keys, 1981).
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Bicubic => 0.0,
        }
    }
}

impl Picture {
    /// The picture at another size, at least one pixel each way.
    pub fn resized(&self, width: usize, height: usize, filter: Filter) -> Self {
        let (width, height) = (width.max(1), height.max(1));
        // Rows of `width` pixels, then columns.
        let across = weights(self.width, width, filter);
        let mut narrowed = Vec::with_capacity(self.height * width * 3);
        for row in self.rgb.chunks_exact(self.width * 3) {
            for (start, weights) in &across {
                narrowed.extend(mixed(weights, |i| pixel(row, start + i)));
            }
        }
        let down = weights(self.height, height, filter);
        let mut rgb = Vec::with_capacity(height * width * 3);
        for (start, weights) in &down {
            for column in 0..width {
                rgb.extend(mixed(weights, |i| {
                    pixel(&narrowed, (start + i) * width + column)
                }));
            }
        }
        Self { width, height, rgb }
    }

    /// The middle `width × height` pixels; black where the picture is smaller.
    pub fn centre(&self, width: usize, height: usize) -> Self {
        let offset = |from: usize, to: usize| (from as isize - to as isize).div_euclid(2);
        let (left, top) = (offset(self.width, width), offset(self.height, height));
        let mut rgb = Vec::with_capacity(height * width * 3);
        for row in 0..height {
            for column in 0..width {
                let x = usize::try_from(column as isize + left);
                let y = usize::try_from(row as isize + top);
                rgb.extend(match (x, y) {
                    (Ok(x), Ok(y)) if x < self.width && y < self.height => {
                        pixel(&self.rgb, y * self.width + x)
                    }
                    _ => [0; 3],
                });
            }
        }
        Self { width, height, rgb }
    }
}

/// For each output pixel the first input pixel under the filter, and the weights from there on.
fn weights(from: usize, to: usize, filter: Filter) -> Vec<(usize, Vec<f64>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let reach = filter.support() * stretch;
    (0..to)
        .map(|index| {
            let centre = (index as f64 + 0.5) * scale;
            let start = (centre - reach + 0.5).max(0.0) as usize;
            let end = ((centre + reach + 0.5) as usize).min(from);
            let raw: Vec<f64> = (start..end)
                .map(|i| filter.weight((i as f64 + 0.5 - centre) / stretch))
                .collect();
            let total: f64 = raw.iter().sum();
            (
                start,
                raw.into_iter().map(|weight| weight / total).collect(),
            )
        })
        .collect()
}

fn mixed(weights: &[f64], pixel: impl Fn(usize) -> [u8; 3]) -> [u8; 3] {
    let mut sums = [0.0; 3];
    for (index, weight) in weights.iter().enumerate() {
        for (sum, channel) in sums.iter_mut().zip(pixel(index)) {
            *sum += weight * f64::from(channel);
        }
    }
    sums.map(|sum| sum.round().clamp(0.0, 255.0) as u8)
}

fn pixel(rgb: &[u8], index: usize) -> [u8; 3] {
    match rgb.get(3 * index..3 * index + 3) {
        Some([red, green, blue]) => [*red, *green, *blue],
        _ => [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(width: usize, height: usize) -> Picture {
        let at = |i: usize| ((i * 37 + (i * i) % 11) % 256) as u8;
        Picture {
            width,
            height,
            rgb: (0..width * height * 3).map(at).collect(),
        }
    }

    #[test]
    fn the_same_size_and_a_level_picture_stay_as_they_are() {
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            assert_eq!(ramp(5, 4).resized(5, 4, filter), ramp(5, 4));
            let level = Picture {
                width: 7,
                height: 3,
                rgb: vec![90; 63],
            };
            let other = level.resized(4, 9, filter);
            assert_eq!(other.rgb, vec![90; 4 * 9 * 3]);
        }
    }

    /// `torch.nn.functional.interpolate(.., antialias=True)` of the same numbers.
    #[test]
    fn filters_are_those_of_image_libraries() {
        let picture = Picture {
            width: 4,
            height: 1,
            rgb: [0, 60, 120, 240].iter().flat_map(|v| [*v; 3]).collect(),
        };
        for (filter, expected) in [
            (Filter::Bilinear, &[43u8, 163][..]),
            (Filter::Bilinear, &[18, 90, 204]),
            (Filter::Bilinear, &[0, 21, 56, 90, 129, 197, 240]),
            (Filter::Bicubic, &[33, 172]),
            (Filter::Bicubic, &[11, 88, 214]),
            (Filter::Bicubic, &[0, 16, 55, 86, 127, 206, 250]),
        ] {
            let wide = picture.resized(expected.len(), 1, filter);
            let found: Vec<u8> = wide.rgb.iter().copied().step_by(3).collect();
            assert_eq!(found, expected, "{filter:?}");
            // The other axis likewise.
            let upright = Picture {
                width: 1,
                height: 4,
                ..picture.clone()
            };
            assert_eq!(upright.resized(1, expected.len(), filter).rgb, wide.rgb);
        }
    }

    #[test]
    fn the_centre_is_cut_out_or_padded() {
        let picture = ramp(4, 2);
        let cut = picture.centre(2, 2);
        assert_eq!(cut.rgb[..6], picture.rgb[3..9]);
        let padded = picture.centre(6, 2);
        assert_eq!(padded.rgb[..3], [0; 3]);
        assert_eq!(padded.rgb[3..6], picture.rgb[..3]);
    }
}
