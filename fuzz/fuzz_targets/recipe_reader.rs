#![no_main]

use lapidary_compress::{Recipe, Settings};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(recipe) = toml::from_str::<Recipe>(text)
        && recipe.check().is_ok()
    {
        // Not as JSON, which knows neither `nan` nor `inf`.
        let written = toml::to_string(&recipe).expect("what was accepted can be written");
        let again: Recipe = toml::from_str(&written).expect("and is read again");
        assert!(again.check().is_ok());
        assert_eq!(again.stages.len(), recipe.stages.len());
        for (one, other) in again.stages.iter().zip(&recipe.stages) {
            assert_eq!(one.method, other.method);
            assert_eq!(one.ratio, other.ratio);
            assert_eq!(one.settings.is_some(), other.settings.is_some());
        }
    }
    if let Ok(settings) = toml::from_str::<Settings>(text) {
        let written = toml::to_string(&settings).expect("what was accepted can be written");
        toml::from_str::<Settings>(&written).expect("and is read again");
    }
});
