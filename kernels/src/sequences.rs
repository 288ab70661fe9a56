//! Packed sequences: several in a batch of one, behind each other.

use crate::error::OpError;
use candle_core::Result;

/// Number of sequences in `[batch, tokens]`: one a batch, or those between `borders`, which start with 0, end with the number
/// of tokens and never fall.
pub(crate) fn count(
    op: &'static str,
    (batch, tokens): (usize, usize),
    borders: Option<&[usize]>,
) -> Result<usize> {
    let Some(borders) = borders else {
        return Ok(batch);
    };
    let fits = borders.len() >= 2
        && borders.first() == Some(&0)
        && borders.last() == Some(&tokens)
        && borders.is_sorted();
    let refuse = |expected: String| -> Result<usize> {
        Err(OpError::value(op, "sequences", format!("{borders:?}"), expected).into())
    };
    if batch != 1 || !fits {
        return refuse(format!(
            "0, .., {tokens} that never falls, in a batch of 1 (the batch is {batch})"
        ));
    }
    Ok(borders.len() - 1)
}
