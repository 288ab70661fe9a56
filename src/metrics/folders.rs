//! Metrics of the clips of two folders: every clip is decoded once, and read by all that the wanted metrics need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fulgur_benchmark::metrics::readers::{Reader, Refusal, Sample};
use fulgur_benchmark::metrics::suite::{Beside, Metric, Reading, Reads, Sets};
use fulgur_datasets::media::{Clip, ReadOptions, read_clip};
use rayon::prelude::*;
use serde::Serialize;

/// One clip that is to be read.
#[derive(Clone, Debug)]
pub struct Item {
    /// The file.
    pub path: PathBuf,
    /// Its name within its folder, without extension: by it real and generated clips are paired.
    pub name: String,
    /// What it was made from.
    pub prompt: Option<String>,
}

/// What is measured, and how.
pub struct Plan<'a> {
    /// The metrics.
    pub metrics: Vec<&'static Metric>,
    /// What they read with.
    pub readers: BTreeMap<Reads, Box<dyn Reader>>,
    /// Generated clips.
    pub generated: Vec<Item>,
    /// Real clips; none where no metric needs them.
    pub reference: Vec<Item>,
    /// Seconds from the start of each clip that count.
    pub seconds: Option<f64>,
    /// Clips at a time.
    pub jobs: usize,
    /// Of what is shuffled.
    pub seed: u64,
    /// Raised to stop.
    pub cancel: &'a Arc<AtomicBool>,
}

/// A clip that a metric leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// A clip's own figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Own {
    /// The file.
    pub path: PathBuf,
    /// The figure.
    pub value: f64,
    /// How sure it is, from 0 to 1, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f64>,
}

/// A metric's figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The figure; none where there is not enough to compute it of.
    pub value: Option<f64>,
    /// Generated clips that it is of.
    pub n: usize,
    /// What was read, with checkpoint and preprocessing.
    pub feature: String,
    /// Clips that were left out.
    pub skipped: Vec<Skipped>,
    /// Real clips that it is of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_reference: Option<usize>,
    /// Standard deviation over parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deviation: Option<f64>,
    /// Figures of single clips.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Own>,
    /// What a reader of the figure should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Why there is no figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What all metrics say.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Figures by name, in the order that was asked for.
    pub figures: Vec<(&'static str, Figure)>,
    /// Whether every clip was seen.
    pub complete: bool,
}

/// Readings of one clip; an error is why there is none.
type Readings = BTreeMap<Reads, Result<Reading, String>>;

/// Measures; `see` gets every generated clip when it is decoded, `progress` the number of clips that are done.
pub fn measure(
    plan: &Plan<'_>,
    see: &(dyn Fn(usize, &Clip) + Sync),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Measured, rayon::ThreadPoolBuildError> {
    let jobs = rayon::ThreadPoolBuilder::new()
        .num_threads(plan.jobs.max(1))
        .build()?;
    let total = (plan.generated.len() + plan.reference.len()) as u64;
    progress(0, total);
    let mut done = 0;
    let mut complete = true;
    let mut sides: [Vec<Readings>; 2] = [Vec::new(), Vec::new()];
    for (side, items) in [&plan.generated, &plan.reference].into_iter().enumerate() {
        let needed = plan.needed(side);
        for (chunk, batch) in items.chunks(plan.jobs.max(1)).enumerate() {
            if plan.cancel.load(Ordering::Relaxed) {
                complete = false;
                break;
            }
            let first = chunk * plan.jobs.max(1);
            let stopped = Mutex::new(false);
            let read: Vec<Readings> = jobs.install(|| {
                batch
                    .par_iter()
                    .enumerate()
                    .map(|(i, item)| {
                        let seen = |clip: &Clip| {
                            if side == 0 {
                                see(first + i, clip);
                            }
                        };
                        plan.read(item, &needed, &seen).unwrap_or_else(|| {
                            *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
                            Readings::new()
                        })
                    })
                    .collect()
            });
            if stopped.into_inner().unwrap_or_else(PoisonError::into_inner) {
                complete = false;
                break;
            }
            sides[side].extend(read);
            done += batch.len() as u64;
            progress(done, total);
        }
    }
    let figures = plan
        .metrics
        .iter()
        .map(|metric| (metric.name, plan.figure(metric, &sides)));
    Ok(Measured {
        figures: figures.collect(),
        complete,
    })
}

impl Plan<'_> {
    /// What clips of a side (0 generated, 1 real) are read with.
    fn needed(&self, side: usize) -> Vec<Reads> {
        let wanted =
            |metric: &&&'static Metric| side == 0 || matches!(metric.beside, Beside::Set | Beside::Pair);
        let mut reads: Vec<Reads> = self
            .metrics
            .iter()
            .filter(wanted)
            .map(|metric| metric.reads)
            .collect();
        reads.sort_unstable();
        reads.dedup();
        reads
    }

    /// Reads one clip; `None` when the user stopped it.
    fn read(&self, item: &Item, needed: &[Reads], see: &dyn Fn(&Clip)) -> Option<Readings> {
        let all = |reason: String| needed.iter().map(|&reads| (reads, Err(reason.clone()))).collect();
        let options = ReadOptions {
            duration_s: self.seconds,
            cancel: Some(Arc::clone(self.cancel)),
            ..ReadOptions::default()
        };
        let clip = match read_clip(&item.path, &options) {
            Ok(clip) => clip,
            Err(_) if self.cancel.load(Ordering::Relaxed) => return None,
            // The path stands beside the reason.
            Err(error) => return Some(all(without(&item.path, &error.to_string()))),
        };
        see(&clip);
        let sample = Sample {
            prompt: item.prompt.as_deref(),
            video: clip.video.as_ref(),
            sound: clip.sound.as_ref(),
            cancel: self.cancel,
        };
        let mut readings = Readings::new();
        for &reads in needed {
            let Some(reader) = self.readers.get(&reads) else {
                continue;
            };
            let reading = match reader.read(&sample) {
                Ok(reading) if reading.is_finite() => Ok(reading),
                Ok(_) => Err("what was read is not finite".to_owned()),
                Err(Refusal::Cancelled) => return None,
                Err(Refusal::Skip(reason)) => Err(reason),
            };
            readings.insert(reads, reading);
        }
        Some(readings)
    }

    fn figure(&self, metric: &'static Metric, [generated, reference]: &[Vec<Readings>; 2]) -> Figure {
        let mut skipped = Vec::new();
        let mut side = |items: &[Item], readings: &'_ [Readings]| -> Vec<(usize, Reading)> {
            let mut kept = Vec::new();
            for (number, (item, readings)) in items.iter().zip(readings).enumerate() {
                let Some(reading) = readings.get(&metric.reads) else {
                    continue;
                };
                match reading.clone().and_then(|reading| metric.take(&reading)) {
                    Ok(taken) => kept.push((number, taken)),
                    Err(reason) => skipped.push(Skipped {
                        path: item.path.clone(),
                        reason,
                    }),
                }
            }
            kept
        };
        let kept = side(&self.generated, generated);
        let real = match metric.beside {
            Beside::Set | Beside::Pair => side(&self.reference, reference),
            Beside::Nothing | Beside::Prompt => Vec::new(),
        };
        let mut pairs = Vec::new();
        if metric.beside == Beside::Pair {
            let names: BTreeMap<&str, usize> = real
                .iter()
                .map(|&(number, _)| (self.reference[number].name.as_str(), number))
                .collect();
            for &(number, _) in &kept {
                match names.get(self.generated[number].name.as_str()) {
                    Some(&other) => pairs.push((number, other)),
                    None => skipped.push(Skipped {
                        path: self.generated[number].path.clone(),
                        reason: "no real clip of this name that can be read".to_owned(),
                    }),
                }
            }
        }
        let sets = Sets {
            generated: kept.iter().map(|(number, reading)| (*number, reading)).collect(),
            reference: real.iter().map(|(number, reading)| (*number, reading)).collect(),
            pairs,
            seed: self.seed,
        };
        let feature = self
            .readers
            .get(&metric.reads)
            .map(|reader| reader.feature())
            .unwrap_or_default();
        let empty = Figure {
            value: None,
            n: 0,
            feature,
            skipped,
            n_reference: None,
            deviation: None,
            samples: Vec::new(),
            warnings: Vec::new(),
            reason: None,
        };
        match metric.reduce(&sets) {
            Ok(reduced) if reduced.value.is_finite() => Figure {
                value: Some(reduced.value),
                n: reduced.n,
                n_reference: reduced.n_reference,
                deviation: reduced.deviation,
                samples: reduced
                    .samples
                    .into_iter()
                    .map(|(number, value)| Own {
                        path: self.generated[number].path.clone(),
                        value,
                        confidence: confidence(&generated[number], metric.reads),
                    })
                    .collect(),
                warnings: reduced.warnings,
                ..empty
            },
            Ok(_) => Figure {
                reason: Some("the figure is not finite".to_owned()),
                ..empty
            },
            Err(reason) => Figure {
                reason: Some(reason),
                ..empty
            },
        }
    }
}

/// How sure a clip's own figure is.
fn confidence(readings: &Readings, reads: Reads) -> Option<f64> {
    match readings.get(&reads)?.as_ref().ok()? {
        Reading::Offset(offset) => Some(offset.confidence),
        Reading::Rows(_) | Reading::Classes { .. } | Reading::Value(_) | Reading::Joint(_) => None,
    }
}

/// An error without the path that it begins with.
fn without(path: &Path, words: &str) -> String {
    let start = format!("{}: ", path.display());
    words.strip_prefix(&start).unwrap_or(words).to_owned()
}
