//! What the pictures of a set are called: by its own classes, and by coarser or finer ones of the same pictures.

use std::path::Path;

use anyhow::{anyhow, bail};
use fulgur_datasets::labelled::{Labelled, Part};

/// Names under which the same pictures, in the same order, have other classes.
const SAME_PICTURES: [&[&str]; 1] = [&["emoji", "emoji/subcategory"]];
/// Names of classes that an error shows.
const SHOWN: usize = 4;

/// A class for every picture of a set.
#[derive(Clone, Debug)]
pub struct Labelling {
    /// Name of the set that has these classes.
    pub name: String,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Class of each picture, where it has one.
    pub of: Vec<Option<usize>>,
}

/// A set with all classes that are known of its pictures.
#[derive(Debug)]
pub struct Labellings {
    /// The pictures.
    pub set: Labelled,
    /// Classes, those of the set first.
    pub all: Vec<Labelling>,
}

impl Labelling {
    fn of(name: &str, set: &Labelled) -> Self {
        Self {
            name: name.to_owned(),
            classes: set.classes().to_vec(),
            of: (0..set.len()).map(|index| set.label(index)).collect(),
        }
    }

    /// For each class the class of `other` that all of its pictures have; none where they have several, or none.
    pub fn within(&self, other: &Self) -> Vec<Option<usize>> {
        let mut found: Vec<Option<Option<usize>>> = vec![None; self.classes.len()];
        for (own, theirs) in self.of.iter().zip(&other.of) {
            if let Some(own) = *own {
                found[own] = match found[own] {
                    None => Some(*theirs),
                    Some(same) if same == *theirs => Some(same),
                    Some(_) => Some(None),
                };
            }
        }
        found.into_iter().map(Option::flatten).collect()
    }
}

impl Labellings {
    /// Opens the set `source` in the folder `data`, as [`Labelled::open`] does; pictures that cannot be decoded are left out.
    ///
    /// # Errors
    /// There is none, or it has nothing to train on or nothing held out.
    pub fn open(source: &str, data: &Path) -> anyhow::Result<Self> {
        let open = |name: &str| Labelled::open(name, data).map_err(|error| anyhow!("--set: {error}"));
        let mut set = open(source)?;
        set.drop_broken();
        for (part, words) in [(Part::Train, "to train on"), (Part::HeldOut, "held out")] {
            if set.part(part).is_empty() {
                bail!("--set: {source}: found no pictures {words}, expected some");
            }
        }
        let mut all = vec![Labelling::of(source, &set)];
        let others = SAME_PICTURES.iter().filter(|names| names.contains(&source));
        for name in others.copied().flatten().filter(|name| **name != source) {
            all.push(Labelling::of(name, &open(name)?));
        }
        Ok(Self { set, all })
    }

    /// The place of the labelling with these classes.
    ///
    /// # Errors
    /// There is none; `whose` says whose classes they are.
    pub fn find(&self, classes: &[String], whose: &str) -> anyhow::Result<usize> {
        let found = self.all.iter().position(|labelling| labelling.classes == classes);
        found.ok_or_else(|| {
            let expected: Vec<String> = (self.all.iter())
                .map(|labelling| {
                    let classes = &labelling.classes;
                    format!("the {} of {} ({})", classes.len(), labelling.name, some(classes))
                })
                .collect();
            anyhow!(
                "{whose}: labels: found {} classes ({}), expected {}",
                classes.len(),
                some(classes),
                expected.join(", or ")
            )
        })
    }
}

/// The first names.
fn some(names: &[String]) -> String {
    let shown: Vec<&str> = names.iter().map(String::as_str).take(SHOWN).collect();
    let more = if names.len() > SHOWN { ", .." } else { "" };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelling(classes: &[&str], of: &[Option<usize>]) -> Labelling {
        Labelling {
            name: "test".to_owned(),
            classes: classes.iter().map(|&name| name.to_owned()).collect(),
            of: of.to_vec(),
        }
    }

    #[test]
    fn classes_lie_within_classes_where_all_their_pictures_do() {
        let fine = labelling(
            &["apple", "pear", "crow", "bat", "none"],
            &[Some(0), Some(1), Some(0), Some(2), Some(3), Some(3), None],
        );
        let coarse = labelling(
            &["fruit", "animal"],
            &[Some(0), Some(0), Some(0), Some(1), Some(1), Some(0), Some(1)],
        );
        assert_eq!(fine.within(&coarse), [Some(0), Some(0), Some(1), None, None]);
        assert_eq!(coarse.within(&fine), [None, None]);
        assert_eq!(coarse.within(&coarse), [Some(0), Some(1)]);
        let open = labelling(&["apple"], &[Some(0), Some(0)]);
        assert_eq!(open.within(&labelling(&["a"], &[Some(0), None])), [None]);
    }
}
