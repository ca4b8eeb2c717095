//! One experiment's runs with several seeds as one reproduction.

use std::collections::BTreeSet;

use crate::numbers::Sentence;
use crate::reproduction::named;
use crate::{Claim, Error, Finding, Reproduction, Result, Verdict};

/// From so many sentences of the same words on, their numbers are told by median and range.
const SPREAD_FROM: usize = 3;

impl Reproduction {
    /// Runs of one experiment at one scale, each with another seed, as one.
    ///
    /// Claims are matched by their text, those of the same text in their order; what a seed does not
    /// have is not measured there. A claim holds if it holds in every seed that measured it, and keeps
    /// what each seed found. Where all seeds say the same it is said once; three or more
    /// sentences that differ in numbers alone become one, with each number as `median [least, most]`;
    /// others are listed by seed. Plots are those of the lowest seed, seconds those of all. One
    /// run is itself.
    ///
    /// # Errors
    ///
    /// When there is no run, a seed comes twice, a run is joined already, or the runs are of different
    /// systems or scales.
    pub fn joined(mut runs: Vec<Self>) -> Result<Self> {
        runs.sort_by(|a, b| a.seeds.cmp(&b.seeds));
        let seeds = runs
            .iter()
            .map(Self::only_seed)
            .collect::<Result<Vec<_>>>()?;
        check_seeds(&seeds)?;
        for (a, b) in runs.iter().zip(runs.iter().skip(1)) {
            if (&a.slug, a.scale) != (&b.slug, b.scale) {
                return Err(Error::Seeds(format!(
                    "runs of {:?} at {:?} scale and of {:?} at {:?} scale are not joined: they must be of \
                     one system at one scale",
                    a.slug, a.scale, b.slug, b.scale
                )));
            }
        }
        if runs.len() == 1 {
            return Ok(runs.swap_remove(0));
        }
        let rows = side_by_side(&runs);
        let claims = rows.iter().map(|row| row.joined(&seeds)).collect();
        let settings = runs.iter().map(|run| run.setting.as_str());
        let setting = in_one(seeds.iter().copied().zip(settings));
        let seconds = runs.iter().map(|run| run.seconds).sum();
        // There is one: seeds were found.
        let lowest = runs.swap_remove(0);
        Ok(Self {
            seeds,
            setting,
            claims,
            seconds,
            ..lowest
        })
    }

    fn only_seed(&self) -> Result<u64> {
        match self.seeds.as_slice() {
            [seed] => Ok(*seed),
            several => Err(Error::Seeds(format!(
                "a run of {} is not joined with others: it must be of one seed",
                named(several)
            ))),
        }
    }
}

/// At least one seed, and none twice.
pub(crate) fn check_seeds(seeds: &[u64]) -> Result<()> {
    if seeds.is_empty() {
        return Err(Error::Seeds(
            "no seed is given; at least one is needed".to_owned(),
        ));
    }
    let mut seen = BTreeSet::new();
    match seeds.iter().find(|seed| !seen.insert(**seed)) {
        Some(twice) => Err(Error::Seeds(format!(
            "seed {twice} is given twice; seeds must differ"
        ))),
        None => Ok(()),
    }
}

/// One claim as each run has it, or does not.
struct Row<'a> {
    text: &'a str,
    found: Vec<Option<&'a Claim>>,
}

/// The claims of all runs, in the order of the first; one that only later runs have comes after the
/// claim that it follows there.
fn side_by_side(runs: &[Reproduction]) -> Vec<Row<'_>> {
    let mut rows: Vec<Row> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let mut place = 0;
        for claim in &run.claims {
            let is_free = |row: &Row| row.text == claim.claim && row.found[index].is_none();
            let at = rows.iter().position(is_free).unwrap_or_else(|| {
                let row = Row {
                    text: &claim.claim,
                    found: vec![None; runs.len()],
                };
                rows.insert(place, row);
                place
            });
            rows[at].found[index] = Some(claim);
            place = at + 1;
        }
    }
    rows
}

impl Row<'_> {
    fn joined(&self, seeds: &[u64]) -> Claim {
        let each = seeds.iter().zip(&self.found);
        let findings: Vec<Finding> = each.map(|(seed, claim)| finding(*seed, *claim)).collect();
        let published = self.found.iter().flatten().next();
        Claim {
            claim: self.text.to_owned(),
            published: published.map_or_else(String::new, |claim| claim.published.clone()),
            measured: in_one(findings.iter().map(|f| (f.seed, f.measured.as_str()))),
            verdict: verdict(&findings),
            note: in_one(findings.iter().map(|f| (f.seed, f.note.as_str()))),
            findings,
        }
    }
}

fn finding(seed: u64, claim: Option<&Claim>) -> Finding {
    let (measured, verdict, note) = match claim {
        Some(claim) => (claim.measured.as_str(), claim.verdict, claim.note.as_str()),
        None => ("not measured", Verdict::NotMeasured, ""),
    };
    Finding {
        seed,
        measured: measured.to_owned(),
        verdict,
        note: note.to_owned(),
    }
}

/// Holds if it does wherever it was measured.
fn verdict(findings: &[Finding]) -> Verdict {
    let mut measured = findings
        .iter()
        .map(|finding| finding.verdict)
        .filter(|verdict| *verdict != Verdict::NotMeasured)
        .peekable();
    if measured.peek().is_none() {
        return Verdict::NotMeasured;
    }
    Verdict::of(measured.all(|verdict| verdict == Verdict::Holds))
}

/// Texts of several seeds, in the order of the seeds, as one.
fn in_one<'a>(texts: impl Iterator<Item = (u64, &'a str)>) -> String {
    let mut groups: Vec<(Vec<u64>, Vec<Sentence>)> = Vec::new();
    for (seed, text) in texts {
        let sentence = Sentence::of(text);
        let like = groups.iter_mut().find(|(_, others)| {
            let first = others.first();
            first.is_some_and(|first| sentence.has_words_of(first))
        });
        match like {
            Some((seeds, sentences)) => {
                seeds.push(seed);
                sentences.push(sentence);
            }
            None => groups.push((vec![seed], vec![sentence])),
        }
    }
    let mut lines: Vec<(Vec<u64>, String)> = groups.into_iter().flat_map(lines).collect();
    if let [(_, only)] = lines.as_mut_slice() {
        return std::mem::take(only);
    }
    lines.sort();
    let told = lines.iter().filter(|(_, text)| !text.is_empty());
    let told: Vec<String> = told
        .map(|(seeds, text)| format!("{}: {text}", named(seeds)))
        .collect();
    told.join("; ")
}

/// Sentences of the same words: one line of all, or where there are too few for a spread and they differ one
/// of each.
fn lines((seeds, sentences): (Vec<u64>, Vec<Sentence<'_>>)) -> Vec<(Vec<u64>, String)> {
    let alike = sentences.windows(2).all(|two| two[0].text == two[1].text);
    if alike || sentences.len() >= SPREAD_FROM {
        return vec![(seeds, Sentence::spread(&sentences))];
    }
    let each = seeds.into_iter().zip(sentences);
    each.map(|(seed, sentence)| (vec![seed], sentence.text.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Plot, Scale, Setting, Tally, find};

    fn claim(text: &str, measured: &str, verdict: Verdict) -> Claim {
        Claim::new(text, "published", measured, verdict)
    }

    fn run(seed: u64, claims: Vec<Claim>) -> Reproduction {
        Reproduction {
            slug: "system".to_owned(),
            seeds: vec![seed],
            setting: "a model at 2.5 nats".to_owned(),
            claims,
            plots: vec![Plot {
                title: format!("of seed {seed}"),
                x: String::new(),
                y: String::new(),
                series: Vec::new(),
            }],
            seconds: 1.5,
            ..Reproduction::default()
        }
    }

    /// One claim with these measurements, one for each seed from 0 on.
    fn measured(each: &[&str]) -> String {
        let runs = (0..).zip(each);
        let runs = runs.map(|(seed, text)| run(seed, vec![claim("a", text, Verdict::Holds)]));
        Reproduction::joined(runs.collect()).unwrap().claims[0]
            .measured
            .clone()
    }

    /// One claim with these verdicts, one for each seed from 0 on.
    fn judged(each: &[Verdict]) -> (Verdict, Option<Tally>) {
        let runs = (0..).zip(each);
        let runs = runs.map(|(seed, verdict)| run(seed, vec![claim("a", "1", *verdict)]));
        let joined = Reproduction::joined(runs.collect()).unwrap();
        (joined.claims[0].verdict, joined.claims[0].tally())
    }

    #[test]
    fn what_is_measured_is_told_once_by_seed_or_by_its_spread() {
        assert_eq!(measured(&["1.0 nats"]), "1.0 nats");
        assert_eq!(measured(&["1.0 nats", "1.0 nats"]), "1.0 nats");
        assert_eq!(
            measured(&["1.0 nats", "2.0 nats"]),
            "seed 0: 1.0 nats; seed 1: 2.0 nats"
        );
        assert_eq!(
            measured(&["1.0 nats", "3.0 nats", "2.0 nats"]),
            "2.0 [1.0, 3.0] nats"
        );
        assert_eq!(
            measured(&["1.0 nats", "NaN nats", "2.0 nats", "3.0 nats"]),
            "seeds 0, 2, 3: 2.0 [1.0, 3.0] nats; seed 1: NaN nats"
        );
        assert_eq!(
            measured(&["block 3", "none", "block 5", "none"]),
            "seed 0: block 3; seeds 1 and 3: none; seed 2: block 5"
        );
        assert_eq!(
            measured(&["4 of 5", "none", "3 of 5"]),
            "seed 0: 4 of 5; seed 1: none; seed 2: 3 of 5"
        );
    }

    #[test]
    fn a_claim_holds_if_it_does_wherever_it_is_measured() {
        use Verdict::{DoesNotHold, Holds, NotMeasured};
        let tally = |holds, measured, seeds| {
            Some(Tally {
                holds,
                measured,
                seeds,
            })
        };
        assert_eq!(judged(&[Holds, Holds]), (Holds, tally(2, 2, 2)));
        assert_eq!(
            judged(&[Holds, DoesNotHold, Holds]),
            (DoesNotHold, tally(2, 3, 3))
        );
        assert_eq!(judged(&[NotMeasured, Holds]), (Holds, tally(1, 1, 2)));
        assert_eq!(
            judged(&[NotMeasured, DoesNotHold]),
            (DoesNotHold, tally(0, 1, 2))
        );
        assert_eq!(
            judged(&[NotMeasured, NotMeasured]),
            (NotMeasured, tally(0, 0, 2))
        );
        assert_eq!(judged(&[DoesNotHold]), (DoesNotHold, None));
    }

    #[test]
    fn claims_are_matched_by_their_text_in_order() {
        let holds = |text: &str, measured: &str| claim(text, measured, Verdict::Holds);
        let joined = Reproduction::joined(vec![
            run(0, vec![holds("a", "1"), holds("c", "2"), holds("c", "3")]),
            run(
                1,
                vec![
                    holds("a", "1"),
                    holds("b", "4"),
                    holds("c", "5"),
                    holds("c", "3"),
                ],
            ),
        ])
        .unwrap();
        let told: Vec<(&str, &str)> = joined
            .claims
            .iter()
            .map(|claim| (claim.claim.as_str(), claim.measured.as_str()))
            .collect();
        let expected = [
            ("a", "1"),
            ("b", "seed 0: not measured; seed 1: 4"),
            ("c", "seed 0: 2; seed 1: 5"),
            ("c", "3"),
        ];
        assert_eq!(told, expected);
        let only_there = &joined.claims[1];
        assert_eq!(only_there.verdict, Verdict::Holds);
        assert_eq!(only_there.published, "published");
        let verdicts = only_there.findings.iter().map(|f| (f.seed, f.verdict));
        assert!(verdicts.eq([(0, Verdict::NotMeasured), (1, Verdict::Holds)]));
    }

    #[test]
    fn notes_are_joined_and_those_absent_left_out() {
        let noted = |seed, note: &str| {
            let claim = claim("a", "1", Verdict::Holds).noted(note);
            run(seed, vec![claim])
        };
        let note = |runs| Reproduction::joined(runs).unwrap().claims[0].note.clone();
        assert_eq!(note(vec![noted(0, ""), noted(1, "")]), "");
        assert_eq!(
            note(vec![noted(0, "as ever"), noted(1, "as ever")]),
            "as ever"
        );
        assert_eq!(
            note(vec![noted(0, ""), noted(1, "unlike")]),
            "seed 1: unlike"
        );
    }

    #[test]
    fn the_whole_is_of_all_seeds_in_their_order() {
        let one = |seed| run(seed, vec![claim("a", "1", Verdict::Holds)]);
        let joined = Reproduction::joined(vec![one(7), one(5), one(6)]).unwrap();
        assert_eq!(joined.seeds, [5, 6, 7]);
        assert_eq!(joined.named_seeds(), "seeds 5 to 7");
        assert_eq!(joined.seconds, 4.5);
        assert_eq!(joined.setting, "a model at 2.5 nats");
        assert_eq!(joined.plots.len(), 1);
        assert_eq!(joined.plots[0].title, "of seed 5");
    }

    #[test]
    fn one_run_is_itself() {
        let single = run(4, vec![claim("a", "1", Verdict::Holds)]);
        let joined = Reproduction::joined(vec![single.clone()]).unwrap();
        let json = |found: &Reproduction| serde_json::to_value(found).unwrap();
        assert_eq!(json(&joined), json(&single));
        assert!(json(&joined)["claims"][0].get("findings").is_none());
    }

    #[test]
    fn what_is_not_one_experiment_is_refused() {
        let refused = |runs, word: &str| {
            let error = Reproduction::joined(runs).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        let one = |seed| run(seed, Vec::new());
        refused(Vec::new(), "no seed");
        refused(vec![one(3), one(3)], "seed 3");
        let joined = Reproduction::joined(vec![one(0), one(1)]).unwrap();
        refused(vec![joined, one(2)], "seeds 0 and 1");
        let other = Reproduction {
            slug: "other".to_owned(),
            ..one(1)
        };
        refused(vec![one(0), other], "other");
        let larger = Reproduction {
            scale: Scale::Small,
            ..one(1)
        };
        refused(vec![one(0), larger], "Small");
    }

    #[test]
    fn wrong_seeds_are_refused_before_anything_runs() {
        let system = find("clustering").unwrap();
        for seeds in [&[] as &[u64], &[1, 2, 1]] {
            let error = system.reproduce_with_seeds(&Setting::default(), seeds);
            assert!(matches!(error, Err(Error::Seeds(_))), "{seeds:?}");
        }
    }
}
