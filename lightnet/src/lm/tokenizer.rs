//! Text as token ids and back: `tokenizer.json`, GPT-2's `vocab.json` and `merges.txt`, or bytes.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// The token between texts, of GPT-2 and of tokenizers that are trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Fewest tokens of a trained tokenizer: the bytes and the end of a text.
pub const FEWEST: usize = 257;
/// Most tokens of a trained tokenizer: ids of two bytes.
pub const MOST: usize = 1 << 16;
/// Rows that a model may have beyond the tokens, as published vocabularies are padded.
const MOST_SPARE: usize = 1024;
/// Largest file of a tokenizer that is read.
const MOST_BYTES: u64 = 256 << 20;
/// Longest token that is learnt, in bytes.
const LONGEST: usize = 32;
/// Text that is taken in one piece.
const BLOCK: usize = 1 << 18;
/// Tokens of a character in four bytes.
const MOST_OF_A_CHARACTER: usize = 4;
/// Tokens before a text that its first letters are read with.
const CONTEXT: usize = 8;

/// Why there is no tokenizer, or a text cannot be taken apart.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct TokenizerError {
    path: PathBuf,
    reason: String,
}

/// A tokenizer of a language model.
#[derive(Clone)]
pub struct LmTokenizer {
    path: PathBuf,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    /// A byte a token.
    Bytes,
    Pieces(Box<Tokenizer>),
}

impl std::fmt::Debug for LmTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LmTokenizer({}, {} tokens)", self.path.display(), self.rows())
    }
}

impl LmTokenizer {
    /// A byte a token.
    pub fn bytes() -> Self {
        Self {
            path: PathBuf::from("bytes"),
            kind: Kind::Bytes,
        }
    }

    /// The tokenizer of a model folder, or bytes where there is none and the vocabulary has 256 tokens; none otherwise.
    ///
    /// # Errors
    /// A file that is no tokenizer, or one that disagrees with the `vocabulary` of the model.
    pub fn of_model(dir: &Path, vocabulary: usize) -> Result<Option<Self>, TokenizerError> {
        let (whole, vocab, merges) = (
            dir.join("tokenizer.json"),
            dir.join("vocab.json"),
            dir.join("merges.txt"),
        );
        let found = if whole.is_file() {
            Self::read(&whole)?
        } else if vocab.is_file() && merges.is_file() {
            Self::read_gpt2(&vocab, &merges)?
        } else if vocabulary == 256 {
            Self::bytes()
        } else {
            return Ok(None);
        };
        found.fits(vocabulary)?;
        Ok(Some(found))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// The file is unreadable, or no tokenizer.
    pub fn read(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = bounded(path)?;
        let inner = Tokenizer::from_bytes(&bytes).map_err(|e| fail(path, &format!("no tokenizer: {e}")))?;
        Self::of(path, inner)
    }

    /// Reads the files of GPT-2.
    fn read_gpt2(vocab: &Path, merges: &Path) -> Result<Self, TokenizerError> {
        bounded(vocab)?;
        bounded(merges)?;
        let names = [vocab, merges].map(|path| path.to_string_lossy().into_owned());
        let [vocab_name, merges_name] = names;
        let model = BPE::from_file(&vocab_name, &merges_name)
            .build()
            .map_err(|e| fail(vocab, &format!("no vocabulary with merges.txt beside it: {e}")))?;
        let mut inner = Tokenizer::new(model);
        let level = ByteLevel::default().add_prefix_space(false);
        inner.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
        if inner.token_to_id(END_OF_TEXT).is_some() {
            inner
                .add_special_tokens([AddedToken::from(END_OF_TEXT, true)])
                .map_err(|e| fail(vocab, &e.to_string()))?;
        }
        Self::of(vocab, inner)
    }

    fn of(path: &Path, mut inner: Tokenizer) -> Result<Self, TokenizerError> {
        inner
            .with_truncation(None)
            .map_err(|e| fail(path, &e.to_string()))?;
        inner.with_padding(None);
        Ok(Self {
            path: path.to_owned(),
            kind: Kind::Pieces(Box::new(inner)),
        })
    }

    /// Learns byte-level pairs from texts: [`END_OF_TEXT`], the bytes, and at most as many tokens as `vocabulary`. The same texts
    /// give the same tokens.
    ///
    /// # Errors
    /// A vocabulary that is too small or too large.
    pub fn train<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocabulary: usize,
    ) -> Result<Self, TokenizerError> {
        let path = Path::new("tokenizer");
        if !(FEWEST..=MOST).contains(&vocabulary) {
            let reason = format!("a vocabulary of {vocabulary} tokens, expected {FEWEST} to {MOST}");
            return Err(fail(path, &reason));
        }
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(vocabulary)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .max_token_length(Some(LONGEST))
            .build()
            .into();
        let mut inner = Tokenizer::new(BPE::default());
        let level = ByteLevel::default().add_prefix_space(false);
        inner.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
        inner
            .train(&mut trainer, texts.flat_map(blocks))
            .map_err(|e| fail(path, &e.to_string()))?;
        Self::of(path, inner)
    }

    /// The contents of its `tokenizer.json`.
    ///
    /// # Errors
    /// It is that of bytes, which has none.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        match &self.kind {
            Kind::Bytes => Err(fail(&self.path, "bytes need no tokenizer.json")),
            Kind::Pieces(inner) => inner
                .to_string(false)
                .map_err(|e| fail(&self.path, &e.to_string())),
        }
    }

    /// The contents of the `tokenizer.json` that stands beside a model: none for bytes, which do without.
    ///
    /// # Errors
    /// As [`Self::to_json`].
    pub fn file(&self) -> Result<Option<String>, TokenizerError> {
        match self.kind {
            Kind::Bytes => Ok(None),
            Kind::Pieces(_) => self.to_json().map(Some),
        }
    }

    /// Special tokens that a text spells out are letters like others, as files of text need it.
    #[must_use]
    pub fn literal(mut self) -> Self {
        if let Kind::Pieces(inner) = &mut self.kind {
            inner.set_encode_special_tokens(true);
        }
        self
    }

    /// Rows of an embedding that has one for each token.
    pub fn rows(&self) -> usize {
        match &self.kind {
            Kind::Bytes => 256,
            Kind::Pieces(inner) => {
                let ids = inner.get_vocab(true).into_values().max();
                ids.map_or(0, |id| id as usize + 1)
            }
        }
    }

    /// Bytes of text that each token stands for, by id; special ones stand for none. Only where tokens are pieces of bytes.
    pub fn byte_counts(&self) -> Option<Vec<u32>> {
        let inner = match &self.kind {
            Kind::Bytes => return Some(vec![1; self.rows()]),
            Kind::Pieces(inner) => inner,
        };
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return None;
        }
        let mut counts = vec![0; self.rows()];
        for (token, id) in inner.get_vocab(false) {
            // Every byte of such a token is written as one character.
            counts[id as usize] = token.chars().count() as u32;
        }
        for (id, added) in inner.get_added_tokens_decoder() {
            if let Some(count) = counts.get_mut(id as usize) {
                *count = if added.special {
                    0
                } else {
                    added.content.len() as u32
                };
            }
        }
        Some(counts)
    }

    /// Whether a model with this vocabulary is one for this tokenizer.
    ///
    /// # Errors
    /// It lacks tokens, or has many more than there are.
    pub fn fits(&self, vocabulary: usize) -> Result<(), TokenizerError> {
        let rows = self.rows();
        if rows > vocabulary || vocabulary - rows > MOST_SPARE.min(vocabulary / 2) {
            let reason = format!("{rows} tokens, expected those of the model's vocabulary, {vocabulary}");
            return Err(fail(&self.path, &reason));
        }
        Ok(())
    }

    /// The token that ends a text, where it has one of a known name.
    pub fn end(&self) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::Pieces(inner) => inner.token_to_id(END_OF_TEXT),
        }
    }

    /// The ids of `text`; at its `start` with the tokens that the tokenizer puts before any text.
    ///
    /// # Errors
    /// The tokenizer cannot express the text.
    pub fn encode(&self, text: &str, start: bool) -> Result<Vec<u32>, TokenizerError> {
        let Kind::Pieces(inner) = &self.kind else {
            return Ok(text.bytes().map(u32::from).collect());
        };
        let ids = |text: &str, start: bool| {
            let encoding = inner.encode_fast(text, start);
            encoding
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|e| fail(&self.path, &e.to_string()))
        };
        if !parts_like_gpt2(inner) || text.len() <= BLOCK {
            return ids(text, start);
        }
        let mut all = ids("", start)?;
        let blocks: Vec<&str> = blocks(text).collect();
        let parts: Vec<Vec<u32>> = blocks
            .into_par_iter()
            .map(|block| ids(block, false))
            .collect::<Result<_, _>>()?;
        parts.iter().for_each(|part| all.extend_from_slice(part));
        Ok(all)
    }

    /// The text of `ids`, with a mark for what is no UTF-8; special tokens have none.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::Pieces(inner) => inner
                .decode(ids, true)
                .map_err(|e| fail(&self.path, &e.to_string())),
        }
    }

    /// The text of tokens that come one by one, behind the tokens `before`.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn stream(&self, before: &[u32]) -> Result<TextStream<'_>, TokenizerError> {
        let ids = match self.kind {
            Kind::Bytes => Vec::new(),
            Kind::Pieces(_) => before[before.len().saturating_sub(CONTEXT)..].to_vec(),
        };
        let text = self.decode(&ids)?;
        Ok(TextStream {
            tokenizer: self,
            shown_ids: ids.len(),
            // Half a character may become a whole one by the next token.
            shown: text.trim_end_matches('\u{fffd}').to_owned(),
            ids,
        })
    }
}

/// Text of tokens that come one by one: characters are given out whole.
#[derive(Clone, Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a LmTokenizer,
    /// The last tokens; those in front have been shown, and are there because text depends on what is before it.
    ids: Vec<u32>,
    shown_ids: usize,
    /// Text of the shown ones.
    shown: String,
}

impl TextStream<'_> {
    /// What can be shown with one more token.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        if text.ends_with('\u{fffd}') && self.ids.len() - self.shown_ids < MOST_OF_A_CHARACTER {
            return Ok(String::new());
        }
        self.show(&text)
    }

    /// What is left at the end.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.ids)?;
        self.show(&text)
    }

    fn show(&mut self, text: &str) -> Result<String, TokenizerError> {
        let same = text.chars().zip(self.shown.chars()).take_while(|(a, b)| a == b);
        let known: usize = same.map(|(c, _)| c.len_utf8()).sum();
        let new = text[known..].to_owned();
        if !new.is_empty() {
            let kept = match self.tokenizer.kind {
                Kind::Bytes => self.ids.len(),
                Kind::Pieces(_) => self.shown_ids,
            };
            self.ids.drain(..kept);
            self.shown_ids = self.ids.len();
            self.shown = self.tokenizer.decode(&self.ids)?;
        } else if self.ids.len() > 4 * CONTEXT {
            // Tokens without text must not pile up.
            self.ids.drain(..self.ids.len() - CONTEXT);
            self.shown_ids = self.ids.len();
            self.shown = self.tokenizer.decode(&self.ids)?;
        }
        Ok(new)
    }
}

/// Whether texts are cut as GPT-2 cuts them, where a line that begins with a letter begins a piece.
fn parts_like_gpt2(inner: &Tokenizer) -> bool {
    let Some(PreTokenizerWrapper::ByteLevel(level)) = inner.get_pre_tokenizer() else {
        return false;
    };
    inner.get_normalizer().is_none() && level.use_regex && !level.add_prefix_space
}

/// A text in pieces, each of which ends with a line that visible ASCII stands before and behind.
fn blocks(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let bytes = rest.as_bytes();
        let border = |at: &usize| {
            bytes[*at] == b'\n' && bytes[at - 1].is_ascii_graphic() && bytes[at + 1].is_ascii_graphic()
        };
        let last = bytes.len().saturating_sub(1);
        let cut = (BLOCK..last).find(border).map_or(rest.len(), |at| at + 1);
        let (block, behind) = rest.split_at(cut);
        rest = behind;
        (!block.is_empty()).then_some(block)
    })
}

fn bounded(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    crate::params::file::read_bounded(path, MOST_BYTES).map_err(|error| {
        let text = error.to_string();
        let prefix = format!("{}: ", path.display());
        fail(path, text.strip_prefix(&prefix).unwrap_or(&text))
    })
}

fn fail(path: &Path, reason: &str) -> TokenizerError {
    TokenizerError {
        path: path.to_owned(),
        reason: reason.lines().next().unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "The bell rings, the bell's ringing.\n\nIt rained 12 days \u{2014} na\u{ef}ve \u{1f514}\u{1f514}!\n";

    fn trained() -> LmTokenizer {
        LmTokenizer::train([TEXT.repeat(20).as_str()].into_iter(), 280).unwrap()
    }

    #[test]
    fn texts_come_back_as_they_were() {
        let trained = trained();
        assert_eq!(trained.rows(), 280);
        assert_eq!(trained.end(), Some(0));
        for tokenizer in [trained.clone(), LmTokenizer::bytes()] {
            for text in [
                TEXT,
                "",
                " \t\r\n  x",
                "\u{0}\u{10ffff}",
                "<|endoftext",
                "\u{72ac}",
            ] {
                let ids = tokenizer.encode(text, true).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), text);
                let mut stream = tokenizer.stream(&[]).unwrap();
                let mut streamed = String::new();
                for id in ids {
                    streamed.push_str(&stream.push(id).unwrap());
                }
                streamed.push_str(&stream.finish().unwrap());
                assert_eq!(streamed, text);
            }
        }
        assert!(trained.encode(TEXT, true).unwrap().len() < TEXT.len() * 3 / 4);
        assert_eq!(trained.encode(END_OF_TEXT, true).unwrap(), [0]);
        assert!(trained.clone().literal().encode(END_OF_TEXT, true).unwrap().len() > 1);
    }

    #[test]
    fn bytes_of_tokens_are_those_of_the_text() {
        let trained = trained();
        for tokenizer in [&trained, &LmTokenizer::bytes()] {
            let counts = tokenizer.byte_counts().unwrap();
            assert_eq!(counts.len(), tokenizer.rows());
            let ids = tokenizer.encode(TEXT, true).unwrap();
            let bytes: u32 = ids.iter().map(|&id| counts[id as usize]).sum();
            assert_eq!(bytes as usize, TEXT.len());
        }
        assert_eq!(trained.byte_counts().unwrap()[0], 0);
    }

    /// Whatever a model draws, text comes out soon, and what is no character is marked.
    #[test]
    fn streams_give_whole_characters_and_never_wait_long() {
        let trained = trained();
        let bytes = LmTokenizer::bytes();
        let bell: Vec<u32> = "\u{1f514}".bytes().map(u32::from).collect();
        let mut stream = bytes.stream(&[]).unwrap();
        let shown: Vec<String> = bell.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(shown, ["", "", "", "\u{1f514}"]);
        for tokenizer in [&trained, &bytes] {
            let mut stream = tokenizer.stream(&[]).unwrap();
            let mut noise = fulgur_kernels::philox::Philox::new(3, 0);
            let mut all = String::new();
            for _ in 0..2000 {
                // Half of the bytes are none of ASCII.
                let id = noise.below(256) as u32 + u32::from(tokenizer.end().is_some());
                all.push_str(&stream.push(id).unwrap());
                assert!(stream.ids.len() <= 4 * CONTEXT + MOST_OF_A_CHARACTER);
            }
            assert!(all.contains('\u{fffd}') && all.len() > 1000);
        }
    }

    #[test]
    fn long_texts_in_blocks_are_as_in_one_piece() {
        let tokenizer = trained();
        let text = TEXT.repeat(3 * BLOCK / TEXT.len()) + &"line\nline\n".repeat(BLOCK / 3);
        assert!(blocks(&text).count() > 2 && blocks(&text).collect::<String>() == text);
        let Kind::Pieces(inner) = &tokenizer.kind else {
            panic!("trained to be pieces")
        };
        let whole = inner.encode_fast(text.as_str(), true).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.encode(&text, true).unwrap(), whole);
    }

    #[test]
    fn files_of_both_kinds_are_read_and_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let none = LmTokenizer::of_model(dir, 300).unwrap();
        assert!(none.is_none() && LmTokenizer::of_model(dir, 256).unwrap().is_some());
        let trained = trained();
        let json: serde_json::Value = serde_json::from_str(&trained.to_json().unwrap()).unwrap();
        std::fs::write(dir.join("vocab.json"), json["model"]["vocab"].to_string()).unwrap();
        let merges = json["model"]["merges"].as_array().unwrap().iter();
        let merges: Vec<String> = merges
            .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
            .collect();
        std::fs::write(
            dir.join("merges.txt"),
            format!("#version: 0.2\n{}\n", merges.join("\n")),
        )
        .unwrap();
        let gpt2 = LmTokenizer::of_model(dir, 320).unwrap().unwrap();
        let expected = trained.encode(TEXT, true).unwrap();
        assert_eq!(gpt2.encode(TEXT, true).unwrap(), expected);
        assert_eq!(gpt2.end(), Some(0));
        std::fs::write(dir.join("tokenizer.json"), trained.to_json().unwrap()).unwrap();
        let whole = LmTokenizer::of_model(dir, 300).unwrap().unwrap();
        assert_eq!(whole.encode(TEXT, true).unwrap(), expected);
        for vocabulary in [279, 256, 1400, 1 << 20] {
            let line = LmTokenizer::of_model(dir, vocabulary).unwrap_err().to_string();
            assert!(
                line.contains("tokenizer.json: 280 tokens") && line.contains(&vocabulary.to_string()),
                "{line}"
            );
        }
        for broken in [
            "",
            "{}",
            "[1]",
            "{\"version\": \"1.0\", \"model\": {}}",
            "\u{1f415}",
        ] {
            std::fs::write(dir.join("tokenizer.json"), broken).unwrap();
            let line = LmTokenizer::of_model(dir, 300).unwrap_err().to_string();
            assert!(
                line.contains("tokenizer.json: no tokenizer") && !line.contains('\n'),
                "{line}"
            );
        }
        assert!(LmTokenizer::train([TEXT].into_iter(), 256).is_err());
        assert!(LmTokenizer::train([TEXT].into_iter(), MOST + 1).is_err());
    }
}
