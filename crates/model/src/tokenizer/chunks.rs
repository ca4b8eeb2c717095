//! Where a long text may be cut so that its parts have, one after the other, the tokens of the
//! whole.

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{ModelWrapper, Tokenizer};

/// Where cuts change no token of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// Between any two characters: each is tokens by itself.
    Anywhere,
    /// Between a visible ASCII character and the line's end after it. White space belongs to what
    /// follows it, so a cut behind a line's end would change how runs of white space are split.
    BeforeLineEnd,
    /// Nowhere that could be proved.
    Nowhere,
}

/// Where `text` may be cut.
pub(super) fn cuts(tokenizer: &Tokenizer, text: &str) -> Cut {
    let added = tokenizer.get_added_tokens_decoder();
    let occurs = |content: &str| content.is_empty() || text.contains(content);
    if is_each_byte_alone(tokenizer) {
        return match added.values().any(|token| occurs(&token.content)) {
            true => Cut::Nowhere,
            false => Cut::Anywhere,
        };
    }
    // An added token may span lines, or swallow the white space around it.
    let reaches_over = added.values().any(|token| {
        let strips = token.lstrip || token.rstrip;
        token.content.contains('\n') || strips && (token.normalized || occurs(&token.content))
    });
    let is_local = tokenizer.get_normalizer().is_none_or(is_local)
        && tokenizer.get_pre_tokenizer().is_some_and(separates_lines);
    if is_local && !reaches_over {
        Cut::BeforeLineEnd
    } else {
        Cut::Nowhere
    }
}

/// Parts of `text` of about `size` bytes or more.
pub(super) fn chunks(text: &str, cut: Cut, size: usize) -> Vec<&str> {
    let mut parts = Vec::with_capacity(text.len() / size.max(1) + 1);
    let mut rest = text;
    while let Some(end) = first_cut(rest, cut, size) {
        let (part, after) = rest.split_at(end);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

/// The first place from `size` on where the text may be cut and something is left.
fn first_cut(text: &str, cut: Cut, size: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let may_cut = |&end: &usize| match cut {
        Cut::Anywhere => text.is_char_boundary(end),
        Cut::BeforeLineEnd => bytes
            .get(end - 1..=end)
            .is_some_and(|pair| pair[0].is_ascii_graphic() && pair[1] == b'\n'),
        Cut::Nowhere => false,
    };
    (size.max(1)..text.len()).find(may_cut)
}

/// Byte-level and without merges.
fn is_each_byte_alone(tokenizer: &Tokenizer) -> bool {
    let whole_text = matches!(
        tokenizer.get_pre_tokenizer(),
        Some(PreTokenizerWrapper::ByteLevel(bytes)) if !bytes.use_regex && !bytes.add_prefix_space
    );
    let has_no_merges = || match tokenizer.get_model() {
        ModelWrapper::BPE(model) => {
            let model = serde_json::to_value(model).unwrap_or_default();
            model["merges"].as_array().is_some_and(Vec::is_empty)
                && model["ignore_merges"] == false
                && model["continuing_subword_prefix"].is_null()
                && model["end_of_word_suffix"].is_null()
        }
        _ => false,
    };
    whole_text && tokenizer.get_normalizer().is_none() && has_no_merges()
}

/// Whether what becomes of a line depends on nothing beyond it.
fn is_local(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::BertNormalizer(_)
        | NormalizerWrapper::StripAccents(_)
        | NormalizerWrapper::NFC(_)
        | NormalizerWrapper::NFD(_)
        | NormalizerWrapper::NFKC(_)
        | NormalizerWrapper::NFKD(_)
        | NormalizerWrapper::Lowercase(_) => true,
        NormalizerWrapper::Sequence(parts) => parts.as_ref().iter().all(is_local),
        _ => false,
    }
}

/// Whether no piece of text spans a visible character and the line's end after it. The expression
/// of GPT-2 has no alternative that matches both.
fn separates_lines(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::BertPreTokenizer(_)
        | PreTokenizerWrapper::Whitespace(_)
        | PreTokenizerWrapper::WhitespaceSplit(_) => true,
        PreTokenizerWrapper::ByteLevel(bytes) => bytes.use_regex && !bytes.add_prefix_space,
        PreTokenizerWrapper::Sequence(parts) => match parts.as_ref() {
            [first, rest @ ..] => separates_lines(first) && rest.iter().all(splits_further),
            [] => false,
        },
        _ => false,
    }
}

/// Whether a step only splits the pieces that it gets, wherever in the text they are.
fn splits_further(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::Digits(_) | PreTokenizerWrapper::Punctuation(_) => true,
        PreTokenizerWrapper::ByteLevel(bytes) => !bytes.add_prefix_space,
        other => separates_lines(other),
    }
}
