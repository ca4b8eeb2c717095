//! Which components stand out among everything that a head could read.

use super::components::{Components, Composition, Reader};
use super::heads::{HeadId, Heads};
use crate::analyses::random::normal;
use crate::{Error, Result};
use lapidary_factor::Matrix;
use rand::Rng;

/// What counts as a channel.
#[derive(Clone, Copy, Debug)]
pub struct ChannelOptions {
    /// A score so many standard deviations above the mean of the reader's scores stands out.
    pub threshold: f64,
    /// Random rotations that p-values are counted from.
    pub draws: usize,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        Self {
            threshold: 4.0,
            draws: 9999,
        }
    }
}

impl ChannelOptions {
    fn check(&self) -> Result<()> {
        if !self.threshold.is_finite() {
            return Err(Error::invalid("threshold", self.threshold, "a number"));
        }
        if !(1..=1_000_000).contains(&self.draws) {
            return Err(Error::invalid("draws", self.draws, "between 1 and 1000000"));
        }
        Ok(())
    }
}

/// A component of an earlier head that a later head reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Channel {
    /// The head that writes.
    pub writer: HeadId,
    /// Which of its components, the strongest first.
    pub component: usize,
    /// `s_i² / Σ s²`: the component's share of what the head writes.
    pub share: f64,
    /// The head that reads.
    pub reader: HeadId,
    /// What for.
    pub composition: Composition,
    /// The composition score.
    pub score: f64,
    /// The score in standard deviations above the mean, over every component that this reader
    /// could read.
    pub z: f64,
    /// Share of random directions, the same size of sample as for every reader, that score as
    /// high; not corrected for the number of components looked at.
    pub p: f64,
}

/// The scores of everything that one reader could read.
#[derive(Debug)]
pub struct ReaderScores<'a> {
    /// Who reads.
    pub reader: &'a Reader,
    /// Who could be read: every head of an earlier block.
    pub writers: &'a [Components],
    /// One score for each component, head after head.
    pub scores: Vec<f64>,
}

impl ReaderScores<'_> {
    /// Mean and standard deviation of the scores.
    pub fn spread(&self) -> (f64, f64) {
        let count = self.scores.len().max(1) as f64;
        let mean = self.scores.iter().sum::<f64>() / count;
        let squares: f64 = self.scores.iter().map(|score| (score - mean).powi(2)).sum();
        (mean, (squares / count).sqrt())
    }

    /// Each writer's components with their scores.
    pub fn by_writer(&self) -> impl Iterator<Item = (&Components, &[f64])> {
        let mut rest = self.scores.as_slice();
        self.writers.iter().map(move |writer| {
            let (own, after) = rest.split_at(writer.count().min(rest.len()));
            rest = after;
            (writer, own)
        })
    }
}

/// Calls `visit` with the scores of every reader, block after block.
///
/// # Errors
/// When a weight is not finite, or `visit` fails.
pub fn each_reader(
    heads: &Heads<'_>,
    mut visit: impl FnMut(&ReaderScores<'_>) -> Result<()>,
) -> Result<()> {
    let ids = heads.ids();
    let width = heads.model().spec().width;
    let mut writers: Vec<Components> = Vec::new();
    for block in ids.chunk_by(|a, b| a.block == b.block) {
        let directions = stacked(&writers, width);
        let mut next = Vec::new();
        for id in block {
            let head = heads.head(*id)?;
            for composition in Composition::ALL.into_iter().filter(|_| !writers.is_empty()) {
                let reader = Reader::of(&head, composition);
                let scores = reader.scores(directions.as_ref());
                visit(&ReaderScores {
                    reader: &reader,
                    writers: &writers,
                    scores,
                })?;
            }
            next.push(Components::of(&head)?);
        }
        writers.extend(next);
    }
    Ok(())
}

/// The directions of all components, one below the other.
fn stacked(writers: &[Components], width: usize) -> Matrix {
    let rows: Vec<_> = writers
        .iter()
        .flat_map(|writer| (0..writer.count()).map(|row| writer.writes.row(row)))
        .collect();
    Matrix::from_fn(rows.len(), width, |i, j| rows[i][j])
}

/// What random rotations of a unit vector would score.
///
/// A rotated `v` has squared coordinates like normalised squares of normal numbers, and a reader
/// sees those along its own singular directions alone: one sample of coordinates does for every
/// reader.
#[derive(Clone, Debug)]
pub struct RotationNull {
    /// Squared coordinates, `[draws, coordinates]`.
    squares: Matrix,
}

impl RotationNull {
    /// Draws `draws` rotations in `dimension` dimensions and keeps `coordinates` of each.
    pub fn new(dimension: usize, coordinates: usize, draws: usize, rng: &mut impl Rng) -> Self {
        let mut squares = Matrix::zeros(draws, coordinates);
        for draw in 0..draws {
            let mut norm = 0.0;
            for coordinate in 0..dimension {
                let square = normal(rng).powi(2);
                norm += square;
                if coordinate < coordinates {
                    squares[(draw, coordinate)] = square;
                }
            }
            for coordinate in 0..coordinates {
                squares[(draw, coordinate)] /= f64::max(norm, f64::MIN_POSITIVE);
            }
        }
        Self { squares }
    }

    /// The scores of the rotations for a reader of these singular values, in ascending order.
    pub fn scores(&self, strengths: &[f64]) -> Vec<f64> {
        let total: f64 = strengths.iter().map(|s| s * s).sum();
        let total = total.max(f64::MIN_POSITIVE);
        let mut scores: Vec<f64> = (0..self.squares.nrows())
            .map(|draw| {
                let row = self.squares.row(draw);
                let squares = row.iter().zip(strengths).map(|(w, s)| w * s * s);
                (squares.sum::<f64>() / total).sqrt()
            })
            .collect();
        scores.sort_by(f64::total_cmp);
        scores
    }

    /// `(1 + rotations that score as high) / (1 + rotations)`, of sorted scores.
    pub fn p_value(sorted: &[f64], score: f64) -> f64 {
        let below = sorted.partition_point(|drawn| *drawn < score);
        (1 + sorted.len() - below) as f64 / (1 + sorted.len()) as f64
    }
}

/// The channels of a model: components that stand out for a later head, the most outstanding
/// first.
///
/// ```
/// use lapidary_explain::analyses::channels::{ChannelOptions, Heads, channels};
/// use lapidary_kernels::{DType, Device};
/// use lapidary_model::{Model, ModelSpec};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let spec: ModelSpec = toml::from_str(
///     "width = 16\nfinal_norm = { kind = 'layer' }\n\
///      [input]\nkind = 'tokens'\nvocabulary = 9\nlength = 8\n\
///      [[blocks]]\nrepeat = 2\nattention = { kind = 'multi-head', heads = 2 }",
/// )?;
/// let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
/// let mut generator = rand_chacha::ChaCha8Rng::from_seed([0; 32]);
/// # use rand::SeedableRng;
/// let found = channels(&Heads::of(&model)?, &ChannelOptions::default(), &mut generator)?;
/// assert!(found.iter().all(|channel| channel.z >= 4.0));
/// # Ok(()) }
/// ```
///
/// # Errors
/// When the options are out of range or a weight is not finite.
pub fn channels(
    heads: &Heads<'_>,
    options: &ChannelOptions,
    generator: &mut impl Rng,
) -> Result<Vec<Channel>> {
    let mut found = Vec::new();
    let search = Search::new(heads, options, generator)?;
    each_reader(heads, |scores| {
        found.extend(search.channels(scores)?);
        Ok(())
    })?;
    found.sort_by(|a, b| b.z.total_cmp(&a.z));
    Ok(found)
}

/// Options with the sample of rotations that they ask for.
pub(super) struct Search {
    threshold: f64,
    null: RotationNull,
}

impl Search {
    pub(super) fn new(
        heads: &Heads<'_>,
        options: &ChannelOptions,
        generator: &mut impl Rng,
    ) -> Result<Self> {
        options.check()?;
        let spec = heads.model().spec();
        let dimension = spec.width - usize::from(heads.is_centred() && spec.width > 1);
        let blocks = spec.blocks.iter().filter_map(super::heads::multi_head);
        let widest = blocks
            .map(|block| {
                block
                    .head_width(spec.width)
                    .max(block.value_width(spec.width))
            })
            .max();
        let coordinates = widest.unwrap_or(0).min(dimension);
        Ok(Self {
            threshold: options.threshold,
            null: RotationNull::new(dimension, coordinates, options.draws, generator),
        })
    }

    pub(super) fn channels(&self, of: &ReaderScores<'_>) -> Result<Vec<Channel>> {
        let (mean, deviation) = of.spread();
        let z = |score: f64| match deviation {
            0.0 => 0.0,
            deviation => (score - mean) / deviation,
        };
        if !of.scores.iter().any(|score| z(*score) >= self.threshold) {
            return Ok(Vec::new());
        }
        let null = self.null.scores(&of.reader.strengths()?);
        let mut found = Vec::new();
        for (writer, scores) in of.by_writer() {
            let total = writer.norm().powi(2).max(f64::MIN_POSITIVE);
            for (component, (score, strength)) in scores.iter().zip(&writer.strengths).enumerate() {
                if z(*score) < self.threshold {
                    continue;
                }
                found.push(Channel {
                    writer: writer.head,
                    component,
                    share: strength * strength / total,
                    reader: of.reader.head,
                    composition: of.reader.composition,
                    score: *score,
                    z: z(*score),
                    p: RotationNull::p_value(&null, *score),
                });
            }
        }
        Ok(found)
    }
}
