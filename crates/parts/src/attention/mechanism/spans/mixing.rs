//! Attention to tokens and summaries alike.

use super::Summaries;
use crate::attention::mechanism::blocks::{Meetings, operations, output};
use lapidary_kernels::{Tensor, appended_rows};
use lapidary_signal::Mixing;

/// The mean over divisions of what queries meet, each one softmax over keys and summaries.
#[derive(Debug)]
pub(in super::super) struct Summarised {
    /// `[batch, heads, queries, keys]`.
    pub(in super::super) sizes: [usize; 4],
    pub(in super::super) head_width: usize,
    /// Summaries that stand behind the keys.
    pub(in super::super) made: Option<Summaries>,
    /// Where queries and keys meet in each division.
    pub(in super::super) divisions: Vec<Vec<Meetings>>,
    /// Operations of whatever stood before.
    pub(in super::super) before: u64,
}

impl Mixing for Summarised {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let values = match &self.made {
            None => values.clone(),
            Some(made) => appended_rows(values, &made.values(values)?)?,
        };
        let mut sum: Option<Tensor> = None;
        for division in &self.divisions {
            let mixed = output(division, batch * heads * queries, &values)?;
            sum = Some(match sum {
                None => mixed,
                Some(sum) => (sum + mixed)?,
            });
        }
        let sum = match sum {
            None => output(&[], batch * heads * queries, &values)?,
            Some(sum) if self.divisions.len() == 1 => sum,
            Some(sum) => (sum / self.divisions.len() as f64)?,
        };
        Ok(sum.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries: usize = self.sizes[..3].iter().product();
        let widths = [self.head_width, width];
        let each = self.divisions.iter();
        let attended = each.map(|meetings| operations(meetings, queries, widths));
        let made = self.made.as_ref().map_or(0, |made| made.operations(widths));
        let averaged = match self.divisions.len() {
            0 | 1 => 0,
            count => count * queries * width,
        };
        self.before + made + attended.sum::<u64>() + averaged as u64
    }
}
