//! A folder with a folder per class.

use std::path::{Path, PathBuf};

use super::files::{Candidate, keep_pictures};
use super::{Labelled, LabelledError, Pixels, Reason, Skipped};

/// Folders deeper than this are not looked into.
const DEPTH: usize = 32;
/// Names of a folder of pictures to train on, and of one of those held out, in this order of choice.
const TRAIN: [&str; 2] = ["train", "training"];
const HELD_OUT: [&str; 6] = ["val", "valid", "validation", "held_out", "held-out", "test"];

impl Labelled {
    /// The pictures below the folder `root`. Their class is the folder that they lie in, by its path from the root with `/` between names
    /// (`animals/dog`); classes are sorted by name. Where the root has a folder `train` and one of `val`, `valid`, `validation`,
    /// `held_out`, `test`, those are the parts and classes lie in them. Pictures in a root without other folders have no class.
    ///
    /// What a file is, its content says, not its name. Files that are no pictures, pictures whose header cannot be read or that are
    /// too large, and folders without pictures are left out and counted. Links to files are followed, links to folders are not.
    ///
    /// # Errors
    /// A folder cannot be read, or there is no picture.
    pub fn folder(root: &Path) -> Result<Self, LabelledError> {
        let named = |names: &[&str]| {
            names
                .iter()
                .map(|name| root.join(name))
                .find(|path| path.is_dir())
        };
        let parts = match (named(&TRAIN), named(&HELD_OUT)) {
            (Some(train), Some(held_out)) => vec![(train, Some(false)), (held_out, Some(true))],
            _ => vec![(root.to_owned(), None)],
        };
        let mut found = Vec::new();
        let mut skipped = Skipped::default();
        for (folder, held_out) in &parts {
            let mut walk = Walk {
                root: folder,
                held_out: *held_out,
                found: &mut found,
                empty: Vec::new(),
            };
            walk.enter(folder, "", 0)?;
            for class in walk.empty {
                let message = format!("{}: no files in it", folder.join(class).display());
                skipped.add(Reason::EmptyClass, message);
            }
        }
        let candidates = found.iter().map(|file| Candidate {
            path: file.path.clone(),
            label: None,
            caption: None,
            key: file.key.clone(),
            held_out: file.held_out,
        });
        let (mut entries, paths) = keep_pictures(candidates.collect(), &mut skipped);

        // What was kept tells which classes there are.
        let classes_of: std::collections::HashMap<&Path, &str> = found
            .iter()
            .map(|file| (file.path.as_path(), file.class.as_str()))
            .collect();
        let class_of = |place: usize| classes_of.get(paths[place].as_path()).copied().unwrap_or("");
        let names = |classes: &mut dyn Iterator<Item = String>| {
            let mut names: Vec<String> = classes.filter(|name| !name.is_empty()).collect();
            names.sort_unstable();
            names.dedup();
            names
        };
        let classes = names(&mut entries.iter().map(|entry| class_of(entry.place).to_owned()));
        for class in names(&mut found.iter().map(|file| file.class.clone())) {
            if classes.binary_search(&class).is_err() {
                let message = format!("{}: class {class}: no pictures in it", root.display());
                skipped.add(Reason::EmptyClass, message);
            }
        }
        entries.retain_mut(|entry| {
            let class = class_of(entry.place);
            entry.label = classes.binary_search_by(|name| name.as_str().cmp(class)).ok();
            let stays = entry.label.is_some() || classes.is_empty();
            if !stays {
                let message = format!("{}: beside the folders of classes", paths[entry.place].display());
                skipped.add(Reason::NoClass, message);
            }
            stays
        });
        if entries.is_empty() {
            let found = match skipped.messages.first() {
                Some(first) => format!("none ({} left out, such as {first})", skipped.total()),
                None => "none".to_owned(),
            };
            return Err(LabelledError::invalid(root, "pictures", found, "at least one"));
        }
        Ok(Self {
            name: root.display().to_string(),
            classes,
            entries,
            pixels: Pixels::Files(paths),
            skipped,
        })
    }
}

struct File {
    path: PathBuf,
    /// Path of its folder from the root.
    class: String,
    /// Its own path from the root.
    key: String,
    held_out: Option<bool>,
}

/// A walk through folders, in the order of names.
struct Walk<'a> {
    root: &'a Path,
    held_out: Option<bool>,
    found: &'a mut Vec<File>,
    empty: Vec<String>,
}

impl Walk<'_> {
    fn enter(&mut self, folder: &Path, class: &str, depth: usize) -> Result<(), LabelledError> {
        let entries = std::fs::read_dir(folder).map_err(LabelledError::io(folder))?;
        let mut entries = entries
            .collect::<Result<Vec<_>, _>>()
            .map_err(LabelledError::io(folder))?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        let under = |name: &str| match class {
            "" => name.to_owned(),
            _ => format!("{class}/{name}"),
        };
        let is_empty = entries.is_empty();
        for entry in entries {
            let path = entry.path();
            let name = under(&entry.file_name().to_string_lossy());
            let kind = entry.file_type().map_err(LabelledError::io(&path))?;
            if kind.is_dir() {
                if depth + 1 == DEPTH {
                    let found = format!("folders {DEPTH} deep");
                    return Err(LabelledError::invalid(self.root, "depth", found, "fewer"));
                }
                self.enter(&path, &name, depth + 1)?;
            } else if path.is_file() {
                self.found.push(File {
                    path,
                    class: class.to_owned(),
                    key: name,
                    held_out: self.held_out,
                });
            }
        }
        if is_empty && !class.is_empty() {
            self.empty.push(class.to_owned());
        }
        Ok(())
    }
}
