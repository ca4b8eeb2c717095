//! Data sets that explanations are evaluated on: CSV files, and generated ones by name.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use lapidary_explain::evaluation::{
    Dataset, Example, ImageExample, induction, read_rows, tokenised,
};
use lapidary_explain::tasks::{Prompt, Task};
use lapidary_lab::experiments::glyphs::{Alphabet, scene};
use lapidary_lab::experiments::{attributes, polarity};
use lapidary_model::{HeadSpec, Model, Package};
use lapidary_parts::attention::MixerSpec;
use lapidary_train::generator;
use lapidary_train::language::{Kind, Language, Split};

use crate::loading::LANGUAGE_SEED;

/// What stands before the name of a generated data set.
const GENERATED: &str = "generated:";

/// The generated data sets: six kinds of sentence of the embedded model's language, repeated
/// random tokens for any language model, and sentences of signed words for a classifier of them.
const NAMES: [&str; 8] = [
    "number-agreement",
    "reflexive-agreement",
    "learned-fact",
    "context-fact",
    "name-copy",
    "brackets",
    "induction",
    "polarity",
];

/// The generated data set of images.
pub const GLYPHS: &str = "generated:glyphs";

/// Images of two glyphs, one of them asked for, in the alphabet of `seed`.
pub fn glyph_examples(limit: usize, seed: u64) -> Vec<ImageExample> {
    let alphabet = Alphabet::new(seed);
    let mut generator = generator(seed ^ 0x676c);
    (0..limit)
        .filter_map(|_| {
            let scene = scene(&alphabet, 2, &mut generator);
            let asked = scene.glyphs.first()?;
            Some(ImageExample {
                class: asked.class,
                mask: asked.mask(),
                image: scene.image,
            })
        })
        .collect()
}

/// The generated data set of captioned pictures: one shape before a texture.
pub const ATTRIBUTES: &str = "generated:attributes";

/// Pictures of `side` by `side` pixels whose class is their shape and whose evidence is its mask;
/// textures know nothing of shapes.
pub fn attribute_examples(limit: usize, side: usize, seed: u64) -> Vec<ImageExample> {
    let mut generator = generator(seed ^ 0x6174_7472);
    let draw = attributes::Draw::balanced();
    (0..limit)
        .map(|_| {
            let scene = draw.scene(&mut generator);
            let picture = attributes::draw(scene, side, &mut generator);
            ImageExample {
                class: scene.values[attributes::SHAPE],
                mask: picture.mask,
                image: picture.pixels,
            }
        })
        .collect()
}

/// The examples that `name` stands for, at most `limit`, as `model` reads them.
pub fn examples(
    name: &str,
    package: &Package,
    model: &Model,
    limit: usize,
    seed: u64,
) -> Result<Dataset> {
    if let Some(task) = Task::from_name(name) {
        return of_task(task, package, model, limit, seed);
    }
    match name.strip_prefix(GENERATED) {
        Some(kind) => Ok(Dataset {
            examples: generated(kind, model, limit, seed)?,
            ..Dataset::default()
        }),
        None => from_file(Path::new(name), package, model, limit),
    }
}

/// Prompts of a task, of all its templates.
fn of_task(
    task: Task,
    package: &Package,
    model: &Model,
    limit: usize,
    seed: u64,
) -> Result<Dataset> {
    ensure!(
        matches!(model.spec().head, HeadSpec::LanguageModel { .. }) && model.spec().is_causal(),
        "{} is for language models that read from left to right, which this is not",
        task.name()
    );
    let mut generator = generator(seed);
    let generated = task.generate(package.tokenizer()?, None, limit, &mut generator)?;
    for note in &generated.notes {
        tracing::warn!("{note}");
    }
    let examples = generated.prompts.iter().map(Prompt::example);
    let (examples, unfit): (Vec<_>, Vec<_>) =
        examples.partition(|example| example.ids.len() <= model.spec().length());
    ensure!(
        !examples.is_empty(),
        "every prompt of {} is longer than the model",
        task.name()
    );
    Ok(Dataset {
        examples,
        unfit: unfit.len(),
        ..Dataset::default()
    })
}

fn from_file(path: &Path, package: &Package, model: &Model, limit: usize) -> Result<Dataset> {
    ensure!(
        path.is_file(),
        "data set {} is not a file; give a CSV file, ioi, greater-than, or {GENERATED} and one of {}",
        path.display(),
        NAMES.join(", ")
    );
    let file =
        File::open(path).with_context(|| format!("data set {} cannot be read", path.display()))?;
    let rows = read_rows(BufReader::new(file), Some(limit))
        .with_context(|| format!("data set {}", path.display()))?;
    ensure!(!rows.is_empty(), "data set {} has no rows", path.display());
    let tokenizer = package.tokenizer()?;
    let mask = match reads_both_ways(model) {
        true => tokenizer
            .id_of("[MASK]")
            .or_else(|| tokenizer.id_of("<mask>")),
        false => None,
    };
    let dataset = tokenised(&rows, tokenizer, mask, model.spec().length())?;
    ensure!(
        !dataset.examples.is_empty(),
        "none of the {} rows of {} fits this model: {} begin alike, {} are too long",
        rows.len(),
        path.display(),
        dataset.indistinguishable,
        dataset.unfit
    );
    Ok(dataset)
}

/// Whether the model predicts a word from both sides.
fn reads_both_ways(model: &Model) -> bool {
    let blocks = model.spec().expanded_blocks();
    let causal = |mixer: &MixerSpec| match mixer {
        MixerSpec::MultiHead(spec) => spec.causal,
        _ => true,
    };
    !blocks.iter().any(|block| causal(&block.attention))
}

fn generated(kind: &str, model: &Model, count: usize, seed: u64) -> Result<Vec<Example>> {
    let vocabulary = model.spec().vocabulary().unwrap_or(0);
    if kind == "induction" {
        ensure!(
            matches!(model.spec().head, HeadSpec::LanguageModel { .. }),
            "{GENERATED}induction is for language models, which this is not"
        );
        let period = (model.spec().length() / 2).min(16);
        return Ok(induction(count, period, vocabulary, &mut generator(seed))?);
    }
    if kind == "polarity" {
        ensure!(
            vocabulary == polarity::VOCABULARY,
            "{GENERATED}polarity has {} words, but the model {vocabulary}; train one with `lapidary reproduce decompx --models DIR`",
            polarity::VOCABULARY
        );
        return Ok(polarities(count, seed));
    }
    let wanted = kind.replace('-', "_");
    let Some(kind) = Kind::ALL.into_iter().find(|one| one.name() == wanted) else {
        bail!(
            "data set is {GENERATED}{kind}, but must be a file or {GENERATED} and one of {}",
            NAMES.join(", ")
        );
    };
    sentences(kind, vocabulary, count, seed)
}

fn polarities(count: usize, seed: u64) -> Vec<Example> {
    let mut generator = generator(seed);
    polarity::sentences(count, &mut generator)
        .into_iter()
        .map(|sentence| {
            // The words that speak for the label.
            let sign = if sentence.label == 1 { 1 } else { -1 };
            let positions = |of: &dyn Fn(usize) -> bool| {
                (0..sentence.tokens.len()).filter(|i| of(*i)).collect()
            };
            Example {
                target: sentence.label as usize,
                foil: None,
                evidence: positions(&|i| sentence.effects.get(i).is_some_and(|e| e * sign > 0)),
                position: None,
                special: positions(&|i| polarity::is_special(sentence.tokens[i])),
                words: Vec::new(),
                ids: sentence.tokens,
            }
        })
        .collect()
}

/// Held-out sentences of the embedded model's language.
fn sentences(kind: Kind, vocabulary: usize, count: usize, seed: u64) -> Result<Vec<Example>> {
    let language = Language::new(LANGUAGE_SEED);
    let words = language.vocabulary();
    ensure!(
        vocabulary == words.size(),
        "{GENERATED}{} has {} words, but the model {vocabulary}; it is for the embedded model",
        kind.name(),
        words.size()
    );
    let mut generator = generator(seed);
    let mut examples = Vec::with_capacity(count);
    for _ in 0..count {
        let sentence = language.sentence(kind, Split::HeldOut, &mut generator);
        let mut ids = sentence.tokens(words)?;
        // Token 0 is the start: word `i` is token `i + 1`.
        ids.truncate(sentence.target + 1);
        examples.push(Example {
            ids,
            target: words.identifier(sentence.target_word())? as usize,
            foil: Some(words.identifier(sentence.foil)? as usize),
            evidence: sentence.evidence.iter().map(|word| word + 1).collect(),
            position: None,
            special: vec![0],
            words: Vec::new(),
        });
    }
    Ok(examples)
}
