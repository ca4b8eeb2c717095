//! Tokens sorted by their buckets and cut into chunks, and which of them meet.

use super::ReformerSpec;

/// The sorted tokens of one head of a sequence.
pub(super) struct Sorted {
    /// Of each round, cut into chunks; the chunks of all rounds one after the other.
    pub(super) chunks: Vec<Vec<usize>>,
    /// Chunks of a round.
    pub(super) each: usize,
    /// The chunk of each token in each round.
    chunk_of: Vec<Vec<usize>>,
    /// The bucket of each token in each round.
    buckets: Vec<Vec<u32>>,
}

impl Sorted {
    /// `buckets` of each round, of each token.
    pub(super) fn new(buckets: Vec<Vec<u32>>, chunk: usize) -> Self {
        let (mut chunks, mut each) = (Vec::new(), 0);
        let mut chunk_of = Vec::new();
        for buckets in &buckets {
            let mut order: Vec<usize> = (0..buckets.len()).collect();
            // Stable, so that tokens of a bucket stay in order.
            order.sort_by_key(|&token| buckets[token]);
            let mut of = vec![0; order.len()];
            for (place, &token) in order.iter().enumerate() {
                of[token] = chunks.len() + place / chunk;
            }
            chunk_of.push(of);
            each = order.len().div_ceil(chunk);
            chunks.extend(order.chunks(chunk).map(<[usize]>::to_vec));
        }
        Self {
            chunks,
            each,
            chunk_of,
            buckets,
        }
    }

    /// The chunks that a chunk of `round` meets, each as often as it does.
    pub(super) fn meets(&self, chunk: usize, round: usize, spec: &ReformerSpec) -> Vec<usize> {
        let all = self.chunks.len();
        let first = chunk + all * spec.before - spec.before;
        let window = (first..=first + spec.before + spec.after).map(|chunk| chunk % all);
        // What another round has hashed to a bucket of the same number didn't hash alike.
        let round = round * self.each..(round + 1) * self.each;
        window
            .filter(|chunk| !spec.within_buckets || round.contains(chunk))
            .collect()
    }

    /// How often two tokens meet, in all rounds.
    pub(super) fn meetings(&self, query: usize, key: usize, spec: &ReformerSpec) -> usize {
        let rounds = 0..self.chunk_of.len();
        let of = |round: usize| {
            let window = self.meets(self.chunk_of[round][query], round, spec);
            let holds = |chunk: &usize| {
                let there = self.chunk_of[chunk / self.each][key] == *chunk;
                there && self.shares(round, query, key, spec)
            };
            window.iter().filter(|chunk| holds(chunk)).count()
        };
        rounds.map(of).sum()
    }

    /// Whether a token meets another one that it may see.
    pub(super) fn meets_another(&self, query: usize, causal: bool, spec: &ReformerSpec) -> bool {
        let sees = |key: usize| key != query && (!causal || key < query);
        (0..self.chunk_of.len()).any(|round| {
            let window = self.meets(self.chunk_of[round][query], round, spec);
            let mut keys = window.iter().flat_map(|chunk| &self.chunks[*chunk]);
            keys.any(|&key| sees(key) && self.shares(round, query, key, spec))
        })
    }

    /// Whether a round lets two tokens of chunks that meet meet.
    pub(super) fn shares(
        &self,
        round: usize,
        query: usize,
        key: usize,
        spec: &ReformerSpec,
    ) -> bool {
        !spec.within_buckets || self.buckets[round][query] == self.buckets[round][key]
    }
}
