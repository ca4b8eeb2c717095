//! Products with a matrix of small integers.
//!
//! A row of the matrix is cut into groups that share a scale `s` and, where it is not symmetric, a
//! minimum `m`. With `b` bits and integers `0 ≤ q < 2ᵇ`,
//!
//! ```text
//! w = s (q − 2ᵇ⁻¹)      symmetric
//! w = s q + m           otherwise
//! ```
//!
//! A vector meets the integers where they lie, so that reading a token costs the bytes of the
//! integers and not those of the weights; many vectors meet panels of weights that are written out
//! one after another.

mod unpack;

use crate::host::{self, Host, Shared, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, LANES};
use crate::{Activation, DType, Device, Error, Result, Tensor, elementwise, linear_activation};
use half::f16;
use unpack::{BLOCK, Bits};

/// A matrix `[output, input]` of 4-bit or 8-bit integers in groups.
#[derive(Clone, Debug)]
pub struct QuantisedMatrix {
    bits: Bits,
    group: usize,
    codes: Tensor,
    scales: Tensor,
    minima: Option<Tensor>,
}

impl QuantisedMatrix {
    /// From its tensors: `codes` `[output, input · bits / 8]` in `u8`, `scales` and `minima`
    /// `[output, input / group]` in `f16`.
    ///
    /// Eight bits are a byte each. Of four bits, byte `j` of each sixteen holds weight `j` of 32 in
    /// its low half and weight `j + 16` in its high half, as in GGUF.
    ///
    /// # Errors
    /// When `bits` is neither 4 nor 8, `group` no multiple of 32, or shapes or types do not fit.
    pub fn new(
        bits: u32,
        group: usize,
        codes: Tensor,
        scales: Tensor,
        minima: Option<Tensor>,
    ) -> Result<Self> {
        const NAME: &str = "quantised matrix";
        let bits = Bits::new(bits)?;
        check_group(group)?;
        let (output, bytes) = codes.dims2()?;
        let input = bits.weights(bytes);
        if codes.dtype() != DType::U8 || !input.is_multiple_of(group) {
            return Err(Error::argument(
                NAME,
                "codes",
                format!("{:?} of {:?}", codes.dims(), codes.dtype()),
                format!("u8, rows of a multiple of {group} weights"),
            ));
        }
        let groups = [output, input / group];
        for (name, tensor) in [("scales", Some(&scales)), ("minima", minima.as_ref())] {
            let Some(tensor) = tensor else { continue };
            if tensor.dims() != groups || tensor.dtype() != DType::F16 {
                return Err(Error::argument(
                    NAME,
                    name,
                    format!("{:?} of {:?}", tensor.dims(), tensor.dtype()),
                    format!("f16 {groups:?}"),
                ));
            }
        }
        Ok(Self {
            bits,
            group,
            codes: codes.contiguous()?,
            scales: scales.contiguous()?,
            minima: minima.map(|minima| minima.contiguous()).transpose()?,
        })
    }

    /// From one integer `0..2^bits` a weight, `codes` `[output, input]` row by row, and the
    /// scales and minima of its groups.
    ///
    /// # Errors
    /// As [`QuantisedMatrix::new`], and when an integer is too large or numbers are missing.
    pub fn pack(
        bits: u32,
        group: usize,
        [output, input]: [usize; 2],
        codes: &[u8],
        scales: Vec<f16>,
        minima: Option<Vec<f16>>,
    ) -> Result<Self> {
        const NAME: &str = "packed codes";
        check_group(group)?;
        let kind = Bits::new(bits)?;
        if codes.len() != output * input || !input.is_multiple_of(group) {
            return Err(Error::argument(
                NAME,
                "codes",
                codes.len(),
                format!("{output} rows of {input}, groups of {group}"),
            ));
        }
        if let Some(code) = codes.iter().find(|code| u32::from(**code) >> bits > 0) {
            let expected = format!("below {}", 1u32 << bits);
            return Err(Error::argument(NAME, "code", code, expected));
        }
        let groups = [output, input / group];
        let of_groups = |values: Vec<f16>, name| match values.len() == output * groups[1] {
            true => Ok(Tensor::from_vec(values, &groups[..], &Device::Cpu)?),
            false => Err(Error::argument(
                NAME,
                name,
                values.len(),
                format!("{groups:?} of them"),
            )),
        };
        let packed = Tensor::from_vec(kind.pack(codes), (output, kind.bytes(input)), &Device::Cpu)?;
        let scales = of_groups(scales, "scales")?;
        let minima = minima
            .map(|minima| of_groups(minima, "minima"))
            .transpose()?;
        Self::new(bits, group, packed, scales, minima)
    }

    /// Bits of an integer.
    pub fn bits(&self) -> u32 {
        self.bits.number()
    }

    /// Weights that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The packed integers, `[output, input · bits / 8]`.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// The scales, `[output, input / group]` in `f16`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// The minima, as the scales, where it is not symmetric.
    pub fn minima(&self) -> Option<&Tensor> {
        self.minima.as_ref()
    }

    /// Rows.
    pub fn output(&self) -> usize {
        self.scales.dims().first().copied().unwrap_or(0)
    }

    /// Columns.
    pub fn input(&self) -> usize {
        self.scales.dims().get(1).copied().unwrap_or(0) * self.group
    }

    /// The integers, one a weight, `[output, input]` row by row.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn unpacked(&self) -> Result<Vec<u8>> {
        let codes = self.on_host()?;
        let read = Host::new(&codes.codes);
        let packed = read.ordered::<u8>()?;
        Ok(self.bits.unpack(&packed))
    }

    /// The weights, `[output, input]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn dequantised(&self, dtype: DType) -> Result<Tensor> {
        let here = self.on_host()?;
        let (output, input) = (self.output(), self.input());
        let mut weights = host::unwritten::<f32>(output * input);
        let raw = Raw::read(&here)?;
        raw.slices()?.write_out(0, &mut weights);
        let weights = Tensor::from_vec(weights, (output, input), &Device::Cpu)?;
        Ok(weights.to_device(self.codes.device())?.to_dtype(dtype)?)
    }

    fn on_host(&self) -> Result<Self> {
        let move_one = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
        Ok(Self {
            codes: move_one(&self.codes)?,
            scales: move_one(&self.scales)?,
            minima: self.minima.as_ref().map(move_one).transpose()?,
            ..self.clone()
        })
    }
}

fn check_group(group: usize) -> Result<()> {
    match group > 0 && group.is_multiple_of(BLOCK) {
        true => Ok(()),
        false => Err(Error::argument(
            "quantised matrix",
            "group",
            group,
            format!("a multiple of {BLOCK}"),
        )),
    }
}

/// `f(x Wᵀ + b)` for `x` `[.., input]`, a quantised `weight` `[output, input]` and `bias`
/// `[output]`. Differentiable in `x` and `bias`, not in the weight.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn quantised_linear(
    x: &Tensor,
    weight: &QuantisedMatrix,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let tracked = x.track_op() || bias.is_some_and(Tensor::track_op);
    if tracked || x.dtype() != DType::F32 || !fused(&[x]) {
        let weight = weight.dequantised(x.dtype())?;
        return linear_activation(x, &weight, bias, activation);
    }
    let (input, output) = (weight.input(), weight.output());
    if x.dims().last() != Some(&input) {
        let expected = format!("[.., {input}]");
        return Err(Error::argument("quantised linear", "x", x.dims(), expected));
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [output]) {
        let expected = format!("[{output}]");
        return Err(Error::argument(
            "quantised linear",
            "bias",
            bias.dims(),
            expected,
        ));
    }
    let read = Host::new(x);
    let x_values = read.ordered::<f32>()?;
    let rows = x_values.len() / input.max(1);
    let mut y = host::unwritten::<f32>(rows * output);
    let raw = Raw::read(weight)?;
    let matrix = raw.slices()?;
    match rows <= FEW_ROWS {
        true => matrix.multiply_few(&x_values, &mut y),
        false => matrix.multiply_many(&x_values, rows, &mut y),
    }
    if let Some(bias) = bias {
        let read = Host::new(bias);
        let bias = read.ordered::<f32>()?;
        for row in y.chunks_exact_mut(output.max(1)) {
            for (y, b) in row.iter_mut().zip(bias.iter()) {
                *y += b;
            }
        }
    }
    if activation != Activation::Identity {
        y = elementwise::values(activation, &y);
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = output;
    }
    Ok(host::tensor(y, &dims)?)
}

/// Rows up to which each meets the integers by itself.
const FEW_ROWS: usize = 4;

/// Rows of the matrix that meet a row of `x` together.
const TOGETHER: usize = 4;

/// Weights that are written out at a time for many rows of `x`: enough that threads seldom meet,
/// few enough to stay in a core's cache.
const PANEL: usize = 1 << 18;

/// An `f16` as `f32`, exactly: its bits are in the place of those of a number `2¹¹²` times smaller; what is
/// infinite or no number stays so. Written out, since a call would keep the loops around it from being
/// vectors.
#[inline(always)]
fn single(half: f16) -> f32 {
    const UP: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(half.to_bits());
    let finite = (f32::from_bits((bits & 0x7fff) << 13) * UP).to_bits();
    let size = match bits & 0x7c00 {
        0x7c00 => 0x7f80_0000 | (bits & 0x03ff) << 13,
        _ => finite,
    };
    f32::from_bits(size | (bits & 0x8000) << 16)
}

/// The tensors of a matrix, locked for reading.
struct Raw<'a> {
    matrix: &'a QuantisedMatrix,
    codes: Host<'a>,
    scales: Host<'a>,
    minima: Option<Host<'a>>,
}

impl<'a> Raw<'a> {
    fn read(matrix: &'a QuantisedMatrix) -> Result<Self> {
        Ok(Self {
            matrix,
            codes: Host::new(&matrix.codes),
            scales: Host::new(&matrix.scales),
            minima: matrix.minima.as_ref().map(Host::new),
        })
    }

    fn slices(&self) -> Result<Slices<'_>> {
        fn contiguous<'b, T: candle_core::WithDType>(host: &'b Host<'_>) -> Result<&'b [T]> {
            let all = T::cpu_storage_as_slice(host.storage()?)?;
            let start = host.layout.start_offset();
            let count = host.layout.shape().elem_count();
            all.get(start..start + count).ok_or_else(|| {
                Error::argument(
                    "quantised matrix",
                    "storage",
                    all.len(),
                    format!("{} numbers", start + count),
                )
            })
        }
        Ok(Slices {
            bits: self.matrix.bits,
            group: self.matrix.group,
            input: self.matrix.input(),
            output: self.matrix.output(),
            codes: contiguous(&self.codes)?,
            scales: contiguous(&self.scales)?,
            minima: self.minima.as_ref().map(contiguous).transpose()?,
        })
    }
}

/// A matrix as slices.
#[derive(Clone, Copy)]
struct Slices<'a> {
    bits: Bits,
    group: usize,
    input: usize,
    output: usize,
    codes: &'a [u8],
    scales: &'a [f16],
    minima: Option<&'a [f16]>,
}

impl Slices<'_> {
    #[inline(always)]
    fn groups(&self) -> usize {
        self.input / self.group
    }

    /// The integers of one row.
    #[inline(always)]
    fn row(&self, output: usize) -> &[u8] {
        let bytes = self.bits.bytes(self.input);
        &self.codes[output * bytes..(output + 1) * bytes]
    }

    /// Scales of one row, and its minima where there are any.
    #[inline(always)]
    fn row_scales(&self, row: usize) -> (&[f16], Option<&[f16]>) {
        let part = row * self.groups()..(row + 1) * self.groups();
        (
            &self.scales[part.clone()],
            self.minima.map(|all| &all[part]),
        )
    }

    /// Writes rows `first..` out as weights.
    fn write_out(&self, first: usize, weights: &mut [f32]) {
        let input = self.input;
        if input == 0 {
            return;
        }
        let rows = weights.len() / input;
        let shared = Shared::new(weights);
        host::share(rows, input, |range| {
            simd::vectorised(
                #[inline(always)]
                || {
                    for row in range.clone() {
                        // SAFETY: rows are disjoint.
                        let weights = unsafe { shared.part(row * input, input) };
                        match self.bits {
                            Bits::Four => self.write_row::<true>(first + row, weights),
                            Bits::Eight => self.write_row::<false>(first + row, weights),
                        }
                    }
                },
            );
        });
    }

    #[inline(always)]
    fn write_row<const FOUR: bool>(&self, row: usize, weights: &mut [f32]) {
        let bits = if FOUR { Bits::Four } else { Bits::Eight };
        let (scales, minima) = self.row_scales(row);
        let groups = self.row(row).chunks_exact(bits.bytes(self.group));
        let groups = groups.zip(scales).zip(weights.chunks_exact_mut(self.group));
        for (g, ((codes, s), weights)) in groups.enumerate() {
            let s = single(*s);
            let m = minima.map_or(0.0, |minima| single(minima[g]));
            let blocks = codes.chunks_exact(bits.bytes(BLOCK));
            for (codes, weights) in blocks.zip(weights.chunks_exact_mut(BLOCK)) {
                let q = bits.block(codes, minima.is_some());
                for (w, q) in weights.iter_mut().zip(q) {
                    *w = q.mul_add(s, m);
                }
            }
        }
    }

    /// `y = x Wᵀ`, the integers read once for each row of `x`.
    fn multiply_few(&self, x: &[f32], y: &mut [f32]) {
        let (input, output, groups) = (self.input, self.output, self.groups());
        if input == 0 {
            return y.fill(0.0);
        }
        let rows = x.len() / input;
        // Σ of each group of x, which its minimum multiplies.
        let sums: Vec<f32> = match self.minima {
            Some(_) => x.chunks_exact(self.group).map(simd::sum).collect(),
            None => Vec::new(),
        };
        let shared = Shared::new(y);
        host::share(output, rows * input, |range| {
            simd::vectorised(
                #[inline(always)]
                || {
                    for (row, x) in x.chunks_exact(input).enumerate() {
                        let sums = sums.get(row * groups..(row + 1) * groups);
                        // SAFETY: each column of the result belongs to one range.
                        let y = unsafe { shared.part(row * output + range.start, range.len()) };
                        match self.bits {
                            Bits::Four => self.multiply_one::<true>(range.start, x, sums, y),
                            Bits::Eight => self.multiply_one::<false>(range.start, x, sums, y),
                        }
                    }
                },
            );
        });
    }

    /// Rows `first..` of the matrix times `x`, a few of them together, so that their sums need not
    /// wait for each other.
    #[inline(always)]
    fn multiply_one<const FOUR: bool>(
        &self,
        first: usize,
        x: &[f32],
        sums: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (tiles, rest) = y.as_chunks_mut::<TOGETHER>();
        let left = first + tiles.len() * TOGETHER;
        for (tile, y) in tiles.iter_mut().enumerate() {
            *y = self.dots::<FOUR, TOGETHER>(first + tile * TOGETHER, x, sums);
        }
        for (row, y) in rest.iter_mut().enumerate() {
            let [dot] = self.dots::<FOUR, 1>(left + row, x, sums);
            *y = dot;
        }
    }

    /// `Σ_g (s_g Σ_{i ∈ g} q_i x_i + m_g Σ_{i ∈ g} x_i)` of rows `first..first + N`.
    #[inline(always)]
    fn dots<const FOUR: bool, const N: usize>(
        &self,
        first: usize,
        x: &[f32],
        sums: Option<&[f32]>,
    ) -> [f32; N] {
        let bits = if FOUR { Bits::Four } else { Bits::Eight };
        let bytes = bits.bytes(self.group);
        let codes: [&[u8]; N] = std::array::from_fn(|n| self.row(first + n));
        let scales: [(&[f16], Option<&[f16]>); N] =
            std::array::from_fn(|n| self.row_scales(first + n));
        let mut totals = [[0.0f32; LANES]; N];
        for (g, x) in x.chunks_exact(self.group).enumerate() {
            for n in 0..N {
                let (scales, minima) = scales[n];
                let mut part = [0.0f32; LANES];
                let blocks = codes[n][g * bytes..(g + 1) * bytes].chunks_exact(bits.bytes(BLOCK));
                for (codes, x) in blocks.zip(x.chunks_exact(BLOCK)) {
                    let q = bits.block(codes, minima.is_some());
                    for lane in 0..LANES {
                        let low = q[lane].mul_add(x[lane], part[lane]);
                        part[lane] = q[lane + LANES].mul_add(x[lane + LANES], low);
                    }
                }
                let s = single(scales[g]);
                for lane in 0..LANES {
                    totals[n][lane] = part[lane].mul_add(s, totals[n][lane]);
                }
            }
        }
        std::array::from_fn(|n| {
            let minima = scales[n].1.zip(sums);
            let offset: f32 = minima.map_or(0.0, |(minima, sums)| {
                let pairs = minima.iter().zip(sums);
                pairs.map(|(m, sum)| single(*m) * sum).sum()
            });
            simd::sum(&totals[n]) + offset
        })
    }

    /// `y = x Wᵀ`, a panel of weights at a time.
    fn multiply_many(&self, x: &[f32], rows: usize, y: &mut [f32]) {
        let (input, output) = (self.input, self.output);
        if input == 0 {
            return y.fill(0.0);
        }
        let panel_rows = PANEL.div_ceil(input).min(output).max(1);
        let mut panel = host::unwritten::<f32>(panel_rows * input);
        for start in (0..output).step_by(panel_rows) {
            let width = panel_rows.min(output - start);
            let weights = &mut panel[..width * input];
            self.write_out(start, weights);
            multiply(
                &mut y[start..],
                output,
                Into::Replace,
                1.0,
                Matrix::packed(x, rows, input),
                Matrix::packed(weights, width, input).transposed(),
                Threads::All,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::arange;

    /// A matrix of arbitrary integers.
    fn matrix(
        bits: u32,
        group: usize,
        output: usize,
        input: usize,
        offset: bool,
    ) -> QuantisedMatrix {
        let mask = (1u32 << bits) - 1;
        let codes: Vec<u8> = (0..output * input)
            .map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 13 & mask) as u8)
            .collect();
        let groups = output * input / group;
        let scales = (0..groups)
            .map(|g| f16::from_f32(0.01 + 0.003 * (g % 7) as f32))
            .collect();
        let minima = offset.then(|| {
            (0..groups)
                .map(|g| f16::from_f32(-0.4 + 0.05 * (g % 5) as f32))
                .collect()
        });
        QuantisedMatrix::pack(bits, group, [output, input], &codes, scales, minima).unwrap()
    }

    #[test]
    fn weights_are_scale_times_integer() {
        for (bits, offset) in [(4, false), (4, true), (8, false), (8, true)] {
            let matrix = matrix(bits, 64, 3, 128, offset);
            let codes = matrix.unpacked().unwrap();
            let flat = |t: &Tensor| -> Vec<f32> {
                let t = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
                t.to_vec1().unwrap()
            };
            let weights = flat(&matrix.dequantised(DType::F32).unwrap());
            let scales = flat(matrix.scales());
            let minima = matrix.minima().map(flat);
            for (i, (w, q)) in weights.iter().zip(&codes).enumerate() {
                let truth = match &minima {
                    Some(minima) => scales[i / 64] * f32::from(*q) + minima[i / 64],
                    None => scales[i / 64] * (f32::from(*q) - (1 << (bits - 1)) as f32),
                };
                assert!((w - truth).abs() < 1e-6, "{w} for {truth}");
            }
        }
    }

    #[test]
    fn products_equal_those_of_the_weights_written_out() {
        let cases = [
            (4, 32, 5, 32),
            (4, 64, 33, 192),
            (8, 32, 200, 96),
            (8, 128, 1, 256),
        ];
        for (bits, group, output, input) in cases {
            for offset in [false, true] {
                let matrix = matrix(bits, group, output, input, offset);
                let bias = arange(&[output], 2.0, DType::F32);
                for rows in [0, 1, 3, 4, 5, 40] {
                    let x = arange(&[rows, input], 1.0, DType::F32);
                    let activation = Activation::Silu;
                    let y = quantised_linear(&x, &matrix, Some(&bias), activation).unwrap();
                    let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
                    let weight = matrix.dequantised(DType::F64).unwrap();
                    let truth =
                        linear_activation(&double(&x), &weight, Some(&double(&bias)), activation);
                    let error = (double(&y) - truth.unwrap()).unwrap().abs().unwrap();
                    let flat: Vec<f64> = error.flatten_all().unwrap().to_vec1().unwrap();
                    let worst = flat.into_iter().fold(0.0, f64::max);
                    assert!(worst < 1e-4, "{bits} bits, {rows} rows: {worst}");
                }
            }
        }
    }

    #[test]
    fn halves_become_singles_exactly() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            match half.is_nan() {
                true => assert!(single(half).is_nan()),
                false => assert_eq!(single(half).to_bits(), half.to_f32().to_bits(), "{half}"),
            }
        }
    }

    #[test]
    fn the_gradient_of_x_is_that_of_the_weights_written_out() {
        let matrix = matrix(4, 32, 6, 64, true);
        let error = crate::check::gradient_error(
            |inputs| quantised_linear(&inputs[0], &matrix, Some(&inputs[1]), Activation::Gelu),
            &[
                arange(&[3, 64], 1.0, DType::F64),
                arange(&[6], 2.0, DType::F64),
            ],
        );
        assert!(error.unwrap() < 1e-6);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pack = |bits, group, shape: [usize; 2], codes: &[u8], scales: usize| {
            QuantisedMatrix::pack(bits, group, shape, codes, vec![f16::ONE; scales], None)
        };
        assert!(pack(4, 32, [1, 32], &[1; 32], 1).is_ok());
        assert!(pack(5, 32, [1, 32], &[1; 32], 1).is_err());
        assert!(pack(4, 16, [1, 32], &[1; 32], 2).is_err());
        assert!(pack(4, 32, [1, 40], &[1; 40], 1).is_err());
        assert!(pack(4, 32, [1, 32], &[16; 32], 1).is_err());
        assert!(pack(4, 32, [1, 32], &[1; 31], 1).is_err());
        assert!(pack(4, 32, [1, 32], &[1; 32], 2).is_err());
        let matrix = pack(8, 32, [2, 32], &[1; 64], 2).unwrap();
        let x = arange(&[1, 31], 1.0, DType::F32);
        assert!(quantised_linear(&x, &matrix, None, Activation::Identity).is_err());
    }
}
