//! Whether scores are true to the model: against evidence that is known to have caused the
//! prediction ([`agreement`]), by what the model loses when tokens are hidden ([`masking`]), and,
//! for images, by pixels ([`image`]).

pub mod agreement;
pub mod image;
pub mod masking;

use serde::Serialize;

/// A mean over samples, with its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// The mean; zero of nothing.
    pub mean: f64,
    /// Half of the width of Student's 95 % interval; zero of fewer than two samples, which tell
    /// nothing of their spread.
    pub half_width: f64,
    /// Number of samples.
    pub count: usize,
}

impl Summary {
    /// Summarises samples.
    ///
    /// ```
    /// use lapidary_explain::faithfulness::Summary;
    ///
    /// let summary = Summary::of([1.0, 2.0, 3.0]);
    /// assert_eq!((summary.mean, summary.count), (2.0, 3));
    /// ```
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let samples: Vec<f64> = samples.into_iter().collect();
        let count = samples.len();
        let mean = samples.iter().sum::<f64>() / count.max(1) as f64;
        let half_width = if count < 2 {
            0.0
        } else {
            let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
            let freedom = (count - 1) as f64;
            student(count - 1) * (squares / freedom / count as f64).sqrt()
        };
        Self {
            mean,
            half_width,
            count,
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = f.precision().unwrap_or(3);
        write!(f, "{:.digits$}", self.mean)?;
        if self.count > 1 {
            write!(f, " ± {:.digits$}", self.half_width)?;
        }
        Ok(())
    }
}

/// The 97.5 % quantile of Student's distribution.
fn student(freedom: usize) -> f64 {
    const SMALL: [f64; 10] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    ];
    // The normal quantile, and the first two terms of its expansion in 1 / freedom.
    const NORMAL: f64 = 1.959_964;
    freedom
        .checked_sub(1)
        .and_then(|index| SMALL.get(index).copied())
        .unwrap_or_else(|| {
            let inverse = 1.0 / freedom.max(1) as f64;
            let first = (NORMAL.powi(3) + NORMAL) / 4.0;
            let second = (5.0 * NORMAL.powi(5) + 16.0 * NORMAL.powi(3) + 3.0 * NORMAL) / 96.0;
            NORMAL + first * inverse + second * inverse * inverse
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_students() {
        // Mean 2, variance 1, three samples: 4.303 · √(1/3).
        let summary = Summary::of([1.0, 2.0, 3.0]);
        assert!((summary.half_width - 4.303 / 3f64.sqrt()).abs() < 1e-9);
        assert_eq!(Summary::of([5.0]).half_width, 0.0);
        assert_eq!(Summary::of([]), Summary::default());
    }

    #[test]
    fn quantiles_beyond_the_table_are_those_of_tables() {
        for (freedom, quantile) in [(11, 2.201), (20, 2.086), (30, 2.042), (120, 1.980)] {
            assert!((student(freedom) - quantile).abs() < 3e-3, "{freedom}");
        }
    }

    #[test]
    fn it_is_written_with_its_interval() {
        assert_eq!(format!("{:.2}", Summary::of([1.0])), "1.00");
        assert_eq!(
            format!("{:.2}", Summary::of([1.0, 2.0, 3.0])),
            "2.00 ± 2.48"
        );
    }
}
