//! Which parameters read the residual stream, which write it, and where.

use lapidary_model::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::norm::NormSpec;

use crate::{Error, Result};

/// A part of a block.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// `blocks.0.attention`.
    pub(super) path: String,
    /// `blocks.0.attention_norm`.
    pub(super) norm: String,
    /// The site that it reads.
    pub(super) from: usize,
    /// The site that it writes to.
    pub(super) to: usize,
    /// Linear layers whose input is the stream.
    pub(super) readers: Vec<String>,
    /// Linear layers whose output is added to the stream.
    pub(super) writers: Vec<String>,
}

/// A residual connection from one site to the next.
#[derive(Clone, Debug)]
pub(super) struct Shortcut {
    /// `blocks.0.attention_shortcut`.
    pub(super) path: String,
    pub(super) from: usize,
    pub(super) to: usize,
}

/// Who reads and who writes the stream, site by site. Site 0 is the embeddings.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) sites: usize,
    pub(super) parts: Vec<Part>,
    pub(super) shortcuts: Vec<Shortcut>,
    /// Tables `[rows, width]` of which rows are added to the stream.
    pub(super) tables: Vec<&'static str>,
    /// The linear layer that ends the embedding, where there is one.
    pub(super) embedding: Option<&'static str>,
    /// Linear layers that read the stream after the final norm.
    pub(super) head: Vec<&'static str>,
}

impl Layout {
    /// The layout of a model.
    ///
    /// # Errors
    /// When the stream cannot be given another basis; `method` is for the message.
    pub(super) fn of(spec: &ModelSpec, method: &str) -> Result<Self> {
        let refuse = Refusal { method };
        let (tables, embedding) = refuse.input(&spec.input)?;
        let head = refuse.head(spec)?;
        if let Some(organisation) = &spec.organisation {
            return Err(refuse.error("the organisation of tokens", organisation.kind(), "none"));
        }
        let mut factors = spec.low_rank.keys();
        if let Some(path) = factors.find(|path| path.starts_with("blocks.")) {
            return Err(refuse.error(
                format!("layer {path}"),
                "factorised",
                "dense: cut the stream first, or multiply factors out,",
            ));
        }
        let blocks = spec.expanded_blocks();
        let mut layout = Self {
            sites: 1,
            parts: Vec::new(),
            shortcuts: Vec::new(),
            tables,
            embedding,
            head,
        };
        for (index, block) in blocks.iter().enumerate() {
            refuse.block(index, block)?;
            layout.add(index, block);
        }
        refuse.norms(&blocks, spec.final_norm.as_ref())?;
        Ok(layout)
    }

    /// The parts of one block, in their order.
    pub(super) fn parts_of(&self, index: usize) -> impl Iterator<Item = &Part> {
        let prefix = format!("blocks.{index}.");
        self.parts
            .iter()
            .filter(move |part| part.path.starts_with(&prefix))
    }

    fn add(&mut self, index: usize, block: &BlockSpec) {
        let from = self.sites - 1;
        let part = |name: &str, from, readers: Vec<String>, writers: Vec<String>| {
            let path = format!("blocks.{index}.{name}");
            let full = |names: Vec<String>| -> Vec<String> {
                names.iter().map(|name| format!("{path}.{name}")).collect()
            };
            Part {
                norm: format!("{path}_norm"),
                from,
                to: from + 1,
                readers: full(readers),
                writers: full(writers),
                path: path.clone(),
            }
        };
        let (readers, writers) = mixer_layers(&block.attention);
        self.parts.push(part("attention", from, readers, writers));
        self.shortcuts.push(Shortcut {
            path: format!("blocks.{index}.attention_shortcut"),
            from,
            to: from + 1,
        });
        self.sites += 1;
        if let Some(feedforward) = &block.feedforward {
            let (readers, writers) = feedforward_layers(feedforward);
            let from = match block.wiring {
                Wiring::Parallel => from,
                _ => from + 1,
            };
            self.parts.push(part("feedforward", from, readers, writers));
            if block.wiring != Wiring::Parallel {
                self.shortcuts.push(Shortcut {
                    path: format!("blocks.{index}.feedforward_shortcut"),
                    from,
                    to: from + 1,
                });
                self.sites += 1;
            }
        }
    }

    /// The site that the head reads.
    pub(super) fn last(&self) -> usize {
        self.sites - 1
    }

    /// The module that writes a site: what a report on the site stands under.
    pub(super) fn writer(&self, site: usize) -> &str {
        let part = self.parts.iter().find(|part| part.to == site);
        part.map_or("embeddings", |part| part.path.as_str())
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn mixer_layers(mixer: &MixerSpec) -> (Vec<String>, Vec<String>) {
    match mixer {
        MixerSpec::MultiHead(_) => (owned(&["query", "key", "value"]), owned(&["output"])),
        MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) => (owned(&["input"]), owned(&["output"])),
        // Refused before.
        MixerSpec::Wavelet(_) | MixerSpec::Absent => Default::default(),
    }
}

fn feedforward_layers(feedforward: &FeedforwardSpec) -> (Vec<String>, Vec<String>) {
    match feedforward {
        FeedforwardSpec::Dense(_) => (owned(&["up"]), owned(&["down"])),
        FeedforwardSpec::Gated(_) => (owned(&["gate", "up"]), owned(&["down"])),
        FeedforwardSpec::Linear(_) => (owned(&["map"]), owned(&["map"])),
        // Refused before, with its wiring.
        FeedforwardSpec::SparseCode(_) => Default::default(),
        FeedforwardSpec::Mixture(mixture) => {
            let experts = |name: &str| -> Vec<String> {
                (0..mixture.experts)
                    .map(|expert| format!("experts.{expert}.{name}"))
                    .collect()
            };
            let mut readers = owned(&["router"]);
            readers.extend(experts("gate"));
            readers.extend(experts("up"));
            (readers, experts("down"))
        }
    }
}

/// What keeps a stream from being given another basis.
struct Refusal<'a> {
    method: &'a str,
}

impl Refusal<'_> {
    fn error(&self, what: impl Into<String>, found: &str, expected: &str) -> Error {
        Error::invalid(what, found, format!("{expected} for {}", self.method))
    }

    fn input(&self, input: &InputSpec) -> Result<(Vec<&'static str>, Option<&'static str>)> {
        let norms = match input {
            InputSpec::Tokens(tokens) => [tokens.norm, None],
            InputSpec::Patches(patches) => {
                [patches.norm, patches.around.map(|around| around.patches)]
            }
        };
        let mut given = norms.into_iter().flatten();
        if given.any(|norm| norm != NormSpec::None) {
            return Err(self.error(
                "the norm of the embeddings",
                "given",
                "absent: what it scales by feature cannot be given another basis (whitened or \
                 fwsvd do not mind),",
            ));
        }
        match input {
            InputSpec::Tokens(tokens) => {
                let mut tables = Vec::new();
                let embedding = match tokens.embedding_width {
                    Some(_) => Some("embeddings.projection"),
                    None => {
                        tables.push("embeddings.tokens.weight");
                        None
                    }
                };
                match tokens.position {
                    AbsolutePosition::None => {}
                    AbsolutePosition::Learned { .. } => tables.push("embeddings.positions.weight"),
                    AbsolutePosition::Axial {
                        row_width: Some(_), ..
                    } => {
                        return Err(self.error(
                            "input.position.row_width",
                            "given",
                            "absent: tables side by side cannot be given another basis",
                        ));
                    }
                    AbsolutePosition::Axial { channels, .. } => {
                        tables
                            .extend(["embeddings.positions.rows", "embeddings.positions.columns"]);
                        if channels > 1 {
                            tables.push("embeddings.positions.channels");
                        }
                    }
                    AbsolutePosition::Sinusoidal => {
                        return Err(self.error(
                            "input.position",
                            "sinusoidal",
                            "learned, rotary or none: sines of a fixed basis cannot be given another",
                        ));
                    }
                }
                if tokens.token_types > 0 {
                    tables.push("embeddings.token_types.weight");
                }
                Ok((tables, embedding))
            }
            InputSpec::Patches(patches) => {
                let mut tables = vec!["embeddings.positions.weight"];
                if patches.class_tokens > 0 {
                    tables.push("embeddings.class_tokens");
                }
                Ok((tables, Some("embeddings.patches")))
            }
        }
    }

    fn head(&self, spec: &ModelSpec) -> Result<Vec<&'static str>> {
        match &spec.head {
            HeadSpec::None => Err(self.error(
                "head",
                "none",
                "one that gives scores, as nothing else turns the narrower vectors back,",
            )),
            HeadSpec::Pixels => Err(self.error(
                "head",
                "pixels",
                "one that gives scores, by which it is said how much is lost,",
            )),
            HeadSpec::LanguageModel {
                transform: Some(_), ..
            } => Err(self.error(
                "head.transform",
                "given",
                "absent: its norm holds the width of the model, so try whitened or fwsvd, not a \
                 narrower stream,",
            )),
            HeadSpec::LanguageModel { .. } => match &spec.input {
                InputSpec::Tokens(tokens) if tokens.embedding_width == Some(spec.width) => {
                    // There the head reads without a projection, and would need one afterwards.
                    Err(self.error(
                        "input.embedding_width",
                        "the width of the model",
                        "absent, or another width",
                    ))
                }
                InputSpec::Tokens(tokens) if tokens.embedding_width.is_some() => {
                    Ok(vec!["head.projection"])
                }
                _ => Ok(vec!["head.output"]),
            },
            HeadSpec::Pooled { norm, hidden, .. } if norm.is_some() || hidden.is_some() => {
                Err(self.error(
                    "head",
                    "one with a norm or a hidden layer of the model's width",
                    "a linear layer on the pooled vector",
                ))
            }
            HeadSpec::Pooled { labels: None, .. } => {
                Err(self.error("head.labels", "absent", "a number of scores"))
            }
            HeadSpec::Pooled { pool, .. } => Ok(match pool {
                lapidary_model::Pool::FirstTwo => vec!["head.output", "head.second_output"],
                _ => vec!["head.output"],
            }),
        }
    }

    /// The mean can be taken out of the stream when every norm takes it out, or none does.
    fn norms(&self, blocks: &[BlockSpec], last: Option<&NormSpec>) -> Result<()> {
        let norms = || {
            let parts = blocks.iter().map(|block| &block.norm);
            parts.chain(std::iter::once(last.unwrap_or(&NormSpec::None)))
        };
        let centring = |norm: &NormSpec| matches!(norm, NormSpec::Layer { .. });
        if norms().any(centring) && !norms().all(centring) {
            return Err(self.error(
                "norms",
                "layer norms beside others",
                "all layer norms, or none of them, since only layer norms ignore the mean of the \
                 stream,",
            ));
        }
        Ok(())
    }

    fn block(&self, index: usize, block: &BlockSpec) -> Result<()> {
        let name = format!("block {index}");
        if !block.wiring.adds() {
            return Err(self.error(
                format!("the wiring of {name}"),
                block.wiring.name(),
                "pre-norm or parallel, since a norm on the stream itself is bound to its basis \
                 (whitened or fwsvd do not mind),",
            ));
        }
        if block.cross_attention.is_some() {
            return Err(self.error(name, "one with cross-attention", "one without"));
        }
        if block.attention == MixerSpec::Absent {
            return Err(self.error(
                name,
                "one without a mixer",
                "one with its mixer: slice first",
            ));
        }
        if let MixerSpec::Wavelet(_) = &block.attention {
            return Err(self.error(
                name,
                "one that transforms each feature along the sequence",
                "one whose mixer has no basis of features",
            ));
        }
        if let MixerSpec::MultiHead(attention) = &block.attention
            && let Some(peculiarity) = attention.peculiarity()
        {
            return Err(self.error(
                format!("the attention of {name}"),
                peculiarity,
                "softmax with projections of its own (the factorisations do not mind),",
            ));
        }
        if block.layer_scale.is_some() {
            return Err(self.error(name, "one with layer scales", "one without"));
        }
        if block.shortcuts {
            return Err(self.error(name, "one with shortcuts", "one that was not sliced before"));
        }
        let mixture = matches!(block.feedforward, Some(FeedforwardSpec::Mixture(_)));
        if mixture && matches!(block.norm, NormSpec::Layer { .. }) {
            return Err(self.error(
                name,
                "a mixture of experts behind a layer norm",
                "one behind an RMS norm: experts have no biases to take in the norm's,",
            ));
        }
        Ok(())
    }
}
