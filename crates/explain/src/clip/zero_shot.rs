//! Texts as vectors, and classes as means of texts (Radford et al., Learning Transferable Visual
//! Models From Natural Language Supervision, 2021, arXiv 2103.00020, section 3.1.4).

use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{D, DType, Tensor};
use lapidary_model::{HeadSpec, Input, Model, Pass, Tokenizer};

/// Texts that run at one time.
const AT_ONCE: usize = 64;

/// The vectors of token sequences, each of length one: `[texts, features]`.
///
/// # Errors
/// When there are none, one is empty or longer than the model, or the model gives no vector.
pub fn embed_texts<T: AsRef<[u32]>>(model: &Model, texts: &[T]) -> Result<Tensor> {
    let mut all = Vec::new();
    for chunk in texts.chunks(AT_ONCE) {
        let length = chunk.iter().map(|ids| ids.as_ref().len()).max();
        let length = length.unwrap_or(0);
        let (mut ids, mut keep) = (Vec::new(), Vec::new());
        for text in chunk {
            let text = text.as_ref();
            if text.is_empty() {
                return Err(Error::invalid("a text", "empty", "at least one token"));
            }
            let pads = length - text.len();
            ids.extend_from_slice(text);
            ids.extend(std::iter::repeat_n(0u32, pads));
            keep.extend(std::iter::repeat_n(1u8, text.len()));
            keep.extend(std::iter::repeat_n(0u8, pads));
        }
        let shape = (chunk.len(), length);
        let device = model.device();
        let input = Input::tokens(engine(Tensor::from_vec(ids, shape, &device))?);
        let padding = engine(Tensor::from_vec(keep, shape, &device))?;
        let pass = Pass {
            padding: Some(&padding),
            ..Pass::default()
        };
        let output = model.forward(&input, pass)?;
        let vectors = output.logits.or(output.pooled).ok_or_else(|| {
            Error::invalid(
                "head of the text model",
                "none",
                "one that pools its tokens",
            )
        })?;
        all.push(unit_rows(&vectors.into_value().detach())?);
    }
    if all.is_empty() {
        return Err(Error::invalid("texts", "none", "at least one"));
    }
    engine(Tensor::cat(&all, 0))
}

/// The rows of `[rows, features]`, each divided by its length.
///
/// # Errors
/// When a row is zero or not finite.
pub fn unit_rows(rows: &Tensor) -> Result<Tensor> {
    let lengths = engine(engine(engine(rows.sqr())?.sum_keepdim(D::Minus1))?.sqrt())?;
    let all = engine(engine(lengths.flatten_all())?.to_dtype(DType::F64))?;
    for length in engine(all.to_vec1::<f64>())? {
        if !(length.is_finite() && length > 0.0) {
            let expected = "finite and above 0";
            return Err(Error::invalid("length of a vector", length, expected));
        }
    }
    engine(rows.broadcast_div(&lengths))
}

/// Classes by the directions of texts.
#[derive(Clone, Debug)]
pub struct ZeroShot {
    vectors: Tensor,
}

impl ZeroShot {
    /// A class for each group of texts: the mean of the texts' vectors, made one long. Each group
    /// is `[texts, features]`, of vectors of length one.
    pub fn from_groups(groups: &[Tensor]) -> Result<Self> {
        let means = groups
            .iter()
            .map(|group| engine(group.mean_keepdim(0)))
            .collect::<Result<Vec<_>>>()?;
        if means.is_empty() {
            return Err(Error::invalid("classes", "none", "at least one"));
        }
        Ok(Self {
            vectors: unit_rows(&engine(Tensor::cat(&means, 0))?)?,
        })
    }

    /// A class for each name: the ensemble of `templates`, in which `{}` stands for the name.
    ///
    /// # Errors
    /// When there are no names or templates, a template has no `{}`, or a text has no tokens or
    /// is longer than the model.
    pub fn from_templates(
        model: &Model,
        tokenizer: &Tokenizer,
        names: &[String],
        templates: &[String],
    ) -> Result<Self> {
        if let Some(without) = templates.iter().find(|text| !text.contains("{}")) {
            return Err(Error::invalid("template", without, "a text with {} in it"));
        }
        if templates.is_empty() {
            return Err(Error::invalid("templates", "none", "at least one"));
        }
        let groups = names
            .iter()
            .map(|name| {
                let texts: Vec<_> = templates.iter().map(|t| t.replace("{}", name)).collect();
                embed_texts(model, &tokens(tokenizer, &texts)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Self::from_groups(&groups)
    }

    /// The image model with these classes as its scores, `t_c · (P x + b)`: a classifier that every
    /// method explains. The embedding is not divided by its length, which is the same for all
    /// classes: the highest score is that of the class that [`ZeroShot::classify`] gives.
    ///
    /// # Errors
    /// When the model has no dense projection to the classes' features.
    pub fn classifier(&self, image: &Model) -> Result<Model> {
        let (classes, features) = engine(self.vectors.dims2())?;
        let mut spec = image.spec().clone();
        let mut parameters = image.parameters().clone();
        let projected = match &mut spec.head {
            HeadSpec::Pooled { labels, .. } => labels.replace(classes),
            _ => None,
        };
        let weight = parameters.get("head.output.weight");
        let (Some(weight), true) = (weight, projected == Some(features)) else {
            return Err(Error::invalid(
                "head of the image model",
                format!("one of {projected:?} features"),
                format!("a dense projection to {features} features, as the classes have"),
            ));
        };
        let vectors = engine(self.vectors.to_dtype(weight.dtype()))?;
        let weight = engine(vectors.matmul(weight))?;
        if let Some(bias) = parameters.get("head.output.bias") {
            let bias = engine(vectors.matmul(&engine(bias.unsqueeze(1))?))?;
            let bias = engine(bias.squeeze(1))?;
            parameters.insert("head.output.bias".to_owned(), bias);
        }
        parameters.insert("head.output.weight".to_owned(), weight);
        Ok(Model::new(spec, &mut parameters)?)
    }

    /// One direction for each class, `[classes, features]`.
    pub fn vectors(&self) -> &Tensor {
        &self.vectors
    }

    /// The products of `embeddings` `[images, features]` with the classes: `[images, classes]`.
    pub fn scores(&self, embeddings: &Tensor) -> Result<Tensor> {
        let vectors = engine(self.vectors.to_dtype(embeddings.dtype()))?;
        engine(embeddings.matmul(&engine(vectors.t())?))
    }

    /// The class of each image.
    pub fn classify(&self, embeddings: &Tensor) -> Result<Vec<usize>> {
        let best = engine(self.scores(embeddings)?.argmax(1))?;
        let best = engine(best.to_vec1::<u32>())?;
        Ok(best.into_iter().map(|class| class as usize).collect())
    }

    /// Share of the images that are of the class that they are said to be.
    pub fn accuracy(&self, embeddings: &Tensor, classes: &[usize]) -> Result<f64> {
        let said = self.classify(embeddings)?;
        if said.len() != classes.len() {
            let expected = format!("{}, one for each image", said.len());
            return Err(Error::invalid("classes", classes.len(), expected));
        }
        let right = said.iter().zip(classes).filter(|(a, b)| a == b).count();
        Ok(right as f64 / classes.len().max(1) as f64)
    }
}

/// Token ids of each text.
pub(super) fn tokens(tokenizer: &Tokenizer, texts: &[String]) -> Result<Vec<Vec<u32>>> {
    let encode = |text: &String| {
        let encoding = tokenizer.encode(text, &Default::default());
        let encoding = encoding.map_err(|error| {
            let expected = format!("one that the tokenizer reads ({error})");
            Error::invalid("text", format!("{text:?}"), expected)
        })?;
        Ok(encoding.ids)
    };
    texts.iter().map(encode).collect()
}
