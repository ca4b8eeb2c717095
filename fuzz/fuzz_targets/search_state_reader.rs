#![no_main]

use lapidary_search::{Optimiser, Rducb};
use libfuzzer_sys::fuzz_target;

/// Larger searches are read but not gone on with.
const POINTS: usize = 64;
const OBSERVED: usize = 16;

fuzz_target!(|text: &str| {
    let Ok(mut search) = serde_json::from_str::<Rducb>(text) else {
        return;
    };
    let json = serde_json::to_string(&search).expect("what was accepted can be written");
    let again: Rducb = serde_json::from_str(&json).expect("and is read again");
    assert_eq!(again, search);
    if search.domain().size() > POINTS || search.history().len() > OBSERVED {
        return;
    }
    if let Ok(point) = search.suggest() {
        search.domain().check(&point).expect("a point of the domain");
        let _ = search.observe(point, 0.5);
    }
});
