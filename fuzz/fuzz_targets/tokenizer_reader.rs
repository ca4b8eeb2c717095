#![no_main]

use std::path::Path;

use lapidary_model::Tokenizer;
use lapidary_model::tokenizer::EncodeOptions;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &str| {
    if let Ok(tokenizer) = Tokenizer::from_json(Path::new("fuzzed"), json)
        && let Ok(encoding) = tokenizer.encode("the cat sees 12 dogs", &EncodeOptions::default())
    {
        let _ = tokenizer.decode(&encoding.ids, true);
    }
});
