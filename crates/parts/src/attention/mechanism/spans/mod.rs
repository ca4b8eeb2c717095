//! Spans of tokens in summary: keys and values of their own, made of those of their tokens.
//!
//! A mechanism says which spans a query meets ([`Span`]); those that end in a pass are made in it
//! ([`Ended`], [`Summaries`]), and while decoding those that are over are kept as long as later tokens
//! meet them ([`SpanMemory`]), so that none is made twice. Rows of keys are, sequence by sequence, first
//! those of kept summaries and then those of tokens; summaries that are made stand behind all.

mod ended;
mod memory;
mod mixing;
mod pooling;
mod span;
mod summaries;

pub(super) use ended::{Ended, Making};
pub(super) use memory::Rules;
pub use memory::SpanMemory;
pub(super) use mixing::{Joined, Summarised};
pub use pooling::Pooling;
pub(super) use pooling::{Pooled, RowKeys, Rows};
pub(super) use span::{Sort, Span};
pub(super) use summaries::Summaries;
