//! Bytes of a stranger's PNG or JPEG file to a [`Picture`]: what the file claims is checked
//! before anything of that size is allocated.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use super::Picture;
use anyhow::{Context, Result, bail, ensure};
use zune_jpeg::JpegDecoder;

/// Largest file.
const FILE_BYTES: u64 = 64 << 20;

/// Most pixels of a picture.
const PIXELS: usize = 1 << 26;

/// Memory that the PNG decoder may take beside the picture.
const PNG_BYTES: usize = 64 << 20;

impl Picture {
    /// Reads a PNG or JPEG file, which its first bytes tell apart. Transparency is dropped, grey
    /// becomes three equal channels.
    pub fn read(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        let file = File::open(path).with_context(|| format!("{}", path.display()))?;
        file.take(FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("{}", path.display()))?;
        ensure!(
            bytes.len() as u64 <= FILE_BYTES,
            "{} is larger than {FILE_BYTES} bytes, the most that is read",
            path.display()
        );
        Self::decode(&bytes).with_context(|| format!("{}", path.display()))
    }

    /// Decodes the bytes of a PNG or JPEG file.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', ..] => png(bytes),
            [0xff, 0xd8, ..] => jpeg(bytes),
            _ => bail!("the file is neither a PNG nor a JPEG"),
        }
    }
}

/// Refuses empty pictures and those of too many pixels.
fn check(width: usize, height: usize) -> Result<()> {
    let pixels = width.checked_mul(height);
    ensure!(
        pixels.is_some_and(|pixels| (1..=PIXELS).contains(&pixels)),
        "the picture is {width} by {height}, but must have between 1 and {PIXELS} pixels"
    );
    Ok(())
}

fn png(bytes: &[u8]) -> Result<Picture> {
    let limits = png::Limits { bytes: PNG_BYTES };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let (width, height) = decoder.read_header_info()?.size();
    let (width, height) = (width as usize, height as usize);
    check(width, height)?;
    let mut reader = decoder.read_info()?;
    let size = reader.output_buffer_size();
    let size = size.context("the picture is larger than memory")?;
    let mut pixels = vec![0; size];
    let frame = reader.next_frame(&mut pixels)?;
    let channels = frame.color_type.samples();
    ensure!(
        (frame.width as usize, frame.height as usize) == (width, height),
        "the first frame of an animation is not the whole picture"
    );
    pixels.truncate(width * height * channels);
    Ok(Picture {
        width,
        height,
        rgb: rgb(&pixels, channels),
    })
}

fn jpeg(bytes: &[u8]) -> Result<Picture> {
    let mut decoder = JpegDecoder::new(Cursor::new(bytes));
    let refused = |error| anyhow::anyhow!("the JPEG cannot be read: {error}");
    decoder.decode_headers().map_err(refused)?;
    let info = decoder.info().context("the JPEG has no header")?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    check(width, height)?;
    let pixels = decoder.decode().map_err(refused)?;
    let channels = pixels.len() / (width * height);
    ensure!(
        (1..=4).contains(&channels) && pixels.len() == width * height * channels,
        "the JPEG has {} numbers for {width} by {height} pixels",
        pixels.len()
    );
    Ok(Picture {
        width,
        height,
        rgb: rgb(&pixels, channels),
    })
}

/// Pixels of grey, grey with transparency, RGB or RGBA as RGB.
fn rgb(pixels: &[u8], channels: usize) -> Vec<u8> {
    let each = pixels.chunks_exact(channels.max(1));
    each.flat_map(|pixel| match pixel {
        [grey] | [grey, _] => [*grey; 3],
        [red, green, blue, ..] => [*red, *green, *blue],
        [] => [0; 3],
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(colour: png::ColorType, width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(colour);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(pixels).unwrap();
        writer.finish().unwrap();
        bytes
    }

    #[test]
    fn every_colour_type_becomes_rgb() {
        let grey = encoded(png::ColorType::Grayscale, 2, 1, &[7, 200]);
        let picture = Picture::decode(&grey).unwrap();
        assert_eq!((picture.width, picture.height), (2, 1));
        assert_eq!(picture.rgb, [7, 7, 7, 200, 200, 200]);
        let clear = encoded(png::ColorType::Rgba, 1, 1, &[1, 2, 3, 0]);
        assert_eq!(Picture::decode(&clear).unwrap().rgb, [1, 2, 3]);
    }

    #[test]
    fn broken_and_boastful_files_are_refused_in_words() {
        let whole = encoded(png::ColorType::Rgb, 2, 2, &[9; 12]);
        for length in 0..whole.len() {
            // Nothing to hold on to in a file that was cut; it must only not panic.
            let _ = Picture::decode(&whole[..length]);
        }
        assert!(
            Picture::decode(b"GIF89a")
                .unwrap_err()
                .to_string()
                .contains("neither")
        );
        assert!(Picture::decode(&[0xff, 0xd8, 0xff, 0xe0, 0]).is_err());
        // A header that claims four billion by four billion pixels, with a fitting checksum.
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 1 << 20, 1 << 20);
        encoder.set_color(png::ColorType::Grayscale);
        drop(encoder.write_header().unwrap());
        let error = Picture::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("1048576 by 1048576"), "{error}");
    }
}
