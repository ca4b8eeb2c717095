//! The line a person sees.

use std::time::Instant;

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

/// A line with the step, the loss, tokens per second and the time left, on standard error; nothing
/// at all when that is not a terminal.
pub struct Progress {
    bar: ProgressBar,
    rate: TokenRate,
}

impl Progress {
    /// A line for a run that goes from step `start` to `steps`.
    pub fn new(start: u64, steps: u64) -> Self {
        let bar = ProgressBar::new(steps).with_position(start);
        let template = "{bar:24} {pos}/{len}  {msg}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        Self {
            bar,
            rate: TokenRate::new(Instant::now()),
        }
    }

    /// A step has been done, with this loss, over this many tokens.
    pub fn step(&mut self, step: u64, loss: f64, tokens: u64) {
        let rate = self.rate.update(Instant::now(), tokens);
        self.bar.set_message(format!(
            "loss {loss:.4}  {} tokens/s",
            HumanCount(rate as u64)
        ));
        self.bar.set_position(step);
    }

    /// The smoothed tokens per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.rate.smoothed
    }

    /// Writes a line above the progress line.
    pub fn note(&self, text: &str) {
        self.bar.println(text);
    }

    /// Removes the line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Tokens per second, averaged over about the last ten seconds.
struct TokenRate {
    last: Instant,
    smoothed: f64,
    weight: f64,
}

impl TokenRate {
    const SECONDS: f64 = 10.0;

    fn new(now: Instant) -> Self {
        Self {
            last: now,
            smoothed: 0.0,
            weight: 0.0,
        }
    }

    fn update(&mut self, now: Instant, tokens: u64) -> f64 {
        let seconds = now.duration_since(self.last).as_secs_f64().max(1e-9);
        self.last = now;
        let kept = self.weight * (-seconds / Self::SECONDS).exp();
        let added = 1.0 - (-seconds / Self::SECONDS).exp();
        self.smoothed = (kept * self.smoothed + added * tokens as f64 / seconds) / (kept + added);
        self.weight = kept + added;
        self.smoothed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_steady_rate_is_reported_from_the_first_step_on() {
        let start = Instant::now();
        let mut rate = TokenRate::new(start);
        for step in 1..50 {
            let now = start + Duration::from_millis(200 * step);
            assert!((rate.update(now, 1000) - 5000.0).abs() < 1e-6);
        }
    }

    #[test]
    fn the_rate_follows_a_change() {
        let start = Instant::now();
        let mut rate = TokenRate::new(start);
        let mut last = 0.0;
        for second in 1..=60 {
            let tokens = if second <= 20 { 100 } else { 300 };
            last = rate.update(start + Duration::from_secs(second), tokens);
        }
        assert!((last - 300.0).abs() < 10.0, "{last}");
    }

    #[test]
    fn nothing_is_drawn_where_there_is_no_terminal() {
        let mut progress = Progress::new(5, 10);
        progress.step(6, 1.25, 512);
        assert!(progress.tokens_per_second() > 0.0);
        if !std::io::IsTerminal::is_terminal(&std::io::stderr()) {
            assert!(progress.bar.is_hidden());
        }
        progress.finish();
    }
}
