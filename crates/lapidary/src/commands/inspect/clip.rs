//! `lapidary inspect clip`: what image embeddings are made of, in words.

use std::path::{Path, PathBuf};

use crate::cli::Global;
use crate::images::{self, Picture, Preprocessing};
use crate::loading;
use crate::tensors::Tensors;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lapidary_explain::clip::{
    Component, EditedClassifier, HeadOutputs, ImageTower, Survey, ZeroShot, embed_texts, heat_maps,
    nearest, spurious_edit,
};
use lapidary_explain::report::{Cell, Map, Report, Table};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{InputSpec, Model, Package};

#[derive(Args, Debug)]
pub struct Clip {
    /// A directory with a model of two towers
    pub model: String,
    /// A directory of PNG and JPEG files, one such file, or a JSON file with `pixel_values`
    #[arg(long, value_name = "PATH")]
    pub images: PathBuf,
    /// File with the texts that heads are named by, one a line
    #[arg(long, value_name = "FILE")]
    pub texts: PathBuf,
    /// Heads to name, as layer.head; those of the last four layers when absent
    #[arg(long, value_delimiter = ',', value_name = "HEADS")]
    pub heads: Vec<String>,
    /// Texts for each head
    #[arg(long, default_value_t = 5)]
    pub count: usize,
    /// Draw where this text is in one of the images
    #[arg(long, value_name = "TEXT")]
    pub heat: Option<String>,
    /// Which image that is, counted from 0
    #[arg(long, default_value_t = 0)]
    pub image: usize,
    /// Rank the images by what each head says of this text
    #[arg(long, value_name = "TEXT")]
    pub nearest: Option<String>,
    /// File with names of classes, one a line: classify the images
    #[arg(long, value_name = "FILE")]
    pub classes: Option<PathBuf>,
    /// What a class is said in, `{}` standing for its name; several are averaged
    #[arg(long, value_name = "TEXT", default_value = "a photo of a {}.")]
    pub template: Vec<String>,
    /// File with such templates, one a line, instead
    #[arg(long, value_name = "FILE", conflicts_with = "template")]
    pub templates: Option<PathBuf>,
    /// Classify also without these heads, without feed-forward parts and all but the last layers
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "HEADS",
        requires = "classes"
    )]
    pub without: Vec<String>,
    /// How many layers are the last ones
    #[arg(long, default_value_t = 4)]
    pub last_layers: usize,
    /// Images to look at
    #[arg(long, default_value_t = 1000)]
    pub limit: usize,
    /// Keep what heads say of each image in a scratch file of this directory, not in memory
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
}

/// Images that run at one time.
const AT_ONCE: usize = 8;

/// Largest file of texts.
const TEXT_BYTES: u64 = 16 << 20;

/// Most texts that classes are made of.
const MOST_TEXTS: usize = 1 << 20;

/// Most texts or classes.
const TEXTS: usize = 1 << 17;

pub fn run(arguments: &Clip, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let text_model = package.text_model()?;
    let tower = ImageTower::new(image_model(&package)?)?;
    let images = Images::open(arguments, tower.model())?;
    let texts = lines(&arguments.texts)?;
    let vectors = vectors(&package, text_model, &texts)?;
    let heads = match arguments.heads.as_slice() {
        [] => last_heads(&tower, arguments.last_layers),
        some => parse_heads(&tower, some)?,
    };
    ensure!(
        arguments.image < images.count(),
        "image is {}, but must be below {}, the number of images",
        arguments.image,
        images.count()
    );
    let outputs = match &arguments.scratch {
        Some(directory) => HeadOutputs::on_disk(&tower, &heads, directory)?,
        None => HeadOutputs::in_memory(&tower, &heads)?,
    };
    let mut survey = Survey::new(&tower, outputs);
    let mut embeddings = Vec::new();
    for start in (0..images.count()).step_by(AT_ONCE) {
        let decomposition = survey.add(&images.batch(start)?)?;
        embeddings.push(decomposition.embeddings().clone());
    }
    let embeddings = Tensor::cat(&embeddings, 0)?;
    let mut report = survey.report(&texts, &vectors, arguments.count)?;
    if let Images::Files(_, preprocessing, _) = &images {
        report.notes.push(preprocessing.note().to_owned());
    }
    if let Some(text) = &arguments.nearest {
        let query = self::vectors(&package, text_model, std::slice::from_ref(text))?;
        report
            .tables
            .push(nearest_images(&mut survey, &images, text, &query)?);
    }
    if let Some(text) = &arguments.heat {
        let pool = (&package, text_model, texts.as_slice());
        report
            .maps
            .push(heat(arguments.image, text, pool, &tower, &images)?);
    }
    if let Some(path) = &arguments.classes {
        let names = lines(path)?;
        let tokenizer = package.tokenizer()?;
        let templates = match &arguments.templates {
            Some(path) => templates(path)?,
            None => arguments.template.clone(),
        };
        ensure!(
            names.len().saturating_mul(templates.len()) <= MOST_TEXTS,
            "{} classes in {} templates are more than {MOST_TEXTS} texts",
            names.len(),
            templates.len()
        );
        let classes = ZeroShot::from_templates(text_model, tokenizer, &names, &templates)?;
        let edited = match arguments.without.as_slice() {
            [] => None,
            heads => {
                let heads = parse_heads(&tower, heads)?;
                let edit = spurious_edit(&tower, arguments.last_layers, &heads);
                let means = survey.means()?;
                Some(EditedClassifier::new(
                    &tower,
                    classes.clone(),
                    means,
                    &edit,
                )?)
            }
        };
        let said = classes.classify(&embeddings)?;
        report
            .tables
            .push(classified(&images, &names, &said, edited)?);
    }
    Ok(report)
}

/// What classes are said in, one a line.
fn templates(path: &Path) -> Result<Vec<String>> {
    let templates = lines(path)?;
    for (line, template) in templates.iter().enumerate() {
        ensure!(
            template.contains("{}"),
            "{}: template {} is {template:?}, but must have {{}} in it, where the class stands",
            path.display(),
            line + 1
        );
    }
    Ok(templates)
}

/// The model that reads images.
fn image_model(package: &Package) -> Result<&Model> {
    let mut models = package.towers.iter().map(|tower| &tower.model);
    models
        .find(|model| model.spec().vocabulary().is_none())
        .context("the model reads no images; give one with a text and a vision tower")
}

/// The non-empty lines of a file.
fn lines(path: &Path) -> Result<Vec<String>> {
    let text = lapidary_model::files::read_text(path, TEXT_BYTES)?;
    let lines: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    ensure!(
        (1..=TEXTS).contains(&lines.len()),
        "{} has {} lines, but must have between 1 and {TEXTS}",
        path.display(),
        lines.len()
    );
    Ok(lines)
}

/// One direction for each text, `[texts, features]`.
fn vectors(package: &Package, model: &Model, texts: &[String]) -> Result<Tensor> {
    let ids = texts
        .iter()
        .map(|text| Ok(loading::encode(package, model, text)?.ids))
        .collect::<Result<Vec<_>>>()?;
    Ok(embed_texts(model, &ids)?)
}

fn last_heads(tower: &ImageTower<'_>, layers: usize) -> Vec<Component> {
    let first = tower.depth().saturating_sub(layers);
    let named = |component: &Component| matches!(component, Component::Head { layer, .. } if *layer >= first);
    tower.components().iter().copied().filter(named).collect()
}

/// Heads given as `layer.head`.
fn parse_heads(tower: &ImageTower<'_>, heads: &[String]) -> Result<Vec<Component>> {
    let parse = |text: &String| {
        let numbers = text.split_once('.').and_then(|(layer, head)| {
            Some(Component::Head {
                layer: layer.trim().parse().ok()?,
                head: head.trim().parse().ok()?,
            })
        });
        let Some(component) = numbers else {
            bail!("head is {text:?}, but must be layer.head, such as 3.0");
        };
        tower.index_of(component)?;
        Ok(component)
    };
    heads.iter().map(parse).collect()
}

/// Where a text is in one image: its heat less the mean over the texts of the pool.
fn heat(
    image: usize,
    text: &str,
    (package, model, pool): (&Package, &Model, &[String]),
    tower: &ImageTower<'_>,
    images: &Images,
) -> Result<Map> {
    let mut texts = vec![text.to_owned()];
    texts.extend(pool.iter().filter(|other| *other != text).cloned());
    let vectors = vectors(package, model, &texts)?;
    let groups = (0..texts.len())
        .map(|row| vectors.narrow(0, row, 1))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let classes = ZeroShot::from_groups(&groups)?;
    let decomposition = tower.decompose(&images.one(image)?)?;
    let maps = heat_maps(&decomposition, &classes, &[0])?;
    let heat = maps.into_iter().next().context("no heat map")?;
    let name = |what: &str, count: usize| (0..count).map(|i| format!("{what} {i}")).collect();
    Ok(Map {
        title: format!("Where {text:?} is in {}", images.name(image)),
        rows: name("row", heat.rows),
        columns: (0..heat.columns).map(|column| column.to_string()).collect(),
        values: heat
            .values
            .chunks(heat.columns.max(1))
            .map(<[f64]>::to_vec)
            .collect(),
    })
}

/// For each head the images of which it says most of a text.
fn nearest_images(
    survey: &mut Survey<'_, '_>,
    images: &Images,
    text: &str,
    query: &Tensor,
) -> Result<Table> {
    let query = query.get(0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let title = format!("Images of which each head says most of {text:?}");
    let mut table = Table::new(title, &["head", "images, with the products"]);
    for head in survey.outputs().components().to_vec() {
        let said = survey.outputs().of(head)?;
        let found = nearest(said.as_ref(), &query, 3)?;
        let each = found
            .iter()
            .map(|(image, product)| format!("{} ({product:.4})", images.name(*image)));
        let each: Vec<String> = each.collect();
        table.push([head.to_string().into(), each.join("; ").into()]);
    }
    Ok(table)
}

fn classified(
    images: &Images,
    names: &[String],
    said: &[usize],
    edited: Option<EditedClassifier<'_, '_>>,
) -> Result<Table> {
    let mut columns = vec!["image", "class"];
    if edited.is_some() {
        columns.push("class without the heads");
    }
    let mut table = Table::new("Classes", &columns);
    let name = |class: Option<&usize>| -> Cell {
        let name = class.and_then(|class| names.get(*class));
        name.map_or("", String::as_str).into()
    };
    for start in (0..images.count()).step_by(AT_ONCE) {
        let without = match &edited {
            Some(edited) => Some(edited.classify(&images.batch(start)?)?),
            None => None,
        };
        for offset in 0..AT_ONCE.min(images.count() - start) {
            let image = start + offset;
            let mut row = vec![images.name(image).into(), name(said.get(image))];
            if let Some(without) = &without {
                row.push(name(without.get(offset)));
            }
            table.push(row);
        }
    }
    Ok(table)
}

/// The images that are looked at, read when they are wanted.
enum Images {
    Files(Vec<PathBuf>, Preprocessing, Device),
    Values(Tensor),
}

impl Images {
    fn open(arguments: &Clip, model: &Model) -> Result<Self> {
        let InputSpec::Patches(patches) = &model.spec().input else {
            bail!("the model reads no images");
        };
        ensure!(
            arguments.limit > 0,
            "limit is 0, but must be at least 1 image"
        );
        let extension = arguments.images.extension();
        if extension.is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            let tensors = Tensors::read(&arguments.images, &model.device())?;
            let pixels = tensors
                .pixels
                .with_context(|| format!("{} holds no pixel_values", arguments.images.display()))?;
            let count = pixels.dim(0)?.min(arguments.limit);
            return Ok(Self::Values(pixels.narrow(0, 0, count)?));
        }
        ensure!(
            patches.channels == 3,
            "the model takes {} channels, but pictures have 3; give pixel_values as JSON",
            patches.channels
        );
        let preprocessing = Preprocessing::of(Path::new(&arguments.model), patches.image)?;
        let mut files = images::list(&arguments.images)?;
        files.truncate(arguments.limit);
        Ok(Self::Files(files, preprocessing, model.device()))
    }

    fn count(&self) -> usize {
        match self {
            Self::Files(files, ..) => files.len(),
            Self::Values(pixels) => pixels.dims().first().copied().unwrap_or(0),
        }
    }

    fn name(&self, index: usize) -> String {
        let file = match self {
            Self::Files(files, ..) => files.get(index).and_then(|file| file.file_name()),
            Self::Values(_) => None,
        };
        file.map_or_else(
            || format!("image {index}"),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// `[1, channels, height, width]`.
    fn one(&self, index: usize) -> Result<Tensor> {
        match self {
            Self::Files(files, preprocessing, device) => {
                let file = files.get(index).context("there is no such image")?;
                let pixels = preprocessing.pixels(&Picture::read(file)?, device);
                pixels.with_context(|| format!("{}", file.display()))
            }
            Self::Values(pixels) => Ok(pixels.narrow(0, index, 1)?),
        }
    }

    /// Up to [`AT_ONCE`] images from `start` on.
    fn batch(&self, start: usize) -> Result<Tensor> {
        let end = (start + AT_ONCE).min(self.count());
        let images = (start..end).map(|index| self.one(index));
        Ok(Tensor::cat(&images.collect::<Result<Vec<_>>>()?, 0)?)
    }
}
