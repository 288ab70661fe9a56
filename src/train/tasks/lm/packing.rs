//! Windows of a batch as packed documents: one behind the other in a batch of one, with borders where a window or a document begins.

use candle_core::{Device, Result, Tensor};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::LanguageModel;

use super::masking::IGNORED;
use crate::train::TaskResult;

/// A batch of packed documents.
pub(super) struct Packed {
    /// `[1, B N]`.
    pub ids: Tensor,
    /// `[1, B N]`, [`IGNORED`] behind the end of a document.
    pub targets: Tensor,
    /// Where documents, or parts of them, begin, and the number of tokens.
    pub borders: Vec<usize>,
}

impl Packed {
    /// Of `ids` and `targets` `[B, N]` on the host, whose documents end with the token `end`.
    ///
    /// # Errors
    /// A failing operation.
    pub(super) fn of(ids: &Tensor, targets: &Tensor, end: u16) -> Result<Self> {
        let (batch, context) = ids.dims2()?;
        let tokens = batch * context;
        let seen = ids.flatten_all()?.to_vec1::<u32>()?;
        let mut wanted = targets.flatten_all()?.to_vec1::<u32>()?;
        let mut borders = vec![0];
        for (at, (&id, target)) in seen.iter().zip(&mut wanted).enumerate() {
            let ends = id == u32::from(end);
            if ends {
                *target = IGNORED;
            }
            if ends || (at + 1) % context == 0 {
                borders.push(at + 1);
            }
        }
        Ok(Self {
            ids: Tensor::from_vec(seen, (1, tokens), &Device::Cpu)?,
            targets: Tensor::from_vec(wanted, (1, tokens), &Device::Cpu)?,
            borders,
        })
    }
}

/// Whether a model can tell packed documents apart, tried on two tokens.
///
/// # Errors
/// It cannot, in words.
pub(super) fn check(model: &LanguageModel, device: &Device) -> TaskResult<()> {
    let ids = Ids::new(&[0, 0], &[1, 2], model.config().vocab_size)?;
    let targets = Tensor::zeros((1, 2), candle_core::DType::U32, device)?;
    let tried = model.packed_losses(&ids, &targets, &[0, 1, 2], &Options::default());
    // Where the environment asks for backtraces, the message has one below its line.
    let line = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    Ok(tried.map(drop).map_err(line)?)
}
