//! `lapidary diff`: where two models differ on one input.

use super::explain::{self, target};
use crate::cli::{Diff, Global};
use crate::subject::Subject;
use crate::{loading, output, report};
use anyhow::{Result, ensure};
use lapidary_explain::{difference, explainer};
use lapidary_model::{Input, Model};

pub fn run(arguments: &Diff, global: &Global) -> Result<()> {
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    let options = explain::options(&arguments.options, global)?;
    let before = loading::written_out(&arguments.before, global)?;
    let after = loading::written_out(&arguments.after, global)?;
    let first = Subject::new(&arguments.subject, &before, global)?;
    let second = Subject::new(&arguments.subject, &after, global)?;
    let kind = |model: &Model| std::mem::discriminant(&model.spec().input);
    ensure!(
        kind(first.model) == kind(second.model) && ids(&first.input)? == ids(&second.input)?,
        "the second model reads this input as other tokens than the first, so that they cannot be compared"
    );
    let position = match arguments.position {
        Some(position) => position,
        None => first.last()?,
    };
    let predictions = target::predictions(&before, &first, position)?;
    let named = target::one(
        arguments.target.as_deref(),
        arguments.foil.as_deref(),
        &before,
        first.model,
        position,
        &predictions,
    )?;
    let found = difference(
        &first.question(),
        &second.question(),
        named.target,
        explainer(&arguments.method)?,
        &first.readable_names(),
        &options,
    )?;
    let mut title = format!(
        "{} and {}: {}",
        arguments.before,
        arguments.after,
        named.name.trim()
    );
    if let Some(foil) = &named.foil {
        title += &format!(" rather than {}", foil.trim());
    }
    let shown = found.report(&title);
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&shown)?)?;
    }
    match global.json {
        true => output::print_json(&found),
        false => output::print(&report::analysis_text(&shown)),
    }
}

/// Token ids; none for pixels, which both models read from the same file.
fn ids(input: &Input) -> Result<Vec<u32>> {
    Ok(match input {
        Input::Tokens { ids, .. } => ids.flatten_all()?.to_vec1::<u32>()?,
        Input::Pixels(_) => Vec::new(),
    })
}
