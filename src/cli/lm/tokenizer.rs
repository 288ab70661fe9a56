//! `fulgur lm tokenizer`: byte-level pairs learnt from texts, and files of token ids.

use std::fmt;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::text::Documents;
use fulgur_lightnet::lm::tokenizer::{FEWEST, LmTokenizer, MOST};
use fulgur_lightnet::params::file::read_bounded;
use rayon::prelude::*;
use serde::Serialize;

use super::super::answer::{Answer, Report};
use super::super::context::Context;
use super::super::files::check_output;
use super::super::progress::Unit;
use super::{MOST_BYTES, read_text};

/// Train tokenizers, write texts as token ids
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = false,
    after_help = "Example:\n  fulgur lm tokenizer train book.txt --vocab 4096 -o tokenizer.json --tokens book.u16"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    Train(TrainArguments),
    Encode(EncodeArguments),
    Decode(DecodeArguments),
}

/// Learn a byte-level vocabulary (BPE) from texts
///
/// The same texts give the same vocabulary. Token 0 is <|endoftext|>, which stands behind each file in --tokens; behind each
/// document of a file that ends in .jsonl, with lines {"text": "..."}.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm tokenizer train book.txt --vocab 4096 -o tokenizer.json --tokens book.u16"
)]
struct TrainArguments {
    /// Texts, UTF-8, or documents, JSONL
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Most tokens
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab: usize,
    /// The tokenizer to write
    #[arg(short, long, value_name = "FILE", default_value = "tokenizer.json")]
    output: PathBuf,
    /// Also write the texts as token ids of two bytes, for the task lm
    #[arg(long, value_name = "OUT.u16")]
    tokens: Option<PathBuf>,
}

/// Write texts as token ids of two bytes
///
/// Special tokens that a text spells out are letters like others. Where the tokenizer knows <|endoftext|>, it stands behind
/// each file; behind each document of a file that ends in .jsonl, with lines {"text": "..."}.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm tokenizer encode book.txt --tokenizer tokenizer.json --tokens book.u16"
)]
struct EncodeArguments {
    /// Texts, UTF-8, or documents, JSONL; - for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The tokenizer
    #[arg(long, value_name = "FILE", default_value = "tokenizer.json")]
    tokenizer: PathBuf,
    /// The file of token ids to write
    #[arg(long, value_name = "OUT.u16")]
    tokens: PathBuf,
}

/// Print a file of token ids as text
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur lm tokenizer decode book.u16 --tokenizer tokenizer.json")]
struct DecodeArguments {
    /// Token ids of two bytes
    #[arg(value_name = "FILE.u16")]
    file: PathBuf,
    /// The tokenizer
    #[arg(long, value_name = "FILE", default_value = "tokenizer.json")]
    tokenizer: PathBuf,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.action {
        Action::Train(arguments) => train(context, &arguments),
        Action::Encode(arguments) => encode(context, &arguments),
        Action::Decode(arguments) => decode(&arguments),
    }
}

fn train(context: &Context, arguments: &TrainArguments) -> anyhow::Result<Answer> {
    if !(FEWEST..=MOST).contains(&arguments.vocab) {
        bail!("vocab is {}, expected {FEWEST} to {MOST}", arguments.vocab);
    }
    for path in [Some(&arguments.output), arguments.tokens.as_ref()]
        .into_iter()
        .flatten()
    {
        check_output(path)?;
    }
    let texts = read_all(&arguments.files)?;
    if texts.iter().all(String::is_empty) {
        bail!("{}: no text to learn from", arguments.files[0].display());
    }
    let tokenizer = LmTokenizer::train(texts.iter().map(String::as_str), arguments.vocab)?;
    let json = tokenizer.to_json()?;
    let tokenizer = tokenizer.literal();
    // Both files are there, or none.
    let ids = match &arguments.tokens {
        Some(_) => Some(encode_all(context, &tokenizer, &texts)?),
        None => None,
    };
    write_atomic(&arguments.output, |file| file.write_all(json.as_bytes()))
        .with_context(|| format!("{}: cannot write", arguments.output.display()))?;
    if let (Some(path), Some(ids)) = (&arguments.tokens, &ids) {
        write_ids(path, ids)?;
    }
    Answer::new(&Written {
        path: Some(arguments.output.clone()),
        vocabulary: tokenizer.rows(),
        bytes: texts.iter().map(String::len).sum(),
        tokens: ids.map(|ids| ids.len()),
        tokens_path: arguments.tokens.clone(),
    })
}

fn encode(context: &Context, arguments: &EncodeArguments) -> anyhow::Result<Answer> {
    check_output(&arguments.tokens)?;
    let tokenizer = LmTokenizer::read(&arguments.tokenizer)?.literal();
    if tokenizer.rows() > MOST {
        bail!(
            "{}: {} tokens, expected at most {MOST} for ids of two bytes",
            arguments.tokenizer.display(),
            tokenizer.rows()
        );
    }
    let texts = read_all(&arguments.files)?;
    let ids = encode_all(context, &tokenizer, &texts)?;
    write_ids(&arguments.tokens, &ids)?;
    Answer::new(&Written {
        path: None,
        vocabulary: tokenizer.rows(),
        bytes: texts.iter().map(String::len).sum(),
        tokens: Some(ids.len()),
        tokens_path: Some(arguments.tokens.clone()),
    })
}

fn decode(arguments: &DecodeArguments) -> anyhow::Result<Answer> {
    let tokenizer = LmTokenizer::read(&arguments.tokenizer)?;
    let name = arguments.file.display();
    let bytes = read_bounded(&arguments.file, MOST_BYTES)?;
    if bytes.len() % 2 == 1 {
        bail!("{name}: {} bytes, expected two a token", bytes.len());
    }
    let ids: Vec<u32> = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]])))
        .collect();
    let rows = tokenizer.rows();
    if let Some(at) = ids.iter().position(|&id| id as usize >= rows) {
        bail!(
            "{name}: token {at} is {}, expected less than {rows}, those of the tokenizer",
            ids[at]
        );
    }
    Answer::new(&Decoded {
        tokens: ids.len(),
        text: tokenizer.decode(&ids)?,
    })
}

/// The texts of all files, the documents of JSONL one by one.
fn read_all(files: &[PathBuf]) -> anyhow::Result<Vec<String>> {
    let (mut texts, mut bytes) = (Vec::with_capacity(files.len()), 0);
    for path in files {
        let mut add = |text: String| -> anyhow::Result<()> {
            bytes += text.len() as u64;
            if bytes > MOST_BYTES {
                bail!(
                    "{}: more than {MOST_BYTES} bytes in all, expected at most that",
                    path.display()
                );
            }
            texts.push(text);
            Ok(())
        };
        if path.extension().is_some_and(|ending| ending == "jsonl") {
            for text in Documents::open(path)? {
                add(text?)?;
            }
        } else {
            add(read_text(path)?)?;
        }
    }
    Ok(texts)
}

/// Texts whose ids are found before progress is told.
const TOGETHER: usize = 256;

/// The ids of all texts, each with its end.
fn encode_all(context: &Context, tokenizer: &LmTokenizer, texts: &[String]) -> anyhow::Result<Vec<u16>> {
    let mut progress = context.progress("encode", Unit::Items("texts"));
    let (mut all, mut done) = (Vec::new(), 0);
    for some in texts.chunks(TOGETHER) {
        let ids: Vec<Vec<u16>> = some
            .par_iter()
            .map(|text| {
                let ids = tokenizer.encode(text, true)?.into_iter().chain(tokenizer.end());
                ids.map(|id| {
                    u16::try_from(id).with_context(|| format!("token {id}, expected less than {MOST}"))
                })
                .collect::<anyhow::Result<_>>()
            })
            .collect::<anyhow::Result<_>>()?;
        all.extend(ids.into_iter().flatten());
        done += some.len() as u64;
        if texts.len() > 1 {
            progress.set(done, Some(texts.len() as u64));
        }
    }
    Ok(all)
}

fn write_ids(path: &Path, ids: &[u16]) -> anyhow::Result<()> {
    write_atomic(path, |file| {
        let mut out = BufWriter::new(file);
        ids.iter().try_for_each(|id| out.write_all(&id.to_le_bytes()))?;
        out.flush()
    })
    .with_context(|| format!("{}: cannot write", path.display()))
}

#[derive(Serialize)]
struct Written {
    path: Option<PathBuf>,
    vocabulary: usize,
    bytes: usize,
    tokens: Option<usize>,
    tokens_path: Option<PathBuf>,
}

impl Report for Written {}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            writeln!(
                f,
                "{} tokens learnt from {} bytes; written to {}",
                self.vocabulary,
                self.bytes,
                path.display()
            )?;
        }
        if let (Some(tokens), Some(path)) = (self.tokens, &self.tokens_path) {
            writeln!(
                f,
                "{} bytes as {tokens} tokens, {:.2} bytes a token; written to {}",
                self.bytes,
                self.bytes as f64 / tokens.max(1) as f64,
                path.display()
            )?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Decoded {
    tokens: usize,
    text: String,
}

impl Report for Decoded {}

impl fmt::Display for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
