//! Parts of the data set by a hash of the video's id, so that all clips of one video are in one part, on every machine.
//!
//! ```text
//! h = first 8 bytes of SHA-256(video_id), highest byte first
//! test if h mod 1000 < 2, val if h mod 1000 is 2 or 3, else train
//! ```

use serde::Serialize;

use super::parser::hash;
use super::record::{Provenance, Record};

/// A part of the data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// What models learn from.
    Train,
    /// What decides between them.
    Val,
    /// What judges them.
    Test,
}

impl Part {
    /// Its name in manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }
}

/// How many videos of 1000 go where; the rest is for training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For testing.
    pub test: u64,
    /// For validation.
    pub val: u64,
}

impl Default for Rule {
    fn default() -> Self {
        Self { test: 2, val: 2 }
    }
}

impl Rule {
    /// The part of a video.
    ///
    /// ```
    /// use fulgur_benchmark::captions::split::{Part, Rule};
    /// assert_eq!(Rule::default().part("P2RPnCJZMBo"), Part::Train);
    /// ```
    #[must_use]
    pub fn part(&self, video_id: &str) -> Part {
        match hash(video_id.as_bytes()) % 1000 {
            place if place < self.test => Part::Test,
            place if place < self.test + self.val => Part::Val,
            _ => Part::Train,
        }
    }

    /// The rule in words.
    #[must_use]
    pub fn words(&self) -> String {
        format!(
            "h = u64 of the first 8 bytes of SHA-256(video_id), big-endian; h mod 1000 < {} test, < {} val, else train",
            self.test,
            self.test + self.val
        )
    }

    /// Writes part and rule into a record; a clip without a video goes by its own id.
    pub fn apply(&self, record: &mut Record) -> Part {
        let part = self.part(record.video_id.as_deref().unwrap_or(&record.id));
        record.split = Some(part.name().to_owned());
        let from = Provenance {
            stage: "split",
            backend: "hash".to_owned(),
            rule: Some(self.words()),
            ..Provenance::default()
        };
        record.stamp("split", &from);
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_the_published_rule() {
        // python3: int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") % 1000
        for (id, place) in GOLDEN {
            assert_eq!(hash(id.as_bytes()) % 1000, place, "{id}");
            let part = Rule::default().part(id);
            let expected = match place {
                0 | 1 => Part::Test,
                2 | 3 => Part::Val,
                _ => Part::Train,
            };
            assert_eq!(part, expected, "{id}");
        }
    }

    const GOLDEN: [(&str, u64); 7] = [
        ("P2RPnCJZMBo", 797),
        ("-a_b_c-d_1_", 243),
        ("video-01651", 0),
        ("video-01018", 1),
        ("video-00252", 2),
        ("video-01326", 3),
        ("video-01227", 4),
    ];

    #[test]
    fn shares_are_close_to_the_rule() {
        let rule = Rule { test: 100, val: 50 };
        let parts: Vec<Part> = (0..20_000).map(|i| rule.part(&format!("{i:011}"))).collect();
        let share = |part| parts.iter().filter(|found| **found == part).count() as f64 / 20_000.0;
        assert!((share(Part::Test) - 0.1).abs() < 0.01, "{}", share(Part::Test));
        assert!((share(Part::Val) - 0.05).abs() < 0.01, "{}", share(Part::Val));
    }

    #[test]
    fn the_rule_is_recorded() {
        let mut record = Record::parse(r#"{"id":"P2RPnCJZMBo_0_10000"}"#).unwrap();
        assert_eq!(Rule::default().apply(&mut record), Part::Train);
        assert_eq!(record.split.as_deref(), Some("train"));
        let from = record.provenance("split").unwrap();
        assert!(
            from.contains("h mod 1000 < 2 test, < 4 val, else train"),
            "{from}"
        );
    }
}
