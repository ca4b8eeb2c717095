//! `preprocessor_config.json`: how a model wants its pictures.

use std::path::Path;

use super::Picture;
use super::resize::Filter;
use anyhow::{Context, Result, bail, ensure};
use lapidary_kernels::{Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

const FILE: &str = "preprocessor_config.json";

/// Largest preprocessor config.
const CONFIG_BYTES: u64 = 1 << 20;

/// Longest side that a config may ask for.
const MAX_SIDE: usize = 1 << 14;

/// From a picture to pixel values.
#[derive(Clone, Debug)]
pub struct Preprocessing {
    resize: Option<Size>,
    filter: Filter,
    crop: Option<[usize; 2]>,
    scale: f64,
    normalise: Option<([f64; 3], [f64; 3])>,
    /// What the model takes: height and width.
    image: [usize; 2],
    /// Whether the model said so itself.
    declared: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Size {
    /// The shorter side becomes so long.
    Shortest(usize),
    /// Height and width.
    Exact([usize; 2]),
}

/// The fields that are read, under their names in the file.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    do_resize: Option<bool>,
    size: Option<Value>,
    resample: Option<u32>,
    do_center_crop: Option<bool>,
    crop_size: Option<Value>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<[f64; 3]>,
    image_std: Option<[f64; 3]>,
}

/// Means and deviations of CLIP's training images.
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_DEVIATION: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

impl Preprocessing {
    /// What the model in `directory`, whose images have the height and width `image`, says; as
    /// CLIP where it says nothing.
    pub fn of(directory: &Path, image: [usize; 2]) -> Result<Self> {
        let path = directory.join(FILE);
        if !path.is_file() {
            return Ok(Self {
                declared: false,
                ..Self::new(Config::default(), image)?
            });
        }
        let text = lapidary_model::files::read_text(&path, CONFIG_BYTES)?;
        let config = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a preprocessor config", path.display()))?;
        Self::new(config, image).with_context(|| format!("{}", path.display()))
    }

    fn new(config: Config, image: [usize; 2]) -> Result<Self> {
        let filter = match config.resample.unwrap_or(3) {
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            other => bail!("resample is {other}, but must be 2 (bilinear) or 3 (bicubic)"),
        };
        let resize = match (config.do_resize.unwrap_or(true), config.size) {
            (false, _) => None,
            (true, Some(size)) => Some(self::size("size", &size)?),
            (true, None) => Some(Size::Shortest(image[0].min(image[1]))),
        };
        let crop = match (config.do_center_crop.unwrap_or(true), config.crop_size) {
            (false, _) => None,
            (true, None) => Some(image),
            (true, Some(value)) => Some(match size("crop_size", &value)? {
                Size::Shortest(side) => [side, side],
                Size::Exact(sides) => sides,
            }),
        };
        let scale = match config.do_rescale.unwrap_or(true) {
            true => config.rescale_factor.unwrap_or(1.0 / 255.0),
            false => 1.0,
        };
        ensure!(
            scale.is_finite(),
            "rescale_factor is {scale}, but must be finite"
        );
        let normalise = match config.do_normalize.unwrap_or(true) {
            true => Some((
                config.image_mean.unwrap_or(CLIP_MEAN),
                config.image_std.unwrap_or(CLIP_DEVIATION),
            )),
            false => None,
        };
        if let Some((mean, deviation)) = normalise {
            let valid = mean.iter().all(|m| m.is_finite())
                && deviation.iter().all(|d| d.is_finite() && *d > 0.0);
            ensure!(
                valid,
                "image_mean and image_std are {mean:?} and {deviation:?}, but must be finite, and \
                 the latter above 0"
            );
        }
        Ok(Self {
            resize,
            filter,
            crop,
            scale,
            normalise,
            image,
            declared: true,
        })
    }

    /// How pictures are prepared, in words.
    pub fn note(&self) -> &'static str {
        match self.declared {
            true => "pictures prepared as preprocessor_config.json says",
            false => "pictures prepared as for CLIP: the model has no preprocessor_config.json",
        }
    }

    /// Pixel values `[1, 3, height, width]`.
    ///
    /// # Errors
    /// When what comes out is not of the size that the model takes.
    pub fn pixels(&self, picture: &Picture, device: &Device) -> Result<Tensor> {
        let resized = match self.resize {
            None => picture.clone(),
            Some(size) => {
                let [height, width] = size.of(picture)?;
                picture.resized(width, height, self.filter)
            }
        };
        let cut = match self.crop {
            Some([height, width]) => resized.centre(width, height),
            None => resized,
        };
        let [height, width] = self.image;
        ensure!(
            [cut.height, cut.width] == self.image,
            "a picture of {} by {} becomes {} by {}, but the model takes {height} by {width} \
             (height by width)",
            picture.height,
            picture.width,
            cut.height,
            cut.width
        );
        let (mean, deviation) = self.normalise.unwrap_or(([0.0; 3], [1.0; 3]));
        let mut values = Vec::with_capacity(3 * height * width);
        for (channel, (mean, deviation)) in mean.iter().zip(deviation).enumerate() {
            let of_channel = cut.rgb.iter().skip(channel).step_by(3);
            let value = |v: &u8| ((f64::from(*v) * self.scale - mean) / deviation) as f32;
            values.extend(of_channel.map(value));
        }
        Ok(Tensor::from_vec(values, (1, 3, height, width), device)?)
    }
}

impl Size {
    /// Height and width that a picture is resized to.
    fn of(self, picture: &Picture) -> Result<[usize; 2]> {
        let sides = match self {
            Self::Exact(sides) => sides,
            Self::Shortest(side) => {
                let shortest = picture.height.min(picture.width).max(1);
                [picture.height, picture.width].map(|long| long * side / shortest)
            }
        };
        ensure!(
            sides.iter().all(|side| (1..=MAX_SIDE).contains(side)),
            "the picture would be resized to {} by {}, but both must be between 1 and {MAX_SIDE}",
            sides[0],
            sides[1]
        );
        Ok(sides)
    }
}

/// A number, `{"shortest_edge": n}`, or `{"height": h, "width": w}`.
fn size(name: &str, value: &Value) -> Result<Size> {
    let side = |value: &Value| value.as_u64().map(|side| side as usize);
    let found = match value {
        Value::Object(fields) => match (
            fields.get("shortest_edge").and_then(side),
            fields.get("height").and_then(side),
            fields.get("width").and_then(side),
        ) {
            (Some(shortest), ..) => Some(Size::Shortest(shortest)),
            (None, Some(height), Some(width)) => Some(Size::Exact([height, width])),
            _ => None,
        },
        number => side(number).map(Size::Shortest),
    };
    let sides = match found {
        Some(Size::Shortest(side)) => [side, side],
        Some(Size::Exact(sides)) => sides,
        None => [0, 0],
    };
    match found {
        Some(size) if sides.iter().all(|side| (1..=MAX_SIDE).contains(side)) => Ok(size),
        _ => bail!(
            "{name} is {value}, but must be a number, shortest_edge, or height and width, between \
             1 and {MAX_SIDE}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Result<Preprocessing> {
        Preprocessing::new(serde_json::from_str(json).unwrap(), [4, 4])
    }

    #[test]
    fn a_picture_becomes_what_the_model_takes() {
        let picture = Picture {
            width: 9,
            height: 6,
            rgb: (0..9 * 6).flat_map(|_| [255, 0, 51]).collect(),
        };
        let of = config(
            r#"{"size": {"shortest_edge": 4}, "crop_size": 4, "image_mean": [0.5, 0.5, 0.0],
                "image_std": [0.5, 0.25, 1.0]}"#,
        );
        let pixels = of.unwrap().pixels(&picture, &Device::Cpu).unwrap();
        assert_eq!(pixels.dims(), [1, 3, 4, 4]);
        let values = pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (channel, expected) in [1.0, -2.0, 0.2].into_iter().enumerate() {
            assert!((values[channel * 16 + 5] - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (json, said) in [
            (r#"{"size": {"height": 0, "width": 3}}"#, "size"),
            (r#"{"size": "large"}"#, "size"),
            (r#"{"resample": 9}"#, "resample"),
            (r#"{"image_std": [0, 1, 1]}"#, "image_std"),
            (r#"{"crop_size": 999999999}"#, "crop_size"),
        ] {
            let error = config(json).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let tall = Picture {
            width: 1,
            height: 1 << 16,
            rgb: vec![0; 3 << 16],
        };
        let error = config("{}").unwrap().pixels(&tall, &Device::Cpu);
        assert!(error.unwrap_err().to_string().contains("resized"));
    }
}
