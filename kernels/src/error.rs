//! What an operator says when its input does not fit.

use candle_core::{DType, Tensor};

/// Why an operator refused its input. Entries return it wrapped in [`candle_core::Error`], one line long.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// A tensor has the wrong shape.
    #[error("{op}: {field} has shape {found:?}, expected {expected}")]
    Shape {
        /// Name of the operator.
        op: &'static str,
        /// Name of the argument.
        field: &'static str,
        /// Shape that was given.
        found: Vec<usize>,
        /// Shape that fits, in words.
        expected: String,
    },
    /// A tensor has an element type that the operator does not compute with.
    #[error("{op}: {field} is {found:?} on {device}, supported: {supported}")]
    DType {
        /// Name of the operator.
        op: &'static str,
        /// Name of the argument.
        field: &'static str,
        /// Element type that was given.
        found: DType,
        /// Where the tensor lies.
        device: &'static str,
        /// Element types that work there.
        supported: &'static str,
    },
    /// A number is outside of its range.
    #[error("{op}: {field} is {found}, expected {expected}")]
    Value {
        /// Name of the operator.
        op: &'static str,
        /// Name of the argument.
        field: &'static str,
        /// Value that was given.
        found: String,
        /// Range that fits, in words.
        expected: String,
    },
}

impl From<OpError> for candle_core::Error {
    fn from(error: OpError) -> Self {
        // Not `Error::wrap`, which appends a backtrace to the message where backtraces are on.
        Self::Wrapped(Box::new(error))
    }
}

impl OpError {
    /// The error of `tensor`, named `field`, that should have been `expected`.
    pub(crate) fn shape(
        op: &'static str,
        field: &'static str,
        tensor: &Tensor,
        expected: impl Into<String>,
    ) -> Self {
        Self::Shape {
            op,
            field,
            found: tensor.dims().to_vec(),
            expected: expected.into(),
        }
    }

    /// The error of the number `field` that should have been `expected`.
    pub(crate) fn value(
        op: &'static str,
        field: &'static str,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Value {
            op,
            field,
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
