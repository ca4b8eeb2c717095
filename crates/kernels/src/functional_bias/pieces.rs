//! A network of one number `t` as the straight pieces that it consists of.
//!
//! A unit of the first layer has a corner at `−bias / weight` and is on to one side of it. On a *stretch*, from one of
//! these corners to the next, what enters a unit of the second layer is a line, `slope · t + level`, and the unit has a
//! corner where that crosses zero. Between all these corners the outputs are lines. A layer maps lines to lines,
//!
//! ```text
//! line_m = (0, bias_m) + Σ_k on weight_mk · line_k
//! ```
//!
//! and with the gradients with respect to a line's slope and level, `∂line = (Σ g t, Σ g)` over the inputs that are on
//! it, `∂weight_mk = ∂line_m · line_k`, `∂line_k = Σ_m weight_mk ∂line_m`, both summed over where unit `k` is on.

use crate::simd::Real;
use std::ops::Range;

/// Units of a network's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Widths {
    pub(super) first: usize,
    /// The second hidden layer, if there is one.
    pub(super) second: Option<usize>,
    pub(super) outputs: usize,
}

/// `slope · t + level`, or the gradient with respect to the two.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Line {
    pub(super) slope: f64,
    pub(super) level: f64,
}

impl Line {
    fn level(level: f64) -> Self {
        Self { slope: 0.0, level }
    }

    fn at(self, t: f64) -> f64 {
        self.slope * t + self.level
    }

    /// Writes where it is at some inputs.
    #[inline(always)]
    pub(super) fn write<T: Real>(self, inputs: &[f64], to: &mut [T]) {
        for (y, t) in to.iter_mut().zip(inputs) {
            *y = T::of(Real::mul_add(self.slope, *t, self.level));
        }
    }

    #[inline(always)]
    pub(super) fn add(&mut self, other: Self, scale: f64) {
        self.slope += scale * other.slope;
        self.level += scale * other.level;
    }

    fn dot(self, other: Self) -> f64 {
        self.slope * other.slope + self.level * other.level
    }

    /// Where it crosses zero, if it does at a number.
    fn zero(self) -> Option<f64> {
        // A zero of either sign is one corner.
        let zero = -self.level / self.slope + 0.0;
        zero.is_finite().then_some(zero)
    }
}

fn add_all(sums: &mut [Line], lines: &[Line]) {
    for (sum, line) in sums.iter_mut().zip(lines) {
        sum.add(*line, 1.0);
    }
}

/// Weights `[output, input]` and biases `[output]`, or their gradients.
struct Layer {
    inputs: usize,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Layer {
    fn zeros_like(other: &Self) -> Self {
        Self {
            inputs: other.inputs,
            weight: vec![0.0; other.weight.len()],
            bias: vec![0.0; other.bias.len()],
        }
    }

    fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// The weights of one input.
    fn column(&self, input: usize) -> impl Iterator<Item = f64> {
        self.weight.iter().skip(input).step_by(self.inputs).copied()
    }

    /// The outputs' lines without any input.
    fn levels(&self) -> Vec<Line> {
        self.bias.iter().map(|bias| Line::level(*bias)).collect()
    }
}

/// The units of the first layer.
struct Units {
    /// Where units have corners, rising.
    corners: Vec<f64>,
    lines: Vec<Line>,
    /// The stretches on which a unit is on: those behind its corner, or those up to it.
    on: Vec<Range<usize>>,
}

impl Units {
    fn new(first: &Layer) -> Self {
        let pairs = first.weight.iter().zip(&first.bias);
        let lines: Vec<Line> = pairs
            .map(|(&slope, &level)| Line { slope, level })
            .collect();
        let mut corners: Vec<f64> = lines.iter().filter_map(|line| line.zero()).collect();
        corners.sort_by(f64::total_cmp);
        corners.dedup();
        let all = corners.len() + 1;
        let on = lines.iter().map(|line| match line.zero() {
            Some(zero) => {
                let before = corners.partition_point(|corner| *corner < zero);
                match line.slope > 0.0 {
                    true => before + 1..all,
                    false => 0..before + 1,
                }
            }
            None if line.level > 0.0 => 0..all,
            None => 0..0,
        });
        Self {
            on: on.collect(),
            corners,
            lines,
        }
    }

    fn stretches(&self) -> usize {
        self.corners.len() + 1
    }

    fn stretch(&self, stretch: usize) -> [f64; 2] {
        bounds(&self.corners, stretch)
    }

    /// Units that stay on to the right, from `stretch` on.
    fn on_from(&self, stretch: usize) -> impl Iterator<Item = usize> {
        let all = self.stretches();
        (0..self.on.len()).filter(move |&k| self.on[k].start == stretch && self.on[k].end == all)
    }

    /// Units that are on from the left, up to `stretch`, which is not the last.
    fn on_up_to(&self, stretch: usize) -> impl Iterator<Item = usize> {
        let end = if stretch + 1 < self.stretches() {
            stretch + 1
        } else {
            usize::MAX
        };
        (0..self.on.len()).filter(move |&k| self.on[k].end == end)
    }

    /// The lines `[stretch, output]` that a layer makes of those of the units.
    ///
    /// Units are added on the way from where they are on on every stretch to their corners, never taken away: where
    /// none is on, rounding leaves nothing of them.
    fn forward(&self, layer: &Layer) -> Vec<Line> {
        let (all, outputs) = (self.stretches(), layer.outputs());
        let mut lines = Vec::with_capacity(all * outputs);
        let mut sums = layer.levels();
        let add = |unit: usize, sums: &mut [Line]| {
            for (sum, weight) in sums.iter_mut().zip(layer.column(unit)) {
                sum.add(self.lines[unit], weight);
            }
        };
        for stretch in 0..all {
            for unit in self.on_from(stretch) {
                add(unit, &mut sums);
            }
            lines.extend_from_slice(&sums);
        }
        sums.fill(Line::default());
        for stretch in (0..all).rev() {
            for unit in self.on_up_to(stretch) {
                add(unit, &mut sums);
            }
            add_all(&mut lines[stretch * outputs..][..outputs], &sums);
        }
        lines
    }

    /// Gradients of the layer and of the units' lines, for those `[stretch, output]` of what it makes of them.
    fn backward(&self, layer: &Layer, slopes: &[Line]) -> (Layer, Vec<Line>) {
        let (all, outputs) = (self.stretches(), layer.outputs());
        let mut of_layer = Layer::zeros_like(layer);
        let mut of_lines = vec![Line::default(); self.lines.len()];
        let mut take = |unit: usize, sums: &[Line]| {
            for (output, (sum, weight)) in sums.iter().zip(layer.column(unit)).enumerate() {
                of_layer.weight[output * layer.inputs + unit] = sum.dot(self.lines[unit]);
                of_lines[unit].add(*sum, weight);
            }
        };
        let row = |stretch: usize| &slopes[stretch * outputs..][..outputs];
        let mut sums = vec![Line::default(); outputs];
        for stretch in 0..all {
            add_all(&mut sums, row(stretch));
            for unit in self.on_up_to(stretch) {
                take(unit, &sums);
            }
        }
        let total = sums.clone();
        sums.fill(Line::default());
        for stretch in (0..all).rev() {
            add_all(&mut sums, row(stretch));
            for unit in self.on_from(stretch) {
                take(unit, &sums);
            }
        }
        for (bias, sum) in of_layer.bias.iter_mut().zip(total) {
            *bias = sum.level;
        }
        (of_layer, of_lines)
    }
}

/// The ends of one of the intervals between numbers that rise.
#[inline(always)]
fn bounds(rising: &[f64], interval: usize) -> [f64; 2] {
    let before = interval
        .checked_sub(1)
        .and_then(|before| rising.get(before));
    [
        before.copied().unwrap_or(f64::NEG_INFINITY),
        rising.get(interval).copied().unwrap_or(f64::INFINITY),
    ]
}

/// A number within an interval.
fn within([low, high]: [f64; 2]) -> f64 {
    let number = match (low.is_finite(), high.is_finite()) {
        (true, true) => low + (high - low) / 2.0,
        (true, false) => low + (1.0 + low.abs()),
        (false, true) => high - (1.0 + high.abs()),
        (false, false) => 0.0,
    };
    number.clamp(f64::MIN, f64::MAX)
}

/// The second of two hidden layers.
struct Second {
    layer: Layer,
    /// What enters its units, `[stretch, unit]`.
    lines: Vec<Line>,
}

impl Second {
    /// Which units are on at `t`, with their lines.
    fn on(&self, stretch: usize, t: f64) -> impl Iterator<Item = (usize, Line)> {
        let units = self.layer.outputs();
        let lines = self.lines[stretch * units..][..units].iter().copied();
        lines.enumerate().filter(move |(_, line)| line.at(t) > 0.0)
    }
}

/// A network in pieces.
pub(super) struct Pieces {
    first: Units,
    second: Option<Second>,
    last: Layer,
    /// Where one piece ends and the next begins.
    knots: Vec<f64>,
    /// The stretch on which each piece lies.
    stretches: Vec<usize>,
    /// The outputs' lines `[piece, output]`.
    lines: Vec<Line>,
}

impl Pieces {
    /// Of a network whose layers' weights and biases lie one behind the other.
    pub(super) fn new(widths: Widths, numbers: &[f64]) -> Self {
        let mut rest = numbers;
        let mut layer = |inputs: usize, outputs: usize| {
            let (weight, behind) = rest.split_at(inputs * outputs);
            let (bias, behind) = behind.split_at(outputs);
            rest = behind;
            Layer {
                inputs,
                weight: weight.to_vec(),
                bias: bias.to_vec(),
            }
        };
        let first = Units::new(&layer(1, widths.first));
        match widths.second {
            None => Self::of_one(first, layer(widths.first, widths.outputs)),
            Some(second) => {
                let between = layer(widths.first, second);
                Self::of_two(first, between, layer(second, widths.outputs))
            }
        }
    }

    fn of_one(first: Units, last: Layer) -> Self {
        Self {
            second: None,
            knots: first.corners.clone(),
            stretches: (0..first.stretches()).collect(),
            lines: first.forward(&last),
            first,
            last,
        }
    }

    fn of_two(first: Units, layer: Layer, last: Layer) -> Self {
        let second = Second {
            lines: first.forward(&layer),
            layer,
        };
        let units = second.layer.outputs();
        let (mut knots, mut stretches, mut lines) = (vec![], vec![], vec![]);
        for stretch in 0..first.stretches() {
            let [low, high] = first.stretch(stretch);
            let entering = second.lines[stretch * units..][..units].iter();
            let zeros = entering.filter_map(|line| line.zero());
            let mut corners: Vec<f64> = zeros.filter(|zero| low < *zero && *zero < high).collect();
            corners.sort_by(f64::total_cmp);
            corners.dedup();
            for piece in 0..=corners.len() {
                let [start, end] = bounds(&corners, piece);
                let middle = within([start.max(low), end.min(high)]);
                let mut outputs = last.levels();
                for (unit, line) in second.on(stretch, middle) {
                    for (output, weight) in outputs.iter_mut().zip(last.column(unit)) {
                        output.add(line, weight);
                    }
                }
                lines.extend(outputs);
                stretches.push(stretch);
            }
            knots.extend(corners);
            knots.extend(first.corners.get(stretch));
        }
        Self {
            first,
            second: Some(second),
            last,
            knots,
            stretches,
            lines,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.stretches.len()
    }

    pub(super) fn outputs(&self) -> usize {
        self.last.outputs()
    }

    /// The piece on which `t` lies: that to the right where it lies on a knot.
    #[inline(always)]
    pub(super) fn of(&self, t: f64) -> usize {
        self.knots.partition_point(|knot| *knot <= t)
    }

    /// [`Self::of`], quicker where that is one of three pieces.
    #[inline(always)]
    pub(super) fn of_near(&self, t: f64, near: usize) -> usize {
        let holds = |piece: usize| {
            let [low, high] = self.bounds(piece);
            low <= t && t < high
        };
        if holds(near) {
            near
        } else if near > 0 && holds(near - 1) {
            near - 1
        } else if near + 1 < self.count() && holds(near + 1) {
            near + 1
        } else {
            self.of(t)
        }
    }

    /// Where a piece begins, and where it has ended.
    #[inline(always)]
    pub(super) fn bounds(&self, piece: usize) -> [f64; 2] {
        bounds(&self.knots, piece)
    }

    #[inline(always)]
    pub(super) fn line(&self, piece: usize, output: usize) -> Line {
        self.lines[piece * self.outputs() + output]
    }

    /// The gradients of all weights and biases, as they lie, for those `[piece, output]` of the lines.
    pub(super) fn backward(&self, slopes: &[Line]) -> Vec<f64> {
        let (of_first, inner) = match &self.second {
            None => {
                let (of_last, of_first) = self.first.backward(&self.last, slopes);
                (of_first, vec![of_last])
            }
            Some(second) => {
                let (of_last, entering) = self.backward_of_last(second, slopes);
                let (of_second, of_first) = self.first.backward(&second.layer, &entering);
                (of_first, vec![of_second, of_last])
            }
        };
        let mut all: Vec<f64> = of_first.iter().map(|line| line.slope).collect();
        all.extend(of_first.iter().map(|line| line.level));
        for layer in inner {
            all.extend(layer.weight);
            all.extend(layer.bias);
        }
        all
    }

    /// The gradients of the last of three layers, and of what enters the second's units, `[stretch, unit]`.
    fn backward_of_last(&self, second: &Second, slopes: &[Line]) -> (Layer, Vec<Line>) {
        let (units, outputs) = (second.layer.outputs(), self.outputs());
        let mut of_last = Layer::zeros_like(&self.last);
        let mut entering = vec![Line::default(); second.lines.len()];
        for (piece, &stretch) in self.stretches.iter().enumerate() {
            let slopes = &slopes[piece * outputs..][..outputs];
            // Most pieces of a wide network have no input.
            if slopes.iter().all(|slope| *slope == Line::default()) {
                continue;
            }
            for (bias, slope) in of_last.bias.iter_mut().zip(slopes) {
                *bias += slope.level;
            }
            for (unit, line) in second.on(stretch, within(self.bounds(piece))) {
                let into = &mut entering[stretch * units + unit];
                for (output, (slope, weight)) in
                    slopes.iter().zip(self.last.column(unit)).enumerate()
                {
                    of_last.weight[output * units + unit] += slope.dot(line);
                    into.add(*slope, weight);
                }
            }
        }
        (of_last, entering)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `|t − 1|` by one hidden layer, then `max(|t − 1| − ½, 0)` by two.
    #[test]
    fn corners_lie_where_units_begin() {
        let apart = [1.0, -1.0, -1.0, 1.0];
        let widths = |second| Widths {
            first: 2,
            second,
            outputs: 1,
        };
        let one = Pieces::new(widths(None), &[&apart[..], &[1.0, 1.0, 0.0]].concat());
        assert_eq!(one.knots, [1.0]);
        let slopes = |pieces: &Pieces| -> Vec<f64> {
            let lines = (0..pieces.count()).map(|piece| pieces.line(piece, 0));
            lines.map(|line| line.slope).collect()
        };
        assert_eq!(slopes(&one), [-1.0, 1.0]);
        let above = [1.0, 1.0, -0.5, 1.0, 0.0];
        let two = Pieces::new(widths(Some(1)), &[&apart[..], &above].concat());
        assert_eq!(two.knots, [0.5, 1.0, 1.5]);
        assert_eq!(slopes(&two), [-1.0, 0.0, 0.0, 1.0]);
        assert_eq!([0.4, 0.5, 1.5, f64::NAN].map(|t| two.of(t)), [0, 1, 3, 0]);
    }

    /// Where all units are off, what is left is the bias alone.
    #[test]
    fn units_that_are_off_leave_nothing_over() {
        let slopes = [-0.1, -0.7, -1.3];
        let levels = [0.3, 0.2, 0.1];
        let weights = [0.1, 1.0 / 3.0, 0.7];
        let widths = Widths {
            first: 3,
            second: None,
            outputs: 1,
        };
        let numbers = [&slopes[..], &levels, &weights, &[0.25]].concat();
        let pieces = Pieces::new(widths, &numbers);
        let last = pieces.line(pieces.of(10.0), 0);
        assert_eq!(last, Line::level(0.25));
    }
}
