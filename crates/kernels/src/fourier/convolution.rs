//! Causal convolution along the sequence, one filter per channel: by FFT for long filters,
//! directly for short ones.

use super::{Candle, Planned, try_rows};
use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, WithDType};
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealToComplex};
use std::sync::Arc;

/// Causal convolution along the sequence, one filter per channel:
/// `y[b, c, t] = Σ_s kernel[c, s] x[b, c, t - s]` for `x` `[batch, channels, length]` and
/// `kernel` `[channels, taps]`. Its cost grows with `length · log(length)`.
///
/// # Errors
/// When the channels differ.
pub fn fft_convolution(x: &Tensor, kernel: &Tensor) -> Result<Tensor> {
    let (_, channels, length) = x.dims3()?;
    check("fft_convolution", channels, kernel)?;
    if !fused(&[x, kernel]) || length == 0 {
        return naive::fft_convolution(x, kernel);
    }
    Ok(x.apply2(kernel, Convolution)?)
}

fn check(name: &'static str, channels: usize, kernel: &Tensor) -> Result<()> {
    let (kernel_channels, taps) = kernel.dims2()?;
    if kernel_channels == channels && taps > 0 {
        return Ok(());
    }
    let expected = format!("[{channels}, taps > 0]");
    Err(Error::argument(name, "kernel", kernel.dims(), expected))
}

struct Convolution;

/// A transform long enough that nothing wraps around.
struct Spectra<T: Planned> {
    n: usize,
    forward: Arc<dyn RealToComplex<T>>,
    inverse: Arc<dyn ComplexToReal<T>>,
}

impl<T: Planned> Spectra<T> {
    fn new(length: usize) -> Self {
        let n = (2 * length).next_power_of_two();
        Self {
            n,
            forward: T::forward_plan(n),
            inverse: T::inverse_plan(n),
        }
    }

    fn spectrum(&self, x: &[T]) -> Candle<Vec<Complex<T>>> {
        let mut input = self.forward.make_input_vec();
        input[..x.len()].copy_from_slice(x);
        let mut output = self.forward.make_output_vec();
        self.forward
            .process(&mut input, &mut output)
            .map_err(candle_core::Error::wrap)?;
        Ok(output)
    }

    /// The first numbers of the signal with this spectrum, as many as `y` has.
    fn signal(&self, mut spectrum: Vec<Complex<T>>, y: &mut [T]) -> Candle<()> {
        let zero = T::default();
        // Exact products have no imaginary part here; rounding leaves some.
        if let Some(first) = spectrum.first_mut() {
            first.im = zero;
        }
        if let Some(last) = spectrum.last_mut() {
            last.im = zero;
        }
        let mut output = self.inverse.make_output_vec();
        self.inverse
            .process(&mut spectrum, &mut output)
            .map_err(candle_core::Error::wrap)?;
        let scale = T::of(1.0 / self.n as f64);
        for (y, &value) in y.iter_mut().zip(&output) {
            *y = value * scale;
        }
        Ok(())
    }
}

fn product<T: Planned>(a: &[Complex<T>], b: &[Complex<T>]) -> Vec<Complex<T>> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// `a` times the conjugate of `b`: correlation instead of convolution.
fn correlation<T: Planned>(a: &[Complex<T>], b: &[Complex<T>]) -> Vec<Complex<T>> {
    a.iter().zip(b).map(|(a, b)| a * b.conj()).collect()
}

fn forward<T: Planned>(x: &[T], dims: [usize; 3], kernel: &[T], taps: usize) -> Candle<Vec<T>> {
    let [batch, channels, length] = dims;
    let spectra = Spectra::<T>::new(length);
    let mut y = host::unwritten::<T>(x.len());
    let shared = Shared::new(&mut y);
    try_rows(channels, spectra.n * (batch + 1), |range| {
        for channel in range {
            // Taps beyond the length meet nothing.
            let filter = &kernel[channel * taps..][..taps.min(length)];
            let filter = spectra.spectrum(filter)?;
            for b in 0..batch {
                let at = (b * channels + channel) * length;
                let signal = spectra.spectrum(&x[at..][..length])?;
                // SAFETY: each row belongs to one channel and batch.
                let y = unsafe { shared.part(at, length) };
                spectra.signal(product(&signal, &filter), y)?;
            }
        }
        Ok(())
    })?;
    Ok(y)
}

/// `∂x[t] = Σ_s kernel[s] ∂y[t + s]`, `∂kernel[s] = Σ_{b,t} ∂y[b, t] x[b, t - s]`.
fn backward<T: Planned>(
    x: &[T],
    dims: [usize; 3],
    kernel: &[T],
    taps: usize,
    gradient: &[T],
) -> Candle<(Vec<T>, Vec<T>)> {
    let [batch, channels, length] = dims;
    let spectra = Spectra::<T>::new(length);
    let mut dx = host::unwritten::<T>(x.len());
    let mut dk = vec![T::default(); kernel.len()];
    let (shared_dx, shared_dk) = (Shared::new(&mut dx), Shared::new(&mut dk));
    try_rows(channels, spectra.n * (2 * batch + 1), |range| {
        for channel in range {
            let reach = taps.min(length);
            let filter = spectra.spectrum(&kernel[channel * taps..][..reach])?;
            let mut total = vec![Complex::new(T::default(), T::default()); filter.len()];
            for b in 0..batch {
                let at = (b * channels + channel) * length;
                let g = spectra.spectrum(&gradient[at..][..length])?;
                let signal = spectra.spectrum(&x[at..][..length])?;
                for (total, part) in total.iter_mut().zip(correlation(&g, &signal)) {
                    *total += part;
                }
                // SAFETY: each row belongs to one channel and batch.
                let dx = unsafe { shared_dx.part(at, length) };
                spectra.signal(correlation(&g, &filter), dx)?;
            }
            // SAFETY: each filter belongs to one channel.
            let dk = unsafe { shared_dk.part(channel * taps, reach) };
            spectra.signal(total, dk)?;
        }
        Ok(())
    })?;
    Ok((dx, dk))
}

fn dims3(layout: &Layout) -> Candle<[usize; 3]> {
    let (batch, channels, length) = layout.shape().dims3()?;
    Ok([batch, channels, length])
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "fft_convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        kernel: &CpuStorage,
        kernel_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let taps = kernel_layout.dims()[1];
        let y = by_dtype!(host::dtype(x), T => {
            let (x, kernel) = (host::ordered(x, layout)?, host::ordered(kernel, kernel_layout)?);
            let y = forward::<T>(&x, dims3(layout)?, &kernel, taps)?;
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        kernel: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let (x_host, k_host, g_host) = (Host::new(x), Host::new(kernel), Host::new(gradient));
        by_dtype!(x.dtype(), T => {
            let (dx, dk) = backward::<T>(
                &x_host.ordered()?,
                dims3(x_host.layout)?,
                &k_host.ordered()?,
                kernel.dims()[1],
                &g_host.ordered()?,
            )?;
            Ok((Some(host::tensor(dx, x.dims())?), Some(host::tensor(dk, kernel.dims())?)))
        })
    }
}

/// Short causal convolution, one filter per channel, in the tap order of a `conv1d` layer with
/// `taps - 1` zeros on the left (as in Mamba): the last tap meets the present,
/// `y[b, c, t] = bias[c] + Σ_j kernel[c, j] x[b, c, t - (taps - 1) + j]`, for `x`
/// `[batch, channels, length]`, `kernel` `[channels, taps]`, `bias` `[channels]`.
///
/// ([`fft_convolution`] has the opposite tap order: its first tap meets the present.)
///
/// # Errors
/// When the channels differ.
pub fn causal_depthwise_convolution(
    x: &Tensor,
    kernel: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    const NAME: &str = "causal_depthwise_convolution";
    let (_, channels, _) = x.dims3()?;
    check(NAME, channels, kernel)?;
    let mut all = vec![x, kernel];
    if let Some(bias) = bias {
        if bias.dims() != [channels] {
            let expected = format!("[{channels}]");
            return Err(Error::argument(NAME, "bias", bias.dims(), expected));
        }
        all.push(bias);
    }
    if !fused(&all) {
        return naive::causal_depthwise_convolution(x, kernel, bias);
    }
    Ok(match bias {
        Some(bias) => x.apply3(kernel, bias, Direct)?,
        None => x.apply2(kernel, Direct)?,
    })
}

struct Direct;

type Argument<'a> = (&'a CpuStorage, &'a Layout);

fn direct_forward<T: Real>(
    x: Argument,
    kernel: Argument,
    bias: Option<Argument>,
) -> Candle<(CpuStorage, Shape)> {
    let [_, channels, length] = dims3(x.1)?;
    let taps = kernel.1.dims()[1];
    let rows = host::Rows::<T>::new(x.0, x.1)?;
    let kernel = host::ordered::<T>(kernel.0, kernel.1)?;
    let bias = match bias {
        Some((storage, layout)) => host::ordered::<T>(storage, layout)?.into_owned(),
        None => vec![T::default(); channels],
    };
    let mut y = host::unwritten::<T>(x.1.shape().elem_count());
    host::for_rows(
        &mut y,
        length,
        taps,
        #[inline(always)]
        |row, y| {
            let channel = row % channels;
            y.fill(bias[channel]);
            let x = rows.row(row);
            for (j, &k) in kernel[channel * taps..][..taps].iter().enumerate() {
                let delay = taps - 1 - j;
                if delay < length {
                    simd::add_scaled(&mut y[delay..], &x[..length - delay], k);
                }
            }
        },
    );
    Ok((T::to_cpu_storage_owned(y), x.1.shape().clone()))
}

fn direct_backward<T: Real>(x: &Tensor, kernel: &Tensor, gradient: &Tensor) -> Candle<[Tensor; 3]> {
    let (x_host, k_host, g_host) = (Host::new(x), Host::new(kernel), Host::new(gradient));
    let [batch, channels, length] = dims3(x_host.layout)?;
    let taps = kernel.dims()[1];
    let x_rows = host::Rows::<T>::new(x_host.storage()?, x_host.layout)?;
    let g_rows = host::Rows::<T>::new(g_host.storage()?, g_host.layout)?;
    let kernel_values = k_host.ordered::<T>()?;
    let mut dx = vec![T::default(); x.elem_count()];
    let mut dk = vec![T::default(); channels * taps];
    let mut db = vec![T::default(); channels];
    {
        let (dx, dk, db) = (
            Shared::new(&mut dx),
            Shared::new(&mut dk),
            Shared::new(&mut db),
        );
        host::share(channels, batch * length * taps * 2, |range| {
            simd::vectorised(
                #[inline(always)]
                || {
                    for channel in range.clone() {
                        // SAFETY: everything of a channel belongs to one task.
                        let (dk, db) =
                            unsafe { (dk.part(channel * taps, taps), db.part(channel, 1)) };
                        for row in (0..batch).map(|b| b * channels + channel) {
                            let (x, g) = (x_rows.row(row), g_rows.row(row));
                            // SAFETY: as above.
                            let dx = unsafe { dx.part(row * length, length) };
                            db[0] += simd::sum(g);
                            for j in 0..taps {
                                let delay = taps - 1 - j;
                                if delay < length {
                                    let k = kernel_values[channel * taps + j];
                                    simd::add_scaled(&mut dx[..length - delay], &g[delay..], k);
                                    dk[j] += simd::dot(&g[delay..], &x[..length - delay]);
                                }
                            }
                        }
                    }
                },
            );
        });
    }
    Ok([
        host::tensor(dx, x.dims())?,
        host::tensor(dk, kernel.dims())?,
        host::tensor(db, &[channels])?,
    ])
}

impl CustomOp2 for Direct {
    fn name(&self) -> &'static str {
        "causal_depthwise_convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        kernel: &CpuStorage,
        kernel_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => {
            direct_forward::<T>((x, x_layout), (kernel, kernel_layout), None)
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        kernel: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dk, _] = by_dtype!(x.dtype(), T => direct_backward::<T>(x, kernel, gradient))?;
        Ok((Some(dx), Some(dk)))
    }
}

impl CustomOp3 for Direct {
    fn name(&self) -> &'static str {
        "causal_depthwise_convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        kernel: &CpuStorage,
        kernel_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => direct_forward::<T>(
            (x, x_layout),
            (kernel, kernel_layout),
            Some((bias, bias_layout)),
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        kernel: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dk, db] = by_dtype!(x.dtype(), T => direct_backward::<T>(x, kernel, gradient))?;
        Ok((Some(dx), Some(dk), Some(db)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    #[test]
    fn equal_the_compositions() {
        for (batch, channels, length, taps) in
            [(1, 1, 1, 1), (2, 3, 7, 4), (1, 2, 5, 9), (2, 2, 130, 130)]
        {
            compare(1e-5, |dtype| {
                let x = arange(&[batch, length, channels], 1.0, dtype)
                    .transpose(1, 2)
                    .unwrap();
                let k = arange(&[channels, taps], 2.0, dtype);
                let fused = fft_convolution(&x, &k).unwrap();
                (fused, naive::fft_convolution(&x, &k).unwrap())
            });
            compare(1e-5, |dtype| {
                let x = arange(&[batch, length, channels], 1.0, dtype)
                    .transpose(1, 2)
                    .unwrap();
                let k = arange(&[channels, taps], 2.0, dtype);
                let b = arange(&[channels], 3.0, dtype);
                let fused = causal_depthwise_convolution(&x, &k, Some(&b)).unwrap();
                (
                    fused,
                    naive::causal_depthwise_convolution(&x, &k, Some(&b)).unwrap(),
                )
            });
        }
    }

    #[test]
    fn gradients() {
        for (length, taps) in [(5, 3), (3, 5)] {
            let x = arange(&[2, 2, length], 1.0, DType::F64);
            let k = arange(&[2, taps], 2.0, DType::F64);
            let b = arange(&[2], 3.0, DType::F64);
            let f = |a: &[Tensor]| fft_convolution(&a[0], &a[1]);
            assert!(gradient_error(f, &[x.clone(), k.clone()]).unwrap() < 1e-8);
            let f = |a: &[Tensor]| causal_depthwise_convolution(&a[0], &a[1], Some(&a[2]));
            assert!(gradient_error(f, &[x.clone(), k.clone(), b]).unwrap() < 1e-8);
            let f = |a: &[Tensor]| causal_depthwise_convolution(&a[0], &a[1], None);
            assert!(gradient_error(f, &[x, k]).unwrap() < 1e-8);
        }
    }

    #[test]
    fn the_two_tap_orders_mirror_each_other() {
        let x = arange(&[1, 2, 9], 1.0, DType::F64);
        let k = arange(&[2, 4], 2.0, DType::F64);
        let mirrored = k.index_select(&Tensor::new(&[3u32, 2, 1, 0], k.device()).unwrap(), 1);
        let by_fft = fft_convolution(&x, &mirrored.unwrap()).unwrap();
        let direct = causal_depthwise_convolution(&x, &k, None).unwrap();
        assert!(crate::check::difference(&by_fft, &direct).unwrap() < 1e-12);
    }

    #[test]
    fn wrong_channels_are_named() {
        let x = arange(&[1, 2, 9], 1.0, DType::F32);
        let k = arange(&[3, 4], 2.0, DType::F32);
        assert!(fft_convolution(&x, &k).is_err());
        assert!(causal_depthwise_convolution(&x, &k, None).is_err());
    }
}
