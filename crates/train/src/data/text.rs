//! Text files into token files, in bounded memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use super::TokenWriter;
use crate::language::Vocabulary;
use crate::{Error, Result};

/// Entries of the byte vocabulary.
pub const BYTE_VOCABULARY: u32 = 256;

/// A piece of text handed to a tokenizer is at most about this long.
const PIECE: usize = 1 << 16;

/// One token per byte of UTF-8.
pub fn bytes(text: &str) -> Result<Vec<u32>> {
    Ok(text.bytes().map(u32::from).collect())
}

/// A tokenizer of the words of a [`Vocabulary`].
pub fn words(vocabulary: &Vocabulary) -> impl FnMut(&str) -> Result<Vec<u32>> + '_ {
    |text| vocabulary.encode(text)
}

/// Tokenizes a UTF-8 text file into a token file for `vocabulary` entries, and returns the number
/// of tokens.
///
/// The tokenizer gets whole lines, their ends included, as many at a time as make a piece of 64 KiB;
/// a longer line is cut between two characters.
pub fn write_text(
    text: &Path,
    out: &Path,
    vocabulary: u32,
    mut tokenizer: impl FnMut(&str) -> Result<Vec<u32>>,
) -> Result<u64> {
    let mut writer = TokenWriter::create(out, vocabulary)?;
    each_piece(text, |piece| {
        writer.write(&tokenizer(piece)?)?;
        Ok(ControlFlow::Continue(()))
    })?;
    writer.finish()
}

/// Hands over a UTF-8 text file piece by piece, to its end or until it is enough.
pub(crate) fn each_piece(
    text: &Path,
    mut take: impl FnMut(&str) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let file = File::open(text).map_err(Error::file("open", text))?;
    let mut reader = BufReader::with_capacity(PIECE, file);
    let mut pending: Vec<u8> = Vec::new();
    loop {
        let mut line = (&mut reader).take(PIECE as u64);
        let read = line
            .read_until(b'\n', &mut pending)
            .map_err(Error::file("read", text))?;
        let at_end = read == 0;
        if !at_end && pending.len() < PIECE {
            continue;
        }
        let taken = whole_characters(&pending, at_end)
            .map_err(|detail| Error::format("UTF-8 text", text, detail))?;
        if !taken.is_empty() && take(taken)?.is_break() {
            return Ok(());
        }
        let taken = taken.len();
        pending.drain(..taken);
        if at_end {
            return Ok(());
        }
    }
}

/// The longest beginning that does not cut a character; at the end of the file, everything.
fn whole_characters(bytes: &[u8], at_end: bool) -> std::result::Result<&str, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) if error.error_len().is_none() && !at_end => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::TokenFile;
    use super::*;

    fn round_trip(text: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("text");
        let out = directory.path().join("tokens");
        std::fs::write(&source, text).unwrap();
        let count = write_text(&source, &out, BYTE_VOCABULARY, bytes).unwrap();
        let file = TokenFile::open(&out).unwrap();
        assert_eq!(count, file.len());
        let tokens = file.read(0, count as usize).unwrap();
        String::from_utf8(tokens.into_iter().map(|t| t as u8).collect()).unwrap()
    }

    #[test]
    fn every_byte_comes_back_whatever_the_lines_are_like() {
        let long_line = "§ähm ".repeat(60_000);
        let short_lines = "a line\n".repeat(30_000);
        let mixed = format!("{long_line}\r\n\n{short_lines}€");
        for text in ["", "\n", "no end of line", &long_line, &short_lines, &mixed] {
            assert_eq!(round_trip(text), text);
        }
    }

    #[test]
    fn text_that_is_not_utf8_is_refused_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("text");
        let out = directory.path().join("tokens");
        for content in [&b"good \xff bad"[..], b"cut \xe2\x82"] {
            std::fs::write(&source, content).unwrap();
            let error = write_text(&source, &out, BYTE_VOCABULARY, bytes).unwrap_err();
            assert!(error.to_string().contains("UTF-8"), "{error}");
            assert!(!out.exists());
        }
    }

    #[test]
    fn an_error_of_the_tokenizer_is_passed_on() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("text");
        let out = directory.path().join("tokens");
        std::fs::write(&source, "the farmer near the xylophones sings .\n").unwrap();
        let vocabulary = Vocabulary::new();
        let size = vocabulary.size() as u32;
        let error = write_text(&source, &out, size, words(&vocabulary)).unwrap_err();
        assert!(error.to_string().contains("xylophones"), "{error}");
        assert!(!out.exists());
    }
}
