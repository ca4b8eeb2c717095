//! Principal components of what tokens are at one site: of an image's patches as pictures, in which parts of things stand
//! out (of keys in the last block: Amir et al., Deep ViT Features as Dense Visual Descriptors, 2021, arXiv 2112.05814;
//! Yu et al., White-Box Transformers via Sparse Rate Reduction, 2023, arXiv 2311.13110).
//!
//! All sequences are fitted together, `C = Σ (x − μ)(x − μ)ᵀ / N = V diag(λ) Vᵀ`, and a token is shown by
//! `v_kᵀ (x − μ)`. A direction has no sign of its own: its entry of the largest size is positive here.

use crate::error::{engine, require_whole_sequences};
use crate::report::{Map, Report, Table};
use crate::{Error, Question, Result};
use lapidary_factor::{Matrix, matrix_from_tensor, symmetric_eigen};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::InputSpec;
use lapidary_signal::Trace;

/// Principal components of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Components {
    /// Share of all variance that lies along each, the largest first.
    pub shares: Vec<f64>,
    /// How far each token lies along each, `[component][token]`.
    pub scores: Vec<Vec<f64>>,
}

/// The first components of `tokens` `[tokens, width]`: as many as asked for, or as there are features.
///
/// # Errors
/// For a tensor of another rank or without entries, and numbers that are not finite.
pub fn components(tokens: &Tensor, count: usize) -> Result<Components> {
    let x = matrix_from_tensor("tokens", tokens)?;
    let (rows, width) = (x.nrows(), x.ncols());
    let means: Vec<f64> = (0..width)
        .map(|j| (0..rows).map(|i| x[(i, j)]).sum::<f64>() / rows as f64)
        .collect();
    let centred = Matrix::from_fn(rows, width, |i, j| x[(i, j)] - means[j]);
    let products = centred.transpose() * &centred;
    let covariance = Matrix::from_fn(width, width, |i, j| products[(i, j)] / rows as f64);
    let eigen = symmetric_eigen("covariance of tokens", covariance.as_ref())?;
    // Rounding leaves small negative numbers where there is no variance.
    let variances = || eigen.values.iter().rev().map(|value| value.max(0.0));
    let total: f64 = variances().sum();
    let share = |variance: f64| match total > 0.0 {
        true => variance / total,
        false => 0.0,
    };
    let scores = (0..width).rev().take(count).map(|k| {
        let direction = |j: usize| eigen.vectors[(j, k)];
        let largest = (0..width).map(direction).fold(0.0, |largest: f64, entry| {
            if entry.abs() > largest.abs() {
                entry
            } else {
                largest
            }
        });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        let along = |i: usize| {
            (0..width)
                .map(|j| centred[(i, j)] * direction(j))
                .sum::<f64>()
        };
        (0..rows).map(|i| sign * along(i)).collect()
    });
    Ok(Components {
        scores: scores.collect(),
        shares: variances().take(count).map(share).collect(),
    })
}

/// The first components of the tokens of all sequences at `site`, as a table and maps: of patches one for each sequence
/// and component, of other tokens, whose `names` are given, one for each sequence. Tokens before the patches are left out,
/// and so are pads. Without a site it is the keys of the last block; queries, where they are keys.
///
/// # Errors
/// When the model fails, writes nothing of one vector for each token at the site, or an organisation lets the block that
/// the site is in see something else than the sequence.
pub fn report(
    question: &Question<'_>,
    site: Option<&str>,
    count: usize,
    names: &[String],
) -> Result<Report> {
    let (site, states) = states(question, site)?;
    let (before, grid) = match &question.model.spec().input {
        InputSpec::Tokens(_) => (0, None),
        InputSpec::Patches(patches) => {
            let [rows, columns] = patches.image.map(|side| side / patches.patch.max(1));
            (patches.class_tokens, Some([rows, columns]))
        }
    };
    let (sequences, length, _) = engine(states.dims3())?;
    let kept = kept(question, before, [sequences, length])?;
    let mut rows = Vec::new();
    for (sequence, kept) in kept.iter().enumerate() {
        if kept.is_empty() {
            continue;
        }
        let index = engine(Tensor::new(kept.as_slice(), states.device()))?;
        rows.push(engine(
            engine(states.get(sequence))?.index_select(&index, 0),
        )?);
    }
    let found = components(&engine(Tensor::cat(&rows, 0))?, count)?;
    let mut table = Table::new("Variance of tokens", &["component", "share"]);
    for (component, share) in (1usize..).zip(&found.shares) {
        table.push([component.into(), (*share).into()]);
    }
    let mut maps = Vec::new();
    let mut first = 0;
    for (sequence, kept) in kept.iter().enumerate() {
        let along: Vec<Vec<f64>> = found
            .scores
            .iter()
            .map(|scores| {
                scores
                    .iter()
                    .skip(first)
                    .take(kept.len())
                    .copied()
                    .collect()
            })
            .collect();
        first += kept.len();
        let of = match sequences {
            1 => String::new(),
            _ => format!(" of sequence {}", sequence + 1),
        };
        match grid {
            Some([height, width]) if height * width == kept.len() => {
                maps.extend(as_pictures(along, &of, [height, width]));
            }
            _ => maps.push(Map {
                title: format!("tokens{of} along each component"),
                rows: (1..=along.len()).map(|k| k.to_string()).collect(),
                columns: kept
                    .iter()
                    .map(|place| named(names, *place as usize))
                    .collect(),
                values: along,
            }),
        }
    }
    Ok(Report {
        title: "Principal components of tokens".to_owned(),
        notes: vec![format!(
            "{} tokens of {sequences} sequence(s) at {site}",
            kept.iter().map(Vec::len).sum::<usize>()
        )],
        tables: vec![table],
        maps,
        ..Report::default()
    })
}

fn named(names: &[String], place: usize) -> String {
    names
        .get(place)
        .cloned()
        .unwrap_or_else(|| place.to_string())
}

/// Each component of an image's patches as a picture of `[rows, columns]`.
fn as_pictures(along: Vec<Vec<f64>>, of: &str, [height, width]: [usize; 2]) -> Vec<Map> {
    let numbered = |count: usize| {
        (0..count)
            .map(|place| place.to_string())
            .collect::<Vec<_>>()
    };
    let each = (1..).zip(along).map(|(component, scores)| Map {
        title: format!("component {component}{of}: patches where they are in the image"),
        rows: numbered(height),
        columns: numbered(width),
        values: scores.chunks(width.max(1)).map(<[f64]>::to_vec).collect(),
    });
    each.collect()
}

/// The site that is looked at and what is written there, `[batch, tokens, width]`.
fn states(question: &Question<'_>, site: Option<&str>) -> Result<(String, Tensor)> {
    let last = question
        .model
        .spec()
        .expanded_blocks()
        .len()
        .saturating_sub(1);
    let sites = match site {
        Some(site) => vec![site.to_owned()],
        None => ["key", "query"]
            .map(|name| format!("blocks.{last}.attention.{name}"))
            .to_vec(),
    };
    let mut trace = Trace::new();
    for site in &sites {
        trace = trace.capture(site)?;
    }
    question
        .model
        .forward(question.input, question.pass(&trace))?;
    let records = trace.records();
    let found = sites.iter().find_map(|site| {
        let state = records.get(site)?.signal.value().clone();
        (state.dims().len() == 3).then(|| (site.clone(), state))
    });
    let (site, states) = found.ok_or_else(|| {
        let mut expected = "one that is written, with a vector for each token".to_owned();
        if site.is_none() {
            expected += &format!("; another can be named (--site), such as blocks.{last}.out");
        }
        Error::invalid("site", sites.join(" or "), expected)
    })?;
    if site.starts_with("blocks.") {
        require_whole_sequences(question.model, &format!("components at {site}"))?;
    }
    Ok((site, engine(states.to_dtype(DType::F64))?))
}

/// The places of each sequence that are looked at.
fn kept(
    question: &Question<'_>,
    before: usize,
    [sequences, length]: [usize; 2],
) -> Result<Vec<Vec<u32>>> {
    let padding = match question.padding {
        None => vec![vec![1; length]; sequences],
        Some(padding) => {
            let padding = engine(padding.to_dtype(DType::U8))?;
            engine(padding.to_vec2::<u8>())?
        }
    };
    let places = |row: &Vec<u8>| -> Vec<u32> {
        let each = (0u32..)
            .zip(row)
            .skip(before)
            .take(length.saturating_sub(before));
        each.filter(|(_, kept)| **kept != 0)
            .map(|(place, _)| place)
            .collect()
    };
    let all: Vec<Vec<u32>> = padding.iter().map(places).collect();
    match all.iter().any(|places| !places.is_empty()) {
        true => Ok(all),
        false => Err(Error::invalid("tokens at the site", 0, "at least 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;
    use lapidary_model::{Input, Model, ModelSpec};

    /// Tokens on an ellipse in the plane of two directions, around a middle.
    fn ellipse() -> Tensor {
        let (long, short) = ([0.6, 0.0, -0.8], [0.0, 1.0, 0.0]);
        let points = (0..40).flat_map(|at| {
            let angle = f64::from(at) * std::f64::consts::TAU / 40.0;
            let (sin, cos) = angle.sin_cos();
            (0..3).map(move |j| 5.0 + 3.0 * cos * long[j] + sin * short[j])
        });
        Tensor::from_vec(points.collect::<Vec<f64>>(), (40, 3), &Device::Cpu).unwrap()
    }

    #[test]
    fn an_ellipse_has_its_axes() {
        let found = components(&ellipse(), 5).unwrap();
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        // Half of the squares of 3 and of 1.
        let shares = [0.9, 0.1, 0.0];
        assert_eq!(found.shares.len(), 3);
        assert!(found.shares.iter().zip(shares).all(|(a, b)| near(*a, b)));
        for (at, numbered) in (0..40u32).enumerate() {
            let (sin, cos) = (f64::from(numbered) * std::f64::consts::TAU / 40.0).sin_cos();
            // The entry of the largest size, −0.8, is positive.
            assert!(near(found.scores[0][at], -3.0 * cos));
            assert!(near(found.scores[1][at], sin));
            assert!(near(found.scores[2][at], 0.0));
        }
        assert_eq!(components(&ellipse(), 1).unwrap().scores.len(), 1);
        // Where all are alike there is no variance to share.
        let alike = Tensor::ones((4, 2), DType::F64, &Device::Cpu).unwrap();
        assert_eq!(components(&alike, 2).unwrap().shares, [0.0, 0.0]);
    }

    fn model(sharing: &str) -> Model {
        let spec: ModelSpec = serde_json::from_str(&format!(
            r#"{{
                "width": 8,
                "input": {{ "kind": "patches", "image": [4, 6], "patch": 2, "channels": 1 }},
                "blocks": [{{
                    "repeat": 2,
                    "attention": {{ "kind": "multi-head", "heads": 2, "sharing": "{sharing}" }}
                }}],
                "head": {{ "kind": "pooled" }}
            }}"#
        ))
        .unwrap();
        Model::initialised(spec, 1, DType::F32, &Device::Cpu).unwrap()
    }

    /// Two images: patches alone, those of each where they are, fitted together.
    #[test]
    fn patches_are_pictures() {
        let pixels = (0..48).map(|at| (at as f32 * 0.7).sin()).collect();
        let pixels = Tensor::from_vec::<_, f32>(pixels, (2, 1, 4, 6), &Device::Cpu).unwrap();
        let input = Input::Pixels(pixels);
        for (sharing, site) in [("none", "key"), ("all", "query")] {
            let model = model(sharing);
            let question = Question::new(&model, &input);
            let found = report(&question, None, 2, &[]).unwrap();
            let at = format!("12 tokens of 2 sequence(s) at blocks.1.attention.{site}");
            assert_eq!(found.notes, [at]);
            assert_eq!((found.tables[0].rows.len(), found.maps.len()), (2, 4));
            for map in &found.maps {
                assert_eq!((map.rows.len(), map.columns.len()), (2, 3));
                assert!(map.values.len() == 2 && map.values.iter().all(|row| row.len() == 3));
            }
            assert!(found.maps[2].title.starts_with("component 1 of sequence 2"));
            // Scores of all tokens of a component have the mean nought.
            let first = [&found.maps[0], &found.maps[2]];
            let sum: f64 = first
                .iter()
                .flat_map(|map| map.values.iter().flatten())
                .sum();
            assert!(sum.abs() < 1e-9, "{sum}");
        }
        let model = model("none");
        let question = Question::new(&model, &input);
        let said = report(&question, Some("nowhere"), 2, &[]).unwrap_err();
        assert!(said.to_string().starts_with("site is nowhere"), "{said}");
    }
}
