//! A list of pictures as JSONL.

use std::path::Path;

use serde::Deserialize;

use super::files::{Candidate, keep_pictures};
use super::{Labelled, LabelledError, Pixels, Skipped};
use crate::text::Rows;

/// Most classes that labels in numbers may ask for.
const MOST_CLASSES: usize = 100_000;

/// A line. Other columns are passed over: lists of captions often carry more.
#[derive(Deserialize)]
struct Row {
    image: String,
    #[serde(default)]
    caption: Option<String>,
    #[serde(default)]
    label: Option<Label>,
    #[serde(default)]
    split: Option<Split>,
}

#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Label {
    Number(i64),
    Name(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Split {
    Train,
    HeldOut,
}

impl Labelled {
    /// The pictures of a list: a line holds `{"image": "a.png", "caption": "a dog", "label": "dog", "split": "train"}`, of which only
    /// `image` has to be there. Paths are relative to the folder of the list. Labels are names, sorted to make the classes, or numbers from
    /// 0, which are the classes themselves. `split` is `train` or `held_out`; without it the hash of `image` decides.
    ///
    /// Pictures that are absent, too large or none are left out and counted.
    ///
    /// # Errors
    /// The list cannot be read, a line is not as above, labels are names and numbers, a number is below 0 or beyond all reason, or
    /// there is no picture.
    pub fn jsonl(path: &Path) -> Result<Self, LabelledError> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let expected = "{\"image\": \"...\"}, with \"caption\", \"label\" (a name or a number), \"split\" (train or held_out) or without";
        let mut rows = Vec::new();
        for row in Rows::<Row>::open(path, expected)? {
            rows.push(row?);
        }
        let labels = rows
            .iter()
            .filter_map(|(line, row)| Some((*line, row.label.as_ref()?)));
        let classes = classes(&labels.collect::<Vec<_>>(), path)?;
        let candidates = rows.into_iter().map(|(_, row)| Candidate {
            path: folder.join(&row.image),
            label: row.label.and_then(|label| match label {
                Label::Number(number) => usize::try_from(number).ok(),
                Label::Name(name) => classes.binary_search(&name).ok(),
            }),
            caption: row.caption,
            key: row.image,
            held_out: row.split.map(|split| matches!(split, Split::HeldOut)),
        });
        let mut skipped = Skipped::default();
        let (entries, paths) = keep_pictures(candidates.collect(), &mut skipped);
        if entries.is_empty() {
            let found = match skipped.messages.first() {
                Some(first) => format!("none ({} left out, such as {first})", skipped.total()),
                None => "none".to_owned(),
            };
            return Err(LabelledError::invalid(path, "pictures", found, "at least one"));
        }
        Ok(Self {
            name: path.display().to_string(),
            classes,
            entries,
            pixels: Pixels::Files(paths),
            skipped,
        })
    }
}

/// The names of the classes; labels come with the numbers of their lines.
fn classes(labels: &[(usize, &Label)], path: &Path) -> Result<Vec<String>, LabelledError> {
    let Some((_, first)) = labels.first() else {
        return Ok(Vec::new());
    };
    let of_names = matches!(first, Label::Name(_));
    let mut names = Vec::new();
    let mut most = 0;
    for (line, label) in labels {
        let wrong = |found: String, expected: String| {
            LabelledError::invalid(path, format!("line {line}: label"), found, expected)
        };
        match label {
            Label::Name(name) if of_names => names.push(name.clone()),
            Label::Name(name) => return Err(wrong(format!("{name:?}"), "a number, as before".to_owned())),
            Label::Number(number) if of_names => {
                return Err(wrong(number.to_string(), "a name, as before".to_owned()));
            }
            Label::Number(number) => match usize::try_from(*number) {
                Ok(number) if number < MOST_CLASSES => most = most.max(number),
                _ => return Err(wrong(number.to_string(), format!("0 to {}", MOST_CLASSES - 1))),
            },
        }
    }
    if !of_names {
        return Ok((0..=most).map(|number| number.to_string()).collect());
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}
