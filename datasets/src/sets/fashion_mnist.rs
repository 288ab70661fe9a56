//! `fashion-mnist`: 70,000 grey pictures of clothes, 28 by 28, ten classes (Xiao, Rasul and Vollgraf, 2017).
//!
//! Prepared tensors, for SPLIT `train` (60,000) and `test` (10,000): `SPLIT.images` u8 [n, 28, 28], `SPLIT.labels`
//! u8 [n].

use super::{Job, Set};
use crate::fetch::packages::FASHION_MNIST;
use crate::fetch::{FetchError, unpack};
use crate::labelled::idx;
pub use crate::labelled::prepared::fashion_mnist::{CLASSES, FashionMnist, SIDE};
use crate::labelled::prepared::fashion_mnist::{FILE, SPLITS};
use crate::store::{Plain, write_tensors};

pub(super) const SET: Set = Set {
    name: "fashion-mnist",
    description: "70,000 grey pictures of clothes, 28x28, ten classes",
    licence: "MIT",
    packages: &[&FASHION_MNIST],
    prepare,
};

const FOLDER: &str = "usr/share/datasets/fashion-mnist/";

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let entries = job.read(0, &|path| path.starts_with(FOLDER) && path.ends_with(".gz"))?;
    let total = SPLITS.iter().map(|(_, _, count)| count).sum();
    job.begin(total);
    let mut tensors = Vec::new();
    for (name, prefix, count) in SPLITS {
        let idx = |kind: &str, shape: &[usize]| {
            let path = format!("{FOLDER}{prefix}-{kind}-ubyte.gz");
            let bytes = unpack::gunzip(job.entry(&entries, &path)?, &path)?;
            Ok::<_, FetchError>(Plain::u8(shape, read_idx(&bytes, shape, &path)?.to_vec()))
        };
        tensors.push((
            format!("{name}.images"),
            idx("images-idx3", &[count, SIDE, SIDE])?,
        ));
        tensors.push((format!("{name}.labels"), idx("labels-idx1", &[count])?));
    }
    write_tensors(&job.out.join(FILE), tensors, None)?;
    job.advance(total)?;
    Ok(total)
}

/// The bytes of an IDX file of this shape.
fn read_idx<'a>(bytes: &'a [u8], shape: &[usize], label: &str) -> Result<&'a [u8], FetchError> {
    let (found, data) = idx::parse(bytes, shape.len())
        .map_err(|fault| FetchError::format(label, fault.field, fault.found, fault.expected))?;
    if found != shape {
        let (found, expected) = (format!("{found:?}"), format!("{shape:?}"));
        return Err(FetchError::format(label, "shape", found, expected));
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idx_files_are_read_exactly() {
        let whole = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        assert_eq!(read_idx(&whole, &[2, 3], "a").unwrap(), [1, 2, 3, 4, 5, 6]);
        for length in 0..whole.len() {
            assert!(read_idx(&whole[..length], &[2, 3], "a").is_err(), "{length}");
        }
        let text = read_idx(&whole, &[2, 4], "a").unwrap_err().to_string();
        assert_eq!(text, "a: shape: found [2, 3], expected [2, 4]");
        let text = read_idx(&whole, &[6], "a").unwrap_err().to_string();
        assert!(text.starts_with("a: header: found [00, 00, 08, 02"), "{text}");
        let long = [whole.as_slice(), &[7]].concat();
        assert_eq!(
            read_idx(&long, &[2, 3], "a").unwrap_err().to_string(),
            "a: bytes: found 7, expected as many as shape [2, 3] has"
        );
    }
}
