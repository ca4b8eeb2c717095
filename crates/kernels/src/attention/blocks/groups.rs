//! Which pieces may be worked off at the same time.

use super::BlockAttention;

/// Pieces of all parts, each as its part and its number there, in groups of which no two have a query or a
/// key in common. Those of a group stand in order.
pub(super) fn groups(of: &BlockAttention) -> Vec<Vec<[usize; 2]>> {
    let parts = of.parts.iter().enumerate();
    let all: Vec<[usize; 2]> = parts
        .flat_map(|(number, part)| (0..part.pieces().len()).map(move |piece| [number, piece]))
        .collect();
    let mut sets = Sets::new(all.len());
    // The last piece that had each row.
    let mut last = of.rows.map(|rows| vec![None; rows]);
    for (here, &[part, piece]) in all.iter().enumerate() {
        let part = &of.parts[part];
        let piece = &part.pieces()[piece];
        let sides = [part.query_rows(&piece.queries), part.key_rows(&piece.keys)];
        for (rows, last) in sides.into_iter().zip(&mut last) {
            for &row in rows {
                if let Some(other) = last[row as usize].replace(here) {
                    sets.join(here, other);
                }
            }
        }
    }
    let mut numbers = vec![None; all.len()];
    let mut groups: Vec<Vec<[usize; 2]>> = Vec::new();
    for (here, piece) in all.into_iter().enumerate() {
        let number = *numbers[sets.first(here)].get_or_insert(groups.len());
        match groups.get_mut(number) {
            Some(group) => group.push(piece),
            None => groups.push(vec![piece]),
        }
    }
    groups
}

/// Disjoint sets of numbers (Galler and Fischer, 1964).
struct Sets {
    /// A smaller member of the same set, or the number itself where there is none.
    smaller: Vec<usize>,
}

impl Sets {
    fn new(count: usize) -> Self {
        Self {
            smaller: (0..count).collect(),
        }
    }

    /// The smallest member of the set of a number.
    fn first(&mut self, mut of: usize) -> usize {
        while self.smaller[of] != of {
            self.smaller[of] = self.smaller[self.smaller[of]];
            of = self.smaller[of];
        }
        of
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.first(one), self.first(other));
        self.smaller[one.max(other)] = one.min(other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockPart, Listed};

    /// One block for each pair of lists of rows.
    fn part(blocks: &[[&[u32]; 2]]) -> BlockPart {
        let mut part = BlockPart::default();
        let add = |side: &mut Listed, rows: &[u32]| {
            side.rows.extend(rows);
            side.positions.resize(side.rows.len(), 0);
        };
        for [queries, keys] in blocks {
            add(&mut part.queries, queries);
            add(&mut part.keys, keys);
            let ends = [part.queries.rows.len(), part.keys.rows.len()];
            part.ends.push(ends);
        }
        part
    }

    #[test]
    fn rows_are_in_one_group() {
        let parts = vec![
            part(&[[&[0], &[0, 1]], [&[1], &[2]], [&[2], &[3]], [&[3], &[4]]]),
            // Query 3 is in both parts; keys 1 and 3 meet here.
            part(&[[&[3], &[5]], [&[4], &[1, 3]]]),
        ];
        let of = BlockAttention::new(parts, [5, 6], 1.0).unwrap();
        let expected = vec![
            vec![[0, 0], [0, 2], [1, 1]],
            vec![[0, 1]],
            vec![[0, 3], [1, 0]],
        ];
        assert_eq!(groups(&of), expected);
        let nothing = BlockAttention::new(vec![], [2, 2], 1.0).unwrap();
        assert!(groups(&nothing).is_empty());
    }
}
