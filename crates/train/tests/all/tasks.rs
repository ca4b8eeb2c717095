//! Generated tasks ask what they say they ask.
#![allow(clippy::unwrap_used)]

use lapidary_kernels::Device;
use lapidary_train::data::{
    Addition, AssociativeRecall, Batch, Copying, IGNORE, Induction, LanguageTask, Masked,
    MaskingSpec, Task,
};
use lapidary_train::generator;
use lapidary_train::language::{Corpus, Language, Mixture, Split};
use rand::RngExt;

fn rows(batch: &Batch) -> Vec<(&[u32], &[u32])> {
    assert_eq!(batch.inputs.len(), batch.rows * batch.length);
    assert_eq!(batch.targets.len(), batch.rows * batch.length);
    batch
        .inputs
        .chunks(batch.length)
        .zip(batch.targets.chunks(batch.length))
        .collect()
}

fn in_range(task: &impl Task, batch: &Batch) {
    let size = task.vocabulary() as u32;
    assert!(batch.inputs.iter().all(|&t| t < size));
    assert!(batch.targets.iter().all(|&t| t < size || t == IGNORE));
    assert!(batch.counted() > 0);
}

/// What a perfect model knows at a position, of the tokens before and at it.
fn check(task: &mut impl Task, length: usize, answer: impl Fn(&[u32], usize) -> Option<u32>) {
    let batch = task
        .batch(&mut generator(length as u64), 20, length)
        .unwrap();
    assert_eq!((batch.rows, batch.length), (20, length));
    in_range(task, &batch);
    for (inputs, targets) in rows(&batch) {
        for (position, &target) in targets.iter().enumerate() {
            if target != IGNORE {
                let found = answer(&inputs[..=position], position);
                assert_eq!(found, Some(target), "{inputs:?} at {position}");
                if let Some(&next) = inputs.get(position + 1) {
                    assert_eq!(next, target, "the next token is the target");
                }
            }
        }
    }
    let again = task
        .batch(&mut generator(length as u64), 20, length)
        .unwrap();
    assert_eq!(batch, again, "a function of the generator");
    let other = task
        .batch(&mut generator(length as u64 + 1), 20, length)
        .unwrap();
    assert_ne!(batch, other);
}

#[test]
fn copying_repeats_the_word_after_the_separator() {
    for length in [2, 3, 10, 11, 64] {
        let mut task = Copying::new(50).unwrap();
        check(&mut task, length, |seen, position| {
            let separator = seen.iter().position(|&t| t == 50)?;
            Some(seen[position - separator])
        });
        let batch = task.batch(&mut generator(0), 3, length).unwrap();
        assert_eq!(batch.counted(), 3 * (length / 2));
    }
    assert!(
        Copying::new(50)
            .unwrap()
            .batch(&mut generator(0), 1, 1)
            .is_err()
    );
    assert!(Copying::new(1).is_err());
}

#[test]
fn recall_answers_with_the_value_stated_for_the_key() {
    for (keys, length) in [(8, 5), (8, 17), (20, 64), (3, 64), (1, 9)] {
        check(
            &mut AssociativeRecall::new(keys, 40).unwrap(),
            length,
            |seen, position| {
                let key = seen[position];
                let first = seen.iter().position(|&t| t == key)?;
                assert!(first < position, "a key that was not stated is asked");
                Some(seen[first + 1])
            },
        );
    }
    assert!(AssociativeRecall::new(0, 9).is_err());
    assert!(AssociativeRecall::new(2, 1).is_err());
    let mut task = AssociativeRecall::new(4, 4).unwrap();
    assert!(task.batch(&mut generator(0), 1, 4).is_err());
}

#[test]
fn induction_continues_as_the_symbol_was_continued_first() {
    for length in [8, 9, 64] {
        check(
            &mut Induction::new(40).unwrap(),
            length,
            |seen, position| {
                let first = seen.iter().position(|t| *t == seen[position])?;
                assert!(
                    first + 1 < position,
                    "the symbol must have been seen before"
                );
                Some(seen[first + 1])
            },
        );
    }
    let mut task = Induction::new(40).unwrap();
    assert!(task.batch(&mut generator(0), 1, 100).is_err());
    assert!(task.batch(&mut generator(0), 1, 7).is_err());
}

#[test]
fn the_language_predicts_every_next_word() {
    let corpus = Corpus::new(Language::new(1), Split::Training, Mixture::default(), 2).unwrap();
    let mut task = LanguageTask::new(corpus);
    let batch = task.batch(&mut generator(0), 4, 64).unwrap();
    in_range(&task, &batch);
    let all = rows(&batch);
    for (inputs, targets) in &all {
        assert_eq!(inputs[0], 0, "windows begin with a sentence");
        assert_eq!(inputs[1..], targets[..63]);
    }
    assert_ne!(all[0], all[1]);
    let (inputs, targets) = batch.tensors(&Device::Cpu).unwrap();
    assert_eq!(
        (inputs.dims(), targets.dims()),
        (&[4, 64][..], &[4, 64][..])
    );
    assert_eq!(inputs.to_vec2::<u32>().unwrap().concat(), batch.inputs);
}

/// The number whose digits these are, the highest first.
fn number<'a>(digits: impl Iterator<Item = &'a u32>) -> u64 {
    digits.fold(0, |number, digit| 10 * number + u64::from(*digit))
}

#[test]
fn sums_are_right_and_only_their_digits_count() {
    for carry in [true, false] {
        let mut task = Addition::new(2, 4, carry).unwrap();
        let batch = task.batch(&mut generator(3), 20, 48).unwrap();
        let (mut carries, mut lengths) = (0, [0; 5]);
        for (inputs, targets) in batch.inputs.chunks(48).zip(batch.targets.chunks(48)) {
            let mut start = 0;
            while let Some(end) = inputs[start..].iter().position(|t| *t == Addition::END) {
                let problem = &inputs[start..start + end];
                let plus = problem.iter().position(|t| *t == Addition::PLUS).unwrap();
                let equals = problem.iter().position(|t| *t == Addition::EQUALS).unwrap();
                let (a, b) = (&problem[..plus], &problem[plus + 1..equals]);
                assert_eq!(a.len(), b.len());
                assert!(a[0] > 0 && b[0] > 0);
                lengths[a.len()] += 1;
                let answer = number(problem[equals + 1..].iter().rev());
                assert_eq!(number(a.iter()) + number(b.iter()), answer);
                let columns = a.iter().zip(b).filter(|(a, b)| **a + **b > 9);
                carries += columns.count();
                for place in 0..=end {
                    // What each position predicts: the next token, where that is of the answer.
                    let counts = (equals..end).contains(&place);
                    let expected = if counts {
                        inputs[start + place + 1]
                    } else {
                        IGNORE
                    };
                    assert_eq!(targets[start + place], expected);
                }
                start += end + 1;
            }
        }
        assert!(lengths[2..].iter().all(|count| *count > 0), "{lengths:?}");
        assert_eq!(carries > 0, carry);
    }
    assert!(Addition::new(0, 2, true).is_err() && Addition::new(3, 2, true).is_err());
    let mut task = Addition::new(5, 10, true).unwrap();
    assert!(task.batch(&mut generator(3), 1, 33).is_err());
    assert!(task.batch(&mut generator(3), 1, 34).is_ok());
}

/// The numbers from 0 on in each row.
struct Counting;

const LONGEST: usize = 600;

impl Task for Counting {
    fn vocabulary(&self) -> usize {
        LONGEST
    }

    fn batch(
        &mut self,
        _: &mut lapidary_train::Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let row: Vec<u32> = (0..length as u32).collect();
        Ok(Batch {
            rows,
            length,
            inputs: row.repeat(rows),
            targets: row.repeat(rows),
        })
    }
}

#[test]
fn hidden_tokens_are_all_that_is_asked_for() {
    let masking = MaskingSpec {
        segments: Some([3, 9]),
        ..MaskingSpec::new(20)
    };
    let mut task = Masked::new(Box::new(Counting), masking);
    let mask = task.mask();
    assert_eq!(mask, LONGEST as u32);
    assert_eq!(task.vocabulary(), LONGEST + 1);
    let batch = task.batch(&mut generator(3), 30, 200).unwrap();
    in_range(&task, &batch);
    let mut moved = 0;
    for (inputs, targets) in rows(&batch) {
        assert_eq!(inputs.iter().filter(|t| **t == mask).count(), 20);
        let mut said = Vec::new();
        for (input, target) in inputs.iter().zip(targets) {
            assert_eq!(*input == mask, *target != IGNORE);
            said.push(if *input == mask { *target } else { *input });
        }
        // Every token is there once, in from three to nine segments.
        let jumps = said
            .windows(2)
            .filter(|pair| pair[1] != pair[0] + 1)
            .count();
        assert!(jumps < 9, "{said:?}");
        moved += usize::from(jumps > 0);
        said.sort_unstable();
        assert!(said.iter().enumerate().all(|(at, t)| at as u32 == *t));
    }
    assert!(moved > 25, "{moved}");
    let again = task.batch(&mut generator(3), 30, 200).unwrap();
    assert_eq!(batch, again, "a function of the generator");
}

/// With one narrow cluster the hidden tokens lie together, and how often two at a distance are hidden
/// both is what drawing by the weights of a cluster gives, by another way of drawing.
#[test]
fn hidden_tokens_lie_in_clusters() {
    let (length, hidden, deviation) = (120, 4, 5.0);
    let masking = MaskingSpec {
        clusters: [1, 1],
        deviation: [deviation, deviation],
        ..MaskingSpec::new(hidden)
    };
    let mut task = Masked::new(Box::new(Counting), masking);
    let batch = task.batch(&mut generator(5), 4000, length).unwrap();
    let spread = |places: &[usize]| {
        let mean = places.iter().sum::<usize>() as f64 / places.len() as f64;
        let squares = places.iter().map(|p| (*p as f64 - mean).powi(2));
        squares.sum::<f64>() / places.len() as f64
    };
    let found: Vec<f64> = rows(&batch)
        .iter()
        .map(|(_, targets)| {
            let at = |(place, target): (usize, &u32)| (*target != IGNORE).then_some(place);
            spread(
                &targets
                    .iter()
                    .enumerate()
                    .filter_map(at)
                    .collect::<Vec<_>>(),
            )
        })
        .collect();
    // One after the other, each from what is left.
    let mut random = generator(11);
    let expected: Vec<f64> = (0..4000)
        .map(|_| {
            let centre = random.random_range(0..length) as f64;
            let weight = |t: usize| {
                1e-6 + (-(t as f64 - centre).powi(2) / (2.0 * deviation * deviation)).exp()
            };
            let mut left: Vec<usize> = (0..length).collect();
            let mut places = Vec::new();
            while places.len() < hidden {
                let mut at = random.random::<f64>() * left.iter().map(|t| weight(*t)).sum::<f64>();
                let chosen = left.iter().position(|t| {
                    at -= weight(*t);
                    at <= 0.0
                });
                places.push(left.remove(chosen.unwrap()));
            }
            spread(&places)
        })
        .collect();
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let deviation_of = |x: &[f64]| {
        let m = mean(x);
        (x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
    };
    let apart = (mean(&found) - mean(&expected)).abs();
    let error = (deviation_of(&found).powi(2) + deviation_of(&expected).powi(2)).sqrt();
    assert!(
        apart < 4.0 * error / (found.len() as f64).sqrt(),
        "{} {}",
        mean(&found),
        mean(&expected)
    );
    // Tokens anywhere would be spread over the sequence.
    assert!(mean(&found) < 0.1 * (length * length) as f64 / 12.0);
}

/// Every token of a row is another, so that what is shown says what was done.
#[test]
fn of_hidden_tokens_a_tenth_stays_and_a_tenth_is_random() {
    let masking = MaskingSpec::new(60).like_bert();
    let mut task = Masked::new(Box::new(Counting), masking);
    let mask = task.mask();
    let batch = task.batch(&mut generator(7), 100, 200).unwrap();
    in_range(&task, &batch);
    let (mut masked, mut kept, mut random) = (0, 0, 0);
    for (at, (input, target)) in batch.inputs.iter().zip(&batch.targets).enumerate() {
        match *target {
            IGNORE => assert_eq!(*input as usize, at % 200, "what isn't hidden is as it was"),
            target if *input == mask => masked += usize::from(target as usize == at % 200),
            target if *input == target => kept += 1,
            _ => random += 1,
        }
    }
    // 6000 draws: a share has a deviation of at most 0.0052.
    assert_eq!(masked + kept + random, 6000);
    for (found, expected) in [(masked, 0.8), (kept, 0.1), (random, 0.1)] {
        assert!((found as f64 / 6000.0 - expected).abs() < 0.03, "{found}");
    }
    let again = task.batch(&mut generator(7), 100, 200).unwrap();
    assert_eq!(batch, again, "a function of the generator");
    let all = MaskingSpec {
        kept: 1.0,
        ..MaskingSpec::new(60)
    };
    let mut task = Masked::new(Box::new(Counting), all);
    let batch = task.batch(&mut generator(7), 2, 200).unwrap();
    assert!(
        batch
            .inputs
            .iter()
            .enumerate()
            .all(|(at, t)| *t as usize == at % 200)
    );
    assert_eq!(batch.counted(), 120);
}

#[test]
fn masking_that_cannot_be_done_is_refused() {
    for (masking, expected) in [
        (MaskingSpec::new(0), "masking.hidden is 0"),
        (MaskingSpec::new(33), "masking.hidden is 33"),
        (
            MaskingSpec {
                clusters: [3, 2],
                ..MaskingSpec::new(4)
            },
            "masking.clusters is [3, 2]",
        ),
        (
            MaskingSpec {
                deviation: [0.0, 2.0],
                ..MaskingSpec::new(4)
            },
            "masking.deviation is [0.0, 2.0]",
        ),
        (
            MaskingSpec {
                segments: Some([1, 33]),
                ..MaskingSpec::new(4)
            },
            "masking.segments is [1, 33]",
        ),
        (
            MaskingSpec {
                random: -0.5,
                ..MaskingSpec::new(4)
            },
            "masking.random is -0.5",
        ),
        (
            MaskingSpec {
                kept: 0.6,
                random: 0.5,
                ..MaskingSpec::new(4)
            },
            "masking.kept and masking.random is 0.6 and 0.5",
        ),
    ] {
        let mut task = Masked::new(Box::new(Counting), masking);
        let said = task.batch(&mut generator(1), 1, 32).unwrap_err();
        assert!(said.to_string().starts_with(expected), "{said}");
    }
}

/// Communities of a ring of two halves, named along random trees over it by a run in a directory.
#[test]
fn vertices_of_a_graph_are_named_by_a_run() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vertices.json");
    let count = 12usize;
    let vertices = lapidary_train::data::VerticesFile {
        tokens: (0..count as u32).map(|v| v % 3).collect(),
        classes: (0..count).map(|v| Some(3 + u32::from(v >= 6))).collect(),
        held_out: (0..count).map(|v| v % 4 == 1).collect(),
    };
    std::fs::write(&file, serde_json::to_string(&vertices).unwrap()).unwrap();
    let edges: Vec<_> = (0..count).map(|v| (v, (v + 1) % count, 1.0)).collect();
    let spec = |length: usize| -> lapidary_train::TrainSpec {
        serde_json::from_value(serde_json::json!({
            "steps": 3, "batch": 1, "length": length,
            "schedule": { "peak": 1e-2 },
            "data": { "kind": "vertices", "file": file },
            "model": {
                "width": 16,
                "input": { "kind": "tokens", "vocabulary": 5, "length": count },
                "blocks": [{
                    "attention": {
                        "kind": "multi-head", "heads": 2,
                        "mechanism": {
                            "kind": "topological",
                            "graph": { "vertices": count, "edges": edges },
                            "metric": { "kind": "random-trees", "count": 2 },
                            "unit": 4.0
                        }
                    },
                    "feedforward": { "kind": "dense", "hidden": 16 }
                }],
                "head": { "kind": "language-model", "tied": false }
            }
        }))
        .unwrap()
    };
    let device = lapidary_kernels::Device::Cpu;
    let run = |length, name: &str| {
        lapidary_train::run(&spec(length), &directory.path().join(name), false, &device)
    };
    let finished = run(count, "run").unwrap();
    assert_eq!(finished.steps, 3);
    // The model's mask is learned.
    let tensors = lapidary_train::state::latest(&directory.path().join("run/states"));
    let state = lapidary_train::state::load(
        &tensors.unwrap().unwrap(),
        &device,
        &lapidary_train::state::Limits::default(),
    );
    let mask = state.unwrap().tensors["parameter.blocks.0.attention.mechanism.mask"].clone();
    let mask: Vec<f32> = mask.flatten_all().unwrap().to_vec1().unwrap();
    assert!(mask.iter().any(|number| *number != 0.0), "{mask:?}");
    let said = run(11, "short").unwrap_err().to_string();
    assert!(said.contains("length is 11, for 12 vertices"), "{said}");
    assert!(!directory.path().join("short").exists());
    // A sequence has no more tokens than the graph has vertices.
    let mut narrow = serde_json::to_value(spec(count)).unwrap();
    let graph = &mut narrow["model"]["blocks"][0]["attention"]["mechanism"]["graph"];
    *graph = serde_json::json!({ "vertices": 2, "edges": [[0, 1, 1.0]] });
    let narrow: lapidary_train::TrainSpec = serde_json::from_value(narrow).unwrap();
    assert_eq!(
        narrow.validate().unwrap_err().to_string(),
        "model.blocks.0.attention.mechanism.graph.vertices is 2, but must be at least 12, the length"
    );
    // In groups no more than the group has.
    let in_groups_of = |group: usize| -> lapidary_train::TrainSpec {
        let mut grouped = serde_json::to_value(&narrow).unwrap();
        grouped["model"]["organisation"] = serde_json::json!({
            "kind": "interleaved", "layout": "(1)", "group": group, "groups": count / group
        });
        serde_json::from_value(grouped).unwrap()
    };
    in_groups_of(2).validate().unwrap();
    assert_eq!(
        in_groups_of(3).validate().unwrap_err().to_string(),
        "model.blocks.0.attention.mechanism.graph.vertices is 2, but must be at least 3, the tokens of a group"
    );
}
