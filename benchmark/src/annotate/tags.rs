//! Zero-shot tags as captions of sounds: which words of a list an encoder finds nearest to a sound.
//!
//! A list is a text file with a tag a line; what follows `#` at the beginning of a line is a comment. A tag is read by the encoder as a
//! text. One that takes no texts, such as the builtin, needs examples: a line `TAG | FILE` names a sound or a clip, from the folder of the
//! list. Several lines may have one tag. The folder of a prepared set of things is a list too: the sounds of its things.
//!
//! ```text
//! score of a tag = the largest cosine of the sound with one of its vectors
//! said are the best tags, none of which is far below the best one
//! ```

use std::path::{Path, PathBuf};

use fulgur_datasets::media::{MediaError, Sound};
use fulgur_datasets::things::{SOUND_RATE, THINGS_FILE, Things, ThingsError};
use fulgur_lightnet::params::{ParamsError, file};

use super::config::{PLACE, Tags as Settings};
use super::stage::{About, AudioCaptioner, Clip, StageError};
use crate::avhscore::cosine;
use crate::encoder::{AnyEncoder, EncodeError, Sense};

/// Name of the backend.
pub const NAME: &str = "tags";
/// Version of the phrase and of how tags are chosen.
pub const VERSION: &str = "tags-v1";
/// What stands in the provenance, so that nobody takes tags for a description.
const RULE: &str = "zero-shot tags, no description";
/// Our own list.
const OWN: &str = include_str!("tags.txt");
/// Largest list that is read, and most tags of one.
const LARGEST: u64 = 4 << 20;
const MOST: usize = 20_000;

/// Why there are no tags.
#[derive(Debug, thiserror::Error)]
pub enum TagsError {
    /// The list cannot be read.
    #[error(transparent)]
    File(#[from] ParamsError),
    /// A prepared set cannot be read.
    #[error(transparent)]
    Things(#[from] ThingsError),
    /// A line of the list.
    #[error("{}: line {line}: found {found}, expected {expected}", path.display())]
    Line {
        /// The list.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is there.
        found: String,
        /// What could be.
        expected: &'static str,
    },
    /// An example of a tag.
    #[error("{}: {source}", path.display())]
    Example {
        /// The file.
        path: PathBuf,
        /// Why.
        source: MediaError,
    },
    /// A tag that cannot be encoded.
    #[error("tag {tag:?}: {source}")]
    Tag {
        /// The tag.
        tag: String,
        /// Why.
        source: EncodeError,
    },
    /// The encoder and the list do not fit.
    #[error("tags.list: {0}")]
    List(String),
}

/// A tag, and where its vector is from.
#[derive(Debug)]
enum Entry {
    Text(String),
    Example(String, PathBuf),
    Sound(String, Sound),
}

/// Reads the sound of a file.
pub type ReadSound<'a> = &'a dyn Fn(&Path) -> Result<Sound, MediaError>;

/// A tag and its vectors.
#[derive(Debug)]
struct Tag {
    name: String,
    vectors: Vec<Vec<f32>>,
}

/// The captioner.
#[derive(Debug)]
pub struct TagCaptioner {
    encoder: AnyEncoder,
    tags: Vec<Tag>,
    settings: Settings,
}

impl TagCaptioner {
    /// Reads the list and encodes its tags; `read` reads the sounds of examples.
    ///
    /// # Errors
    /// The encoder takes no sounds, the list is damaged or empty, or one of its tags cannot be encoded.
    pub fn new(encoder: AnyEncoder, settings: &Settings, read: ReadSound<'_>) -> Result<Self, TagsError> {
        if !encoder.takes(Sense::Sounds) {
            return Err(TagsError::List(format!(
                "found {}, which hears nothing, expected an encoder of sounds",
                encoder.name()
            )));
        }
        let path = Path::new(&settings.list);
        let entries = match settings.list.as_str() {
            "" => lines(OWN, path)?,
            _ if path.is_dir() => things(path)?,
            _ => {
                let bytes = file::read_bounded(path, LARGEST)?;
                lines(&String::from_utf8_lossy(&bytes), path)?
            }
        };
        if entries.is_empty() {
            return Err(TagsError::List(format!(
                "found no tag in {}, expected at least one",
                settings.list
            )));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut tags: Vec<Tag> = Vec::new();
        for entry in entries {
            let (name, vector) = match entry {
                Entry::Text(name) if !encoder.takes(Sense::Texts) => {
                    return Err(TagsError::List(format!(
                        "found the tag {name:?} without an example, which {} needs: expected lines TAG | FILE, or the folder of a \
                         prepared set of things",
                        encoder.name()
                    )));
                }
                Entry::Text(name) => {
                    let vector = encoder.text(&settings.prompt.replace(PLACE, &name));
                    (name, vector)
                }
                Entry::Example(name, example) => {
                    let path = folder.join(example);
                    let sound = read(&path).map_err(|source| TagsError::Example { path, source })?;
                    (name, encoder.sound(&sound))
                }
                Entry::Sound(name, sound) => (name, encoder.sound(&sound)),
            };
            let vector = match vector {
                Ok(vector) => vector,
                Err(source) => return Err(TagsError::Tag { tag: name, source }),
            };
            match tags.iter_mut().find(|tag| tag.name == name) {
                Some(tag) => tag.vectors.push(vector),
                None => tags.push(Tag {
                    name,
                    vectors: vec![vector],
                }),
            }
        }
        Ok(Self {
            encoder,
            tags,
            settings: settings.clone(),
        })
    }

    /// All tags with their scores, the best first.
    ///
    /// # Errors
    /// The sound is empty, or the network fails.
    pub fn scores(&self, sound: &Sound) -> Result<Vec<(&str, f64)>, EncodeError> {
        let heard = self.encoder.sound(sound)?;
        let score = |tag: &Tag| {
            let cosines = tag.vectors.iter().map(|vector| cosine(vector, &heard));
            cosines.fold(f64::NEG_INFINITY, f64::max)
        };
        let mut scores: Vec<(&str, f64)> = self
            .tags
            .iter()
            .map(|tag| (tag.name.as_str(), score(tag)))
            .collect();
        scores.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(scores)
    }

    /// What is said of a sound; nothing where no tag is near.
    fn said(&self, scores: &[(&str, f64)]) -> Option<String> {
        let Settings {
            count,
            least,
            margin,
            phrase,
            ..
        } = &self.settings;
        let best = scores.first()?.1;
        let near = |(_, score): &&(&str, f64)| *score >= *least && *score >= best - margin;
        let names: Vec<&str> = scores
            .iter()
            .take(*count)
            .filter(near)
            .map(|(name, _)| *name)
            .collect();
        let listed = match names.as_slice() {
            [] => return None,
            [only] => (*only).to_owned(),
            [before @ .., last] => format!("{} and {last}", before.join(", ")),
        };
        Some(phrase.replace(PLACE, &listed))
    }
}

impl AudioCaptioner for TagCaptioner {
    fn about(&self) -> About {
        About {
            backend: NAME.to_owned(),
            model: Some(format!("{} {}", self.encoder.name(), self.encoder.checkpoint())),
            prompt_version: Some(VERSION.to_owned()),
            costly: true,
            rule: Some(RULE.to_owned()),
        }
    }

    fn rate(&self) -> u32 {
        self.encoder.rate()
    }

    fn caption(&self, sound: Option<&Sound>, _: Clip<'_>) -> Result<Vec<String>, StageError> {
        let sound = sound.ok_or_else(|| StageError::Clip("no sound to describe".to_owned()))?;
        let scores = self
            .scores(sound)
            .map_err(|error| StageError::Clip(error.to_string()))?;
        Ok(self.said(&scores).into_iter().collect())
    }
}

/// The tags of a text.
fn lines(text: &str, path: &Path) -> Result<Vec<Entry>, TagsError> {
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |found: String, expected| TagsError::Line {
            path: path.to_owned(),
            line: number + 1,
            found,
            expected,
        };
        if entries.len() == MOST {
            return Err(wrong(format!("more than {MOST} tags"), "a shorter list"));
        }
        entries.push(
            match line
                .split_once('|')
                .map(|(tag, example)| (tag.trim(), example.trim()))
            {
                None => Entry::Text(line.to_owned()),
                Some((tag, example)) if !tag.is_empty() && !example.is_empty() => {
                    Entry::Example(tag.to_owned(), PathBuf::from(example))
                }
                Some(_) => return Err(wrong(format!("{line:?}"), "TAG, or TAG | FILE")),
            },
        );
    }
    Ok(entries)
}

/// The sounds of a prepared set.
fn things(dir: &Path) -> Result<Vec<Entry>, TagsError> {
    if !dir.join(THINGS_FILE).is_file() {
        return Err(TagsError::List(format!(
            "found the folder {} without {THINGS_FILE}, expected a file of tags or a prepared set of things",
            dir.display()
        )));
    }
    let things = Things::load(dir)?;
    let entry = |thing: &fulgur_datasets::things::Thing| {
        let name = format!("{} {}", thing.words.noun, thing.words.verb.gerund);
        let sound = Sound::new(thing.sound.clone(), 1, SOUND_RATE);
        sound
            .map(|sound| Entry::Sound(name, sound))
            .map_err(|source| TagsError::Example {
                path: dir.join(&thing.id),
                source,
            })
    };
    things.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use std::f32::consts::TAU;

    use candle_core::{DType, Device};

    use super::*;
    use crate::captions::Record;

    fn tone(hertz: f32) -> Sound {
        let wave = (0..32_000).map(|i| 0.4 * (i as f32 / 16_000.0 * hertz * TAU).sin());
        Sound::new(wave.collect(), 1, 16_000).unwrap()
    }

    fn builtin() -> AnyEncoder {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/encoder");
        AnyEncoder::open(&dir, DType::F32, &Device::Cpu).unwrap()
    }

    /// Files are named after the tones in them.
    fn read(path: &Path) -> Result<Sound, MediaError> {
        let name = path
            .file_stem()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        match name.parse() {
            Ok(hertz) => Ok(tone(hertz)),
            Err(_) => Err(MediaError::Io {
                path: path.to_owned(),
                action: "open",
                source: std::io::ErrorKind::NotFound.into(),
            }),
        }
    }

    fn with(list: &str, change: impl FnOnce(&mut Settings)) -> Result<TagCaptioner, TagsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tags.txt");
        std::fs::write(&path, list).unwrap();
        let mut settings = Settings {
            list: path.display().to_string(),
            ..Settings::default()
        };
        change(&mut settings);
        TagCaptioner::new(builtin(), &settings, &read)
    }

    const LIST: &str =
        "# tones\n\na low hum | 110.wav\na low hum | 130.wav\na whistle | 3000.wav\na beep | 900.wav\n";

    #[test]
    fn the_nearest_tags_are_said() {
        let record = Record::default();
        let clip = Clip {
            id: "a",
            record: &record,
        };
        let only = with(LIST, |settings| settings.count = 1).unwrap();
        assert_eq!(only.tags.len(), 3);
        for (hertz, said) in [
            (3000.0, "The sound of a whistle."),
            (110.0, "The sound of a low hum."),
        ] {
            let sound = tone(hertz);
            assert_eq!(only.caption(Some(&sound), clip).unwrap(), [said]);
            let scores = only.scores(&sound).unwrap();
            assert!((scores[0].1 - 1.0).abs() < 1e-4 && scores.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        }
        let all = with(LIST, |settings| {
            settings.margin = 2.0;
            settings.least = -1.0;
            settings.phrase = "Heard: {}".to_owned();
        })
        .unwrap();
        let said = all.caption(Some(&tone(900.0)), clip).unwrap();
        assert!(
            said[0].starts_with("Heard: a beep, ") && said[0].contains(" and "),
            "{said:?}"
        );
        // Nothing near, nothing said.
        let none = with(LIST, |settings| settings.least = 1.0).unwrap();
        assert_eq!(none.said(&[("a", 0.9), ("b", 0.2)]), None);
        assert!(none.caption(None, clip).is_err());
        let about = only.about();
        assert_eq!(
            (about.backend.as_str(), about.rule.as_deref()),
            ("tags", Some(RULE))
        );
        assert!(about.model.unwrap().starts_with("builtin "));
    }

    #[test]
    fn far_tags_are_left_out() {
        let tags = with(LIST, |_| {}).unwrap();
        let scores = [("a", 0.52), ("b", 0.45), ("c", 0.41), ("d", 0.4)];
        assert_eq!(tags.said(&scores).as_deref(), Some("The sound of a and b."));
        assert_eq!(tags.said(&scores[3..]).as_deref(), Some("The sound of d."));
        assert_eq!(tags.said(&[("a", 0.05)]), None);
    }

    #[test]
    fn lists_that_do_not_fit_are_one_line() {
        for (list, words) in [
            (
                "a bell\n",
                "found the tag \"a bell\" without an example, which builtin needs",
            ),
            ("a | b | \n", "none"),
            (
                "a |\n",
                "tags.txt: line 1: found \"a |\", expected TAG, or TAG | FILE",
            ),
            ("# nothing\n", "found no tag in"),
            ("\na bell | absent.wav\n", "absent.wav: "),
        ] {
            match with(list, |_| {}) {
                Err(error) => {
                    let line = error.to_string();
                    assert!(words == "none" || line.contains(words), "{line}");
                    assert!(!line.contains('\n'));
                }
                Ok(_) => panic!("{list:?}: expected an error"),
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            list: folder.path().display().to_string(),
            ..Settings::default()
        };
        let line = TagCaptioner::new(builtin(), &settings, &read)
            .unwrap_err()
            .to_string();
        assert!(
            line.contains("expected a file of tags or a prepared set"),
            "{line}"
        );
        assert!(lines(OWN, Path::new("")).unwrap().len() >= 60);
    }
}
