//! Inputs whose evidence is known: which tokens a right prediction must come from.
//!
//! A data set is a CSV file with a header. These columns are read, others are ignored:
//!
//! | column | what |
//! |---|---|
//! | `prefix` | text up to the word to predict |
//! | `target` | the right next word |
//! | `foil` | the wrong one; may be missing |
//! | `evidence` | the words of the prefix that decide, as they stand there: one, or several beside each other, or several places with `|` between them (`the old dogs|near`); every occurrence counts; may be missing or `NA` |
//!
//! Files of BLiMP with targets (`one_prefix_prefix`, `one_prefix_word_good`,
//! `one_prefix_word_bad`, and evidence in `target`) are recognised by their header.

use std::io::Read;
use std::ops::Range;

use crate::{Error, Result};
use lapidary_model::Tokenizer;
use lapidary_model::tokenizer::EncodeOptions;

/// Most rows that are read of a file.
const MAX_ROWS: usize = 1 << 20;
/// Most bytes of a row's cell.
const MAX_CELL: usize = 1 << 16;

/// A prefix with the tokens that decide what comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids of the prefix.
    pub ids: Vec<u32>,
    /// The right next token, or the class of a classifier.
    pub target: usize,
    /// The wrong one.
    pub foil: Option<usize>,
    /// Positions of the tokens that decide; empty where that is not known.
    pub evidence: Vec<usize>,
    /// Position of the scores of a language model; the last when absent.
    pub position: Option<usize>,
    /// Positions that are never hidden when faithfulness is measured: special tokens.
    pub special: Vec<usize>,
    /// Tokens that are scored, judged and hidden as one, from the first on without gaps; each token
    /// by itself when empty. See [`Tokenizer::words`].
    pub words: Vec<Range<usize>>,
}

/// The examples of a data set, and why rows were left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dataset {
    /// In order of the file.
    pub examples: Vec<Example>,
    /// Rows whose target and foil begin alike up to the end of one of them.
    pub indistinguishable: usize,
    /// Rows that do not fit the model: too long, or with no token to predict.
    pub unfit: usize,
}

/// One row, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Text up to the word to predict.
    pub prefix: String,
    /// The right next word.
    pub target: String,
    /// The wrong one.
    pub foil: Option<String>,
    /// The words that decide.
    pub evidence: Option<String>,
}

/// The rows of a CSV file; of `limit` the first.
///
/// # Errors
/// When a column is missing, or the file is no CSV.
///
/// ```
/// use lapidary_explain::evaluation::read_rows;
/// let file = "prefix,target,foil,evidence\nthe dogs near the car,are,is,dogs\n";
/// let rows = read_rows(file.as_bytes(), None)?;
/// assert_eq!(rows[0].evidence.as_deref(), Some("dogs"));
/// # Ok::<(), lapidary_explain::Error>(())
/// ```
pub fn read_rows(reader: impl Read, limit: Option<usize>) -> Result<Vec<Row>> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(reader);
    let bad = |error: csv::Error| Error::invalid("data set", error, "a CSV file");
    let header = reader.headers().map_err(bad)?.clone();
    let column = |names: [&str; 2]| header.iter().position(|name| names.contains(&name.trim()));
    let needed = |names: [&str; 2]| {
        column(names).ok_or_else(|| {
            let found: Vec<_> = header.iter().collect();
            Error::invalid(
                "header of the data set",
                found.join(","),
                format!("with a column {}", names[0]),
            )
        })
    };
    // In BLiMP's files `target` is the evidence.
    let is_blimp = column(["one_prefix_prefix", "one_prefix_prefix"]).is_some();
    let prefix = needed(["prefix", "one_prefix_prefix"])?;
    let (target, foil, evidence) = if is_blimp {
        (
            needed(["one_prefix_word_good", "one_prefix_word_good"])?,
            column(["one_prefix_word_bad", "one_prefix_word_bad"]),
            column(["target", "target"]),
        )
    } else {
        (
            needed(["target", "target"])?,
            column(["foil", "foil"]),
            column(["evidence", "evidence"]),
        )
    };
    let mut rows = Vec::new();
    for record in reader
        .records()
        .take(limit.unwrap_or(MAX_ROWS).min(MAX_ROWS))
    {
        let record = record.map_err(bad)?;
        let cell = |column: usize| record.get(column).map(str::trim).unwrap_or_default();
        if record.iter().any(|cell| cell.len() > MAX_CELL) {
            return Err(Error::invalid(
                format!("row {} of the data set", rows.len() + 1),
                "longer",
                format!("of cells of at most {MAX_CELL} bytes"),
            ));
        }
        let optional = |column: Option<usize>| {
            let text = cell(column?);
            (!text.is_empty() && text != "NA").then(|| text.to_owned())
        };
        let (prefix, target) = (cell(prefix).to_owned(), cell(target).to_owned());
        if prefix.is_empty() || target.is_empty() {
            return Err(Error::invalid(
                format!("row {} of the data set", rows.len() + 1),
                "without a prefix or a target",
                "with both",
            ));
        }
        rows.push(Row {
            prefix,
            target,
            foil: optional(foil),
            evidence: optional(evidence),
        });
    }
    Ok(rows)
}

/// The rows as tokens. Where target and foil begin with the same tokens, those are given to the
/// prefix and the first that differ are compared. With a `mask`, as masked language models have
/// it, that token stands where the word to predict would, before what ends a sequence.
///
/// # Errors
/// When the tokenizer fails on a text.
pub fn tokenised(
    rows: &[Row],
    tokenizer: &Tokenizer,
    mask: Option<u32>,
    longest: usize,
) -> Result<Dataset> {
    let mut dataset = Dataset::default();
    for row in rows {
        match tokenised_row(row, tokenizer, mask)? {
            Tokenised::Indistinguishable => dataset.indistinguishable += 1,
            Tokenised::Example(example) if (1..=longest).contains(&example.ids.len()) => {
                dataset.examples.push(example);
            }
            _ => dataset.unfit += 1,
        }
    }
    Ok(dataset)
}

enum Tokenised {
    Example(Example),
    Indistinguishable,
    Unfit,
}

fn tokenised_row(row: &Row, tokenizer: &Tokenizer, mask: Option<u32>) -> Result<Tokenised> {
    let failed = |error| Error::invalid("text", format!("{:?} ({error})", row.prefix), "tokens");
    let whole = EncodeOptions::default();
    let bare = EncodeOptions {
        special_tokens: false,
        limit: None,
    };
    let prefix = tokenizer.encode(&row.prefix, &whole).map_err(failed)?;
    // What ends a sequence, such as [SEP]: the next word stands before it.
    let trailing = prefix.special.iter().rev().take_while(|special| **special);
    let body = prefix.ids.len() - trailing.count();
    // A word inside a sentence is written with the space before it.
    let continuation = |word: &str| -> Result<Vec<u32>> {
        let both = tokenizer
            .encode(&format!("{} {word}", row.prefix), &bare)
            .map_err(failed)?;
        let alone = tokenizer.encode(&row.prefix, &bare).map_err(failed)?;
        let shared = both.ids.iter().zip(&alone.ids).take_while(|(a, b)| a == b);
        let shared = shared.count();
        Ok(both.ids.into_iter().skip(shared).collect())
    };
    let target = continuation(&row.target)?;
    let mut ids: Vec<u32> = prefix.ids.iter().copied().take(body).collect();
    let (target, foil) = match &row.foil {
        None => (target.first().copied(), None),
        Some(foil) => {
            let foil = continuation(foil)?;
            let shared = target.iter().zip(&foil).take_while(|(a, b)| a == b).count();
            ids.extend(target.iter().take(shared));
            match (target.get(shared), foil.get(shared)) {
                (Some(target), Some(foil)) => (Some(*target), Some(*foil as usize)),
                _ => return Ok(Tokenised::Indistinguishable),
            }
        }
    };
    let Some(target) = target else {
        return Ok(Tokenised::Unfit);
    };
    let evidence = row.evidence.as_deref().map_or_else(Vec::new, |evidence| {
        let phrases = evidence
            .split('|')
            .map(str::trim)
            .filter(|one| !one.is_empty());
        let spans: Vec<_> = phrases
            .flat_map(|one| occurrences(&row.prefix, one))
            .collect();
        let overlaps = |offsets: &Range<usize>| {
            spans
                .iter()
                .any(|span| offsets.start < span.end && span.start < offsets.end)
        };
        (0..)
            .zip(prefix.offsets.iter().zip(&prefix.special))
            .filter(|(_, (offsets, special))| !**special && overlaps(offsets))
            .map(|(position, _)| position)
            .collect()
    });
    let mut special: Vec<usize> = (0..body)
        .filter(|position| prefix.special.get(*position) == Some(&true))
        .collect();
    let position = mask.map(|mask| {
        ids.push(mask);
        ids.extend(prefix.ids.iter().skip(body));
        special.extend(ids.len() - 1 - (prefix.ids.len() - body)..ids.len());
        ids.len() - 1 - (prefix.ids.len() - body)
    });
    Ok(Tokenised::Example(Example {
        ids,
        target: target as usize,
        foil,
        evidence,
        position,
        special,
        words: Vec::new(),
    }))
}

/// Byte ranges where `phrase` stands in `text` as whole words.
fn occurrences(text: &str, phrase: &str) -> Vec<Range<usize>> {
    let is_part_of_a_word = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
    text.match_indices(phrase)
        .map(|(start, found)| start..start + found.len())
        .filter(|span| {
            let before = text.get(..span.start).and_then(|t| t.chars().next_back());
            let after = text.get(span.end..).and_then(|t| t.chars().next());
            !is_part_of_a_word(before) && !is_part_of_a_word(after)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_header_are_read() {
        let own = "evidence,foil,target,prefix\ndogs,is,are,the dogs\nNA,,are,the dogs\n";
        let rows = read_rows(own.as_bytes(), None).unwrap();
        assert_eq!(rows[0].foil.as_deref(), Some("is"));
        assert_eq!((&rows[1].foil, &rows[1].evidence), (&None, &None));
        let blimp = ",one_prefix_prefix,one_prefix_word_good,one_prefix_word_bad,target\n\
                     0,Susan revealed,herself,themselves,Susan\n";
        let rows = read_rows(blimp.as_bytes(), None).unwrap();
        assert_eq!(rows[0].target, "herself");
        assert_eq!(rows[0].evidence.as_deref(), Some("Susan"));
    }

    #[test]
    fn a_missing_column_is_named() {
        let error = read_rows("prefix,foil\na,b\n".as_bytes(), None).unwrap_err();
        assert!(error.to_string().contains("column target"), "{error}");
        let error = read_rows("prefix,target\n,b\n".as_bytes(), None).unwrap_err();
        assert!(error.to_string().contains("row 1"), "{error}");
    }

    proptest::proptest! {
        /// A stranger's file may be anything.
        #[test]
        fn any_bytes_are_rows_or_an_error(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
            cells in proptest::collection::vec("[a-z\"\n,é]{0,6}", 0..20),
        ) {
            let _ = read_rows(bytes.as_slice(), Some(50));
            let file = format!("prefix,target,foil,evidence\n{}", cells.join(","));
            if let Ok(rows) = read_rows(file.as_bytes(), Some(50)) {
                for row in rows {
                    let evidence = row.evidence.unwrap_or_default();
                    for span in occurrences(&row.prefix, &evidence) {
                        assert_eq!(row.prefix.get(span), Some(evidence.as_str()));
                    }
                }
            }
        }
    }

    #[test]
    fn evidence_is_whole_words_wherever_they_stand() {
        let text = "the cat saw the catalogue of a cat";
        assert_eq!(occurrences(text, "cat"), [4..7, 31..34]);
        assert_eq!(occurrences("naïve cats", "naïve").first(), Some(&(0..6)));
    }

    #[test]
    fn evidence_may_be_several_words_at_several_places() {
        let words = ["<start>", "the", "old", "dogs", "near", "car", "are", "is"];
        let tokenizer = Tokenizer::of_words(&words).unwrap();
        let evidence = |text: &str| {
            let row = Row {
                prefix: "the old dogs near the old car".into(),
                target: "are".into(),
                foil: Some("is".into()),
                evidence: Some(text.into()),
            };
            let dataset = tokenised(&[row], &tokenizer, None, 10).unwrap();
            dataset.examples[0].evidence.clone()
        };
        assert_eq!(evidence("the old dogs"), [1, 2, 3]);
        assert_eq!(evidence("old dogs | car"), [2, 3, 7]);
        assert_eq!(evidence("the old"), [1, 2, 5, 6]);
        assert_eq!(evidence("|"), [0usize; 0]);
    }

    #[test]
    fn shared_beginnings_go_to_the_prefix() {
        let words = [
            "<start>", "a", "grocery", "store", "stores", "buys", "Craig",
        ];
        let tokenizer = Tokenizer::of_words(&words).unwrap();
        let row = |target: &str, foil: &str| Row {
            prefix: "Craig buys a".into(),
            target: target.into(),
            foil: Some(foil.into()),
            evidence: Some("a".into()),
        };
        let rows = [
            row("grocery store", "grocery stores"),
            row("grocery", "grocery store"),
        ];
        let dataset = tokenised(&rows, &tokenizer, None, 10).unwrap();
        assert_eq!(dataset.indistinguishable, 1);
        let [example] = dataset.examples.as_slice() else {
            panic!("{dataset:?}");
        };
        let name = |id: usize| tokenizer.token_of(id as u32).unwrap();
        assert_eq!(name(example.target), "store");
        assert_eq!(name(example.foil.unwrap()), "stores");
        assert_eq!(name(*example.ids.last().unwrap() as usize), "grocery");
        let at = |position: &usize| name(example.ids[*position] as usize);
        assert_eq!(example.evidence.iter().map(at).collect::<Vec<_>>(), ["a"]);
        assert_eq!(tokenised(&rows, &tokenizer, None, 2).unwrap().unfit, 1);
    }
}
