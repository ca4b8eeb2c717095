//! The selective recurrence of state-space models, each under every lens.
//!
//! A channel holds a state `h` that decays, takes the token in and is read out, all three by
//! weights that are computed from the token itself (Gu & Dao, Mamba, arXiv 2312.00752):
//!
//! `h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_t`, `y_t = h_t · C_t`
//!
//! With the weights `Δ`, `B`, `C` held fixed this is linear in `x`, which is what streams and
//! relevance need: the recurrence is to them what attention with frozen weights is.

use crate::error::tensor;
use crate::meter::bytes_of;
use crate::relevance::{AttentionRule, Form};
use crate::streams::Change;
use crate::{Error, Lens, Result, Signal};
use lapidary_kernels::{Activation, Tensor, activate, linear_scan};

/// Positions whose states `[batch, positions, channels, states]` are held at one time.
const CHUNK: usize = 64;

/// The weights of a selective recurrence.
#[derive(Clone, Debug)]
pub struct SelectiveScan {
    /// Step sizes `Δ`, `[batch, length, channels]`.
    pub step: Tensor,
    /// Rates `A`, negative for a state that decays, `[channels, states]`.
    pub rate: Tensor,
    /// How a token enters the state: `B`, `[batch, length, states]`.
    pub entry: Tensor,
    /// How the state is read out: `C`, `[batch, length, states]`.
    pub exit: Tensor,
    /// The state before the first position, `[batch, channels, states]`; zero when absent.
    pub initial: Option<Tensor>,
}

/// Refuses what a recurrence is given in another shape.
pub(crate) fn expect_shape(what: &str, found: &Tensor, expected: &[usize]) -> Result<()> {
    if found.dims() == expected {
        return Ok(());
    }
    Err(Error::invalid(
        format!("shape of the recurrence's {what}"),
        found.dims(),
        format!("{expected:?}"),
    ))
}

impl SelectiveScan {
    fn check(&self, x: &Tensor) -> Result<()> {
        let (batch, length, channels) = tensor(x.dims3())?;
        let (_, states) = tensor(self.rate.dims2())?;
        if length == 0 {
            return Err(Error::invalid("length of the recurrence", 0, "at least 1"));
        }
        expect_shape("step", &self.step, &[batch, length, channels])?;
        expect_shape("rate", &self.rate, &[channels, states])?;
        expect_shape("entry", &self.entry, &[batch, length, states])?;
        expect_shape("exit", &self.exit, &[batch, length, states])?;
        match &self.initial {
            Some(initial) => expect_shape("initial state", initial, &[batch, channels, states]),
            None => Ok(()),
        }
    }

    /// Runs the recurrence over each of `inputs` `[batch, length, channels]`, whose decays are
    /// the same and are computed once. Gives the outputs and the last states.
    fn run(&self, inputs: &[Tensor], initial: Option<&Tensor>) -> Result<Vec<(Tensor, Tensor)>> {
        let (_, length, _) = tensor(self.step.dims3())?;
        let mut outputs = vec![Vec::new(); inputs.len()];
        let mut states = vec![initial.cloned(); inputs.len()];
        for start in (0..length).step_by(CHUNK) {
            let count = CHUNK.min(length - start);
            let here = |t: &Tensor| tensor(t.narrow(1, start, count));
            // [batch, count, channels, states]
            let step = here(&self.step)?;
            let exponent = tensor(tensor(step.unsqueeze(3))?.broadcast_mul(&self.rate))?;
            let decay = activate(&exponent, Activation::Exp)?;
            let entry = tensor(here(&self.entry)?.unsqueeze(2))?;
            let exit = tensor(tensor(here(&self.exit)?.unsqueeze(3))?.contiguous())?;
            for ((x, output), state) in inputs.iter().zip(&mut outputs).zip(&mut states) {
                let stepped = tensor(here(x)? * &step)?;
                let entering = tensor(tensor(stepped.unsqueeze(3))?.broadcast_mul(&entry))?;
                let passed = tensor(linear_scan(&decay, &entering, state.as_ref())?.contiguous())?;
                output.push(tensor(tensor(passed.matmul(&exit))?.squeeze(3))?);
                let last = tensor(tensor(passed.narrow(1, count - 1, 1))?.squeeze(1))?;
                // Laid out anew, so that the chunk's states are not kept alive by a view.
                *state = Some(tensor(last.force_contiguous())?);
            }
        }
        let mut results = Vec::with_capacity(inputs.len());
        for (output, state) in outputs.into_iter().zip(states) {
            let state = state
                .ok_or_else(|| Error::invalid("length of the recurrence", length, "at least 1"))?;
            results.push((tensor(Tensor::cat(&output, 1))?, state));
        }
        Ok(results)
    }

    fn run_one(&self, x: &Tensor, initial: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let mut results = self.run(std::slice::from_ref(x), initial)?;
        results
            .pop()
            .ok_or_else(|| Error::invalid("outputs of the recurrence", 0, "one"))
    }
}

impl Signal {
    /// What feeds the selective weights of a recurrence, or the router of a mixture: how the
    /// tokens are treated, not what they carry.
    ///
    /// Under the streams and contextual lenses it is the value alone, and under relevance it is detached (Jafari
    /// et al., MambaLRP, arXiv 2406.07592) unless attention's rule is the gradient of a modified
    /// gradient.
    pub fn for_selection(&self) -> Self {
        match &self.lens {
            Lens::Streams(_) | Lens::Contextual(_) => Self::from(self.value.clone()),
            Lens::Relevance(rules)
                if rules.attention != AttentionRule::Gradient || rules.form == Form::Explicit =>
            {
                self.carry(self.value.detach())
            }
            _ => self.clone(),
        }
    }

    /// The selective recurrence over this signal `[batch, length, channels]`, with its last
    /// state `[batch, channels, states]`.
    ///
    /// Under the streams lens an initial state is a constant, shared like a bias. States are
    /// held for a few positions at a time, unless the backward pass needs them.
    pub fn selective_scan(&self, scan: &SelectiveScan) -> Result<(Self, Tensor)> {
        if let Lens::Contextual(_) = &self.lens {
            return Self::contextual_recurrence("selective_scan");
        }
        scan.check(&self.value)?;
        let initial = scan.initial.as_ref();
        let Lens::Streams(_) = &self.lens else {
            let mut state = None;
            let value = self.mapped_value(|value| {
                let (value, last) = scan.run_one(value, initial)?;
                state = Some(last);
                Ok(value)
            })?;
            let state =
                state.ok_or_else(|| Error::invalid("outputs of the recurrence", "none", "one"))?;
            self.count_scan(scan, &value);
            return Ok((self.computed(value)?, state));
        };
        let (value, mut state) = scan.run_one(&self.value, None)?;
        let each = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(scan.run_one(t, None)?.0);
            }
            let mut streams = Vec::with_capacity(t.dims()[0]);
            for stream in 0..t.dims()[0] {
                streams.push(tensor(t.get(stream))?);
            }
            let outputs: Vec<Tensor> = scan
                .run(&streams, None)?
                .into_iter()
                .map(|(output, _)| output)
                .collect();
            tensor(Tensor::stack(&outputs, 0))
        };
        let mut y = self.linear_map(&self.value, value, Change::Other, &each, |_| None)?;
        if initial.is_some() {
            let (remembered, rest) = scan.run_one(&tensor(self.value.zeros_like())?, initial)?;
            y = y.add_constant(&remembered)?;
            state = tensor(state + rest)?;
        }
        Ok((y, state))
    }

    /// Per position and channel: `Δ x`, and for each state the decay's product and exponential,
    /// the entry, a multiply-add of the recurrence and one of the read-out.
    fn count_scan(&self, scan: &SelectiveScan, output: &Tensor) {
        if let Lens::Meter(meter, _) = &self.lens {
            let states = scan.rate.dims()[1] as u64;
            let operands = [&self.value, &scan.step, &scan.entry, &scan.exit, output];
            meter.count(
                output.elem_count() as u64 * (1 + 7 * states),
                operands.iter().map(|t| bytes_of(t)).sum(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relevance::RelevanceRules;
    use crate::streams::{Partition, StreamRules};
    use lapidary_kernels::{Device, Var};

    const BATCH: usize = 2;
    /// Two whole chunks and part of a third.
    const LENGTH: usize = 2 * CHUNK + 5;
    const CHANNELS: usize = 3;
    const STATES: usize = 2;

    fn wave(shape: &[usize], frequency: f64) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|i| (i as f64 * frequency).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn example(initial: bool) -> (Tensor, SelectiveScan) {
        let scan = SelectiveScan {
            step: (wave(&[BATCH, LENGTH, CHANNELS], 0.7).abs().unwrap() * 0.1).unwrap(),
            rate: (wave(&[CHANNELS, STATES], 1.3).abs().unwrap() * -1.0).unwrap(),
            entry: wave(&[BATCH, LENGTH, STATES], 0.9),
            exit: wave(&[BATCH, LENGTH, STATES], 0.4),
            initial: initial.then(|| wave(&[BATCH, CHANNELS, STATES], 2.1)),
        };
        (wave(&[BATCH, LENGTH, CHANNELS], 0.31), scan)
    }

    /// The two equations, one number at a time.
    fn by_loops(x: &Tensor, scan: &SelectiveScan) -> Vec<f64> {
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (x, step, rate) = (flat(x), flat(&scan.step), flat(&scan.rate));
        let (entry, exit) = (flat(&scan.entry), flat(&scan.exit));
        let initial = scan.initial.as_ref().map(flat);
        let mut y = vec![0.0; x.len()];
        for b in 0..BATCH {
            for c in 0..CHANNELS {
                for s in 0..STATES {
                    let index = (b * CHANNELS + c) * STATES + s;
                    let mut h = initial.as_ref().map_or(0.0, |initial| initial[index]);
                    for t in 0..LENGTH {
                        let at = (b * LENGTH + t) * CHANNELS + c;
                        let weight = (b * LENGTH + t) * STATES + s;
                        h = (step[at] * rate[c * STATES + s]).exp() * h
                            + step[at] * x[at] * entry[weight];
                        y[at] += h * exit[weight];
                    }
                }
            }
        }
        y
    }

    fn assert_near(found: &Tensor, expected: &[f64]) {
        let found = found.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn chunks_equal_the_recurrence_number_by_number() {
        for initial in [false, true] {
            let (x, scan) = example(initial);
            let (y, _) = Signal::from(x.clone()).selective_scan(&scan).unwrap();
            assert_near(y.value(), &by_loops(&x, &scan));
        }
    }

    #[test]
    fn the_last_state_continues_the_recurrence() {
        let (x, scan) = example(true);
        let expected = by_loops(&x, &scan);
        let part = |t: &Tensor, start, count| t.narrow(1, start, count).unwrap();
        let cut = |start, count, initial| SelectiveScan {
            step: part(&scan.step, start, count),
            rate: scan.rate.clone(),
            entry: part(&scan.entry, start, count),
            exit: part(&scan.exit, start, count),
            initial,
        };
        let first = Signal::from(part(&x, 0, 70));
        let (a, state) = first
            .selective_scan(&cut(0, 70, scan.initial.clone()))
            .unwrap();
        let second = Signal::from(part(&x, 70, LENGTH - 70));
        let (b, _) = second
            .selective_scan(&cut(70, LENGTH - 70, Some(state)))
            .unwrap();
        let whole = Tensor::cat(&[a.value(), b.value()], 1).unwrap();
        assert_near(&whole, &expected);
    }

    #[test]
    fn streams_sum_to_the_value_with_a_state_before_the_first_token() {
        for initial in [false, true] {
            let (x, scan) = example(initial);
            let streams = Signal::from(x.clone())
                .into_streams(Partition::positions(LENGTH), StreamRules::default())
                .unwrap();
            let (y, state) = streams.selective_scan(&scan).unwrap();
            let (plain, plain_state) = Signal::from(x).selective_scan(&scan).unwrap();
            let expected = plain.value().flatten_all().unwrap().to_vec1().unwrap();
            assert_near(&y.contributions().unwrap().sum(0).unwrap(), &expected);
            let expected = plain_state.flatten_all().unwrap().to_vec1().unwrap();
            assert_near(&state, &expected);
        }
    }

    /// The recurrence is linear in `x`, so `x ⊙ ∂y` sums to `y` where it starts from zero.
    #[test]
    fn the_gradient_reaches_back_over_chunks() {
        let (x, scan) = example(false);
        let x = Var::from_tensor(&x).unwrap();
        let signal = Signal::from(x.as_tensor().clone());
        let (y, _) = signal.selective_scan(&scan).unwrap();
        let last = y.value().narrow(1, LENGTH - 1, 1).unwrap();
        let last = last.sum_all().unwrap();
        let gradients = last.backward().unwrap();
        let gradient = gradients.get(x.as_tensor()).unwrap();
        let first = gradient.get(0).unwrap().get(0).unwrap(); // of each channel's first token
        assert!(first.to_vec1::<f64>().unwrap()[1] != 0.0);
        let sum = (gradient * x.as_tensor()).unwrap().sum_all().unwrap();
        let (sum, last) = (
            sum.to_scalar::<f64>().unwrap(),
            last.to_scalar::<f64>().unwrap(),
        );
        assert!((sum - last).abs() < 1e-12, "{sum} {last}");
    }

    #[test]
    fn selection_is_fixed_but_for_the_gradients_own_rules() {
        let leaf_moves = |rules| {
            let (signal, leaf) = Signal::from(wave(&[1, 2, 2], 1.0))
                .into_relevance(rules)
                .unwrap();
            let selected = signal.for_selection();
            let gradients = selected.value().sum_all().unwrap().backward().unwrap();
            gradients.get(leaf.as_tensor()).is_some()
        };
        assert!(!leaf_moves(RelevanceRules::value_only()));
        assert!(!leaf_moves(RelevanceRules::attention_aware()));
        assert!(leaf_moves(RelevanceRules::gradient_times_input()));
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (x, mut scan) = example(false);
        scan.entry = wave(&[BATCH, LENGTH, STATES + 1], 0.9);
        let error = Signal::from(x).selective_scan(&scan).unwrap_err();
        assert_eq!(
            error.to_string(),
            "shape of the recurrence's entry is [2, 133, 3], but must be [2, 133, 2]"
        );
    }
}
