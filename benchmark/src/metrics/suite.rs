//! The metrics by name: what each of them reads, and how readings of clips become one figure.
//!
//! A reader looks at one clip at a time ([`super::readers`]); metrics that read the same share it. A new metric is a line of
//! [`METRICS`] and the file that it names.

use serde::Serialize;

use super::classes::{self, SPLITS};
use super::joint::{Part, Vectors};
use super::points::{Points, PointsError};
use super::sync::Offset;
use super::{frechet, kvd};

/// What one clip gives to one reader.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    /// Vectors of features: one of a clip, or one of each part of it.
    Rows(Vec<Vec<f64>>),
    /// A vector of features and the logits of classes.
    Classes {
        /// Features.
        embedding: Vec<f64>,
        /// Before softmax.
        logits: Vec<f64>,
    },
    /// The clip's own figure.
    Value(f64),
    /// Vectors of picture, sound and prompt in one space.
    Joint(Vectors),
    /// How far sound and picture are apart.
    Offset(Offset),
}

impl Reading {
    /// Whether all of it is numbers: a broken sound may hold what is none.
    pub fn is_finite(&self) -> bool {
        let all = |values: &[f64]| values.iter().all(|value| value.is_finite());
        match self {
            Self::Rows(rows) => rows.iter().all(|row| all(row)),
            Self::Classes { embedding, logits } => all(embedding) && all(logits),
            Self::Value(value) => value.is_finite(),
            Self::Offset(offset) => offset.offset_ms.is_finite() && offset.confidence.is_finite(),
            // Each pair of parts is looked at by itself.
            Self::Joint(_) => true,
        }
    }
}

/// Which network or algorithm a metric reads clips with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reads {
    /// [`crate::features::i3d`].
    I3d,
    /// [`crate::features::vggish`].
    Vggish,
    /// [`crate::features::panns`].
    Panns,
    /// [`crate::features::clap`].
    Clap,
    /// [`super::av_align`].
    Align,
    /// [`crate::avhscore`] with an encoder of frames and sounds.
    Avh,
    /// [`super::javis`] with an encoder of frames and sounds.
    Javis,
    /// [`super::sync`].
    Sync,
    /// [`super::joint`] with ImageBind.
    Joint,
    /// [`super::joint::clipsim`] with CLIP.
    Clip,
}

impl Reads {
    /// Name of its weights in `--weights`; none where it needs none.
    pub fn weights(self) -> Option<&'static str> {
        match self {
            Self::I3d => Some("i3d"),
            Self::Vggish => Some("vggish"),
            Self::Panns => Some("panns"),
            Self::Clap => Some("clap"),
            Self::Avh | Self::Javis => Some("encoder"),
            Self::Joint => Some("imagebind"),
            Self::Clip => Some("clip"),
            Self::Align | Self::Sync => None,
        }
    }
}

/// What a metric compares generated clips with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Beside {
    /// Nothing: they have figures of their own.
    Nothing,
    /// The text that they were made from.
    Prompt,
    /// A set of real clips.
    Set,
    /// The real clip of the same name.
    Pair,
}

/// One metric.
pub struct Metric {
    /// Its name in `--metric` and in results.
    pub name: &'static str,
    /// What it measures, for people.
    pub about: &'static str,
    /// What it reads.
    pub reads: Reads,
    /// What it compares with.
    pub beside: Beside,
    /// Whether less is better.
    pub lower_is_better: bool,
    /// What its numbers were compared with.
    pub golden: &'static str,
    /// The two vectors of [`Reading::Joint`] that it compares; none for other readings.
    pub pair: Option<[Part; 2]>,
    reduce: fn(&Sets<'_>) -> Result<Reduced, String>,
}

impl std::fmt::Debug for Metric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Metric({})", self.name)
    }
}

const I3D_GOLDEN: &str = "a PyTorch transcription of I3D; scipy and numpy";
const IMAGEBIND_GOLDEN: &str = "a PyTorch transcription of ImageBind on a whole clip; torchaudio; Pillow";
const PANNS_GOLDEN: &str = "a PyTorch transcription of Cnn14 behind librosa; numpy";

/// All of them.
pub const METRICS: [Metric; 15] = [
    Metric {
        name: "fvd",
        about: "Frechet distance of action logits of clips",
        reads: Reads::I3d,
        beside: Beside::Set,
        lower_is_better: true,
        golden: I3D_GOLDEN,
        pair: None,
        reduce: frechet_of,
    },
    Metric {
        name: "kvd",
        about: "kernel distance of action logits of clips",
        reads: Reads::I3d,
        beside: Beside::Set,
        lower_is_better: true,
        golden: I3D_GOLDEN,
        pair: None,
        reduce: kernel_of,
    },
    Metric {
        name: "fad",
        about: "Frechet distance of VGGish features of sounds, of all parts of 0.96 s",
        reads: Reads::Vggish,
        beside: Beside::Set,
        lower_is_better: true,
        golden: "a PyTorch transcription of VGGish; scipy",
        pair: None,
        reduce: frechet_of,
    },
    Metric {
        name: "fd_panns",
        about: "Frechet distance of PANNs features of sounds",
        reads: Reads::Panns,
        beside: Beside::Set,
        lower_is_better: true,
        golden: PANNS_GOLDEN,
        pair: None,
        reduce: frechet_of,
    },
    Metric {
        name: "is",
        about: "inception score of sounds: certain and various classes",
        reads: Reads::Panns,
        beside: Beside::Nothing,
        lower_is_better: false,
        golden: PANNS_GOLDEN,
        pair: None,
        reduce: inception_of,
    },
    Metric {
        name: "kl",
        about: "divergence of the classes of a sound from those of the real one of its name",
        reads: Reads::Panns,
        beside: Beside::Pair,
        lower_is_better: true,
        golden: PANNS_GOLDEN,
        pair: None,
        reduce: divergence_of,
    },
    Metric {
        name: "clap",
        about: "cosine of sound and prompt in the space of CLAP",
        reads: Reads::Clap,
        beside: Beside::Prompt,
        lower_is_better: false,
        golden: "transformers ClapModel and ClapFeatureExtractor",
        pair: None,
        reduce: mean_of,
    },
    Metric {
        name: "clipsim",
        about: "mean cosine of frames and prompt in the space of CLIP",
        reads: Reads::Clip,
        beside: Beside::Prompt,
        lower_is_better: false,
        golden: "transformers CLIPModel; Pillow",
        pair: None,
        reduce: mean_of,
    },
    Metric {
        name: "ib_tv",
        about: "cosine of prompt and clip in the space of ImageBind",
        reads: Reads::Joint,
        beside: Beside::Prompt,
        lower_is_better: false,
        golden: IMAGEBIND_GOLDEN,
        pair: Some([Part::Text, Part::Video]),
        reduce: mean_of,
    },
    Metric {
        name: "ib_ta",
        about: "cosine of prompt and sound in the space of ImageBind",
        reads: Reads::Joint,
        beside: Beside::Prompt,
        lower_is_better: false,
        golden: IMAGEBIND_GOLDEN,
        pair: Some([Part::Text, Part::Sound]),
        reduce: mean_of,
    },
    Metric {
        name: "ib_av",
        about: "cosine of sound and clip in the space of ImageBind",
        reads: Reads::Joint,
        beside: Beside::Nothing,
        lower_is_better: false,
        golden: IMAGEBIND_GOLDEN,
        pair: Some([Part::Sound, Part::Video]),
        reduce: mean_of,
    },
    Metric {
        name: "av_align",
        about: "share of onsets and peaks of motion that come together",
        reads: Reads::Align,
        beside: Beside::Nothing,
        lower_is_better: false,
        golden: "librosa onset_strength and onset_detect, OpenCV calcOpticalFlowFarneback",
        pair: None,
        reduce: mean_of,
    },
    Metric {
        name: "avhscore",
        about: "mean cosine of frames and the whole soundtrack",
        reads: Reads::Avh,
        beside: Beside::Nothing,
        lower_is_better: false,
        golden: IMAGEBIND_GOLDEN,
        pair: None,
        reduce: mean_of,
    },
    Metric {
        name: "javisscore",
        about: "mean of the worst cosines of frames and the sound of their own two seconds",
        reads: Reads::Javis,
        beside: Beside::Nothing,
        lower_is_better: false,
        golden: "numpy",
        pair: None,
        reduce: mean_of,
    },
    Metric {
        name: "av_sync",
        about: "distance of sound and motion in ms, by our own probe",
        reads: Reads::Sync,
        beside: Beside::Nothing,
        lower_is_better: true,
        golden: "composed clips whose shift is known",
        pair: None,
        reduce: mean_size_of,
    },
];

/// Metrics of the field that are not here, and why.
pub const LEFT_OUT: [(&str, &str); 6] = [
    (
        "desync",
        "Synchformer: its aggregation layers are not stated exactly enough to be written without its code",
    ),
    ("fd_passt", "PaSST: no outside numbers to compare with"),
    ("fd_openl3", "OpenL3: no outside numbers to compare with"),
    ("fad_audioclip", "AudioCLIP: no outside numbers to compare with"),
    (
        "cavp",
        "Diff-Foley's encoders: no outside numbers to compare with",
    ),
    (
        "videoalign, audiobox",
        "learned judges of another kind: run them beside this program",
    ),
];

/// The metric of this name.
pub fn find(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

/// Readings that a metric is computed of, each with the number of its clip.
#[derive(Clone, Debug, Default)]
pub struct Sets<'a> {
    /// Of generated clips.
    pub generated: Vec<(usize, &'a Reading)>,
    /// Of real clips.
    pub reference: Vec<(usize, &'a Reading)>,
    /// Numbers of generated and real clips of one name.
    pub pairs: Vec<(usize, usize)>,
    /// Of what is shuffled.
    pub seed: u64,
}

/// A metric's figure.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reduced {
    /// The figure.
    pub value: f64,
    /// How many generated clips it is of.
    pub n: usize,
    /// How many real ones.
    pub n_reference: Option<usize>,
    /// Standard deviation, where it has one.
    pub deviation: Option<f64>,
    /// Figures of single clips, by number.
    pub samples: Vec<(usize, f64)>,
    /// What a reader of the figure should know.
    pub warnings: Vec<String>,
}

impl Metric {
    /// The figure of these readings.
    ///
    /// # Errors
    /// There are too few of them, in words.
    pub fn reduce(&self, sets: &Sets<'_>) -> Result<Reduced, String> {
        (self.reduce)(sets)
    }

    /// What this metric takes of a reading.
    ///
    /// # Errors
    /// The clip lacks what the metric compares, in words.
    pub fn take(&self, reading: &Reading) -> Result<Reading, String> {
        match (self.pair, reading) {
            (Some(pair), Reading::Joint(vectors)) => vectors.cosine(pair).map(Reading::Value),
            _ => Ok(reading.clone()),
        }
    }
}

/// Clips below which FVD is known to be far too large.
const FEW_CLIPS: usize = 2048;

/// All rows of some readings.
fn points(readings: &[(usize, &Reading)], side: &str) -> Result<Points, String> {
    let mut rows = readings.iter().flat_map(|(_, reading)| match reading {
        Reading::Rows(rows) => rows.as_slice(),
        Reading::Classes { embedding, .. } => std::slice::from_ref(embedding),
        Reading::Value(_) | Reading::Joint(_) | Reading::Offset(_) => &[],
    });
    let few = || format!("{side}: found features of 0 clips, expected at least 2");
    let first = rows.next().ok_or_else(few)?;
    let width = first.len();
    let values = std::iter::once(first).chain(rows).flatten().copied().collect();
    Points::new(width, values).map_err(|error| format!("{side}: {error}"))
}

/// Both sets, and what is to be said about their sizes.
fn both(sets: &Sets<'_>) -> Result<(Points, Points, Reduced), String> {
    let (x, y) = (
        points(&sets.generated, "generated")?,
        points(&sets.reference, "reference")?,
    );
    let mut warnings = Vec::new();
    let (m, n) = (sets.generated.len(), sets.reference.len());
    for (side, count, rows) in [("generated", m, x.len()), ("reference", n, y.len())] {
        if rows <= x.width() {
            warnings.push(format!(
                "{rows} {side} features of {} values: their covariance is singular, so the distance is too large",
                x.width()
            ));
        } else if count < FEW_CLIPS {
            warnings.push(format!("{count} {side} clips: compare at equal numbers alone"));
        }
    }
    let reduced = Reduced {
        n: m,
        n_reference: Some(n),
        warnings,
        ..Reduced::default()
    };
    Ok((x, y, reduced))
}

fn distance(
    sets: &Sets<'_>,
    of: fn(&Points, &Points) -> Result<f64, PointsError>,
) -> Result<Reduced, String> {
    let (x, y, reduced) = both(sets)?;
    let value = of(&x, &y).map_err(|error| error.to_string())?;
    Ok(Reduced { value, ..reduced })
}

fn frechet_of(sets: &Sets<'_>) -> Result<Reduced, String> {
    distance(sets, frechet::between)
}

fn kernel_of(sets: &Sets<'_>) -> Result<Reduced, String> {
    let mut reduced = distance(sets, kvd::kvd)?;
    // Its expectation does not depend on the number of clips.
    reduced.warnings.clear();
    Ok(reduced)
}

fn logits(reading: &Reading) -> Option<&Vec<f64>> {
    match reading {
        Reading::Classes { logits, .. } => Some(logits),
        Reading::Rows(_) | Reading::Value(_) | Reading::Joint(_) | Reading::Offset(_) => None,
    }
}

fn inception_of(sets: &Sets<'_>) -> Result<Reduced, String> {
    let rows: Vec<Vec<f64>> = sets
        .generated
        .iter()
        .filter_map(|(_, r)| logits(r))
        .cloned()
        .collect();
    let score = classes::inception_score(&rows, SPLITS, Some(sets.seed));
    let score = score.ok_or("generated: found classes of 0 clips, expected at least 1")?;
    let mut warnings = Vec::new();
    if rows.len() < SPLITS * 100 {
        warnings.push(format!(
            "{} clips in {} parts: small parts have a small score",
            rows.len(),
            SPLITS.min(rows.len())
        ));
    }
    Ok(Reduced {
        value: score.mean,
        n: rows.len(),
        deviation: Some(score.deviation),
        warnings,
        ..Reduced::default()
    })
}

fn divergence_of(sets: &Sets<'_>) -> Result<Reduced, String> {
    let of = |readings: &[(usize, &Reading)], wanted: usize| {
        let found = readings.iter().find(|(number, _)| *number == wanted);
        found.and_then(|(_, reading)| logits(reading).cloned())
    };
    let samples: Vec<(usize, f64)> = sets
        .pairs
        .iter()
        .filter_map(|&(generated, reference)| {
            let (g, r) = (of(&sets.generated, generated)?, of(&sets.reference, reference)?);
            (g.len() == r.len()).then(|| (generated, classes::divergence(&r, &g)))
        })
        .collect();
    if samples.is_empty() {
        return Err("found 0 pairs of clips of one name in both folders, expected at least 1".to_owned());
    }
    Ok(Reduced {
        n_reference: Some(samples.len()),
        ..mean(samples)
    })
}

fn mean_of(sets: &Sets<'_>) -> Result<Reduced, String> {
    let value = |&(number, reading): &(usize, &Reading)| match reading {
        Reading::Value(value) => Some((number, *value)),
        Reading::Offset(offset) => Some((number, offset.offset_ms)),
        Reading::Rows(_) | Reading::Classes { .. } | Reading::Joint(_) => None,
    };
    let samples: Vec<(usize, f64)> = sets.generated.iter().filter_map(value).collect();
    if samples.is_empty() {
        return Err("generated: found 0 clips with a figure, expected at least 1".to_owned());
    }
    Ok(mean(samples))
}

/// The mean of what clips are away from zero; their own figures keep their signs.
fn mean_size_of(sets: &Sets<'_>) -> Result<Reduced, String> {
    let signed = mean_of(sets)?;
    let sum: f64 = signed.samples.iter().map(|(_, value)| value.abs()).sum();
    Ok(Reduced {
        value: sum / signed.n as f64,
        ..signed
    })
}

fn mean(samples: Vec<(usize, f64)>) -> Reduced {
    let n = samples.len();
    Reduced {
        value: samples.iter().map(|(_, value)| value).sum::<f64>() / n as f64,
        n,
        samples,
        ..Reduced::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(name: &str) -> &'static Metric {
        find(name).unwrap()
    }

    #[test]
    fn names_are_there_once() {
        let names: std::collections::BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        assert!(find("fid").is_none());
        assert!(
            LEFT_OUT
                .iter()
                .all(|(name, reason)| find(name).is_none() && !reason.is_empty())
        );
    }

    #[test]
    fn what_is_no_number_is_seen() {
        assert!(Reading::Rows(vec![vec![1.0], vec![2.0]]).is_finite());
        assert!(!Reading::Rows(vec![vec![1.0], vec![f64::NAN]]).is_finite());
        assert!(!Reading::Value(f64::INFINITY).is_finite());
        let classes = Reading::Classes {
            embedding: vec![0.0],
            logits: vec![f64::NAN],
        };
        assert!(!classes.is_finite());
    }

    #[test]
    fn rows_of_all_parts_are_pooled() {
        let parts = |rows: &[[f64; 2]]| Reading::Rows(rows.iter().map(|row| row.to_vec()).collect());
        let (a, b) = (parts(&[[0.0, 1.0], [2.0, 0.0]]), parts(&[[1.0, 3.0], [0.5, 0.5]]));
        let sets = Sets {
            generated: vec![(0, &a), (1, &b)],
            reference: vec![(0, &b), (1, &a)],
            ..Sets::default()
        };
        let found = metric("fad").reduce(&sets).unwrap();
        assert!(found.value < 1e-9 && (found.n, found.n_reference) == (2, Some(2)));
        assert_eq!(found.warnings.len(), 2);
        let none = Sets::default();
        let line = metric("fad").reduce(&none).unwrap_err();
        assert_eq!(line, "generated: found features of 0 clips, expected at least 2");
        let one = Sets {
            generated: vec![(0, &a)],
            reference: vec![(0, &Reading::Value(1.0))],
            ..Sets::default()
        };
        assert!(metric("kvd").reduce(&one).unwrap_err().starts_with("reference: "));
    }

    #[test]
    fn pairs_are_compared_and_values_averaged() {
        let of = |logits: &[f64]| Reading::Classes {
            embedding: vec![0.0],
            logits: logits.to_vec(),
        };
        let (a, b) = (of(&[0.0, 3.0]), of(&[3.0, 0.0]));
        let sets = Sets {
            generated: vec![(4, &a), (5, &b)],
            reference: vec![(7, &a), (8, &a)],
            pairs: vec![(4, 7), (5, 8), (6, 9)],
            seed: 1,
        };
        let found = metric("kl").reduce(&sets).unwrap();
        assert_eq!((found.n, found.samples[0]), (2, (4, 0.0)));
        assert!(found.samples[1].1 > 1.0 && (found.value - found.samples[1].1 / 2.0).abs() < 1e-12);
        let found = metric("is").reduce(&sets).unwrap();
        assert!(found.deviation.is_some() && found.value >= 1.0 - 1e-12);
        let (x, y) = (Reading::Value(0.25), Reading::Value(0.75));
        let sets = Sets {
            generated: vec![(2, &x), (0, &y)],
            ..Sets::default()
        };
        let found = metric("av_align").reduce(&sets).unwrap();
        assert_eq!((found.value, found.n), (0.5, 2));
        assert!(metric("kl").reduce(&sets).is_err());
        let of = |offset_ms: f64| {
            Reading::Offset(Offset {
                offset_ms,
                confidence: 0.5,
            })
        };
        let (late, early) = (of(0.25), of(-0.25));
        let sets = Sets {
            generated: vec![(2, &late), (0, &early)],
            ..Sets::default()
        };
        let found = metric("av_sync").reduce(&sets).unwrap();
        assert_eq!((found.value, found.samples[1]), (0.25, (0, -0.25)));
    }
}
