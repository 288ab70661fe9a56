//! Files of weights in any form: safetensors by their ending, else checkpoints of PyTorch.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::torch::Checkpoint;
use super::{ParamsError, few_bits, file};

/// Ending of safetensors files.
pub(super) const SAFE: &str = "safetensors";
/// Endings of checkpoints of PyTorch.
pub(super) const TORCH: [&str; 4] = ["pth", "pt", "ckpt", "bin"];

fn is_safe(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == SAFE)
}

/// Names and shapes of the tensors of a file; no values are read.
pub(super) fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>, ParamsError> {
    match is_safe(path) {
        true => file::shapes(path),
        false => Ok(Checkpoint::open(path)?.shapes()),
    }
}

/// The tensors of a file for whose names `keep` holds, on the CPU, and the free text of its header. Tensors in few bits are widened.
pub(super) fn read(path: &Path, keep: Option<&dyn Fn(&str) -> bool>) -> Result<file::Contents, ParamsError> {
    let mut contents = match (is_safe(path), keep) {
        (true, None) => file::read(path, &Device::Cpu)?,
        (true, Some(keep)) => file::read_part(path, |name| {
            keep(name) || few_bits::of_scales(name).is_some_and(keep)
        })?,
        (false, keep) => {
            let all = |_: &str| true;
            let tensors: BTreeMap<String, Tensor> = Checkpoint::open(path)?.read(keep.unwrap_or(&all))?;
            return Ok(file::Contents {
                tensors,
                metadata: BTreeMap::new(),
            });
        }
    };
    contents.tensors = few_bits::widen(path, contents.tensors)?;
    if let Some(keep) = keep {
        contents.tensors.retain(|name, _| keep(name));
    }
    Ok(contents)
}
