//! Files and folders that appear whole or not at all.
//!
//! The bytes go to a temporary file or folder beside the final name (a rename across file systems is not
//! atomic), are synchronised to the disk and only then renamed. What is temporary and not committed removes
//! itself.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

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
        Ok(Self {
            temporary: temporary(path, 0o666, |builder, folder| builder.tempfile_in(folder))?,
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
        self.temporary
            .persist(&self.path)
            .map_err(|refused| refused.error)?;
        sync_folder(parent(&self.path));
        Ok(())
    }
}

/// A folder under construction: write below [`AtomicFolder::temporary_path`], then [`AtomicFolder::commit`].
///
/// Dropping it without a commit removes the temporary folder and leaves an older folder of that name untouched.
///
/// ```
/// use fulgur_datasets::atomic::AtomicFolder;
/// let root = tempfile::tempdir()?;
/// let path = root.path().join("model");
/// let folder = AtomicFolder::create(&path)?;
/// std::fs::write(folder.temporary_path().join("a"), "whole")?;
/// folder.commit()?;
/// assert_eq!(std::fs::read(path.join("a"))?, b"whole");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct AtomicFolder {
    temporary: TempDir,
    path: PathBuf,
}

impl AtomicFolder {
    /// Makes a temporary folder beside `path`.
    ///
    /// # Errors
    /// The folder that is to hold `path` does not exist or cannot be written to, or `path` exists and is no folder.
    pub fn create(path: &Path) -> io::Result<Self> {
        if let Ok(found) = std::fs::symlink_metadata(path)
            && !found.is_dir()
        {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "exists and is not a folder",
            ));
        }
        Ok(Self {
            temporary: temporary(path, 0o777, |builder, folder| builder.tempdir_in(folder))?,
            path: path.to_path_buf(),
        })
    }

    /// The temporary folder.
    pub fn temporary_path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the folder its final name; an older folder of that name is removed. Files below it have to be on the disk
    /// already, where that matters.
    ///
    /// # Errors
    /// A rename is refused: then the older folder is there as before, and the temporary one is removed.
    pub fn commit(self) -> io::Result<()> {
        sync_folder(self.temporary.path());
        // No file system renames a folder over a full one, so the older one steps aside for a moment.
        let aside = match std::fs::symlink_metadata(&self.path) {
            Ok(_) => {
                let aside = temporary(&self.path, 0o777, |builder, folder| builder.tempdir_in(folder))?;
                std::fs::rename(&self.path, aside.path())?;
                Some(aside)
            }
            Err(_) => None,
        };
        if let Err(error) = std::fs::rename(self.temporary.path(), &self.path) {
            if let Some(aside) = aside {
                let kept = aside.keep();
                std::fs::rename(kept, &self.path)?;
            }
            return Err(error);
        }
        // It has its name now, there is nothing temporary left to remove.
        let _ = self.temporary.keep();
        sync_folder(parent(&self.path));
        Ok(())
    }
}

/// Makes something temporary beside `path`, with the mode that the process's mask leaves of `mode`: what is usual for
/// new files and folders, instead of owner only.
fn temporary<T>(
    path: &Path,
    mode: u32,
    make: impl FnOnce(&tempfile::Builder<'_, '_>, &Path) -> io::Result<T>,
) -> io::Result<T> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    make(&builder, parent(path))
}

/// The folder that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes renames in a folder durable where the file system lets a folder be synchronised; not every one does.
fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
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
    fn files_and_folders_have_the_mode_of_ordinary_new_ones() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write_atomic(&at("ours"), |file| file.write_all(b"x")).unwrap();
        std::fs::write(at("plain"), b"x").unwrap();
        AtomicFolder::create(&at("our folder")).unwrap().commit().unwrap();
        std::fs::create_dir(at("plain folder")).unwrap();
        let mode = |name: &str| std::fs::metadata(at(name)).unwrap().permissions().mode();
        assert_eq!(mode("ours"), mode("plain"));
        assert_eq!(mode("our folder"), mode("plain folder"));
    }

    #[test]
    fn a_folder_replaces_an_older_one_only_when_it_is_committed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("model");
        let names = |folder: &Path| -> Vec<_> {
            let entries = std::fs::read_dir(folder).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        let fill = |name: &str| {
            let folder = AtomicFolder::create(&path).unwrap();
            std::fs::write(folder.temporary_path().join(name), name).unwrap();
            folder
        };
        fill("old").commit().unwrap();
        drop(fill("dropped"));
        assert_eq!(names(&path), ["old"]);
        fill("new").commit().unwrap();
        assert_eq!(names(&path), ["new"]);
        assert_eq!(names(root.path()), ["model"], "nothing temporary is left");
        std::fs::write(root.path().join("file"), "x").unwrap();
        assert!(AtomicFolder::create(&root.path().join("file")).is_err());
        assert!(AtomicFolder::create(&root.path().join("absent/model")).is_err());
    }
}
