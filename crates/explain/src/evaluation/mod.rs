//! All methods on one model over one data set: how well they agree with known evidence, how
//! faithful they are to the model, and what they cost.

mod dataset;
mod images;
mod induction;
mod run;

pub use dataset::{Dataset, Example, Row, read_rows, tokenised};
pub use images::{ImageEvaluation, ImageExample, ImageRow, evaluate_images};
pub use induction::induction;
pub use run::{Evaluation, MethodRow, evaluate};
