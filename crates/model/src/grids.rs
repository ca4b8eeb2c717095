//! Attention over the grid of an image's patches: cells and patches have to be the same.

use lapidary_parts::attention::mechanism::lion::LionSpec;
use lapidary_parts::attention::mechanism::subsampled::Selection;
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec};
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::fit::Tiles;
use lapidary_parts::{Error, Result};

use crate::spec::{InputSpec, ModelSpec, PatchInput};

/// A grid that tokens are taken to lie on, row by row.
struct Grid {
    /// Where the attention is told of it.
    field: &'static str,
    /// Cells of a row.
    columns: usize,
    /// Tokens before the first cell.
    before: usize,
}

/// The grids that an attention is told of: its mechanism's and that of its filter.
fn told(attention: &MultiHeadSpec) -> Vec<Grid> {
    let (field, columns) = match &attention.mechanism {
        MechanismSpec::Topological(spec) => ("mechanism.columns", spec.columns),
        MechanismSpec::Soft(spec) => ("mechanism.columns", spec.columns),
        MechanismSpec::Lion(spec) => {
            let image = spec.image.as_ref();
            ("mechanism.image.columns", image.map(|image| image.columns))
        }
        MechanismSpec::Mra(spec) => {
            let columns = spec.image.map(|tiles| tiles.columns);
            ("mechanism.image.columns", columns)
        }
        MechanismSpec::Subsampled(spec) => match (spec.selection, &*spec.inner) {
            (Selection::Local { columns, .. }, _) => ("mechanism.selection.columns", columns),
            (Selection::Unbiased, MechanismSpec::Topological(inner)) => {
                ("mechanism.inner.columns", inner.columns)
            }
            (Selection::Unbiased, _) => ("mechanism.inner", None),
        },
        _ => ("mechanism", None),
    };
    let before = match &attention.mechanism {
        MechanismSpec::Lion(LionSpec { class_token, .. }) => usize::from(*class_token),
        _ => 0,
    };
    let of_mechanism = columns.map(|columns| Grid {
        field,
        columns,
        before,
    });
    let filter = attention.local.and_then(|filter| filter.columns);
    let of_filter = filter.map(|columns| Grid {
        field: "local.columns",
        columns,
        before: 0,
    });
    of_mechanism.into_iter().chain(of_filter).collect()
}

/// Refuses a grid of which the first cell is no patch, or whose rows are not those of the image: distances would be
/// those between other places.
pub(crate) fn validate(spec: &ModelSpec) -> Result<()> {
    let InputSpec::Patches(patches) = &spec.input else {
        return Ok(());
    };
    let row = patches.image[1] / patches.patch.max(1);
    if let Some(OrganisationSpec::Interleaved(fit)) = &spec.organisation
        && let Some(tiles) = fit.tiles
    {
        validate_tiles(patches, tiles, row)?;
    }
    for (index, block) in spec.blocks.iter().enumerate() {
        let MixerSpec::MultiHead(attention) = &block.attention else {
            continue;
        };
        for Grid {
            field,
            columns,
            before,
        } in told(attention)
        {
            if patches.class_tokens != before {
                let expected = match (before, &attention.mechanism) {
                    (0, MechanismSpec::Lion(_)) => {
                        "0 where attention is over a grid, whose first cell is the first token's, or 1 with \
                         class_token = true"
                    }
                    (0, _) => {
                        "0 where attention is over a grid, whose first cell is the first token's"
                    }
                    _ => "1 where attention has a class token before a grid",
                };
                return Err(Error::spec(
                    "input.class_tokens",
                    patches.class_tokens,
                    expected,
                ));
            }
            if patches.resized {
                let expected = "false where attention is over a grid, which is that of one size";
                return Err(Error::spec("input.resized", true, expected));
            }
            if columns != row {
                return Err(Error::spec(
                    format!("blocks.{index}.attention.{field}"),
                    columns,
                    format!("{row}, the patches in a row of the image"),
                ));
            }
        }
    }
    Ok(())
}

/// Refuses tiles that are not those of the image's patches, in rows of so many.
fn validate_tiles(patches: &PatchInput, tiles: Tiles, row: usize) -> Result<()> {
    if patches.class_tokens > 0 {
        let expected = "0 where groups are tiles, whose first cell is the first token's";
        let field = "input.class_tokens";
        return Err(Error::spec(field, patches.class_tokens, expected));
    }
    if patches.resized {
        let expected = "false where groups are tiles, which are those of one size";
        return Err(Error::spec("input.resized", true, expected));
    }
    if tiles.columns != row {
        let expected = format!("{row}, the patches in a row of the image");
        return Err(Error::spec(
            "organisation.tiles.columns",
            tiles.columns,
            expected,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(class_tokens: usize, columns: usize) -> ModelSpec {
        toml::from_str(&format!(
            "width = 16
            input = {{ kind = 'patches', image = [16, 24], patch = 4, class_tokens = {class_tokens} }}
            head = {{ kind = 'pooled', pool = 'mean' }}
            [[blocks]]
            attention = {{ kind = 'multi-head', heads = 2, mechanism = {{ kind = 'topological', columns = {columns} }} }}"
        ))
        .unwrap()
    }

    #[test]
    fn cells_of_a_grid_are_the_patches_of_the_image() {
        assert!(spec(0, 6).validate().is_ok());
        let said = |class_tokens, columns| {
            let error = spec(class_tokens, columns).validate().unwrap_err();
            error.to_string()
        };
        assert!(said(1, 6).starts_with("input.class_tokens is 1, but must be 0"));
        let mut resized = spec(0, 6);
        if let InputSpec::Patches(patches) = &mut resized.input {
            patches.resized = true;
        }
        let refused = resized.validate().unwrap_err().to_string();
        assert!(refused.starts_with("input.resized is true, but must be false"));
        assert_eq!(
            said(0, 4),
            "blocks.0.attention.mechanism.columns is 4, but must be 6, the patches in a row of the image"
        );
    }

    /// Groups that are tiles are those of the image's patches.
    #[test]
    fn tiles_are_of_the_patches_of_the_image() {
        let said = |class_tokens: usize, columns: usize, resized: bool| {
            let text = format!(
                "width = 16
                input = {{ kind = 'patches', image = [16, 24], patch = 4, class_tokens = {class_tokens}, resized = {resized} }}
                organisation = {{ kind = 'interleaved', layout = '(1)', group = 6, groups = 4, tiles = {{ columns = {columns}, height = 2, width = 3 }} }}
                [[blocks]]
                attention = {{ kind = 'multi-head', heads = 2 }}"
            );
            let spec: ModelSpec = toml::from_str(&text).unwrap();
            spec.validate()
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert_eq!(said(0, 6, false), "");
        assert_eq!(
            said(0, 12, false),
            "organisation.tiles.columns is 12, but must be 6, the patches in a row of the image"
        );
        let resized = said(0, 6, true);
        assert!(
            resized.starts_with("input.resized is true, but must be false where groups are tiles")
        );
        let before = said(1, 6, false);
        assert!(
            before.starts_with("input.class_tokens is 1, but must be 0 where groups are tiles")
        );
    }

    /// Every attention that is told of a grid asks for the image's, and LION's class token for one of the input.
    #[test]
    fn whatever_is_over_a_grid_asks_for_the_patches() {
        let said = |attention: &str, class_tokens: usize| {
            let mut spec = spec(class_tokens, 6);
            spec.blocks[0].attention =
                toml::from_str(&format!("kind = 'multi-head'\nheads = 2\n{attention}")).unwrap();
            spec.validate().err().map(|error| error.to_string())
        };
        let image = |columns: usize, class_token: bool| {
            format!(
                "mechanism = {{ kind = 'lion', class_token = {class_token}, image = {{ columns = {columns} }} }}"
            )
        };
        assert_eq!(said(&image(6, false), 0), None);
        assert_eq!(said(&image(6, true), 1), None);
        for (class_token, class_tokens) in [(false, 1), (true, 0), (true, 2)] {
            let refused = said(&image(6, class_token), class_tokens).unwrap();
            let expected = usize::from(class_token);
            let begin =
                format!("input.class_tokens is {class_tokens}, but must be {expected} where");
            assert!(refused.starts_with(&begin), "{refused}");
        }
        for (attention, field) in [
            (image(4, false), "mechanism.image.columns"),
            (
                "mechanism = { kind = 'mra', scales = [4, 1], per_row = [1], image = { columns = 4, tile = [2, 2] } }".to_owned(),
                "mechanism.image.columns",
            ),
            (
                "sharing = 'query-key'\nmechanism = { kind = 'soft', landmarks = { kind = 'mean', ratio = 2 }, columns = 4 }".to_owned(),
                "mechanism.columns",
            ),
            ("local = { side = 3, columns = 4 }".to_owned(), "local.columns"),
            (
                "mechanism = { kind = 'subsampled', selection = { kind = 'local', radius = 2.0, columns = 4 } }".to_owned(),
                "mechanism.selection.columns",
            ),
            (
                "mechanism = { kind = 'subsampled', inner = { kind = 'topological', columns = 4 } }".to_owned(),
                "mechanism.inner.columns",
            ),
        ] {
            let expected = format!(
                "blocks.0.attention.{field} is 4, but must be 6, the patches in a row of the image"
            );
            assert_eq!(said(&attention, 0).as_ref(), Some(&expected));
            let refused = said(&attention, 1).unwrap();
            assert!(refused.starts_with("input.class_tokens is 1, but must be 0"));
            assert_eq!(said(&attention.replace("columns = 4", "columns = 6"), 0), None);
        }
    }
}
