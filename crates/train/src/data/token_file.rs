//! A file of tokens, memory-mapped.
//!
//! ```text
//! bytes 0..8    "LAPTOK1\n"
//!       8..12   bytes per token, 2 or 4          little-endian u32
//!      12..16   entries of the vocabulary        little-endian u32
//!      16..24   number of tokens                 little-endian u64
//!      24..     the tokens                       little-endian u16 or u32
//! ```

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use lapidary_model::files::FileBeside;
use memmap2::Mmap;

use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"LAPTOK1\n";
const HEADER: usize = 24;
/// What an error calls such a file.
const WHAT: &str = "token file";

/// Bytes of a token of a vocabulary.
fn width_for(vocabulary: u32) -> usize {
    if vocabulary <= 1 << 16 { 2 } else { 4 }
}

fn header(vocabulary: u32, count: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&(width_for(vocabulary) as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&vocabulary.to_le_bytes());
    bytes[16..].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Writes a token file of any length, a piece at a time. The file appears under its name in
/// [`TokenWriter::finish`], whole.
pub struct TokenWriter {
    file: FileBeside,
    vocabulary: u32,
    count: u64,
    bytes: Vec<u8>,
}

impl TokenWriter {
    /// Starts a file for tokens below `vocabulary`.
    pub fn create(path: &Path, vocabulary: u32) -> Result<Self> {
        let mut file = FileBeside::create(path)?;
        file.write(&header(vocabulary, 0))?;
        Ok(Self {
            file,
            vocabulary,
            count: 0,
            bytes: Vec::new(),
        })
    }

    /// Appends tokens.
    pub fn write(&mut self, tokens: &[u32]) -> Result<()> {
        if let Some(&token) = tokens.iter().find(|&&token| token >= self.vocabulary) {
            return Err(Error::TokenRange {
                token,
                vocabulary: self.vocabulary,
            });
        }
        let width = width_for(self.vocabulary);
        self.bytes.clear();
        for token in tokens {
            self.bytes.extend_from_slice(&token.to_le_bytes()[..width]);
        }
        self.file.write(&self.bytes)?;
        self.count += tokens.len() as u64;
        Ok(())
    }

    /// Completes the file and returns its number of tokens.
    pub fn finish(self) -> Result<u64> {
        let header = header(self.vocabulary, self.count);
        let staged = self.file.stage(|file| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)
        })?;
        staged.publish()?;
        Ok(self.count)
    }
}

/// A memory-mapped token file.
#[derive(Debug)]
pub struct TokenFile {
    map: Mmap,
    path: PathBuf,
    width: usize,
    vocabulary: u32,
    count: u64,
}

impl TokenFile {
    /// Opens a file and checks its header against its size. Tokens are checked as they are read.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::file("open", path))?;
        let size = file.metadata().map_err(Error::file("read", path))?.len();
        if size < HEADER as u64 {
            return Err(Error::format(
                WHAT,
                path,
                format!("it has {size} bytes, less than the {HEADER} of the header"),
            ));
        }
        let mut header = [0; HEADER];
        file.read_exact(&mut header)
            .map_err(Error::file("read", path))?;
        let (width, vocabulary, count) =
            parse_header(&header, size).map_err(|detail| Error::format(WHAT, path, detail))?;
        // SAFETY: the map is only ever read as bytes, any of which are valid. Another program that
        // shortens the file meanwhile can make a read fault: as with every memory-mapped file, the
        // user must not do that.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::file("map", path))?;
        Ok(Self {
            map,
            path: path.to_path_buf(),
            width,
            vocabulary,
            count,
        })
    }

    /// How many tokens it holds.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Entries of the vocabulary its tokens are from.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// Tokens `start .. start + length`.
    pub fn read(&self, start: u64, length: usize) -> Result<Vec<u32>> {
        let needed = start.saturating_add(length as u64);
        let bytes = (needed <= self.count)
            .then(|| {
                let from = HEADER + start as usize * self.width;
                self.map.get(from..from + length * self.width)
            })
            .flatten()
            .ok_or_else(|| Error::TooShort {
                what: self.path.display().to_string(),
                found: self.count,
                needed,
            })?;
        let tokens: Vec<u32> = if self.width == 2 {
            let (pairs, _) = bytes.as_chunks::<2>();
            pairs
                .iter()
                .map(|&b| u16::from_le_bytes(b).into())
                .collect()
        } else {
            let (quads, _) = bytes.as_chunks::<4>();
            quads.iter().map(|&b| u32::from_le_bytes(b)).collect()
        };
        match tokens.iter().find(|&&token| token >= self.vocabulary) {
            None => Ok(tokens),
            Some(&token) => Err(Error::format(
                WHAT,
                &self.path,
                format!(
                    "token {token} is beyond its vocabulary of {}",
                    self.vocabulary
                ),
            )),
        }
    }
}

/// Width, vocabulary and count, or what is wrong with them.
fn parse_header(
    header: &[u8; HEADER],
    size: u64,
) -> std::result::Result<(usize, u32, u64), String> {
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if &header[..8] != MAGIC {
        return Err("it does not begin with the mark of a token file".into());
    }
    let (width, vocabulary) = (word(8), word(12));
    let count = u64::from(word(16)) | u64::from(word(20)) << 32;
    if width as usize != width_for(vocabulary) {
        return Err(format!(
            "a vocabulary of {vocabulary} takes {} bytes per token, but it says {width}",
            width_for(vocabulary)
        ));
    }
    let expected = count
        .checked_mul(u64::from(width))
        .and_then(|bytes| bytes.checked_add(HEADER as u64));
    if expected != Some(size) {
        return Err(format!(
            "it says it holds {count} tokens of {width} bytes, which does not fit its {size} bytes"
        ));
    }
    Ok((width as usize, vocabulary, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(directory: &Path, vocabulary: u32, tokens: &[u32]) -> PathBuf {
        let path = directory.join("data.tokens");
        let mut writer = TokenWriter::create(&path, vocabulary).unwrap();
        for piece in tokens.chunks(3) {
            writer.write(piece).unwrap();
        }
        assert_eq!(writer.finish().unwrap(), tokens.len() as u64);
        path
    }

    #[test]
    fn tokens_of_either_width_come_back() {
        let directory = tempfile::tempdir().unwrap();
        for vocabulary in [256, 65_536, 65_537, 200_000] {
            let tokens: Vec<u32> = (0..100).map(|i| (i * 7919) % vocabulary).collect();
            let path = written(directory.path(), vocabulary, &tokens);
            let file = TokenFile::open(&path).unwrap();
            assert_eq!((file.len(), file.vocabulary()), (100, vocabulary));
            assert_eq!(file.read(0, 100).unwrap(), tokens);
            assert_eq!(file.read(90, 10).unwrap(), tokens[90..]);
            assert!(matches!(file.read(91, 10), Err(Error::TooShort { .. })));
            assert!(file.read(u64::MAX, 2).is_err());
        }
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.tokens");
        let mut writer = TokenWriter::create(&path, 256).unwrap();
        writer.write(&[1, 2, 3]).unwrap();
        assert!(matches!(
            writer.write(&[256]),
            Err(Error::TokenRange { token: 256, .. })
        ));
        drop(writer);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn lying_headers_are_refused_before_anything_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), 256, &[1, 2, 3]);
        let good = std::fs::read(&path).unwrap();
        type Edit = fn(&mut Vec<u8>);
        let edits: [(&str, Edit); 6] = [
            ("mark", |b| b[0] = b'X'),
            ("bytes per token", |b| b[8] = 4),
            ("does not fit", |b| b[16] = 4),
            ("does not fit", |b| b[16..24].fill(0xff)),
            ("does not fit", |b| {
                b.pop();
            }),
            ("less than", |b| b.truncate(10)),
        ];
        for (message, edit) in edits {
            let mut bytes = good.clone();
            edit(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            let error = TokenFile::open(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_found_when_it_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), 300, &[1, 2, 3]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[HEADER + 2..HEADER + 4].copy_from_slice(&300u16.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let file = TokenFile::open(&path).unwrap();
        assert_eq!(file.read(0, 1).unwrap(), [1]);
        let error = file.read(0, 3).unwrap_err().to_string();
        assert!(error.contains("token 300 is beyond"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_opened_or_refused_and_never_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80),
            marked: bool,
            start: u64,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("data.tokens");
            let mut content = if marked { header(300, 4).to_vec() } else { Vec::new() };
            content.extend_from_slice(&bytes);
            std::fs::write(&path, content).unwrap();
            if let Ok(file) = TokenFile::open(&path) {
                for start in [0, 2, start] {
                    if let Ok(tokens) = file.read(start, 3) {
                        proptest::prop_assert!(tokens.iter().all(|&t| t < file.vocabulary()));
                    }
                }
            }
        }
    }
}
