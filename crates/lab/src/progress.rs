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

    /// The same listener, who hears `heading: ` before everything.
    #[must_use]
    pub fn under(&self, heading: String) -> Self {
        match self.0.clone() {
            Some(listener) => Self::to(move |what| listener(&format!("{heading}: {what}"))),
            None => Self::default(),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn headings_come_first() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let list = heard.clone();
        let progress = Progress::to(move |what| list.lock().unwrap().push(what.to_owned()));
        progress.tell(|| "a".to_owned());
        progress.under("seed 1".to_owned()).tell(|| "b".to_owned());
        assert_eq!(*heard.lock().unwrap(), ["a", "seed 1: b"]);
        let nobody = Progress::default().under("seed 1".to_owned());
        nobody.tell(|| unreachable!("nobody listens"));
    }
}
