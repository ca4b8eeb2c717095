//! What tests make streams of, and ask of them.

use std::sync::Arc;

use super::expression::Expression;
use super::{Form, StreamSpace, Streams};
use crate::Result;
use lapidary_kernels::Tensor;

impl Streams {
    /// The same streams, multiplied out: what the lazy forms are compared with.
    pub(crate) fn stored(&self, value: &Tensor) -> Result<Self> {
        let form = Form::Mixed(Expression::stored(&self.dense(value)?)?);
        Ok(Self {
            space: self.space.clone(),
            form,
            pending: self.pending.clone(),
        })
    }

    pub(crate) fn is_unmixed_for_tests(&self) -> bool {
        !self.is_mixed()
    }

    /// Any streams `[streams, ..]`, for tests.
    pub(crate) fn of_dense(space: Arc<StreamSpace>, dense: &Tensor) -> Result<Self> {
        let form = Form::Mixed(Expression::stored(dense)?);
        Ok(Self {
            space,
            form,
            pending: None,
        })
    }
}
