#![no_main]

use lapidary_compress::automatic::AutomaticState;
use lapidary_search::{Optimiser, Rducb};
use libfuzzer_sys::fuzz_target;

/// Larger searches are read but not gone on with.
const POINTS: usize = 64;
const VARIABLES: usize = 8;
const OBSERVED: usize = 16;

fuzz_target!(|text: &str| {
    // The file of `compress --auto`, of which a search is a part.
    if let Ok(state) = serde_json::from_str::<AutomaticState>(text) {
        let json = serde_json::to_string(&state).expect("what was accepted can be written");
        let again: AutomaticState = serde_json::from_str(&json).expect("and is read again");
        assert_eq!(again, state);
        go_on(state.search);
    }
    if let Ok(search) = serde_json::from_str::<Rducb>(text) {
        let json = serde_json::to_string(&search).expect("what was accepted can be written");
        let again: Rducb = serde_json::from_str(&json).expect("and is read again");
        assert_eq!(again, search);
        go_on(search);
    }
});

/// One step of a search.
fn go_on(mut search: Rducb) {
    let domain = search.domain();
    // A grid of one place makes a domain no larger, but the search.
    if domain.size() > POINTS || domain.dimensions() > VARIABLES {
        return;
    }
    if search.history().len() > OBSERVED {
        return;
    }
    if let Ok(point) = search.suggest() {
        search
            .domain()
            .check(&point)
            .expect("a point of the domain");
        let _ = search.observe(point, 0.5);
    }
}
