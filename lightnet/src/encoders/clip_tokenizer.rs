//! Texts as CLIP and ImageBind read them: byte pairs of a vocabulary of 49,408 pieces.
//!
//! A text is unescaped, trimmed and lower-cased, cut into words, numerals and runs of signs, and its bytes are joined by the merges of the
//! vocabulary; the last piece of a word carries `</w>`. A sequence is the start, at most 75 pieces and the end, padded with zeros to 77.
//!
//! The vocabulary is a `tokenizer.json`, `vocab.json` with `merges.txt`, or the published `bpe_simple_vocab_16e6.txt`, packed or not.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use crate::params::{ParamsError, file};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// What ends a word.
const LAST: &str = "</w>";
/// Words, numerals one by one, and runs of signs.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";
/// Merges of the published vocabulary.
const MOST_MERGES: usize = 49_152 - 256 - 2;
/// Largest file of a vocabulary, packed or not.
const MOST_BYTES: u64 = 64 << 20;
/// Characters of a text that are looked at: what follows is beyond any sequence.
const MOST_CHARACTERS: usize = 1 << 16;
/// Files of a vocabulary, the best first.
const FILES: [&str; 3] = [
    "tokenizer.json",
    "bpe_simple_vocab_16e6.txt.gz",
    "bpe_simple_vocab_16e6.txt",
];

/// Why there is no vocabulary, or a text cannot be read with it.
#[derive(Debug, thiserror::Error)]
pub enum ClipTokenizerError {
    /// The file is no vocabulary of CLIP.
    #[error("{}: {reason}", path.display())]
    Vocabulary {
        /// The file, or the folder without one.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] ParamsError),
    /// Tensors of ids cannot be made.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

type Result<T> = std::result::Result<T, ClipTokenizerError>;

/// Texts as ids.
#[derive(Debug)]
pub struct Batch {
    /// `[B, context]` i64: start, pieces, end, zeros.
    pub ids: Tensor,
    /// Which texts lost their end.
    pub truncated: Vec<bool>,
}

/// A vocabulary of CLIP.
#[derive(Clone)]
pub struct ClipTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    start: u32,
    end: u32,
}

impl std::fmt::Debug for ClipTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClipTokenizer({})", self.path.display())
    }
}

impl ClipTokenizer {
    /// Looks for a vocabulary in the folder `dir`.
    ///
    /// # Errors
    /// There is none, or as [`Self::read`].
    pub fn find(dir: &Path) -> Result<Self> {
        let there = FILES
            .iter()
            .map(|name| dir.join(name))
            .find(|path| path.is_file());
        match there {
            Some(path) => Self::read(&path),
            None if dir.join("vocab.json").is_file() && dir.join("merges.txt").is_file() => {
                Self::read_pair(dir)
            }
            None => Err(ClipTokenizerError::Vocabulary {
                path: dir.to_owned(),
                reason: format!("found no vocabulary, expected one of {}", FILES.join(", ")),
            }),
        }
    }

    /// Reads a `tokenizer.json`, or merges in lines behind a first one that says nothing, packed with gzip or not.
    ///
    /// # Errors
    /// The file is unreadable or no vocabulary of CLIP.
    pub fn read(path: &Path) -> Result<Self> {
        let mut bytes = file::read_bounded(path, MOST_BYTES)?;
        let wrong = |reason: String| ClipTokenizerError::Vocabulary {
            path: path.to_owned(),
            reason,
        };
        if bytes.starts_with(&[0x1f, 0x8b]) {
            let mut plain = Vec::new();
            GzDecoder::new(bytes.as_slice())
                .take(MOST_BYTES + 1)
                .read_to_end(&mut plain)
                .map_err(|e| wrong(format!("no gzip stream: {e}")))?;
            if plain.len() as u64 > MOST_BYTES {
                return Err(wrong(format!("more than {MOST_BYTES} bytes once unpacked")));
            }
            bytes = plain;
        }
        if bytes.trim_ascii_start().starts_with(b"{") {
            let inner = Tokenizer::from_bytes(&bytes).map_err(|e| wrong(format!("no tokenizer: {e}")))?;
            return Self::of(path, inner);
        }
        let text = String::from_utf8(bytes).map_err(|_| wrong("no text in UTF-8".to_owned()))?;
        let inner = of_merges(&text).map_err(wrong)?;
        Self::of(path, inner)
    }

    /// The two files that transformers wrote before `tokenizer.json`.
    fn read_pair(dir: &Path) -> Result<Self> {
        let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
        let wrong = |reason: String| ClipTokenizerError::Vocabulary {
            path: vocab.clone(),
            reason,
        };
        let pieces = serde_json::from_slice(&file::read_bounded(&vocab, MOST_BYTES)?)
            .map_err(|e| wrong(format!("no vocabulary: {e}")))?;
        let text = String::from_utf8(file::read_bounded(&merges, MOST_BYTES)?)
            .map_err(|_| wrong("merges.txt beside it is no text in UTF-8".to_owned()))?;
        let pairs = pairs(&text).map_err(wrong)?;
        Self::of(&vocab, build(pieces, pairs).map_err(wrong)?)
    }

    fn of(path: &Path, mut inner: Tokenizer) -> Result<Self> {
        let wrong = |reason: String| ClipTokenizerError::Vocabulary {
            path: path.to_owned(),
            reason,
        };
        inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        inner.with_padding(None);
        let find = |token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| wrong(format!("has no {token}, expected a vocabulary of CLIP")))
        };
        Ok(Self {
            start: find(START)?,
            end: find(END)?,
            path: path.to_owned(),
            inner,
        })
    }

    /// How many ids there are.
    pub fn pieces(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The ids of a text, without start and end.
    ///
    /// # Errors
    /// The vocabulary cannot express it.
    pub fn pieces_of(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(clean(text), false);
        let encoding = encoding.map_err(|e| ClipTokenizerError::Vocabulary {
            path: self.path.clone(),
            reason: e.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Start, pieces and end of each text, with zeros up to `context` ids; what does not fit is left out before the end.
    ///
    /// # Errors
    /// As [`Self::pieces_of`]; a context of less than two.
    pub fn encode<S: AsRef<str>>(&self, texts: &[S], context: usize, device: &Device) -> Result<Batch> {
        self.filled(texts, context, 0, device)
    }

    /// As [`Self::encode`], with the token `padding` in place of zeros: the generators that read texts with CLIP have the end again.
    ///
    /// # Errors
    /// As [`Self::encode`], or the vocabulary has no such token.
    pub fn padded<S: AsRef<str>>(
        &self,
        texts: &[S],
        context: usize,
        padding: &str,
        device: &Device,
    ) -> Result<Batch> {
        let Some(id) = self.inner.token_to_id(padding) else {
            return Err(ClipTokenizerError::Vocabulary {
                path: self.path.clone(),
                reason: format!("has no {padding}, which pads texts"),
            });
        };
        self.filled(texts, context, id.into(), device)
    }

    fn filled<S: AsRef<str>>(
        &self,
        texts: &[S],
        context: usize,
        padding: i64,
        device: &Device,
    ) -> Result<Batch> {
        let Some(room) = context.checked_sub(2) else {
            return Err(ClipTokenizerError::Vocabulary {
                path: self.path.clone(),
                reason: format!("a context of {context} ids, expected 2 or more"),
            });
        };
        let mut ids: Vec<i64> = Vec::with_capacity(texts.len() * context);
        let mut truncated = Vec::with_capacity(texts.len());
        for text in texts {
            let pieces = self.pieces_of(text.as_ref())?;
            truncated.push(pieces.len() > room);
            ids.push(self.start.into());
            ids.extend(pieces.iter().take(room).map(|&id| i64::from(id)));
            ids.push(self.end.into());
            ids.resize(truncated.len() * context, padding);
        }
        Ok(Batch {
            ids: Tensor::from_vec(ids, (texts.len(), context), device)?,
            truncated,
        })
    }
}

/// Merges of a text: pairs of pieces, a line each, behind a first line.
fn pairs(text: &str) -> std::result::Result<Vec<(String, String)>, String> {
    let lines = text
        .lines()
        .skip(1)
        .take(MOST_MERGES)
        .filter(|line| !line.trim().is_empty());
    let pair = |(number, line): (usize, &str)| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [left, right] => Ok((left.to_owned(), right.to_owned())),
        _ => Err(format!(
            "line {}: found {line:?}, expected two pieces",
            number + 2
        )),
    };
    lines.enumerate().map(pair).collect()
}

/// The vocabulary whose ids are given by the order of the merges.
fn of_merges(text: &str) -> std::result::Result<Tokenizer, String> {
    let pairs = pairs(text)?;
    if pairs.is_empty() {
        return Err("no merges".to_owned());
    }
    let bytes = byte_letters();
    let single = bytes.iter().map(char::to_string);
    let last = bytes.iter().map(|letter| format!("{letter}{LAST}"));
    let joined = pairs.iter().map(|(left, right)| format!("{left}{right}"));
    let marks = [START, END].map(str::to_owned);
    let pieces = single.chain(last).chain(joined).chain(marks);
    build((0..).zip(pieces).map(|(id, piece)| (piece, id)).collect(), pairs)
}

fn build(
    pieces: BTreeMap<String, u32>,
    pairs: Vec<(String, String)>,
) -> std::result::Result<Tokenizer, String> {
    let model = serde_json::json!({
        "type": "BPE", "vocab": pieces, "merges": pairs, "end_of_word_suffix": LAST, "continuing_subword_prefix": "",
        "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false,
    });
    // The model is read from borrowed text alone.
    let model: BPE = serde_json::from_str(&model.to_string()).map_err(|e| e.to_string())?;
    let mut inner = Tokenizer::new(model);
    let words = Split::new(
        SplitPattern::Regex(WORDS.to_owned()),
        SplitDelimiterBehavior::Removed,
        true,
    )
    .map_err(|e| e.to_string())?;
    let bytes = ByteLevel::default().add_prefix_space(false).use_regex(false);
    inner.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(bytes),
    ]))));
    inner
        .add_special_tokens([START, END].map(|mark| AddedToken::from(mark, true).normalized(false)))
        .map_err(|e| e.to_string())?;
    Ok(inner)
}

/// The letters that stand for bytes, in the order of their ids: bytes that can be seen stand for themselves, then come the others.
fn byte_letters() -> Vec<char> {
    let seen = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..256u32).filter(|byte| !seen(byte)).count() as u32;
    let all = (0..256).filter(seen).chain(256..256 + hidden);
    all.filter_map(char::from_u32).collect()
}

/// A text as the vocabulary was learnt on: entities unescaped twice, white space single, lower case.
fn clean(text: &str) -> String {
    let near: String = text.chars().take(MOST_CHARACTERS).collect();
    let plain = unescape(&unescape(&near));
    let words: Vec<&str> = plain.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

/// Entities of HTML by name; of letters beyond ASCII those of Latin-1, in order from 160 on.
const NAMED: [(&str, char); 14] = [
    ("amp", '&'),
    ("lt", '<'),
    ("gt", '>'),
    ("quot", '"'),
    ("apos", '\''),
    ("hellip", '\u{2026}'),
    ("ndash", '\u{2013}'),
    ("mdash", '\u{2014}'),
    ("lsquo", '\u{2018}'),
    ("rsquo", '\u{2019}'),
    ("ldquo", '\u{201c}'),
    ("rdquo", '\u{201d}'),
    ("bull", '\u{2022}'),
    ("euro", '\u{20ac}'),
];
const LATIN: &str = "nbsp iexcl cent pound curren yen brvbar sect uml copy ordf laquo not shy reg macr deg plusmn sup2 sup3 acute micro para \
                     middot cedil sup1 ordm raquo frac14 frac12 frac34 iquest Agrave Aacute Acirc Atilde Auml Aring AElig Ccedil Egrave \
                     Eacute Ecirc Euml Igrave Iacute Icirc Iuml ETH Ntilde Ograve Oacute Ocirc Otilde Ouml times Oslash Ugrave Uacute \
                     Ucirc Uuml Yacute THORN szlig agrave aacute acirc atilde auml aring aelig ccedil egrave eacute ecirc euml igrave \
                     iacute icirc iuml eth ntilde ograve oacute ocirc otilde ouml divide oslash ugrave uacute ucirc uuml yacute thorn yuml";
/// Longest entity between its marks.
const LONGEST_ENTITY: usize = 10;

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let found = after.find(';').filter(|&end| end <= LONGEST_ENTITY);
        match found.and_then(|end| Some((entity(&after[..end])?, end))) {
            Some((letter, end)) => {
                out.push(letter);
                rest = &after[end + 1..];
            }
            None => {
                out.push('&');
                rest = after;
            }
        }
    }
    out + rest
}

fn entity(name: &str) -> Option<char> {
    if let Some(number) = name.strip_prefix('#') {
        let hexadecimal = number
            .strip_prefix(['x', 'X'])
            .map(|digits| u32::from_str_radix(digits, 16));
        return char::from_u32(hexadecimal.unwrap_or_else(|| number.parse()).ok()?);
    }
    let named = NAMED
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, letter)| letter);
    named.or_else(|| {
        let at = LATIN.split_whitespace().position(|known| known == name)?;
        char::from_u32(160 + at as u32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn golden(name: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "..", "tests", "golden", name]
            .iter()
            .collect()
    }

    fn expected() -> Vec<(String, Vec<u32>)> {
        serde_json::from_slice(&std::fs::read(golden("clip_words.json")).unwrap()).unwrap()
    }

    #[test]
    fn ids_are_those_of_the_reference() {
        let plain = ClipTokenizer::read(&golden("clip_words.txt")).unwrap();
        let json = ClipTokenizer::find(&golden("clip_words")).unwrap();
        assert_eq!(expected().len(), 16);
        for (text, ids) in expected() {
            assert_eq!(plain.pieces_of(&text).unwrap(), ids, "{text:?}");
            assert_eq!(json.pieces_of(&text).unwrap(), ids, "{text:?}");
        }
        assert_eq!([plain.start, plain.end], [622, 623]);
        assert_eq!(plain.pieces(), 624);
    }

    #[test]
    fn sequences_begin_end_and_are_padded() {
        let tokenizer = ClipTokenizer::read(&golden("clip_words.txt")).unwrap();
        let long = "dog ".repeat(100);
        let batch = tokenizer.encode(&["", "a dog", &long], 77, &Device::Cpu).unwrap();
        assert_eq!(batch.truncated, [false, false, true]);
        let rows = batch.ids.to_vec2::<i64>().unwrap();
        assert_eq!(rows[0][..4], [622, 623, 0, 0]);
        assert_eq!((rows[1][0], rows[1][76]), (622, 0));
        assert_eq!((rows[2].len(), rows[2][76], rows[2][75]), (77, 623, rows[1][2]));
        assert!(tokenizer.encode(&["a"], 1, &Device::Cpu).is_err());
    }

    #[test]
    fn packed_and_damaged_files() {
        let folder = tempfile::tempdir().unwrap();
        let packed = folder.path().join("bpe_simple_vocab_16e6.txt.gz");
        let text = std::fs::read(golden("clip_words.txt")).unwrap();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&text).unwrap();
        let bytes = encoder.finish().unwrap();
        std::fs::write(&packed, &bytes).unwrap();
        let (text, ids) = &expected()[0];
        assert_eq!(
            ClipTokenizer::find(folder.path())
                .unwrap()
                .pieces_of(text)
                .unwrap(),
            *ids
        );
        for (bytes, words) in [
            (&bytes[..bytes.len() / 2], "no gzip stream"),
            (b"first\na b c\n", "line 2: found \"a b c\""),
            (b"first\n", "no merges"),
            (b"{\"version\": 1}", "no tokenizer"),
            (b"first\n\xff\xff x\n", "no text in UTF-8"),
            (b"first\nab cd\n", "ab"),
        ] {
            std::fs::write(&packed, bytes).unwrap();
            let line = ClipTokenizer::find(folder.path()).unwrap_err().to_string();
            assert!(line.contains(words) && !line.contains('\n'), "{words}: {line}");
        }
        std::fs::remove_file(&packed).unwrap();
        let line = ClipTokenizer::find(folder.path()).unwrap_err().to_string();
        assert!(line.contains("expected one of tokenizer.json"), "{line}");
    }

    #[test]
    fn entities_are_unescaped() {
        assert_eq!(
            unescape("a &amp;lt; &#65;&#x42; &Uuml; & &foo; &hellip"),
            "a &lt; AB \u{dc} & &foo; &hellip"
        );
        assert_eq!(clean(" A &amp;amp; B\u{a0}\tc "), "a & b c");
        assert_eq!(LATIN.split_whitespace().count(), 96);
    }
}
