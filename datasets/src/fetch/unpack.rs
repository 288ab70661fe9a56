//! Reads files out of packages, in memory: Debian packages, tar.gz, zip and wheels.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};

use flate2::read::GzDecoder;

use super::packages::{Client, Package};
use super::{Cancel, FetchError};

/// Largest single file that is read out of a package, in bytes.
pub const MAX_ENTRY: u64 = 256 << 20;

/// Contents by path; paths have no leading `./`.
pub type Entries = BTreeMap<String, Vec<u8>>;

/// The files of the package file `path` whose names `wanted` accepts; links and folders are left out.
///
/// # Errors
/// The file is damaged, an entry is larger than [`MAX_ENTRY`], `dpkg-deb` is missing for a Debian package, or the
/// fetch was cancelled.
pub fn read(
    package: &Package,
    path: &Path,
    wanted: &dyn Fn(&str) -> bool,
    cancel: &Cancel,
) -> Result<Entries, FetchError> {
    match package.client {
        Client::Deb => read_deb(package, path, wanted, cancel),
        Client::Wheel => {
            let file = File::open(path).map_err(FetchError::io(path, "read"))?;
            read_zip(BufReader::new(file), &path.display().to_string(), wanted, cancel)
        }
        Client::Sdist | Client::Npm => {
            let file = File::open(path).map_err(FetchError::io(path, "read"))?;
            read_tar(GzDecoder::new(BufReader::new(file)), path, wanted, cancel)
        }
    }
}

fn read_deb(
    package: &Package,
    path: &Path,
    wanted: &dyn Fn(&str) -> bool,
    cancel: &Cancel,
) -> Result<Entries, FetchError> {
    let child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(FetchError::MissingClient {
                client: "dpkg-deb",
                install: "Debian, Ubuntu: apt-get install dpkg; elsewhere: package dpkg",
                file: package.file.to_owned(),
                folder: path.parent().map(Path::to_owned).unwrap_or_default(),
            });
        }
        Err(e) => return Err(FetchError::io(path, "unpack")(e)),
    };
    let result = match child.stdout.take() {
        Some(pipe) => read_tar(BufReader::with_capacity(1 << 16, pipe), path, wanted, cancel),
        None => Err(damaged(path, "no output of dpkg-deb")),
    };
    if result.is_err() {
        // It may be blocked on a pipe that nobody reads any more.
        let _ = child.kill();
    }
    let status = child.wait().map_err(FetchError::io(path, "unpack"))?;
    let entries = result?;
    if !status.success() {
        return Err(damaged(path, &format!("dpkg-deb: {status}")));
    }
    Ok(entries)
}

fn read_tar(
    stream: impl Read,
    path: &Path,
    wanted: &dyn Fn(&str) -> bool,
    cancel: &Cancel,
) -> Result<Entries, FetchError> {
    let mut entries = Entries::new();
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries().map_err(|e| damaged(path, &e.to_string()))? {
        cancel.check()?;
        let entry = entry.map_err(|e| damaged(path, &e.to_string()))?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.strip_prefix("./").unwrap_or(&name);
        if wanted(name) {
            let size = entry.size();
            let bytes = read_entry(entry, size, name)?;
            entries.insert(name.to_owned(), bytes);
        }
    }
    // The pipe of dpkg-deb has to be drained, or its end is mistaken for a failure.
    let mut rest = archive.into_inner();
    std::io::copy(&mut rest, &mut std::io::sink()).map_err(|e| damaged(path, &e.to_string()))?;
    Ok(entries)
}

/// The files of a zip archive whose names `wanted` accepts; `label` names the archive in errors.
///
/// # Errors
/// The archive is damaged, or an entry is larger than [`MAX_ENTRY`].
pub fn read_zip(
    stream: impl Read + Seek,
    label: &str,
    wanted: &dyn Fn(&str) -> bool,
    cancel: &Cancel,
) -> Result<Entries, FetchError> {
    let wrong = |found: String| FetchError::format(label, "archive", found, "a whole zip archive");
    let mut archive = zip::ZipArchive::new(stream).map_err(|e| wrong(e.to_string()))?;
    let mut entries = Entries::new();
    for index in 0..archive.len() {
        cancel.check()?;
        let entry = archive.by_index(index).map_err(|e| wrong(e.to_string()))?;
        let name = entry.name().map_err(|e| wrong(e.to_string()))?.into_owned();
        if entry.is_file() && wanted(&name) {
            let size = entry.size();
            let bytes = read_entry(entry, size, &name)?;
            entries.insert(name, bytes);
        }
    }
    Ok(entries)
}

/// As [`read_zip`], for an archive in memory.
///
/// # Errors
/// As [`read_zip`].
pub fn read_zip_bytes(
    bytes: &[u8],
    label: &str,
    wanted: &dyn Fn(&str) -> bool,
    cancel: &Cancel,
) -> Result<Entries, FetchError> {
    read_zip(Cursor::new(bytes), label, wanted, cancel)
}

/// All bytes of a gzip stream, at most [`MAX_ENTRY`].
///
/// # Errors
/// The stream is damaged or longer.
pub fn gunzip(bytes: &[u8], label: &str) -> Result<Vec<u8>, FetchError> {
    let mut out = Vec::new();
    let taken = GzDecoder::new(bytes).take(MAX_ENTRY + 1).read_to_end(&mut out);
    match taken {
        Ok(n) if n as u64 <= MAX_ENTRY => Ok(out),
        Ok(_) => Err(FetchError::format(
            label,
            "size",
            "more",
            format!("at most {MAX_ENTRY} bytes"),
        )),
        Err(e) => Err(FetchError::format(
            label,
            "content",
            e.to_string(),
            "a gzip stream",
        )),
    }
}

fn read_entry(stream: impl Read, size: u64, name: &str) -> Result<Vec<u8>, FetchError> {
    if size > MAX_ENTRY {
        let limit = format!("at most {MAX_ENTRY} bytes");
        return Err(FetchError::format(name, "size", size.to_string(), limit));
    }
    let mut bytes = Vec::new();
    let read = stream.take(size).read_to_end(&mut bytes);
    match read {
        Ok(n) if n as u64 == size => Ok(bytes),
        Ok(n) => Err(FetchError::format(
            name,
            "content",
            format!("{n} bytes"),
            format!("{size} bytes"),
        )),
        Err(e) => Err(FetchError::format(
            name,
            "content",
            e.to_string(),
            format!("{size} bytes"),
        )),
    }
}

fn damaged(path: &Path, found: &str) -> FetchError {
    FetchError::format(path.display().to_string(), "archive", found, "a whole package")
}
