//! Fields that would change nothing, for what stands beside them.

use super::*;

#[test]
fn fields_that_would_change_nothing_are_refused() {
    let heads = |fields: &str, mechanism: &str| {
        format!("kind = 'multi-head', heads = 2, {fields} mechanism = {{ {mechanism} }}")
    };
    let scaled = |mechanism: &str| heads("scale = 0.7,", mechanism);
    let shared = "sharing = 'query-key',";
    let graph = "graph = { vertices = 2, edges = [[0, 1, 1.0]], step = 0.5 }";
    let table = [
        (scaled("kind = 'lion'"), "scale is 0.7"),
        (scaled("kind = 'fastmax'"), "scale is 0.7"),
        (scaled("kind = 'topological'"), "scale is 0.7"),
        (
            scaled("kind = 'doubly-stochastic', operator = { kind = 'qr' }"),
            "scale is 0.7",
        ),
        (
            scaled("kind = 'subsampled', inner = { kind = 'fastmax' }"),
            "scale is 0.7",
        ),
        (
            heads(
                "scale = 0.7, sharing = 'query-key',",
                "kind = 'reformer', chunk = 4",
            ),
            "scale is 0.7",
        ),
        (
            heads("scale = 0.7, sharing = 'query-key',", "kind = 'ecoformer'"),
            "scale is 0.7",
        ),
        (
            heads(
                "",
                "kind = 'linformer', slots = 2, longest = 8, projection = 'mean', sharing = 'none'",
            ),
            "mechanism.sharing is \"given\"",
        ),
        (
            heads(
                shared,
                "kind = 'soft', landmarks = { kind = 'segments', count = 2 }, columns = 4",
            ),
            "mechanism.columns is 4",
        ),
        (
            heads(
                "",
                &format!("kind = 'topological', metric = {{ kind = 'shortest-paths' }}, {graph}"),
            ),
            "mechanism.graph.step is 0.5",
        ),
        (
            heads(
                "",
                "kind = 'mra', scales = [4, 1], per_row = [0], diagonal = 3",
            ),
            "mechanism.diagonal is 3",
        ),
        (
            heads(
                "",
                "kind = 'mra', scales = [4, 1], per_row = [0], first = 1",
            ),
            "mechanism.first is 1",
        ),
        (
            "kind = 'multi-head', heads = 2, query_key_norm = { norm = { kind = 'none' }, per_head = true }"
                .to_owned(),
            "query_key_norm.norm.kind is \"none\"",
        ),
        (
            "kind = 'wavelet', inner = { kind = 'multi-head', heads = 2 }, family = 'orthogonal', base = 'symlet'"
                .to_owned(),
            "base is \"symlet\"",
        ),
        (
            "kind = 'wavelet', inner = { kind = 'multi-head', heads = 2 }, family = 'lifting', taps = 6"
                .to_owned(),
            "taps is 6",
        ),
        (
            "kind = 'wavelet', inner = { kind = 'multi-head', heads = 2 }, family = 'fourier', convolution = 'fourier'"
                .to_owned(),
            "convolution is \"fourier\"",
        ),
    ];
    for (attention, expected) in table {
        let spec: BlockSpec = toml::from_str(&format!("attention = {{ {attention} }}")).unwrap();
        let said = spec.validate(WIDTH, "b").unwrap_err().to_string();
        let expected = format!("b.attention.{expected}");
        assert!(said.starts_with(&expected), "{attention}: {said}");
    }
}

#[test]
fn masks_that_no_row_names_are_refused() {
    let row = format!("'{}'", "#".repeat(8));
    let mask = vec![row; 8].join(", ");
    let text = format!(
        "attention = {{ kind = 'multi-head', heads = 2, causal = true, mechanism = {{ kind = 'sparse', pattern = {{ \
         kind = 'layout', block = 8, heads = [['#', '##']], masks = {{ q = [{mask}] }} }} }} }}"
    );
    let spec: BlockSpec = toml::from_str(&text).unwrap();
    assert_eq!(
        spec.validate(WIDTH, "b").unwrap_err().to_string(),
        "b.attention.mechanism.pattern.masks.q is \"given\", but must be named in a row of heads"
    );
}
