//! The textual layout of local and global layers: `(2)4(2)4(2)`.

use crate::{Error, Result};

const MAX_LAYERS: usize = 1 << 12;

/// Local layers, and the global ones that follow them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Layers on groups of data tokens.
    pub local: usize,
    /// Layers on all latents; 0 only in the last stage.
    pub global: usize,
}

/// Parses a layout: stages `(a)g` of `a` local and `g` global layers, of which the last may leave out
/// `g`.
///
/// # Errors
/// For anything else, naming `field`.
pub fn parse(layout: &str, field: &str) -> Result<Vec<Stage>> {
    stages(layout).ok_or_else(|| {
        Error::spec(
            field,
            layout,
            format!(
                "stages such as \"(2)4(2)4(2)\": local layers in brackets and at least one global layer \
                 behind them, which the last stage may leave out; at most {MAX_LAYERS} layers of a kind"
            ),
        )
    })
}

fn stages(layout: &str) -> Option<Vec<Stage>> {
    let mut stages: Vec<Stage> = Vec::new();
    let mut rest = layout;
    let (mut locals, mut globals) = (0, 0);
    while !rest.is_empty() {
        // Only the last stage has no global layers.
        if stages.last().is_some_and(|stage| stage.global == 0) {
            return None;
        }
        let (local, behind) = number(rest.strip_prefix('(')?)?;
        rest = behind.strip_prefix(')')?;
        let mut global = 0;
        if !rest.is_empty() && !rest.starts_with('(') {
            let (count, behind) = number(rest)?;
            // Written out, it is at least one unless nothing follows.
            if count == 0 && !behind.is_empty() {
                return None;
            }
            (global, rest) = (count, behind);
        }
        locals += local;
        globals += global;
        stages.push(Stage { local, global });
        if locals > MAX_LAYERS || globals > MAX_LAYERS || stages.len() > MAX_LAYERS {
            return None;
        }
    }
    (!stages.is_empty()).then_some(stages)
}

/// A number and what stands behind it.
fn number(text: &str) -> Option<(usize, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at_checked(end)?;
    let number = digits.parse().ok()?;
    (number <= MAX_LAYERS).then_some((number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(layout: &str) -> Option<Vec<(usize, usize)>> {
        let stages = stages(layout)?;
        Some(stages.iter().map(|s| (s.local, s.global)).collect())
    }

    #[test]
    fn layouts_are_stages_of_local_and_global_layers() {
        assert_eq!(pairs("(2)4(2)"), Some(vec![(2, 4), (2, 0)]));
        assert_eq!(pairs("(1)1(1)1"), Some(vec![(1, 1), (1, 1)]));
        assert_eq!(pairs("(12)"), Some(vec![(12, 0)]));
        assert_eq!(pairs("(0)3(10)20"), Some(vec![(0, 3), (10, 20)]));
        assert_eq!(pairs("(2)0"), Some(vec![(2, 0)]));
    }

    #[test]
    fn malformed_layouts_are_refused() {
        for layout in [
            "",
            "2",
            "(2",
            "2)",
            "()",
            "(2)(2)",
            "(2)0(2)",
            "(2)4(",
            "(2)4x",
            "(-1)",
            "(2) 4",
            "((2))",
            "(2)4)",
            "(9999)",
            "(99999999999999999999)",
            "(4000)1(4000)",
        ] {
            assert_eq!(pairs(layout), None, "{layout}");
        }
        let said = parse("(2)(2)", "organisation.layout").unwrap_err();
        assert!(
            said.to_string()
                .starts_with("organisation.layout is \"(2)(2)\"")
        );
    }
}
