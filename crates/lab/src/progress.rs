//! Where an experiment says what it is at.

use std::fmt;
use std::sync::Arc;

/// Who hears what an experiment is at; nobody unless somebody wants to.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<Listener>>);

type Listener = dyn Fn(&str) + Send + Sync;

impl Progress {
    /// Tells `listener`, from whichever thread is at work.
    pub fn to(listener: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    /// Says what is being done, in one line that is only made where somebody listens.
    pub fn tell(&self, what: impl FnOnce() -> String) {
        if let Some(listener) = &self.0 {
            listener(&what());
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Some(_) => "heard",
            None => "unheard",
        })
    }
}
