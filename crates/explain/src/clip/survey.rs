//! A data set seen through the decomposition: how much each part writes, and what its heads say.

use super::ablation::StreamingMean;
use super::decomposition::Decomposition;
use super::image_tower::{Component, ImageTower};
use super::outputs::HeadOutputs;
use super::text_span::{TextSpan, text_span};
use crate::error::engine;
use crate::report::{Map, Report, Table};
use crate::{Error, Result};
use lapidary_factor::matrix_from_tensor;
use lapidary_kernels::{DType, Tensor};

/// Means over a data set, and what chosen heads said of each image.
#[derive(Debug)]
pub struct Survey<'t, 'm> {
    tower: &'t ImageTower<'m>,
    outputs: HeadOutputs,
    /// Of the components, `[components, features]`.
    means: StreamingMean,
    /// Of their products with the embedding, `[components]`.
    along: StreamingMean,
}

/// What one part writes directly to the embeddings of a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerEffect {
    /// `embeddings`, `attention 3`, `feedforward 3`.
    pub part: String,
    /// Mean of its product with the embedding of length one: the shares of all parts sum to one.
    pub share: f64,
    /// Its part in what differs between images, `E[e·y] − E[e]·E[y]`, over that of all.
    pub variance: f64,
}

/// A head and the texts that span its outputs.
#[derive(Clone, Debug)]
pub struct HeadName {
    /// The head.
    pub component: Component,
    /// The texts, by row of those that were given.
    pub span: TextSpan,
}

impl<'t, 'm> Survey<'t, 'm> {
    /// A survey that keeps `outputs`.
    pub fn new(tower: &'t ImageTower<'m>, outputs: HeadOutputs) -> Self {
        Self {
            tower,
            outputs,
            means: StreamingMean::default(),
            along: StreamingMean::default(),
        }
    }

    /// Adds images `[images, channels, height, width]`, and gives their decomposition.
    pub fn add(&mut self, pixels: &Tensor) -> Result<Decomposition<'t, 'm>> {
        let decomposition = self.tower.decompose(pixels)?;
        let components = decomposition.components()?;
        let embeddings = engine(decomposition.embeddings().unsqueeze(2))?;
        self.along
            .add(&engine(engine(components.matmul(&embeddings))?.squeeze(2))?)?;
        self.means.add(&components)?;
        self.outputs.add(&components)?;
        Ok(decomposition)
    }

    /// Images so far.
    pub fn images(&self) -> usize {
        self.means.count()
    }

    /// Mean of each component, `[components, features]` in `f64`.
    pub fn means(&self) -> Result<Tensor> {
        self.means.mean()
    }

    /// What chosen heads said of each image.
    pub fn outputs(&mut self) -> &mut HeadOutputs {
        &mut self.outputs
    }

    /// Each component's share of the embedding and of its variance.
    pub fn component_effects(&self) -> Result<Vec<(Component, f64, f64)>> {
        let means = self.means.mean()?;
        let along = engine(self.along.mean()?.to_vec1::<f64>())?;
        // Mean of the embedding, `[features, 1]`.
        let mean = engine(engine(means.sum(0))?.unsqueeze(1))?;
        let expected = engine(engine(means.matmul(&mean))?.squeeze(1))?;
        let expected = engine(expected.to_vec1::<f64>())?;
        let covariance: Vec<f64> = along.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let total: f64 = covariance.iter().sum();
        let share = |covariance: f64| match total > 0.0 {
            true => covariance / total,
            false => 0.0,
        };
        let all = self.tower.components().iter().zip(&along).zip(&covariance);
        Ok(all
            .map(|((component, along), covariance)| (*component, *along, share(*covariance)))
            .collect())
    }

    /// The direct effect of each part, heads of a layer together, in the order of the model.
    pub fn layer_effects(&self) -> Result<Vec<LayerEffect>> {
        let mut effects: Vec<LayerEffect> = Vec::new();
        for (component, share, variance) in self.component_effects()? {
            let part = match component {
                Component::Head { layer, .. } => format!("attention {layer}"),
                other => other.to_string(),
            };
            match effects.last_mut().filter(|effect| effect.part == part) {
                Some(effect) => {
                    effect.share += share;
                    effect.variance += variance;
                }
                None => effects.push(LayerEffect {
                    part,
                    share,
                    variance,
                }),
            }
        }
        Ok(effects)
    }

    /// The `count` texts, of `texts` `[texts, features]`, that span what each kept head says.
    pub fn name_heads(&mut self, texts: &Tensor, count: usize) -> Result<Vec<HeadName>> {
        let texts = matrix_from_tensor("texts", texts)?;
        let mut names = Vec::new();
        for component in self.outputs.components().to_vec() {
            let rank = match component {
                Component::Head { layer, .. } => self.tower.head_width(layer),
                _ => texts.ncols(),
            };
            let outputs = self.outputs.of(component)?;
            let span = text_span(outputs.as_ref(), texts.as_ref(), rank, count)?;
            names.push(HeadName { component, span });
        }
        Ok(names)
    }

    /// Effects and names as tables and maps. `names` are those of the rows of `texts`.
    pub fn report(&mut self, names: &[String], texts: &Tensor, count: usize) -> Result<Report> {
        if engine(texts.dim(0))? != names.len() {
            let expected = format!("{}, one for each text", names.len());
            let found = format!("{:?}", texts.dims());
            return Err(Error::invalid("shape of the texts", found, expected));
        }
        let texts = engine(texts.to_dtype(DType::F64))?;
        let mut effects = Table::new(
            "Direct effects",
            &["part", "share of the embedding", "share of what differs"],
        );
        for effect in self.layer_effects()? {
            effects.push([
                effect.part.into(),
                effect.share.into(),
                effect.variance.into(),
            ]);
        }
        let mut heads = Table::new(
            "Heads by the texts that span them",
            &["head", "variance in these texts", "texts, with their share"],
        );
        let name = |text: usize| names.get(text).map_or("", String::as_str);
        for head in self.name_heads(&texts, count)? {
            let each = head.span.texts.iter().zip(&head.span.shares);
            let each: Vec<String> = each
                .map(|(text, share)| format!("{} ({:.1} %)", name(*text), 100.0 * share))
                .collect();
            heads.push([
                head.component.to_string().into(),
                head.span.explained().into(),
                each.join("; ").into(),
            ]);
        }
        Ok(Report {
            title: "What the image embedding is made of".to_owned(),
            notes: vec![
                format!("{} images, {} texts", self.images(), names.len()),
                "a share of the embedding is the mean product with the embedding of length one; \
                 what differs is its variance over images"
                    .to_owned(),
            ],
            tables: vec![effects, heads],
            maps: vec![self.map()?],
            plots: Vec::new(),
            ..Report::default()
        })
    }

    /// Share of what differs, by layer and head.
    fn map(&self) -> Result<Map> {
        let mut values: Vec<Vec<f64>> = vec![Vec::new(); self.tower.depth()];
        for (component, _, variance) in self.component_effects()? {
            if let Component::Head { layer, .. } = component
                && let Some(row) = values.get_mut(layer)
            {
                row.push(variance);
            }
        }
        let widest = values.iter().map(Vec::len).max().unwrap_or(0);
        Ok(Map {
            title: "Share of what differs between images, by layer and head".to_owned(),
            rows: (0..values.len()).map(|l| format!("layer {l}")).collect(),
            columns: (0..widest).map(|h| h.to_string()).collect(),
            values,
        })
    }
}
