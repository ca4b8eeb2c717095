//! Attention over the grid of an image's patches: cells and patches have to be the same.

use lapidary_parts::attention::mechanism::topological::TopologicalSpec;
use lapidary_parts::attention::{MechanismSpec, MixerSpec};
use lapidary_parts::{Error, Result};

use crate::spec::{InputSpec, ModelSpec};

/// Refuses a grid of which the first cell is no patch, or whose rows are not those of the image: distances would be
/// those between other places.
pub(crate) fn validate(spec: &ModelSpec) -> Result<()> {
    let InputSpec::Patches(patches) = &spec.input else {
        return Ok(());
    };
    let row = patches.image[1] / patches.patch.max(1);
    for (index, block) in spec.blocks.iter().enumerate() {
        let MixerSpec::MultiHead(attention) = &block.attention else {
            continue;
        };
        let MechanismSpec::Topological(TopologicalSpec {
            columns: Some(columns),
            ..
        }) = &attention.mechanism
        else {
            continue;
        };
        if patches.class_tokens > 0 {
            let expected =
                "0 where attention is over a grid, whose first cell is the first token's";
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
        if *columns != row {
            return Err(Error::spec(
                format!("blocks.{index}.attention.mechanism.columns"),
                columns,
                format!("{row}, the patches in a row of the image"),
            ));
        }
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
}
