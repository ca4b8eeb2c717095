//! Data to train on: token files, windows over them, vertices of a graph, and tasks that generate it.

mod batch;
mod language;
mod masked;
mod synthetic;
mod text;
mod token_file;
mod vertices;
mod windows;

pub use batch::{Batch, IGNORE, Task};
pub use language::LanguageTask;
pub use masked::{Masked, MaskingSpec};
pub use synthetic::{Addition, AssociativeRecall, Copying, Induction};
pub(crate) use text::each_piece;
pub use text::{BYTE_VOCABULARY, bytes, words, write_text};
pub use token_file::{TokenFile, TokenWriter};
pub use vertices::{Vertices, VerticesFile};
pub use windows::{Order, Windows, split};
