//! Several views of each image: two that show much of it, for teacher and student, and some that show
//! little, for the student alone.

use std::ops::Range;

use lapidary_kernels::{Device, Tensor};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::image::{Image, Window};
use crate::error::engine;
use crate::{Error, Generator, Result};

/// Views that teacher and student both see.
pub const GLOBAL: usize = 2;

/// Longest side over shortest of what a view shows.
const ELONGATION: f64 = 4.0 / 3.0;

/// Most views of an image that show little.
const MOST: usize = 64;

/// How views are cut out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CropSpec {
    /// Least and largest share of the image that each of the two large views shows.
    pub global: [f64; 2],
    /// The same of the small ones.
    pub local: [f64; 2],
    /// How many small ones there are.
    pub locals: usize,
    /// Height and width of the small ones, in pixels, for a model that reads images of several sizes
    /// (`input.resized`); those of the model's images when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_size: Option<[usize; 2]>,
    /// Probability with which a view is turned over, left to right.
    pub mirrored: f64,
    /// How far contrast is from 1 and brightness from 0 at most, each view by itself.
    pub jitter: f64,
}

impl Default for CropSpec {
    fn default() -> Self {
        Self {
            global: [0.4, 1.0],
            local: [0.05, 0.4],
            locals: 6,
            local_size: None,
            mirrored: 0.5,
            jitter: 0.4,
        }
    }
}

impl CropSpec {
    /// Refuses shares and probabilities that are none.
    ///
    /// # Errors
    /// Names the setting, what it is and what it could be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name, found: String, expected| {
            Err(Error::Setting {
                name,
                found,
                expected,
            })
        };
        for (name, [least, most]) in [
            ("self_distillation.crops.global", self.global),
            ("self_distillation.crops.local", self.local),
        ] {
            if !(least > 0.0 && least <= most && most <= 1.0) {
                let expected = "two rising shares above 0 and at most 1";
                return wrong(name, format!("[{least}, {most}]"), expected);
            }
        }
        if self.locals > MOST {
            let name = "self_distillation.crops.locals";
            return wrong(name, self.locals.to_string(), "at most 64");
        }
        if self.locals == 0 {
            let expected = "absent where there are no small views";
            let [least, most] = self.local;
            if self.local != Self::default().local {
                let found = format!("[{least}, {most}]");
                return wrong("self_distillation.crops.local", found, expected);
            }
            if let Some(size) = self.local_size {
                let name = "self_distillation.crops.local_size";
                return wrong(name, format!("{size:?}"), expected);
            }
        }
        for (name, share) in [
            ("self_distillation.crops.mirrored", self.mirrored),
            ("self_distillation.crops.jitter", self.jitter),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return wrong(name, share.to_string(), "between 0 and 1");
            }
        }
        Ok(())
    }

    /// Views of an image.
    pub fn count(&self) -> usize {
        GLOBAL + self.locals
    }

    /// Every view of each image, those of one size together, `[views, images, channels, height, width]`: the large
    /// ones first, at `size` `[height, width]`, and the small ones with them unless they have a
    /// [size of their own](Self::local_size).
    ///
    /// # Errors
    /// When the images have different channels, or there is none.
    pub fn views(
        &self,
        images: &[&Image],
        size: [usize; 2],
        generator: &mut Generator,
    ) -> Result<Vec<Tensor>> {
        match self.local_size.filter(|local| *local != size) {
            Some(local) if self.locals > 0 => Ok(vec![
                self.some(0..GLOBAL, images, size, generator)?,
                self.some(GLOBAL..self.count(), images, local, generator)?,
            ]),
            _ => Ok(vec![self.some(0..self.count(), images, size, generator)?]),
        }
    }

    /// Some of the views, all at one size.
    fn some(
        &self,
        views: Range<usize>,
        images: &[&Image],
        size: [usize; 2],
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let channels = images.first().map_or(0, |image| image.shape()[0]);
        let [height, width] = size;
        if channels == 0 || images.iter().any(|image| image.shape()[0] != channels) {
            return Err(Error::Tensor {
                name: "images".to_owned(),
                detail: "one at least is needed, and all with as many channels".to_owned(),
            });
        }
        let count = views.len();
        let mut pixels = Vec::with_capacity(count * images.len() * channels * height * width);
        for view in views {
            let shares = match view < GLOBAL {
                true => self.global,
                false => self.local,
            };
            for image in images {
                pixels.extend(self.view(image, shares, size, generator));
            }
        }
        let shape = vec![count, images.len(), channels, height, width];
        engine(Tensor::from_vec(pixels, shape, &Device::Cpu))
    }

    /// One view `[channels, height, width]`.
    fn view(
        &self,
        image: &Image,
        shares: [f64; 2],
        size: [usize; 2],
        generator: &mut Generator,
    ) -> Vec<f32> {
        let mut pixels = image.resampled(window(image, shares, generator), size);
        if generator.random::<f64>() < self.mirrored {
            pixels
                .chunks_exact_mut(size[1].max(1))
                .for_each(<[f32]>::reverse);
        }
        let mut within = || (self.jitter * (2.0 * generator.random::<f64>() - 1.0)) as f32;
        let (contrast, brightness) = (1.0 + within(), within());
        for pixel in &mut pixels {
            *pixel = contrast * *pixel + brightness;
        }
        pixels
    }
}

/// A part of an image of a share of it between two, and of a random form: the logarithm of width over
/// height, against that of the image, is uniform.
fn window(image: &Image, [least, most]: [f64; 2], generator: &mut Generator) -> Window {
    let all = image.whole();
    let share = least + (most - least) * generator.random::<f64>();
    let form = ELONGATION
        .powf(2.0 * generator.random::<f64>() - 1.0)
        .sqrt();
    // What is too long for the image is as long as it.
    let height = all.height * (share.sqrt() / form).min(1.0);
    let width = all.width * (share.sqrt() * form).min(1.0);
    Window {
        top: (all.height - height) * generator.random::<f64>(),
        left: (all.width - width) * generator.random::<f64>(),
        height,
        width,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator;

    fn image(phase: usize) -> Image {
        let pixels = (0..3 * 6 * 8).map(|i| ((i * 5 + phase) % 11) as f32);
        Image::new([3, 6, 8], pixels.collect()).unwrap()
    }

    fn numbers(views: &Tensor) -> Vec<f32> {
        views.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Views that are all of one size.
    fn only(spec: &CropSpec, images: &[&Image], size: [usize; 2], seed: u64) -> Tensor {
        let mut views = spec.views(images, size, &mut generator(seed)).unwrap();
        assert_eq!(views.len(), 1);
        views.remove(0)
    }

    /// Small views of a size of their own show what they would show at the other: level ones the same level.
    #[test]
    fn small_views_may_be_small_images() {
        let image = image(3);
        let spec = |local_size| CropSpec {
            locals: 3,
            local_size,
            ..CropSpec::default()
        };
        let apart = spec(Some([2, 4]));
        let views = apart.views(&[&image; 5], [6, 8], &mut generator(2));
        let views = views.unwrap();
        let shapes: Vec<&[usize]> = views.iter().map(Tensor::dims).collect();
        assert_eq!(shapes, [&[GLOBAL, 5, 3, 6, 8], &[3, 5, 3, 2, 4]]);
        // The large ones are what they are beside small ones of their size.
        let together = only(&spec(None), &[&image; 5], [6, 8], 2);
        let large = together.narrow(0, 0, GLOBAL).unwrap();
        assert_eq!(numbers(&views[0]), numbers(&large));
        // Said twice, it is said once.
        let same = only(&spec(Some([6, 8])), &[&image; 5], [6, 8], 2);
        assert_eq!(numbers(&same), numbers(&together));
        let none = CropSpec {
            locals: 0,
            ..spec(Some([2, 4]))
        };
        assert_eq!(only(&none, &[&image], [6, 8], 2).dims()[0], GLOBAL);
    }

    #[test]
    fn windows_lie_inside_and_show_the_share_that_is_asked_for() {
        let image = image(0);
        let mut random = generator(4);
        for _ in 0..200 {
            let window = window(&image, [0.2, 0.5], &mut random);
            assert!(window.top >= 0.0 && window.top + window.height <= 6.0 + 1e-12);
            assert!(window.left >= 0.0 && window.left + window.width <= 8.0 + 1e-12);
            // √0.5 · √(4/3) < 1, so that none is cut off.
            let share = window.height * window.width / 48.0;
            assert!((0.2 - 1e-12..=0.5 + 1e-12).contains(&share), "{share}");
            let form = window.width / window.height / (8.0 / 6.0);
            assert!((0.75 - 1e-12..=4.0 / 3.0 + 1e-12).contains(&form), "{form}");
        }
    }

    #[test]
    fn views_are_laid_out_by_view_and_then_by_image() {
        let spec = CropSpec {
            locals: 1,
            jitter: 0.0,
            ..CropSpec::default()
        };
        let level = |number: f32| Image::new([3, 6, 8], vec![number; 3 * 6 * 8]).unwrap();
        let images = [level(1.0), level(-2.0)];
        let all: Vec<&Image> = images.iter().collect();
        let views = only(&spec, &all, [4, 4], 1);
        assert_eq!(views.dims(), [3, 2, 3, 4, 4]);
        for (place, view) in numbers(&views).chunks(3 * 4 * 4).enumerate() {
            let expected = [1.0, -2.0][place % 2];
            assert!(view.iter().all(|pixel| *pixel == expected));
        }
    }

    #[test]
    fn views_follow_from_their_seed() {
        let image = image(0);
        let of = |seed| {
            let spec = CropSpec::default();
            numbers(&only(&spec, &[&image], [6, 8], seed))
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    /// Of an image that is the same everywhere, views are too: contrast and brightness alone differ.
    #[test]
    fn a_level_image_has_level_views() {
        let level = Image::new([1, 4, 4], vec![2.0; 16]).unwrap();
        let spec = CropSpec {
            jitter: 0.25,
            ..CropSpec::default()
        };
        let views = only(&spec, &[&level], [4, 4], 9);
        let numbers = numbers(&views);
        let mut levels = Vec::new();
        for view in numbers.chunks(16) {
            assert!(view.iter().all(|pixel| *pixel == view[0]));
            assert!((view[0] - 2.0).abs() <= 0.75 + 1e-6);
            levels.push(view[0]);
        }
        assert_eq!(levels.len(), spec.count());
        assert!(levels.windows(2).any(|pair| pair[0] != pair[1]));
    }

    /// An image that grows from left to right grows to the left where it is turned over.
    #[test]
    fn mirrored_views_are_turned_over() {
        let ramp = Image::new([1, 1, 8], (0..8).map(|i| i as f32).collect()).unwrap();
        for (mirrored, rises) in [(0.0, true), (1.0, false)] {
            let spec = CropSpec {
                mirrored,
                jitter: 0.0,
                ..CropSpec::default()
            };
            let views = only(&spec, &[&ramp], [1, 8], 5);
            for view in numbers(&views).chunks(8) {
                assert_eq!(view[7] > view[0], rises);
            }
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let good = CropSpec::default();
        assert!(good.validate().is_ok());
        for (bad, name) in [
            (
                CropSpec {
                    global: [0.5, 0.4],
                    ..good.clone()
                },
                "crops.global is [0.5, 0.4]",
            ),
            (
                CropSpec {
                    local: [0.0, 0.4],
                    ..good.clone()
                },
                "crops.local is [0, 0.4]",
            ),
            (
                CropSpec {
                    locals: 65,
                    ..good.clone()
                },
                "crops.locals is 65",
            ),
            (
                CropSpec {
                    mirrored: f64::NAN,
                    ..good.clone()
                },
                "crops.mirrored is NaN",
            ),
            (
                CropSpec {
                    jitter: -0.1,
                    ..good.clone()
                },
                "crops.jitter is -0.1",
            ),
            (
                CropSpec {
                    locals: 0,
                    local: [0.1, 0.4],
                    ..good.clone()
                },
                "crops.local is [0.1, 0.4], but must be absent",
            ),
            (
                CropSpec {
                    locals: 0,
                    local_size: Some([2, 2]),
                    ..good.clone()
                },
                "crops.local_size is [2, 2], but must be absent",
            ),
        ] {
            let said = bad.validate().unwrap_err().to_string();
            assert!(said.contains(name), "{said}");
        }
        let without = CropSpec {
            locals: 0,
            ..good.clone()
        };
        assert!(without.validate().is_ok());
        let odd = Image::new([1, 2, 2], vec![0.0; 4]).unwrap();
        let mixed = good.views(&[&image(0), &odd], [2, 2], &mut generator(0));
        assert!(mixed.is_err());
        assert!(good.views(&[], [2, 2], &mut generator(0)).is_err());
    }
}
