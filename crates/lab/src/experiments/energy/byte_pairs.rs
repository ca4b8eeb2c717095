//! Byte-pair encoding (Sennrich, Haddow, Birch, 2016, arXiv 1508.07909) of a text, learned on it.

use crate::{Error, Result};
use tokenizers::NormalizerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{TokenizerBuilder, TokenizerImpl};

/// Byte-level, as GPT-2's.
pub(super) struct BytePairs(TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>);

impl BytePairs {
    /// Learns at most `merges` merges, of pairs that occur twice at least.
    pub(super) fn learn(text: &str, merges: usize) -> Result<Self> {
        let mut tokenizer = TokenizerBuilder::new()
            .with_model(BPE::default())
            .with_normalizer(None::<NormalizerWrapper>)
            .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
            .with_post_processor(Some(ByteLevel::default()))
            .with_decoder(Some(ByteLevel::default()))
            .build()
            .map_err(|error| failed(&error))?;
        let alphabet = ByteLevel::alphabet();
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .min_frequency(2)
            .vocab_size(alphabet.len() + merges)
            .initial_alphabet(alphabet.into_iter().collect())
            .build();
        tokenizer
            .train(&mut trainer, text.split_inclusive('\n'))
            .map_err(|error| failed(&error))?;
        Ok(Self(tokenizer))
    }

    /// Number of tokens.
    pub(super) fn vocabulary(&self) -> usize {
        self.0.get_vocab_size(false)
    }

    /// The tokens of a text, line by line.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        for line in text.split_inclusive('\n') {
            let encoding = self.0.encode(line, false).map_err(|error| failed(&error))?;
            tokens.extend_from_slice(encoding.get_ids());
        }
        Ok(tokens)
    }
}

fn failed(error: &tokenizers::Error) -> Error {
    Error::Experiment(format!("byte pairs cannot be learned: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_words_become_one_token_and_texts_come_back() -> Result<()> {
        let text = "the king and the crown\nthe king sleeps\n".repeat(20);
        let few = BytePairs::learn(&text, 4)?;
        let many = BytePairs::learn(&text, 1000)?;
        assert_eq!(few.vocabulary(), 256 + 4);
        // No more merges than there is something to merge.
        assert!(many.vocabulary() < 300, "{}", many.vocabulary());
        assert_eq!(many.encode(" king")?.len(), 1);
        assert!(few.encode(&text)?.len() > many.encode(&text)?.len());
        for line in ["the crown\n", "Né à Paris, 1564\n"] {
            let tokens = many.encode(line)?;
            let read = many
                .0
                .decode(&tokens, false)
                .map_err(|error| failed(&error))?;
            assert_eq!(read, line);
        }
        // The same text gives the same tokens.
        let again = BytePairs::learn(&text, 1000)?;
        assert_eq!(again.encode(&text)?, many.encode(&text)?);
        Ok(())
    }
}
