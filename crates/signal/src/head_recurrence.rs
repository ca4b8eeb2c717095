//! The recurrence of Mamba-2, whose state decays by one number for each head (Dao & Gu,
//! Transformers are SSMs, 2024, arXiv 2405.21060):
//!
//! `h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ`, `y_t = C_tᵀ h_t`, with `h` `[states, width]`
//!
//! Written out it is attention without a softmax, with a mask that fades (the paper's duality):
//!
//! `y_t = Σ_{s ≤ t} e^{A (Δ_{s+1} + … + Δ_t)} (C_t · B_s) Δ_s x_s`
//!
//! so that positions of a chunk meet each other in products of matrices, and what came before the
//! chunk is read from the state. A chunk of one position is the recurrence, one of all positions
//! the lower-triangular matrix. With `Δ`, `B` and `C` held fixed it is linear in `x`.

use crate::error::tensor;
use crate::meter::bytes_of;
use crate::recurrence::expect_shape;
use crate::streams::Change;
use crate::{Error, Lens, Result, Signal};
use lapidary_kernels::{
    Direction, Tensor, add, cumulative_sum, linear_attention_in_chunks, matmul, naive,
    operations_in_chunks,
};

/// The weights of a recurrence with one decay for each head.
///
/// ```
/// use lapidary_kernels::{Device, Tensor};
/// use lapidary_signal::{HeadScan, Signal};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // One head of one channel, whose state halves from position to position.
/// let ones = |shape: [usize; 4]| Tensor::from_vec(vec![1f64; 3], shape.as_slice(), &Device::Cpu);
/// let scan = HeadScan {
///     step: ones([1, 1, 3, 1])?.squeeze(3)?,
///     rate: Tensor::new(&[0.5f64.ln()], &Device::Cpu)?,
///     entry: ones([1, 1, 3, 1])?,
///     exit: ones([1, 1, 3, 1])?,
///     initial: None,
///     chunk: 2,
/// };
/// let x = Tensor::new(&[[[[4f64], [0.0], [2.0]]]], &Device::Cpu)?; // [batch, heads, length, width]
/// let y = Signal::from(x).head_scan(&scan)?.into_value();
/// for (found, expected) in y.flatten_all()?.to_vec1::<f64>()?.iter().zip([4.0, 2.0, 3.0]) {
///     assert!((found - expected).abs() < 1e-6);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct HeadScan {
    /// Step sizes `Δ`, `[batch, heads, length]`.
    pub step: Tensor,
    /// Rates `A`, negative for a state that decays, `[heads]`.
    pub rate: Tensor,
    /// How a token enters the state: `B`, `[batch, groups, length, states]`; heads share groups.
    pub entry: Tensor,
    /// How the state is read out: `C`, `[batch, groups, length, states]`.
    pub exit: Tensor,
    /// The state before the first position, `[batch, heads, states, width]`; zero when absent.
    pub initial: Option<Tensor>,
    /// Positions that meet each other directly.
    pub chunk: usize,
}

impl HeadScan {
    fn check(&self, x: &Tensor) -> Result<()> {
        let (batch, heads, length, width) = tensor(x.dims4())?;
        let (_, groups, _, states) = tensor(self.entry.dims4())?;
        if length == 0 {
            return Err(Error::invalid("length of the recurrence", 0, "at least 1"));
        }
        if groups == 0 || !heads.is_multiple_of(groups) {
            let expected = format!("a divisor of its {heads} heads");
            return Err(Error::invalid("groups of the recurrence", groups, expected));
        }
        expect_shape("step", &self.step, &[batch, heads, length])?;
        expect_shape("rate", &self.rate, &[heads])?;
        expect_shape("entry", &self.entry, &[batch, groups, length, states])?;
        expect_shape("exit", &self.exit, &[batch, groups, length, states])?;
        match &self.initial {
            Some(initial) => expect_shape("initial state", initial, &[batch, heads, states, width]),
            None => Ok(()),
        }
    }

    /// Logarithms of the decays, `Δ A`, `[batch, heads, length]`.
    fn decay(&self) -> Result<Tensor> {
        tensor(self.step.broadcast_mul(&tensor(self.rate.unsqueeze(1))?))
    }

    fn heads(&self) -> Result<usize> {
        tensor(self.rate.dim(0))
    }

    /// `Δ B`, `[batch, heads, length, states]`.
    fn keys(&self) -> Result<Tensor> {
        let entry = naive::repeat_groups(&self.entry, self.heads()?)?;
        tensor(entry.broadcast_mul(&tensor(self.step.unsqueeze(3))?))
    }

    /// `C`, `[batch, heads, length, states]`.
    fn queries(&self) -> Result<Tensor> {
        tensor(naive::repeat_groups(&self.exit, self.heads()?)?.contiguous())
    }

    /// What is read of a state before the first position: `e^{a_1 + … + a_t} C_tᵀ h`.
    fn read(&self, initial: &Tensor) -> Result<Tensor> {
        let reach = tensor(cumulative_sum(&self.decay()?, 2)?.exp())?;
        let queries = tensor(self.queries()?.broadcast_mul(&tensor(reach.unsqueeze(3))?))?;
        Ok(matmul(&queries, initial)?)
    }

    /// The state behind the last position, `[batch, heads, states, width]`, for inputs `x`
    /// `[batch, heads, length, width]`:
    /// `e^{a_1 + … + a_n} h_0 + Σ_t e^{a_{t+1} + … + a_n} Δ_t B_t x_tᵀ`.
    ///
    /// # Errors
    /// When shapes do not fit each other.
    pub fn last_state(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let length = tensor(self.step.dim(2))?;
        // a_t + … + a_n, [batch, heads, length + 1]. Summed from the end, where what is left is large:
        // a difference of sums from the start would lose the digits that those have grown to.
        let decay = tensor(self.decay()?.pad_with_zeros(2, 0, 1))?;
        let reach = cumulative_sum(&tensor(decay.flip(&[2]))?, 2)?;
        let reach = tensor(reach.flip(&[2]))?;
        let left = tensor(tensor(reach.narrow(2, 1, length))?.exp())?;
        let keys = tensor(self.keys()?.broadcast_mul(&tensor(left.unsqueeze(3))?))?;
        let entered = matmul(&tensor(keys.transpose(2, 3))?, x)?;
        match &self.initial {
            None => Ok(entered),
            Some(initial) => {
                let whole = tensor(tensor(reach.narrow(2, 0, 1))?.exp())?;
                let whole = tensor(whole.unsqueeze(3))?;
                tensor(tensor(initial.broadcast_mul(&whole))? + entered)
            }
        }
    }
}

impl Signal {
    /// The recurrence over this signal `[batch, heads, length, width]`, one decay for each head.
    /// The state that it ends with is [`HeadScan::last_state`].
    ///
    /// Under the streams lens an initial state is a constant, shared like a bias.
    ///
    /// # Errors
    /// When shapes do not fit each other; under the contextual lens, which knows no recurrences.
    pub fn head_scan(&self, scan: &HeadScan) -> Result<Self> {
        if let Lens::Contextual(_) = &self.lens {
            return Self::contextual_recurrence("head_scan");
        }
        scan.check(&self.value)?;
        let (keys, queries) = (scan.keys()?, scan.queries()?);
        let decay = scan.decay()?;
        let past = |x: &Tensor| -> Result<Tensor> {
            let x = tensor(x.contiguous())?;
            let direction = Direction::Past;
            Ok(linear_attention_in_chunks(
                &queries,
                &keys,
                &x,
                Some(&decay),
                direction,
                scan.chunk,
            )?)
        };
        let remembered = match &scan.initial {
            None => None,
            Some(initial) => Some(scan.read(initial)?),
        };
        let Lens::Streams(_) = &self.lens else {
            let value = self.mapped_value(|value| {
                let y = past(value)?;
                match &remembered {
                    None => Ok(y),
                    Some(remembered) => Ok(add(&y, remembered)?),
                }
            })?;
            self.count_head_scan(scan, &value)?;
            return self.computed(value);
        };
        let each = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return past(t);
            }
            let mut streams = Vec::with_capacity(t.dims()[0]);
            for stream in 0..t.dims()[0] {
                streams.push(past(&tensor(t.get(stream))?)?);
            }
            tensor(Tensor::stack(&streams, 0))
        };
        let value = past(&self.value)?;
        let y = self.linear_map(&self.value, value, Change::Other, &each, |_| None)?;
        match &remembered {
            None => Ok(y),
            Some(remembered) => y.add_constant(remembered),
        }
    }

    /// The products of [`operations_in_chunks`] for each head, and for each position of a head
    /// `Δ A` and `Δ B`.
    fn count_head_scan(&self, scan: &HeadScan, output: &Tensor) -> Result<()> {
        if let Lens::Meter(meter, _) = &self.lens {
            let (batch, heads, length, width) = tensor(self.value.dims4())?;
            let states = tensor(scan.entry.dim(3))?;
            let products = operations_in_chunks(length, states, width, scan.chunk);
            let weights = (length * (1 + states)) as u64;
            let operands = [&self.value, &scan.step, &scan.entry, &scan.exit, output];
            meter.count(
                (batch * heads) as u64 * (products + weights),
                operands.iter().map(|t| bytes_of(t)).sum(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SelectiveScan;
    use crate::streams::{Partition, StreamRules};
    use lapidary_kernels::check::gradient_error;
    use lapidary_kernels::{Activation, DType, Device, activate};

    const BATCH: usize = 2;
    const HEADS: usize = 4;
    const GROUPS: usize = 2;
    const LENGTH: usize = 11;
    const WIDTH: usize = 3;
    const STATES: usize = 2;

    fn wave(shape: &[usize], frequency: f64) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|i| (i as f64 * frequency).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn example(initial: bool, chunk: usize) -> (Tensor, HeadScan) {
        let scan = HeadScan {
            step: wave(&[BATCH, HEADS, LENGTH], 0.7).abs().unwrap(),
            rate: (wave(&[HEADS], 1.3).abs().unwrap() - 1.5).unwrap(),
            entry: wave(&[BATCH, GROUPS, LENGTH, STATES], 0.9),
            exit: wave(&[BATCH, GROUPS, LENGTH, STATES], 0.4),
            initial: initial.then(|| wave(&[BATCH, HEADS, STATES, WIDTH], 2.1)),
            chunk,
        };
        (wave(&[BATCH, HEADS, LENGTH, WIDTH], 0.31), scan)
    }

    fn flat(t: &Tensor) -> Vec<f64> {
        t.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    }

    /// The two equations, one number at a time: outputs and last states.
    fn by_loops(x: &Tensor, scan: &HeadScan) -> (Vec<f64>, Vec<f64>) {
        let (x, step, rate) = (flat(x), flat(&scan.step), flat(&scan.rate));
        let (entry, exit) = (flat(&scan.entry), flat(&scan.exit));
        let mut h = match &scan.initial {
            Some(initial) => flat(initial),
            None => vec![0.0; BATCH * HEADS * STATES * WIDTH],
        };
        let mut y = vec![0.0; x.len()];
        for b in 0..BATCH {
            for (head, rate) in rate.iter().enumerate() {
                let group = b * GROUPS + head / (HEADS / GROUPS);
                let sequence = b * HEADS + head;
                for t in 0..LENGTH {
                    let delta = step[sequence * LENGTH + t];
                    for s in 0..STATES {
                        let weight = (group * LENGTH + t) * STATES + s;
                        for w in 0..WIDTH {
                            let at = (sequence * LENGTH + t) * WIDTH + w;
                            let state = &mut h[(sequence * STATES + s) * WIDTH + w];
                            *state = (delta * rate).exp() * *state + delta * entry[weight] * x[at];
                            y[at] += exit[weight] * *state;
                        }
                    }
                }
            }
        }
        (y, h)
    }

    fn assert_near(found: &Tensor, expected: &[f64]) {
        let found = flat(found);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    /// One position at a time, chunks with a rest, and the whole triangle.
    #[test]
    fn every_chunk_equals_the_recurrence_number_by_number() {
        for initial in [false, true] {
            for chunk in [1, 4, LENGTH, 64] {
                let (x, scan) = example(initial, chunk);
                let (y, state) = by_loops(&x, &scan);
                let found = Signal::from(x.clone()).head_scan(&scan).unwrap();
                assert_near(found.value(), &y);
                assert_near(&scan.last_state(&x).unwrap(), &state);
            }
        }
    }

    /// `y = M x` with `M_ts = e^{A (Δ_{s+1} + … + Δ_t)} (C_t · B_s) Δ_s` for `s ≤ t`, laid out.
    #[test]
    fn a_head_equals_its_lower_triangular_matrix() {
        let (x, scan) = example(false, 4);
        let found = Signal::from(x.clone()).head_scan(&scan).unwrap();
        let (batch, head, group) = (1, 3, 1);
        let of = |t: &Tensor, index: usize| t.get(batch).unwrap().get(index).unwrap();
        let step = flat(&of(&scan.step, head));
        let rate = flat(&scan.rate)[head];
        let entry = of(&scan.entry, group).to_vec2::<f64>().unwrap();
        let exit = of(&scan.exit, group).to_vec2::<f64>().unwrap();
        let mut matrix = vec![0.0; LENGTH * LENGTH];
        for (t, exit) in exit.iter().enumerate() {
            for (s, entry) in entry.iter().enumerate().take(t + 1) {
                let between: f64 = step[s + 1..=t].iter().sum();
                let met: f64 = exit.iter().zip(entry).map(|(c, b)| c * b).sum();
                matrix[t * LENGTH + s] = (rate * between).exp() * met * step[s];
            }
        }
        let matrix = Tensor::from_vec(matrix, (LENGTH, LENGTH), &Device::Cpu).unwrap();
        let expected = matrix.matmul(&of(&x, head)).unwrap();
        assert_near(&of(found.value(), head), &flat(&expected));
    }

    /// Mamba's recurrence, where all states of a channel decay alike.
    #[test]
    fn heads_of_one_channel_are_the_selective_recurrence() {
        let (x, scan) = example(false, 4);
        let x = x.narrow(3, 0, 1).unwrap();
        let first = |t: &Tensor| t.narrow(1, 0, 1).unwrap().contiguous().unwrap();
        let one = HeadScan {
            entry: first(&scan.entry),
            exit: first(&scan.exit),
            ..scan
        };
        let found = Signal::from(x.clone()).head_scan(&one).unwrap();

        let by_token = |t: &Tensor| t.transpose(1, 2).unwrap().contiguous().unwrap();
        let rate = one.rate.unsqueeze(1).unwrap();
        let rate = rate.broadcast_as((HEADS, STATES)).unwrap();
        let selective = SelectiveScan {
            step: by_token(&one.step),
            rate: rate.contiguous().unwrap(),
            entry: one.entry.squeeze(1).unwrap(),
            exit: one.exit.squeeze(1).unwrap(),
            initial: None,
        };
        let channels = Signal::from(by_token(&x.squeeze(3).unwrap()));
        let (expected, _) = channels.selective_scan(&selective).unwrap();
        let found = by_token(&found.value().squeeze(3).unwrap());
        assert_near(&found, &flat(expected.value()));
    }

    #[test]
    fn the_last_state_continues_the_recurrence() {
        let (x, scan) = example(true, 4);
        let (expected, _) = by_loops(&x, &scan);
        let part = |t: &Tensor, start, count| t.narrow(2, start, count).unwrap();
        let cut = |start, count, initial| HeadScan {
            step: part(&scan.step, start, count),
            rate: scan.rate.clone(),
            entry: part(&scan.entry, start, count),
            exit: part(&scan.exit, start, count),
            initial,
            chunk: 4,
        };
        let early = cut(0, 7, scan.initial.clone());
        let state = early.last_state(&part(&x, 0, 7)).unwrap();
        let a = Signal::from(part(&x, 0, 7)).head_scan(&early).unwrap();
        let late = cut(7, LENGTH - 7, Some(state));
        let b = Signal::from(part(&x, 7, LENGTH - 7))
            .head_scan(&late)
            .unwrap();
        let whole = Tensor::cat(&[a.value(), b.value()], 2).unwrap();
        assert_near(&whole, &expected);
    }

    /// Behind a long text, all of which but the end has decayed by `e^-1800`, the state in `f32` has the
    /// digits of `f32`.
    #[test]
    fn the_last_state_of_a_long_text_is_as_exact_as_of_a_short_one() {
        let length = 4096;
        let above = |frequency: f64| {
            let wave = wave(&[1, 1, length, 1], frequency).abs().unwrap();
            (wave + 0.5).unwrap().to_dtype(DType::F32).unwrap()
        };
        let of = |dtype: DType| {
            let cast = |t: Tensor| t.to_dtype(dtype).unwrap();
            let scan = HeadScan {
                step: cast((above(0.7).squeeze(3).unwrap() * 0.5).unwrap()),
                rate: cast(Tensor::new(&[-0.8f32], &Device::Cpu).unwrap()),
                entry: cast(above(0.9)),
                exit: cast(above(0.4)),
                initial: None,
                chunk: 64,
            };
            let state = scan.last_state(&cast(above(0.31))).unwrap();
            flat(&state.to_dtype(DType::F64).unwrap())[0]
        };
        let (found, expected) = (of(DType::F32), of(DType::F64));
        assert!((found / expected - 1.0).abs() < 3e-6, "{found} {expected}");
    }

    #[test]
    fn streams_sum_to_the_value_with_a_state_before_the_first_token() {
        for initial in [false, true] {
            let (x, scan) = example(initial, 4);
            let streams = Signal::from(x.transpose(1, 2).unwrap().contiguous().unwrap())
                .into_streams(Partition::positions(LENGTH), StreamRules::default())
                .unwrap();
            let y = streams.transpose(1, 2).unwrap().head_scan(&scan).unwrap();
            let (expected, _) = by_loops(&x, &scan);
            assert_near(y.value(), &expected);
            assert_near(&y.contributions().unwrap().sum(0).unwrap(), &expected);
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for chunk in [1, 4, 64] {
            let (x, scan) = example(true, chunk);
            let run = |inputs: &[Tensor]| -> lapidary_kernels::Result<Tensor> {
                let [x, step, rate, entry, exit, initial] = inputs else {
                    panic!("six inputs");
                };
                let scan = HeadScan {
                    step: activate(step, Activation::Softplus)?,
                    rate: rate.clone(),
                    entry: entry.clone(),
                    exit: exit.clone(),
                    initial: Some(initial.clone()),
                    chunk,
                };
                let y = Signal::from(x.clone()).head_scan(&scan).unwrap();
                Ok(y.value().clone())
            };
            let inputs = [
                x,
                scan.step,
                scan.rate,
                scan.entry,
                scan.exit,
                scan.initial.unwrap(),
            ];
            let error = gradient_error(run, &inputs).unwrap();
            assert!(error < 1e-6, "{chunk}: {error:e}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (x, mut scan) = example(false, 4);
        scan.rate = wave(&[HEADS + 1], 1.0);
        let error = Signal::from(x.clone()).head_scan(&scan).unwrap_err();
        assert_eq!(
            error.to_string(),
            "shape of the recurrence's rate is [5], but must be [4]"
        );
        let (_, mut scan) = example(false, 4);
        scan.entry = wave(&[BATCH, 3, LENGTH, STATES], 0.9);
        let error = Signal::from(x).head_scan(&scan).unwrap_err();
        assert_eq!(
            error.to_string(),
            "groups of the recurrence is 3, but must be a divisor of its 4 heads"
        );
    }
}
