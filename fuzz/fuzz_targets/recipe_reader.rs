#![no_main]

use lapidary_compress::{Recipe, Settings};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(recipe) = toml::from_str::<Recipe>(text)
        && recipe.check().is_ok()
    {
        let json = serde_json::to_string(&recipe).expect("what was accepted can be written");
        let again: Recipe = serde_json::from_str(&json).expect("and is read again");
        assert_eq!(again.stages.len(), recipe.stages.len());
        for (one, other) in again.stages.iter().zip(&recipe.stages) {
            assert_eq!(one.method, other.method);
            assert!(other.budget().is_ok());
        }
    }
    if let Ok(settings) = toml::from_str::<Settings>(text) {
        serde_json::to_string(&settings).expect("what was accepted can be written");
    }
});
