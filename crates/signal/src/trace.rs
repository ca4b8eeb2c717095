//! Named sites: where a model writes, and what is done there.
//!
//! A [`Trace`] is handed through a forward pass. Each module passes what it writes through
//! [`Trace::site`] under a name such as `blocks.3.attention.out`; rules whose glob matches
//! capture it, replace it, put a lens on it, or tap its gradient.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::tensor;
use crate::{Error, Lens, Result, Signal};
use globset::{Glob, GlobMatcher};
use lapidary_kernels::{GradStore, Tensor, Var};

type Replacement = Arc<dyn Fn(&str, Signal) -> Result<Signal> + Send + Sync>;

#[derive(Clone)]
enum Action {
    Capture,
    Replace(Replacement),
    Tap,
}

/// What happened at one site.
#[derive(Clone, Debug)]
pub struct SiteRecord {
    /// The signal that was written there, after replacements.
    pub signal: Signal,
    /// The zero that was added so that the gradient at the site is kept.
    tap: Option<Var>,
}

impl SiteRecord {
    /// Gradient of a backward pass at this site; an error when the site was not tapped or the
    /// result does not depend on it.
    pub fn gradient(&self, gradients: &GradStore) -> Result<Tensor> {
        let tap = self.tap.as_ref().ok_or_else(|| {
            Error::invalid("gradient of a site", "not tapped", "tapped before the pass")
        })?;
        gradients.get(tap.as_tensor()).cloned().ok_or_else(|| {
            Error::invalid(
                "gradient of a site",
                "absent",
                "present: the result must depend on the site",
            )
        })
    }

    /// Whether the site was tapped and a backward pass came by.
    pub fn is_reached(&self, gradients: &GradStore) -> bool {
        let tap = self.tap.as_ref();
        tap.is_some_and(|tap| gradients.get(tap.as_tensor()).is_some())
    }

    /// Relevance at this site: what the lens says, and without one `value ⊙ gradient`.
    pub fn relevance(&self, gradients: &GradStore) -> Result<Tensor> {
        let gradient = self.gradient(gradients)?;
        match self.signal.relevance_rules() {
            Some(rules) => rules.relevance(self.signal.value(), &gradient),
            None => tensor(self.signal.value().detach() * gradient),
        }
    }
}

/// What is to be done at which sites, and what was found there.
#[derive(Default)]
pub struct Trace {
    rules: Vec<(GlobMatcher, Action)>,
    follow_conservation: bool,
    found: Mutex<Found>,
}

#[derive(Default)]
struct Found {
    records: BTreeMap<String, SiteRecord>,
    conservation: BTreeMap<String, f64>,
    names: Vec<String>,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let patterns: Vec<_> = self
            .rules
            .iter()
            .map(|(glob, _)| glob.glob().glob())
            .collect();
        f.debug_struct("Trace")
            .field("patterns", &patterns)
            .finish_non_exhaustive()
    }
}

impl Trace {
    /// A trace that does nothing, at no cost.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps what is written at sites that match `glob`. `*` matches any characters, dots too:
    /// `blocks.*.out` also names `blocks.0.attention.out`.
    pub fn capture(self, glob: &str) -> Result<Self> {
        self.rule(glob, Action::Capture)
    }

    /// Passes what is written through `replacement`, which gets the site's name.
    pub fn replace(
        self,
        glob: &str,
        replacement: impl Fn(&str, Signal) -> Result<Signal> + Send + Sync + 'static,
    ) -> Result<Self> {
        self.rule(glob, Action::Replace(Arc::new(replacement)))
    }

    /// Keeps the value, and its gradient in any backward pass that follows.
    pub fn tap(self, glob: &str) -> Result<Self> {
        self.rule(glob, Action::Tap)
    }

    /// Measures `|Σ_k S_k − value|` at every site while streams flow.
    pub fn follow_conservation(mut self) -> Self {
        self.follow_conservation = true;
        self
    }

    fn rule(mut self, glob: &str, action: Action) -> Result<Self> {
        self.rules.push((compile(glob)?, action));
        Ok(self)
    }

    /// Whether nothing is done or measured at any site.
    pub fn is_idle(&self) -> bool {
        self.rules.is_empty() && !self.follow_conservation
    }

    /// Whether any rule matches the site, so that a module knows to compute what it would
    /// otherwise fuse away.
    pub fn wants(&self, site: fmt::Arguments<'_>) -> bool {
        if self.rules.is_empty() {
            return false;
        }
        let name = site.to_string();
        self.rules.iter().any(|(glob, _)| glob.is_match(&name))
    }

    /// Passes `signal` through the site's rules, in the order in which they were declared.
    pub fn site(&self, site: fmt::Arguments<'_>, signal: Signal) -> Result<Signal> {
        let metered = matches!(signal.lens(), Lens::Meter(..));
        if self.is_idle() && !metered {
            return Ok(signal);
        }
        let name = site.to_string();
        let mut signal = signal;
        let mut keep = false;
        let mut tap = None;
        for (glob, action) in &self.rules {
            if !glob.is_match(&name) {
                continue;
            }
            match action {
                Action::Capture => keep = true,
                Action::Replace(replacement) => signal = replacement(&name, signal)?,
                Action::Tap => {
                    keep = true;
                    let zero = tensor(Var::from_tensor(&tensor(signal.value.zeros_like())?))?;
                    signal.value = tensor(&signal.value + zero.as_tensor())?;
                    tap = Some(zero);
                }
            }
        }
        if let Lens::Meter(meter, _) = signal.lens() {
            meter.close(&name);
        }
        let conservation = if self.follow_conservation {
            signal.conservation_error()?
        } else {
            None
        };
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = conservation {
            found.conservation.insert(name.clone(), error);
        }
        if keep {
            found.records.insert(
                name.clone(),
                SiteRecord {
                    signal: signal.clone(),
                    tap,
                },
            );
        }
        found.names.push(name);
        Ok(signal)
    }

    /// Names of the sites that were written so far, in order. Empty for a trace without rules.
    pub fn names(&self) -> Vec<String> {
        self.found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .names
            .clone()
    }

    /// An error when no site that was written matches `glob`.
    pub fn check_matched(&self, glob: &str) -> Result<()> {
        let names = self.names();
        let matcher = compile(glob)?;
        if names.iter().any(|name| matcher.is_match(name)) {
            return Ok(());
        }
        Err(Error::NoSuchSite {
            pattern: glob.to_owned(),
            written: summary(&names),
        })
    }

    /// The record of one captured or tapped site.
    pub fn record(&self, site: &str) -> Result<SiteRecord> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.records.get(site).cloned().ok_or_else(|| {
            match found.names.iter().any(|name| name == site) {
                true => Error::invalid(
                    format!("record of site {site}"),
                    "written but not kept",
                    "captured or tapped before the pass",
                ),
                false => Error::NoSuchSite {
                    pattern: site.to_owned(),
                    written: summary(&found.names),
                },
            }
        })
    }

    /// The signal captured at one site.
    pub fn signal(&self, site: &str) -> Result<Signal> {
        Ok(self.record(site)?.signal)
    }

    /// Every captured or tapped site.
    pub fn records(&self) -> BTreeMap<String, SiteRecord> {
        self.found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .records
            .clone()
    }

    /// `|Σ_k S_k − value|` relative to the largest `|value|`, for each site that streams passed.
    pub fn conservation(&self) -> BTreeMap<String, f64> {
        self.found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .conservation
            .clone()
    }
}

fn compile(glob: &str) -> Result<GlobMatcher> {
    let pattern = Glob::new(glob).map_err(|error| Error::Pattern {
        pattern: glob.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(pattern.compile_matcher())
}

fn summary(names: &[String]) -> String {
    match names {
        [] => "no sites".to_owned(),
        [only] => only.clone(),
        [first, .., last] => format!("{} sites from {first} to {last}", names.len()),
    }
}
