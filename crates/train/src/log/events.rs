//! TensorBoard event files: scalars.
//!
//! A file is a sequence of records, each `length (u64), crc(length), data, crc(data)`, little
//! endian, where the data is a `tensorflow.Event` protocol buffer. The published crates for this
//! need TensorFlow's own generated code or are no longer kept; for scalars the format is the few
//! fields written out below.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// A protocol-buffer field number with its wire type: 0 variable-length integer, 1 eight bytes,
/// 2 length and bytes, 5 four bytes.
const fn key(field: u8, wire: u8) -> u8 {
    field << 3 | wire
}

const EVENT_WALL_TIME: u8 = key(1, 1);
const EVENT_STEP: u8 = key(2, 0);
const EVENT_FILE_VERSION: u8 = key(3, 2);
const EVENT_SUMMARY: u8 = key(5, 2);
const SUMMARY_VALUE: u8 = key(1, 2);
const VALUE_TAG: u8 = key(1, 2);
const VALUE_SIMPLE: u8 = key(2, 5);

/// An event file in a directory that TensorBoard is pointed to.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Starts a file with a name of its own in `directory`, which is created if need be.
    pub fn create(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
        let since = since_epoch();
        let name = format!(
            "events.out.tfevents.{}.{}.{}",
            since.as_secs(),
            std::process::id(),
            since.subsec_nanos()
        );
        let path = directory.join(name);
        let file = File::create_new(&path).map_err(Error::file("create", &path))?;
        let mut events = Self { file, path };
        let mut version = time_field(since.as_secs_f64());
        push_bytes(&mut version, EVENT_FILE_VERSION, b"brain.Event:2");
        events.append(&version)?;
        Ok(events)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends scalars of one step.
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let event = scalar_event(since_epoch().as_secs_f64(), step, values);
        self.append(&event)
    }

    fn append(&mut self, event: &[u8]) -> Result<()> {
        self.file
            .write_all(&record(event))
            .map_err(Error::file("write", &self.path))
    }
}

fn since_epoch() -> std::time::Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(event.len() + 16);
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&masked_checksum(&length).to_le_bytes());
    bytes.extend_from_slice(event);
    bytes.extend_from_slice(&masked_checksum(event).to_le_bytes());
    bytes
}

/// CRC-32C, rotated and offset so that the checksum of data that holds checksums stays useful.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn scalar_event(wall_time: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for &(tag, value) in values {
        let mut entry = Vec::new();
        push_bytes(&mut entry, VALUE_TAG, tag.as_bytes());
        entry.push(VALUE_SIMPLE);
        entry.extend_from_slice(&(value as f32).to_le_bytes());
        push_bytes(&mut summary, SUMMARY_VALUE, &entry);
    }
    let mut event = time_field(wall_time);
    event.push(EVENT_STEP);
    push_integer(&mut event, step);
    push_bytes(&mut event, EVENT_SUMMARY, &summary);
    event
}

fn time_field(wall_time: f64) -> Vec<u8> {
    let mut bytes = vec![EVENT_WALL_TIME];
    bytes.extend_from_slice(&wall_time.to_le_bytes());
    bytes
}

fn push_bytes(to: &mut Vec<u8>, key: u8, bytes: &[u8]) {
    to.push(key);
    push_integer(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

/// Seven bits at a time, the lowest first; the eighth says that more follow.
fn push_integer(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC-32C a bit at a time, from its polynomial.
    fn slow_checksum(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for &byte in bytes {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                let carry = crc & 1;
                crc = (crc >> 1) ^ (carry * 0x82f6_3b78);
            }
        }
        !crc
    }

    fn unmasked(masked: &[u8]) -> u32 {
        u32::from_le_bytes(masked.try_into().unwrap())
            .wrapping_sub(0xa282_ead8)
            .rotate_left(15)
    }

    /// Splits a file into its records, checking both checksums of each.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(slow_checksum(&bytes[..8]), unmasked(&bytes[8..12]));
            let data = &bytes[12..12 + length];
            let checksum = &bytes[12 + length..16 + length];
            assert_eq!(slow_checksum(data), unmasked(checksum));
            records.push(data.to_vec());
            bytes = &bytes[16 + length..];
        }
        records
    }

    #[test]
    fn the_file_is_made_of_checksummed_events() {
        let directory = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(&directory.path().join("board")).unwrap();
        events.write(3, &[("loss", 2.5)]).unwrap();
        events.write(300, &[("loss", 1.0), ("rate", 0.5)]).unwrap();
        let records = records(&std::fs::read(events.path()).unwrap());
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // After nine bytes of time: the step, then the summary.
        let first = b"\x10\x03\x2a\x0d\x0a\x0b\x0a\x04loss\x15\x00\x00\x20\x40";
        assert_eq!(&records[1][9..], first);
        assert_eq!(&records[2][9..12], b"\x10\xac\x02");
        assert!(records[2].ends_with(b"\x0a\x0b\x0a\x04rate\x15\x00\x00\x00\x3f"));
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(slow_checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
