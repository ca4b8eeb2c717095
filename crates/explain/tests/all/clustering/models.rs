//! Layers of models as time.

use crate::common::{DECODER, generator, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::analyses::clustering::{
    Dynamics, Ensemble, Film, Flow, Particles, Scheme, deepened, iterated, layers,
    layers_without_skip, report, shuffled,
};
use lapidary_kernels::check::difference;
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::{Signal, Trace};

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

#[test]
fn layers_of_a_model_are_read_after_its_norms() {
    let model = model(DECODER, 2);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let found = layers(&question).unwrap();
    let sites: Vec<&str> = found.iter().map(|layer| layer.site.as_str()).collect();
    assert_eq!(
        sites,
        [
            "blocks.0.attention.in",
            "blocks.1.attention.in",
            "final_norm"
        ]
    );
    for layer in &found {
        assert!(layer.mean_cosine > -1.0 && layer.mean_cosine < 1.0);
        assert!(layer.effective_rank >= 1.0 && layer.effective_rank <= 7.0);
        assert_eq!(layer.histogram.iter().sum::<usize>(), 21);
    }
    // Padding does not count.
    let padding = Tensor::new(&[[1u8, 1, 1, 1, 1, 0, 0]], &Device::Cpu).unwrap();
    let padded = Question {
        padding: Some(&padding),
        ..question
    };
    assert_eq!(
        layers(&padded).unwrap()[0].histogram.iter().sum::<usize>(),
        10
    );

    let other = shuffled(&input, &mut generator(3)).unwrap();
    let Input::Tokens { ids, .. } = &other else {
        unreachable!()
    };
    let mut ids = ids.to_vec2::<u32>().unwrap().remove(0);
    assert_ne!(ids, IDS);
    ids.sort_unstable();
    let mut sorted = IDS.to_vec();
    sorted.sort_unstable();
    assert_eq!(ids, sorted);

    let report = report(&question, &mut generator(3)).unwrap();
    assert_eq!(report.tables[0].rows.len(), 3);
    assert_eq!(report.plots[0].series.len(), 3);
}

#[test]
fn without_the_skip_a_block_passes_on_what_attention_writes() {
    let model = model(DECODER, 2);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let found = layers_without_skip(&question).unwrap();
    let whole = layers(&question).unwrap();
    assert_eq!(found[0], whole[0]);
    assert_ne!(found[1].mean_cosine, whole[1].mean_cosine);
    // The same by another way: the input of the block is zero where the residual reads it, which
    // a zeroed input with the attention's own output put back gives.
    let trace = Trace::new().capture("blocks.0.attention.out").unwrap();
    let pass = |trace| Pass {
        trace: Some(trace),
        ..Pass::default()
    };
    model.forward(&input, pass(&trace)).unwrap();
    let written = trace.signal("blocks.0.attention.out").unwrap().into_value();
    let again = Trace::new()
        .replace("blocks.0.in", |_, x| {
            Ok(Signal::from(x.value().zeros_like().unwrap()))
        })
        .unwrap()
        .replace("blocks.0.attention.out", move |_, _| {
            Ok(Signal::from(written.clone()))
        })
        .unwrap()
        .capture("blocks.1.attention.in")
        .unwrap();
    model.forward(&input, pass(&again)).unwrap();
    let states = again.signal("blocks.1.attention.in").unwrap().into_value();
    let states =
        Particles::new(16, states.flatten_all().unwrap().to_vec1::<f64>().unwrap()).unwrap();
    assert!((states.mean_cosine() - found[1].mean_cosine).abs() < 1e-10);
}

#[test]
fn a_film_shows_where_particles_are_and_which_are_one() {
    let dynamics = Dynamics::new(Flow::SelfAttention, 1.0).unwrap();
    let ensemble = |dimension| Ensemble {
        count: 9,
        dimension,
        systems: 1,
        time: 25.0,
        step: 0.1,
        ..Ensemble::default()
    };
    // Two coordinates are shown as they are.
    let flat = Film::new(&dynamics, &ensemble(2)).unwrap();
    let start = ensemble(2).start(0).unwrap();
    for (seen, point) in flat.points[0].iter().zip(start.iter()) {
        assert_eq!(seen.as_slice(), point);
    }
    assert_eq!(flat.times.len(), 84);
    assert!((flat.times[1] - 0.3).abs() < 1e-12);
    for dimension in [1, 2, 3, 24] {
        let ensemble = ensemble(dimension);
        let film = Film::new(&dynamics, &ensemble).unwrap();
        // At the end of the film a system is where its course would bring it.
        let steps = 3 * (film.times.len() - 1);
        let start = ensemble.start(0).unwrap();
        let end = dynamics.run(start, 0.1, steps, Scheme::Euler).unwrap();
        let clusters = end.components(ensemble.threshold);
        assert_eq!(film.clusters.last().unwrap(), &clusters);
        let mut different = clusters.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), end.clusters(ensemble.threshold));
        // A projection keeps within the disc, and the one cluster of many dimensions is seen whole.
        for [x, y] in film.points.iter().flatten() {
            assert!(x * x + y * y < 1.0 + 1e-12);
        }
        if dimension > 2 {
            let [x, y] = film.points.last().unwrap()[0];
            assert!(x * x + y * y > 0.9, "{dimension}: {x} {y}");
        }
        let svg = film.to_svg();
        assert_eq!(svg.matches("attributeName=\"cx\"").count(), 9);
        assert_eq!(
            svg.matches("<circle").count(),
            svg.matches("</circle>").count() + 1
        );
        let before = film.clusters[0].iter().zip(&clusters);
        let recoloured = before.filter(|(a, b)| a != b).count();
        assert!(svg.matches("attributeName=\"fill\"").count() >= recoloured);
        assert!(!svg.contains("NaN") && !svg.contains("href") && !svg.contains("<script"));
        assert!(svg.len() < 1 << 18);
    }
    let crowd = Ensemble {
        count: 1 << 16,
        time: 0.2,
        ..ensemble(2)
    };
    assert!(Film::new(&dynamics, &Ensemble { step: 0.0, ..crowd }).is_err());
}

#[test]
fn shared_blocks_go_on_to_any_depth() {
    let spec = DECODER.replace("repeat = 2", "repeat = 2\nshared = true");
    let shared = model(&spec, 2);
    let input = tokens(&IDS);
    let hidden = |model: &Model| {
        let output = model.forward(&input, Pass::default()).unwrap();
        output.hidden.into_value()
    };
    let same = deepened(&shared, 2).unwrap();
    assert!(difference(&hidden(&same), &hidden(&shared)).unwrap() == 0.0);
    // Six blocks are three passes through two, and hold no more.
    let six = deepened(&shared, 6).unwrap();
    let passes = iterated(&shared.written_out().unwrap(), 3).unwrap();
    assert!(difference(&hidden(&six), &hidden(&passes)).unwrap() == 0.0);
    assert!(difference(&hidden(&six), &hidden(&shared)).unwrap() > 1e-3);
    assert_eq!(six.parameter_count(), shared.parameter_count());
    assert_eq!(deepened(&shared, 1).unwrap().spec().blocks[0].repeat, 1);
    for (model, depth) in [(&shared, 0), (&model(DECODER, 2), 4), (&shared, 1 << 20)] {
        assert!(deepened(model, depth).is_err(), "{depth}");
    }
}

#[test]
fn an_iterated_model_goes_on_with_the_same_blocks() {
    let model = model(DECODER, 2);
    let input = tokens(&IDS);
    let twice = iterated(&model, 2).unwrap();
    assert_eq!(twice.spec().expanded_blocks().len(), 4);
    let run = |model: &Model, trace: &Trace| {
        let pass = Pass {
            trace: Some(trace),
            ..Pass::default()
        };
        model.forward(&input, pass).unwrap();
    };
    let trace = Trace::new().capture("blocks.*.out").unwrap();
    run(&twice, &trace);
    let middle = trace.signal("blocks.1.out").unwrap();
    let last = trace.signal("blocks.3.out").unwrap();
    let again = Trace::new()
        .replace("blocks.0.in", move |_, _| Ok(middle.clone()))
        .unwrap()
        .capture("blocks.1.out")
        .unwrap();
    run(&model, &again);
    let found = again.signal("blocks.1.out").unwrap();
    assert!(difference(found.value(), last.value()).unwrap() < 1e-12);
    assert!(iterated(&model, 0).is_err());
}
