//! Fixtures against transformers, our own tokenizers, and text of any kind.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn open(name: &str) -> Tokenizer {
    Tokenizer::open(&fixtures().join("families").join(name), &Limits::default()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn tokens_are_those_of_transformers() {
    let golden = fs::read_to_string(fixtures().join("text/tokenization.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let options = EncodeOptions::default();
    for name in ["gpt2", "gpt2-old-names", "bert", "bert-masked-lm-old-names"] {
        let tokenizer = open(name);
        let case = &golden[name];
        let texts: Vec<String> = serde_json::from_value(case["texts"].clone()).unwrap();
        for (i, text) in texts.iter().enumerate() {
            let encoding = tokenizer.encode(text, &options).unwrap();
            assert_eq!(encoding.ids, ids(&case["ids"][i]), "{name}: {text:?}");
            let decoded = tokenizer.decode(&encoding.ids, true).unwrap();
            let expected = case["decoded"][i].as_str().unwrap();
            // WordPiece decoding moves punctuation to the word before it, transformers' doesn't.
            assert_eq!(
                decoded.replace(' ', ""),
                expected.replace(' ', ""),
                "{name}: {text:?}"
            );
        }
        let pair = tokenizer
            .encode_pair(&texts[0], &texts[1], &options)
            .unwrap();
        assert_eq!(pair.ids, ids(&case["pair_ids"]), "{name}");
        assert_eq!(pair.type_ids, ids(&case["pair_types"]), "{name}");
        assert_eq!(tokenizer.model_length(), Some(64));
        tokenizer.check_fits(128).unwrap();
    }
}

#[test]
fn offsets_and_special_tokens_point_into_the_text() {
    let text = "The cat sees";
    let encoding = open("bert")
        .encode(text, &EncodeOptions::default())
        .unwrap();
    assert_eq!(encoding.tokens, ["[CLS]", "the", "cat", "sees", "[SEP]"]);
    assert_eq!(encoding.special, [true, false, false, false, true]);
    assert_eq!(encoding.sequences, [None, Some(0), Some(0), Some(0), None]);
    let words: Vec<&str> = encoding
        .offsets
        .iter()
        .map(|range| &text[range.clone()])
        .collect();
    assert_eq!(words, ["", "The", "cat", "sees", ""]);
    let bare = EncodeOptions {
        special_tokens: false,
        limit: None,
    };
    assert_eq!(
        open("bert").encode(text, &bare).unwrap().tokens,
        ["the", "cat", "sees"]
    );
}

/// The tokens of each word of a text, with special tokens.
fn words(tokenizer: &Tokenizer, text: &str) -> Vec<Vec<String>> {
    let encoding = tokenizer.encode(text, &EncodeOptions::default()).unwrap();
    let words = tokenizer.words(&encoding.ids).into_iter();
    words.map(|word| encoding.tokens[word].to_vec()).collect()
}

#[test]
fn word_pieces_are_words_again() {
    let found = words(&open("bert"), "The bird's cutely seeing, [SEP]");
    let expected: [&[&str]; 9] = [
        &["[CLS]"],
        &["the"],
        &["bird"],
        &["[UNK]"],
        &["s"],
        &["cut", "##e", "##ly"],
        &["see", "##ing"],
        &["[UNK]"],
        &["[SEP]"],
    ];
    // The fixture may know the marks; what matters is that each is alone.
    let shape = |words: &[Vec<String>]| words.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(found[..3], expected[..3]);
    assert_eq!(found[5], ["cut", "##e", "##ly"], "{found:?}");
    assert_eq!(shape(&found)[..9], [1, 1, 1, 1, 1, 3, 2, 1, 1], "{found:?}");
}

#[test]
fn byte_level_pieces_are_words_again() {
    for name in ["gpt2", "opt"] {
        let tokenizer = open(name);
        let text = "the birds sing, don't  they? cats 42";
        let expected = [
            "the", "birds", "sing", ",", "don", "'", "t", "", "they", "?", "cats", "42",
        ];
        let encoding = tokenizer.encode(text, &EncodeOptions::default()).unwrap();
        let mut read: Vec<String> = Vec::new();
        for word in tokenizer.words(&encoding.ids) {
            match encoding.special[word.start] {
                true => assert_eq!(word.len(), 1),
                false => {
                    let text = tokenizer.decode(&encoding.ids[word], true).unwrap();
                    read.push(text.trim().to_owned());
                }
            }
        }
        assert_eq!(read, expected, "{name}");
    }
}

/// Llama's tokenizer: spaces as `▁`, bytes for what is not in the vocabulary, and no word
/// boundaries but those.
fn sentence_piece() -> Tokenizer {
    let pieces = [
        "<unk>", "<s>", "▁the", "▁farm", "er", "▁", "s", "y", "<0x0A>", "<0xC3>", "<0xAF>", ",",
        "'", "▁na", "ve", "<0x21>",
    ];
    let vocabulary: serde_json::Map<String, Value> = pieces
        .iter()
        .zip(0u32..)
        .map(|(piece, id)| ((*piece).to_owned(), id.into()))
        .collect();
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": own::added_tokens(0, &["<unk>", "<s>"]),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true},
    });
    Tokenizer::from_json(Path::new("sentence pieces"), &json.to_string()).unwrap()
}

#[test]
fn sentence_pieces_are_words_again() {
    let tokenizer = sentence_piece();
    let of = |tokens: &[&str]| -> Vec<Range<usize>> {
        let ids: Vec<u32> = tokens.iter().map(|t| tokenizer.id_of(t).unwrap()).collect();
        tokenizer.words(&ids)
    };
    assert_eq!(of(&["<s>", "▁the", "▁farm", "er", "s"]), [0..1, 1..2, 2..5]);
    // Marks are words, an accented letter in bytes is not; a lone space goes with what follows.
    assert_eq!(
        of(&["▁na", "<0xC3>", "<0xAF>", "ve", ",", "▁the"]),
        [0..4, 4..5, 5..6]
    );
    assert_eq!(
        of(&["▁", "y", "'", "s", "<0x21>"]),
        [0..2, 2..3, 3..4, 4..5]
    );
    assert_eq!(
        of(&["▁the", "<0x0A>", "y", "<s>", "s"]),
        [0..1, 1..2, 2..3, 3..4, 4..5]
    );
}

#[test]
fn words_of_a_closed_vocabulary_are_its_tokens() {
    let tokenizer = Tokenizer::of_words(&["<start>", "the", "cat"]).unwrap();
    assert_eq!(
        words(&tokenizer, "the cat"),
        [["<start>"], ["the"], ["cat"]]
    );
    assert!(tokenizer.words(&[]).is_empty());
}

proptest! {
    /// Words are neighbours without gaps, of every id, also of those that are none.
    #[test]
    fn words_cover_any_ids(ids in prop::collection::vec(0u32..300, 0..40)) {
        let mut all = vec![sentence_piece(), Tokenizer::byte_level(&["<end>"]).unwrap()];
        all.extend(["bert", "gpt2"].map(open));
        for tokenizer in all {
            let mut next = 0;
            for word in tokenizer.words(&ids) {
                prop_assert_eq!(word.start, next);
                prop_assert!(word.end > word.start);
                if ids[word.clone()].iter().any(|id| tokenizer.is_special(*id)) {
                    prop_assert_eq!(word.len(), 1);
                }
                next = word.end;
            }
            prop_assert_eq!(next, ids.len());
        }
    }
}

#[test]
fn what_a_limit_drops_is_counted() {
    let tokenizer = open("bert");
    let limit = |limit| EncodeOptions {
        limit: Some(limit),
        ..EncodeOptions::default()
    };
    let whole = tokenizer
        .encode("the cat sees the dogs", &limit(7))
        .unwrap();
    assert_eq!((whole.len(), whole.dropped), (7, 0));
    let cut = tokenizer
        .encode("the cat sees the dogs", &limit(4))
        .unwrap();
    assert_eq!(
        (cut.dropped, cut.tokens),
        (
            3,
            ["[CLS]", "the", "cat", "[SEP]"].map(String::from).to_vec()
        )
    );
    let pair = tokenizer
        .encode_pair("the cat", "sees the dogs", &limit(6))
        .unwrap();
    assert_eq!((pair.len(), pair.dropped), (6, 2));
    let message = tokenizer
        .encode("the cat", &limit(2))
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "the limit is 2 tokens, but must be more than the 2 that are added to a text"
    );
}

#[test]
fn settings_of_a_file_do_not_truncate_in_silence_and_survive_saving() {
    let directory = tempfile::tempdir().unwrap();
    let json = fs::read_to_string(fixtures().join("families/bert/tokenizer.json")).unwrap();
    let truncation =
        r#""truncation":{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}"#;
    let json = json.replace("\"truncation\":null", truncation);
    let tokenizer = Tokenizer::from_json(Path::new("t.json"), &json).unwrap();
    assert_eq!(tokenizer.model_length(), Some(4));
    let encoding = tokenizer
        .encode("the cat sees the dogs", &EncodeOptions::default())
        .unwrap();
    assert_eq!((encoding.len(), encoding.dropped), (7, 0));
    tokenizer.save(directory.path()).unwrap();
    let saved = fs::read_to_string(directory.path().join(TOKENIZER_FILE)).unwrap();
    assert!(saved.contains("\"max_length\":4"));
}

#[test]
fn missing_and_invalid_tokenizers_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let message = || {
        Tokenizer::open(directory.path(), &Limits::default())
            .unwrap_err()
            .to_string()
    };
    assert!(
        message().contains("has no tokenizer; a model of text has tokenizer.json"),
        "{}",
        message()
    );
    let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
    write("tokenizer.model", "");
    assert!(
        message().contains("(but tokenizer.model, which is not enough)"),
        "{}",
        message()
    );
    write("vocab.txt", "[CLS]\n[SEP]\nthe\n");
    assert!(
        message().contains("it lacks the special token `[UNK]`"),
        "{}",
        message()
    );
    write("tokenizer.json", "{}");
    assert!(
        message().contains("tokenizer.json is not a valid tokenizer: "),
        "{}",
        message()
    );
    write("tokenizer_config.json", "{");
    assert!(
        message().contains("tokenizer_config.json is not a valid tokenizer: "),
        "{}",
        message()
    );
}

#[test]
fn first_tokens_of_opt_and_roberta_are_added() {
    let directory = tempfile::tempdir().unwrap();
    for file in ["vocab.json", "merges.txt"] {
        fs::copy(
            fixtures().join("families/gpt2-old-names").join(file),
            directory.path().join(file),
        )
        .unwrap();
    }
    let tokens = |settings: &str| {
        fs::write(directory.path().join("tokenizer_config.json"), settings).unwrap();
        let tokenizer = Tokenizer::open(directory.path(), &Limits::default()).unwrap();
        tokenizer
            .encode("a", &EncodeOptions::default())
            .unwrap()
            .tokens
    };
    assert_eq!(
        tokens(r#"{"add_bos_token": true, "bos_token": {"content": "</s>"}}"#),
        ["</s>", "a"]
    );
    assert_eq!(
        tokens(r#"{"tokenizer_class": "RobertaTokenizer"}"#),
        ["<s>", "a", "</s>"]
    );
}

#[test]
fn empty_text_is_an_error() {
    for tokenizer in [open("bert"), Tokenizer::byte_level(&[]).unwrap()] {
        let error = tokenizer.encode("", &EncodeOptions::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the text is empty, but it must have at least one token"
        );
    }
}

#[test]
fn vocabulary_of_another_model_is_refused() {
    let message = open("bert").check_fits(100).unwrap_err().to_string();
    assert!(
        message.contains("but the model has only 100 rows"),
        "{message}"
    );
}

#[test]
fn byte_ids_are_the_bytes() {
    let tokenizer = Tokenizer::byte_level(&["<end>", "<pad>"]).unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 258);
    let every_byte_of_utf8 = "\0\u{7f}é€😀 \n";
    let encoding = tokenizer
        .encode(every_byte_of_utf8, &EncodeOptions::default())
        .unwrap();
    assert_eq!(
        encoding.ids,
        every_byte_of_utf8
            .bytes()
            .map(u32::from)
            .collect::<Vec<_>>()
    );
    let marked = tokenizer
        .encode("a<end>", &EncodeOptions::default())
        .unwrap();
    assert_eq!(marked.ids, [97, 256]);
    assert!(tokenizer.is_special(256) && !tokenizer.is_special(97));
    assert_eq!(tokenizer.decode(&marked.ids, true).unwrap(), "a");
    assert_eq!(tokenizer.decode(&marked.ids, false).unwrap(), "a<end>");
    assert!(Tokenizer::byte_level(&["x", "x"]).is_err());
}

#[test]
fn words_are_ranked_by_frequency_then_alphabet() {
    let texts = ["the cat (a cat) sees", "the dog sees a cat ."];
    let tokenizer = Tokenizer::word_level(texts, 7, &["<end>"]).unwrap();
    let tokens: Vec<String> = (0..7).map(|id| tokenizer.token_of(id).unwrap()).collect();
    assert_eq!(tokens, ["<unk>", "<end>", "cat", "a", "sees", "the", "("]);
    let encoding = tokenizer
        .encode("the zebra (a cat)<end>", &EncodeOptions::default())
        .unwrap();
    assert_eq!(
        encoding.tokens,
        ["the", "<unk>", "(", "a", "cat", "<unk>", "<end>"]
    );
    assert_eq!(tokenizer.decode(&[5, 2, 4], true).unwrap(), "the cat sees");
    assert!(Tokenizer::word_level(texts, 2, &["<end>"]).is_err());
}

#[test]
fn own_tokenizers_save_and_load() {
    let text = "the cat sees the bird";
    for tokenizer in [
        Tokenizer::byte_level(&["<end>"]).unwrap(),
        Tokenizer::word_level([text], 20, &["<end>"]).unwrap(),
    ] {
        let directory = tempfile::tempdir().unwrap();
        tokenizer.save(directory.path()).unwrap();
        let loaded = Tokenizer::open(directory.path(), &Limits::default()).unwrap();
        let options = EncodeOptions::default();
        assert_eq!(
            loaded.encode(text, &options).unwrap(),
            tokenizer.encode(text, &options).unwrap()
        );
        assert_eq!(loaded.vocabulary_size(), tokenizer.vocabulary_size());
        assert_eq!(loaded.to_json().unwrap(), tokenizer.to_json().unwrap());
    }
}

proptest! {
    #[test]
    fn bytes_round_trip_any_text(text in any::<String>()) {
        prop_assume!(!text.is_empty());
        let tokenizer = Tokenizer::byte_level(&["<end>"]).unwrap();
        let encoding = tokenizer.encode(&text, &EncodeOptions::default()).unwrap();
        prop_assert_eq!(tokenizer.decode(&encoding.ids, false).unwrap(), text);
    }

    #[test]
    fn any_text_never_panics(text in any::<String>(), limit in 0usize..20) {
        let options = EncodeOptions { special_tokens: true, limit: Some(limit) };
        for name in ["bert", "gpt2"] {
            if let Ok(encoding) = open(name).encode(&text, &options) {
                prop_assert!(encoding.len() <= limit);
                for range in encoding.offsets {
                    prop_assert!(text.get(range).is_some());
                }
            }
        }
    }

    #[test]
    fn any_tokenizer_file_never_panics(position in any::<prop::sample::Index>(), text in ".{0,6}") {
        let mut json = fs::read_to_string(fixtures().join("families/bert/tokenizer.json")).unwrap();
        let begin = position.index(json.len());
        if json.is_char_boundary(begin) {
            json.insert_str(begin, &text);
            if let Ok(tokenizer) = Tokenizer::from_json(Path::new("x"), &json) {
                let _ = tokenizer.encode("the cat", &EncodeOptions::default());
            }
        }
    }
}

/// Pieces that meet each other in every way: blank lines, spaces at both ends of lines, added
/// tokens and what looks like them, letters of many scripts.
fn difficult_text() -> impl Strategy<Value = String> {
    const PIECES: [&str; 22] = [
        "the",
        " cat",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        ".",
        ",",
        "'s",
        "42",
        "dogs",
        "na\u{ef}ve",
        "e\u{301}",
        "\u{4e2d}\u{6587}",
        "\u{1f600}",
        "<mask>",
        "<end>",
        "[MASK]",
        "</s>",
        "\u{a0}",
    ];
    proptest::collection::vec(proptest::sample::select(&PIECES[..]), 0..60)
        .prop_map(|pieces| pieces.concat())
}

fn all_tokenizers() -> Vec<(String, Tokenizer, chunks::Cut)> {
    use chunks::Cut::{Anywhere, BeforeLineEnd};
    let mut all = vec![
        (
            "bytes".to_string(),
            Tokenizer::byte_level(&["<end>"]).unwrap(),
            Anywhere,
        ),
        (
            "words".to_string(),
            Tokenizer::word_level(["the cat . dogs"], 20, &["<end>"]).unwrap(),
            BeforeLineEnd,
        ),
    ];
    let mut families: Vec<String> = fs::read_dir(fixtures().join("families"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    families.sort();
    for name in families {
        let directory = fixtures().join("families").join(&name);
        let has = |file: &str| directory.join(file).exists();
        if has("tokenizer.json") || has("vocab.json") || has("vocab.txt") {
            all.push((name.clone(), open(&name), BeforeLineEnd));
        }
    }
    assert!(all.len() > 4);
    all
}

#[test]
fn a_long_text_is_cut_where_it_may_be() {
    let text = "the cat sees\nthe dogs .\n\n and more\n".repeat(20);
    for (name, tokenizer, expected) in all_tokenizers() {
        let cut = chunks::cuts(&tokenizer.inner, &text);
        assert_eq!(cut, expected, "{name}");
        let parts = chunks::chunks(&text, cut, 16);
        assert!(parts.len() > 10, "{name}: {}", parts.len());
        assert_eq!(parts.concat(), text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn ids_are_those_of_the_whole_text(text in difficult_text(), size in 1usize..24) {
        for (name, tokenizer, _) in all_tokenizers() {
            let slow = tokenizer.encode_bare(&text).unwrap();
            let fast = tokenizer.ids_in_chunks(&text, size).unwrap();
            prop_assert_eq!(slow.get_ids(), fast, "{}: {:?}", name, text);
        }
    }
}
