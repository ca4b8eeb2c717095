//! Methods that multiply the blocks' mixings of tokens and read the row of the explained
//! position: ALTI (Ferrando et al. 2022, Measuring the Mixing of Contextual Information in the
//! Transformer, arXiv 2203.04212) and GlobEnc (Modarressi et al. 2022, arXiv 2205.03286).
//!
//! Both see attention, residuals and norms; neither sees feed-forward parts mix anything, which
//! they do not, nor the head. Their scores are shares of one, not parts of the explained number.

use crate::explainer::Explainer;
use crate::mixing::{Captured, Contributions, rollout};
use crate::{Error, Explanation, Options, Question, Result, Target, Unit};

/// ALTI in the list of explainers; reads [`Options::start_layer`].
pub(crate) const ALTI: Explainer = Explainer {
    name: "alti",
    summary: "Mixing of tokens by attention blocks, multiplied (ALTI)",
    source: "Ferrando et al. 2022, arXiv 2203.04212",
    unit: Unit::Token,
    explain: |question, targets, options| {
        explain(ALTI.name, Contributions::Alti, question, targets, options)
    },
};

/// GlobEnc in the list of explainers; reads [`Options::start_layer`].
pub(crate) const GLOBENC: Explainer = Explainer {
    name: "globenc",
    summary: "Lengths of tokens' shares through both norms, multiplied (GlobEnc)",
    source: "Modarressi et al. 2022, arXiv 2205.03286",
    unit: Unit::Token,
    explain: |question, targets, options| {
        explain(
            GLOBENC.name,
            Contributions::GlobEnc,
            question,
            targets,
            options,
        )
    },
};

/// `C` of every block, `[block][token][token]`: how much of each token's vector after the block
/// comes from each token. Rows sum to one; above the diagonal causal models have exact zeros.
///
/// # Errors
/// For blocks that mix tokens by something else than self-attention, and under
/// [`Contributions::GlobEnc`] for blocks that are not post-norm.
pub fn mixings(question: &Question<'_>, measure: Contributions) -> Result<Vec<Vec<Vec<f64>>>> {
    let captured = Captured::new(question, &[])?;
    all(&captured, measure)
}

fn all(captured: &Captured<'_>, measure: Contributions) -> Result<Vec<Vec<Vec<f64>>>> {
    (0..captured.blocks())
        .map(|index| measure.of(captured, index))
        .collect()
}

fn explain(
    name: &str,
    measure: Contributions,
    question: &Question<'_>,
    targets: &[Target],
    options: &Options,
) -> Result<Vec<Explanation>> {
    let captured = Captured::new(question, targets)?;
    let mixings = all(&captured, measure)?;
    let used = mixings.get(options.start_layer..).unwrap_or_default();
    if used.is_empty() {
        let expected = format!("below {}, the number of blocks", mixings.len());
        return Err(Error::invalid(
            "the first layer",
            options.start_layer,
            expected,
        ));
    }
    let rolled = rollout(used);
    let explain = |target: &Target| {
        let reading = captured.reading(target)?;
        let left_out = vec![
            "all but how tokens mix: the scores are shares of one, not of the explained number"
                .to_owned(),
        ];
        Ok(Explanation::new(
            name,
            Unit::Token,
            reading.mean_row(&rolled),
            reading.explained,
            left_out,
        ))
    };
    targets.iter().map(explain).collect()
}
