#![no_main]

use lapidary_train::TrainSpec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(spec) = toml::from_str::<TrainSpec>(text) else {
        return;
    };
    if spec.validate().is_ok() {
        let json = serde_json::to_string(&spec).expect("what was accepted can be written");
        let again: TrainSpec = serde_json::from_str(&json).expect("and is read again");
        assert_eq!(again, spec);
        let schedule = spec.schedule();
        for step in [0, 1, spec.steps / 2, spec.steps] {
            assert!(schedule.rate(step).is_finite());
        }
    }
});
