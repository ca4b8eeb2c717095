//! Every system, once.

use crate::experiments;
use crate::{Error, Reproduction, Result, Setting};
use serde::Serialize;

/// What a system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A decomposition of a prediction.
    Explanation,
    /// A decomposition of a checkpoint.
    Compression,
    /// A survey or tutorial.
    Tutorial,
}

/// A system from a paper.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct System {
    /// Its name on the command line.
    pub slug: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// Its authors.
    pub authors: &'static str,
    /// Year of publication.
    pub year: u16,
    /// arXiv id, where there is one.
    pub arxiv: Option<&'static str>,
    /// What it is.
    pub kind: Kind,
    /// Where it stands in this code.
    pub parts: &'static [&'static str],
    #[serde(skip)]
    experiment: fn(&Setting) -> Result<Reproduction>,
}

impl System {
    /// Runs the system's experiment.
    pub fn reproduce(&self, setting: &Setting) -> Result<Reproduction> {
        let started = std::time::Instant::now();
        let mut reproduction = (self.experiment)(setting)?;
        reproduction.slug = self.slug.to_owned();
        reproduction.title = self.title.to_owned();
        reproduction.scale = setting.scale;
        reproduction.seed = setting.seed;
        reproduction.seconds = started.elapsed().as_secs_f64();
        Ok(reproduction)
    }
}

static SYSTEMS: [System; 5] = [
    System {
        slug: "contextual-decomposition",
        title: "Efficient Automated Circuit Discovery in Transformers using Contextual \
                Decomposition",
        authors: "Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll, Yu",
        year: 2024,
        arxiv: Some("2407.00886"),
        kind: Kind::Explanation,
        parts: &["signal::contextual", "explain::contextual"],
        experiment: experiments::contextual::run,
    },
    System {
        slug: "decompx",
        title: "DecompX: Explaining Transformers Decisions by Propagating Token Decomposition",
        authors: "Modarressi, Fayyaz, Aghazadeh, Yaghoobzadeh, Pilehvar",
        year: 2023,
        arxiv: Some("2306.02873"),
        kind: Kind::Explanation,
        parts: &["signal::streams", "explain::decompx"],
        experiment: experiments::decompx::run,
    },
    System {
        slug: "fwsvd",
        title: "Language model compression with weighted low-rank factorization",
        authors: "Hsu, Hua, Chang, Lou, Shen, Jin",
        year: 2022,
        arxiv: Some("2207.00112"),
        kind: Kind::Compression,
        parts: &["factor::weighted", "compress::fwsvd"],
        experiment: experiments::fwsvd::run,
    },
    System {
        slug: "introduction-to-transformers",
        title: "An Introduction to Transformers",
        authors: "Turner",
        year: 2023,
        arxiv: Some("2304.10557"),
        kind: Kind::Tutorial,
        parts: &["parts::attention::multi_head", "parts::block"],
        experiment: experiments::introduction::run,
    },
    System {
        slug: "logit-attribution",
        title: "A Mathematical Framework for Transformer Circuits: direct logit attribution",
        authors: "Elhage, Nanda, Olsson, Henighan, Joseph, Mann, Askell, et al.",
        year: 2021,
        arxiv: None,
        kind: Kind::Explanation,
        parts: &["signal::streams", "explain::logit_attribution"],
        experiment: experiments::logit_attribution::run,
    },
];

/// Every system.
pub fn systems() -> &'static [System] {
    &SYSTEMS
}

/// The system of that name.
pub fn find(slug: &str) -> Result<&'static System> {
    SYSTEMS
        .iter()
        .find(|system| system.slug == slug)
        .ok_or_else(|| {
            let known: Vec<_> = SYSTEMS.iter().map(|system| system.slug).collect();
            Error::Unknown {
                slug: slug.to_owned(),
                known: known.join(", "),
            }
        })
}
