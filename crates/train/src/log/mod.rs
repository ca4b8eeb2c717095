//! What a training run says while it runs: [`JsonLines`] for programs, [`EventFile`] for
//! TensorBoard, [`Progress`] for people at a terminal.

mod events;
mod json_lines;
mod progress;

pub use events::EventFile;
pub use json_lines::JsonLines;
pub use progress::Progress;
