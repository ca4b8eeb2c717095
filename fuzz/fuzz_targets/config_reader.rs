#![no_main]

use std::path::Path;

use lapidary_model::{Config, Limits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let path = Path::new("fuzzed");
    if let Ok(config) = Config::parse(path, text, &Limits::default()) {
        let again = Config::parse(path, &config.to_json(), &Limits::default());
        assert_eq!(again.expect("what was accepted is accepted again"), config);
    }
});
