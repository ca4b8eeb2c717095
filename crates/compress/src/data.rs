//! What a model is calibrated and compared on.

use lapidary_kernels::{Device, Tensor};
use lapidary_model::Input;
use rand::{Rng, RngExt};

use crate::error::engine;
use crate::fingerprint::of_values;
use crate::{Error, Result};
use xxhash_rust::xxh3::Xxh3;

/// What one example shows to the model.
#[derive(Clone, Debug)]
pub enum Content {
    /// Token ids, and their types where the model has types.
    Tokens {
        /// Token ids, at least one.
        ids: Vec<u32>,
        /// As many token types; all 0 when absent.
        types: Option<Vec<u32>>,
    },
    /// An image `[channels, height, width]`.
    Pixels(Tensor),
}

/// What the model should have said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Target {
    /// Nothing that is not in the content: language models predict their own tokens.
    #[default]
    None,
    /// A class.
    Label(u32),
    /// A token id at each position where there is one, as in masked language modelling.
    Tokens(Vec<Option<u32>>),
}

/// One example.
#[derive(Clone, Debug)]
pub struct Example {
    /// What the model sees.
    pub content: Content,
    /// What it should have said.
    pub target: Target,
}

impl Example {
    /// A window of text.
    pub fn window(ids: impl Into<Vec<u32>>) -> Self {
        Self {
            content: Content::Tokens {
                ids: ids.into(),
                types: None,
            },
            target: Target::None,
        }
    }

    /// Text with its class.
    pub fn labelled(ids: impl Into<Vec<u32>>, label: u32) -> Self {
        Self {
            target: Target::Label(label),
            ..Self::window(ids)
        }
    }

    /// Number of tokens; for an image 0, since the model decides how many patches it has.
    pub fn tokens(&self) -> usize {
        match &self.content {
            Content::Tokens { ids, .. } => ids.len(),
            Content::Pixels(_) => 0,
        }
    }
}

/// Examples, all of one kind.
///
/// ```
/// use lapidary_compress::{CalibrationData, Example};
/// let data = CalibrationData::new(vec![
///     Example::labelled([4, 7, 1], 0),
///     Example::labelled([2, 7], 1),
/// ])?;
/// assert_eq!((data.len(), data.tokens()), (2, 5));
/// # Ok::<(), lapidary_compress::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CalibrationData {
    examples: Vec<Example>,
}

impl CalibrationData {
    /// Checks that there are examples, that none is empty, and that all have the same kinds of
    /// content and target.
    pub fn new(examples: Vec<Example>) -> Result<Self> {
        let Some(first) = examples.first() else {
            return Err(Error::invalid("number of examples", 0, "at least 1"));
        };
        for (index, example) in examples.iter().enumerate() {
            check(index, example)?;
            let alike = std::mem::discriminant(&example.content)
                == std::mem::discriminant(&first.content)
                && std::mem::discriminant(&example.target) == std::mem::discriminant(&first.target);
            if !alike {
                return Err(Error::invalid(
                    format!("example {index}"),
                    "of another kind than the first",
                    "of the same content and target",
                ));
            }
        }
        Ok(Self { examples })
    }

    /// Windows of text without labels.
    pub fn windows(windows: impl IntoIterator<Item = Vec<u32>>) -> Result<Self> {
        Self::new(windows.into_iter().map(Example::window).collect())
    }

    /// Windows of text for a language model that sees both sides: each token that `may_hide`
    /// allows is hidden behind the token `mask` with probability `share`, and is then a target
    /// (masked language modelling; Devlin et al., arXiv 1810.04805, with 0.15). A window in which
    /// none was drawn hides one, so that every window has a target.
    ///
    /// # Errors
    /// A share outside 0 to 1, or a window in which nothing may be hidden.
    pub fn masked(
        windows: impl IntoIterator<Item = Vec<u32>>,
        mask: u32,
        share: f64,
        may_hide: impl Fn(u32) -> bool,
        generator: &mut impl Rng,
    ) -> Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::invalid("share of masked tokens", share, "0 to 1"));
        }
        let mut hide = |index: usize, mut ids: Vec<u32>| {
            let candidates: Vec<usize> = (0..ids.len())
                .filter(|at| ids.get(*at).is_some_and(|id| may_hide(*id)))
                .collect();
            if candidates.is_empty() {
                let what = format!("tokens of window {index} that may be masked");
                return Err(Error::invalid(what, 0, "at least 1"));
            }
            let drawn = candidates.iter().copied();
            let mut hidden: Vec<usize> = drawn.filter(|_| generator.random_bool(share)).collect();
            if hidden.is_empty() {
                let one = generator.random_range(0..candidates.len());
                hidden.extend(candidates.get(one));
            }
            let mut targets = vec![None; ids.len()];
            for at in hidden {
                if let (Some(id), Some(target)) = (ids.get_mut(at), targets.get_mut(at)) {
                    *target = Some(std::mem::replace(id, mask));
                }
            }
            Ok(Example {
                target: Target::Tokens(targets),
                ..Example::window(ids)
            })
        };
        let windows = windows.into_iter().enumerate();
        let examples: Result<Vec<_>> = windows.map(|(index, ids)| hide(index, ids)).collect();
        Self::new(examples?)
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Number of examples, at least 1.
    #[allow(
        clippy::len_without_is_empty,
        reason = "there is always an example, so the question does not arise"
    )]
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(Example::tokens).sum()
    }

    /// A hash of everything in it.
    pub(crate) fn hash(&self) -> Result<u128> {
        let mut hash = Xxh3::new();
        for Example { content, target } in &self.examples {
            match content {
                Content::Tokens { ids, types } => {
                    hash.update(format!("{ids:?}{types:?}").as_bytes());
                }
                Content::Pixels(pixels) => {
                    hash.update(format!("{:?}", pixels.dims()).as_bytes());
                    hash.update(&of_values(pixels)?.to_le_bytes());
                }
            }
            hash.update(format!("{target:?}").as_bytes());
        }
        Ok(hash.digest128())
    }

    /// The examples in order, `size` at a time.
    pub(crate) fn batches<'a>(
        &'a self,
        size: usize,
        device: &'a Device,
    ) -> impl Iterator<Item = Result<Batch<'a>>> {
        self.examples
            .chunks(size.max(1))
            .map(|examples| Batch::new(examples, device))
    }
}

fn check(index: usize, example: &Example) -> Result<()> {
    match &example.content {
        Content::Tokens { ids, types } => {
            if ids.is_empty() {
                return Err(Error::invalid(
                    format!("length of example {index}"),
                    0,
                    "at least 1 token",
                ));
            }
            if let Some(types) = types
                && types.len() != ids.len()
            {
                return Err(Error::invalid(
                    format!("number of token types of example {index}"),
                    types.len(),
                    format!("{}, one per token", ids.len()),
                ));
            }
            if let Target::Tokens(targets) = &example.target
                && targets.len() != ids.len()
            {
                return Err(Error::invalid(
                    format!("number of targets of example {index}"),
                    targets.len(),
                    format!("{}, one per token", ids.len()),
                ));
            }
        }
        Content::Pixels(pixels) => {
            engine(pixels.dims3())?;
            if matches!(example.target, Target::Tokens(_)) {
                return Err(Error::invalid(
                    format!("target of image {index}"),
                    "token ids",
                    "a label or none",
                ));
            }
        }
    }
    Ok(())
}

/// A few examples as one input.
pub(crate) struct Batch<'a> {
    pub(crate) examples: &'a [Example],
    pub(crate) input: Input,
    /// `[batch, length]`, 1 = a real token; absent when all are.
    pub(crate) padding: Option<Tensor>,
    /// Rows of `[batch · length]` that are real tokens; absent when all are.
    pub(crate) real: Option<Tensor>,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(examples: &'a [Example], device: &Device) -> Result<Self> {
        let length = examples.iter().map(Example::tokens).max().unwrap_or(0);
        if length == 0 {
            let images: Vec<&Tensor> = examples
                .iter()
                .filter_map(|example| match &example.content {
                    Content::Pixels(pixels) => Some(pixels),
                    Content::Tokens { .. } => None,
                })
                .collect();
            let pixels = engine(engine(Tensor::stack(&images, 0))?.to_device(device))?;
            return Ok(Self {
                examples,
                input: Input::Pixels(pixels),
                padding: None,
                real: None,
            });
        }
        let rows = examples.len();
        let mut ids = Vec::with_capacity(rows * length);
        let mut types = Vec::with_capacity(rows * length);
        let mut keep = Vec::with_capacity(rows * length);
        let mut typed = false;
        for example in examples {
            let Content::Tokens {
                ids: tokens,
                types: kinds,
            } = &example.content
            else {
                continue;
            };
            typed |= kinds.is_some();
            let pads = length - tokens.len();
            ids.extend(tokens);
            match kinds {
                Some(kinds) => types.extend(kinds),
                None => types.extend(std::iter::repeat_n(0u32, tokens.len())),
            }
            keep.extend(std::iter::repeat_n(1u8, tokens.len()));
            ids.extend(std::iter::repeat_n(0u32, pads));
            types.extend(std::iter::repeat_n(0u32, pads));
            keep.extend(std::iter::repeat_n(0u8, pads));
        }
        let padded = keep.contains(&0);
        let real: Vec<u32> = (0u32..)
            .zip(&keep)
            .filter_map(|(row, kept)| (*kept == 1).then_some(row))
            .collect();
        let shape = (rows, length);
        let tensor = |values: Vec<u32>| engine(Tensor::from_vec(values, shape, device));
        Ok(Self {
            examples,
            input: Input::Tokens {
                ids: tensor(ids)?,
                token_types: match typed {
                    true => Some(tensor(types)?),
                    false => None,
                },
            },
            padding: match padded {
                true => Some(engine(Tensor::from_vec(keep, shape, device))?),
                false => None,
            },
            real: match padded {
                true => {
                    let count = real.len();
                    Some(engine(Tensor::from_vec(real, count, device))?)
                }
                false => None,
            },
        })
    }
}

/// The rows `[tokens, width]` of `x` `[batch, length, width]` that are real tokens (all rows of
/// an `x` `[batch, width]`, which has been pooled).
pub(crate) fn real_rows(x: &Tensor, real: Option<&Tensor>) -> lapidary_kernels::Result<Tensor> {
    match *x.dims() {
        [batch, length, width] => {
            let rows = x.contiguous()?.reshape((batch * length, width))?;
            match real {
                Some(real) => Ok(rows.index_select(real, 0)?),
                None => Ok(rows),
            }
        }
        _ => Ok(x.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn masked_windows_hide_what_may_be_hidden_and_remember_it() {
        let windows: Vec<Vec<u32>> = (0..40)
            .map(|seed| {
                std::iter::once(2)
                    .chain((0..30).map(|i| 5 + (i * 7 + seed) % 20))
                    .collect()
            })
            .collect();
        let data = |share| {
            let mut generator = ChaCha8Rng::seed_from_u64(3);
            CalibrationData::masked(windows.clone(), 4, share, |id| id != 2, &mut generator)
        };
        let mut hidden = 0;
        for (example, window) in data(0.15).unwrap().examples().iter().zip(&windows) {
            let (Content::Tokens { ids, .. }, Target::Tokens(targets)) =
                (&example.content, &example.target)
            else {
                panic!("{example:?}");
            };
            assert!(targets.iter().any(Option::is_some));
            assert_eq!((ids[0], targets[0]), (2, None));
            for ((id, target), original) in ids.iter().zip(targets).zip(window) {
                match target {
                    Some(target) => assert_eq!((*id, target), (4, original)),
                    None => assert_eq!(id, original),
                }
                hidden += usize::from(target.is_some());
            }
        }
        // 1200 draws with probability 0.15: 180, give or take 12.
        assert!((120..240).contains(&hidden), "{hidden}");
        let none = data(0.0).unwrap();
        assert!(none.examples().iter().all(|example| match &example.target {
            Target::Tokens(targets) => targets.iter().flatten().count() == 1,
            _ => false,
        }));
        assert!(data(1.5).is_err());
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        assert!(
            CalibrationData::masked([vec![2, 2]], 4, 0.5, |id| id != 2, &mut generator).is_err()
        );
    }
}
