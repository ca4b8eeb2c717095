//! The methods that narrow the stream, their plans, and how they are carried out.

use lapidary_factor::Matrix;
use lapidary_kernels::DType;
use lapidary_model::{InputSpec, Model, ModelSpec};

use super::coordinates::Coordinates;
use super::cut::{Bases, cut, cut_spec};
use super::directions::{Directions, Principal, Stream};
use super::fold::{Folding, in_type};
use super::layout::Layout;
use super::transport::Transport;
use super::walk::walk;
use crate::ahead::{Left, Refused};
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan, readable};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::Requirements;
use crate::{CalibrationData, Error, Result};
use serde::{Deserialize, Serialize};

/// A basis may be this far from orthonormal.
const ORTHONORMAL: f64 = 1e-6;

/// Choices of the methods that narrow the stream.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SliceSettings {
    /// Widths are rounded to a multiple of this.
    pub multiple: usize,
    /// How features are chosen and merged, where they are.
    pub transport: Transport,
}

impl Default for SliceSettings {
    fn default() -> Self {
        Self {
            multiple: 8,
            transport: Transport::default(),
        }
    }
}

/// A method: how it chooses directions, and whether all sites share them.
struct Kind {
    name: &'static str,
    shared: bool,
    directions: fn(&Settings) -> Box<dyn Directions>,
}

fn principal(_: &Settings) -> Box<dyn Directions> {
    Box::new(Principal)
}

fn transport(settings: &Settings) -> Box<dyn Directions> {
    Box::new(settings.slicing.transport)
}

fn coordinates(settings: &Settings) -> Box<dyn Directions> {
    Box::new(Coordinates {
        selector: settings.slicing.transport.selector,
    })
}

const PER_SITE_PCA: Kind = Kind {
    name: "slicegpt",
    shared: false,
    directions: principal,
};
const SHARED_PCA: Kind = Kind {
    name: "slicegpt-shared",
    shared: true,
    directions: principal,
};
const PER_SITE_TRANSPORT: Kind = Kind {
    name: "dotresize",
    shared: false,
    directions: transport,
};
const SHARED_TRANSPORT: Kind = Kind {
    name: "dotresize-shared",
    shared: true,
    directions: transport,
};
const FEATURES: Kind = Kind {
    name: "coordinate-magnitude",
    shared: true,
    directions: coordinates,
};

const SLICEGPT_SOURCE: &str = "Ashkboos, Croci, Gennari do Nascimento, Hoefler & Hensman 2024, \
                               arXiv 2401.15024";
const DOTRESIZE_SOURCE: &str = "Verma, Murray & Duh 2025, arXiv 2507.04517";

/// What no method of these can be run on.
const SLICEABLE: &[Refused] = &[Refused::Shortcuts, Refused::Gaps, Refused::AnyFactors];

/// Principal directions, site by site.
pub(crate) const SLICEGPT: Method = Method {
    name: PER_SITE_PCA.name,
    summary: "Cuts the residual stream to its principal directions, layer by layer (SliceGPT)",
    source: SLICEGPT_SOURCE,
    schedule: Schedule::LayerByLayer,
    effect: Effect::Stream,
    observes: true,
    leaves: &[Left::Shortcuts],
    refuses: |_| SLICEABLE,
    requirements: |model, _| requirements(&PER_SITE_PCA, model),
    plan: |task, budget| plan(&PER_SITE_PCA, task, budget),
    apply: |task, plan| apply(&PER_SITE_PCA, task, plan),
    cut: None,
};

/// Principal directions of all sites together.
pub(crate) const SLICEGPT_SHARED: Method = Method {
    name: SHARED_PCA.name,
    summary: "Cuts the residual stream to directions that all layers share: no shortcuts",
    source: SLICEGPT_SOURCE,
    schedule: Schedule::OneShot,
    effect: Effect::Stream,
    observes: true,
    leaves: &[],
    refuses: |_| SLICEABLE,
    requirements: |model, _| requirements(&SHARED_PCA, model),
    plan: |task, budget| plan(&SHARED_PCA, task, budget),
    apply: |task, plan| apply(&SHARED_PCA, task, plan),
    cut: None,
};

/// Merged features, site by site.
pub(crate) const DOTRESIZE: Method = Method {
    name: PER_SITE_TRANSPORT.name,
    summary: "Merges similar features of the residual stream by optimal transport (DOTResize)",
    source: DOTRESIZE_SOURCE,
    schedule: Schedule::LayerByLayer,
    effect: Effect::Stream,
    observes: true,
    leaves: &[Left::Shortcuts],
    refuses: |_| SLICEABLE,
    requirements: |model, _| requirements(&PER_SITE_TRANSPORT, model),
    plan: |task, budget| plan(&PER_SITE_TRANSPORT, task, budget),
    apply: |task, plan| apply(&PER_SITE_TRANSPORT, task, plan),
    cut: None,
};

/// Merged features, the same at all sites.
pub(crate) const DOTRESIZE_SHARED: Method = Method {
    name: SHARED_TRANSPORT.name,
    summary: "Merges similar features by optimal transport, alike in all layers: no shortcuts",
    source: DOTRESIZE_SOURCE,
    schedule: Schedule::OneShot,
    effect: Effect::Stream,
    observes: true,
    leaves: &[],
    refuses: |_| SLICEABLE,
    requirements: |model, _| requirements(&SHARED_TRANSPORT, model),
    plan: |task, budget| plan(&SHARED_TRANSPORT, task, budget),
    apply: |task, plan| apply(&SHARED_TRANSPORT, task, plan),
    cut: None,
};

/// Features left out, the same at all sites.
pub(crate) const COORDINATE_MAGNITUDE: Method = Method {
    name: FEATURES.name,
    summary: "Leaves out the features of the residual stream that are smallest",
    source: "the plain way, which rotations and merging are compared with",
    schedule: Schedule::OneShot,
    effect: Effect::Stream,
    observes: true,
    leaves: &[],
    refuses: |_| SLICEABLE,
    requirements: |model, _| requirements(&FEATURES, model),
    plan: |task, budget| plan(&FEATURES, task, budget),
    apply: |task, plan| apply(&FEATURES, task, plan),
    cut: None,
};

fn requirements(kind: &Kind, model: &Model) -> Result<Requirements> {
    Layout::of(model.spec(), kind.name)?;
    Ok(Requirements::default())
}

/// Parameters of a model of `spec` whose stream is cut to `width`, with shortcuts or (`shared`)
/// without. Of a block with two parts, shortcuts cost `2 width²`; a head that was tied to the
/// embeddings is not any more.
///
/// # Errors
/// When no such model can be built.
pub fn parameters_after(spec: &ModelSpec, width: usize, shared: bool) -> Result<u64> {
    Ok(cut_spec(spec, width, !shared).parameter_count()?)
}

/// Modules of a plan: what reads or writes the stream.
fn modules(layout: &Layout) -> impl Iterator<Item = &str> {
    let parts = layout.parts.iter().map(|part| part.path.as_str());
    std::iter::once("embeddings")
        .chain(parts)
        .chain(std::iter::once("head"))
}

fn plan(kind: &Kind, task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let spec = task.model.spec();
    let layout = Layout::of(spec, kind.name)?;
    let share = budget.share(kind.name)?;
    let multiple = task.settings().slicing.multiple;
    if !(1..=spec.width).contains(&multiple) {
        let what = "slicing.multiple, of which widths are multiples,";
        let expected = format!("between 1 and {}, the width of the model", spec.width);
        return Err(Error::invalid(what, multiple, expected));
    }
    let width = (share * spec.width as f64 / multiple as f64).round() as usize * multiple;
    let change = if width >= spec.width {
        let wide = spec.width;
        Change::Leave {
            reason: format!(
                "{} of {wide} features is {wide} in multiples of {multiple}",
                readable(share)
            ),
        }
    } else {
        check_size(kind, task.model, width, multiple)?;
        Change::Slice { width }
    };
    let module = |path: &str| ModulePlan {
        path: path.to_owned(),
        input: spec.width,
        output: spec.width,
        change: change.clone(),
    };
    Ok(Plan {
        method: kind.name.to_owned(),
        modules: modules(&layout).map(module).collect(),
    })
}

/// Refuses a width that saves nothing, and says which would.
fn check_size(kind: &Kind, model: &Model, width: usize, multiple: usize) -> Result<()> {
    if width == 0 {
        let what = format!("width that {} would leave", kind.name);
        return Err(Error::invalid(what, 0, format!("at least {multiple}")));
    }
    let before = model.parameter_count() as u64;
    let after = |width| parameters_after(model.spec(), width, kind.shared);
    let found = after(width)?;
    if found < before {
        return Ok(());
    }
    let mut saves = None;
    let mut narrower = width;
    while narrower > multiple && saves.is_none() {
        narrower -= multiple;
        if after(narrower)? < before {
            saves = Some(narrower);
        }
    }
    let extra = match kind.shared {
        true => "a head of its own",
        false => "two square matrices to a block and a head of its own",
    };
    let found = format!("{width}, which with {extra} takes {found} parameters instead of {before}");
    let expected = match saves {
        Some(saves) => format!("at most {saves}, which saves some"),
        None => "one that saves parameters; none does in this model".to_owned(),
    };
    Err(Error::invalid(
        format!("width that {} would leave", kind.name),
        found,
        expected,
    ))
}

fn apply(kind: &Kind, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let layout = Layout::of(model.spec(), kind.name)?;
    let width = planned_width(kind, model, &layout, plan)?;
    let (result, notes) = match width {
        None => (in_type(model, model.dtype())?, Vec::new()),
        Some(width) => {
            let settings = task.settings();
            let directions = (kind.directions)(&settings);
            let sliced = slice(
                model,
                task.observed(kind.name)?,
                width,
                kind.shared,
                directions.as_ref(),
                settings.batch,
            )?;
            (sliced.model, sliced.notes)
        }
    };
    let reports = plan.modules.iter().map(|planned| {
        let weights = |model: &Model| weights_of(model, &planned.path);
        let mut report = ModuleReport::new(planned, weights(model), weights(&result));
        let mut notes = notes.iter().filter(|(path, _)| *path == planned.path);
        if let Some((_, note)) = notes.next_back() {
            report.note = Some(note.clone());
        }
        report
    });
    let reports = reports.collect();
    Compressed::new(kind.name, task, result, reports)
}

/// The one width that a plan gives to all modules, or none when all stay.
fn planned_width(
    kind: &Kind,
    model: &Model,
    layout: &Layout,
    plan: &Plan,
) -> Result<Option<usize>> {
    let wide = model.spec().width;
    let named = plan.modules.iter().map(|module| module.path.as_str());
    if !named.eq(modules(layout)) || plan.modules.iter().any(|module| module.input != wide) {
        let found = plan.modules.iter().map(|module| module.path.as_str());
        return Err(Error::invalid(
            "plan",
            format!("for {}", found.collect::<Vec<_>>().join(", ")),
            format!("one of every module of this model, of width {wide}"),
        ));
    }
    let mut widths = Vec::new();
    for module in &plan.modules {
        widths.push(match module.change {
            Change::Slice { width } if (1..=wide).contains(&width) => Some(width),
            Change::Leave { .. } => None,
            ref other => {
                return Err(Error::invalid(
                    format!("change of {} in a plan of {}", module.path, kind.name),
                    format!("{other:?}"),
                    format!("leave, or slice to a width of 1 to {wide}"),
                ));
            }
        });
    }
    widths.dedup();
    match widths.as_slice() {
        [width] => Ok(*width),
        _ => Err(Error::invalid(
            format!("widths in a plan of {}", kind.name),
            format!("{widths:?}"),
            "the same for all modules: a model has one width",
        )),
    }
}

/// Parameters that belong to a module of a plan; the final norm belongs to the head.
fn weights_of(model: &Model, path: &str) -> usize {
    let belongs = |name: &str| match path {
        "head" => name.starts_with("head.") || name.starts_with("final_norm."),
        // The norm and the shortcut of a part begin as it does.
        _ => name
            .strip_prefix(path)
            .is_some_and(|rest| rest.starts_with(['.', '_'])),
    };
    let parameters = model.parameters().iter();
    parameters
        .filter(|(name, _)| belongs(name))
        .map(|(_, tensor)| tensor.elem_count())
        .sum()
}

/// A narrower model, and what is to be said of each site.
#[derive(Debug)]
pub struct Sliced {
    /// The model.
    pub model: Model,
    /// The basis of each site, `[width, narrower]`: the embeddings, then the stream after each
    /// part. One, where all share it.
    pub bases: Vec<Matrix>,
    /// The share of the squared length that each site keeps.
    pub kept: Vec<f64>,
    /// Under the path of the module that writes a site.
    notes: Vec<(String, String)>,
}

/// Cuts the stream of a model to `width` of the directions that are chosen on `data`: anew at each
/// site, with what the sites before leave, or (`shared`) once for all, on the whole model. `width`
/// may be the model's own, which changes the basis and no score.
///
/// # Errors
/// When the model's stream has no basis but its own, or no directions of that width are found.
pub fn slice(
    model: &Model,
    data: &CalibrationData,
    width: usize,
    shared: bool,
    directions: &dyn Directions,
    batch: usize,
) -> Result<Sliced> {
    let spec = model.spec();
    if width == 0 || width > spec.width {
        let expected = format!("1 to {}, the width of the model", spec.width);
        return Err(Error::invalid("width to cut to", width, expected));
    }
    if let InputSpec::Tokens(tokens) = &spec.input
        && tokens.embedding_width == Some(width)
    {
        let expected = "another width than that of the table of embeddings, which would do \
                        without its projection";
        return Err(Error::invalid("width to cut to", width, expected));
    }
    let layout = Layout::of(spec, "a narrower stream")?;
    let folding = Folding::of(model, &layout)?;
    let dtype = match model.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let mut bases = Vec::new();
    let mut kept = Vec::new();
    let mut notes = Vec::new();
    let mut streams = Vec::new();
    walk(&folding, dtype, data, batch, |site, rows| {
        let stream = Stream::of(rows, directions.distance())?;
        if shared {
            streams.push(stream);
            return Ok(None);
        }
        let choice = directions.choose(&stream, width)?;
        check(&choice.basis, spec.width, width)?;
        let share = stream.kept(&choice.basis);
        kept.push(share);
        notes.push((
            layout.writer(site).to_owned(),
            note(share, choice.note.as_deref()),
        ));
        bases.push(choice.basis.clone());
        Ok(Some(choice.basis))
    })?;
    if shared {
        let choice = directions.choose(&Stream::mean(&streams)?, width)?;
        check(&choice.basis, spec.width, width)?;
        for (site, stream) in streams.iter().enumerate() {
            let share = stream.kept(&choice.basis);
            kept.push(share);
            notes.push((
                layout.writer(site).to_owned(),
                note(share, choice.note.as_deref()),
            ));
        }
        bases.push(choice.basis);
    }
    let used = match (shared, bases.first()) {
        (true, Some(basis)) => Bases::Shared(basis.clone()),
        _ => Bases::PerSite(bases.clone()),
    };
    let narrow = cut(folding, &used, model.dtype())?.finish()?;
    Ok(Sliced {
        model: in_type(&narrow, model.dtype())?,
        bases,
        kept,
        notes,
    })
}

fn note(kept: f64, more: Option<&str>) -> String {
    let kept = format!(
        "{:.2} % of the stream's squared length is kept",
        100.0 * kept
    );
    match more {
        Some(more) => format!("{kept}; {more}"),
        None => kept,
    }
}

/// Refuses a basis of another shape, or one that is not orthonormal.
fn check(basis: &Matrix, width: usize, narrower: usize) -> Result<()> {
    let shape = (basis.nrows(), basis.ncols());
    if shape != (width, narrower) {
        let expected = format!("{:?}", (width, narrower));
        return Err(Error::invalid(
            "shape of a basis",
            format!("{shape:?}"),
            expected,
        ));
    }
    let product = basis.transpose() * basis;
    let off = (product - Matrix::identity(narrower, narrower)).norm_max();
    if off > ORTHONORMAL {
        let found = format!("{off:.1e} from it");
        return Err(Error::invalid("QᵀQ of a basis", found, "the identity"));
    }
    Ok(())
}
