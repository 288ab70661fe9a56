//! Clips that a command was given: files in the order of the arguments, folders recursively by name.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Extensions of clips that a folder is searched for.
pub(super) const CLIPS: [&str; 8] = ["mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg"];
/// Extensions of sounds, for what only listens.
pub(super) const SOUNDS: [&str; 5] = ["wav", "flac", "mp3", "ogg", "m4a"];

/// Files of the arguments in their order; folders recursively by name, where `extensions` say what belongs there.
pub(super) fn expand(arguments: &[PathBuf], extensions: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let mut clips = Vec::new();
    for path in arguments {
        if path.is_dir() {
            let before = clips.len();
            walk(path, extensions, &mut clips)?;
            if clips.len() == before {
                anyhow::bail!(
                    "{}: no clips found, expected files named .{}",
                    path.display(),
                    extensions.join(", .")
                );
            }
        } else {
            clips.push(path.clone());
        }
    }
    Ok(clips)
}

fn walk(dir: &Path, extensions: &[&str], clips: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let read = || std::fs::read_dir(dir).with_context(|| format!("{}: cannot read", dir.display()));
    let mut entries = read()?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort();
    let belongs = |extension: &str| {
        extensions
            .iter()
            .any(|known| known.eq_ignore_ascii_case(extension))
    };
    for path in entries {
        // Links are not followed into folders, so that a loop of links ends.
        if path.is_dir() && !path.is_symlink() {
            walk(&path, extensions, clips)?;
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(belongs) {
            clips.push(path);
        }
    }
    Ok(())
}
