//! Where the gradients of listed keys go, and where those of each row come from.

use super::BlockAttention;

/// A key of a piece.
#[derive(Clone, Copy, Default)]
pub(super) struct Use {
    part: u32,
    piece: u32,
    /// Of a large piece, the slot of its gradients; of a small one, its place among the keys.
    at: u32,
}

/// Of each listed key of a large piece its slot, of each small piece its first pair, and of each row of keys
/// what it is made of, in order.
pub(super) struct Uses {
    /// For each part, those of all large pieces one behind the other.
    slots: Vec<Vec<u32>>,
    /// For each part and piece, where its keys begin among these, or its pairs among those of small pieces.
    first: Vec<Vec<usize>>,
    /// Slots and pairs of small pieces.
    pub(super) sizes: [usize; 2],
    /// Where the uses of each row begin, and the end of the last.
    starts: Vec<usize>,
    uses: Vec<Use>,
}

/// Where the gradients of a row come from.
pub(super) enum Source {
    Slot(usize),
    /// A part, a piece of it, the key's place there and the piece's first pair.
    Pairs([usize; 4]),
}

impl Uses {
    /// In place of a slot, where the row is met nowhere else: the gradients are the row's own.
    pub(super) const ALONE: u32 = u32::MAX;

    pub(super) fn new(of: &BlockAttention) -> Self {
        let [_, keys] = of.rows;
        let mut counts = vec![0u32; keys];
        let pieces = || {
            of.parts
                .iter()
                .flat_map(|part| part.pieces().iter().map(move |piece| (part, piece)))
        };
        for (part, piece) in pieces() {
            for &row in part.key_rows(&piece.keys) {
                counts[row as usize] += 1;
            }
        }
        // Rows that one large piece alone meets have no uses to add up.
        let mut alone = vec![false; keys];
        for (part, piece) in pieces().filter(|(_, piece)| !piece.is_small()) {
            for &row in part.key_rows(&piece.keys) {
                alone[row as usize] = counts[row as usize] == 1;
            }
        }
        let mut starts = Vec::with_capacity(keys + 1);
        let mut all = 0;
        for (count, alone) in counts.iter().zip(&alone) {
            starts.push(all);
            all += if *alone { 0 } else { *count as usize };
        }
        starts.push(all);
        let mut uses = Self {
            slots: Vec::new(),
            first: Vec::new(),
            sizes: [0; 2],
            starts: starts.clone(),
            uses: vec![Use::default(); all],
        };
        uses.fill(of, &alone, starts);
        uses
    }

    fn fill(&mut self, of: &BlockAttention, alone: &[bool], mut next: Vec<usize>) {
        for (number, part) in of.parts.iter().enumerate() {
            let (mut slots, mut first) = (Vec::new(), Vec::new());
            for (index, piece) in part.pieces().iter().enumerate() {
                let small = piece.is_small();
                first.push(if small { self.sizes[1] } else { slots.len() });
                for (at, &row) in part.key_rows(&piece.keys).iter().enumerate() {
                    let row = row as usize;
                    if alone[row] {
                        slots.push(Self::ALONE);
                        continue;
                    }
                    let at = if small { at } else { self.sizes[0] };
                    self.uses[next[row]] = Use {
                        part: number as u32,
                        piece: index as u32,
                        at: at as u32,
                    };
                    next[row] += 1;
                    if !small {
                        slots.push(at as u32);
                        self.sizes[0] += 1;
                    }
                }
                if small {
                    self.sizes[1] += piece.pairs();
                }
            }
            self.slots.push(slots);
            self.first.push(first);
        }
    }

    /// The slots of the keys of a large piece.
    pub(super) fn slots(&self, [part, piece]: [usize; 2], keys: usize) -> &[u32] {
        &self.slots[part][self.first[part][piece]..][..keys]
    }

    /// Where the pairs of a small piece begin.
    pub(super) fn first_pair(&self, [part, piece]: [usize; 2]) -> usize {
        self.first[part][piece]
    }

    /// What the gradients of a row are the sums of.
    pub(super) fn of<'a>(
        &'a self,
        row: usize,
        attention: &'a BlockAttention,
    ) -> impl Iterator<Item = Source> + 'a {
        let uses = &self.uses[self.starts[row]..self.starts[row + 1]];
        uses.iter().map(move |one| {
            let [part, piece, at] = [one.part, one.piece, one.at].map(|index| index as usize);
            match attention.parts[part].pieces()[piece].is_small() {
                false => Source::Slot(at),
                true => Source::Pairs([part, piece, at, self.first[part][piece]]),
            }
        })
    }
}
