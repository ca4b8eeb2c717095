//! The operation that the tensor engine differentiates.

use super::*;

pub(super) struct Sums {
    pub(super) attention: PolynomialAttention,
    pub(super) sizes: Sizes,
}

impl Sums {
    fn head<'a, T>(&self, index: usize, q: &'a [T], k: &'a [T], v: &'a [T]) -> Head<'a, T> {
        let Sizes {
            queries,
            keys,
            width,
            value_width,
            ..
        } = self.sizes;
        Head {
            attention: self.attention,
            sizes: self.sizes,
            index,
            q: &q[index * queries * width..][..queries * width],
            k: &k[index * keys * width..][..keys * width],
            v: &v[index * keys * value_width..][..keys * value_width],
        }
    }

    fn work(&self) -> usize {
        let Sizes {
            queries,
            keys,
            width,
            value_width,
            ..
        } = self.sizes;
        let operations = self.attention.operations(queries, keys, width, value_width);
        usize::try_from(operations).unwrap_or(usize::MAX)
    }

    fn forward<T: Real>(&self, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
        let each = self.sizes.queries * self.sizes.value_width;
        let mut output = vec![T::zero(); self.sizes.heads * each];
        let shared = Shared::new(&mut output);
        host::share(self.sizes.heads, self.work(), |range| {
            let mut scratch = Scratch::new();
            for index in range {
                // SAFETY: heads are disjoint.
                let output = unsafe { shared.part(index * each, each) };
                self.head(index, q, k, v).run(&mut scratch, output);
            }
        });
        output
    }

    fn backward<T: Real>(
        &self,
        [q, k, v]: [&Tensor; 3],
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let hosts = [q, k, v, gradient].map(Host::new);
        let [q_all, k_all, v_all, g_all] = &hosts;
        let (q_all, k_all) = (q_all.ordered::<T>()?, k_all.ordered::<T>()?);
        let (v_all, g_all) = (v_all.ordered::<T>()?, g_all.ordered::<T>()?);
        let mut results = [q, k, v].map(|of| vec![T::zero(); of.elem_count()]);
        let [dq, dk, dv] = &mut results;
        let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
        let Sizes {
            heads,
            queries,
            keys,
            width,
            value_width,
        } = self.sizes;
        host::share(heads, 3 * self.work(), |range| {
            let mut scratch = Scratch::new();
            for index in range {
                let (of_q, of_k) = (queries * width, keys * width);
                let of_v = keys * value_width;
                // SAFETY: heads are disjoint.
                let mut gradients = unsafe {
                    Gradients {
                        sizes: self.sizes,
                        q: dq.part(index * of_q, of_q),
                        k: dk.part(index * of_k, of_k),
                        v: dv.part(index * of_v, of_v),
                    }
                };
                let each = queries * value_width;
                let g = &g_all[index * each..][..each];
                self.head(index, &q_all, &k_all, &v_all)
                    .backward(g, &mut scratch, &mut gradients);
            }
        });
        let [dq, dk, dv] = results;
        Ok([
            Some(host::tensor(dq, q.dims())?),
            Some(host::tensor(dk, k.dims())?),
            Some(host::tensor(dv, v.dims())?),
        ])
    }
}

impl CustomOp3 for Sums {
    fn name(&self) -> &'static str {
        "polynomial attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => {
            let q_all = host::ordered::<T>(q, q_layout)?;
            let k_all = host::ordered::<T>(k, k_layout)?;
            let v_all = host::ordered::<T>(v, v_layout)?;
            let output = self.forward::<T>(&q_all, &k_all, &v_all);
            let (batch, heads, queries, _) = q_layout.shape().dims4()?;
            let shape = Shape::from((batch, heads, queries, self.sizes.value_width));
            Ok((<T as candle_core::WithDType>::to_cpu_storage_owned(output), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], gradient))?;
        Ok((dq, dk, dv))
    }
}
