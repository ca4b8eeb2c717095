//! Loss and gradients of a sparse autoencoder with one hidden layer.
//!
//! For a batch of `B` rows `x` `[width]`, an encoder `E` and a decoder `D`, both
//! `[features, width]`, their biases `b_e` and `b_d`, and `c = x − b_d`:
//!
//! ```text
//! f = relu(c Eᵀ + b_e)      x̂ = f D + b_d      L = 1/B Σ ‖x̂ − x‖² + λ/B Σ f
//! r = 2/B (x̂ − x)           p = (r Dᵀ + λ/B) where f > 0, else 0
//! ∂D = fᵀ r    ∂E = pᵀ c    ∂b_e = Σ p    ∂b_d = Σ r − (Σ p) E
//! ```
//!
//! Of the five products only the first has to be dense: once few features are active, the other
//! four touch the rows of active features alone. Rows are taken in pieces, so that no array of
//! the size of batch times features is ever held.

use crate::host::{self, Host, Shared, by_dtype, for_rows, fused};
use crate::linear::sum_rows;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};

type Candle<T> = candle_core::Result<T>;

/// The parameters of a sparse autoencoder.
#[derive(Clone, Copy, Debug)]
pub struct AutoencoderWeights<'a> {
    /// `[features, width]`.
    pub encoder: &'a Tensor,
    /// `[features]`.
    pub encoder_bias: &'a Tensor,
    /// `[features, width]`.
    pub decoder: &'a Tensor,
    /// `[width]`.
    pub decoder_bias: &'a Tensor,
}

/// What one pass over a batch gives.
#[derive(Clone, Debug)]
pub struct AutoencoderGradients {
    /// `[features, width]`.
    pub encoder: Tensor,
    /// `[features]`.
    pub encoder_bias: Tensor,
    /// `[features, width]`.
    pub decoder: Tensor,
    /// `[width]`.
    pub decoder_bias: Tensor,
    /// `‖x̂ − x‖²`, mean over rows.
    pub squared_error: f64,
    /// `Σ f`, mean over rows.
    pub activation: f64,
    /// In how many rows each feature is active.
    pub active: Vec<u32>,
}

/// Loss and gradients for `x` `[rows, width]`, `sparsity` being `λ`.
///
/// # Errors
/// When the shapes do not fit each other, or there are no rows.
pub fn autoencoder_gradients(
    x: &Tensor,
    weights: AutoencoderWeights<'_>,
    sparsity: f64,
) -> Result<AutoencoderGradients> {
    check(x, &weights)?;
    let AutoencoderWeights {
        encoder,
        encoder_bias,
        decoder,
        decoder_bias,
    } = weights;
    if !fused(&[x, encoder, encoder_bias, decoder, decoder_bias]) {
        return naive::autoencoder_gradients(x, weights, sparsity);
    }
    Ok(by_dtype!(x.dtype(), T => {
        let hosts = [x, encoder, encoder_bias, decoder, decoder_bias].map(Host::new);
        let [x, e, eb, d, db] = &hosts;
        let (x, e, eb) = (x.ordered::<T>()?, e.ordered::<T>()?, eb.ordered::<T>()?);
        let (d, db) = (d.ordered::<T>()?, db.ordered::<T>()?);
        let (rows, width, features) = (x.len() / db.len().max(1), db.len(), eb.len());
        let pass = Pass {
            x: &x,
            encoder: &e,
            encoder_bias: &eb,
            decoder: &d,
            decoder_bias: &db,
            rows,
            width,
            features,
            per_row: T::of(1.0 / rows as f64),
            sparsity: T::of(sparsity / rows as f64),
        };
        pass.run()
    })?)
}

fn check(x: &Tensor, weights: &AutoencoderWeights<'_>) -> Result<()> {
    let (features, width) = weights.encoder.dims2()?;
    let fits = |argument, tensor: &Tensor, expected: &[usize]| match tensor.dims() == expected {
        true => Ok(()),
        false => Err(Error::argument(
            "autoencoder",
            argument,
            tensor.dims(),
            format!("{expected:?}"),
        )),
    };
    fits("encoder_bias", weights.encoder_bias, &[features])?;
    fits("decoder", weights.decoder, &[features, width])?;
    fits("decoder_bias", weights.decoder_bias, &[width])?;
    match x.dims() {
        [rows, found] if *rows > 0 && *found == width && width > 0 => Ok(()),
        found => Err(Error::argument(
            "autoencoder",
            "x",
            found,
            format!("[at least 1 row, {width}]"),
        )),
    }
}

/// Activations held at a time.
const PIECE: usize = 1 << 20;
/// Fewest rows in a piece.
const FEWEST_ROWS: usize = 64;
/// With more than one feature in so many active, dense products are faster.
const SPARSE_FROM: usize = 8;

struct Pass<'a, T> {
    x: &'a [T],
    encoder: &'a [T],
    encoder_bias: &'a [T],
    decoder: &'a [T],
    decoder_bias: &'a [T],
    rows: usize,
    width: usize,
    features: usize,
    /// `1 / B`.
    per_row: T,
    /// `λ / B`.
    sparsity: T,
}

/// Sums over the rows so far.
struct Sums<T> {
    encoder: Vec<T>,
    encoder_bias: Vec<T>,
    decoder: Vec<T>,
    /// `Σ r`.
    residual: Vec<T>,
    squared_error: f64,
    activation: f64,
    active: Vec<u32>,
}

/// Some rows with their activations.
struct Piece<'a, T> {
    x: &'a [T],
    /// `c`, `[rows, width]`.
    centred: Vec<T>,
    /// `c Eᵀ + b_e`, `[rows, features]`.
    before: Vec<T>,
    rows: usize,
}

impl<T: Real> Pass<'_, T> {
    fn run(&self) -> Candle<AutoencoderGradients> {
        let (features, width) = (self.features, self.width);
        let mut sums = Sums {
            encoder: vec![T::zero(); features * width],
            encoder_bias: vec![T::zero(); features],
            decoder: vec![T::zero(); features * width],
            residual: vec![T::zero(); width],
            squared_error: 0.0,
            activation: 0.0,
            active: vec![0; features],
        };
        let each = (PIECE / features.max(1)).max(FEWEST_ROWS);
        for x in self.x.chunks(each * width) {
            let piece = self.encode(x);
            let counts = active_by_row(&piece.before, features, piece.rows);
            let active: usize = counts.iter().sum();
            if active * SPARSE_FROM > piece.before.len() {
                self.dense(piece, &mut sums);
            } else {
                self.sparse(&piece, &counts, &mut sums);
            }
        }
        let mut decoder_bias = sums.residual;
        for (p, row) in sums.encoder_bias.iter().zip(self.encoder.chunks(width)) {
            simd::add_scaled(&mut decoder_bias, row, -*p);
        }
        let of = |sum: f64| sum / self.rows as f64;
        Ok(AutoencoderGradients {
            encoder: host::tensor(sums.encoder, &[features, width])?,
            encoder_bias: host::tensor(sums.encoder_bias, &[features])?,
            decoder: host::tensor(sums.decoder, &[features, width])?,
            decoder_bias: host::tensor(decoder_bias, &[width])?,
            squared_error: of(sums.squared_error),
            activation: of(sums.activation),
            active: sums.active,
        })
    }

    fn encode<'b>(&self, x: &'b [T]) -> Piece<'b, T> {
        let (features, width) = (self.features, self.width);
        let rows = x.len() / width;
        let mut centred = host::unwritten::<T>(rows * width);
        for_rows(
            &mut centred,
            width,
            1,
            #[inline(always)]
            |row, c| {
                let x = &x[row * width..(row + 1) * width];
                for ((c, x), b) in c.iter_mut().zip(x).zip(self.decoder_bias) {
                    *c = *x - *b;
                }
            },
        );
        let mut before = host::unwritten::<T>(rows * features);
        for row in before.chunks_exact_mut(features.max(1)) {
            row.copy_from_slice(self.encoder_bias);
        }
        multiply(
            &mut before,
            features,
            Into::Add,
            T::one(),
            Matrix::packed(&centred, rows, width),
            Matrix::packed(self.encoder, features, width).transposed(),
            Threads::All,
        );
        Piece {
            x,
            centred,
            before,
            rows,
        }
    }

    /// `r` in place of `x̂`, and `Σ ‖x̂ − x‖²`.
    fn residual(&self, reconstruction: &mut [T], x: &[T]) -> f64 {
        let width = self.width;
        let mut errors = vec![0f64; x.len() / width];
        let shared = Shared::new(&mut errors);
        let twice = self.per_row + self.per_row;
        for_rows(
            reconstruction,
            width,
            2,
            #[inline(always)]
            |row, r| {
                let x = &x[row * width..(row + 1) * width];
                for (r, x) in r.iter_mut().zip(x) {
                    *r -= *x;
                }
                // SAFETY: each row has an error of its own.
                unsafe { shared.part(row, 1)[0] = simd::squares_about(r, T::zero()).to_f64() };
                for r in r.iter_mut() {
                    *r *= twice;
                }
            },
        );
        errors.iter().sum()
    }

    /// Many features are active: all five products as they stand.
    fn dense(&self, piece: Piece<'_, T>, sums: &mut Sums<T>) {
        let (rows, features, width) = (piece.rows, self.features, self.width);
        let mut f = piece.before;
        for_rows(
            &mut f,
            features,
            1,
            #[inline(always)]
            |_, f| {
                for f in f.iter_mut() {
                    *f = if *f > T::zero() { *f } else { T::zero() };
                }
            },
        );
        let mut r = host::unwritten::<T>(rows * width);
        for row in r.chunks_exact_mut(width) {
            row.copy_from_slice(self.decoder_bias);
        }
        let product = |result: &mut [T], into, a, b, columns| {
            multiply(result, columns, into, T::one(), a, b, Threads::All);
        };
        let decoder = Matrix::packed(self.decoder, features, width);
        let f_matrix = Matrix::packed(&f, rows, features);
        product(&mut r, Into::Add, f_matrix, decoder, width);
        sums.squared_error += self.residual(&mut r, piece.x);
        let r_matrix = Matrix::packed(&r, rows, width);
        let mut p = host::unwritten::<T>(rows * features);
        product(
            &mut p,
            Into::Replace,
            r_matrix,
            decoder.transposed(),
            features,
        );
        for_rows(
            &mut p,
            features,
            1,
            #[inline(always)]
            |row, p| {
                let f = &f[row * features..(row + 1) * features];
                for (p, f) in p.iter_mut().zip(f) {
                    *p = if *f > T::zero() {
                        *p + self.sparsity
                    } else {
                        T::zero()
                    };
                }
            },
        );
        let p_matrix = Matrix::packed(&p, rows, features).transposed();
        let centred = Matrix::packed(&piece.centred, rows, width);
        let f_matrix = f_matrix.transposed();
        product(&mut sums.decoder, Into::Add, f_matrix, r_matrix, width);
        product(&mut sums.encoder, Into::Add, p_matrix, centred, width);
        add(&mut sums.encoder_bias, &sum_rows(&p, features));
        add(&mut sums.residual, &sum_rows(&r, width));
        for row in f.chunks_exact(features.max(1)) {
            for (count, f) in sums.active.iter_mut().zip(row) {
                *count += u32::from(*f > T::zero());
            }
        }
        sums.activation += sum_rows(&f, features)
            .iter()
            .map(|f| f.to_f64())
            .sum::<f64>();
    }

    /// Few features are active: only their rows of encoder and decoder are touched.
    fn sparse(&self, piece: &Piece<'_, T>, counts: &[usize], sums: &mut Sums<T>) {
        let (features, width) = (self.features, self.width);
        let starts = starts_of(counts);
        let active = starts.last().copied().unwrap_or(0);
        let mut entries = Entries {
            feature: vec![0; active],
            f: host::unwritten(active),
            p: host::unwritten(active),
        };
        let mut r = host::unwritten::<T>(piece.rows * width);
        for row in r.chunks_exact_mut(width) {
            row.copy_from_slice(self.decoder_bias);
        }
        {
            let feature = Shared::new(&mut entries.feature);
            let f = Shared::new(&mut entries.f);
            for_rows(
                &mut r,
                width,
                1 + active / piece.rows.max(1),
                #[inline(always)]
                |row, r| {
                    let before = &piece.before[row * features..(row + 1) * features];
                    // SAFETY: each row has entries of its own.
                    let (feature, f) = unsafe {
                        (
                            feature.part(starts[row], counts[row]),
                            f.part(starts[row], counts[row]),
                        )
                    };
                    collect(before, feature, f);
                    for (feature, f) in feature.iter().zip(f.iter()) {
                        let start = *feature as usize * width;
                        simd::add_scaled(r, &self.decoder[start..start + width], *f);
                    }
                },
            );
        }
        sums.squared_error += self.residual(&mut r, piece.x);
        {
            let p = Shared::new(&mut entries.p);
            host::share(
                piece.rows,
                width * (1 + active / piece.rows.max(1)),
                |rows| {
                    simd::vectorised(
                        #[inline(always)]
                        || {
                            for row in rows.clone() {
                                let r = &r[row * width..(row + 1) * width];
                                // SAFETY: each row has entries of its own.
                                let p = unsafe { p.part(starts[row], counts[row]) };
                                for (p, feature) in
                                    p.iter_mut().zip(&entries.feature[starts[row]..])
                                {
                                    let start = *feature as usize * width;
                                    *p = simd::dot(r, &self.decoder[start..start + width])
                                        + self.sparsity;
                                }
                            }
                        },
                    );
                },
            );
        }
        self.scatter(piece, &entries, counts, &r, sums);
        add(&mut sums.residual, &sum_rows(&r, width));
        sums.activation += entries.f.iter().map(|f| f.to_f64()).sum::<f64>();
    }

    /// Adds each active entry's part to the gradients, feature by feature, so that no two
    /// threads write to one row and the order of summation is fixed.
    fn scatter(
        &self,
        piece: &Piece<'_, T>,
        entries: &Entries<T>,
        counts: &[usize],
        r: &[T],
        sums: &mut Sums<T>,
    ) {
        let (features, width) = (self.features, self.width);
        let mut of_feature = vec![0usize; features];
        for feature in &entries.feature {
            of_feature[*feature as usize] += 1;
        }
        for (total, count) in sums.active.iter_mut().zip(&of_feature) {
            *total += *count as u32;
        }
        let starts = starts_of(&of_feature);
        let mut next = starts.clone();
        // (row, entry), ordered by feature and then by row.
        let mut order = vec![(0u32, 0u32); entries.feature.len()];
        let mut entry = 0;
        for (row, count) in counts.iter().enumerate() {
            for _ in 0..*count {
                let place = &mut next[entries.feature[entry] as usize];
                order[*place] = (row as u32, entry as u32);
                *place += 1;
                entry += 1;
            }
        }
        let encoder = Shared::new(&mut sums.encoder);
        let decoder = Shared::new(&mut sums.decoder);
        let bias = Shared::new(&mut sums.encoder_bias);
        let work = 2 * width * (1 + order.len() / features.max(1));
        host::share(features, work, |range| {
            simd::vectorised(
                #[inline(always)]
                || {
                    for feature in range.clone() {
                        // SAFETY: each feature has rows of its own.
                        let (encoder, decoder, bias) = unsafe {
                            (
                                encoder.part(feature * width, width),
                                decoder.part(feature * width, width),
                                bias.part(feature, 1),
                            )
                        };
                        for (row, entry) in &order[starts[feature]..starts[feature + 1]] {
                            let (start, entry) = (*row as usize * width, *entry as usize);
                            let (f, p) = (entries.f[entry], entries.p[entry]);
                            simd::add_scaled(decoder, &r[start..start + width], f);
                            simd::add_scaled(encoder, &piece.centred[start..start + width], p);
                            bias[0] += p;
                        }
                    }
                },
            );
        });
    }
}

/// Active features of some rows, row after row.
struct Entries<T> {
    feature: Vec<u32>,
    f: Vec<T>,
    p: Vec<T>,
}

fn add<T: Real>(sum: &mut [T], term: &[T]) {
    for (sum, term) in sum.iter_mut().zip(term) {
        *sum += *term;
    }
}

/// Where each part starts when parts of these lengths lie one after the other, and the end.
fn starts_of(counts: &[usize]) -> Vec<usize> {
    let mut starts = Vec::with_capacity(counts.len() + 1);
    let mut start = 0;
    starts.push(0);
    for count in counts {
        start += count;
        starts.push(start);
    }
    starts
}

fn active_by_row<T: Real>(before: &[T], features: usize, rows: usize) -> Vec<usize> {
    let mut counts = vec![0usize; rows];
    let shared = Shared::new(&mut counts);
    host::share(rows, features, |range| {
        simd::vectorised(
            #[inline(always)]
            || {
                for row in range.clone() {
                    let before = &before[row * features..(row + 1) * features];
                    let count: u32 = before.iter().map(|z| u32::from(*z > T::zero())).sum();
                    // SAFETY: each row has a count of its own.
                    unsafe { shared.part(row, 1)[0] = count as usize };
                }
            },
        );
    });
    counts
}

/// Writes the positive numbers of a row and where they stand; there are as many as `f` is long.
#[inline(always)]
fn collect<T: Real>(before: &[T], feature: &mut [u32], f: &mut [T]) {
    let mut place = 0;
    for (group, values) in before.chunks(simd::LANES).enumerate() {
        if values.iter().all(|z| *z <= T::zero()) {
            continue;
        }
        for (lane, z) in values.iter().enumerate() {
            if *z > T::zero() && place < f.len() {
                feature[place] = (group * simd::LANES + lane) as u32;
                f[place] = *z;
                place += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::difference;
    use crate::test_data::arange;
    use crate::{DType, Var};

    const ROWS: usize = 150;
    const WIDTH: usize = 19;
    const FEATURES: usize = 70;

    /// `x`, encoder, encoder bias, decoder, decoder bias; with the bias lowered, few are active.
    fn example(dtype: DType, bias: f64) -> [Tensor; 5] {
        let of = |dims: &[usize], phase| (arange(dims, phase, dtype) * 0.3).unwrap();
        [
            of(&[ROWS, WIDTH], 1.0),
            of(&[FEATURES, WIDTH], 2.0),
            (of(&[FEATURES], 3.0) + bias).unwrap(),
            of(&[FEATURES, WIDTH], 4.0),
            of(&[WIDTH], 5.0),
        ]
    }

    fn weights(all: &[Tensor; 5]) -> AutoencoderWeights<'_> {
        AutoencoderWeights {
            encoder: &all[1],
            encoder_bias: &all[2],
            decoder: &all[3],
            decoder_bias: &all[4],
        }
    }

    #[test]
    fn equals_the_composition_however_many_features_are_active() {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F64, 1e-12)] {
            for (bias, sparse) in [(0.0, false), (-5.0, true), (-1e6, true)] {
                let all = example(dtype, bias);
                let fast = autoencoder_gradients(&all[0], weights(&all), 0.3).unwrap();
                let plain = naive::autoencoder_gradients(&all[0], weights(&all), 0.3).unwrap();
                let active: u32 = fast.active.iter().sum();
                assert_eq!(
                    active as usize * SPARSE_FROM <= ROWS * FEATURES,
                    sparse,
                    "{active} active do not test this path"
                );
                assert_eq!(fast.active, plain.active);
                for (fast, plain) in [
                    (&fast.encoder, &plain.encoder),
                    (&fast.encoder_bias, &plain.encoder_bias),
                    (&fast.decoder, &plain.decoder),
                    (&fast.decoder_bias, &plain.decoder_bias),
                ] {
                    let size = plain.abs().unwrap().max_all().unwrap();
                    let size = size
                        .to_dtype(DType::F64)
                        .unwrap()
                        .to_scalar::<f64>()
                        .unwrap();
                    let error = difference(fast, plain).unwrap();
                    assert!(
                        error <= tolerance * size.max(1.0),
                        "{bias} {dtype:?}: {error}"
                    );
                }
                let same = |a: f64, b: f64| (a - b).abs() <= tolerance * (1.0 + b.abs());
                assert!(same(fast.squared_error, plain.squared_error));
                assert!(same(fast.activation, plain.activation));
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for bias in [0.0, -5.0] {
            let all = example(DType::F64, bias);
            let found = autoencoder_gradients(&all[0], weights(&all), 0.3).unwrap();
            let gradients = [
                &found.encoder,
                &found.encoder_bias,
                &found.decoder,
                &found.decoder_bias,
            ];
            let loss = |all: &[Tensor; 5]| {
                let found = autoencoder_gradients(&all[0], weights(all), 0.3).unwrap();
                found.squared_error + 0.3 * found.activation
            };
            const STEP: f64 = 1e-6;
            for (which, gradient) in gradients.into_iter().enumerate() {
                let values = all[which + 1]
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f64>()
                    .unwrap();
                let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                for element in (0..values.len()).step_by(37) {
                    let at = |delta: f64| {
                        let mut moved = values.clone();
                        moved[element] += delta;
                        let mut all = all.clone();
                        let shape = all[which + 1].shape().clone();
                        all[which + 1] =
                            Tensor::from_vec(moved, shape, &crate::Device::Cpu).unwrap();
                        loss(&all)
                    };
                    let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                    let error = (gradient[element] - numeric).abs() / (1.0 + numeric.abs());
                    assert!(error < 1e-5, "{which} {element}: {error}");
                }
            }
        }
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads_or_on_pieces() {
        let all = example(DType::F32, -5.0);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build()
                .unwrap()
                .install(|| autoencoder_gradients(&all[0], weights(&all), 0.3).unwrap())
        };
        let one = with(1);
        for threads in [2, 5] {
            let many = with(threads);
            assert_eq!(difference(&one.encoder, &many.encoder).unwrap(), 0.0);
            assert_eq!(
                difference(&one.decoder_bias, &many.decoder_bias).unwrap(),
                0.0
            );
            assert_eq!(one.squared_error, many.squared_error);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let all = example(DType::F32, 0.0);
        let wrong = AutoencoderWeights {
            decoder_bias: &all[2],
            ..weights(&all)
        };
        let error = autoencoder_gradients(&all[0], wrong, 0.0).unwrap_err();
        assert!(error.to_string().contains("decoder_bias"), "{error}");
        let empty = all[0].narrow(0, 0, 0).unwrap();
        assert!(autoencoder_gradients(&empty, weights(&all), 0.0).is_err());
        // Variables do as well as tensors.
        let variable = Var::from_tensor(&all[1]).unwrap();
        let trained = AutoencoderWeights {
            encoder: &variable,
            ..weights(&all)
        };
        assert!(autoencoder_gradients(&all[0], trained, 0.0).is_ok());
    }
}
