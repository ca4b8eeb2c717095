//! What chosen components said of every image of a data set, in memory or on disk.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::image_tower::{Component, ImageTower};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_factor::{Matrix, MatrixView};
use lapidary_kernels::{DType, Tensor};

/// Outputs `[images, chosen components, features]` in `f32`, image by image.
#[derive(Debug)]
pub struct HeadOutputs {
    components: Vec<Component>,
    /// Their places among all components of the tower.
    places: Vec<u32>,
    features: usize,
    images: usize,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<f32>),
    Disk(Scratch),
}

/// A file that is gone with its owner.
#[derive(Debug)]
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing is lost when a scratch file stays behind.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl HeadOutputs {
    /// Outputs of `components` of `tower`, kept in memory.
    pub fn in_memory(tower: &ImageTower<'_>, components: &[Component]) -> Result<Self> {
        Self::new(tower, components, Store::Memory(Vec::new()))
    }

    /// As [`HeadOutputs::in_memory`], in a scratch file of `directory`, for data sets whose
    /// outputs do not fit in memory. The file is removed with the value.
    pub fn on_disk(
        tower: &ImageTower<'_>,
        components: &[Component],
        directory: &Path,
    ) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        for attempt in 0..1000 {
            let path = directory.join(format!("outputs-{}-{attempt}.tmp", std::process::id()));
            match options.open(&path) {
                Ok(file) => {
                    let scratch = Scratch { file, path };
                    return Self::new(tower, components, Store::Disk(scratch));
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&path, &error)),
            }
        }
        let found = directory.display().to_string();
        Err(Error::invalid("scratch directory", found, "one with room"))
    }

    fn new(tower: &ImageTower<'_>, components: &[Component], store: Store) -> Result<Self> {
        let places = components
            .iter()
            .map(|component| tower.index_of(*component).map(|place| place as u32))
            .collect::<Result<Vec<_>>>()?;
        if places.is_empty() {
            return Err(Error::invalid("components", "none", "at least one"));
        }
        Ok(Self {
            components: components.to_vec(),
            places,
            features: engine(tower.ones.dim(1))?,
            images: 0,
            store,
        })
    }

    /// Adds the chosen ones of all components `[images, components, features]`.
    pub fn add(&mut self, components: &Tensor) -> Result<()> {
        let places = Tensor::from_slice(&self.places, self.places.len(), components.device());
        let chosen = engine(components.index_select(&engine(places)?, 1))?;
        let numbers = engine(engine(chosen.to_dtype(DType::F32))?.flatten_all())?;
        let numbers = engine(numbers.to_vec1::<f32>())?;
        match &mut self.store {
            Store::Memory(all) => all.extend(numbers),
            Store::Disk(Scratch { file, path }) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
                file.seek(SeekFrom::End(0))
                    .and_then(|_| file.write_all(&bytes))
                    .map_err(|error| failed(path, &error))?;
            }
        }
        self.images += engine(components.dim(0))?;
        Ok(())
    }

    /// The components that are kept.
    pub fn components(&self) -> &[Component] {
        &self.components
    }

    /// Images so far.
    pub fn images(&self) -> usize {
        self.images
    }

    /// What one component said: `[images, features]`.
    ///
    /// # Errors
    /// When it is not kept, there are no images, or the file cannot be read.
    pub fn of(&mut self, component: Component) -> Result<Matrix> {
        let place = self.components.iter().position(|one| *one == component);
        let place = place.ok_or_else(|| {
            Error::invalid("component", component, "one that outputs are kept of")
        })?;
        if self.images == 0 {
            return Err(Error::invalid("images", 0, "at least 1"));
        }
        let row = self.components.len() * self.features;
        let mut rows: Vec<f64> = Vec::with_capacity(self.images * self.features);
        match &mut self.store {
            Store::Memory(all) => {
                let start = place * self.features;
                for image in all.chunks_exact(row) {
                    let of_image = image.get(start..start + self.features).unwrap_or(&[]);
                    rows.extend(of_image.iter().map(|number| f64::from(*number)));
                }
            }
            Store::Disk(Scratch { file, path }) => {
                let mut bytes = vec![0u8; 4 * self.features];
                for image in 0..self.images {
                    let start = 4 * (image * row + place * self.features);
                    file.seek(SeekFrom::Start(start as u64))
                        .and_then(|_| file.read_exact(&mut bytes))
                        .map_err(|error| failed(path, &error))?;
                    let numbers = bytes.as_chunks::<4>().0;
                    rows.extend(numbers.iter().map(|n| f64::from(f32::from_le_bytes(*n))));
                }
            }
        }
        Ok(MatrixView::from_row_major_slice(&rows, self.images, self.features).to_owned())
    }
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    let what = format!("scratch file {}", path.display());
    Error::invalid(what, error, "one that can be written and read")
}
