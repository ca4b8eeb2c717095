//! Ranks of a decoder's matrices, block by block and group by group.

use lapidary_compress::CalibrationData;
use lapidary_compress::automatic::{Automatic, AutomaticSettings};
use lapidary_compress::quality::{Window, perplexity};

use crate::experiments::depth::{self, BATCH, Subject};
use crate::experiments::texts::Sides;
use crate::{Error, Plot, Result, Scale, Series};

/// Share of the weights of matrices in blocks that may be left: tables of embeddings stay.
const KEPT: f64 = 0.4;

/// Loss of a mix, in nats per token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss {
    /// On the windows that mixes were compared on.
    pub(super) compared: f64,
    /// On windows that the search did not see.
    pub(super) tests: f64,
}

/// What a search made of one method's ranks.
pub(super) struct Allocation {
    pub(super) method: &'static str,
    variables: usize,
    whole: Loss,
    pub(super) uniform: Loss,
    pub(super) found: Loss,
    /// The loss of each mix, in order.
    trace: Vec<f64>,
}

impl Allocation {
    pub(super) fn listed(&self) -> String {
        format!(
            "{} variables, {} evaluations: {:.4} against {:.4} nats on unseen windows, {:.4} against \
             {:.4} on those compared on; whole {:.4}",
            self.variables,
            self.trace.len(),
            self.found.tests,
            self.uniform.tests,
            self.found.compared,
            self.uniform.compared,
            self.whole.tests
        )
    }
}

fn size(scale: Scale) -> depth::Size {
    match scale {
        Scale::Smoke => depth::Size {
            blocks: 2,
            ..depth::Size::of(scale)
        },
        Scale::Small | Scale::Full => depth::Size {
            blocks: 12,
            ..depth::Size::of(scale)
        },
    }
}

fn evaluations(scale: Scale) -> usize {
    match scale {
        Scale::Smoke => 4,
        Scale::Small | Scale::Full => 60,
    }
}

pub(super) fn describe(scale: Scale, text: &str) -> String {
    format!(
        "{}; ranks at {KEPT} of the weights in blocks, compared on half of the held-out windows and \
         measured on the others",
        size(scale).describe_on(text)
    )
}

pub(super) fn run(text: Sides, scale: Scale, seed: u64) -> Result<Vec<Allocation>> {
    let subject = Subject::trained(text, size(scale), seed)?;
    let (compared, tests) = subject.tests.split_at(subject.tests.len() / 2);
    ["whitened", "fwsvd"]
        .into_iter()
        .map(|method| allocation(&subject, compared, tests, method, evaluations(scale), seed))
        .collect()
}

fn allocation(
    subject: &Subject,
    compared: &[Window],
    tests: &[Window],
    method: &'static str,
    evaluations: usize,
    seed: u64,
) -> Result<Allocation> {
    let held_out = CalibrationData::windows(compared.iter().map(|window| window.tokens.clone()))?;
    let matrices: usize = subject
        .model
        .linears()
        .iter()
        .filter(|linear| linear.path.starts_with("blocks."))
        .map(|linear| linear.input * linear.output)
        .sum();
    let taken = ((1.0 - KEPT) * matrices as f64) as usize;
    let settings = AutomaticSettings {
        methods: vec![method.to_owned()],
        evaluations,
        batch: BATCH,
        seed,
        ..AutomaticSettings::new(subject.model.parameter_count() - taken)
    };
    let mut search = Automatic::new(&subject.model, &subject.data, &held_out, settings)?;
    let loss = |model: &lapidary_model::Model| -> Result<Loss> {
        Ok(Loss {
            compared: perplexity(model, compared, BATCH)?.value.ln(),
            tests: perplexity(model, tests, BATCH)?.value.ln(),
        })
    };
    search.step()?;
    // The first mix is the uniform one.
    let uniform = loss(&search.best_model()?.model)?;
    while !search.is_finished() {
        search.step()?;
    }
    let found = search.best_model()?.model;
    if found.parameter_count() > search.state().settings.parameters {
        let count = found.parameter_count();
        return Err(Error::Experiment(format!(
            "{count} parameters are too many"
        )));
    }
    Ok(Allocation {
        method,
        variables: search.variables(),
        whole: loss(&subject.model)?,
        uniform,
        found: loss(&found)?,
        trace: search
            .state()
            .evaluations
            .iter()
            .map(|one| one.loss)
            .collect(),
    })
}

pub(super) fn plot(allocations: &[Allocation]) -> Plot {
    let series = allocations.iter().flat_map(|allocation| {
        let losses = || (1..).map(f64::from).zip(allocation.trace.iter().copied());
        let least = losses().scan(f64::INFINITY, |least, (number, loss)| {
            *least = least.min(loss);
            Some((number, *least))
        });
        let best = Series {
            name: format!("{}, best so far", allocation.method),
            points: least.collect(),
        };
        let tried = Series {
            name: format!("{}, tried", allocation.method),
            points: losses().collect(),
        };
        [best, tried]
    });
    Plot {
        title: "Searched ranks".to_owned(),
        x: "mix, the first of them uniform".to_owned(),
        y: "loss in nats".to_owned(),
        series: series.collect(),
    }
}
