//! Linformer with tokens projected before keys and values are made of them: the same at less cost.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::{Given, Subject, WIDTH, mask, spec};
use crate::common::{assert_near, build, contracted, difference, draw, gradient_error, random};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::linformer::{
    LinformerSpec, Longer, Project, Projection, Sharing,
};
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec};
use lapidary_parts::{Context, Error};
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};

const SLOTS: usize = 3;
const LONGEST: usize = 9;

fn attention(linformer: LinformerSpec) -> MultiHeadSpec {
    spec(MechanismSpec::Linformer(linformer), false)
}

/// The same attention in both forms, keys first, with one set of parameters.
fn both(linformer: &LinformerSpec, of: impl Fn(MultiHeadSpec) -> MultiHeadSpec) -> [Subject; 2] {
    let [keys, tokens] = [Project::Keys, Project::Tokens].map(|project| {
        Subject::new(
            of(attention(LinformerSpec {
                project,
                ..linformer.clone()
            })),
            4,
        )
    });
    // Parameters have the same names, so that one form reads what the other was saved as.
    assert!(keys.map.keys().eq(tokens.map.keys()));
    let map = keys.map.clone();
    [keys, Subject { map, ..tokens }]
}

/// Every way in which tokens can be projected.
fn ways() -> Vec<LinformerSpec> {
    let mut all = Vec::new();
    for sharing in [Sharing::Headwise, Sharing::KeyValue, Sharing::Layerwise] {
        for projection in [
            Projection::Learned,
            Projection::Mean,
            Projection::Convolution,
        ] {
            // Means learn nothing that could be shared.
            if projection == Projection::Mean && sharing != Sharing::Headwise {
                continue;
            }
            all.push(LinformerSpec {
                sharing,
                projection,
                ..LinformerSpec::new(SLOTS, LONGEST)
            });
        }
        all.push(LinformerSpec {
            sharing,
            slots_by_head: vec![2, SLOTS],
            ..LinformerSpec::new(SLOTS, LONGEST)
        });
    }
    // More slots than tokens, and fewer than any head may have.
    all.push(LinformerSpec::new(12, LONGEST));
    all.push(LinformerSpec {
        slots_by_head: vec![4, 2],
        ..LinformerSpec::new(5, LONGEST)
    });
    all.push(LinformerSpec {
        longer: Longer::Interpolate,
        ..LinformerSpec::new(SLOTS, 4)
    });
    all
}

#[test]
fn projected_tokens_are_projected_keys() {
    let variants: [fn(MultiHeadSpec) -> MultiHeadSpec; 4] = [
        |spec| spec,
        |spec| MultiHeadSpec {
            bias: false,
            ..spec
        },
        |spec| MultiHeadSpec {
            groups: Some(1),
            ..spec
        },
        |spec| MultiHeadSpec {
            value_width: Some(5),
            ..spec
        },
    ];
    for linformer in ways() {
        for of in variants {
            let [keys, tokens] = both(&linformer, of);
            for length in [1, 4, 7, LONGEST] {
                let x = random(&[2, length, WIDTH], 1);
                let [a, b] = [&keys, &tokens].map(|of| of.output(&x, Given::default()));
                assert_near(&b, &a, 1e-12, &format!("{linformer:?} at {length}"));
            }
        }
    }
}

/// What pads hold never counts, in what biases add neither.
#[test]
fn pads_are_left_out_before_tokens_are_projected() {
    let x = random(&[2, LONGEST, WIDTH], 2);
    let other = random(&[2, LONGEST, WIDTH], 3);
    let rows: [&[u8]; 2] = [&[1, 1, 1, 1, 1, 0, 0, 0, 0], &[1, 1, 1, 0, 1, 1, 1, 1, 1]];
    let keep = mask(&rows);
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let there = keep.to_dtype(x.dtype()).unwrap().unsqueeze(2).unwrap();
    let away = there.affine(-1.0, 1.0).unwrap();
    let of = |x: &Tensor, share: &Tensor| x.broadcast_mul(share).unwrap();
    let changed = (of(&x, &there) + of(&other, &away)).unwrap();
    for linformer in ways() {
        let [keys, tokens] = both(&linformer, |spec| spec);
        let real = |x: &Tensor| of(x, &there);
        let found = tokens.output(&x, given);
        assert_near(
            &found,
            &keys.output(&x, given),
            1e-12,
            &format!("{linformer:?}"),
        );
        let moved = tokens.output(&changed, given);
        assert_near(
            &real(&moved),
            &real(&found),
            1e-12,
            &format!("{linformer:?}"),
        );
        assert!(difference(&real(&found), &real(&tokens.output(&x, Given::default()))) > 1e-3);
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 7, WIDTH], 1);
    for linformer in ways() {
        let [_, tokens] = both(&linformer, |spec| spec);
        let mut inputs = tokens.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 4, |inputs| {
            let subject = Subject {
                spec: tokens.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{linformer:?}: {error:e}");
    }
}

/// Who looks at keys, values or weights finds those of all tokens, and the output is what it is.
#[test]
fn who_looks_finds_what_is_of_all_tokens() {
    let x = random(&[2, 7, WIDTH], 1);
    let [keys, tokens] = both(&LinformerSpec::new(SLOTS, LONGEST), |spec| spec);
    for site in ["key", "value", "weights", "slot_weights", "key_weights"] {
        let sites = format!("*.{site}");
        let [(a, seen), (b, found)] =
            [&keys, &tokens].map(|of| of.pass(&x, Given::default(), &sites));
        let name = format!(".{site}");
        let [seen, found] = [seen, found].map(|trace| trace.signal(&name).unwrap().into_value());
        assert_near(&found, &seen, 0.0, site);
        assert_near(&b, &a, 0.0, site);
        assert_near(&tokens.output(&x, Given::default()), &a, 1e-12, site);
    }
}

/// Another sequence is projected before it is read, too.
#[test]
fn a_memory_is_projected_as_well() {
    let (x, memory) = (random(&[2, 4, WIDTH], 1), random(&[2, LONGEST, WIDTH], 2));
    let of = |project: Project| {
        attention(LinformerSpec {
            project,
            ..LinformerSpec::new(SLOTS, LONGEST)
        })
    };
    let map = draw(3, |p| {
        MultiHeadAttention::over_memory(&of(Project::Keys), WIDTH, p)
    });
    let rows: [&[u8]; 2] = [&[1, 1, 1, 1, 1, 1, 0, 0, 0], &[1; LONGEST]];
    let keep = mask(&rows);
    let [a, b] = [Project::Keys, Project::Tokens].map(|project| {
        let spec = of(project);
        spec.validate_cross(WIDTH, "cross").unwrap();
        let attention = build(&map, |p| MultiHeadAttention::over_memory(&spec, WIDTH, p)).unwrap();
        let trace = Trace::new();
        let [x, memory] = [&x, &memory].map(|x| Signal::from(x.clone()));
        let y = attention.cross(&x, &memory, Some(&keep), &Context::new(&trace));
        y.unwrap().into_value()
    });
    assert_near(&b, &a, 1e-12, "memory");
}

/// What a further token costs less is the layers of keys and values, where heads together are as wide as a token.
#[test]
fn layers_of_keys_and_values_see_slots_alone() {
    let operations = |project: Project, length: usize| {
        let spec = attention(LinformerSpec {
            project,
            ..LinformerSpec::new(SLOTS, 64)
        });
        let subject = Subject::new(spec, 4);
        let meter = Meter::new();
        let x = Signal::from(random(&[1, length, WIDTH], 1)).into_metered(meter.clone());
        let trace = Trace::new();
        let attention = subject.attention();
        attention.forward(&x, &Context::new(&trace), None).unwrap();
        meter.total().flops
    };
    let each = |project| operations(project, 33) - operations(project, 32);
    let inner = WIDTH;
    let layers = 2 * (2 * WIDTH * inner + inner);
    assert_eq!(each(Project::Keys) - each(Project::Tokens), layers as u64);
    // Beside them the layers of as many slots, and what a bias adds to these.
    let fixed = |project| operations(project, 32) - 32 * each(project);
    let of_slots = 2 * SLOTS * (2 * WIDTH * inner + inner) + 2 * SLOTS * inner;
    assert_eq!(
        fixed(Project::Tokens) - fixed(Project::Keys),
        of_slots as u64
    );
}

#[test]
fn longer_inputs_are_refused_and_specs_are_as_they_were() {
    let linformer = LinformerSpec {
        project: Project::Tokens,
        ..LinformerSpec::new(SLOTS, 4)
    };
    let subject = Subject::new(attention(linformer.clone()), 4);
    let trace = Trace::new();
    let x = Signal::from(random(&[1, 5, WIDTH], 1));
    let refused = subject.attention().forward(&x, &Context::new(&trace), None);
    let said = refused
        .map(|_| ())
        .map_err(|error: Error| error.to_string());
    assert!(said.unwrap_err().contains("is 5, but must be at most 4"));
    let written = toml::to_string(&linformer).unwrap();
    let read: LinformerSpec = toml::from_str(&written).unwrap();
    assert_eq!(read, linformer);
    let plain = toml::to_string(&LinformerSpec::new(SLOTS, 4)).unwrap();
    assert!(!plain.contains("project ="), "{plain}");
}
