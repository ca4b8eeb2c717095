//! Sums over the activations at sites, taken while the model runs: no activation outlives the
//! operation after it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use lapidary_kernels::{DType, Device, SecondMoment, Tensor};
use lapidary_model::Input;
use lapidary_signal::Trace;

use crate::data::{Batch, real_rows};
use crate::error::engine;
use crate::held::Held;
use crate::requirements::Statistic;
use crate::{Error, Result};

/// Where each token id counts as a vector with a single one: the input of the embedding table.
pub(crate) const TOKEN_IDS: &str = "input_ids";

/// `Σ x_i²`, `Σ x_i`, `Σ |x_i|`, `max |x_i|` and `Σ x xᵀ` at one site.
#[derive(Debug, Default)]
struct Sums {
    wants_covariance: bool,
    wants_squares: bool,
    wants_means: bool,
    wants_magnitudes: bool,
    wants_peaks: bool,
    rows: u64,
    squares: Option<Tensor>,
    means: Option<Tensor>,
    magnitudes: Option<Tensor>,
    peaks: Option<Tensor>,
    covariance: Option<SecondMoment>,
}

impl Sums {
    fn add(&mut self, x: &Tensor, real: Option<&Tensor>) -> lapidary_kernels::Result<()> {
        let x = real_rows(&x.detach(), real)?;
        let (rows, width) = x.dims2()?;
        self.rows += rows as u64;
        if self.wants_covariance {
            let covariance = self.covariance.take();
            let mut covariance = covariance.unwrap_or_else(|| SecondMoment::new(width));
            covariance.add(&x)?;
            self.covariance = Some(covariance);
        }
        let sums = self.wants_squares || self.wants_means || self.wants_magnitudes;
        if !sums && !self.wants_peaks {
            return Ok(());
        }
        let x = x.to_dtype(DType::F64)?;
        if self.wants_squares {
            self.squares = Some(sum(self.squares.take(), x.sqr()?.sum(0)?)?);
        }
        if self.wants_means {
            self.means = Some(sum(self.means.take(), x.sum(0)?)?);
        }
        if self.wants_magnitudes {
            self.magnitudes = Some(sum(self.magnitudes.take(), x.abs()?.sum(0)?)?);
        }
        if self.wants_peaks && rows > 0 {
            let peaks = x.abs()?.max(0)?;
            self.peaks = Some(match self.peaks.take() {
                Some(earlier) => earlier.maximum(&peaks)?,
                None => peaks,
            });
        }
        Ok(())
    }
}

fn sum(total: Option<Tensor>, term: Tensor) -> lapidary_kernels::Result<Tensor> {
    match total {
        Some(total) => Ok((total + term)?),
        None => Ok(term),
    }
}

/// `Σ cos(x, y)` of two sites.
#[derive(Debug)]
struct Pair {
    from: String,
    to: String,
    /// What the first site wrote in this pass, until the second is written.
    first: Option<Tensor>,
    sum: f64,
    rows: u64,
}

impl Pair {
    fn see(
        &mut self,
        site: &str,
        x: &Tensor,
        real: Option<&Tensor>,
    ) -> lapidary_kernels::Result<()> {
        if site == self.to
            && let Some(first) = self.first.take()
        {
            let second = real_rows(&x.detach(), real)?.to_dtype(DType::F64)?;
            let lengths = (first.sqr()?.sum(1)? * second.sqr()?.sum(1)?)?.sqrt()?;
            // A vector without length turns nothing.
            let products = (first * second)?.sum(1)?.to_vec1::<f64>()?;
            let cosines = products.iter().zip(lengths.to_vec1::<f64>()?).map(
                |(product, length)| match length > 0.0 {
                    true => product / length,
                    false => 1.0,
                },
            );
            self.sum += cosines.sum::<f64>();
            self.rows += products.len() as u64;
        }
        if site == self.from {
            self.first = Some(real_rows(&x.detach(), real)?.to_dtype(DType::F64)?);
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Everything {
    sites: BTreeMap<String, Sums>,
    pairs: Vec<Pair>,
}

/// The sums at every site that is asked for.
#[derive(Debug, Default)]
pub(crate) struct SiteSums {
    sites: Arc<Mutex<Everything>>,
    vocabulary: usize,
}

impl SiteSums {
    pub(crate) fn new(statistics: &BTreeSet<Statistic>, vocabulary: usize) -> Self {
        let mut sites: BTreeMap<String, Sums> = BTreeMap::new();
        let mut pairs = Vec::new();
        for statistic in statistics {
            match statistic {
                Statistic::InputSquares { site } => {
                    sites.entry(site.clone()).or_default().wants_squares = true;
                }
                Statistic::InputMeans { site } => {
                    sites.entry(site.clone()).or_default().wants_means = true;
                }
                Statistic::InputMagnitudes { site } => {
                    sites.entry(site.clone()).or_default().wants_magnitudes = true;
                }
                Statistic::InputPeaks { site } => {
                    sites.entry(site.clone()).or_default().wants_peaks = true;
                }
                Statistic::Covariance { site } => {
                    sites.entry(site.clone()).or_default().wants_covariance = true;
                }
                Statistic::Similarity { from, to } => pairs.push(Pair {
                    from: from.clone(),
                    to: to.clone(),
                    first: None,
                    sum: 0.0,
                    rows: 0,
                }),
                _ => {}
            }
        }
        Self {
            sites: Arc::new(Mutex::new(Everything { sites, pairs })),
            vocabulary,
        }
    }

    /// A trace that adds one batch to the sums as it passes.
    pub(crate) fn trace(&self, batch: &Batch<'_>) -> Result<Trace> {
        let names: BTreeSet<String> = {
            let everything = lock(&self.sites);
            let ends = everything.pairs.iter();
            let ends = ends.flat_map(|pair| [pair.from.clone(), pair.to.clone()]);
            everything.sites.keys().cloned().chain(ends).collect()
        };
        let mut trace = Trace::new();
        for name in names.iter().filter(|name| *name != TOKEN_IDS) {
            let sites = self.sites.clone();
            let real = batch.real.clone();
            trace = trace.replace(name, move |site, signal| {
                let mut everything = lock(&sites);
                if let Some(sums) = everything.sites.get_mut(site) {
                    sums.add(signal.value(), real.as_ref())?;
                }
                for pair in &mut everything.pairs {
                    pair.see(site, signal.value(), real.as_ref())?;
                }
                Ok(signal)
            })?;
        }
        self.count_tokens(batch)?;
        Ok(trace)
    }

    /// The squares of vectors with a single one are the counts of token ids.
    fn count_tokens(&self, batch: &Batch<'_>) -> Result<()> {
        let mut everything = lock(&self.sites);
        let (Some(sums), Input::Tokens { ids, .. }) =
            (everything.sites.get_mut(TOKEN_IDS), &batch.input)
        else {
            return Ok(());
        };
        let mut ids = engine(ids.flatten_all())?;
        if let Some(real) = &batch.real {
            ids = engine(ids.index_select(real, 0))?;
        }
        let ids = engine(ids.to_vec1::<u32>())?;
        let mut counts = vec![0f64; self.vocabulary];
        for id in &ids {
            if let Some(count) = counts.get_mut(*id as usize) {
                *count += 1.0;
            }
        }
        let counts = engine(Tensor::from_vec(counts, self.vocabulary, &Device::Cpu))?;
        sums.rows += ids.len() as u64;
        sums.squares = Some(sum(sums.squares.take(), counts)?);
        Ok(())
    }

    /// The means and the peaks, by statistic. A site that the model never wrote is an error.
    pub(crate) fn finish(self) -> Result<BTreeMap<Statistic, Held>> {
        let mut means = BTreeMap::new();
        let everything = std::mem::take(&mut *lock(&self.sites));
        for pair in everything.pairs {
            if pair.rows == 0 {
                return Err(unwritten(&format!("{} or {}", pair.from, pair.to)));
            }
            let mean = engine(Tensor::new(pair.sum / pair.rows as f64, &Device::Cpu))?;
            let (from, to) = (pair.from, pair.to);
            means.insert(Statistic::Similarity { from, to }, Held::Values(mean));
        }
        for (site, sums) in everything.sites {
            if sums.rows == 0 {
                return Err(unwritten(&site));
            }
            let scale = 1.0 / sums.rows as f64;
            let mean = |sum: Tensor| engine(sum.affine(scale, 0.0)).map(Held::Values);
            if let Some(squares) = sums.squares {
                let statistic = Statistic::InputSquares { site: site.clone() };
                means.insert(statistic, mean(squares)?);
            }
            if let Some(sum) = sums.means {
                let statistic = Statistic::InputMeans { site: site.clone() };
                means.insert(statistic, mean(sum)?);
            }
            if let Some(magnitudes) = sums.magnitudes {
                let statistic = Statistic::InputMagnitudes { site: site.clone() };
                means.insert(statistic, mean(magnitudes)?);
            }
            if let Some(peaks) = sums.peaks {
                let statistic = Statistic::InputPeaks { site: site.clone() };
                means.insert(statistic, Held::Values(peaks));
            }
            if let Some(covariance) = sums.covariance {
                let statistic = Statistic::Covariance { site };
                means.insert(statistic, Held::Moment(Arc::new(covariance), scale));
            }
        }
        Ok(means)
    }
}

fn unwritten(site: &str) -> Error {
    let (found, expected) = match site.contains(".experts.") {
        // An expert writes where tokens go to it, which few texts may not do.
        true => (
            "of an expert that no token went to",
            "one that some token goes to: calibrate on more text, choose other layers, or a method that needs no \
             activations",
        ),
        false => (
            "written by no module",
            "one that the model writes: choose other layers, or a method that needs no activations",
        ),
    };
    Error::invalid(format!("site {site}"), found, expected)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic elsewhere leaves plain sums behind, whose calibration is then never finished.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
