//! The one generator of random numbers, and its state.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The generator that everything random in training is drawn from: the same numbers on every
/// machine, and a state of three numbers.
pub type Generator = ChaCha8Rng;

/// A generator from a seed.
pub fn generator(seed: u64) -> Generator {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Where a [`Generator`] is in its sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorState {
    /// The seed.
    pub seed: [u8; 32],
    /// Which of the independent sequences of the seed.
    pub stream: u64,
    /// Words of 32 bits drawn so far, in decimal (JSON has no 128-bit numbers).
    #[serde(with = "decimal")]
    pub position: u128,
}

impl GeneratorState {
    /// The state of a generator.
    pub fn of(generator: &Generator) -> Self {
        Self {
            seed: generator.get_seed(),
            stream: generator.get_stream(),
            position: generator.get_word_pos(),
        }
    }

    /// A generator that goes on from here.
    pub fn restore(&self) -> Generator {
        let mut generator = ChaCha8Rng::from_seed(self.seed);
        generator.set_stream(self.stream);
        generator.set_word_pos(self.position);
        generator
    }
}

mod decimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &u128, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u128, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngExt};

    use super::*;

    #[test]
    fn a_restored_generator_continues_exactly() {
        let mut original = generator(3);
        original.set_stream(9);
        // An odd number of half-words leaves the generator in the middle of a block.
        for _ in 0..37 {
            let _: f32 = original.random();
        }
        let text = serde_json::to_string(&GeneratorState::of(&original)).unwrap();
        let state: GeneratorState = serde_json::from_str(&text).unwrap();
        let mut restored = state.restore();
        for _ in 0..100 {
            assert_eq!(original.next_u64(), restored.next_u64());
        }
    }
}
