//! Files that appear whole or not at all.
//!
//! The bytes go to a temporary file in the folder of the final name (a rename across file systems is not
//! atomic), are synchronised to the disk and only then renamed. A temporary file that is not committed
//! removes itself.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file under construction: write to [`AtomicFile::file`], then [`AtomicFile::commit`].
///
/// Dropping it without a commit removes the temporary file and leaves an older file of that name untouched.
#[derive(Debug)]
pub struct AtomicFile {
    temporary: NamedTempFile,
    path: PathBuf,
}

impl AtomicFile {
    /// Opens a temporary file beside `path`, readable and writable.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written to, or `path` exists and is not a regular file.
    pub fn create(path: &Path) -> io::Result<Self> {
        // A rename would replace a folder, a device or a pipe by a file.
        if let Ok(found) = std::fs::metadata(path)
            && !found.is_file()
        {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "exists and is not a regular file",
            ));
        }
        let name = path
            .file_name()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".part");
        #[cfg(unix)]
        {
            // The usual mode of a new file: what the process's mask leaves of it, instead of owner only.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        Ok(Self {
            temporary: builder.tempfile_in(folder)?,
            path: path.to_path_buf(),
        })
    }

    /// The open temporary file.
    pub fn file(&mut self) -> &mut File {
        self.temporary.as_file_mut()
    }

    /// The name of the temporary file, for libraries that want a name.
    pub fn temporary_path(&self) -> &Path {
        self.temporary.path()
    }

    /// Synchronises the bytes to the disk and gives the file its final name.
    ///
    /// # Errors
    /// The disk is full or failing, or the rename is refused; the temporary file is removed then.
    pub fn commit(self) -> io::Result<()> {
        self.temporary.as_file().sync_all()?;
        let folder = self.path.parent().map(Path::to_path_buf);
        self.temporary
            .persist(&self.path)
            .map_err(|refused| refused.error)?;
        // The rename itself lies in the folder; not every file system lets a folder be synchronised.
        if let Some(folder) = folder
            && let Ok(folder) = File::open(if folder.as_os_str().is_empty() {
                Path::new(".")
            } else {
                &folder
            })
        {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

/// Writes `path` through `write`, which sees the open temporary file; the name appears only when `write`
/// succeeded and its bytes are on the disk.
///
/// # Errors
/// Whatever `write` returns, or what [`AtomicFile::create`] and [`AtomicFile::commit`] return; nothing is
/// left behind.
///
/// ```
/// use std::io::Write;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("notes.txt");
/// fulgur_datasets::atomic::write_atomic(&path, |file| file.write_all(b"whole"))?;
/// assert_eq!(std::fs::read(&path)?, b"whole");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn write_atomic<T>(path: &Path, write: impl FnOnce(&mut File) -> io::Result<T>) -> io::Result<T> {
    let mut file = AtomicFile::create(path)?;
    let value = write(file.file())?;
    file.commit()?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        write_atomic(&path, |file| file.write_all(b"old")).unwrap();
        let refused: io::Result<()> = write_atomic(&path, |file| {
            file.write_all(b"half of the new")?;
            Err(io::Error::other("stop"))
        });
        assert_eq!(refused.unwrap_err().to_string(), "stop");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn folders_and_missing_folders_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &mut File| file.write_all(b"x");
        assert!(write_atomic(folder.path(), write).is_err());
        assert!(write_atomic(&folder.path().join("absent/a.bin"), write).is_err());
        assert!(folder.path().is_dir());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn the_file_has_the_mode_of_an_ordinary_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        write_atomic(&ours, |file| file.write_all(b"x")).unwrap();
        std::fs::write(&plain, b"x").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
