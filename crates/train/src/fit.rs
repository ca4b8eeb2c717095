//! Whether a model can read what it is to be trained on: found out before any step.

use lapidary_parts::attention::{MechanismSpec, MixerSpec};
use lapidary_parts::organisation::OrganisationSpec;

use crate::{Result, TrainSpec};

impl TrainSpec {
    /// Refuses data of so many different tokens, if the model does not read as many, and the mask behind them where
    /// there is one.
    pub(crate) fn check_vocabulary(&self, tokens: usize) -> Result<()> {
        let found = self.model.vocabulary().unwrap_or(0);
        let (needed, mask) = match self.masking {
            Some(_) => (tokens.saturating_add(1), ", and the mask is one more"),
            None => (tokens, ""),
        };
        if found >= needed {
            return Ok(());
        }
        let expected = format!("at least {needed}: the data have {tokens} tokens{mask}");
        wrong("model.input.vocabulary".into(), found, expected)
    }

    /// Refuses attention over a graph with fewer vertices than a sequence has tokens, each of which is one.
    pub(crate) fn check_vertices(&self) -> Result<()> {
        let (tokens, of) = match (&self.model.organisation, &self.self_distillation) {
            // Blocks see one group at a time.
            (Some(OrganisationSpec::Interleaved(groups)), _) => (groups.group, "tokens of a group"),
            (_, Some(_)) => (self.model.length(), "tokens of an image"),
            (_, None) => (self.length, "length"),
        };
        for (index, block) in self.model.blocks.iter().enumerate() {
            let MixerSpec::MultiHead(attention) = &block.attention else {
                continue;
            };
            let field = format!("model.blocks.{index}.attention.mechanism");
            if let Some((field, vertices)) = vertices(&attention.mechanism, field)
                && vertices < tokens
            {
                return wrong(field, vertices, format!("at least {tokens}, the {of}"));
            }
        }
        Ok(())
    }
}

/// The vertices of the graph that a mechanism is over, if it is, and the field that says so.
fn vertices(mechanism: &MechanismSpec, field: String) -> Option<(String, usize)> {
    match mechanism {
        MechanismSpec::Topological(spec) => {
            let graph = spec.graph.as_ref()?;
            Some((format!("{field}.graph.vertices"), graph.vertices))
        }
        MechanismSpec::Subsampled(spec) => vertices(&spec.inner, format!("{field}.inner")),
        _ => None,
    }
}

fn wrong(field: String, found: usize, expected: String) -> Result<()> {
    let error = lapidary_parts::Error::spec(field, found, expected);
    Err(lapidary_model::Error::from(error).into())
}
