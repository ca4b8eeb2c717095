//! How well scores agree with evidence: the tokens that are known to cause a prediction, as the
//! subject of a sentence causes the number of its verb (ALTI-Logit, Ferrando et al. 2023, arXiv
//! 2305.12535; relevance mass and rank accuracy: Arras et al. 2022, arXiv 2003.07258; F1 of the
//! highest tokens: DeYoung et al. 2020, ERASER, arXiv 1911.03429, as Chefer et al. 2021, arXiv
//! 2012.09838, use it).
//!
//! Scores are ranked in descending order. Of equal scores those outside the evidence come first,
//! so that scores which tell nothing apart are not rewarded.

use super::Summary;
use crate::{Error, Result};
use serde::Serialize;

/// Scores beside the evidence.
#[derive(Clone, Debug)]
pub struct Judged<'a> {
    scores: &'a [f64],
    /// For each token, whether it belongs to the evidence.
    is_evidence: Vec<bool>,
    /// Tokens by descending score.
    order: Vec<usize>,
    /// Number of tokens of the evidence.
    size: usize,
}

impl<'a> Judged<'a> {
    /// Judges `scores` (one for each token) against the positions `evidence`.
    ///
    /// # Errors
    /// When there is no evidence, a position of it has no score, or a score is not a number.
    pub fn new(scores: &'a [f64], evidence: &[usize]) -> Result<Self> {
        let mut is_evidence = vec![false; scores.len()];
        for position in evidence {
            let place = is_evidence.get_mut(*position).ok_or_else(|| {
                let expected = format!("below {}, the number of scores", scores.len());
                Error::invalid("a position of the evidence", position, expected)
            })?;
            *place = true;
        }
        let size = is_evidence.iter().filter(|is| **is).count();
        if size == 0 {
            return Err(Error::invalid(
                "the evidence",
                "empty",
                "one token at least",
            ));
        }
        if let Some(score) = scores.iter().find(|score| score.is_nan()) {
            return Err(Error::invalid("a score", score, "a number"));
        }
        let mut order: Vec<(f64, bool, usize)> = (0..)
            .zip(scores.iter().zip(&is_evidence))
            .map(|(position, (score, is))| (*score, *is, position))
            .collect();
        // `+ 0.0` makes −0 equal to 0.
        order.sort_by(|a, b| (b.0 + 0.0).total_cmp(&(a.0 + 0.0)).then(a.1.cmp(&b.1)));
        Ok(Self {
            scores,
            is_evidence,
            order: order.into_iter().map(|(_, _, position)| position).collect(),
            size,
        })
    }

    fn is_evidence(&self, position: usize) -> bool {
        self.is_evidence.get(position).copied().unwrap_or(false)
    }

    /// The sum of `of(score)` over the evidence, and over all tokens.
    fn masses(&self, of: impl Fn(f64) -> f64) -> (f64, f64) {
        let (mut evidence, mut all) = (0.0, 0.0);
        for (score, is) in self.scores.iter().zip(&self.is_evidence) {
            all += of(*score);
            if *is {
                evidence += of(*score);
            }
        }
        (evidence, all)
    }

    /// Number of tokens ranked above the first of the evidence: probes needed.
    pub fn probes(&self) -> usize {
        let first = self.order.iter().position(|p| self.is_evidence(*p));
        first.unwrap_or(self.order.len())
    }

    /// `1 / rank` of the first token of the evidence; its mean is MRR.
    pub fn reciprocal_rank(&self) -> f64 {
        1.0 / (self.probes() + 1) as f64
    }

    /// PG_k: whether one of the `k` highest tokens belongs to the evidence.
    pub fn points_within(&self, k: usize) -> bool {
        self.probes() < k
    }

    /// RMA: the evidence's share of the positive scores, `Σ_G max(r, 0) / Σ max(r, 0)`; zero when
    /// no score is positive.
    pub fn relevance_mass(&self) -> f64 {
        let (evidence, all) = self.masses(|score| score.max(0.0));
        if all > 0.0 { evidence / all } else { 0.0 }
    }

    /// RRA: the share of the evidence among the `|G|` highest tokens.
    pub fn rank_accuracy(&self) -> f64 {
        let highest = self.order.iter().take(self.size);
        highest.filter(|p| self.is_evidence(**p)).count() as f64 / self.size as f64
    }

    /// Whether every token of the evidence has a positive score. This is our reading of the
    /// measure PTA, whose definition we have not seen.
    pub fn all_positive(&self) -> bool {
        let mut evidence = self.scores.iter().zip(&self.is_evidence);
        evidence.all(|(score, is)| !is || *score > 0.0)
    }

    /// The scores, divided by the sum of their absolute values, summed over the evidence: from −1
    /// to 1, zero when all scores are.
    pub fn dot_product(&self) -> f64 {
        let (_, length) = self.masses(f64::abs);
        let (evidence, _) = self.masses(|score| score);
        if length > 0.0 { evidence / length } else { 0.0 }
    }

    /// F1 of the `per_cent` of the tokens that are highest, beside the evidence: with `k` of the
    /// `n` tokens chosen, `k = round(n · per_cent / 100)` and at least one, of which `c` are of
    /// the evidence `G`,
    ///
    /// ```text
    /// F1 = 2 P R / (P + R) = 2 c / (k + |G|)     P = c / k,  R = c / |G|
    /// ```
    pub fn f1(&self, per_cent: usize) -> f64 {
        let count = (per_cent as f64 / 100.0 * self.order.len() as f64).round() as usize;
        let count = count.clamp(1, self.order.len().max(1));
        let highest = self.order.iter().take(count);
        let common = highest.filter(|p| self.is_evidence(**p)).count();
        2.0 * common as f64 / (count + self.size) as f64
    }

    /// All measures, PG_k for `k` of 1 and of [`Agreement::POINTED`].
    pub fn agreement(&self) -> Agreement {
        let yes = |whether: bool| f64::from(u8::from(whether));
        Agreement {
            reciprocal_rank: self.reciprocal_rank(),
            relevance_mass: self.relevance_mass(),
            pointing: yes(self.points_within(1)),
            pointing_within: yes(self.points_within(Agreement::POINTED)),
            rank_accuracy: self.rank_accuracy(),
            all_positive: yes(self.all_positive()),
            dot_product: self.dot_product(),
            probes: self.probes() as f64,
        }
    }
}

/// Every measure of one sample, as numbers whose means are the published measures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// MRR.
    pub reciprocal_rank: f64,
    /// RMA.
    pub relevance_mass: f64,
    /// PG_1.
    pub pointing: f64,
    /// PG_3.
    pub pointing_within: f64,
    /// RRA.
    pub rank_accuracy: f64,
    /// PTA in our reading: every token of the evidence has a positive score.
    pub all_positive: f64,
    /// Normalised dot product.
    pub dot_product: f64,
    /// Probes needed.
    pub probes: f64,
}

impl Agreement {
    /// The larger `k` of the pointing game.
    pub const POINTED: usize = 3;

    /// Names of the measures, in the order of [`values`](Self::values).
    pub const NAMES: [&'static str; 8] = [
        "MRR",
        "RMA",
        "PG_1",
        "PG_3",
        "RRA",
        "PTA (our reading)",
        "dot product",
        "probes needed",
    ];

    /// Judges `scores` against `evidence` by every measure.
    ///
    /// ```
    /// use lapidary_explain::faithfulness::agreement::Agreement;
    ///
    /// let agreement = Agreement::of(&[0.1, 0.6, 0.3], &[2])?;
    /// assert_eq!(agreement.reciprocal_rank, 0.5);
    /// # Ok::<(), lapidary_explain::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Judged::new`].
    pub fn of(scores: &[f64], evidence: &[usize]) -> Result<Self> {
        Ok(Judged::new(scores, evidence)?.agreement())
    }

    /// The measures in the order of [`NAMES`](Self::NAMES).
    pub fn values(&self) -> [f64; 8] {
        [
            self.reciprocal_rank,
            self.relevance_mass,
            self.pointing,
            self.pointing_within,
            self.rank_accuracy,
            self.all_positive,
            self.dot_product,
            self.probes,
        ]
    }
}

/// F1 of the highest tokens beside the evidence, over samples and for shares of the tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EvidenceF1 {
    /// F1 at each of [`EvidenceF1::SHARES`].
    pub points: Vec<Summary>,
    /// Each sample's mean over the shares.
    pub mean: Summary,
    /// The share, in per cent, whose mean over samples is the largest, of equal ones the smallest.
    pub best_share: usize,
    /// F1 there.
    pub best: Summary,
}

impl EvidenceF1 {
    /// Per cent of the tokens that are chosen.
    pub const SHARES: [usize; 8] = [10, 20, 30, 40, 50, 60, 70, 80];

    /// One sample's F1 at each share.
    ///
    /// # Errors
    /// As [`Judged::new`].
    pub fn of(scores: &[f64], evidence: &[usize]) -> Result<[f64; 8]> {
        let judged = Judged::new(scores, evidence)?;
        Ok(Self::SHARES.map(|share| judged.f1(share)))
    }

    /// The curve over samples.
    ///
    /// ```
    /// use lapidary_explain::faithfulness::agreement::EvidenceF1;
    ///
    /// // One of ten tokens decides, and is the highest.
    /// let mut scores = [0.0; 10];
    /// scores[4] = 1.0;
    /// let curve = EvidenceF1::over(&[EvidenceF1::of(&scores, &[4])?]);
    /// assert_eq!((curve.best_share, curve.best.mean), (10, 1.0));
    /// assert_eq!(curve.points[1].mean, 2.0 / 3.0);
    /// # Ok::<(), lapidary_explain::Error>(())
    /// ```
    pub fn over(samples: &[[f64; 8]]) -> Self {
        let at = |index: usize| {
            let each = samples.iter().filter_map(|sample| sample.get(index));
            Summary::of(each.copied())
        };
        let points: Vec<Summary> = (0..Self::SHARES.len()).map(at).collect();
        let mean = |sample: &[f64; 8]| sample.iter().sum::<f64>() / sample.len() as f64;
        let mut curve = Self {
            mean: Summary::of(samples.iter().map(mean)),
            ..Self::default()
        };
        for (share, point) in Self::SHARES.iter().zip(&points) {
            if curve.best_share == 0 || point.mean > curve.best.mean {
                (curve.best_share, curve.best) = (*share, *point);
            }
        }
        curve.points = points;
        curve
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_of_a_ranking_written_out() {
        // Ranking 3, 1, 0, 4, 2 of five tokens; the evidence is 1 and 2. The counts chosen are
        // 1 (0.5 rounds to 1), 1, 2 (1.5), 2, 3 (2.5), 3, 4 (3.5), 4.
        let found = EvidenceF1::of(&[0.2, 0.3, -0.4, 0.5, 0.0], &[1, 2]).unwrap();
        let expected = [0.0, 0.0, 0.5, 0.5, 0.4, 0.4, 1.0 / 3.0, 1.0 / 3.0];
        assert_eq!(found, expected);
        let curve = EvidenceF1::over(&[found, [0.0; 8]]);
        assert_eq!((curve.best_share, curve.best.mean), (30, 0.25));
        let mean = expected.iter().sum::<f64>() / 16.0;
        assert!((curve.mean.mean - mean).abs() < 1e-15);
        assert_eq!((curve.mean.count, curve.points.len()), (2, 8));
    }

    #[test]
    fn f1_is_the_harmonic_mean_of_precision_and_recall() {
        let scores = [0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.0, 0.5, 0.4];
        let evidence = [0, 3, 4];
        let judged = Judged::new(&scores, &evidence).unwrap();
        for (share, chosen) in [(10, 1), (30, 3), (80, 8)] {
            let mut order: Vec<usize> = (0..10).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            let common = order[..chosen]
                .iter()
                .filter(|p| evidence.contains(p))
                .count() as f64;
            let (precision, recall) = (common / chosen as f64, common / 3.0);
            let expected = 2.0 * precision * recall / (precision + recall);
            assert!((judged.f1(share) - expected).abs() < 1e-15);
        }
        assert_eq!(EvidenceF1::over(&[]).best_share, 10);
    }

    #[test]
    fn measures_of_a_ranking_written_out() {
        // Ranking: 3 (0.5), 1 (0.3), 0 (0.2), 4 (0), 2 (-0.4); the evidence is 1 and 2.
        let agreement = Agreement::of(&[0.2, 0.3, -0.4, 0.5, 0.0], &[1, 2]).unwrap();
        let expected = [
            0.5, // second
            0.3, // 0.3 of the positive 1.0
            0.0,
            1.0,
            0.5,        // of the first two, one
            0.0,        // token 2 is negative
            -0.1 / 1.4, // 0.3 − 0.4
            1.0,
        ];
        for ((name, value), expected) in Agreement::NAMES
            .iter()
            .zip(agreement.values())
            .zip(expected)
        {
            assert!((value - expected).abs() < 1e-12, "{name}: {value}");
        }
    }

    #[test]
    fn perfect_scores_are_perfect() {
        let agreement = Agreement::of(&[0.0, 2.0, 1.0, 0.0], &[1, 2]).unwrap();
        assert_eq!(agreement.values(), [1., 1., 1., 1., 1., 1., 1., 0.]);
    }

    #[test]
    fn scores_that_tell_nothing_apart_rank_the_evidence_last() {
        let agreement = Agreement::of(&[0.0, -0.0, 0.0, -0.0], &[0, 2]).unwrap();
        // Third of four; no mass, nothing positive.
        assert_eq!(
            agreement.values(),
            [1.0 / 3.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0]
        );
    }

    #[test]
    fn what_cannot_be_judged_is_refused() {
        let message = |scores: &[f64], evidence: &[usize]| {
            Agreement::of(scores, evidence).unwrap_err().to_string()
        };
        assert!(message(&[1.0], &[]).contains("empty"));
        assert!(message(&[1.0], &[1]).contains("below 1"));
        assert!(message(&[f64::NAN], &[0]).contains("NaN"));
    }

    #[test]
    fn evidence_may_name_a_token_twice() {
        assert_eq!(
            Agreement::of(&[0.2, 0.1], &[0, 0]).unwrap(),
            Agreement::of(&[0.2, 0.1], &[0]).unwrap()
        );
    }
}
