//! Operations on queries, keys and values in which every head of every sequence is by itself: what the tensor engine is
//! told of them, and heads shared among threads.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype};
use crate::product::Matrix;
use crate::simd::Real;
use crate::stack::Stack;
use crate::{Result, Tensor};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// What is done with one head, of which queries `[length, width]`, keys and values are given as matrices. An operation
/// of the engine has at most three arguments: what belongs to keys lies beside them.
pub(crate) trait ByHead: Send + Sync + 'static {
    /// The operation's name in errors.
    fn name(&self) -> &'static str;

    /// Roughly the element operations of one head's result.
    fn work(&self) -> usize;

    /// The width of the result for values of a width.
    fn width(&self, of_values: usize) -> usize {
        of_values
    }

    /// Writes the result `[length, width]` of a head, counted over all sequences.
    fn forward<T: Real>(&self, index: usize, of: [Matrix<T>; 3], result: &mut [T]);

    /// Writes the gradients of queries, keys and values of a head for the `gradient` of its result.
    fn backward<T: Real>(
        &self,
        index: usize,
        of: [Matrix<T>; 3],
        gradient: Matrix<T>,
        slopes: [&mut [T]; 3],
    );
}

/// The result `[batch, heads, length, width]` for `q`, `keys` and `v` of four dimensions, the first two in common,
/// differentiable in all three.
pub(crate) fn by_head(
    operation: impl ByHead,
    q: &Tensor,
    keys: &Tensor,
    v: &Tensor,
) -> Result<Tensor> {
    Ok(q.apply3(keys, v, Operation(operation))?)
}

/// The matrices of all heads of a tensor `[batch, heads, ..]`.
fn stack<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Candle<Stack<'a, T>> {
    Stack::new(storage, layout, &layout.dims()[..2])
}

fn matrices<'a, T: Real>(of: &'a [Stack<'_, T>; 3], index: usize) -> [Matrix<'a, T>; 3] {
    of.each_ref().map(|stack| stack.matrix(index))
}

struct Operation<O>(O);

impl<O: ByHead> Operation<O> {
    fn forward<T: Real>(&self, of: &[Stack<T>; 3]) -> Vec<T> {
        let [q, _, v] = of;
        let heads = q.starts.len();
        let each = q.rows * self.0.width(v.columns);
        let mut result = host::unwritten::<T>(heads * each);
        let shared = Shared::new(&mut result);
        host::share(heads, self.0.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let result = unsafe { shared.part(index * each, each) };
                self.0.forward(index, matrices(of, index), result);
            }
        });
        result
    }

    /// Gradients of queries, keys and values, packed.
    fn backward<T: Real>(&self, of: &[Stack<T>; 3], gradient: &Stack<T>) -> [Vec<T>; 3] {
        let heads = gradient.starts.len();
        let sizes = of.each_ref().map(|stack| stack.rows * stack.columns);
        let mut results = sizes.map(|each| host::unwritten::<T>(heads * each));
        let [of_q, of_keys, of_v] = &mut results;
        let shared = [Shared::new(of_q), Shared::new(of_keys), Shared::new(of_v)];
        host::share(heads, 3 * self.0.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let slopes = std::array::from_fn(|side| unsafe {
                    shared[side].part(index * sizes[side], sizes[side])
                });
                let (of, gradient) = (matrices(of, index), gradient.matrix(index));
                self.0.backward(index, of, gradient, slopes);
            }
        });
        results
    }
}

impl<O: ByHead> CustomOp3 for Operation<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let (batch, heads, length, _) = q_layout.shape().dims4()?;
        let width = self.0.width(v_layout.shape().dims4()?.3);
        by_dtype!(host::dtype(q), T => {
            let result = self.forward::<T>(&[
                stack(q, q_layout)?,
                stack(keys, keys_layout)?,
                stack(v, v_layout)?,
            ]);
            let shape = Shape::from((batch, heads, length, width));
            Ok((T::to_cpu_storage_owned(result), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        keys: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [q, keys, v, gradient].map(Host::new);
        let [q_host, keys_host, v_host, g_host] = &hosts;
        by_dtype!(q.dtype(), T => {
            let of = [
                stack(q_host.storage()?, q_host.layout)?,
                stack(keys_host.storage()?, keys_host.layout)?,
                stack(v_host.storage()?, v_host.layout)?,
            ];
            let gradient = stack(g_host.storage()?, g_host.layout)?;
            let [of_q, of_keys, of_v] = self.backward::<T>(&of, &gradient);
            Ok((
                host::wanted(q, of_q)?,
                host::wanted(keys, of_keys)?,
                host::wanted(v, of_v)?,
            ))
        })
    }
}
