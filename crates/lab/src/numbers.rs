//! The numbers in a text, and several texts that differ in nothing else as one.
//!
//! What an experiment measures is a sentence with numbers in it. Of the sentences of several seeds,
//! those with the same words become one, in which each number is a median with its least and most.
//! Digits that name a thing rather than count or measure it belong to the words: sentences that
//! differ there say different things. In doubt digits are words, so that nothing is averaged that
//! has no average.

/// Words that a number after them tells which, not how much.
const NAMING: [&str; 10] = [
    "block", "blocks", "head", "heads", "layer", "layers", "mover", "position", "seed", "seeds",
];

/// A number as it is written, with its sign and its exponent: `-8.8e-8`.
#[derive(Clone, Copy, Debug)]
struct Number<'a> {
    written: &'a str,
    value: f64,
}

impl<'a> Number<'a> {
    /// What stands at `start..end`, unless it is a part of a word (`f32`, `MRA-2`, `blocks.3.attention`),
    /// a factor or an exponent in a formula (`2x`, `10^6`), or in no notation of one number (`1.2.3`,
    /// `12,800`).
    fn read(text: &'a str, start: usize, end: usize) -> Option<Self> {
        let (before, written, after) = (&text[..start], &text[start..end], &text[end..]);
        let joined = |next: Option<char>, signs: &str| {
            next.is_some_and(|next| next.is_alphanumeric() || signs.contains(next))
        };
        let hyphenated = before
            .strip_suffix(['-', '+'])
            .is_some_and(|rest| rest.ends_with(char::is_alphabetic));
        if hyphenated
            || joined(before.chars().next_back(), "_.^−")
            || joined(after.chars().next(), "_^")
        {
            return None;
        }
        let value: f64 = written.parse().ok()?;
        value.is_finite().then_some(Self { written, value })
    }

    /// Digits after the point.
    fn decimals(&self) -> usize {
        let mantissa = self.written.split(['e', 'E']).next().unwrap_or_default();
        mantissa.split_once('.').map_or(0, |(_, after)| after.len())
    }
}

/// A text taken apart at its numbers.
#[derive(Clone, Debug)]
pub(crate) struct Sentence<'a> {
    /// The whole text.
    pub(crate) text: &'a str,
    /// What stands before each number, and after the last.
    words: Vec<&'a str>,
    numbers: Vec<Number<'a>>,
}

impl<'a> Sentence<'a> {
    /// Takes a text apart.
    pub(crate) fn of(text: &'a str) -> Self {
        let (mut words, mut numbers) = (Vec::new(), Vec::new());
        // Up to where the text is among the words, up to where it was searched, and where the
        // digits before ended if they were a name.
        let (mut told, mut searched, mut name) = (0, 0, None);
        while let Some(offset) = text[searched..].find(|c: char| c.is_ascii_digit()) {
            let (start, end) = extent(text, searched + offset);
            searched = end;
            // `blocks 2 and 3`
            let goes_on = name.is_some_and(|end: usize| {
                matches!(text.get(end..start), Some(", " | " and " | " or "))
            });
            name = (goes_on || names(text, start, end)).then_some(end);
            if name.is_some() {
                continue;
            }
            if let Some(number) = Number::read(text, start, end) {
                words.push(&text[told..start]);
                numbers.push(number);
                told = end;
            }
        }
        words.push(&text[told..]);
        Self {
            text,
            words,
            numbers,
        }
    }

    /// Whether the two differ in their numbers alone.
    pub(crate) fn has_words_of(&self, other: &Self) -> bool {
        self.words == other.words
    }

    /// Sentences of the same words as one, each number as `median [least, most]`, or as it is where
    /// all agree.
    pub(crate) fn spread(several: &[Self]) -> String {
        let Some(first) = several.first() else {
            return String::new();
        };
        let mut told = String::new();
        for (place, words) in first.words.iter().enumerate() {
            told += words;
            let numbers = several.iter().filter_map(|each| each.numbers.get(place));
            told += &middle_and_ends(numbers.copied().collect());
        }
        told
    }
}

/// From where to where the number goes whose first digit is at `digit`: with its sign, its exponent,
/// and each point or comma that a digit follows.
fn extent(text: &str, digit: usize) -> (usize, usize) {
    let bytes = text.as_bytes();
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let is_of = |at: usize, any: &[u8]| bytes.get(at).is_some_and(|byte| any.contains(byte));
    let mut end = digit;
    while is_digit(end) || (is_of(end, b".,") && is_digit(end + 1)) {
        end += 1;
    }
    if is_of(end, b"eE") {
        let exponent = end + 1 + usize::from(is_of(end + 1, b"+-"));
        if is_digit(exponent) {
            end = exponent;
            while is_digit(end) {
                end += 1;
            }
        }
    }
    // In `3-5` and `MRA-2` the hyphen is no sign.
    let signed = text[..digit].strip_suffix(['+', '-']).is_some_and(|rest| {
        let before = rest.chars().next_back();
        before.is_none_or(|c| c.is_whitespace() || "([{:;,=/|".contains(c))
    });
    (digit - usize::from(signed), end)
}

/// Whether the digits at `start..end` say which one: after a word that asks for it, or a whole number
/// in brackets, as in `order [3, 2, 5]`.
fn names(text: &str, start: usize, end: usize) -> bool {
    let before = &text[..start];
    let whole = text[start..end].bytes().all(|byte| byte.is_ascii_digit());
    let bracketed = before
        .rfind(['[', ']'])
        .is_some_and(|at| before[at..].starts_with('['));
    let word = before
        .strip_suffix(' ')
        .and_then(|before| before.rsplit(|c: char| !c.is_alphabetic()).next());
    let asks = |word: &str| NAMING.iter().any(|name| word.eq_ignore_ascii_case(name));
    (whole && bracketed) || word.is_some_and(asks)
}

/// `median [least, most]`, or the number where least and most are written alike; nothing of no
/// numbers.
fn middle_and_ends(mut numbers: Vec<Number<'_>>) -> String {
    numbers.sort_by(|a, b| a.value.total_cmp(&b.value));
    let count = numbers.len();
    let (Some(least), Some(most)) = (numbers.first(), numbers.last()) else {
        return String::new();
    };
    if least.written == most.written {
        return least.written.to_owned();
    }
    let median = halfway(&numbers[(count - 1) / 2], &numbers[count / 2]);
    format!("{median} [{}, {}]", least.written, most.written)
}

/// Half-way between two numbers in their notation, with one decimal more than they have where that is
/// needed.
fn halfway(lower: &Number<'_>, upper: &Number<'_>) -> String {
    if lower.value == upper.value {
        return lower.written.to_owned();
    }
    let value = lower.value + (upper.value - lower.value) / 2.0;
    let either = |has: fn(&str) -> bool| has(lower.written) || has(upper.written);
    let scientific = either(|written| written.contains(['e', 'E']));
    let signed = either(|written| written.starts_with('+'));
    let written = |decimals: usize| match (scientific, signed) {
        (true, true) => format!("{value:+.decimals$e}"),
        (true, false) => format!("{value:.decimals$e}"),
        (false, true) => format!("{value:+.decimals$}"),
        (false, false) => format!("{value:.decimals$}"),
    };
    let decimals = lower.decimals().max(upper.decimals());
    let (coarse, fine) = (written(decimals), written(decimals + 1));
    // Read again, `3.50` is `3.5`.
    if coarse.parse::<f64>() == fine.parse::<f64>() {
        coarse
    } else {
        fine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(text: &str) -> Vec<&str> {
        let sentence = Sentence::of(text);
        sentence.numbers.iter().map(|n| n.written).collect()
    }

    fn spread(texts: &[&str]) -> String {
        let sentences: Vec<Sentence> = texts.iter().map(|text| Sentence::of(text)).collect();
        for sentence in &sentences {
            assert!(sentence.has_words_of(&sentences[0]), "{sentence:?}");
        }
        Sentence::spread(&sentences)
    }

    #[test]
    fn numbers_are_found_in_every_notation() {
        let cases: [(&str, &[&str]); 6] = [
            ("loss 1.963, entropy 1.117 nats", &["1.963", "1.117"]),
            (
                "error 8.8e-8 in f32, 97 % of 300.",
                &["8.8e-8", "97", "300"],
            ),
            ("97% and 1E5", &["97", "1E5"]),
            ("+0.115 (-0.001); 3-5", &["+0.115", "-0.001", "3", "5"]),
            ("t=-2 → 0.5×", &["-2", "0.5"]),
            ("", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(numbers(text), expected, "{text}");
        }
        let value = |text| Sentence::of(text).numbers[0].value;
        assert_eq!(value("error 8.8e-8"), 8.8e-8);
        assert_eq!(value("change -0.25"), -0.25);
    }

    #[test]
    fn digits_in_words_formulas_and_names_are_not_numbers() {
        for text in [
            "f32 and bf16",
            "MRA-2, MRA-2-s",
            "10^6",
            "x² + 2x",
            "without blocks.3.attention",
            "12,800 tokens",
            "version 1.2.3",
            "head 0.5",
            "Layer 3",
            "blocks 3, 4 and 7",
            "order [3, 2, 5]",
            "−4",
        ] {
            assert_eq!(numbers(text), [""; 0], "{text}");
        }
        assert_eq!(numbers("block 3: 2 times"), ["2"]);
        assert_eq!(numbers("with positions 44.5 %"), ["44.5"]);
        assert_eq!(numbers("[3, 2] and 7, by [1.0]"), ["7", "1.0"]);
        let (three, four) = (Sentence::of("block 3"), Sentence::of("block 4"));
        assert!(!three.has_words_of(&four));
    }

    #[test]
    fn of_an_odd_count_the_median_is_one_of_them() {
        let texts = [
            "error 8.8e-8, 97 % of 300",
            "error 1.2e-7, 95 % of 300",
            "error 9.0e-8, 98 % of 300",
        ];
        let expected = "error 9.0e-8 [8.8e-8, 1.2e-7], 97 [95, 98] % of 300";
        assert_eq!(spread(&texts), expected);
    }

    #[test]
    fn of_an_even_count_the_median_is_half_way() {
        let texts = [
            "3 falls, +0.10, 2.5e-7, 7",
            "4 falls, -0.02, 3.5e-7, 9",
            "1 falls, +0.20, 1.0e-8, 8",
            "9 falls, +0.05, 9.0e-7, 8",
        ];
        let expected = "3.5 [1, 9] falls, +0.075 [-0.02, +0.20], 3.0e-7 [1.0e-8, 9.0e-7], 8 [7, 9]";
        assert_eq!(spread(&texts), expected);
    }

    #[test]
    fn equal_sentences_stay_as_they_are() {
        let text = "0 rises of 300, +0.0 % (1.0e0)";
        assert_eq!(spread(&[text, text, text]), text);
        assert_eq!(Sentence::spread(&[]), "");
    }
}
