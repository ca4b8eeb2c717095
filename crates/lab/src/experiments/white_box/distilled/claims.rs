//! What is claimed of self-distilled encoders.

use super::super::audit::{Curve, averaged};
use super::super::{Size, beside, learned};
use super::{AUDITED, All, BLUNT, Found, MASS, OWN, TEMPERATURE, UNCENTRED, USUAL};
use crate::experiments::after_training;
use crate::{Claim, Plot, Setting};

pub(super) fn of_collapse(setting: &Setting, size: &Size, found: &All) -> Claim {
    let information = |name: &str| found.mean(name, |found| found.information);
    let told = |name: &str| {
        format!(
            "{name} {:.3} of {:.2} (entropy {:.2})",
            information(name),
            (size.prototypes as f64).ln(),
            found.mean(name, |found| found.entropy)
        )
    };
    Claim::new(
        "self-distillation: centre and sharpening keep the teacher from saying the same of every picture; without \
         either its outputs tell less of it, all asked at one temperature",
        "DINO, figure: without either the divergence of student and teacher falls to 0",
        format!(
            "nats told at {TEMPERATURE}: {}, {}, {}",
            told(OWN),
            told(UNCENTRED),
            told(BLUNT)
        ),
        after_training(
            setting.scale,
            information(OWN) > information(UNCENTRED) && information(OWN) > information(BLUNT),
        ),
    )
}

pub(super) fn of_maps(setting: &Setting, found: &All) -> Claim {
    let trained = |name: &str| found.mean(name, |found| found.trained.overlap);
    let untrained = |name: &str| found.mean(name, |found| found.untrained.overlap);
    let (own, usual) = (trained(OWN), trained(USUAL));
    Claim::new(
        "self-distillation: the class token's attention in the last block overlaps the shape more in CRATE than in \
         a Transformer",
        "COCO, masks of supervised models, AP50: CRATE-B 2.9, ViT-B 0.8; DINO, VOC12, Jaccard: 45.9 of a ViT-S \
         distilled, 27.3 of one supervised",
        format!(
            "mean Jaccard index of the best head {own:.3} against {usual:.3}; untrained {:.3} against {:.3}",
            untrained(OWN),
            untrained(USUAL)
        ),
        after_training(setting.scale, own > usual),
    )
    .noted(format!(
        "a head's map: the patches that carry {:.0} % of its attention; of each picture the head that overlaps most",
        100.0 * MASS
    ))
}

/// Frozen features by their neighbours and by a linear map.
pub(super) fn of_features(setting: &Setting, found: &All) -> [Claim; 2] {
    type Of = fn(&Found) -> f64;
    let claim = |what: &str, published: &str, trained: Of, untrained: Of| {
        let [own, usual] = [OWN, USUAL].map(|name| found.mean(name, trained));
        let [before, usual_before] = [OWN, USUAL].map(|name| found.mean(name, untrained));
        Claim::new(
            &format!(
                "self-distillation: {what} better than before training, and with CRATE within 5 points of a \
                 Transformer"
            ),
            published,
            format!(
                "CRATE {own:.1} %, before {before:.1} %; Transformer {usual:.1} %, before {usual_before:.1} %"
            ),
            after_training(setting.scale, own > before && own >= usual - 5.0),
        )
    };
    [
        claim(
            "the ten nearest of named pictures name shapes",
            "DINO, ImageNet: ViT-S/16 74.5 % by neighbours",
            |found| found.trained.neighbours,
            |found| found.untrained.neighbours,
        ),
        claim(
            "a linear map of the frozen features, fitted to named pictures, names shapes",
            "DINO, ImageNet: ViT-S/16 77.0 % by a linear classifier",
            |found| found.trained.probe,
            |found| found.untrained.probe,
        ),
    ]
}

/// What is behind the blocks of a distilled encoder.
pub(super) fn of_blocks(setting: &Setting, found: &All) -> ([Claim; 2], [Plot; 2]) {
    let [untrained, middle, trained] = [0, 1, 2].map(|time: usize| {
        let audits = found.of(OWN).map(|found| found.audits[time].clone());
        averaged(&audits.collect::<Vec<_>>())
    });
    let published = "figure of supervised models: both fall through the layers";
    let note = format!(
        "{AUDITED} pictures that were not trained on, in the teacher; half-way {}, {}",
        middle.rates.told(),
        middle.active.told()
    );
    let claims = [
        (
            "the coding rate falls from block to block, at least twice of three times, and by more than before training",
            "rates",
            [&trained.rates, &untrained.rates],
        ),
        (
            "and so does the share of entries that are not zero",
            "shares",
            [&trained.active, &untrained.active],
        ),
    ]
    .map(|(claim, name, [trained, untrained])| {
        Claim::new(
            &format!("self-distillation: {claim}"),
            published,
            beside(name, trained, untrained),
            after_training(setting.scale, learned(trained, untrained)),
        )
        .noted(note.clone())
    });
    let plot = |title: &str, y: &str, curves: [&Curve; 3]| Plot {
        title: title.to_owned(),
        x: "block".to_owned(),
        y: y.to_owned(),
        series: ["untrained", "half-way", "trained"]
            .into_iter()
            .zip(curves)
            .map(|(name, curve)| curve.series(name))
            .collect(),
    };
    let plots = [
        plot(
            "Coding rate of tokens in a self-distilled encoder",
            "mean over heads",
            [&untrained.rates, &middle.rates, &trained.rates],
        ),
        plot(
            "Entries of each code that are not zero in a self-distilled encoder",
            "share",
            [&untrained.active, &middle.active, &trained.active],
        ),
    ];
    (claims, plots)
}
