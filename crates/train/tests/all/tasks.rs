//! Generated tasks ask what they say they ask.
#![allow(clippy::unwrap_used)]

use lapidary_kernels::Device;
use lapidary_train::data::{
    Addition, AssociativeRecall, Batch, Copying, IGNORE, Induction, LanguageTask, Task,
};
use lapidary_train::generator;
use lapidary_train::language::{Corpus, Language, Mixture, Split};

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
