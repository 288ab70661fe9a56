//! `fulgur classify`: what pictures show.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fulgur_datasets::media::{Picture, read_upright, write_png};
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::files::check_output;
use super::progress::Unit;
use crate::classify::prepare::{self, Fit};
use crate::classify::{Guess, Model, saliency};

/// Endings of the pictures that are looked for in folders.
const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "gif", "bmp"];

/// Say what pictures show
///
/// Pictures are PNG, JPEG, WebP, GIF or BMP files, or folders of them, which are searched by name; what a file is, its content says. A
/// picture is resized until it fills the size that the model was made for, and its middle is looked at; with --native it goes in as
/// large as it is, for the model has no absolute positions. Pictures that cannot be read get a reason instead of guesses, and the
/// exit code is 1, or 2 where none can be read.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur classify shoe.png --model runs/classify/model\n  \
                  fulgur classify shoe.png --model runs/classify/model --saliency why.png\n  \
                  fulgur classify photos --model runs/classify/model --top 1 --json"
)]
pub(super) struct Arguments {
    /// Pictures, or folders of pictures
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Folder of the classifier, as `fulgur train` writes it
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// So many guesses, the likeliest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), default_value_t = 5)]
    top: u16,
    /// Look at whole pictures of any size instead of resizing them
    #[arg(long)]
    native: bool,
    /// Write which pixels of the one picture speak for its likeliest class, in colours over it
    #[arg(long, value_name = "FILE.png")]
    saliency: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let paths = expand(&arguments.images)?;
    if let Some(out) = &arguments.saliency {
        if let [_, _, ..] = paths.as_slice() {
            bail!("--saliency: found {} pictures, expected one", paths.len());
        }
        check_output(out)?;
    }
    let device = context.open_device()?;
    let model = Model::load(&arguments.model, &device)?;
    let how = match arguments.native {
        true => Fit::Native,
        false => Fit::Model,
    };
    let mut progress = context.progress("classify", Unit::Items("pictures"));
    let mut results: Vec<Looked> = Vec::with_capacity(paths.len());
    let mut waiting: Vec<(usize, Picture)> = Vec::new();
    let mut stopped = false;
    for path in &paths {
        if context.interrupt.requested() {
            stopped = true;
            break;
        }
        let read = read_upright(path).and_then(|picture| {
            let seen = prepare::fit(&picture, model.config(), how)?;
            Ok((picture, seen))
        });
        match read {
            Err(error) => results.push(Looked::failed(path, error.to_string())),
            Ok((picture, seen)) => {
                let full = waiting.first().is_some_and(|(_, first)| {
                    let size = (first.height, first.width);
                    size != (seen.height, seen.width) || waiting.len() >= Model::together(size.0, size.1)
                });
                if full {
                    look(&model, &mut waiting, &mut results, usize::from(arguments.top))?;
                }
                waiting.push((results.len(), seen));
                results.push(Looked::of(path, &picture));
            }
        }
        progress.set(results.len() as u64, Some(paths.len() as u64));
    }
    let shown = waiting.last().map(|(at, seen)| (*at, seen.clone()));
    look(&model, &mut waiting, &mut results, usize::from(arguments.top))?;
    drop(progress);
    let mut written = None;
    if let (Some(out), Some((at, seen))) = (&arguments.saliency, shown)
        && let Some(likeliest) = results[at].guesses.first()
    {
        let map = saliency::saliency(&model, &seen, likeliest.class)?;
        write_png(out, &saliency::overlay(&seen, &map)?)?;
        written = Some(out.clone());
    }
    Answer::new(&Seen {
        model: arguments.model.clone(),
        n: results.iter().filter(|result| result.reason.is_none()).count(),
        results,
        saliency: written,
        finished: !stopped,
    })
}

/// Guesses for what waits, written into its results.
fn look(
    model: &Model,
    waiting: &mut Vec<(usize, Picture)>,
    results: &mut [Looked],
    top: usize,
) -> anyhow::Result<()> {
    if waiting.is_empty() {
        return Ok(());
    }
    let (places, pictures): (Vec<usize>, Vec<Picture>) = waiting.drain(..).unzip();
    for (place, shares) in places.into_iter().zip(model.look(&pictures)?) {
        results[place].guesses = model.guesses(&shares, top);
    }
    Ok(())
}

/// Files of the arguments in their order; folders recursively by name.
fn expand(arguments: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut pictures = Vec::new();
    for path in arguments {
        if !path.is_dir() {
            pictures.push(path.clone());
            continue;
        }
        let before = pictures.len();
        walk(path, &mut pictures)?;
        if pictures.len() == before {
            bail!(
                "{}: no pictures found, expected files named .{}",
                path.display(),
                EXTENSIONS.join(", .")
            );
        }
    }
    Ok(pictures)
}

fn walk(dir: &Path, pictures: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let read = || std::fs::read_dir(dir).with_context(|| format!("{}: cannot read", dir.display()));
    let mut entries = read()?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{}: cannot read", dir.display()))?;
    entries.sort();
    for path in entries {
        // Links are not followed into folders, so that a loop of links ends.
        if path.is_dir() && !path.is_symlink() {
            walk(&path, pictures)?;
        } else if (path.extension().and_then(|e| e.to_str()))
            .is_some_and(|e| EXTENSIONS.contains(&e.to_ascii_lowercase().as_str()))
        {
            pictures.push(path);
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct Seen {
    model: PathBuf,
    results: Vec<Looked>,
    /// Pictures with guesses.
    n: usize,
    saliency: Option<PathBuf>,
    finished: bool,
}

/// A picture with its guesses, or a reason why there are none.
#[derive(Serialize)]
struct Looked {
    path: PathBuf,
    width: Option<usize>,
    height: Option<usize>,
    guesses: Vec<Guess>,
    reason: Option<String>,
}

impl Looked {
    fn of(path: &Path, picture: &Picture) -> Self {
        Self {
            path: path.to_owned(),
            width: Some(picture.width),
            height: Some(picture.height),
            guesses: Vec::new(),
            reason: None,
        }
    }

    fn failed(path: &Path, reason: String) -> Self {
        Self {
            path: path.to_owned(),
            width: None,
            height: None,
            guesses: Vec::new(),
            reason: Some(reason),
        }
    }
}

impl Report for Seen {
    fn status(&self) -> Status {
        match self.n {
            0 => Status::Error,
            n if n == self.results.len() && self.finished => Status::Done,
            _ => Status::Partial,
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for result in &self.results {
            match &result.reason {
                Some(reason) => writeln!(f, "{}: not looked at: {reason}", result.path.display())?,
                None => {
                    writeln!(f, "{}", result.path.display())?;
                    for guess in &result.guesses {
                        writeln!(f, "  {:5.1} %  {}", 100.0 * guess.probability, guess.label)?;
                    }
                }
            }
        }
        if let Some(path) = &self.saliency {
            writeln!(f, "saliency in {}", path.display())?;
        }
        match self.finished {
            true => Ok(()),
            false => f.write_str("stopped before the end"),
        }
    }
}
