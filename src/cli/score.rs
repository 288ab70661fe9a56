//! `fulgur score`: AVHScore of clips.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use fulgur_benchmark::avhscore::{self, Encoded, Flag};
use fulgur_benchmark::encoder::cache::{Cache, Entry};
use fulgur_benchmark::encoder::{EncodeError, Encoder};
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::media::{ReadOptions, read_clip};
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::clips;
use super::context::Context;
use super::encoder::{EncoderOptions, Products, open_encoder};
use super::files::check_page;
use super::progress::{Progress, Unit};
use crate::report::clips::{Column, Gallery, Look, Row};

/// Frames from which on a clip tells how far it is.
const LONG: usize = 500;

/// Score how well sound and picture of clips belong together
///
/// AVHScore is the mean cosine between each frame and the whole soundtrack in the space of an encoder (TAVGBench). The
/// builtin encoder is small and knows the things of its training set; its values compare with each other, not with
/// those of another encoder. A folder with ImageBind, or the file imagebind_huge.pth, gives the published score; its vectors are kept in
/// ~/.cache/fulgur/embeddings, so that a clip that was scored before is neither decoded nor encoded again.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur score clip.mp4 other.mp4\n  fulgur score --json --max-frames 16 clips/\n  \
                  fulgur score --encoder imagebind clips/"
)]
pub(super) struct Arguments {
    /// Clips, or folders of clips
    #[arg(required = true, value_name = "CLIP")]
    clips: Vec<PathBuf>,
    /// The encoder: `builtin`, the folder of one, or a checkpoint of ImageBind
    #[arg(long, value_name = "builtin|DIR", default_value = "builtin")]
    encoder: PathBuf,
    /// Use N evenly spaced frames instead of all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_frames: Option<u32>,
    /// Clips that are decoded at the same time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), default_value_t = 2)]
    jobs: u16,
    /// Type of the products of ImageBind
    #[arg(long, value_enum, default_value_t)]
    precision: Products,
    /// Let ImageBind hear the mean of all channels instead of the first one, as published scores do
    #[arg(long)]
    downmix: bool,
    /// Neither use nor keep vectors of earlier runs
    #[arg(long)]
    no_cache: bool,
    /// Write a page with all clips, to be sorted by their scores
    #[arg(long, value_name = "PAGE.html")]
    report: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    if let Some(page) = &arguments.report {
        check_page(page)?;
    }
    let clips = clips::expand(&arguments.clips, &clips::CLIPS)?;
    let options = EncoderOptions {
        products: arguments.precision,
        downmix: arguments.downmix,
    };
    let encoder = open_encoder(&arguments.encoder, options, context)?;
    let cache = match Cache::user_folder() {
        Some(folder) if !arguments.no_cache => Cache::of(&*encoder, &folder)
            .with_context(|| format!("{}: cannot read the weights", arguments.encoder.display()))?,
        _ => None,
    };
    let scorer = Scorer {
        encoder: &*encoder,
        cache,
        max_frames: arguments.max_frames.map(|n| n as usize),
        shown: arguments.report.is_some(),
        context,
        warned: AtomicBool::new(false),
        progress: Mutex::new(context.progress("score", Unit::Items("clips"))),
        done: AtomicUsize::new(0),
        all: clips.len(),
    };
    let total = Some(clips.len() as u64);
    scorer.progress().set(0, total);
    let jobs = rayon::ThreadPoolBuilder::new()
        .num_threads(usize::from(arguments.jobs))
        .build()?;
    let mut results = Vec::with_capacity(clips.len());
    let mut looks = Vec::new();
    for batch in clips.chunks(usize::from(arguments.jobs)) {
        if stopped(context) {
            break;
        }
        let one = |path: &PathBuf| scorer.score(path);
        let scored: Vec<Option<(Scored, Look)>> =
            jobs.install(|| rayon::iter::ParallelIterator::collect(parallel(batch, one)));
        for (scored, look) in scored.into_iter().flatten() {
            results.push(scored);
            looks.push(look);
        }
        let mut progress = scorer.progress();
        progress.relabel("score".to_owned());
        progress.set(results.len() as u64, total);
        scorer.done.store(results.len(), Ordering::Relaxed);
    }
    drop(scorer);
    let values: Vec<f64> = results.iter().filter_map(|r| r.avhscore).collect();
    let n = values.len();
    let mean = (n > 0).then(|| values.iter().sum::<f64>() / n as f64);
    if let Some(path) = &arguments.report {
        let page = gallery(&results, looks, mean, encoder.name()).page();
        write_atomic(path, |file| file.write_all(page.as_bytes()))?;
    }
    Answer::new(&Scores {
        complete: results.len() == clips.len(),
        results,
        mean,
        n,
        encoder: encoder.name().to_owned(),
    })
}

fn parallel<'a, T: Send>(
    batch: &'a [PathBuf],
    one: impl Fn(&'a PathBuf) -> T + Sync + Send + 'a,
) -> impl rayon::iter::IndexedParallelIterator<Item = T> + 'a {
    use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
    batch.par_iter().map(one)
}

/// The page of all clips.
fn gallery(results: &[Scored], looks: Vec<Look>, mean: Option<f64>, encoder: &str) -> Gallery {
    let row = |(scored, look): (&Scored, Look)| {
        let flags = scored.flags.iter().map(|flag| flag.words().to_owned());
        Row {
            name: scored.path.display().to_string(),
            prompt: None,
            look,
            values: vec![scored.avhscore],
            notes: flags.chain(scored.reason.clone()).collect(),
        }
    };
    let n = results.iter().filter(|scored| scored.avhscore.is_some()).count();
    Gallery {
        title: "AVHScore".to_owned(),
        summary: vec![("mean".to_owned(), mean, format!("{n} clips; encoder {encoder}"))],
        columns: vec![Column {
            name: "avhscore".to_owned(),
            lower_is_better: false,
        }],
        rows: results.iter().zip(looks).map(row).collect(),
    }
}

/// What clips are scored with.
struct Scorer<'a> {
    encoder: &'a dyn Encoder,
    cache: Option<Cache>,
    max_frames: Option<usize>,
    /// Whether a page shows how clips look.
    shown: bool,
    context: &'a Context,
    /// Whether the user knows that vectors cannot be kept.
    warned: AtomicBool,
    progress: Mutex<Progress>,
    /// Clips that are done, and all of them.
    done: AtomicUsize,
    all: usize,
}

impl Scorer<'_> {
    /// Score of one clip, and how it looks if that is wanted; `None` when the user stopped it.
    fn score(&self, path: &Path) -> Option<(Scored, Look)> {
        let mut scored = Scored {
            path: path.to_owned(),
            avhscore: None,
            frames: 0,
            flags: Vec::new(),
            reason: None,
        };
        let mut look = Look::default();
        match self.encode(path, &mut look) {
            Ok(encoded) => {
                let score = encoded.score();
                scored.avhscore = score.avhscore;
                scored.frames = score.frames;
                scored.flags = score.flags;
                scored.reason = score.reason;
            }
            Err(_) if stopped(self.context) => return None,
            Err(reason) => scored.reason = Some(reason),
        }
        Some((scored, look))
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far a long clip is; without this an hour would pass in silence.
    fn tell(&self, path: &Path, done: usize, all: usize) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut progress = self.progress();
        progress.relabel(format!("score, {name}: {done}/{all} frames"));
        progress.set(self.done.load(Ordering::Relaxed) as u64, Some(self.all as u64));
    }

    /// The vectors of a clip, from the cache or from its frames, or why there are none.
    fn encode(&self, path: &Path, look: &mut Look) -> Result<Encoded, String> {
        // A clip that cannot be read has the reason of the decoder.
        let entry = self
            .cache
            .as_ref()
            .and_then(|cache| cache.entry(path, self.max_frames).ok());
        let mut kept = entry.as_ref().and_then(Entry::get);
        if !self.shown
            && let Some(encoded) = kept.take()
        {
            return Ok(encoded);
        }
        let flag = self.context.interrupt.flag();
        let options = ReadOptions {
            cancel: Some(flag.clone()),
            ..ReadOptions::default()
        };
        let clip = read_clip(path, &options).map_err(|e| e.to_string())?;
        if self.shown {
            *look = Look::of(clip.video.as_ref(), clip.sound.as_ref());
        }
        if let Some(encoded) = kept {
            return Ok(encoded);
        }
        let video = clip.video.ok_or("no video stream")?;
        let tell = |done: usize, all: usize| {
            if all >= LONG {
                self.tell(path, done, all);
            }
        };
        let sound = clip.sound.as_ref();
        let encoded = avhscore::encode_told(self.encoder, &video, sound, self.max_frames, flag, &tell);
        let mut encoded = encoded.map_err(|e: EncodeError| e.to_string())?;
        if clip.truncated {
            encoded.flags.push(Flag::Truncated);
        }
        if let Some(Err(reason)) = entry.map(|entry| entry.put(&encoded))
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            self.context.note(&format!("vectors are not kept: {reason}"));
        }
        Ok(encoded)
    }
}

fn stopped(context: &Context) -> bool {
    context.interrupt.flag().load(Ordering::Relaxed)
}

#[derive(Serialize)]
struct Scores {
    results: Vec<Scored>,
    mean: Option<f64>,
    n: usize,
    encoder: String,
    #[serde(skip)]
    complete: bool,
}

#[derive(Serialize)]
struct Scored {
    path: PathBuf,
    avhscore: Option<f64>,
    frames: usize,
    flags: Vec<Flag>,
    reason: Option<String>,
}

impl Report for Scores {
    fn status(&self) -> Status {
        // No audio is an answer about a readable clip; frames tell that it was read.
        if self.results.iter().all(|r| r.frames == 0) {
            Status::Error
        } else if self.complete && self.n == self.results.len() {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Scored {
            path,
            avhscore,
            frames,
            flags,
            reason,
        } in &self.results
        {
            match avhscore {
                Some(score) => write!(f, "{score:.4}  {}  {frames} frames", path.display())?,
                None => write!(f, "none    {}", path.display())?,
            }
            for flag in flags {
                write!(f, ", {}", flag.words())?;
            }
            match reason {
                Some(reason) => writeln!(f, "  ({reason})")?,
                None => writeln!(f)?,
            }
        }
        match self.mean {
            Some(mean) => write!(
                f,
                "mean {mean:.4} over {} clips, encoder {}",
                self.n, self.encoder
            ),
            None => write!(f, "nothing scored, encoder {}", self.encoder),
        }
    }
}
