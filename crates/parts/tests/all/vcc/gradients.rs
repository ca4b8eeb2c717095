//! Gradients, and what lenses say of means.

use super::*;

#[test]
fn gradients_equal_central_differences_where_nothing_is_chosen() {
    let subject = Subject::new(
        VccSpec {
            segment_blocks: 1,
            segment: 4,
            ..spec(5)
        },
        3,
    );
    let mut inputs = subject.map.clone();
    inputs.insert("x".to_owned(), tokens(LENGTH));
    let error = gradient_error(&inputs, 2, |inputs| {
        let x = Signal::from(inputs["x"].clone());
        let trace = Trace::new();
        let y = subject.organised(inputs, x, Given::default(), &trace);
        contracted(y.unwrap().hidden.value())
    });
    assert!(error < 1e-6, "{error:e}");
}

/// With coarse blocks the selection has a gradient of its own; what isn't the selection's is the
/// derivative.
#[test]
fn gradients_of_what_is_not_the_selection_equal_central_differences() {
    let subject = Subject::new(spec(2), 2);
    let last = "blocks.1.feedforward.down.weight";
    let inputs = Map::from([(last.to_owned(), subject.map[last].clone())]);
    let error = gradient_error(&inputs, 6, |inputs| {
        let mut map = subject.map.clone();
        map.extend(inputs.clone());
        let trace = Trace::new();
        let y = subject.organised(&map, Signal::from(tokens(LENGTH)), Given::default(), &trace);
        contracted(y.unwrap().hidden.value())
    });
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn lenses_follow_tokens_through_means() {
    let subject = Subject::new(spec(2), 2);
    let x = tokens(LENGTH);
    let streamed = |bias, trace: &Trace| {
        let rules = StreamRules {
            bias,
            ..StreamRules::default()
        };
        let x = Signal::from(x.clone()).into_streams(Partition::positions(LENGTH), rules);
        let y = subject.organised(&subject.map, x.unwrap(), Given::default(), trace);
        y.unwrap().hidden
    };
    let trace = Trace::new().follow_conservation();
    let y = streamed(StreamRules::default().bias, &trace);
    assert_near(y.value(), &subject.run(&x), 1e-12, "value under streams");
    for (site, error) in trace.conservation() {
        assert!(error < 1e-10, "{site}: {error:e}");
    }
    let contributions = streamed(BiasSplit::Drop, &Trace::new())
        .contributions()
        .unwrap();
    let (signal, leaf) = Signal::from(x.clone())
        .into_relevance(RelevanceRules::value_only())
        .unwrap();
    let y = subject
        .organised(&subject.map, signal, Given::default(), &Trace::new())
        .unwrap()
        .hidden;
    for token in [0, 1, 9, LENGTH - 1] {
        let pick = |t: &Tensor| {
            let t = t.narrow(t.rank() - 1, 3, 1).unwrap();
            t.narrow(t.rank() - 2, token, 1).unwrap()
        };
        let gradients = pick(y.value()).sum_all().unwrap().backward().unwrap();
        let relevance = relevance_of(leaf.as_tensor(), &gradients).unwrap();
        let relevance = relevance.sum(2).unwrap().t().unwrap().contiguous().unwrap();
        let expected = pick(&contributions).reshape((LENGTH, BATCH)).unwrap();
        assert_near(&relevance, &expected, 1e-10, "relevance");
    }
}
