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
use crate::relevance::AttentionRule;
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

impl SelectiveScan {
    fn check(&self, x: &Tensor) -> Result<()> {
        let (batch, length, channels) = tensor(x.dims3())?;
        let (_, states) = tensor(self.rate.dims2())?;
        let same = |what: &str, found: &Tensor, expected: &[usize]| {
            if found.dims() == expected {
                return Ok(());
            }
            Err(Error::invalid(
                format!("shape of the recurrence's {what}"),
                found.dims(),
                format!("{expected:?}"),
            ))
        };
        if length == 0 {
            return Err(Error::invalid("length of the recurrence", 0, "at least 1"));
        }
        same("step", &self.step, &[batch, length, channels])?;
        same("rate", &self.rate, &[channels, states])?;
        same("entry", &self.entry, &[batch, length, states])?;
        same("exit", &self.exit, &[batch, length, states])?;
        match &self.initial {
            Some(initial) => same("initial state", initial, &[batch, channels, states]),
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
    /// Under the streams lens it is the value alone, and under relevance it is detached (Jafari
    /// et al., MambaLRP, arXiv 2406.07592) unless attention's rule is the gradient.
    pub fn for_selection(&self) -> Self {
        match &self.lens {
            Lens::Streams(_) => Self::from(self.value.clone()),
            Lens::Relevance(rules) if rules.attention != AttentionRule::Gradient => {
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
        scan.check(&self.value)?;
        let initial = scan.initial.as_ref();
        let Lens::Streams(_) = &self.lens else {
            let (value, state) = scan.run_one(&self.value, initial)?;
            self.count_scan(scan, &value);
            return Ok((self.carry(value), state));
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
        let mut y = self.linear_map(value, &each, |_| None)?;
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
