//! Families of sequences that grow until a model can no longer tell neighbours apart.

use crate::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The tokens that sequences are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alphabet {
    /// What is repeated.
    pub one: u32,
    /// What differs from it.
    pub zero: u32,
    /// What random sequences are drawn from; the two above when empty.
    pub digits: Vec<u32>,
    /// Before the sequence.
    pub prefix: Vec<u32>,
    /// After it.
    pub suffix: Vec<u32>,
    /// A token put between every so many tokens of the sequence.
    pub separator: Option<Separator>,
}

/// A token between every `every` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Separator {
    /// The token.
    pub token: u32,
    /// Tokens from one to the next.
    pub every: usize,
}

impl Alphabet {
    /// `prefix`, `body` with separators, `suffix`.
    fn wrap(&self, body: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let mut tokens = self.prefix.clone();
        for (index, token) in body.into_iter().enumerate() {
            if let Some(separator) = self.separator
                && index > 0
                && index.is_multiple_of(separator.every.max(1))
            {
                tokens.push(separator.token);
            }
            tokens.push(token);
        }
        tokens.extend(&self.suffix);
        tokens
    }
}

/// Pairs of sequences that differ by one repetition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `1ⁿ` and `1ⁿ⁺¹`.
    Ones,
    /// `1ⁿ⁻¹ 0` and `1ⁿ 0`.
    OnesThenZero,
    /// `x₁ … xₙ` and `x₁ … xₙ xₙ`, drawn from a seed: the same `x` for every `n`.
    RepeatedLast {
        /// The seed.
        seed: u64,
    },
}

impl Family {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ones => "ones",
            Self::OnesThenZero => "ones-then-zero",
            Self::RepeatedLast { .. } => "repeated-last",
        }
    }

    /// The two sequences of `n`.
    pub fn pair(self, n: usize, alphabet: &Alphabet) -> (Vec<u32>, Vec<u32>) {
        let (one, zero) = (alphabet.one, alphabet.zero);
        let ones = |count: usize| std::iter::repeat_n(one, count);
        match self {
            Self::Ones => (alphabet.wrap(ones(n)), alphabet.wrap(ones(n + 1))),
            Self::OnesThenZero => (
                alphabet.wrap(ones(n.saturating_sub(1)).chain([zero])),
                alphabet.wrap(ones(n).chain([zero])),
            ),
            Self::RepeatedLast { seed } => {
                let mut generator = ChaCha8Rng::seed_from_u64(seed);
                let own = [one, zero];
                let from = match alphabet.digits.as_slice() {
                    [] => &own[..],
                    digits => digits,
                };
                let drawn: Vec<u32> = (0..n)
                    .filter_map(|_| from.get(generator.random_range(0..from.len())).copied())
                    .collect();
                let longer = drawn.iter().copied().chain(drawn.last().copied());
                let longer = alphabet.wrap(longer);
                (alphabet.wrap(drawn), longer)
            }
        }
    }
}

/// A question whose answer is one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// What the model reads.
    pub tokens: Vec<u32>,
    /// What comes next.
    pub answer: u32,
}

/// Questions about sequences of any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `0 1ⁿ⁻¹`: which was the first?
    CopyFirst,
    /// `1ⁿ⁻¹ 0`: which was the last?
    CopyLast,
    /// `1ⁿ`: how many, modulo the number of digits? A sum where a plus sign separates the ones.
    Count,
}

impl Probe {
    /// Every probe.
    pub const ALL: [Self; 3] = [Self::CopyFirst, Self::CopyLast, Self::Count];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CopyFirst => "copy-first",
            Self::CopyLast => "copy-last",
            Self::Count => "count",
        }
    }

    /// The question of length `n`; the alphabet's suffix asks it.
    ///
    /// # Errors
    /// When `n` is 0, or `Count` has no digits to answer with.
    pub fn prompt(self, n: usize, alphabet: &Alphabet) -> Result<Prompt> {
        let Some(rest) = n.checked_sub(1) else {
            return Err(Error::invalid("length of a probe", n, "at least 1"));
        };
        let ones = |count: usize| std::iter::repeat_n(alphabet.one, count);
        let (tokens, answer) = match self {
            Self::CopyFirst => (
                alphabet.wrap([alphabet.zero].into_iter().chain(ones(rest))),
                Some(alphabet.zero),
            ),
            Self::CopyLast => (
                alphabet.wrap(ones(rest).chain([alphabet.zero])),
                Some(alphabet.zero),
            ),
            Self::Count => {
                let digits = alphabet.digits.len().max(1);
                let answer = alphabet.digits.get(n % digits).copied();
                (alphabet.wrap(ones(n)), answer)
            }
        };
        let answer =
            answer.ok_or_else(|| Error::invalid("digits to count with", 0, "at least 1"))?;
        Ok(Prompt { tokens, answer })
    }
}

/// Whole numbers from `least` to `most` in about equal ratios, at most `count` of them.
pub fn lengths(least: usize, most: usize, count: usize) -> Vec<usize> {
    let (low, high) = ((least.max(1)) as f64, (most.max(1)) as f64);
    let steps = count.saturating_sub(1).max(1) as f64;
    let mut all: Vec<usize> = (0..count)
        .map(|step| (low * (high / low).powf(step as f64 / steps)).round() as usize)
        .collect();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alphabet() -> Alphabet {
        Alphabet {
            one: 1,
            zero: 0,
            digits: (0..10).collect(),
            ..Alphabet::default()
        }
    }

    #[test]
    fn pairs_differ_by_one_repetition() {
        let of = |family: Family| family.pair(3, &alphabet());
        assert_eq!(of(Family::Ones), (vec![1; 3], vec![1; 4]));
        assert_eq!(of(Family::OnesThenZero), (vec![1, 1, 0], vec![1, 1, 1, 0]));
        let (v, longer) = of(Family::RepeatedLast { seed: 3 });
        assert_eq!(longer, [&v[..], &v[2..]].concat());
        let (first, _) = Family::RepeatedLast { seed: 3 }.pair(2, &alphabet());
        assert_eq!(first, v[..2]);
    }

    #[test]
    fn separators_stand_between_and_prompts_around() {
        let alphabet = Alphabet {
            prefix: vec![7],
            suffix: vec![8],
            separator: Some(Separator { token: 9, every: 2 }),
            ..alphabet()
        };
        let (v, _) = Family::Ones.pair(4, &alphabet);
        assert_eq!(v, [7, 1, 1, 9, 1, 1, 8]);
    }

    #[test]
    fn probes_have_their_answers() {
        let ask = |probe: Probe| probe.prompt(3, &alphabet()).unwrap();
        assert_eq!(ask(Probe::CopyFirst).tokens, [0, 1, 1]);
        assert_eq!(ask(Probe::CopyLast).tokens, [1, 1, 0]);
        assert_eq!(ask(Probe::Count).answer, 3);
        assert_eq!(Probe::Count.prompt(23, &alphabet()).unwrap().answer, 3);
        assert!(Probe::Count.prompt(0, &alphabet()).is_err());
    }

    #[test]
    fn lengths_grow_by_ratios() {
        assert_eq!(lengths(1, 16, 5), [1, 2, 4, 8, 16]);
        assert_eq!(lengths(1, 3, 10), [1, 2, 3]);
    }
}
