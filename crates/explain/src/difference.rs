//! Where two models differ on one input: a model and what was made of it by compression or
//! further training.

use crate::error::engine;
use crate::explainers::logit_attribution::LOGIT_ATTRIBUTION;
use crate::report::{Report, Table};
use crate::{Error, Explainer, Explanation, Options, Question, Result, Target};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Output;
use lapidary_signal::Trace;
use serde::Serialize;

/// How the scores of two models differ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OutputDifference {
    /// `Σ p log(p / q)`, in nats; `p` are the first model's probabilities.
    pub divergence: f64,
    /// Whether both say the same.
    pub same_answer: bool,
    /// Largest `|difference|` of two scores.
    pub largest: f64,
}

/// How a site's values differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SiteDifference {
    /// The site.
    pub site: String,
    /// `‖a − b‖ / ‖a‖`; absent where the second model's stream has another width.
    pub relative: Option<f64>,
    /// Cosine between the two; absent likewise.
    pub cosine: Option<f64>,
    /// Cosine between the two tables of products of positions, `‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖)` for centred `A`
    /// and `B` `[positions, width]`, which no rotation of either stream changes and no width hinders (linear
    /// CKA: Kornblith et al. 2019, arXiv 1905.00414); absent for a single position.
    pub alignment: Option<f64>,
}

/// What one unit contributes in either model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Moved {
    /// The part of the model or the token.
    pub name: String,
    /// Its score in the first model; absent where the first has no such part.
    pub before: Option<f64>,
    /// Its score in the second model.
    pub after: Option<f64>,
}

impl Moved {
    /// `after − before`, what is absent counting as zero.
    pub fn change(&self) -> f64 {
        self.after.unwrap_or(0.0) - self.before.unwrap_or(0.0)
    }
}

/// How two models differ on one input.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// The explained number in both.
    pub explained: (f64, f64),
    /// The scores; absent for models without any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputDifference>,
    /// What stands in the residual stream, site by site.
    pub sites: Vec<SiteDifference>,
    /// Direct contributions of the models' parts, the most moved first.
    pub components: Vec<Moved>,
    /// Scores of the tokens by the method asked for, the most moved first.
    pub tokens: Vec<Moved>,
}

/// Sites of the residual stream, and others, which are not compared.
const SITES: &str = "{embeddings,blocks.*.out,pooled}";

/// Compares the models of two questions, whose inputs must be alike, for one target. Streams of different
/// widths, as a narrowed model has, are compared by how their positions lie to each other.
///
/// # Errors
/// When the inputs differ in shape, or an explainer is not defined for a model. Sites at which an organisation has other
/// tokens than the other model are left out.
pub fn difference(
    before: &Question<'_>,
    after: &Question<'_>,
    target: Target,
    method: &Explainer,
    names: &[String],
    options: &Options,
) -> Result<Difference> {
    let ((output_a, sites_a), (output_b, sites_b)) = (residual(before)?, residual(after)?);
    let vectors = (target.vector(&output_a)?, target.vector(&output_b)?);
    let (a, b) = (numbers(vectors.0.value())?, numbers(vectors.1.value())?);
    if a.len() != b.len() {
        return Err(Error::invalid(
            "number of scores of the second model",
            b.len(),
            format!("{}, as the first has", a.len()),
        ));
    }
    let parts = |question| LOGIT_ATTRIBUTION.explain(question, target, options);
    let (parts_a, parts_b) = (parts(before)?, parts(after)?);
    let by_token = |question| method.explain(question, target, options);
    // Blocks of an organisation may see other tokens than those of the other model.
    let organised = [before, after].map(|question| question.model.spec().organisation.is_some());
    let beside = |a: &Tensor, b: &Tensor| {
        !organised.contains(&true) || leading(a.dims()) == leading(b.dims())
    };
    Ok(Difference {
        explained: (parts_a.account.explained, parts_b.account.explained),
        output: output_a.logits.as_ref().map(|_| compared(&a, &b)),
        sites: sites_a
            .iter()
            .filter_map(|(site, a)| {
                let (_, b) = sites_b.iter().find(|(other, _)| other == site)?;
                beside(a, b).then(|| site_difference(site, a, b))
            })
            .collect::<Result<_>>()?,
        components: moved(&parts_a, &parts_b, names),
        tokens: moved(&by_token(before)?, &by_token(after)?, names),
    })
}

/// The output, and what stands at each site of the residual stream, in order.
fn residual(question: &Question<'_>) -> Result<(Output, Vec<(String, Tensor)>)> {
    let trace = Trace::new().capture(SITES)?;
    let output = question
        .model
        .forward(question.input, question.pass(&trace))?;
    let mut records = trace.records();
    let blocks = question.model.spec().expanded_blocks().len();
    let sites = std::iter::once("embeddings".to_owned())
        .chain((0..blocks).map(|block| format!("blocks.{block}.out")))
        .chain(["pooled".to_owned()]);
    let value = |site: String| {
        let record = records.remove(&site)?;
        Some((site, record.signal.into_value()))
    };
    Ok((output, sites.filter_map(value).collect()))
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = engine(engine(tensor.flatten_all())?.to_dtype(DType::F64))?;
    engine(flat.to_vec1::<f64>())
}

fn compared(a: &[f64], b: &[f64]) -> OutputDifference {
    let log_probabilities = |scores: &[f64]| -> Vec<f64> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        scores
            .iter()
            .map(|score| score - largest - total.ln())
            .collect()
    };
    let best = |scores: &[f64]| (0..scores.len()).max_by(|i, j| scores[*i].total_cmp(&scores[*j]));
    let (p, q) = (log_probabilities(a), log_probabilities(b));
    OutputDifference {
        divergence: p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum(),
        same_answer: best(a) == best(b),
        largest: a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs())),
    }
}

/// All dimensions but the last, features.
fn leading(dims: &[usize]) -> &[usize] {
    dims.split_last().map_or(dims, |(_, leading)| leading)
}

fn site_difference(site: &str, a: &Tensor, b: &Tensor) -> Result<SiteDifference> {
    let ([leading_a @ .., width_a], [leading_b @ .., width_b]) = (a.dims(), b.dims()) else {
        return Err(Error::invalid(
            format!("shape at {site}"),
            format!("{:?} and {:?}", a.dims(), b.dims()),
            "positions and features",
        ));
    };
    if leading_a != leading_b {
        return Err(Error::invalid(
            format!("shape at {site} of the second model"),
            format!("{:?}", b.dims()),
            format!("{:?} but for the width, as in the first", a.dims()),
        ));
    }
    let (relative, cosine) = match width_a == width_b {
        false => (None, None),
        true => {
            let (a, b) = (numbers(a)?, numbers(b)?);
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
            let squares: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
            let norm = dot(&a, &a).sqrt();
            let cosine = dot(&a, &b) / (norm * dot(&b, &b).sqrt()).max(f64::MIN_POSITIVE);
            (
                Some(squares.sqrt() / norm.max(f64::MIN_POSITIVE)),
                Some(cosine),
            )
        }
    };
    Ok(SiteDifference {
        site: site.to_owned(),
        relative,
        cosine,
        alignment: alignment(a, b)?,
    })
}

/// Linear CKA of `[.., width]` and `[.., other width]`; nothing where all positions are the same.
fn alignment(a: &Tensor, b: &Tensor) -> Result<Option<f64>> {
    let (a, b) = (products(a)?, products(b)?);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let norms = (dot(&a, &a) * dot(&b, &b)).sqrt();
    Ok((norms > 0.0).then(|| dot(&a, &b) / norms))
}

/// `(A − mean)(A − mean)ᵀ` for `A` `[positions, width]`, row by row.
fn products(x: &Tensor) -> Result<Vec<f64>> {
    let width = x.dims().last().copied().unwrap_or(1);
    let rows = engine(engine(x.to_dtype(DType::F64))?.reshape(((), width)))?;
    let centred = engine(rows.broadcast_sub(&engine(rows.mean_keepdim(0))?))?;
    let transposed = engine(engine(centred.t())?.contiguous())?;
    numbers(&engine(centred.matmul(&transposed))?)
}

/// Both explanations unit by unit, by falling `|change|`. Units without labels are named by
/// `names`.
fn moved(before: &Explanation, after: &Explanation, names: &[String]) -> Vec<Moved> {
    let labelled = |explanation: &Explanation| -> Vec<(String, f64)> {
        let label = |index: usize| match explanation.labels.get(index) {
            Some(label) => label.clone(),
            // A token may occur several times.
            None => match names.get(index) {
                Some(name) => format!("{index} {}", name.trim()),
                None => "biases".to_owned(),
            },
        };
        let scores = explanation.scores.iter().enumerate();
        scores
            .map(|(index, score)| (label(index), *score))
            .collect()
    };
    let mut all: Vec<Moved> = Vec::new();
    for (name, score) in labelled(before) {
        all.push(Moved {
            name,
            before: Some(score),
            after: None,
        });
    }
    for (name, score) in labelled(after) {
        match all.iter_mut().find(|moved| moved.name == name) {
            Some(moved) => moved.after = Some(score),
            None => all.push(Moved {
                name,
                before: None,
                after: Some(score),
            }),
        }
    }
    all.sort_by(|a, b| b.change().abs().total_cmp(&a.change().abs()));
    all
}

impl Difference {
    /// As tables.
    pub fn report(&self, title: &str) -> Report {
        let mut notes = vec![format!(
            "explained number {:.4} and {:.4}",
            self.explained.0, self.explained.1
        )];
        if let Some(output) = &self.output {
            notes.push(format!(
                "divergence {:.4} nats, largest difference of a score {:.4}, {}",
                output.divergence,
                output.largest,
                match output.same_answer {
                    true => "the same answer",
                    false => "another answer",
                }
            ));
        }
        let shown = |score: Option<f64>| score.map_or("–".into(), |score| score.into());
        let moved = |title: &str, what: &str, all: &[Moved]| {
            let mut table = Table::new(title, &[what, "first", "second", "change"]);
            for one in all {
                table.push([
                    one.name.as_str().into(),
                    shown(one.before),
                    shown(one.after),
                    one.change().into(),
                ]);
            }
            table
        };
        let mut sites = Table::new(
            "The residual stream",
            &["site", "relative difference", "cosine", "alignment"],
        );
        for site in &self.sites {
            let name = site.site.as_str();
            sites.push([
                name.into(),
                shown(site.relative),
                shown(site.cosine),
                shown(site.alignment),
            ]);
        }
        Report {
            title: title.to_owned(),
            notes,
            tables: vec![
                moved("Parts whose contribution moved", "part", &self.components),
                moved("Tokens whose contribution moved", "token", &self.tokens),
                sites,
            ],
            ..Report::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    fn table(rows: usize, width: usize) -> Tensor {
        let value = |i: usize| ((i * i * 7 + 3 * i) % 23) as f64 / 11.0 - 1.0;
        let values: Vec<f64> = (0..rows * width).map(value).collect();
        Tensor::from_vec(values, (1, rows, width), &Device::Cpu).unwrap()
    }

    /// A stream that is turned into a wider one, scaled and moved is aligned with itself; another is not.
    #[test]
    fn alignment_minds_neither_width_nor_basis() {
        let a = table(5, 3);
        // Rows that are orthogonal and of the same length, 3.
        let turn = [
            [1.0, 2.0, 2.0, 0.0],
            [2.0, 1.0, -2.0, 0.0],
            [2.0, -2.0, 1.0, 0.0],
        ];
        let turn = Tensor::new(&turn, &Device::Cpu).unwrap();
        let turned = a.squeeze(0).unwrap().matmul(&turn).unwrap();
        let moved = (turned.unsqueeze(0).unwrap() + 0.7).unwrap();
        let found = site_difference("embeddings", &a, &moved).unwrap();
        assert_eq!((found.relative, found.cosine), (None, None));
        assert!((found.alignment.unwrap() - 1.0).abs() < 1e-12, "{found:?}");
        let other = site_difference("embeddings", &a, &table(5, 4)).unwrap();
        let other = other.alignment.unwrap();
        assert!((0.0..0.999).contains(&other), "{other}");
        // One position lies nowhere to others.
        let single = site_difference("pooled", &table(1, 3), &table(1, 3)).unwrap();
        assert_eq!((single.relative, single.alignment), (Some(0.0), None));
        assert!(site_difference("embeddings", &a, &table(4, 3)).is_err());
    }
}
