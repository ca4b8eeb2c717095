//! Reproductions with one seed and with several.

use super::*;

const CLUSTERING: [&str; 4] = ["reproduce", "clustering", "--scale", "smoke"];

#[test]
fn seeds_are_run_one_by_one_and_joined() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (one, two) = (at("one"), at("two"));
    let single = ["--seed", "1", "--json", "--out", &one];
    let single = json(&[&CLUSTERING[..], &single[..]].concat());
    let several = ["--seed", "1", "--seeds", "2", "--json", "--out", &two];
    let done = lapidary(&[&CLUSTERING[..], &several[..]].concat())
        .assert()
        .success();
    let joined: Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    let progress = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(
        progress.contains("clustering: seed 2: run 2 of 2"),
        "{progress}"
    );
    let kept = std::fs::read(Path::new(&two).join("clustering-smoke.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&kept).unwrap(), joined);

    assert_eq!(single["seeds"], serde_json::json!([1]));
    assert_eq!(joined["seeds"], serde_json::json!([1, 2]));
    assert_eq!(single["setting"], joined["setting"]);
    assert_eq!(single["plots"], joined["plots"]);
    let claims = |found: &Value| found["claims"].as_array().unwrap().clone();
    assert_eq!(claims(&single).len(), claims(&joined).len());
    for (alone, claim) in claims(&single).iter().zip(&claims(&joined)) {
        assert!(alone.get("findings").is_none(), "{alone}");
        for same in ["claim", "published"] {
            assert_eq!(alone[same], claim[same]);
        }
        let findings = claim["findings"].as_array().unwrap();
        let [first, second] = findings.as_slice() else {
            panic!("{claim}");
        };
        let seeds = findings.iter().map(|finding| finding["seed"].as_u64());
        assert!(seeds.eq([Some(1), Some(2)]), "{claim}");
        for same in ["measured", "verdict", "note"] {
            assert_eq!(alone[same], first[same]);
        }
        let text = |finding: &Value| finding["measured"].as_str().unwrap().to_owned();
        let expected = if text(first) == text(second) {
            text(first)
        } else {
            format!("seed 1: {}; seed 2: {}", text(first), text(second))
        };
        assert_eq!(text(claim), expected);
    }
}

#[test]
fn a_section_of_the_page_is_printed_alone() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().to_str().unwrap();
    let section = |seeds: &str| {
        let asked = ["--seed", "1", "--seeds", seeds, "--markdown", "--out", out];
        let text = output(&[&CLUSTERING[..], &asked[..]].concat());
        let heading = "## A mathematical perspective on Transformers (`clustering`)\n\n";
        assert!(text.starts_with(heading), "{text}");
        text
    };
    let one = section("1");
    assert!(one.contains(". At smoke scale, seed 1, "), "{one}");
    assert!(one.contains(" | holds |  |\n"), "{one}");
    let three = section("3");
    assert!(
        three.contains(". At smoke scale, seeds 1 to 3, "),
        "{three}"
    );
    assert!(three.contains("median [least, most]"), "{three}");
    // Its first claim starts from the same points with every seed.
    assert!(three.contains(" | holds in 3 of 3 |  |\n"), "{three}");
}

#[test]
fn seeds_and_outputs_that_cannot_be_are_refused() {
    let with = |more: &[&'static str]| [&CLUSTERING[..], more].concat();
    for wrong in [
        with(&["--seeds", "0"]),
        with(&["--seeds", "33"]),
        vec!["reproduce", "--all", "--markdown"],
        vec!["reproduce", "--list", "--markdown"],
    ] {
        lapidary(&wrong).assert().failure().code(2);
    }
    refused(&with(&["--markdown", "--json"]), &["--markdown", "--json"]);
    let largest = "18446744073709551615";
    refused(
        &with(&["--seeds", "2", "--seed", "18446744073709551615"]),
        &["2 seeds", largest],
    );
}
