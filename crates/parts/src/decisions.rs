//! What a part decided when it ran first, so that it decides the same when it runs again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Result;

/// Where tokens were put, buckets and clusters, by the path of the mixer that put them there.
///
/// A part that is recomputed in the backward pass is given what flowed into it, in a reversible organisation up to
/// rounding. A hash of that may come out otherwise, and then gradients would be those of another function than the
/// one whose value was used.
///
/// ```
/// use lapidary_parts::decisions::Decisions;
///
/// # fn main() -> lapidary_parts::Result<()> {
/// let decisions = Decisions::default();
/// let first = decisions.once("blocks.0.attention", || Ok(vec![3, 1, 2]))?;
/// let again = decisions.once("blocks.0.attention", || Ok(vec![3, 1, 1]))?;
/// assert_eq!(*first, *again);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Decisions(Arc<Mutex<Kept>>);

type Kept = HashMap<String, Arc<Vec<u32>>>;

impl Decisions {
    /// What was decided under a name; what `decide` gives where nothing was yet.
    ///
    /// # Errors
    /// Those of `decide`.
    pub fn once(
        &self,
        name: &str,
        decide: impl FnOnce() -> Result<Vec<u32>>,
    ) -> Result<Arc<Vec<u32>>> {
        let locked = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = locked().get(name).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        // Nothing is locked while it is decided.
        let decided = Arc::new(decide()?);
        locked().insert(name.to_owned(), decided.clone());
        Ok(decided)
    }
}
