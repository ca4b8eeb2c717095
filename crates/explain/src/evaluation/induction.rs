//! Sequences that repeat: what followed a token the first time is the evidence for what follows
//! it now.

use super::Example;
use crate::{Error, Result};
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// `count` sequences `r_1 … r_n r_1 … r_k` of random different tokens below `vocabulary`, for
/// which `r_{k+1}` is to be predicted. The evidence is where it stood the first time; the foil is
/// another token of the sequence.
///
/// # Errors
/// When the vocabulary has not `period` tokens, or the period is below 3.
pub fn induction(
    count: usize,
    period: usize,
    vocabulary: usize,
    generator: &mut ChaCha8Rng,
) -> Result<Vec<Example>> {
    if period < 3 || vocabulary < period || vocabulary > u32::MAX as usize {
        return Err(Error::invalid(
            "period of the repeated sequences",
            period,
            format!("between 3 and {vocabulary}, the size of the vocabulary"),
        ));
    }
    let mut tokens: Vec<u32> = (0..vocabulary as u32).collect();
    let mut examples = Vec::with_capacity(count);
    for _ in 0..count {
        let (drawn, _) = tokens.partial_shuffle(generator, period);
        let repeated = generator.random_range(1..period - 1);
        let foil = (repeated + generator.random_range(1..period)) % period;
        let of = |position: usize| drawn.get(position).copied().unwrap_or_default() as usize;
        examples.push(Example {
            target: of(repeated),
            foil: Some(of(foil)),
            evidence: vec![repeated],
            ids: drawn
                .iter()
                .chain(drawn.iter().take(repeated))
                .copied()
                .collect(),
            position: None,
            special: Vec::new(),
            words: Vec::new(),
        });
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn the_evidence_is_where_the_target_stood_before() {
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        for example in induction(200, 6, 50, &mut generator).unwrap() {
            let position = example.evidence[0];
            assert_eq!(example.ids[position] as usize, example.target);
            assert_ne!(example.foil, Some(example.target));
            // The token before the evidence is the one that was read last.
            assert_eq!(example.ids[position - 1], *example.ids.last().unwrap());
            let first: std::collections::BTreeSet<_> = example.ids[..6].iter().collect();
            assert_eq!(first.len(), 6);
        }
        assert!(induction(1, 6, 5, &mut generator).is_err());
    }
}
