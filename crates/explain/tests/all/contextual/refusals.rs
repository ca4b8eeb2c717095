//! What cannot be asked for.

use super::{IDS, case, followed, head, split};
use crate::common::{DECODER, model, tokens};
use lapidary_explain::contextual::{
    Endpoint, Means, Node, Outliers, Place, Scorer, Search, decompose, discover, heads,
};
use lapidary_explain::{Question, Target};

#[test]
fn what_cannot_be_is_refused_by_name() {
    let recurrent = r#"
width = 8
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
attention = { kind = "mamba" }
[head]
kind = "language-model"
"#;
    let mamba = model(recurrent, 1);
    let input = tokens(&IDS);
    let said = |error: lapidary_explain::Error| error.to_string();
    let error = decompose(
        &Question::new(&mamba, &input),
        &[Target::class(1)],
        &[vec![0]],
        split(),
    );
    let text = said(error.unwrap_err());
    assert!(
        text.contains("no rule for selective_scan") && text.contains("decompx"),
        "{text}"
    );
    let text = said(heads(&mamba).unwrap_err());
    assert!(text.starts_with("mixer of block 0 is mamba"), "{text}");

    let decoder = model(DECODER, 1);
    let question = Question::new(&decoder, &input);
    let error = decompose(&question, &[Target::class(1)], &[vec![9]], split());
    assert!(said(error.unwrap_err()).contains("position of a source is 9"));
    let method = followed(split());
    let scorer = Scorer::new(&decoder, &[case(&IDS)], Means::zero(), method).unwrap();
    for (node, expected) in [
        (head(5, 0), "block of a node is 5"),
        (head(0, 7), "head of a node is 7"),
    ] {
        let error = scorer.scores(&[node], &[Endpoint::Scores]).map(drop);
        let ends = [Endpoint::Head(node, Place::Mixed)];
        let at = scorer.scores(&[head(0, 0)], &ends).map(drop);
        let text = said(error.and(at).unwrap_err());
        assert!(
            text.contains(expected) || text.contains("site blocks.5"),
            "{text}"
        );
    }
    let there = Node {
        position: Some(6),
        ..head(0, 0)
    };
    let error = scorer.scores(&[there], &[Endpoint::Scores]).map(drop);
    assert!(said(error.unwrap_err()).contains("position of a node is 0.0@6"));
    assert!(Scorer::new(&decoder, &[], Means::zero(), method).is_err());
    let long = [case(&IDS), case(&[1, 2])];
    let inputs = [&long[0].input, &long[1].input];
    assert!(
        said(Means::by_position(&decoder, &inputs).unwrap_err()).contains("length of an input")
    );
    let search = Search {
        outliers: Outliers::Top(0),
        ..Search::default()
    };
    assert!(discover(&scorer, &search, &heads(&decoder).unwrap()).is_err());
}
