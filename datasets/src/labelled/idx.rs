//! IDX files, the format of MNIST: 0, 0, the type 8 (unsigned bytes), the number of dimensions, every dimension as big-endian u32, the
//! bytes.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use flate2::read::GzDecoder;

use super::{Entry, Labelled, LabelledError, Pixels, Skipped};

/// Most bytes of an unpacked file.
const MOST: u64 = 4 << 30;
/// What a file that is packed with gzip begins with.
const GZIP: [u8; 2] = [0x1f, 0x8b];

impl Labelled {
    /// Grey pictures and their labels from two IDX files, packed with gzip or not; the classes are numbers, from 0 to the largest label.
    /// Where the names hold `train` and files with `t10k` or `test` in its place lie beside them, those are held out; else the hash of
    /// its number decides where a picture goes.
    ///
    /// # Errors
    /// A file cannot be read, is no whole IDX file of bytes, the numbers of pictures and labels differ, or pictures are empty.
    pub fn idx(images: &Path, labels: &Path) -> Result<Self, LabelledError> {
        let mut parts = vec![Pair::read(images, labels)?];
        if let Some([images, labels]) = test_files(images, labels) {
            let test = Pair::read(&images, &labels)?;
            let [height, width] = parts[0].side;
            if test.side != parts[0].side {
                let found = format!("{} x {}", test.side[1], test.side[0]);
                let expected = format!("{width} x {height}, as in training");
                return Err(LabelledError::invalid(&images, "size", found, expected));
            }
            parts.push(test);
        }
        let in_parts = parts.len() > 1;
        let most = parts.iter().flat_map(|part| &part.labels).max().copied();
        let [height, width] = parts[0].side;
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = Vec::new();
        for (number, part) in parts.into_iter().enumerate() {
            for label in part.labels {
                let place = entries.len();
                let mut entry = Entry::hashed(place, Some(usize::from(label)), None, place.to_string());
                if in_parts {
                    entry.held_out = number == 1;
                }
                entries.push(entry);
            }
            if bytes.is_empty() {
                bytes = part.bytes;
            } else {
                bytes.extend(part.bytes);
            }
        }
        Ok(Self {
            name: images.display().to_string(),
            classes: (0..=most.unwrap_or(0)).map(|class| class.to_string()).collect(),
            entries,
            pixels: Pixels::Grey { bytes, width, height },
            skipped: Skipped::default(),
        })
    }
}

/// The files of the held-out part that belong to those of the training part, if there are both.
fn test_files(images: &Path, labels: &Path) -> Option<[std::path::PathBuf; 2]> {
    ["t10k", "test"].into_iter().find_map(|name| {
        let other = |path: &Path| {
            let own = path.file_name()?.to_str()?;
            let other = own.replace("train", name);
            Some(path.with_file_name(&other)).filter(|path| other != own && path.is_file())
        };
        Some([other(images)?, other(labels)?])
    })
}

/// Pictures with their labels.
struct Pair {
    /// Height and width.
    side: [usize; 2],
    bytes: Vec<u8>,
    labels: Vec<u8>,
}

impl Pair {
    fn read(images: &Path, labels: &Path) -> Result<Self, LabelledError> {
        let (shape, bytes) = read(images, 3)?;
        let (count, labels_bytes) = read(labels, 1)?;
        if count[0] != shape[0] {
            let expected = format!("{}, one for every picture", shape[0]);
            return Err(LabelledError::invalid(labels, "labels", count[0], expected));
        }
        if bytes.is_empty() {
            let found = format!("{} of {} x {}", shape[0], shape[2], shape[1]);
            return Err(LabelledError::invalid(
                images,
                "pictures",
                found,
                "at least one pixel",
            ));
        }
        Ok(Self {
            side: [shape[1], shape[2]],
            bytes,
            labels: labels_bytes,
        })
    }
}

/// The dimensions and the bytes of an IDX file of `dimensions` dimensions.
fn read(path: &Path, dimensions: usize) -> Result<(Vec<usize>, Vec<u8>), LabelledError> {
    let open = || {
        File::open(path)
            .map(BufReader::new)
            .map_err(LabelledError::io(path))
    };
    let mut magic = [0; 2];
    let is_packed = open()?.read_exact(&mut magic).is_ok() && magic == GZIP;
    let stream = open()?;
    let bytes = if is_packed {
        unpack(GzDecoder::new(stream), path)?
    } else {
        unpack(stream, path)?
    };
    let (shape, data) = parse(&bytes, dimensions)
        .map_err(|fault| LabelledError::invalid(path, fault.field, fault.found, fault.expected))?;
    let header = bytes.len() - data.len();
    let mut bytes = bytes;
    bytes.drain(..header);
    Ok((shape, bytes))
}

fn unpack(stream: impl Read, path: &Path) -> Result<Vec<u8>, LabelledError> {
    let mut bytes = Vec::new();
    stream
        .take(MOST + 1)
        .read_to_end(&mut bytes)
        .map_err(LabelledError::io(path))?;
    if bytes.len() as u64 > MOST {
        let expected = format!("at most {MOST} bytes");
        return Err(LabelledError::invalid(path, "length", "more", expected));
    }
    Ok(bytes)
}

/// What is wrong with an IDX file.
pub(crate) struct IdxFault {
    pub(crate) field: &'static str,
    pub(crate) found: String,
    pub(crate) expected: String,
}

/// The shape and the data of an IDX file of unsigned bytes with so many dimensions.
pub(crate) fn parse(bytes: &[u8], dimensions: usize) -> Result<(Vec<usize>, &[u8]), IdxFault> {
    let fault = |field, found, expected| IdxFault {
        field,
        found,
        expected,
    };
    let start = [0, 0, 8, dimensions as u8];
    let length = start.len() + 4 * dimensions;
    if bytes.len() < length || !bytes.starts_with(&start) {
        let found = format!("{:02x?}", &bytes[..length.min(bytes.len())]);
        let expected = format!("{start:02x?} and {dimensions} lengths: an IDX file of bytes");
        return Err(fault("header", found, expected));
    }
    let (header, data) = bytes.split_at(length);
    let shape: Vec<usize> = header[start.len()..]
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_be_bytes(*word) as usize)
        .collect();
    let expected = shape
        .iter()
        .try_fold(1usize, |product, &n| product.checked_mul(n));
    if expected != Some(data.len()) {
        let expected = format!("as many as shape {shape:?} has");
        return Err(fault("bytes", data.len().to_string(), expected));
    }
    Ok((shape, data))
}
