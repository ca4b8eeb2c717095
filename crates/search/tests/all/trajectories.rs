//! Whole searches: what they find, that they repeat themselves, and that they go on where they
//! stopped.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use lapidary_search::{
    Decomposition, Domain, Ensemble, EnsembleSettings, Fit, GlobalProcess, GlobalSettings,
    LearnedTree, Optimiser, RandomSearch, Rducb, RducbSettings, Rembo, TestFunction, TreeSettings,
};

const FUNCTION: TestFunction = TestFunction::StyblinskiTang { dimensions: 8 };

fn domain() -> Domain {
    FUNCTION.domain(31).unwrap()
}

fn value(point: &[usize]) -> f64 {
    FUNCTION.value(&domain().values(point).unwrap())
}

fn advance(search: &mut dyn Optimiser, steps: usize) {
    for _ in 0..steps {
        let point = search.suggest().unwrap();
        let value = value(&point);
        search.observe(point, value).unwrap();
    }
}

fn ensemble(decomposition: Decomposition, seed: u64) -> Ensemble {
    let settings = EnsembleSettings::new(domain().dimensions(), decomposition);
    Ensemble::new(domain(), settings, seed).unwrap()
}

fn all(seed: u64) -> Vec<Box<dyn Optimiser>> {
    vec![
        Box::new(RandomSearch::new(domain(), seed)),
        Box::new(Rducb::new(domain(), RducbSettings::default(), seed).unwrap()),
        Box::new(LearnedTree::new(domain(), TreeSettings::default(), seed).unwrap()),
        Box::new(GlobalProcess::new(domain(), GlobalSettings::default(), seed).unwrap()),
        Box::new(Rembo::new(domain(), 3, GlobalSettings::default(), seed).unwrap()),
        Box::new(ensemble(Decomposition::RandomForest, seed)),
        Box::new(ensemble(Decomposition::Whole, seed)),
    ]
}

#[test]
fn the_same_seed_is_the_same_trajectory_and_no_point_comes_twice() {
    for (index, (mut first, mut again)) in all(5).into_iter().zip(all(5)).enumerate() {
        advance(first.as_mut(), 24);
        advance(again.as_mut(), 24);
        assert_eq!(first.history(), again.history());
        let mut points = first.history().points.clone();
        points.sort();
        points.dedup();
        // Several points below may have one image.
        assert!(index == 4 || points.len() == 24);
        let mut other = all(6).swap_remove(index);
        advance(other.as_mut(), 24);
        assert_ne!(first.history(), other.history());
    }
}

#[test]
fn a_search_goes_on_from_its_written_state_as_if_it_had_never_stopped() {
    let mut whole = Rducb::new(domain(), RducbSettings::default(), 2).unwrap();
    advance(&mut whole, 26);
    for stop in [0, 4, 13, 25] {
        let mut first = Rducb::new(domain(), RducbSettings::default(), 2).unwrap();
        advance(&mut first, stop);
        // Also in the middle of a step.
        first.suggest().unwrap();
        let text = serde_json::to_string(&first).unwrap();
        let mut resumed: Rducb = serde_json::from_str(&text).unwrap();
        assert_eq!(resumed, first);
        advance(&mut resumed, 26 - stop);
        assert_eq!(resumed, whole);
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut search = Rducb::new(domain(), RducbSettings::default(), 2).unwrap();
    advance(&mut search, 3);
    let good = serde_json::to_value(&search).unwrap();
    let broken = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut text = good.clone();
        change(&mut text);
        serde_json::from_value::<Rducb>(text)
            .unwrap_err()
            .to_string()
    };
    let place = broken(&|state| state["state"]["history"]["points"][1][2] = 31.into());
    assert!(place.contains("below 31"), "{place}");
    let count = broken(&|state| {
        state["state"]["history"]["values"]
            .as_array_mut()
            .unwrap()
            .pop();
    });
    assert!(count.contains("3 points and 2 values"), "{count}");
    broken(&|state| state["state"]["hyperparameters"]["lengths"][0] = (-1.0).into());
    broken(&|state| state["edges"] = 1.5.into());
    broken(&|state| state["state"]["course"]["initial"] = 0.into());
    broken(&|state| state["more"] = 0.into());
}

#[test]
fn random_decompositions_beat_random_points() {
    let mut wins = 0;
    for seed in 0..3 {
        let mut random = RandomSearch::new(domain(), seed);
        let mut search = Rducb::new(domain(), RducbSettings::default(), seed).unwrap();
        advance(&mut random, 60);
        advance(&mut search, 60);
        let least = |found: &dyn Optimiser| found.history().best().unwrap().1;
        wins += usize::from(least(&search) < least(&random));
    }
    assert_eq!(wins, 3);
}

#[test]
fn several_acquisitions_beat_random_points() {
    let least = |found: &dyn Optimiser| found.history().best().unwrap().1;
    for decomposition in [Decomposition::RandomForest, Decomposition::Whole] {
        let mut wins = 0;
        for seed in 0..3 {
            let mut random = RandomSearch::new(domain(), seed);
            let mut search = ensemble(decomposition, seed);
            advance(&mut random, 60);
            advance(&mut search, 60);
            wins += usize::from(least(&search) < least(&random));
        }
        assert_eq!(wins, 3, "{decomposition:?}");
    }
}

#[test]
fn a_small_domain_is_searched_to_its_last_point() {
    let domain = Domain::new(vec![vec![0.0, 1.0, 2.0], vec![5.0], vec![0.0, 1.0]]).unwrap();
    let settings = RducbSettings {
        initial: 2,
        ..RducbSettings::default()
    };
    let mut search = Rducb::new(domain.clone(), settings, 1)
        .unwrap()
        .starting_at(vec![vec![2, 0, 1]])
        .unwrap();
    assert_eq!(search.suggest().unwrap(), [2, 0, 1]);
    for _ in 0..6 {
        let point = search.suggest().unwrap();
        let value = domain.values(&point).unwrap().iter().sum();
        search.observe(point, value).unwrap();
    }
    assert_eq!(search.history().best().unwrap(), (&[0, 0, 0][..], 5.0));
    let error = search.suggest().unwrap_err().to_string();
    assert!(error.contains("all 6 points"), "{error}");
}

#[test]
fn points_that_are_observed_twice_leave_the_others_to_be_found() {
    let domain = Domain::new(vec![vec![0.0, 1.0, 2.0]]).unwrap();
    let settings = RducbSettings {
        initial: 1,
        ..RducbSettings::default()
    };
    let searches: [Box<dyn Optimiser>; 2] = [
        Box::new(RandomSearch::new(domain.clone(), 1)),
        Box::new(Rducb::new(domain, settings, 1).unwrap()),
    ];
    for mut search in searches {
        // Four observations of a domain of three points.
        for place in [0, 1, 0, 1] {
            search.observe(vec![place], 1.0).unwrap();
        }
        assert_eq!(search.suggest().unwrap(), [2]);
        search.observe(vec![2], 0.5).unwrap();
        let error = search.suggest().unwrap_err().to_string();
        assert!(error.contains("all 3 points"), "{error}");
    }
}

#[test]
fn many_variables_are_feasible() {
    let function = TestFunction::StyblinskiTang { dimensions: 250 };
    let domain = function.domain(150).unwrap();
    let settings = RducbSettings {
        fit: Fit {
            steps: 2,
            ..Fit::default()
        },
        ..RducbSettings::default()
    };
    let mut search = Rducb::new(domain.clone(), settings, 1).unwrap();
    for _ in 0..14 {
        let point = search.suggest().unwrap();
        let value = function.value(&domain.values(&point).unwrap());
        search.observe(point, value).unwrap();
    }
    assert_eq!(search.history().len(), 14);
}

#[test]
fn what_cannot_be_observed_is_refused() {
    let mut search = Rducb::new(domain(), RducbSettings::default(), 1).unwrap();
    assert!(search.observe(vec![0; 8], f64::NAN).is_err());
    assert!(search.observe(vec![0; 7], 1.0).is_err());
    assert!(search.observe(vec![31; 8], 1.0).is_err());
    let settings = RducbSettings {
        edges: 1.0,
        ..RducbSettings::default()
    };
    assert!(Rducb::new(domain(), settings, 1).is_err());
    let mut rembo = Rembo::new(domain(), 3, GlobalSettings::default(), 1).unwrap();
    let point = rembo.suggest().unwrap();
    let other: Vec<usize> = point.iter().map(|place| 30 - place).collect();
    assert!(rembo.observe(other, 1.0).is_err());
}
