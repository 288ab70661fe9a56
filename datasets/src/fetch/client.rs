//! Runs the package clients.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::packages::{Client, Package};
use super::{Cancel, FetchError, FetchOptions, Unit};

const POLL: Duration = Duration::from_millis(100);

/// The verified file of `package`: from the cache, from the folder of own files, or through its client.
///
/// A file in the cache or in `options.from` has to match the pinned hash. A download appears in the cache under its
/// name only when it does.
///
/// # Errors
/// The client is missing or fails, the hash differs, the cache cannot be written, or the fetch was cancelled.
pub fn download(package: &Package, options: &FetchOptions<'_>) -> Result<PathBuf, FetchError> {
    let folder = options.data.downloads();
    let cached = folder.join(package.file);
    for candidate in candidates(package, &cached, options.from.as_deref()) {
        if candidate.is_file() {
            verify(&candidate, package, options)?;
            return Ok(candidate);
        }
    }
    let part = folder.join(format!(".{}.part", package.file));
    // What a killed client left behind is of no use to its successor.
    match std::fs::remove_dir_all(&part) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(FetchError::io(&part, "remove")(e)),
        _ => {}
    }
    std::fs::create_dir_all(&part).map_err(FetchError::io(&part, "create"))?;
    let result = bring(package, &part, options).and_then(|file| {
        verify(&file, package, options)?;
        File::open(&file)
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&file, &cached))
            .map_err(FetchError::io(&cached, "write"))
    });
    // Best effort: the next run removes it as well.
    let _ = std::fs::remove_dir_all(&part);
    result.map(|()| cached)
}

fn candidates(package: &Package, cached: &Path, from: Option<&Path>) -> Vec<PathBuf> {
    let mut all = vec![cached.to_owned()];
    if let Some(from) = from {
        all.push(from.join(package.file));
        // Some tools write the colon of a Debian epoch as it is.
        all.push(from.join(package.file.replace("%3a", ":")));
    }
    all
}

fn bring(package: &Package, part: &Path, options: &FetchOptions<'_>) -> Result<PathBuf, FetchError> {
    let (program, arguments, install) = command_line(package);
    let command = std::iter::once(program.to_owned())
        .chain(arguments.iter().map(|a| a.to_string_lossy().into_owned()))
        .collect::<Vec<_>>()
        .join(" ");
    let folder = options.data.downloads();
    let failed = |message: String| FetchError::Client {
        command: command.clone(),
        message,
        file: package.file.to_owned(),
        folder: folder.clone(),
    };
    let log = part.join("client.log");
    let sink = File::create(&log).map_err(FetchError::io(&log, "create"))?;
    let both = sink.try_clone().map_err(FetchError::io(&log, "create"))?;
    options.progress.begin(
        &format!("downloading {}", package.name),
        Some(package.bytes),
        Unit::Bytes,
    );
    let child = Command::new(program)
        .args(&arguments)
        .current_dir(part)
        .stdin(Stdio::null())
        .stdout(sink)
        .stderr(both)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(FetchError::MissingClient {
                client: program,
                install,
                file: package.file.to_owned(),
                folder,
            });
        }
        Err(e) => return Err(failed(e.to_string())),
    };
    let status = wait(&mut child, &options.cancel, || {
        options.progress.advance(bytes_in(part).min(package.bytes));
    })
    .map_err(|e| e.unwrap_or_else(|io| failed(io.to_string())))?;
    if !status {
        return Err(failed(last_line(&log)));
    }
    let file = part.join(package.file);
    if file.is_file() {
        options.progress.advance(package.bytes);
        return Ok(file);
    }
    let names: Vec<_> = files_in(part).filter(|name| name != "client.log").collect();
    let found = if names.is_empty() {
        "no file".to_owned()
    } else {
        names.join(", ")
    };
    Err(failed(format!("it wrote {found}, expected {}", package.file)))
}

/// Program, arguments and how to install the program, which is to run in the folder that takes its files.
fn command_line(package: &Package) -> (&'static str, Vec<OsString>, &'static str) {
    let pinned = |separator: &str| OsString::from(format!("{}{separator}{}", package.name, package.version));
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let pip = "Debian, Ubuntu: apt-get install python3-pip";
    match package.client {
        Client::Deb => {
            let mut arguments = words(&["download"]);
            arguments.push(pinned("="));
            ("apt-get", arguments, "it belongs to Debian and Ubuntu")
        }
        Client::Wheel => {
            let mut arguments = words(&["download", "--no-deps", "--disable-pip-version-check", "-d"]);
            arguments.extend([".".into(), pinned("==")]);
            ("pip", arguments, pip)
        }
        Client::Sdist => {
            let mut arguments = words(&[
                "download",
                "--no-deps",
                "--disable-pip-version-check",
                "--no-binary",
            ]);
            arguments.extend([package.name.into(), "-d".into(), ".".into(), pinned("==")]);
            ("pip", arguments, pip)
        }
        Client::Npm => {
            let mut arguments = words(&["pack", "--silent"]);
            arguments.push(pinned("@"));
            ("npm", arguments, "Debian, Ubuntu: apt-get install npm")
        }
    }
}

/// Waits for the end of `child`; true when it succeeded. A cancelled child is killed.
fn wait(
    child: &mut Child,
    cancel: &Cancel,
    mut tick: impl FnMut(),
) -> Result<bool, Result<FetchError, std::io::Error>> {
    loop {
        if let Some(status) = child.try_wait().map_err(Err)? {
            return Ok(status.success());
        }
        if cancel.is_cancelled() {
            // It may have ended by itself in between; either way it is reaped.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Ok(FetchError::Cancelled));
        }
        tick();
        std::thread::sleep(POLL);
    }
}

fn files_in(folder: &Path) -> impl Iterator<Item = String> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .map(|m| m.len())
        .sum()
}

fn last_line(log: &Path) -> String {
    const TAIL: usize = 300;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.map_or("no message".to_owned(), |line| {
        line.trim().chars().take(TAIL).collect()
    })
}

fn verify(path: &Path, package: &Package, options: &FetchOptions<'_>) -> Result<(), FetchError> {
    let found = sha256_of(path, &options.cancel)?;
    if found == package.sha256 {
        return Ok(());
    }
    Err(FetchError::Hash {
        path: path.to_owned(),
        found,
        expected: package.sha256.to_owned(),
    })
}

/// SHA-256 of a file in hexadecimal.
pub(crate) fn sha256_of(path: &Path, cancel: &Cancel) -> Result<String, FetchError> {
    let mut file = File::open(path).map_err(FetchError::io(path, "read"))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        cancel.check()?;
        match file.read(&mut buffer).map_err(FetchError::io(path, "read"))? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}
