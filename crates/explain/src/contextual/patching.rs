//! Path patching: the effect of a head through one path alone.
//!
//! The sender is set to its mean while every other head writes what it wrote; what then arrives at
//! the receiver is all that the path brings. A receiver that is a head is patched with what
//! arrived in a second pass, in which everything after it is computed anew (Wang et al., arXiv
//! 2211.00593). So a sender costs a pass, and each receiving head of it another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{Batch, Reading, repeated};
use super::means::Means;
use super::node::{Node, Place, attentions, features, masks};
use super::scorer::{Endpoint, reaches};
use crate::Result;
use crate::error::engine;
use lapidary_kernels::Tensor;
use lapidary_model::Model;
use lapidary_signal::{Signal, Trace};

/// By how much each sender lowers the targets' numbers through the path to each endpoint when it
/// is set to its mean, summed over the batch: `[sender][endpoint]`.
pub(super) fn effects(
    model: &Model,
    batch: &Batch,
    means: &Means,
    senders: &[Vec<Node>],
    endpoints: &[Endpoint],
) -> Result<Vec<Vec<f64>>> {
    let arrived = Arrived::new(model, batch, means, senders, endpoints)?;
    let mut effects = vec![Vec::with_capacity(endpoints.len()); senders.len()];
    for endpoint in endpoints {
        let patched = match endpoint {
            Endpoint::Scores => arrived.scores.clone(),
            Endpoint::Head(node, place) => {
                arrived.patched(model, batch, senders.len(), node, *place)?
            }
        };
        for ((row, numbers), sender) in effects.iter_mut().zip(patched).zip(senders) {
            let lost = batch
                .numbers
                .iter()
                .zip(&numbers)
                .map(|(all, now)| all - now);
            row.push(if reaches(sender, endpoint) {
                lost.sum()
            } else {
                0.0
            });
        }
    }
    Ok(effects)
}

/// What arrives when each sender is patched and all other heads are held.
struct Arrived {
    /// `[senders · cases, length, features]` by site.
    at: BTreeMap<String, Tensor>,
    /// The targets' numbers, `[sender][case]`.
    scores: Vec<Vec<f64>>,
}

impl Arrived {
    fn new(
        model: &Model,
        batch: &Batch,
        means: &Means,
        senders: &[Vec<Node>],
        endpoints: &[Endpoint],
    ) -> Result<Self> {
        let copies = senders.len();
        let earliest = senders.iter().flatten().map(|node| node.block).min();
        let earliest = earliest.unwrap_or(0);
        let arrived: Arc<Mutex<BTreeMap<String, Tensor>>> = Arc::default();
        let mut trace = Trace::new();
        for block in earliest..model.spec().expanded_blocks().len() {
            let held = held(model, batch, means, senders, block)?;
            let seen = arrived.clone();
            trace = trace.replace(&Place::Mixed.site(block), move |site, signal| {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.insert(site.to_owned(), signal.into_value());
                Ok(Signal::from(held.clone()))
            })?;
        }
        for endpoint in endpoints {
            if let Endpoint::Head(node, place) = endpoint
                && *place != Place::Mixed
            {
                trace = trace.capture(&place.site(node.block))?;
            }
        }
        let output = batch.run(model, earliest, copies, &trace)?;
        let scores = read(batch, &batch.logits(&output)?, copies)?;
        let mut at = std::mem::take(&mut *arrived.lock().unwrap_or_else(PoisonError::into_inner));
        for (site, record) in trace.records() {
            at.insert(site, record.signal.into_value());
        }
        Ok(Self { at, scores })
    }

    /// The targets' numbers when a head has what arrived at it, `[sender][case]`.
    fn patched(
        &self,
        model: &Model,
        batch: &Batch,
        copies: usize,
        node: &Node,
        place: Place,
    ) -> Result<Vec<Vec<f64>>> {
        let site = place.site(node.block);
        let Some(arrived) = self.at.get(&site) else {
            // The head lies before every sender.
            return Ok(vec![batch.numbers.clone(); copies]);
        };
        let range = features(node, place, &attentions(model)?, model.spec().width)?;
        let original = repeated(batch.found(place, node.block)?, copies)?;
        let patched = spliced(&original, arrived, &range, node.position)?;
        let trace = Trace::new().replace(&site, move |_, _| Ok(Signal::from(patched.clone())))?;
        let output = batch.run(model, node.block, copies, &trace)?;
        read(batch, &batch.logits(&output)?, copies)
    }
}

/// What heads wrote in the plain pass, the senders' replaced by their means:
/// `[senders · cases, length, features]`.
fn held(
    model: &Model,
    batch: &Batch,
    means: &Means,
    senders: &[Vec<Node>],
    block: usize,
) -> Result<Tensor> {
    let found = batch.found(Place::Mixed, block)?;
    if senders.iter().flatten().all(|node| node.block != block) {
        return repeated(found, senders.len());
    }
    let mask = masks(
        senders,
        block,
        model,
        batch.length(),
        (found.dtype(), found.device()),
    )?;
    // x − mask (x − m)
    let away = engine(mask.broadcast_mul(&means.less(found, Place::Mixed, block)?))?;
    let held = engine(found.broadcast_sub(&away))?;
    engine(held.flatten(0, 1))
}

/// `[copies · cases, ..]` scores as numbers `[copy][case]`.
fn read(batch: &Batch, logits: &Tensor, copies: usize) -> Result<Vec<Vec<f64>>> {
    let mut shape = vec![copies, batch.cases()];
    shape.extend(logits.dims().iter().skip(1));
    batch.read(&engine(logits.reshape(shape))?, Reading::Difference)
}

/// `into` `[rows, length, features]` with the features of `range` taken from `from`, at one
/// position or at all.
fn spliced(
    into: &Tensor,
    from: &Tensor,
    range: &std::ops::Range<usize>,
    position: Option<usize>,
) -> Result<Tensor> {
    let (_, length, width) = engine(into.dims3())?;
    let mut mask = vec![0f32; length * width];
    for (index, row) in mask.chunks_mut(width.max(1)).enumerate() {
        if position.is_none_or(|only| only == index)
            && let Some(own) = row.get_mut(range.clone())
        {
            own.fill(1.0);
        }
    }
    let mask = engine(Tensor::from_vec(mask, (1, length, width), into.device()))?;
    let mask = engine(mask.to_dtype(into.dtype()))?;
    let change = engine(engine(from - into)?.broadcast_mul(&mask))?;
    engine(into + change)
}
