#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use lapidary_model::Tokenizer;
use lapidary_model::tokenizer::EncodeOptions;
use libfuzzer_sys::fuzz_target;

static BERT: LazyLock<Tokenizer> = LazyLock::new(|| {
    fixture(include_str!(
        "../../tests/fixtures/families/bert/tokenizer.json"
    ))
});
static GPT2: LazyLock<Tokenizer> = LazyLock::new(|| {
    fixture(include_str!(
        "../../tests/fixtures/families/gpt2/tokenizer.json"
    ))
});
static BYTES: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::byte_level(&["<end>"]).expect("the bytes are a vocabulary"));

fn fixture(json: &str) -> Tokenizer {
    Tokenizer::from_json(Path::new("fixture"), json).expect("a fixture is valid")
}

fuzz_target!(|text: &str| {
    let options = EncodeOptions::default();
    for tokenizer in [&*BERT, &*GPT2] {
        if let Ok(encoding) = tokenizer.encode(text, &options) {
            assert!(
                encoding
                    .offsets
                    .iter()
                    .all(|range| text.get(range.clone()).is_some())
            );
            let _ = tokenizer
                .decode(&encoding.ids, true)
                .expect("own ids decode");
        }
    }
    if let Ok(encoding) = BYTES.encode(text, &options) {
        assert_eq!(
            BYTES.decode(&encoding.ids, false).expect("own ids decode"),
            text
        );
    }
});
