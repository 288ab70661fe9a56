//! Perplexity: how likely a model finds texts, each token counted once.
//!
//! ```text
//! nats a token = sum of -log p(token | all tokens before it in its document) / tokens
//! perplexity   = exp(nats a token)
//! bits a byte  = sum / (bytes log 2)       does not depend on the tokenizer
//! ```
//!
//! A document is read in chunks that go on from a state of constant size, however long it is; or, as in training, in windows that
//! each begin with nothing. The first token of a document has nothing before it: where the tokenizer has a token that begins or
//! ends texts, that stands in front; else the first token is given and counts in nothing.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use candle_core::{DType, Device, Tensor};
use fulgur_datasets::text::Documents;
use fulgur_kernels::cross_entropy;
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::LanguageModel;
use fulgur_lightnet::lm::likelihood::Reading;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;
use serde::Serialize;

use super::Subject;
use super::figures::{Estimate, Ratio};

/// With so many documents the standard error is by documents, else by blocks of tokens.
const DOCUMENTS: usize = 30;
/// Tokens of a block.
const BLOCK: usize = 512;
/// Tokens of a file of ids that are read at a time.
const PIECE: usize = 1 << 16;

/// How texts are read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Tokens of a window; without it, documents are read whole.
    pub context: Option<usize>,
    /// The token in front of each document, instead of the tokenizer's.
    pub before: Option<u32>,
}

/// What the standard error is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Documents as independent observations.
    Documents,
    /// Blocks of 512 tokens of a document.
    Blocks,
}

/// How likely the texts are.
#[derive(Clone, Debug, Serialize)]
pub struct Perplexity {
    /// Documents with tokens that count.
    pub documents: usize,
    /// Tokens that count.
    pub tokens: u64,
    /// Their bytes of text, where that is known.
    pub bytes: Option<u64>,
    /// Nats a token.
    pub nats_per_token: f64,
    /// Its standard error.
    pub nats_per_token_stderr: Option<f64>,
    /// `exp` of that.
    pub perplexity: f64,
    /// Its standard error, to the first order.
    pub perplexity_stderr: Option<f64>,
    /// Bits a byte.
    pub bits_per_byte: Option<f64>,
    /// Its standard error, for the bytes that a token has here.
    pub bits_per_byte_stderr: Option<f64>,
    /// What the errors are of.
    pub stderr_by: By,
    /// Whether everything was read.
    pub finished: bool,
}

/// Reads `files`: text, documents `{"text": ..}` in `.jsonl`, or token ids of two bytes in `.u16`, which are one document. `go_on`
/// is told how many bytes have been read, and ends it by `false`.
///
/// # Errors
/// A file that cannot be read or is none of these, ids beyond the vocabulary, text for a model without a tokenizer, no token that
/// counts, or losses that are no numbers.
pub fn perplexity(
    subject: &Subject,
    files: &[PathBuf],
    options: &Options,
    mut go_on: impl FnMut(u64) -> bool,
) -> anyhow::Result<Perplexity> {
    let vocabulary = subject.vocabulary();
    if let Some(before) = options.before
        && before as usize >= vocabulary
    {
        bail!("--before is {before}, expected less than {vocabulary}, the vocabulary");
    }
    let mut sums = Sums::default();
    let (mut read, mut finished) = (0, true);
    for path in files {
        let before = sums.tokens;
        let mut told = |bytes: usize| {
            read += bytes as u64;
            go_on(read)
        };
        let name = || path.display().to_string();
        finished = match is_ids(path) {
            true => read_ids(subject, path, options, &mut sums, &mut told).with_context(name)?,
            false => read_documents(subject, path, options, &mut sums, &mut told)?,
        };
        if !finished {
            break;
        }
        if sums.tokens == before {
            bail!("{}: found no token to foretell, expected text", path.display());
        }
    }
    sums.finish(finished)
}

/// Whether a file holds token ids, by its name.
fn is_ids(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "u16")
}

/// Reads documents of text; whether to the end.
fn read_documents(
    subject: &Subject,
    path: &Path,
    options: &Options,
    sums: &mut Sums,
    told: &mut impl FnMut(usize) -> bool,
) -> anyhow::Result<bool> {
    let tokenizer = subject.tokenizer()?;
    let front = front(tokenizer, options)?;
    let counts = tokenizer.byte_counts();
    for text in Documents::open(path)? {
        let text = text?;
        let ids = tokenizer.encode(&text, false)?;
        let mut bytes = text.len();
        if front.is_empty()
            && let Some(&first) = ids.first()
        {
            bytes -= match &counts {
                Some(counts) => counts[first as usize] as usize,
                None => tokenizer.decode(&[first])?.len(),
            }
            .min(bytes);
        }
        let mut document = Document::new(subject, options, ids.len())?;
        // What stands in front is given; it begins with the first token of all, which has no loss.
        document
            .push(&front, front.len().saturating_sub(1))
            .and_then(|()| document.push(&ids, 0))
            .and_then(|()| document.end(Some(bytes as u64), sums))
            .with_context(|| path.display().to_string())?;
        if !told(text.len()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The tokens in front of each document.
fn front(tokenizer: &LmTokenizer, options: &Options) -> anyhow::Result<Vec<u32>> {
    if let Some(before) = options.before {
        return Ok(vec![before]);
    }
    let start = tokenizer.encode("", true)?;
    Ok(match start.is_empty() {
        true => tokenizer.end().into_iter().collect(),
        false => start,
    })
}

/// Reads token ids as one document; whether to the end.
fn read_ids(
    subject: &Subject,
    path: &Path,
    options: &Options,
    sums: &mut Sums,
    told: &mut impl FnMut(usize) -> bool,
) -> anyhow::Result<bool> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    if length % 2 == 1 {
        bail!("{length} bytes, expected two a token");
    }
    let mut file = BufReader::new(file);
    let vocabulary = subject.vocabulary();
    let counts = subject.tokenizer.as_ref().and_then(LmTokenizer::byte_counts);
    let mut text_bytes = counts.as_ref().map(|_| 0u64);
    let tokens = usize::try_from(length / 2).context("more tokens than can be counted")?;
    let mut document = Document::new(subject, options, tokens)?;
    let front: Vec<u32> = options.before.into_iter().collect();
    document.push(&front, 0)?;
    let mut given = front.is_empty();
    let (mut read, mut whole) = (0, true);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        file.by_ref().take(2 * PIECE as u64).read_to_end(&mut bytes)?;
        let (pairs, _) = bytes.as_chunks::<2>();
        let ids: Vec<u32> = pairs
            .iter()
            .map(|&pair| u16::from_le_bytes(pair).into())
            .collect();
        if ids.is_empty() {
            break;
        }
        if let Some(at) = ids.iter().position(|&id| id as usize >= vocabulary) {
            let (place, id) = (read + at, ids[at]);
            bail!("token {place} is {id}, expected less than {vocabulary}, the vocabulary");
        }
        if let (Some(sum), Some(counts)) = (&mut text_bytes, &counts) {
            let counted = &ids[usize::from(std::mem::take(&mut given))..];
            let of = |&id: &u32| counts.get(id as usize).copied().unwrap_or(0);
            *sum += counted.iter().map(|id| u64::from(of(id))).sum::<u64>();
        }
        document.push(&ids, 0)?;
        read += ids.len();
        if !told(bytes.len()) {
            whole = false;
            break;
        }
    }
    document.end(text_bytes.filter(|&bytes| bytes > 0), sums)?;
    Ok(whole)
}

/// Sums over all documents.
#[derive(Debug, Default)]
struct Sums {
    documents: Ratio,
    blocks: Ratio,
    tokens: u64,
    /// None once there are tokens whose text is not known.
    bytes: Unknown,
}

/// A count that may be lost.
#[derive(Debug, Default)]
struct Unknown {
    sum: u64,
    lost: bool,
}

impl Sums {
    fn finish(&self, finished: bool) -> anyhow::Result<Perplexity> {
        let by = match self.documents.count() {
            DOCUMENTS.. => By::Documents,
            _ => By::Blocks,
        };
        let nats = match by {
            By::Documents => self.documents.estimate(),
            By::Blocks => self.blocks.estimate(),
        };
        let Some(nats) = nats else {
            bail!("found no token to foretell, expected text");
        };
        if !nats.mean.is_finite() {
            bail!("a loss of {} nats a token, expected a finite number", nats.mean);
        }
        let perplexity = nats.mean.exp();
        let bytes = (!self.bytes.lost && self.bytes.sum > 0).then_some(self.bytes.sum);
        let bits: Option<Estimate> =
            bytes.map(|bytes| nats.times(self.tokens as f64 / bytes as f64 / std::f64::consts::LN_2));
        Ok(Perplexity {
            documents: self.documents.count(),
            tokens: self.tokens,
            bytes,
            nats_per_token: nats.mean,
            nats_per_token_stderr: nats.stderr,
            perplexity,
            perplexity_stderr: nats.stderr.map(|stderr| stderr * perplexity),
            bits_per_byte: bits.map(|bits| bits.mean),
            bits_per_byte_stderr: bits.and_then(|bits| bits.stderr),
            stderr_by: by,
            finished,
        })
    }
}

/// A document that is being read.
struct Document<'a> {
    pass: Pass<'a>,
    chunk: usize,
    /// Losses that come first and do not count.
    given: usize,
    /// Of all tokens so far that count.
    nats: f64,
    tokens: u64,
    /// Of the block so far.
    block: (f64, usize),
    blocks: Ratio,
}

/// How a document is read.
enum Pass<'a> {
    /// All before a token is seen.
    Whole(Reading<'a>),
    /// What is before it in its window.
    Windows(Windows<'a>),
}

impl<'a> Document<'a> {
    /// Before the first of about so many tokens.
    fn new(subject: &'a Subject, options: &Options, tokens: usize) -> anyhow::Result<Self> {
        let pass = match options.context {
            Some(context) => Pass::Windows(Windows {
                model: &subject.model,
                pending: Vec::new(),
                context,
                together: (subject.chunk / context).max(1),
            }),
            None => {
                subject.check_memory(tokens)?;
                Pass::Whole(Reading::new(&subject.model))
            }
        };
        Ok(Self {
            pass,
            chunk: subject.chunk,
            given: 0,
            nats: 0.0,
            tokens: 0,
            block: (0.0, 0),
            blocks: Ratio::default(),
        })
    }

    /// Reads tokens, of which the losses of the next `given` do not count.
    fn push(&mut self, ids: &[u32], given: usize) -> anyhow::Result<()> {
        self.given += given;
        let losses = match &mut self.pass {
            Pass::Whole(reading) => reading.push(ids, self.chunk)?,
            Pass::Windows(windows) => windows.push(ids)?,
        };
        self.count(&losses)
    }

    fn count(&mut self, losses: &[f32]) -> anyhow::Result<()> {
        let given = self.given.min(losses.len());
        self.given -= given;
        for &loss in &losses[given..] {
            if !loss.is_finite() {
                let at = self.tokens;
                bail!("the loss of token {at} is {loss}, expected a finite number");
            }
            let loss = f64::from(loss);
            self.nats += loss;
            self.tokens += 1;
            self.block.0 += loss;
            self.block.1 += 1;
            if self.block.1 == BLOCK {
                self.end_block();
            }
        }
        Ok(())
    }

    fn end_block(&mut self) {
        let (nats, tokens) = std::mem::take(&mut self.block);
        if tokens > 0 {
            self.blocks.add(nats, tokens as f64);
        }
    }

    /// Adds the document, with its bytes of text, to `sums`.
    fn end(mut self, bytes: Option<u64>, sums: &mut Sums) -> anyhow::Result<()> {
        if let Pass::Windows(windows) = &mut self.pass {
            let losses = windows.end()?;
            self.count(&losses)?;
        }
        self.end_block();
        if self.tokens == 0 {
            return Ok(());
        }
        sums.documents.add(self.nats, self.tokens as f64);
        sums.blocks.join(&self.blocks);
        sums.tokens += self.tokens;
        match bytes {
            Some(bytes) => sums.bytes.sum += bytes,
            None => sums.bytes.lost = true,
        }
        Ok(())
    }
}

/// Windows of a document, one behind the other; the last token of a window is the first of the next.
struct Windows<'a> {
    model: &'a LanguageModel,
    /// Tokens that have foretold nothing yet.
    pending: Vec<u32>,
    context: usize,
    /// Windows that are read together.
    together: usize,
}

impl Windows<'_> {
    fn push(&mut self, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
        self.pending.extend(ids);
        let mut losses = Vec::new();
        let batch = self.together * self.context;
        let mut from = 0;
        while self.pending.len() - from > batch {
            losses.extend(self.read(from, self.together, self.context)?);
            from += batch;
        }
        self.pending.drain(..from);
        Ok(losses)
    }

    fn end(&mut self) -> anyhow::Result<Vec<f32>> {
        let left = self.pending.len().saturating_sub(1);
        let (whole, rest) = (left / self.context, left % self.context);
        let mut losses = Vec::new();
        for (from, windows, context) in [
            (0, whole, self.context),
            (whole * self.context, usize::from(rest > 0), rest),
        ] {
            if windows > 0 {
                losses.extend(self.read(from, windows, context)?);
            }
        }
        self.pending.clear();
        Ok(losses)
    }

    /// Losses of the tokens behind those of windows that begin there.
    fn read(&self, from: usize, windows: usize, context: usize) -> anyhow::Result<Vec<f32>> {
        let part = |shift: usize| &self.pending[from + shift..][..windows * context];
        let shape = [windows, context];
        let ids = Ids::new(part(0), &shape, self.model.config().vocab_size)?;
        let targets = Tensor::from_slice(part(1), &shape[..], &Device::Cpu)?;
        let options = cross_entropy::Options::default();
        let losses = self.model.losses(&ids, &targets, &options)?;
        Ok(losses.to_dtype(DType::F32)?.to_vec1()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_datasets::text::documents::line_of;
    use fulgur_lightnet::lm::{Architecture, Config};
    use fulgur_lightnet::params::Params;

    fn subject(architecture: Architecture, vocabulary: usize, tokenizer: Option<LmTokenizer>) -> Subject {
        let config = Config {
            hidden_size: 16,
            intermediate_size: 16,
            num_attention_heads: 2,
            num_hidden_layers: 1,
            vocab_size: vocabulary,
            initializer_range: 0.4,
            ..Config::of(architecture)
        };
        let params = Params::random(2, &Device::Cpu);
        Subject {
            folder: "model".into(),
            model: LanguageModel::new(&config, DType::F32, &params.builder()).unwrap(),
            tokenizer,
            chunk: 50,
        }
    }

    /// `-log p` of all tokens but the first, from the logits of the whole.
    fn losses(subject: &Subject, ids: &[u32]) -> Vec<f64> {
        let vocabulary = subject.vocabulary();
        let ids_tensor = Ids::new(ids, &[1, ids.len()], vocabulary).unwrap();
        let logits = subject.model.logits(&ids_tensor).unwrap().squeeze(0).unwrap();
        let rows: Vec<Vec<f32>> = logits.to_vec2().unwrap();
        let pairs = rows.iter().zip(&ids[1..]);
        let loss = |(row, &target): (&Vec<f32>, &u32)| {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            sum.ln() - f64::from(row[target as usize])
        };
        pairs.map(loss).collect()
    }

    fn close(found: f64, wanted: f64) {
        assert!(
            (found - wanted).abs() < 1e-4 * wanted.abs(),
            "{found}, expected {wanted}"
        );
    }

    const TEXTS: [&str; 4] = [
        "A bell rings as the rain falls.",
        "",
        "An owl \u{1f989} hoots, far away.\n",
        "x",
    ];

    /// Of bytes the first one of each document is given; a document of one byte counts for nothing.
    #[test]
    fn bytes_count_once_and_the_first_is_given() {
        let folder = tempfile::tempdir().unwrap();
        let (rows, text) = (folder.path().join("a.jsonl"), folder.path().join("b.txt"));
        std::fs::write(&rows, TEXTS.map(line_of).concat()).unwrap();
        std::fs::write(&text, TEXTS[0].repeat(40)).unwrap();
        for architecture in [Architecture::Tnl, Architecture::Llama] {
            let subject = subject(architecture, 256, Some(LmTokenizer::bytes()));
            let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
            let all = [TEXTS[0], TEXTS[2], &TEXTS[0].repeat(40)].map(|text| losses(&subject, &bytes(text)));
            let nats: f64 = all.iter().flatten().sum();
            let count: usize = all.iter().map(Vec::len).sum();
            let files = [rows.clone(), text.clone()];
            let mut told = 0;
            let found = perplexity(&subject, &files, &Options::default(), |bytes| {
                told = bytes;
                true
            });
            let found = found.unwrap();
            assert_eq!(
                (found.documents, found.tokens, found.bytes),
                (3, count as u64, Some(count as u64))
            );
            assert_eq!(told as usize, TEXTS.concat().len() + 40 * TEXTS[0].len());
            close(found.nats_per_token, nats / count as f64);
            close(found.perplexity, (nats / count as f64).exp());
            close(found.bits_per_byte.unwrap(), nats / count as f64 / 2f64.ln());
            assert!(found.finished && found.stderr_by == By::Blocks);
            // Blocks: two documents of their own, and three of the long one.
            let mut blocks = vec![all[0].clone(), all[1].clone()];
            blocks.extend(all[2].chunks(BLOCK).map(<[f64]>::to_vec));
            let mut ratio = Ratio::default();
            blocks
                .iter()
                .for_each(|block| ratio.add(block.iter().sum(), block.len() as f64));
            assert_eq!(blocks.len(), 5);
            close(
                found.nats_per_token_stderr.unwrap(),
                ratio.estimate().unwrap().stderr.unwrap(),
            );
            // A token in front of each document: nothing is given.
            let options = Options {
                before: Some(10),
                ..Options::default()
            };
            let found = perplexity(&subject, &files[..1], &options, |_| true).unwrap();
            let nats: f64 = [TEXTS[0], TEXTS[2], TEXTS[3]]
                .iter()
                .flat_map(|text| losses(&subject, &[&[10], &bytes(text)[..]].concat()))
                .sum();
            let count = TEXTS.concat().len();
            assert_eq!((found.documents, found.tokens), (3, count as u64));
            close(found.nats_per_token, nats / count as f64);
            let stopped = perplexity(&subject, &files, &Options::default(), |_| false).unwrap();
            assert!(!stopped.finished && stopped.documents == 1);
        }
    }

    /// Windows begin with nothing, together or alone.
    #[test]
    fn windows_are_those_of_training() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let text = TEXTS[0].repeat(9);
        std::fs::write(&path, &text).unwrap();
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let subject = subject(Architecture::Hgrn2, 256, Some(LmTokenizer::bytes()));
        for context in [1, 7, 31, 50, 278, 5000] {
            let mut nats = 0.0;
            for from in (0..ids.len() - 1).step_by(context) {
                let to = (from + context).min(ids.len() - 1);
                nats += losses(&subject, &ids[from..=to]).iter().sum::<f64>();
            }
            let options = Options {
                context: Some(context),
                before: None,
            };
            let found = perplexity(&subject, std::slice::from_ref(&path), &options, |_| true).unwrap();
            assert_eq!(found.tokens as usize, ids.len() - 1);
            close(found.nats_per_token, nats / (ids.len() - 1) as f64);
        }
    }

    #[test]
    fn token_ids_are_one_document_and_their_bytes_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.u16");
        let text = TEXTS[2].repeat(20);
        let tokenizer = LmTokenizer::train([text.as_str()].into_iter(), 280).unwrap();
        let rows = tokenizer.rows();
        let mut ids = tokenizer.encode(&text, false).unwrap();
        ids.push(0);
        ids.extend(tokenizer.encode("An owl", false).unwrap());
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
        std::fs::write(&path, &bytes).unwrap();
        let with = subject(Architecture::Tnl, rows, Some(tokenizer.clone()));
        let found = perplexity(&with, std::slice::from_ref(&path), &Options::default(), |_| true).unwrap();
        let wanted = losses(&with, &ids);
        assert_eq!(found.tokens as usize, ids.len() - 1);
        close(
            found.nats_per_token,
            wanted.iter().sum::<f64>() / wanted.len() as f64,
        );
        let first = tokenizer.byte_counts().unwrap()[ids[0] as usize] as usize;
        assert_eq!(found.bytes.unwrap() as usize, text.len() + "An owl".len() - first);
        let without = subject(Architecture::Tnl, rows, None);
        let found = perplexity(&without, std::slice::from_ref(&path), &Options::default(), |_| {
            true
        })
        .unwrap();
        assert_eq!((found.bytes, found.bits_per_byte), (None, None));
        // The tokenizer's own token stands in front of text.
        let file = folder.path().join("a.txt");
        std::fs::write(&file, &text).unwrap();
        let found = perplexity(&with, &[file], &Options::default(), |_| true).unwrap();
        assert_eq!(found.bytes, Some(text.len() as u64));
        let wanted = losses(
            &with,
            &[&[0], &tokenizer.encode(&text, false).unwrap()[..]].concat(),
        );
        close(
            found.nats_per_token,
            wanted.iter().sum::<f64>() / wanted.len() as f64,
        );
    }

    #[test]
    fn many_documents_are_what_the_error_is_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let lines: Vec<String> = (0..DOCUMENTS)
            .map(|at| line_of(&"owl ".repeat(1 + at % 7)))
            .collect();
        std::fs::write(&path, lines.concat()).unwrap();
        let subject = subject(Architecture::Hgrn2, 256, Some(LmTokenizer::bytes()));
        let found = perplexity(&subject, &[path], &Options::default(), |_| true).unwrap();
        assert_eq!((found.stderr_by, found.documents), (By::Documents, DOCUMENTS));
        assert!(found.nats_per_token_stderr.unwrap() > 0.0);
    }

    #[test]
    fn what_is_no_text_for_the_model_is_told_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = || Some(LmTokenizer::bytes());
        for (name, content, tokenizer, words) in [
            ("a.txt", &b""[..], bytes(), "a.txt: found no token"),
            ("a.txt", b"x", bytes(), "a.txt: found no token"),
            ("a.txt", b"ab\xff", bytes(), "no UTF-8 at byte 2"),
            ("a.txt", b"text", None, "found no tokenizer.json"),
            (
                "a.jsonl",
                b"{\"text\": \"a\", \"url\": 1}",
                bytes(),
                "unknown field `url`",
            ),
            ("a.u16", b"abc", bytes(), "a.u16: 3 bytes, expected two a token"),
            (
                "a.u16",
                b"\x05\x00\x2c\x01",
                bytes(),
                "a.u16: token 1 is 300, expected less than 256",
            ),
            ("none.txt", b"", bytes(), "none.txt"),
        ] {
            let path = folder.path().join(name);
            match name {
                "none.txt" => (),
                _ => std::fs::write(&path, content).unwrap(),
            }
            let subject = subject(Architecture::Tnl, 256, tokenizer);
            let error = perplexity(&subject, &[path], &Options::default(), |_| true).unwrap_err();
            let line = format!("{error:#}");
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
