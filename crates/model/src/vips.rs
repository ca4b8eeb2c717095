//! VIP tokens that the input names: by an id, or by a token type. One that it does not have would choose no
//! token at all, without a word.

use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::vcc::Importance;
use lapidary_parts::{Error, Result};

use crate::spec::{InputSpec, ModelSpec};

/// Refuses an organisation around tokens of an id or a type that the input does not have.
pub(crate) fn validate(spec: &ModelSpec) -> Result<()> {
    let Some(OrganisationSpec::VipCentric(vcc)) = &spec.organisation else {
        return Ok(());
    };
    let (kind, id) = match vcc.importance {
        Importance::First => return Ok(()),
        Importance::Token { id } => ("token", id),
        Importance::TokenType { id } => ("token-type", id),
    };
    let (count, of) = match (&spec.input, vcc.importance) {
        (InputSpec::Patches(_), _) => {
            let expected = "first in a model of images, whose patches have neither ids nor types";
            return Err(Error::spec("organisation.importance.kind", kind, expected));
        }
        (InputSpec::Tokens(tokens), Importance::TokenType { .. }) => {
            (tokens.token_types, "token_types")
        }
        (InputSpec::Tokens(tokens), _) => (tokens.vocabulary, "vocabulary"),
    };
    if count == 0 {
        let expected = "first or token in a model without input.token_types";
        return Err(Error::spec("organisation.importance.kind", kind, expected));
    }
    if id as usize >= count {
        let expected = format!("below {count}, the input's {of}");
        return Err(Error::spec("organisation.importance.id", id, expected));
    }
    Ok(())
}
