//! CLIP's image representation, decomposed by text, on a small CLIP trained here.
//!
//! The pictures' colour, shape, place, texture and mask are known, and in training the texture
//! nearly always follows the shape. So it can be told whether a head's texts name what the head
//! tells apart, whether heads of texture mislead a classifier of shapes, and whether a heat map
//! lies on the shape.

mod measures;
mod plots;
mod study;

use self::measures::{marks, retrieval, test, worst_group};
use self::study::{Found, Pictures, Texts, survey};
use super::attributes::{self, PROPERTIES, SHAPE, TEXTURE};
use super::mini_clip::Course;
use super::{after_training, mean};
use crate::error::engine;
use crate::{Claim, Reproduction, Result, Scale, Setting, Verdict};
use lapidary_explain::clip::{Component, ImageTower, mean_ablated, spurious_edit};

struct Size {
    course: Course,
    /// Pictures that the survey, the classifier and the heat maps are measured on.
    pictures: usize,
}

impl Size {
    fn of(scale: Scale, seed: u64) -> Self {
        let course = Course {
            side: 24,
            patch: 4,
            width: 64,
            heads: 4,
            blocks: 4,
            text_blocks: 2,
            expansion: 2,
            steps: 700,
            batch: 64,
            rate: 2e-3,
            correlation: 0.95,
            seed,
        };
        match scale {
            Scale::Smoke => Self {
                course: Course {
                    side: 12,
                    width: 16,
                    heads: 2,
                    blocks: 3,
                    text_blocks: 1,
                    steps: 2,
                    batch: 8,
                    ..course
                },
                pictures: 32,
            },
            Scale::Small => Self {
                course,
                pictures: 512,
            },
            Scale::Full => Self {
                course: Course {
                    side: 32,
                    width: 96,
                    expansion: 4,
                    steps: 3000,
                    batch: 256,
                    rate: 1e-3,
                    ..course
                },
                pictures: 2048,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale, setting.seed);
    let course = size.course;
    let clip = course.train()?;
    let untrained = course.untrained()?.frozen()?;
    let texts = Texts::of(&clip)?;
    let surveyed = Pictures::draw(size.pictures, course.side, setting.seed + 1000);
    let tested_on = Pictures::draw(size.pictures, course.side, setting.seed + 2000);

    let found = survey(&clip, &texts, &surveyed)?;
    let at_random = survey(&untrained, &Texts::of(&untrained)?, &surveyed)?;
    let shapes = texts.classes(SHAPE)?;
    let tested = test(&clip, &shapes, &tested_on)?;
    let tower = ImageTower::new(&clip.image)?;
    let classify = |ablated: &[bool]| -> Result<Vec<usize>> {
        let embeddings = mean_ablated(&tested.components, &found.means, ablated)?;
        Ok(shapes.classify(&embeddings)?)
    };
    let truth = tested_on.values(SHAPE);
    let accuracy = |said: &[usize]| {
        mean(
            said.iter()
                .zip(&truth)
                .map(|(a, b)| f64::from(u8::from(a == b))),
        )
    };
    let whole = classify(&marks(&tower, |_| false))?;
    let without_direct = classify(&marks(&tower, |component| {
        !matches!(component, Component::Head { .. })
    }))?;
    let without_last = classify(&marks(
        &tower,
        |component| matches!(component, Component::Head { layer, .. } if layer + 2 >= tower.depth()),
    ))?;
    let textured: Vec<Component> = found
        .about
        .iter()
        .filter(|about| about.strongest == TEXTURE)
        .map(|about| about.head)
        .collect();
    let edit = spurious_edit(&tower, 4, &textured);
    let edited = classify(&marks(&tower, |component| edit.contains(component)))?;

    let embeddings = engine(tested.components.sum(1))?;
    let retrieved = retrieval(&texts, &embeddings, &tested_on)?;
    let trained = |holds| after_training(setting.scale, holds);
    let pure = |found: &Found| found.about.iter().filter(|about| about.is_pure()).count();
    let agreement = |found: &Found| mean(found.about.iter().map(|about| about.agreement));
    let (pure_trained, pure_random) = (pure(&found), pure(&at_random));
    let random_share = pure_random as f64 / at_random.about.len().max(1) as f64;
    let worst = [&whole, &without_direct, &edited].map(|said| worst_group(said, &tested_on));
    let accuracies = [&whole, &without_direct, &without_last, &edited].map(|said| accuracy(said));
    let points = |share: f64| 100.0 * share;
    let names = |list: &[Component]| {
        let names: Vec<String> = list.iter().map(ToString::to_string).collect();
        names.join(", ")
    };
    let claims =
        vec![
        Claim::new(
            "The direct effects of all layers, heads and patches sum to the image embedding",
            "exact",
            format!(
                "largest difference {:.1e} over {} pictures, by components and by tokens",
                tested.error, size.pictures
            ),
            Verdict::of(tested.error < 1e-5),
        ),
        Claim::new(
            "The small CLIP finds the caption of a picture",
            "above 90 % of captions (asked of this setting, not published)",
            format!(
                "{:.1} % of {} pictures, among all {} captions",
                points(retrieved),
                size.pictures,
                texts.scenes.len()
            ),
            trained(retrieved > 0.9),
        )
        .noted("pictures whose texture does not follow the shape more than by chance"),
        Claim::new(
            "Mean-ablating every feed-forward part costs little accuracy, the last two layers' \
             attention much",
            "ImageNet, ViT-L/14: 75.3 % to 74.1 % without feed-forward parts; here below 5 and \
             above 30 points of shape accuracy",
            format!(
                "shape accuracy {:.1} %; without feed-forward parts {:.1} %; without the last two \
                 layers' attention {:.1} %",
                points(accuracies[0]),
                points(accuracies[1]),
                points(accuracies[2])
            ),
            trained(accuracies[0] - accuracies[1] < 0.05 && accuracies[0] - accuracies[2] > 0.3),
        ),
        Claim::new(
            "TextSpan names heads that are about one property",
            "many heads of the last layers (by inspection); here at least 4 heads with 80 % of 5 \
             texts on colour, place or texture, below 40 % of an untrained model's heads",
            format!(
                "{pure_trained} of {} heads, agreement {:.0} % on average; untrained {pure_random} \
                 ({:.0} %), agreement {:.0} %",
                found.about.len(),
                points(agreement(&found)),
                points(random_share),
                points(agreement(&at_random))
            ),
            trained(pure_trained >= 4 && random_share < 0.4),
        )
        .noted(format!(
            "the pool is the {} values of the properties, each the mean of its captions",
            PROPERTIES.iter().enumerate().map(|(p, _)| attributes::values(p).len()).sum::<usize>()
        )),
        Claim::new(
            "Without the heads of a spurious cue the worst group is classified better",
            "Waterbirds, ViT-L/14: 47.7 % to 72.9 %; here 10 points",
            format!(
                "worst pairing of shape and texture {:.1} % to {:.1} % ({:.1} % without \
                 feed-forward parts alone); all pictures {:.1} % to {:.1} %; heads {}",
                points(worst[0]),
                points(worst[2]),
                points(worst[1]),
                points(accuracies[0]),
                points(accuracies[3]),
                if textured.is_empty() { "none".to_owned() } else { names(&textured) }
            ),
            trained(worst[2] - worst[0] >= 0.1),
        ),
        Claim::new(
            "Heat maps of the decomposition segment better than attention rollout",
            "ImageNet segmentation, ViT-B/16: mIoU 54.5 %, above rollout; here by 5 points",
            format!(
                "mIoU of the shape {:.1} %, rollout {:.1} %",
                points(tested.heat),
                points(tested.rollout)
            ),
            trained(tested.heat - tested.rollout >= 0.05),
        ),
    ];
    Ok(Reproduction {
        setting: format!(
            "image tower of {} blocks, {} heads, width {}, on pictures of {side} by {side} pixels \
             and patches of {}, text tower of {} blocks, {} steps of {} pairs, texture that of the \
             shape in {:.0} % of them; one seed",
            course.blocks,
            course.heads,
            course.width,
            course.patch,
            course.text_blocks,
            course.steps,
            course.batch,
            points(course.correlation),
            side = course.side,
        ),
        claims,
        plots: vec![
            plots::ablations(&tower, &classify, &accuracy)?,
            plots::spans(&found, &at_random),
            plots::parts(&found),
        ],
        ..Reproduction::default()
    })
}
