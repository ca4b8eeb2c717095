//! Whether a model can read what it is to be trained on: found out before any step.

use lapidary_parts::attention::MixerSpec;
use lapidary_parts::attention::mechanism::Describe;
use lapidary_parts::attention::wavelet::Family;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::fit::FitSpec;
use lapidary_parts::position::PositionSpec;

use crate::{Result, TrainSpec};

impl TrainSpec {
    /// Refuses data of so many different tokens, if the model does not read as many, and the mask behind them where
    /// there is one.
    pub(crate) fn check_vocabulary(&self, tokens: usize) -> Result<()> {
        let found = self.model.vocabulary().unwrap_or(0);
        let (needed, mask) = match self.masking {
            Some(_) => (tokens.saturating_add(1), ", and the mask is one more"),
            None => (tokens, ""),
        };
        if found >= needed {
            return Ok(());
        }
        let expected = format!("at least {needed}: the data have {tokens} tokens{mask}");
        wrong("model.input.vocabulary".into(), found, expected)
    }

    /// Refuses a model of which a block cannot see as many tokens as there are, or asks for a second sequence beside
    /// them.
    pub(crate) fn check_sequences(&self) -> Result<()> {
        let whole = match self.self_distillation {
            Some(_) => (self.model.length(), "tokens of an image"),
            None => (self.length, "length"),
        };
        let mut first = 0usize;
        for (index, block) in self.model.blocks.iter().enumerate() {
            let field = format!("model.blocks.{index}");
            if block.cross_attention.is_some() {
                let expected = "absent in training, which reads one sequence";
                return wrong(format!("{field}.cross_attention"), "given", expected);
            }
            let own = first..first.saturating_add(block.repeat);
            first = own.end;
            // The repetitions of a block may see more and less.
            let seen = own.map(|block| self.seen(block, whole));
            if let Some(seen) = seen.max_by_key(|(tokens, _)| *tokens) {
                check_mixer(&block.attention, format!("{field}.attention"), seen)?;
            }
        }
        match &self.model.organisation {
            Some(OrganisationSpec::Interleaved(fit)) => check_groups(fit, whole),
            _ => Ok(()),
        }
    }

    /// The tokens that the model's block of this index sees of a sequence of so many, and what they are called.
    fn seen(&self, block: usize, whole: (usize, &'static str)) -> (usize, &'static str) {
        let (tokens, _) = whole;
        match &self.model.organisation {
            Some(OrganisationSpec::Interleaved(fit)) if fit.group < tokens => {
                (fit.group, "tokens of a group")
            }
            Some(OrganisationSpec::VipCentric(vcc))
                if block < vcc.segment_blocks && vcc.segment < tokens =>
            {
                (vcc.segment, "tokens of a segment")
            }
            _ => whole,
        }
    }
}

/// As [`TrainSpec::check_sequences`], of what stands above the blocks.
fn check_groups(fit: &FitSpec, whole: (usize, &'static str)) -> Result<()> {
    let (tokens, of) = whole;
    if fit.condition > 0 {
        let expected = "0 in training, which reads one sequence";
        return wrong(
            "model.organisation.condition".into(),
            fit.condition,
            expected,
        );
    }
    let all = fit.group.saturating_mul(fit.groups);
    if fit.tiles.is_some() && tokens != all {
        let expected = format!("{all}, all tokens of the organisation's tiles");
        return wrong(of.into(), tokens, expected);
    }
    let Some(block) = &fit.block else {
        return Ok(());
    };
    let latents = fit
        .latents
        .saturating_mul(tokens.div_ceil(fit.group.max(1)));
    let field = "model.organisation.block.attention".to_owned();
    check_mixer(&block.attention, field, (latents, "latents of all groups"))
}

/// Refuses a mixer that is made for fewer than so many tokens, or draws positions of fewer.
fn check_mixer(
    mixer: &MixerSpec,
    field: String,
    (tokens, of): (usize, &'static str),
) -> Result<()> {
    match mixer {
        MixerSpec::MultiHead(attention) => {
            // Of more tokens than there are positions to draw from, none are drawn.
            if let PositionSpec::Fire(fire) = &attention.position
                && let Some(positions) = fire.randomised.filter(|positions| *positions < tokens)
            {
                let expected = format!("at least {tokens}, the {of}");
                return wrong(format!("{field}.position.randomised"), positions, expected);
            }
            let longest = attention.mechanism.spec().and_then(Describe::longest);
            match longest.filter(|(_, most)| *most < tokens) {
                None => Ok(()),
                Some((name, most)) => {
                    let expected = format!("at least {tokens}, the {of}");
                    wrong(format!("{field}.mechanism.{name}"), most, expected)
                }
            }
        }
        // The longest band has half of the coefficients, and beyond the ends of the sequence some more.
        MixerSpec::Wavelet(wavelet) if wavelet.family != Family::Fourier => {
            let band = match wavelet.levels {
                0 => (tokens, of),
                _ => (tokens.div_ceil(2), "coefficients of a band"),
            };
            check_mixer(&wavelet.inner, format!("{field}.inner"), band)
        }
        MixerSpec::Wavelet(_) | MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) | MixerSpec::Absent => {
            Ok(())
        }
    }
}

fn wrong(field: String, found: impl std::fmt::Debug, expected: impl Into<String>) -> Result<()> {
    let error = lapidary_parts::Error::spec(field, found, expected);
    Err(lapidary_model::Error::from(error).into())
}
