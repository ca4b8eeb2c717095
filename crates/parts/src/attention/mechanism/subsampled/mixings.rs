//! What is mixed where only some of the keys are there.

use super::super::blocks::{self, Meetings, Rule, rows};
use super::super::sequences::{At, Sequences};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{ScoreBias, SoftmaxMask, Tensor, embedding, matmul, softmax};
use lapidary_signal::Mixing;

/// A score that is as good as none, and yet a number.
const HIDDEN: f64 = -1e30;

/// Rows `[batch, heads, key, width]` that were picked, by head: `[batch, heads, picked, width]`.
pub(super) fn pick(x: &Tensor, picked: &Tensor) -> lapidary_kernels::Result<Tensor> {
    let (batch, heads, _, width) = x.dims4()?;
    let x = embedding(&rows(x)?, picked)?;
    Ok(x.reshape((batch, heads, (), width))?)
}

/// Each query's own key.
#[derive(Debug)]
pub(super) struct OwnKeys {
    /// The row of the key of each query, `[queries]`.
    rows: Tensor,
}

impl OwnKeys {
    pub(super) fn new(sequences: &Sequences, q: &Tensor) -> Result<Self> {
        let all = sequences.sizes[..3].iter().product();
        let mut rows = vec![0u32; all];
        for sequence in sequences.iter() {
            for token in sequence.queries() {
                let at = sequence.query(token).row;
                if let Some(row) = rows.get_mut(at) {
                    *row = sequence.key(token).row as u32;
                }
            }
        }
        Ok(Self {
            rows: tensor(Tensor::from_vec(rows, all, q.device()))?,
        })
    }

    /// `scale · q_i · k_i`, `[queries]`.
    pub(super) fn scores(&self, q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
        let products = tensor(q.mul(&embedding(k, &self.rows)?))?;
        tensor(tensor(products.sum(1))? * scale)
    }
}

/// Softmax over the keys of windows and each query's own.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) sizes: [usize; 4],
    pub(super) head_width: usize,
    /// In windows, and of each query with its own key; absent where there is no real token.
    pub(super) meetings: Option<Meetings>,
    /// Queries that meet their own keys, where they do.
    pub(super) own: Option<u64>,
}

impl Mixing for Drawn {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let all = batch * heads * queries;
        let mixed = blocks::output(self.meetings.as_slice(), all, values)?;
        Ok(mixed.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries = self.sizes[..3].iter().product::<usize>();
        let pairs = self.meetings.as_ref().map_or(0, Meetings::pairs);
        let attended =
            (pairs - self.own.unwrap_or(0)) * (2 * self.head_width + 2 * width + 5) as u64;
        let own = match self.own {
            None => 0,
            Some(_) => queries * (2 * self.head_width + 2 * (2 * width + 4)),
        };
        attended + own as u64
    }
}

/// As [`Drawn`], with weights laid out for each window, as large as what is gathered of a bias that
/// is differentiated.
#[derive(Debug)]
pub(super) struct LaidOut {
    sizes: [usize; 4],
    head_width: usize,
    /// `[windows, query, key]`, those of own keys in a last column.
    weights: Tensor,
    /// Rows of the keys, `[windows · key]`.
    keys: Tensor,
    /// Rows of the queries' own keys, `[windows · query]`.
    own: Option<Tensor>,
    /// Where each query lies among those of the windows, pads behind all.
    back: Tensor,
    pairs: u64,
}

impl LaidOut {
    pub(super) fn new(
        sequences: &Sequences,
        windows: Vec<[Vec<At>; 2]>,
        rule: Rule,
        (q, k): (&Tensor, &Tensor),
        scale: f64,
        bias: &ScoreBias,
        own: Option<OwnKeys>,
    ) -> Result<Self> {
        let [_, heads, queries, keys] = sequences.sizes;
        let [most_queries, most_keys] = [0, 1].map(|side| {
            let lengths = windows.iter().map(|window| window[side].len());
            lengths.max().unwrap_or_default()
        });
        let count = windows.len();
        let (table, by_distance) = match bias {
            ScoreBias::ByDistance(table) => (table.clone(), true),
            bias => (bias.laid_out(queries, keys)?, false),
        };
        let (bias_batch, bias_heads, of_head) = match by_distance {
            true => {
                let (heads, distances) = tensor(table.dims2())?;
                (1, heads, distances)
            }
            false => {
                let (batch, heads, ..) = tensor(table.dims4())?;
                (batch, heads, queries * keys)
            }
        };
        // Where the bias of a query and a key stands.
        let place = |query: At, key: At| {
            let (batch, head) = (query.row / queries / heads, query.row / queries % heads);
            let index = batch % bias_batch * bias_heads + head % bias_heads;
            let (i, j) = (query.row % queries, key.row % keys);
            let within = match by_distance {
                true => queries - 1 - i + j,
                false => i * keys + j,
            };
            (index * of_head + within) as u32
        };
        let all: usize = sequences.sizes[..3].iter().product();
        let (mut query_rows, mut key_rows) = (Vec::new(), Vec::new());
        let (mut places, mut own_places, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
        let mut back = vec![(count * most_queries) as u32; all];
        let mut pairs = 0;
        for (window, [of, over]) in windows.iter().enumerate() {
            for (slot, query) in of.iter().enumerate() {
                back[query.row] = (window * most_queries + slot) as u32;
                query_rows.push(query.row as u32);
                for key in over {
                    let sees = rule.sees(*query, *key);
                    pairs += u64::from(sees);
                    places.push(place(*query, *key));
                    hidden.push(if sees { 0.0 } else { HIDDEN });
                }
                places.resize(places.len() + most_keys - over.len(), 0);
                hidden.resize(hidden.len() + most_keys - over.len(), HIDDEN);
                // Its own key is where it is, counted from the end of the keys.
                let behind = keys - queries + query.row % queries;
                let own = At {
                    row: query.row / queries * keys + behind,
                    position: query.position,
                };
                own_places.push(place(*query, own));
            }
            let missing = most_queries - of.len();
            query_rows.resize(query_rows.len() + missing, 0);
            own_places.resize(own_places.len() + missing, 0);
            places.resize(places.len() + missing * most_keys, 0);
            hidden.resize(hidden.len() + missing * most_keys, 0.0);
            key_rows.extend(over.iter().map(|key| key.row as u32));
            key_rows.resize(key_rows.len() + most_keys - over.len(), 0);
        }
        let device = q.device();
        let ids = |ids: Vec<u32>| {
            let length = ids.len();
            tensor(Tensor::from_vec(ids, length, device))
        };
        let (query_rows, key_rows) = (ids(query_rows)?, ids(key_rows)?);
        let (q_rows, k_rows) = (rows(q)?, rows(k)?);
        let width = tensor(q_rows.dim(1))?;
        let q = tensor(embedding(&q_rows, &query_rows)?.reshape((count, most_queries, width)))?;
        let k = tensor(embedding(&k_rows, &key_rows)?.reshape((count, most_keys, width)))?;
        let products = matmul(&q, &tensor(k.t())?)?;
        let table = tensor(tensor(table.contiguous())?.reshape(((), 1)))?;
        let shape = (count, most_queries, most_keys);
        let bias = tensor(embedding(&table, &ids(places)?)?.reshape(shape))?;
        let hidden = tensor(tensor(Tensor::from_vec(hidden, shape, device))?.to_dtype(q.dtype()))?;
        let mut scores = tensor(tensor(products * scale)? + tensor(bias + hidden)?)?;
        let own = match own {
            None => None,
            Some(own) => {
                let shape = (count, most_queries, 1);
                let each = tensor(own.scores(&q_rows, &k_rows, scale)?.reshape(((), 1)))?;
                let each = tensor(embedding(&each, &query_rows)?.reshape(shape))?;
                let bias = tensor(embedding(&table, &ids(own_places)?)?.reshape(shape))?;
                scores = tensor(Tensor::cat(&[&scores, &tensor(each + bias)?], 2))?;
                let rows = tensor(own.rows.reshape(((), 1)))?;
                let flat = tensor(tensor(rows.index_select(&query_rows, 0))?.flatten_all())?;
                Some(flat)
            }
        };
        Ok(Self {
            sizes: sequences.sizes,
            head_width: width,
            weights: softmax(&scores, &SoftmaxMask::default())?,
            keys: key_rows,
            own,
            back: ids(back)?,
            pairs,
        })
    }
}

impl Mixing for LaidOut {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let (count, each, columns) = self.weights.dims3()?;
        let keys = columns - usize::from(self.own.is_some());
        let values = rows(values)?;
        let width = values.dim(1)?;
        let v = embedding(&values, &self.keys)?.reshape((count, keys, width))?;
        let mut mixed = matmul(&self.weights.narrow(2, 0, keys)?, &v)?;
        if let Some(own) = &self.own {
            let v = embedding(&values, own)?.reshape((count, each, width))?;
            mixed = (mixed + v.broadcast_mul(&self.weights.narrow(2, keys, 1)?)?)?;
        }
        let nothing = Tensor::zeros((1, width), values.dtype(), values.device())?;
        let mixed = Tensor::cat(&[&mixed.reshape((count * each, width))?, &nothing], 0)?;
        Ok(embedding(&mixed, &self.back)?.reshape((batch, heads, queries, width))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries = self.sizes[..3].iter().product::<usize>() as u64;
        let own = if self.own.is_some() { queries } else { 0 };
        (self.pairs + own) * (2 * self.head_width + 2 * width + 5) as u64
    }
}

/// A mechanism over some of the keys.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) sizes: [usize; 4],
    pub(super) inner: Box<dyn Mixing>,
    /// Rows of the keys, `[batch · heads · picked]`.
    pub(super) picked: Tensor,
}

impl Mixing for Gathered {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.inner.mix(&pick(values, &self.picked)?)
    }

    fn operations(&self, width: usize) -> u64 {
        self.inner.operations(width)
    }
}
