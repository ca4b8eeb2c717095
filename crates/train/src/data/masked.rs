//! Text with tokens hidden in clusters, for masked models of long sequences.
//!
//! What is hidden lies in some stretches of a sequence and not all over it, as questions do (Zeng et
//! al., Vcc, 2023, arXiv 2305.04241, whose program this follows): with `K` clusters at random tokens
//! `c_k` and one deviation `σ` for a sequence, its tokens are drawn without replacement, as many as are
//! to be hidden, with weights
//!
//! ```text
//! w_t = 10⁻⁶ + 1/K Σ_k exp(− (t − c_k)² / 2σ²)
//! ```
//!
//! Then the sequence may be cut into segments that change places, so that what is hidden together is
//! named from elsewhere too. A hidden token becomes the mask, an id behind those of the text, by
//! which Vcc's VIP tokens can be told (`importance = { kind = "token", id = … }`), unless it is drawn to be one of those
//! that are `kept` as they are or become a `random` token of the text, a tenth each in BERT (Devlin et al., 2018, arXiv
//! 1810.04805) and in the paper's program, so that a model cannot take what it sees for what was there. The program also
//! puts marks around segments; these are left out.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
use serde::{Deserialize, Serialize};

use super::{Batch, IGNORE, Task};
use crate::{Error, Generator, Result};

const MAX_CLUSTERS: usize = 1 << 12;
/// Keeps every token's weight from zero.
const LEAST: f64 = 1e-6;

/// Which tokens of a sequence are hidden.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskingSpec {
    /// Tokens of a sequence that are hidden.
    pub hidden: usize,
    /// Fewest and most clusters of a sequence.
    #[serde(default = "clusters")]
    pub clusters: [usize; 2],
    /// Least and largest deviation of a sequence's clusters, in tokens.
    #[serde(default = "deviation")]
    pub deviation: [f64; 2],
    /// Fewest and most segments that change places; as they are when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segments: Option<[usize; 2]>,
    /// Share of the hidden tokens that are shown as they are.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub kept: f64,
    /// Share of the hidden tokens in place of which a random one of the text's is shown.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub random: f64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_nothing(share: &f64) -> bool {
    *share == 0.0
}

fn clusters() -> [usize; 2] {
    [4, 16]
}

fn deviation() -> [f64; 2] {
    [32.0, 64.0]
}

impl MaskingSpec {
    /// So many hidden tokens, in clusters as in the paper.
    pub fn new(hidden: usize) -> Self {
        Self {
            hidden,
            clusters: clusters(),
            deviation: deviation(),
            segments: None,
            kept: 0.0,
            random: 0.0,
        }
    }

    /// Of the hidden tokens 80 % become the mask, 10 % a random token, and 10 % stay, as in BERT.
    pub fn like_bert(self) -> Self {
        Self {
            kept: 0.1,
            random: 0.1,
            ..self
        }
    }

    /// Refuses what cannot be done to sequences of `length` tokens.
    ///
    /// # Errors
    /// Names the field, what it is and what it could be.
    pub fn validate(&self, length: usize) -> Result<()> {
        let wrong = |name, found: String, expected| {
            Err(Error::Setting {
                name,
                found,
                expected,
            })
        };
        if !(1..=length).contains(&self.hidden) {
            let expected = "at least 1 and at most the tokens of a sequence";
            return wrong("masking.hidden", self.hidden.to_string(), expected);
        }
        let [fewest, most] = self.clusters;
        if fewest == 0 || fewest > most || most > MAX_CLUSTERS {
            let expected = "two numbers from 1 to 4096, the smaller one first";
            return wrong("masking.clusters", format!("{:?}", self.clusters), expected);
        }
        let [least, largest] = self.deviation;
        if !(least > 0.0 && least <= largest && largest.is_finite()) {
            let expected = "two numbers above 0, the smaller one first";
            return wrong(
                "masking.deviation",
                format!("{:?}", self.deviation),
                expected,
            );
        }
        for (name, share) in [("masking.kept", self.kept), ("masking.random", self.random)] {
            if !(0.0..=1.0).contains(&share) {
                return wrong(name, share.to_string(), "between 0 and 1");
            }
        }
        if self.kept + self.random > 1.0 {
            let found = format!("{} and {}", self.kept, self.random);
            let expected = "at most 1 together";
            return wrong("masking.kept and masking.random", found, expected);
        }
        match self.segments {
            Some([fewest, most]) if fewest == 0 || fewest > most || most > length => {
                let expected =
                    "two numbers from 1 to the tokens of a sequence, the smaller one first";
                wrong(
                    "masking.segments",
                    format!("{:?}", [fewest, most]),
                    expected,
                )
            }
            _ => Ok(()),
        }
    }

    /// Whether each of `length` tokens is hidden.
    fn hidden(&self, length: usize, generator: &mut Generator) -> Vec<bool> {
        let [fewest, most] = self.clusters;
        let [least, largest] = self.deviation;
        let count = generator.random_range(fewest..=most);
        let deviation = least + (largest - least) * generator.random::<f64>();
        let centres: Vec<f64> = (0..count)
            .map(|_| generator.random_range(0..length) as f64)
            .collect();
        let weight = |token: usize| {
            let near = |centre: &f64| {
                let away = (token as f64 - centre) / deviation;
                (-0.5 * away * away).exp()
            };
            LEAST + centres.iter().map(near).sum::<f64>() / count as f64
        };
        // The largest of ln w − ln(− ln u): drawing one by one without replacement (Gumbel).
        let mut order: Vec<(f64, usize)> = (0..length)
            .map(|token| {
                let u = 1.0 - generator.random::<f64>();
                (weight(token).ln() - (-u.ln()).ln(), token)
            })
            .collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut hidden = vec![false; length];
        for (_, token) in order.into_iter().take(self.hidden) {
            if let Some(hidden) = hidden.get_mut(token) {
                *hidden = true;
            }
        }
        hidden
    }

    /// What is shown of a hidden token of a text of so many.
    fn shown(&self, said: u32, vocabulary: u32, generator: &mut Generator) -> u32 {
        // A run without such shares draws nothing for them.
        if self.kept + self.random == 0.0 {
            return vocabulary;
        }
        let drawn = generator.random::<f64>();
        if drawn < self.kept {
            said
        } else if drawn < self.kept + self.random {
            generator.random_range(0..vocabulary.max(1))
        } else {
            vocabulary
        }
    }

    /// The token that comes to each of `length` places.
    fn order(&self, length: usize, generator: &mut Generator) -> Vec<usize> {
        let Some([fewest, most]) = self.segments else {
            return (0..length).collect();
        };
        let count = generator.random_range(fewest..=most).min(length);
        let cuts = sample(generator, length.saturating_sub(1), count.saturating_sub(1));
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut + 1).collect();
        cuts.extend([0, length]);
        cuts.sort_unstable();
        let ends = cuts.iter().skip(1);
        let mut segments: Vec<_> = cuts.iter().zip(ends).map(|(a, b)| *a..*b).collect();
        segments.shuffle(generator);
        segments.into_iter().flatten().collect()
    }
}

/// A task's sequences with tokens hidden: what was there is the target, and nothing else is.
pub struct Masked {
    text: Box<dyn Task>,
    masking: MaskingSpec,
}

impl Masked {
    /// Hides tokens of `text`.
    pub fn new(text: Box<dyn Task>, masking: MaskingSpec) -> Self {
        Self { text, masking }
    }

    /// The token that hides others: one behind those of the text.
    pub fn mask(&self) -> u32 {
        self.text.vocabulary() as u32
    }
}

impl Task for Masked {
    fn vocabulary(&self) -> usize {
        self.text.vocabulary() + 1
    }

    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        self.masking.validate(length)?;
        let mask = self.mask();
        let text = self.text.batch(generator, rows, length)?;
        let mut batch = Batch::with_capacity(rows, length);
        for tokens in text.inputs.chunks_exact(length) {
            let hidden = self.masking.hidden(length, generator);
            for token in self.masking.order(length, generator) {
                let (Some(&said), Some(&hidden)) = (tokens.get(token), hidden.get(token)) else {
                    continue;
                };
                batch.inputs.push(match hidden {
                    true => self.masking.shown(said, mask, generator),
                    false => said,
                });
                batch.targets.push(if hidden { said } else { IGNORE });
            }
            batch.rows += 1;
        }
        Ok(batch)
    }

    fn position(&self) -> u64 {
        self.text.position()
    }

    fn seek(&mut self, position: u64) {
        self.text.seek(position);
    }
}
