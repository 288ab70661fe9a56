//! One pass over documents that keeps those worth training on.
//!
//! In order: rules, exact duplicates, near duplicates; then, where there is a scorer, the share of documents that it finds
//! hardest. That last step is one round of the self-cleaning of TransNormerLLM (arXiv 2307.14995): a model of the first pass
//! scores every document, and the tail is dropped.

use std::collections::BTreeMap;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use thiserror::Error;

use super::documents::{Documents, TextError, line_of};
use super::duplicates::{Seen, exact_hash, minima};
use super::rules::{LEAST_WORDS, broken};
use crate::atomic::AtomicFile;

/// Bytes of documents that are looked at side by side.
const TOGETHER: usize = 4 << 20;

/// Why a document is dropped.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Characters that no text has.
    Garbled,
    /// Few words.
    TooShort,
    /// Words too short or too long.
    WordLength,
    /// Hashes and ellipses.
    Symbols,
    /// Words without letters.
    FewLetters,
    /// Lists alone.
    Bullets,
    /// Lines again and again.
    RepeatedLines,
    /// A phrase again and again.
    RepeatedPhrase,
    /// None of the words that English sentences have.
    NoStopWords,
    /// Was there before, but for white space.
    Duplicate,
    /// Was there before, nearly.
    NearDuplicate,
    /// Of the tail of the scores.
    HardToPredict,
}

/// How to clean.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Fewest words of a document.
    pub least_words: usize,
    /// Whether near duplicates are dropped.
    pub near: bool,
    /// Share of documents that is dropped for its scores.
    pub drop: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            least_words: LEAST_WORDS,
            near: true,
            drop: 0.1,
        }
    }
}

/// Scores documents; higher is worse.
pub trait Scorer {
    /// Bits a byte of a document.
    ///
    /// # Errors
    /// Whatever keeps it from scoring, as one line.
    fn bits_per_byte(&mut self, text: &str) -> Result<f64, String>;
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cleaned {
    /// Documents read.
    pub documents: usize,
    /// Documents kept.
    pub kept: usize,
    /// Bytes of the documents read.
    pub bytes: u64,
    /// Bytes of the documents kept.
    pub kept_bytes: u64,
    /// Documents dropped, by reason.
    pub dropped: BTreeMap<Reason, usize>,
    /// Of the scores, where there are any.
    pub scores: Option<Scores>,
}

/// What the scorer found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Mean bits a byte of all documents that came so far.
    pub bits_per_byte: f64,
    /// The same of those kept.
    pub kept_bits_per_byte: f64,
    /// The highest score that was kept.
    pub highest_kept: f64,
}

/// What stopped it; the output is as it was before.
#[derive(Debug, Error)]
pub enum CleanError {
    /// Input that is none.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The output cannot be written.
    #[error("{path}: cannot write: {source}")]
    Write {
        /// The output.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The scorer failed.
    #[error("document {document}: {message}")]
    Score {
        /// Number of the document among those scored, from 0.
        document: usize,
        /// What it says.
        message: String,
    },
    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
}

/// Reads `inputs` in order and writes the documents that stay to `output`, as JSONL, whole or not at all. `advance` hears how many
/// documents were read or scored, and stops the work by answering false.
///
/// At most 4 MB of documents (or one) are in memory at a time, and about 1 kB for each document kept.
///
/// # Errors
/// A file is no documents, the disk refuses, or the scorer does.
pub fn clean(
    inputs: &[PathBuf],
    output: &Path,
    options: &Options,
    scorer: Option<&mut dyn Scorer>,
    advance: &mut dyn FnMut(usize) -> bool,
) -> Result<Cleaned, CleanError> {
    let write = |source| CleanError::Write {
        path: output.to_owned(),
        source,
    };
    let mut file = AtomicFile::create(output).map_err(write)?;
    let mut cleaned = Cleaned::default();
    let Some(scorer) = scorer else {
        let mut out = BufWriter::new(file.file());
        first_pass(inputs, options, &mut cleaned, advance, &mut |text| {
            out.write_all(line_of(text).as_bytes()).map_err(write)
        })?;
        out.flush().map_err(write)?;
        drop(out);
        file.commit().map_err(write)?;
        return Ok(cleaned);
    };
    // What the tail is only shows at the end, so the survivors wait in a file without a name.
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut waiting = tempfile::tempfile_in(folder.unwrap_or(Path::new("."))).map_err(write)?;
    let mut scored: Vec<(f64, usize)> = Vec::new();
    let mut out = BufWriter::new(&mut waiting);
    first_pass(inputs, options, &mut cleaned, advance, &mut |text| {
        let score = scorer.bits_per_byte(text).map_err(|message| CleanError::Score {
            document: scored.len(),
            message,
        })?;
        scored.push((score, text.len()));
        out.write_all(text.as_bytes()).map_err(write)
    })?;
    out.flush().map_err(write)?;
    drop(out);
    waiting.rewind().map_err(write)?;
    let stays = without_tail(&scored, options.drop);
    let mut waiting = std::io::BufReader::new(waiting);
    let mut out = BufWriter::new(file.file());
    let (mut sums, mut highest) = ([0.0; 2], f64::NEG_INFINITY);
    for (&(score, length), &stays) in scored.iter().zip(&stays) {
        let mut text = vec![0; length];
        waiting.read_exact(&mut text).map_err(write)?;
        sums[0] += score;
        if stays {
            sums[1] += score;
            highest = highest.max(score);
            out.write_all(line_of(&String::from_utf8_lossy(&text)).as_bytes())
                .map_err(write)?;
        } else {
            cleaned.kept -= 1;
            cleaned.kept_bytes -= length as u64;
            *cleaned.dropped.entry(Reason::HardToPredict).or_default() += 1;
        }
    }
    out.flush().map_err(write)?;
    drop(out);
    if cleaned.kept > 0 {
        cleaned.scores = Some(Scores {
            bits_per_byte: sums[0] / scored.len() as f64,
            kept_bits_per_byte: sums[1] / cleaned.kept as f64,
            highest_kept: highest,
        });
    }
    file.commit().map_err(write)?;
    Ok(cleaned)
}

/// Which documents stay when the `share` of them with the highest scores goes; of equal scores the later ones go first.
fn without_tail(scored: &[(f64, usize)], share: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scored.len()).collect();
    order.sort_by(|&a, &b| scored[a].0.total_cmp(&scored[b].0).then(a.cmp(&b)));
    let goes = (scored.len() as f64 * share) as usize;
    let mut stays = vec![true; scored.len()];
    for &index in &order[scored.len() - goes.min(scored.len())..] {
        stays[index] = false;
    }
    stays
}

/// Rules and duplicates; `keep` is given what stays, in order.
fn first_pass(
    inputs: &[PathBuf],
    options: &Options,
    cleaned: &mut Cleaned,
    advance: &mut dyn FnMut(usize) -> bool,
    keep: &mut dyn FnMut(&str) -> Result<(), CleanError>,
) -> Result<(), CleanError> {
    let mut seen = Seen::default();
    for path in inputs {
        let mut documents = Documents::open(path)?;
        loop {
            let (mut texts, mut bytes) = (Vec::new(), 0);
            while bytes < TOGETHER {
                let Some(text) = documents.next().transpose()? else {
                    break;
                };
                bytes += text.len();
                texts.push(text);
            }
            if texts.is_empty() {
                break;
            }
            // Each document for itself; only what was seen goes by their order.
            let looked: Vec<_> = texts
                .par_iter()
                .map(|text| match broken(text, options.least_words) {
                    Some(reason) => Err(reason),
                    None => Ok((exact_hash(text), options.near.then(|| minima(text)).flatten())),
                })
                .collect();
            for (text, looked) in texts.iter().zip(looked) {
                cleaned.documents += 1;
                cleaned.bytes += text.len() as u64;
                let reason = match looked {
                    Err(reason) => Some(reason),
                    Ok((exact, _)) if !seen.insert_exact(exact) => Some(Reason::Duplicate),
                    Ok((_, Some(minima))) if !seen.insert_near(&minima) => Some(Reason::NearDuplicate),
                    Ok(_) => None,
                };
                if let Some(reason) = reason {
                    *cleaned.dropped.entry(reason).or_default() += 1;
                } else {
                    keep(text)?;
                    cleaned.kept += 1;
                    cleaned.kept_bytes += text.len() as u64;
                }
                if !advance(cleaned.documents) {
                    return Err(CleanError::Interrupted);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Digits;

    impl Scorer for Digits {
        fn bits_per_byte(&mut self, text: &str) -> Result<f64, String> {
            let found = text
                .split_whitespace()
                .next()
                .and_then(|word| word.strip_prefix("score"));
            found
                .and_then(|score| score.parse().ok())
                .ok_or_else(|| "no score".to_owned())
        }
    }

    fn document(seed: usize) -> String {
        (0..60).fold(format!("score{seed} "), |text, i| {
            text + &format!("the w{} of ", seed * 100 + i)
        })
    }

    fn cleaned(texts: &[String], scorer: Option<&mut dyn Scorer>, threads: usize) -> (Cleaned, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
        std::fs::write(&input, texts.iter().map(|text| line_of(text)).collect::<String>()).unwrap();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let options = Options {
            drop: 0.25,
            ..Options::default()
        };
        let report = if let Some(scorer) = scorer {
            clean(&[input], &output, &options, Some(scorer), &mut |_| true)
        } else {
            pool.install(|| clean(&[input], &output, &options, None, &mut |_| true))
        };
        let kept = Documents::open(&output).unwrap().map(Result::unwrap).collect();
        (report.unwrap(), kept)
    }

    #[test]
    fn reasons_are_counted_and_the_rest_is_kept_in_order() {
        let near = document(2).replacen("w210", "other", 1);
        let texts = [
            document(1),
            "short".into(),
            document(2),
            format!(" {}", document(1)),
            near,
            document(3),
        ];
        let (report, kept) = cleaned(&texts, None, 1);
        assert_eq!(kept, [document(1), document(2), document(3)]);
        assert_eq!(report.dropped[&Reason::TooShort], 1);
        assert_eq!(report.dropped[&Reason::Duplicate], 1);
        assert_eq!(report.dropped[&Reason::NearDuplicate], 1);
        assert_eq!((report.documents, report.kept), (6, 3));
        assert_eq!(
            report.kept + report.dropped.values().sum::<usize>(),
            report.documents
        );
        assert_eq!(
            report.kept_bytes,
            kept.iter().map(|text| text.len() as u64).sum::<u64>()
        );
        assert_eq!(cleaned(&texts, None, 4), (report, kept));
    }

    #[test]
    fn the_tail_of_the_scores_goes() {
        let texts: Vec<String> = [5, 1, 9, 3, 8, 2, 4, 7].map(document).into();
        let (report, kept) = cleaned(&texts, Some(&mut Digits), 1);
        assert_eq!(kept, [5, 1, 3, 2, 4, 7].map(document));
        assert_eq!(report.dropped[&Reason::HardToPredict], 2);
        let scores = report.scores.unwrap();
        assert_eq!((scores.bits_per_byte, scores.highest_kept), (39.0 / 8.0, 7.0));
        assert_eq!(scores.kept_bits_per_byte, 22.0 / 6.0);
        assert_eq!(without_tail(&[(1.0, 0), (1.0, 0)], 0.5), [true, false]);
    }

    #[test]
    fn a_failure_leaves_no_output() {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
        std::fs::write(&input, line_of(&document(1)) + "{\"url\": 1}\n").unwrap();
        let inputs = [input];
        let run = |advance: &mut dyn FnMut(usize) -> bool| {
            clean(&inputs, &output, &Options::default(), None, advance)
                .unwrap_err()
                .to_string()
        };
        assert!(run(&mut |_| true).contains("in.jsonl: line 2: found unknown field `url`"));
        std::fs::write(&inputs[0], line_of(&document(1))).unwrap();
        assert_eq!(run(&mut |_| false), "interrupted");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
