//! Text as it is generated: whole characters only, and nothing of a stop string.

use super::GenerationError;
use crate::Tokenizer;

/// Decodes tokens one by one. A token may end in the middle of a character or depend on its
/// neighbours for a space, so the last tokens are decoded again with each new one, and text is
/// given out once it can't change any more.
#[derive(Clone, Debug)]
pub struct TextStream<'tokenizer> {
    tokenizer: &'tokenizer Tokenizer,
    skip_special: bool,
    /// The tokens that are decoded again.
    window: Vec<u32>,
    /// The part of the window's text that has been given out.
    given: String,
    /// When all text up to some token has been given out, the window can start with the tokens
    /// before it; so many of them there are.
    complete: usize,
}

impl<'tokenizer> TextStream<'tokenizer> {
    /// A stream that continues after `prompt`, whose own text it does not give out.
    pub fn new(
        tokenizer: &'tokenizer Tokenizer,
        prompt: &[u32],
        skip_special: bool,
    ) -> Result<Self, GenerationError> {
        let heard = |id: &&u32| !(skip_special && tokenizer.is_special(**id));
        let mut window: Vec<u32> = prompt
            .iter()
            .rev()
            .filter(heard)
            .take(CONTEXT)
            .copied()
            .collect();
        window.reverse();
        Ok(Self {
            tokenizer,
            skip_special,
            given: tokenizer.decode(&window, skip_special)?,
            complete: window.len(),
            window,
        })
    }

    /// Takes a token and returns the text that it completes, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String, GenerationError> {
        // What is left out of the text must not stand between its neighbours either.
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let now = self.tokenizer.decode(&self.window, self.skip_special)?;
        let stable = stable_end(&now);
        let text = self.give(&now, stable);
        if stable == now.len() {
            self.window.drain(..self.complete);
            self.complete = self.window.len();
            self.given = self.tokenizer.decode(&self.window, self.skip_special)?;
        }
        Ok(text)
    }

    /// The text that is left when no token follows, an unfinished character included.
    pub fn finish(&mut self) -> Result<String, GenerationError> {
        let now = self.tokenizer.decode(&self.window, self.skip_special)?;
        Ok(self.give(&now, now.len()))
    }

    /// Gives out the text of the window up to `end`, after what has been given out before. That
    /// is the window's beginning, unless the prompt ended inside a character that is whole now.
    fn give(&mut self, now: &str, end: usize) -> String {
        let pairs = self.given.chars().zip(now.chars());
        let begin: usize = pairs
            .take_while(|(a, b)| a == b)
            .map(|(a, _)| a.len_utf8())
            .sum();
        self.given = now.get(..end.max(begin)).unwrap_or_default().to_string();
        now.get(begin..end).unwrap_or_default().to_string()
    }
}

/// Tokens of the prompt that the first new token is decoded with.
const CONTEXT: usize = 8;
/// An unfinished character has at most three bytes, each of which may decode to a replacement
/// character until the last one comes.
const UNFINISHED: usize = 3;

/// Where the text may still change: at the replacement characters at its end.
fn stable_end(text: &str) -> usize {
    let replaced = text
        .chars()
        .rev()
        .take(UNFINISHED)
        .take_while(|&c| c == char::REPLACEMENT_CHARACTER);
    text.len() - replaced.map(char::len_utf8).sum::<usize>()
}

/// Watches a stream of text for strings that end it.
///
/// ```
/// use lapidary_model::generation::StopStrings;
///
/// let mut stops = StopStrings::new(vec!["END".to_string()])?;
/// assert_eq!(stops.push("the E"), "the ");
/// assert_eq!(stops.push("astern EN"), "Eastern ");
/// assert_eq!(stops.push("D of it"), "");
/// assert!(stops.is_stopped());
/// # Ok::<(), lapidary_model::generation::GenerationError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Stops at the first occurrence of any of `stops`, none of which may be empty.
    pub fn new(stops: Vec<String>) -> Result<Self, GenerationError> {
        if stops.iter().any(String::is_empty) {
            return Err(GenerationError::Option {
                option: "stop",
                found: "an empty string".to_string(),
                expected: "strings of at least one character",
            });
        }
        Ok(Self {
            stops,
            ..Self::default()
        })
    }

    /// Takes more text and returns what can be shown: nothing of a stop string, nor of what may
    /// still become one.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let first_stop = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop))
            .min();
        if let Some(end) = first_stop {
            self.stopped = true;
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(end);
            return shown;
        }
        let kept = self
            .held
            .split_off(self.held.len() - self.possible_beginning());
        std::mem::replace(&mut self.held, kept)
    }

    /// What was held back, when no text follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string has come.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes at the end of the held text with which a stop string begins.
    fn possible_beginning(&self) -> usize {
        let lengths = self
            .stops
            .iter()
            .flat_map(|stop| stop.char_indices().map(move |(end, _)| &stop[..end]));
        lengths
            .filter(|beginning| self.held.ends_with(beginning))
            .map(str::len)
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::EncodeOptions;

    fn streamed(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(tokenizer, prompt, true).unwrap();
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn tokens_that_are_left_out_do_not_part_their_neighbours() {
        let texts = ["the song of the album"];
        let tokenizer = Tokenizer::word_level(texts, 20, &["<end>"]).unwrap();
        let id = |word: &str| tokenizer.id_of(word).unwrap();
        let skipped = id("<end>");
        let prompt = [id("the"), skipped];
        let ids = [
            skipped,
            id("song"),
            skipped,
            skipped,
            id("of"),
            id("the"),
            skipped,
        ];
        assert_eq!(streamed(&tokenizer, &prompt, &ids).concat(), " song of the");
        assert_eq!(streamed(&tokenizer, &[], &ids).concat(), "song of the");
    }

    #[test]
    fn characters_come_whole() {
        let tokenizer = Tokenizer::byte_level(&["<end>"]).unwrap();
        let ids: Vec<u32> = "aé€".bytes().map(u32::from).chain([256]).collect();
        assert_eq!(
            streamed(&tokenizer, &[98], &ids),
            ["a", "", "é", "", "", "€", "", ""]
        );
        assert_eq!(
            streamed(&tokenizer, &[], &[195]),
            ["", "\u{fffd}"],
            "half a character at the end"
        );
        let invalid = streamed(&tokenizer, &[], &[255, 255, 255, 255, 97]);
        let inside = streamed(&tokenizer, &[97, 195], &[169, 98]);
        assert_eq!(
            inside,
            ["é", "b", ""],
            "the prompt ended inside a character"
        );
        assert_eq!(invalid.concat(), "\u{fffd}\u{fffd}\u{fffd}\u{fffd}a");
    }

    #[test]
    fn words_keep_their_spaces() {
        let tokenizer = Tokenizer::word_level(["the cat sees"], 10, &["<end>"]).unwrap();
        let ids = tokenizer
            .encode("the cat sees", &EncodeOptions::default())
            .unwrap()
            .ids;
        assert_eq!(
            streamed(&tokenizer, &ids[..1], &ids[1..]),
            [" cat", " sees", ""]
        );
    }

    #[test]
    fn stop_string_is_found_across_pieces() {
        let mut stops = StopStrings::new(vec!["\n\n".into(), "###".into()]).unwrap();
        assert_eq!(stops.push("a\n"), "a");
        assert_eq!(stops.push("b##"), "\nb");
        assert_eq!(stops.push("é"), "##é");
        assert_eq!(stops.push("c##"), "c");
        assert!(!stops.is_stopped());
        assert_eq!(stops.push("# more \n\n"), "");
        assert!(stops.is_stopped());
        assert_eq!(stops.push("ignored") + &stops.finish(), "");
        assert!(StopStrings::new(vec![String::new()]).is_err());
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        let mut stops = StopStrings::new(vec!["END".into()]).unwrap();
        assert_eq!(stops.push("the EN") + "|" + &stops.finish(), "the |EN");
    }

    proptest! {
        #[test]
        fn streams_give_the_whole_text(text in any::<String>(), split in 0usize..20) {
            let tokenizer = Tokenizer::byte_level(&["<end>"]).unwrap();
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            // A prompt ends between characters, as one that was encoded from text does.
            let split = (0..=split.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap();
            let pieces = streamed(&tokenizer, &ids[..split], &ids[split..]);
            prop_assert_eq!(pieces.concat(), &text[split..]);
        }

        #[test]
        fn stopping_is_the_same_for_any_pieces(
            pieces in proptest::collection::vec("[abé]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let text = pieces.concat();
            let end = stops.iter().filter_map(|stop| text.find(stop)).min();
            let mut watcher = StopStrings::new(stops.clone()).unwrap();
            let mut shown = String::new();
            for piece in &pieces {
                shown += &watcher.push(piece);
            }
            shown += &watcher.finish();
            prop_assert_eq!(watcher.is_stopped(), end.is_some());
            // A longer stop string that begins earlier but ends later loses to a complete one,
            // whatever the pieces: compare with the text's own first occurrence.
            if stops.len() < 2 {
                prop_assert_eq!(shown, &text[..end.unwrap_or(text.len())]);
            }
        }
    }
}
