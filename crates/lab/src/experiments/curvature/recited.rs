//! What is recited, by the paper's other measures and beside a mask that learned to forget.

use super::{Chosen, Measure, Point, SHOWN, Size};
use crate::experiments::after_training;
use crate::{Claim, Result, Scale, Setting, Verdict};
use lapidary_compress::CalibrationData;
use lapidary_compress::curvature::{Keep, Spectrum, Subnet};
use lapidary_compress::quality::{Window, ranking_kept, recitation};
use lapidary_model::Model;

/// Words whose ranking is compared.
const RANKED: usize = 10;

/// The paper's other measures of the same edit.
pub(super) fn told(
    scale: Scale,
    (model, chosen): (&Model, Option<&Chosen<'_>>),
    canaries: &[Vec<u32>],
    clean: &[Vec<u32>],
) -> Result<Claim> {
    let statement =
        "Loosely too fewer canaries are recited, while clean text keeps its ranking of next words";
    let published = "measures of the paper, without figures at hand";
    let Some(chosen) = chosen else {
        let measured = "no edit costs so little";
        return Ok(Claim::new(
            statement,
            published,
            measured,
            Verdict::NotMeasured,
        ));
    };
    let before = recitation(model, canaries, SHOWN)?;
    let after = recitation(chosen.model, canaries, SHOWN)?;
    let ranking = |texts: &[Vec<u32>]| -> Result<f64> {
        let data = CalibrationData::windows(texts.to_vec())?;
        Ok(ranking_kept(model, chosen.model, &data, 8, RANKED)?)
    };
    let (on_clean, on_canaries) = (ranking(clean)?, ranking(canaries)?);
    Ok(Claim::new(
        statement,
        published,
        format!(
            "loose {:.0} % -> {:.0} %, distance {:.2} -> {:.2}; nDCG@{RANKED} {on_clean:.3} on clean text, {on_canaries:.3} on canaries",
            100.0 * before.loose,
            100.0 * after.loose,
            before.distance,
            after.distance,
        ),
        match before.loose > 0.0 {
            true => after_training(scale, after.loose < before.loose && on_clean > on_canaries),
            false => Verdict::NotMeasured,
        },
    ))
}

/// A mask that learned to forget half of the canaries, of as large a part of the same weights,
/// beside the edit, which was shown none.
pub(super) fn untold(
    (setting, size): (&Setting, &Size),
    (model, before, chosen): (&Model, Point, Option<&Chosen<'_>>),
    (canaries, retain, windows): (&[Vec<u32>], &CalibrationData, &[Window]),
    spectrum: &Spectrum,
) -> Result<Claim> {
    let statement = "Of canaries that were shown to neither, the edit leaves no more words in place than a learned mask";
    let published = "16.1 % of quotes recited after the edit, 60 % by BalancedSubnet";
    let Some(chosen) = chosen else {
        let measured = "no edit costs so little";
        return Ok(Claim::new(
            statement,
            published,
            measured,
            Verdict::NotMeasured,
        ));
    };
    setting.tell(|| "a mask that learns to forget".to_owned());
    let (shown, others) = canaries.split_at(canaries.len() / 2);
    let subnet = Subnet {
        steps: size.masking,
        seed: setting.seed,
        ..Subnet::default()
    };
    let removed = spectrum.removed(chosen.mass, Keep::Staircase);
    let forget = CalibrationData::windows(shown.to_vec())?;
    let masked = subnet.learn(model, &forget, retain, &removed)?;
    let on = |canaries: &[Vec<u32>], model: &Model| -> Result<Point> {
        let measure = Measure {
            canaries,
            windows: windows.to_vec(),
        };
        measure.of(model)
    };
    let (edit_shown, edit_others) = (on(shown, chosen.model)?, on(others, chosen.model)?);
    let (mask_shown, mask_others) = (on(shown, &masked)?, on(others, &masked)?);
    let percent = |point: Point| 100.0 * point.words;
    Ok(Claim::new(
        statement,
        published,
        format!(
            "words in place of the half that the mask was not shown: edit {:.0} %, mask {:.0} %; of the half that it was: {:.0} %, {:.0} %; perplexity {:.2}, {:.2}",
            percent(edit_others),
            percent(mask_others),
            percent(edit_shown),
            percent(mask_shown),
            edit_others.perplexity,
            mask_others.perplexity,
        ),
        match before.recited > 0.0 {
            true => after_training(setting.scale, edit_others.words <= mask_others.words),
            false => Verdict::NotMeasured,
        },
    )
    .noted("as much of each weight's squared norm masked as the edit takes away"))
}
