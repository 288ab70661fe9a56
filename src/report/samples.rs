//! The newest samples of a run, as `data:` addresses.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::ReportError;

/// Larger files are named and left out.
const LARGEST_FILE: u64 = 8 << 20;
/// Bytes of all files together; what comes after is named and left out.
const LARGEST_SUM: u64 = 24 << 20;
/// Files that are looked at.
const MOST_FILES: usize = 64;
const FOLDER: &str = "samples";
const PREFIX: &str = "step-";

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A PNG file.
    Picture,
    /// A WAV file.
    Sound,
}

/// One file.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its size.
    pub bytes: u64,
    /// Its content as a `data:` address; none where it is too large.
    pub address: Option<String>,
}

/// The files of one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    /// The step.
    pub step: u64,
    /// The files, by name.
    pub files: Vec<Sample>,
}

/// The samples of the newest step of the run in `dir` that has any.
///
/// # Errors
/// A folder or file that is there cannot be read.
pub fn newest(dir: &Path) -> Result<Option<Samples>, ReportError> {
    let root = dir.join(FOLDER);
    if !root.is_dir() {
        return Ok(None);
    }
    let mut steps: Vec<(u64, PathBuf)> = list(&root)?
        .into_iter()
        .filter_map(|(name, path)| Some((name.strip_prefix(PREFIX)?.parse().ok()?, path)))
        .collect();
    steps.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    for (step, folder) in steps {
        let files = read(&folder)?;
        if !files.is_empty() {
            return Ok(Some(Samples { step, files }));
        }
    }
    Ok(None)
}

fn read(folder: &Path) -> Result<Vec<Sample>, ReportError> {
    let (mut files, mut sum) = (Vec::new(), 0);
    if !folder.is_dir() {
        return Ok(files);
    }
    for (name, path) in list(folder)? {
        let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
        let (kind, magic, mime) = match ending.to_str() {
            Some("png") => (Kind::Picture, &b"\x89PNG"[..], "image/png"),
            Some("wav") => (Kind::Sound, &b"RIFF"[..], "audio/wav"),
            _ => continue,
        };
        let io = |source| ReportError::Io {
            path: path.clone(),
            source,
        };
        let info = fs::metadata(&path).map_err(io)?;
        if files.len() == MOST_FILES || !info.is_file() {
            continue;
        }
        let bytes = info.len();
        let fits = bytes <= LARGEST_FILE && sum + bytes <= LARGEST_SUM;
        let mut content = Vec::new();
        if fits {
            let file = File::open(&path).map_err(io)?;
            file.take(LARGEST_FILE).read_to_end(&mut content).map_err(io)?;
            if !content.starts_with(magic) {
                // A file that is only called so would be a broken picture.
                continue;
            }
            sum += bytes;
        }
        let address = fits.then(|| format!("data:{mime};base64,{}", base64(&content)));
        files.push(Sample {
            name,
            kind,
            bytes,
            address,
        });
    }
    Ok(files)
}

/// What is in a folder, by name.
fn list(folder: &Path) -> Result<Vec<(String, PathBuf)>, ReportError> {
    let io = |source| ReportError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut items = Vec::new();
    for item in fs::read_dir(folder).map_err(io)? {
        let item = item.map_err(io)?;
        items.push((item.file_name().to_string_lossy().into_owned(), item.path()));
    }
    items.sort();
    Ok(items)
}

/// Base64 (RFC 4648) with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of RFC 4648, section 10.
    #[test]
    fn base64_known_answers() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn the_newest_step_with_samples_is_shown_within_the_limits() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(newest(run.path()).unwrap(), None);
        let put = |step: &str, name: &str, content: &[u8]| {
            let folder = run.path().join(FOLDER).join(step);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(name), content).unwrap();
        };
        put("step-0000000009", "old.png", b"\x89PNG old");
        put("step-0000000100", "notes.txt", b"hello");
        put("step-0000000090", "b.PNG", b"\x89PNG b");
        put("step-0000000090", "a.wav", b"RIFF a");
        put("step-0000000090", "c.png", b"no picture");
        put("step-zzz", "d.png", b"\x89PNG d");
        let mut large = b"\x89PNG".to_vec();
        large.resize((8 << 20) + 1, 0);
        put("step-0000000090", "large.png", &large);
        let samples = newest(run.path()).unwrap().unwrap();
        assert_eq!(samples.step, 90);
        let found: Vec<_> = samples
            .files
            .iter()
            .map(|file| (file.name.as_str(), file.kind, file.address.as_deref()))
            .collect();
        assert_eq!(
            found,
            [
                ("a.wav", Kind::Sound, Some("data:audio/wav;base64,UklGRiBh")),
                ("b.PNG", Kind::Picture, Some("data:image/png;base64,iVBORyBi")),
                ("large.png", Kind::Picture, None),
            ]
        );
        // Four files of 7 MiB are more than all files may be together.
        large.truncate(7 << 20);
        for name in ["1.png", "2.png", "3.png", "4.png"] {
            put("step-0000000200", name, &large);
        }
        let samples = newest(run.path()).unwrap().unwrap();
        let kept: Vec<bool> = samples.files.iter().map(|file| file.address.is_some()).collect();
        assert_eq!((samples.step, kept), (200, vec![true, true, true, false]));
    }
}
