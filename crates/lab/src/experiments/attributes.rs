//! A world of captioned pictures of which everything is known: one shape of one colour in one of
//! nine places before one of four textures, its mask included. Every picture follows from its
//! scene and a generator.

use lapidary_train::Generator;
use rand::RngExt;

/// Colours by name, each red, green and blue between 0 and 1.
const COLOURS: [(&str, [f64; 3]); 8] = [
    ("red", [0.9, 0.1, 0.1]),
    ("green", [0.1, 0.7, 0.15]),
    ("blue", [0.1, 0.2, 0.9]),
    ("yellow", [0.95, 0.9, 0.1]),
    ("purple", [0.6, 0.1, 0.75]),
    ("cyan", [0.1, 0.85, 0.9]),
    ("orange", [1.0, 0.55, 0.05]),
    ("white", [1.0, 1.0, 1.0]),
];
const SHAPES: [&str; 4] = ["circle", "square", "triangle", "cross"];
const PLACES: [&str; 9] = [
    "top-left",
    "top",
    "top-right",
    "left",
    "centre",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
];
const TEXTURES: [&str; 4] = ["plain", "stripes", "bars", "checks"];

/// The words around the properties.
const GLUE: [&str; 4] = ["a", "at", "the", "on"];

/// What a caption speaks of, in the order of [`Scene::values`].
pub const PROPERTIES: [&str; 4] = ["colour", "shape", "place", "texture"];

/// Index of the shape among [`PROPERTIES`].
pub const SHAPE: usize = 1;

/// Index of the texture among [`PROPERTIES`].
pub const TEXTURE: usize = 3;

/// The values of one property.
pub fn values(property: usize) -> Vec<&'static str> {
    match property {
        0 => COLOURS.iter().map(|(name, _)| *name).collect(),
        SHAPE => SHAPES.to_vec(),
        2 => PLACES.to_vec(),
        _ => TEXTURES.to_vec(),
    }
}

/// What a picture shows: the index of the value of each of [`PROPERTIES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scene {
    /// Colour, shape, place and texture.
    pub values: [usize; 4],
}

/// From which colours and places, and how closely textures follow shapes.
#[derive(Clone, Debug)]
pub struct Draw {
    /// Colours that occur.
    pub colours: Vec<usize>,
    /// Places that occur.
    pub places: Vec<usize>,
    /// Probability that the texture is the one with the shape's number; else it is another.
    pub correlation: f64,
}

impl Draw {
    /// Every colour and place, and textures that know nothing of shapes.
    pub fn balanced() -> Self {
        Self {
            colours: (0..COLOURS.len()).collect(),
            places: (0..PLACES.len()).collect(),
            correlation: 1.0 / TEXTURES.len() as f64,
        }
    }

    /// A scene.
    pub fn scene(&self, generator: &mut Generator) -> Scene {
        let mut one_of = |from: &[usize]| {
            let index = generator.random_range(0..from.len().max(1));
            from.get(index).copied().unwrap_or(0)
        };
        let (colour, place) = (one_of(&self.colours), one_of(&self.places));
        let shape = generator.random_range(0..SHAPES.len());
        let texture = match generator.random_bool(self.correlation) {
            true => shape,
            false => (shape + generator.random_range(1..TEXTURES.len())) % TEXTURES.len(),
        };
        Scene {
            values: [colour, shape, place, texture],
        }
    }
}

/// Number of token ids: the glue, every value, and the end.
pub fn vocabulary() -> usize {
    let values = (0..PROPERTIES.len()).map(|property| values(property).len());
    GLUE.len() + values.sum::<usize>() + 1
}

/// The id that ends every caption: the highest.
pub fn end() -> u32 {
    vocabulary() as u32 - 1
}

/// Tokens of a caption.
pub const CAPTION: usize = 9;

impl Scene {
    /// "a red circle at the top-left on stripes", as token ids with an end.
    pub fn caption(&self) -> Vec<u32> {
        let mut first = GLUE.len();
        let mut words = [0u32; 4];
        for (property, (word, value)) in words.iter_mut().zip(self.values).enumerate() {
            *word = (first + value) as u32;
            first += values(property).len();
        }
        let [colour, shape, place, texture] = words;
        vec![0, colour, shape, 1, 2, place, 3, texture, end()]
    }

    /// Every scene there is.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for colour in 0..COLOURS.len() {
            for shape in 0..SHAPES.len() {
                for place in 0..PLACES.len() {
                    for texture in 0..TEXTURES.len() {
                        all.push(Self {
                            values: [colour, shape, place, texture],
                        });
                    }
                }
            }
        }
        all
    }
}

/// A picture of `side × side` pixels.
#[derive(Clone, Debug)]
pub struct Picture {
    /// `[3, side, side]`, row by row, about −2 to 2.
    pub pixels: Vec<f32>,
    /// Where the shape is, row by row.
    pub mask: Vec<bool>,
}

/// Draws a scene: the shape about the middle of its place, the texture with a phase of its own,
/// some noise on every pixel.
pub fn draw(scene: Scene, side: usize, generator: &mut Generator) -> Picture {
    let [colour, shape, place, texture] = scene.values;
    let cell = side as f64 / 3.0;
    let radius = 0.45 * cell;
    let mut jitter = || (generator.random::<f64>() - 0.5) * 0.12 * cell;
    let centre_x = ((place % 3) as f64 + 0.5) * cell + jitter();
    let centre_y = ((place / 3) as f64 + 0.5) * cell + jitter();
    let phase = [generator.random_range(0..4), generator.random_range(0..4)];
    let colour = COLOURS.get(colour).map_or([0.0; 3], |(_, rgb)| *rgb);
    let mut mask = Vec::with_capacity(side * side);
    let mut channels: [Vec<f32>; 3] = Default::default();
    for row in 0..side {
        for column in 0..side {
            let x = column as f64 + 0.5 - centre_x;
            let y = row as f64 + 0.5 - centre_y;
            let inside = covers(shape, x / radius, y / radius);
            mask.push(inside);
            let dark = is_dark(texture, row + phase[0], column + phase[1]);
            let grey = if dark { 0.25 } else { 0.5 };
            for (channel, ink) in channels.iter_mut().zip(colour) {
                let value = if inside { ink } else { grey };
                let noise = (generator.random::<f64>() - 0.5) * 0.1;
                channel.push(((value + noise - 0.5) / 0.25) as f32);
            }
        }
    }
    Picture {
        pixels: channels.concat(),
        mask,
    }
}

/// Whether a shape of radius one covers a point.
fn covers(shape: usize, x: f64, y: f64) -> bool {
    match shape {
        0 => x * x + y * y <= 1.0,
        1 => x.abs() <= 0.85 && y.abs() <= 0.85,
        2 => y.abs() <= 0.95 && x.abs() <= (y + 0.95) / 1.9,
        _ => x.abs().min(y.abs()) <= 0.3 && x.abs().max(y.abs()) <= 1.0,
    }
}

/// Whether a texture is dark at a pixel; of period four.
fn is_dark(texture: usize, row: usize, column: usize) -> bool {
    let half = |index: usize| index % 4 < 2;
    match texture {
        0 => false,
        1 => half(row),
        2 => half(column),
        _ => half(row) != half(column),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_train::generator;

    #[test]
    fn a_picture_follows_from_its_scene_and_seed() {
        let scene = Scene {
            values: [0, 1, 4, 2],
        };
        let one = draw(scene, 24, &mut generator(3));
        let same = draw(scene, 24, &mut generator(3));
        assert_eq!(one.pixels, same.pixels);
        assert_ne!(one.pixels, draw(scene, 24, &mut generator(4)).pixels);
        // A square in the middle: its mask is there, and red.
        let middle = 12 * 24 + 12;
        assert!(one.mask[middle] && !one.mask[0]);
        assert!(one.pixels[middle] > 1.0 && one.pixels[24 * 24 + middle] < -1.0);
        let covered = one.mask.iter().filter(|inside| **inside).count();
        assert!((25..60).contains(&covered), "{covered}");
    }

    #[test]
    fn captions_tell_all_scenes_apart() {
        let mut captions: Vec<_> = Scene::all().iter().map(Scene::caption).collect();
        assert!(captions.iter().all(|caption| caption.len() == CAPTION));
        assert!(captions.iter().flatten().all(|id| *id <= end()));
        captions.sort();
        captions.dedup();
        assert_eq!(captions.len(), 8 * 4 * 9 * 4);
    }

    #[test]
    fn textures_follow_shapes_as_often_as_they_should() {
        let mut generator = generator(1);
        let mut draw = Draw::balanced();
        let mut share = |draw: &Draw| {
            let follows = (0..2000).filter(|_| {
                let scene = draw.scene(&mut generator);
                scene.values[SHAPE] == scene.values[TEXTURE]
            });
            follows.count() as f64 / 2000.0
        };
        assert!((share(&draw) - 0.25).abs() < 0.05);
        draw.correlation = 0.95;
        assert!((share(&draw) - 0.95).abs() < 0.02);
    }
}
