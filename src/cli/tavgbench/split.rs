//! `fulgur tavgbench split`: parts for training, validation and testing.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::bail;
use fulgur_benchmark::captions::csv::CsvWriter;
use fulgur_benchmark::captions::split::{Part, Rule};
use fulgur_benchmark::captions::{Clips, ManifestWriter, Record};
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::files::check_output;
use super::{Read, Reading};

/// Divide clips into train, val and test by a hash of their video's id
///
/// h is the first 8 bytes of SHA-256(video_id), highest byte first; h mod 1000 decides. All clips of one video are in one
/// part, whatever else is in the file. The rule stands in the provenance of every record.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur tavgbench split release_captions.txt -o manifest.jsonl\n  \
                  fulgur tavgbench split manifest.jsonl --csv test.csv --only test --media clips"
)]
pub(super) struct Arguments {
    /// Caption file, or manifest (.jsonl)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Manifest to write
    #[arg(short, long, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    /// Table to write, with the columns path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,audio_path,audio_fps,text
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
    /// Folder of the clips, for the paths of the table
    #[arg(long, value_name = "DIR")]
    media: Option<PathBuf>,
    /// Write the clips of this part alone
    #[arg(long, value_name = "PART", value_parser = ["train", "val", "test"])]
    only: Option<String>,
    /// Videos of 1000 for testing
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1000), default_value_t = Rule::default().test)]
    test: u64,
    /// Videos of 1000 for validation
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1000), default_value_t = Rule::default().val)]
    val: u64,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let rule = Rule {
        test: arguments.test,
        val: arguments.val,
    };
    if rule.test + rule.val > 1000 {
        bail!(
            "--test and --val: found {} and {}, expected at most 1000 together",
            rule.test,
            rule.val
        );
    }
    let mut clips = Clips::open(&arguments.file)?;
    let mut writers = Writers::open(
        arguments.output.as_deref(),
        arguments.csv.as_deref(),
        arguments.media.as_deref().unwrap_or(Path::new("")),
    )?;
    let mut answer = Divided {
        path: arguments.file.clone(),
        output: arguments.output.clone(),
        csv: arguments.csv.clone(),
        train: 0,
        val: 0,
        test: 0,
        written: 0,
        rule: rule.words(),
        read: Read::of(&clips),
    };
    let mut reading = Reading::new(context, "split");
    while let Some(mut record) = clips.next_clip()? {
        let part = rule.apply(&mut record);
        *match part {
            Part::Train => &mut answer.train,
            Part::Val => &mut answer.val,
            Part::Test => &mut answer.test,
        } += 1;
        if arguments.only.as_ref().is_none_or(|only| only == part.name()) {
            answer.written += u64::from(writers.any());
            writers.write(&record)?;
        }
        reading.tell(&clips);
        if context.interrupt.requested() {
            bail!(
                "{}: stopped before its end; nothing was written",
                arguments.file.display()
            );
        }
    }
    drop(reading);
    writers.commit()?;
    answer.read = Read::of(&clips);
    Answer::new(&answer)
}

/// The files that are written.
pub(super) struct Writers {
    manifest: Option<ManifestWriter>,
    table: Option<CsvWriter>,
}

impl Writers {
    /// Begins a manifest and a table of clips in the folder `media`, as far as they have names.
    pub(super) fn open(manifest: Option<&Path>, table: Option<&Path>, media: &Path) -> anyhow::Result<Self> {
        for path in [manifest, table].into_iter().flatten() {
            check_output(path)?;
        }
        Ok(Self {
            manifest: manifest.map(ManifestWriter::create).transpose()?,
            table: table.map(|path| CsvWriter::create(path, media)).transpose()?,
        })
    }

    pub(super) fn any(&self) -> bool {
        self.manifest.is_some() || self.table.is_some()
    }

    pub(super) fn write(&mut self, record: &Record) -> anyhow::Result<()> {
        if let Some(manifest) = &mut self.manifest {
            manifest.write(record)?;
        }
        if let Some(table) = &mut self.table {
            table.write(record)?;
        }
        Ok(())
    }

    pub(super) fn commit(self) -> anyhow::Result<()> {
        if let Some(manifest) = self.manifest {
            manifest.commit()?;
        }
        if let Some(table) = self.table {
            table.commit()?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Divided {
    path: PathBuf,
    output: Option<PathBuf>,
    csv: Option<PathBuf>,
    train: u64,
    val: u64,
    test: u64,
    written: u64,
    rule: String,
    #[serde(flatten)]
    read: Read,
}

impl Report for Divided {
    fn status(&self) -> Status {
        if self.read.counts.records == 0 {
            Status::Partial
        } else {
            Status::Done
        }
    }
}

impl fmt::Display for Divided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.read)?;
        writeln!(f, "train {}, val {}, test {}", self.train, self.val, self.test)?;
        writeln!(f, "{}", self.rule)?;
        for path in [&self.output, &self.csv].into_iter().flatten() {
            writeln!(f, "{}: {} clips", path.display(), self.written)?;
        }
        Ok(())
    }
}
