//! TensorBoard event files: scalars and PNG pictures.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload,
//! all little-endian. A payload is a protocol buffer `Event`; the few fields used here are written by hand:
//!
//! ```text
//! Event        1 wall_time f64 | 2 step i64 | 3 file_version | 5 Summary | 7 SessionLog
//! Summary      1 repeated Value { 1 tag | 2 simple_value f32 | 4 Image }
//! Image        1 height | 2 width | 3 channels | 4 PNG bytes
//! SessionLog   1 status (1 = start)
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::super::error::TrainError;

const VERSION: &[u8] = b"brain.Event:2";
const STARTED: u64 = 1;
/// Added to a rotated checksum, so that a checksum of data that holds checksums stays meaningful.
const MASK: u32 = 0xa282_ead8;
const CASTAGNOLI: u32 = 0x82f6_3b78;
const RGBA: u64 = 4;
/// The first two records of a file are shorter together.
const HEAD: u64 = 512;

/// An event file that is being written.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates a new event file in `folder`; viewers drop what older files of the folder say about steps after `step`.
    ///
    /// # Errors
    /// The folder is not writable.
    pub fn create(folder: &Path, step: u64) -> Result<Self, TrainError> {
        let now = since_epoch();
        let mut path = folder.join(format!(
            "events.out.tfevents.{}.fulgur.{}",
            now.as_secs(),
            std::process::id()
        ));
        // Two starts within a second need two names; readers order files by name.
        let mut number = 0;
        while path.exists() {
            number += 1;
            path.set_extension(format!("{}.{number}", std::process::id()));
        }
        let file = File::create(&path).map_err(TrainError::io(&path))?;
        let mut events = Self { path, file };
        events.record(&event(now, 0, |out| bytes_field(out, 3, VERSION)))?;
        if step > 0 {
            events.record(&start_event(now, step + 1))?;
        }
        Ok(events)
    }

    /// Adds a point to each named curve.
    ///
    /// # Errors
    /// The disk is full.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<(), TrainError> {
        self.record(&scalar_event(since_epoch(), step, values))
    }

    /// Adds a picture, given as a PNG file.
    ///
    /// # Errors
    /// `png` is none, or the disk is full.
    pub fn picture(&mut self, step: u64, tag: &str, png: &[u8]) -> Result<(), TrainError> {
        match picture_event(since_epoch(), step, tag, png) {
            Some(payload) => self.record(&payload),
            None => {
                let reason = format!("picture `{tag}` is no PNG file");
                Err(TrainError::Run {
                    path: self.path.clone(),
                    reason,
                })
            }
        }
    }

    fn record(&mut self, payload: &[u8]) -> Result<(), TrainError> {
        self.file
            .write_all(&frame(payload))
            .map_err(TrainError::io(&self.path))
    }
}

/// After how many steps the run went on whose session wrote the event file `path`; none for a session that began a run,
/// and for a file of another origin.
///
/// # Errors
/// The file cannot be read.
pub fn resumed_after(path: &Path) -> std::io::Result<Option<u64>> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    Ok(resumed_by(&head))
}

/// The step before that of the start event, which is the second record.
fn resumed_by(mut head: &[u8]) -> Option<u64> {
    let version = take_record(&mut head)?;
    version.ends_with(VERSION).then_some(())?;
    let mut event = take_record(&mut head)?;
    let (mut step, mut started) = (0, false);
    while !event.is_empty() {
        let key = take_varint(&mut event)?;
        match (key >> 3, key & 7) {
            (2, 0) => step = take_varint(&mut event)?,
            (field, 2) => {
                let length = take_varint(&mut event)?;
                take(&mut event, usize::try_from(length).ok()?)?;
                started |= field == 7;
            }
            (_, 0) => drop(take_varint(&mut event)?),
            (_, 1) => drop(take(&mut event, 8)?),
            (_, 5) => drop(take(&mut event, 4)?),
            _ => return None,
        }
    }
    (started && step > 0).then(|| step - 1)
}

/// The payload of the record that `bytes` begin with, where it is whole.
fn take_record<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take(bytes, 8)?;
    let number = |bytes: &[u8]| Some(u32::from_le_bytes(bytes.try_into().ok()?));
    let sound = |bytes: &[u8], crc: &[u8]| Some(number(crc)? == masked_crc(bytes));
    sound(length, take(bytes, 4)?)?.then_some(())?;
    let length = u64::from_le_bytes(length.try_into().ok()?);
    let payload = take(bytes, usize::try_from(length).ok()?)?;
    sound(payload, take(bytes, 4)?)?.then_some(payload)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// One record of the file.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(payload);
    record.extend(masked_crc(payload).to_le_bytes());
    record
}

fn event(when: Duration, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    key(&mut out, 1, Wire::Fixed64);
    out.extend(when.as_secs_f64().to_le_bytes());
    if step > 0 {
        // Zero is what readers assume, and what other writers leave out.
        integer_field(&mut out, 2, step);
    }
    what(&mut out);
    out
}

/// Tells viewers that what other files say about `step` and later is void.
fn start_event(when: Duration, step: u64) -> Vec<u8> {
    let mut started = Vec::new();
    integer_field(&mut started, 1, STARTED);
    event(when, step, |out| bytes_field(out, 7, &started))
}

fn scalar_event(when: Duration, step: u64, values: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        bytes_field(&mut entry, 1, tag.as_bytes());
        key(&mut entry, 2, Wire::Fixed32);
        entry.extend((*value as f32).to_le_bytes());
        bytes_field(&mut summary, 1, &entry);
    }
    event(when, step, |out| bytes_field(out, 5, &summary))
}

/// None where `png` is no PNG file.
fn picture_event(when: Duration, step: u64, tag: &str, png: &[u8]) -> Option<Vec<u8>> {
    let (width, height) = png_size(png)?;
    let (mut image, mut entry, mut summary) = (Vec::new(), Vec::new(), Vec::new());
    integer_field(&mut image, 1, height);
    integer_field(&mut image, 2, width);
    integer_field(&mut image, 3, RGBA);
    bytes_field(&mut image, 4, png);
    bytes_field(&mut entry, 1, tag.as_bytes());
    bytes_field(&mut entry, 4, &image);
    bytes_field(&mut summary, 1, &entry);
    Some(event(when, step, |out| bytes_field(out, 5, &summary)))
}

/// How a protocol-buffer field is laid out.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn key(out: &mut Vec<u8>, field: u64, wire: Wire) {
    varint(out, field << 3 | wire as u64);
}

fn integer_field(out: &mut Vec<u8>, field: u64, value: u64) {
    key(out, field, Wire::Varint);
    varint(out, value);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    key(out, field, Wire::Bytes);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Width and height from the header that every PNG file starts with.
fn png_size(png: &[u8]) -> Option<(u64, u64)> {
    let number = |at: usize| {
        Some(u64::from(u32::from_be_bytes(
            png.get(at..at + 4)?.try_into().ok()?,
        )))
    };
    png.starts_with(b"\x89PNG\r\n\x1a\n")
        .then(|| Some((number(16)?, number(20)?)))?
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(MASK)
}

/// CRC-32C (Castagnoli), table-driven.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut crc, mut bit) = (byte as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 {
                    crc >> 1 ^ CASTAGNOLI
                } else {
                    crc >> 1
                };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0u32, |crc, byte| {
        TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ crc >> 8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published check values (RFC 3720, appendix B.4).
    #[test]
    fn checksum_known_answers() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// `event_golden.py` wrote the same events with TensorBoard's own classes.
    #[test]
    fn bytes_equal_those_of_tensorboard() {
        let (golden, png) = (
            include_bytes!("event_golden.tfevents"),
            include_bytes!("event_golden.png"),
        );
        let when = Duration::from_millis(1_700_000_000_250);
        let scalars = [("loss".to_string(), 0.125), ("lr".to_string(), 1e-3)];
        let payloads = [
            event(when, 0, |out| bytes_field(out, 3, VERSION)),
            start_event(when, 301),
            scalar_event(when, 300, &scalars),
            picture_event(when, 300, "sheet", png).unwrap(),
        ];
        let found: Vec<u8> = payloads.iter().flat_map(|payload| frame(payload)).collect();
        assert_eq!(found, golden);
        assert!(picture_event(when, 300, "sheet", &png[1..]).is_none());
        assert!(picture_event(when, 300, "sheet", &png[..20]).is_none());
    }

    #[test]
    fn a_file_tells_from_where_its_session_went_on() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = [0, 300].map(|step| EventFile::create(folder.path(), step).unwrap());
        for events in &mut files {
            events.scalars(301, &[("loss".to_owned(), 0.5)]).unwrap();
        }
        let found = files
            .each_ref()
            .map(|events| resumed_after(&events.path).unwrap());
        assert_eq!(found, [None, Some(300)]);
        let whole = std::fs::read(&files[1].path).unwrap();
        let second = 12 + 24 + 4;
        for length in 0..whole.len() {
            let expected = (length >= second + 12 + 16 + 4).then_some(300);
            assert_eq!(
                resumed_by(&whole[..length]),
                expected,
                "{length} of {}",
                whole.len()
            );
        }
        let mut damaged = whole.clone();
        damaged[second + 13] ^= 1;
        assert_eq!(resumed_by(&damaged), None);
        assert_eq!(resumed_by(include_bytes!("event_golden.tfevents")), Some(300));
    }
}
