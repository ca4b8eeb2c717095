//! What can go wrong while explaining.

use lapidary_model::Model;
use lapidary_parts::organisation::OrganisationSpec;

/// An error of an explainer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The target does not exist for this model and input.
    #[error("target {what} is {found}, but must be {expected}")]
    Target {
        /// Which part of the target.
        what: &'static str,
        /// What it is.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// Something that was given does not do.
    #[error("{what} is {found}, but must be {expected}")]
    Invalid {
        /// What was given.
        what: String,
        /// What it is.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A figure could not be drawn.
    #[error("the plot {title:?} could not be drawn: {reason}")]
    Plot {
        /// The figure's title.
        title: String,
        /// What the plotting library says.
        reason: String,
    },
    /// A file could not be read or written, or is not what it claims to be.
    #[error(transparent)]
    File(Box<lapidary_model::Error>),
    /// The model or a part of it failed.
    #[error(transparent)]
    Model(#[from] lapidary_parts::Error),
    /// An operation failed, or has no rule under the lens.
    #[error(transparent)]
    Signal(#[from] lapidary_signal::Error),
    /// A factorisation failed.
    #[error(transparent)]
    Factor(#[from] lapidary_factor::Error),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
}

impl Error {
    /// Something that was given does not do.
    pub(crate) fn invalid(
        what: impl Into<String>,
        found: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            what: what.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

// Boxed, so that it does not weigh on every result.
impl From<lapidary_model::Error> for Error {
    fn from(error: lapidary_model::Error) -> Self {
        Self::File(Box::new(error))
    }
}

/// The result of an explanation.
pub type Result<T> = std::result::Result<T, Error>;

/// Lifts an error of the tensor engine.
pub(crate) fn engine<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

/// Refuses a model whose matrices are not all that its parts do: blocks that share weights, scale what
/// their parts write, or hold small integers.
pub(crate) fn require_written_out(model: &Model, what: &str) -> Result<()> {
    if !model.needs_writing_out() {
        return Ok(());
    }
    let found = match (model.shares_weights(), model.scales_layers()) {
        (true, _) => "one whose blocks share their weights",
        (false, true) => "one with layer scales",
        (false, false) => "one with quantised matrices",
    };
    Err(Error::invalid(
        format!("model of {what}"),
        found,
        "written out (Model::written_out)",
    ))
}

/// Refuses a model whose organisation lets blocks see something else than all tokens of a sequence side by side, for what
/// takes a site of a block for the sequence.
pub(crate) fn require_whole_sequences(model: &Model, what: &str) -> Result<()> {
    match &model.spec().organisation {
        None | Some(OrganisationSpec::Reversible(_)) => Ok(()),
        Some(other @ (OrganisationSpec::Interleaved(_) | OrganisationSpec::VipCentric(_))) => {
            let expected =
                format!("absent or reversible for {what}: blocks see groups or means of tokens");
            Err(Error::invalid(
                "organisation of the model",
                other.kind(),
                expected,
            ))
        }
    }
}

/// The same, and one whose blocks move two streams, for what reads the stream before a block or behind it.
pub(crate) fn require_one_stream(model: &Model, what: &str) -> Result<()> {
    match &model.spec().organisation {
        None => Ok(()),
        Some(organisation) => {
            let expected =
                format!("absent for {what}, which reads one stream of all tokens at each block");
            Err(Error::invalid(
                "organisation of the model",
                organisation.kind(),
                expected,
            ))
        }
    }
}
