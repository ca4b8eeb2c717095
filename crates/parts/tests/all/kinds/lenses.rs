//! What streams and relevance find in blocks of every kind.

use super::*;

#[test]
fn streams_sum_to_the_value_under_every_complete_rule() {
    let rules = [
        StreamRules::default(),
        StreamRules {
            bias: BiasSplit::Norm,
            activation: Slope::Tangent,
            product: ProductSplit::FreezeGate,
            ..StreamRules::default()
        },
        StreamRules {
            bias: BiasSplit::Extra,
            ..StreamRules::default()
        },
    ];
    for case in Case::all() {
        let block = case.block(&case.map);
        for rules in rules {
            let trace = Trace::new().follow_conservation();
            let x = Signal::from(tokens())
                .into_streams(Partition::positions(LENGTH), rules)
                .unwrap();
            let y = case
                .pass(&block, x, Given::default(), &trace, None)
                .unwrap();
            assert!(is_finite(&y.contributions().unwrap()), "{}", case.name);
            assert_near(y.value(), &case.run(&tokens()), 1e-10, case.name);
            let conservation = trace.conservation();
            assert!(!conservation.is_empty());
            for (site, error) in conservation {
                assert!(error < 1e-10, "{} at {site}: {error:e}", case.name);
            }
        }
    }
}

/// Streams without biases and value-only relevance are the forward and the backward way to the
/// same numbers.
#[test]
fn relevance_equals_streams_without_biases() {
    for case in Case::all() {
        let block = case.block(&case.map);
        let rules = StreamRules {
            bias: BiasSplit::Drop,
            ..StreamRules::default()
        };
        let trace = Trace::new();
        let streamed = Signal::from(tokens())
            .into_streams(Partition::positions(LENGTH), rules)
            .unwrap();
        let streamed = case
            .pass(&block, streamed, Given::default(), &trace, None)
            .unwrap();
        let contributions = streamed.contributions().unwrap();

        let (x, leaf) = Signal::from(tokens())
            .into_relevance(RelevanceRules::value_only())
            .unwrap();
        let y = case
            .pass(&block, x, Given::default(), &trace, None)
            .unwrap();
        assert_near(y.value(), &case.run(&tokens()), 1e-10, case.name);
        for (token, feature) in [(0, 1), (LENGTH - 1, WIDTH - 1)] {
            let pick = |t: &Tensor| -> Tensor {
                let t = t.narrow(t.rank() - 1, feature, 1).unwrap();
                let t = t.narrow(t.rank() - 2, token, 1).unwrap();
                t.squeeze(t.rank() - 1)
                    .unwrap()
                    .squeeze(t.rank() - 2)
                    .unwrap()
            };
            let gradients = pick(y.value()).sum_all().unwrap().backward().unwrap();
            let relevance = relevance_of(leaf.as_tensor(), &gradients).unwrap();
            let relevance = relevance.sum(2).unwrap().t().unwrap(); // [position, batch]
            assert!(is_finite(&relevance), "{}", case.name);
            assert_near(&relevance, &pick(&contributions), 1e-10, case.name);
        }
    }
}

/// What flows backward may be a modified gradient or the relevance itself.
#[test]
fn both_forms_of_relevance_agree() {
    for case in Case::all() {
        let block = case.block(&case.map);
        let aware = RelevanceRules {
            epsilon: 0.0,
            ..RelevanceRules::attention_aware()
        };
        let followed = |rules| RelevanceRules {
            activation: ActivationRule::Gradient,
            ..rules
        };
        let value_only = RelevanceRules::value_only();
        for rules in [aware, value_only, followed(aware), followed(value_only)] {
            // Relevance through weights of any other kind has no explicit rule.
            if !case.is_softmax() && rules.attention == AttentionRule::Uniform {
                let (x, _) = Signal::from(tokens())
                    .into_relevance(rules.explicit())
                    .unwrap();
                let refused = case.pass(&block, x, Given::default(), &Trace::new(), None);
                let refused = refused.unwrap_err().to_string();
                assert!(refused.contains("cp-lrp-explicit"), "{refused}");
                assert!(refused.contains("ready weights"), "{refused}");
                continue;
            }
            // A sigmoid's relevance can pass unchanged in the explicit form alone.
            let is_gated_by_a_sigmoid = case.name.starts_with("cross-attention");
            if is_gated_by_a_sigmoid && rules.activation == ActivationRule::Identity {
                continue;
            }
            let relevance = |rules: RelevanceRules| -> Tensor {
                let (x, leaf) = Signal::from(tokens()).into_relevance(rules).unwrap();
                let y = case
                    .pass(&block, x, Given::default(), &Trace::new(), None)
                    .unwrap();
                let gradients = contracted(&y.read_out().unwrap()).backward().unwrap();
                let arrived = gradients.get(leaf.as_tensor()).unwrap();
                rules.relevance(leaf.as_tensor(), arrived).unwrap()
            };
            let (explicit, modified) = (relevance(rules.explicit()), relevance(rules));
            assert_near(&explicit, &modified, 1e-8, case.name);
        }
    }
}

/// With the gradient's rules, the relevance lens is the plain gradient.
#[test]
fn gradient_rules_give_the_gradient() {
    for case in Case::all() {
        let block = case.block(&case.map);
        let gradient = |signal: Signal, leaf: &Tensor| -> Tensor {
            let y = case
                .pass(&block, signal, Given::default(), &Trace::new(), None)
                .unwrap();
            let gradients = contracted(y.value()).backward().unwrap();
            gradients.get(leaf).unwrap().clone()
        };
        let plain = lapidary_kernels::Var::from_tensor(&tokens()).unwrap();
        let plain = plain.as_tensor();
        let expected = gradient(Signal::from(plain.clone()), plain);
        let (x, leaf) = Signal::from(tokens())
            .into_relevance(RelevanceRules::gradient_times_input())
            .unwrap();
        assert_near(&gradient(x, leaf.as_tensor()), &expected, 1e-10, case.name);
    }
}

/// Laying the weights out for a site doesn't change what a lens finds.
#[test]
fn looking_at_attention_weights_changes_nothing() {
    for case in Case::all() {
        let MixerSpec::MultiHead(_) = case.spec.attention else {
            continue;
        };
        let block = build(&case.map, |p| Block::new(&case.spec, WIDTH, p)).unwrap();
        for rules in [
            RelevanceRules::attention_aware(),
            RelevanceRules::value_only(),
            RelevanceRules::gradient_times_input(),
        ] {
            let relevance = |trace: &Trace| -> Tensor {
                let (x, leaf) = Signal::from(tokens()).into_relevance(rules).unwrap();
                let y = case.pass(&block, x, Given::default(), trace, None).unwrap();
                let gradients = contracted(y.value()).backward().unwrap();
                relevance_of(leaf.as_tensor(), &gradients).unwrap()
            };
            let fused = relevance(&Trace::new());
            let looked = relevance(&Trace::new().capture("*attention.weights").unwrap());
            assert_near(&looked, &fused, 1e-10, case.name);
        }
    }
}
