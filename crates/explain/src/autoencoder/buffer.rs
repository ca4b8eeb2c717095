//! Activations on their way from the model to the autoencoder: shuffled, and never all there.

use super::site::{SiteReader, rows};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::Model;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::iter::Peekable;

/// Most tokens in one pass of the model.
const TOKENS_AT_A_TIME: usize = 2048;

/// A reservoir of a site's activations over an iterator of token windows. It is refilled when
/// half used and shuffled then, so that a batch mixes many windows. Memory is `capacity · width`
/// numbers; nothing is stored on disk.
#[derive(Debug)]
pub struct ActivationBuffer<'a, W: Iterator<Item = Vec<u32>>> {
    reader: SiteReader<'a>,
    windows: Peekable<W>,
    generator: ChaCha8Rng,
    width: usize,
    /// `capacity · width` numbers, slot after slot.
    storage: Vec<f32>,
    /// Slots in the order in which they will be read, from the end.
    unread: Vec<usize>,
    free: Vec<usize>,
}

impl<'a, W: Iterator<Item = Vec<u32>>> ActivationBuffer<'a, W> {
    /// An empty buffer of `capacity` activations.
    ///
    /// # Errors
    /// When the model does not write the site, or the capacity is zero.
    pub fn new(
        model: &'a Model,
        site: &str,
        windows: W,
        capacity: usize,
        generator: ChaCha8Rng,
    ) -> Result<Self> {
        let reader = SiteReader::new(model, site)?;
        let width = reader.width()?;
        let numbers = capacity.checked_mul(width).filter(|numbers| *numbers > 0);
        let Some(numbers) = numbers.filter(|numbers| *numbers <= isize::MAX as usize / 4) else {
            let expected = "at least 1, and such that it fits in memory";
            return Err(Error::invalid("capacity of the buffer", capacity, expected));
        };
        Ok(Self {
            reader,
            windows: windows.peekable(),
            generator,
            width,
            storage: vec![0.0; numbers],
            unread: Vec::new(),
            free: (0..capacity).rev().collect(),
        })
    }

    /// Width of an activation.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The next activations `[count, width]` in `f32`; fewer when the windows are used up, and
    /// `None` after that.
    ///
    /// # Errors
    /// When the model fails, or a window has more tokens than the buffer has room for.
    pub fn next_batch(&mut self, count: usize) -> Result<Option<Tensor>> {
        let capacity = self.unread.len() + self.free.len();
        if self.unread.len() <= capacity / 2 || self.unread.len() < count {
            self.refill()?;
        }
        let taken = count.min(self.unread.len());
        if taken == 0 {
            return Ok(None);
        }
        let slots = self.unread.split_off(self.unread.len() - taken);
        let mut values = Vec::with_capacity(taken * self.width);
        for slot in &slots {
            let start = slot * self.width;
            values.extend_from_slice(self.storage.get(start..start + self.width).unwrap_or(&[]));
        }
        self.free.extend(slots);
        let shape = (taken, self.width);
        Ok(Some(engine(Tensor::from_vec(values, shape, &Device::Cpu))?))
    }

    fn refill(&mut self) -> Result<()> {
        loop {
            let group = self.next_group();
            if group.is_empty() {
                break;
            }
            let (width, values) = rows(&self.reader.read(&group)?)?;
            for row in values.chunks_exact(width.max(1)) {
                let Some(slot) = self.free.pop() else {
                    break;
                };
                let start = slot * self.width;
                if let Some(place) = self.storage.get_mut(start..start + self.width) {
                    place.copy_from_slice(row);
                }
                self.unread.push(slot);
            }
        }
        if self.unread.is_empty()
            && let Some(window) = self.windows.peek()
        {
            let expected = format!("between 1 and {}, what the buffer holds", self.free.len());
            return Err(Error::invalid("tokens of a window", window.len(), expected));
        }
        self.unread.shuffle(&mut self.generator);
        Ok(())
    }

    /// Windows of one length for which there is room.
    fn next_group(&mut self) -> Vec<Vec<u32>> {
        let mut group: Vec<Vec<u32>> = Vec::new();
        let mut tokens = 0;
        let (room, length) = (self.free.len(), self.windows.peek().map_or(0, Vec::len));
        while let Some(window) = self.windows.next_if(|window| {
            let full = !group.is_empty() && tokens + length > TOKENS_AT_A_TIME;
            length > 0 && window.len() == length && tokens + length <= room && !full
        }) {
            tokens += window.len();
            group.push(window);
        }
        group
    }
}
