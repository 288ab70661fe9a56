//! Sub-word vocabulary: byte-level pairs (Sennrich et al., 2016), learnt from our own sentences.
//!
//! Letters lose case and accents; every byte has a piece of its own, so that any text can be written. A sequence is
//! the start piece and at most `max_tokens - 1` pieces of the text: an empty text is the start piece alone.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::{Lowercase, NFKD, Sequence, StripAccents};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::{Result, TextError};

/// Id of padding.
pub const PAD: u32 = 0;
/// Id of the piece that opens every sequence.
pub const START: u32 = 1;
/// Id of the piece that hides another one in training.
pub const MASK: u32 = 2;
/// Characters of a text that are looked at; what follows cannot matter within any sequence that models take.
pub const MAX_CHARACTERS: usize = 4096;

const SPECIAL: [&str; 3] = ["[PAD]", "[START]", "[MASK]"];
/// Special pieces and the 256 bytes.
const SMALLEST: usize = SPECIAL.len() + 256;
/// Longest piece in bytes: a whole word, but no whole sentence.
const LONGEST_PIECE: usize = 18;

/// One text as piece ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// [`START`] and the pieces of the text.
    pub ids: Vec<u32>,
    /// True when the end of the text did not fit.
    pub truncated: bool,
}

/// Texts padded to the longest of them.
#[derive(Clone, Debug)]
pub struct TextBatch {
    /// Piece ids `[B, L]` `u32`, [`PAD`] behind the end.
    pub ids: Tensor,
    /// `[B, L]` `f32`: 1 for pieces, 0 for padding.
    pub mask: Tensor,
    /// Which texts lost their end.
    pub truncated: Vec<bool>,
}

impl TextBatch {
    /// Pads `rows` to the longest and puts them onto `device`.
    ///
    /// # Errors
    /// No rows, or a device without memory.
    pub fn new(rows: &[Tokens], device: &Device) -> candle_core::Result<Self> {
        let length = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        if length == 0 {
            candle_core::bail!("text batch: no tokens, expected at least one text");
        }
        let mut ids = vec![PAD; rows.len() * length];
        let mut mask = vec![0f32; ids.len()];
        for (row, tokens) in rows.iter().enumerate() {
            let span = row * length..row * length + tokens.ids.len();
            ids[span.clone()].copy_from_slice(&tokens.ids);
            mask[span].fill(1.0);
        }
        Ok(Self {
            ids: Tensor::from_vec(ids, (rows.len(), length), device)?,
            mask: Tensor::from_vec(mask, (rows.len(), length), device)?.to_dtype(DType::F32)?,
            truncated: rows.iter().map(|row| row.truncated).collect(),
        })
    }
}

/// A learnt vocabulary.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TextTokenizer({} pieces)", self.vocabulary())
    }
}

impl TextTokenizer {
    /// Learns at most `vocabulary` pieces from `sentences`. The same sentences give the same pieces.
    ///
    /// # Errors
    /// A vocabulary that cannot hold the single bytes.
    pub fn train<S: AsRef<str> + Sync>(sentences: &[S], vocabulary: usize) -> Result<Self> {
        if vocabulary < SMALLEST {
            let message = format!("vocabulary: found {vocabulary}, expected {SMALLEST} or more");
            return Err(TextError::Tokenizer(message));
        }
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(vocabulary)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(SPECIAL.iter().map(|&text| AddedToken::from(text, true)).collect())
            .max_token_length(Some(LONGEST_PIECE))
            .build()
            .into();
        let mut inner = Tokenizer::new(BPE::default());
        let steps = vec![NFKD.into(), StripAccents.into(), Lowercase.into()];
        inner
            .with_normalizer(Some(Sequence::new(steps)))
            .map_err(|error| TextError::Tokenizer(error.to_string()))?
            .with_pre_tokenizer(Some(ByteLevel::default()))
            .with_decoder(Some(ByteLevel::default()));
        inner
            .train(&mut trainer, sentences.iter().map(AsRef::as_ref))
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        Self::checked(inner)
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// The file is missing or broken, or is not a vocabulary of this module.
    pub fn load(path: &Path) -> Result<Self> {
        let (path, bytes) = super::read(path.to_path_buf())?;
        Self::from_bytes(&bytes).map_err(|error| TextError::Field {
            path,
            field: "vocabulary".into(),
            found: error.to_string(),
            expected: "a byte-level vocabulary".into(),
        })
    }

    /// Reads the contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`TextTokenizer::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let inner = Tokenizer::from_bytes(bytes).map_err(|error| TextError::Tokenizer(error.to_string()))?;
        Self::checked(inner)
    }

    fn checked(mut inner: Tokenizer) -> Result<Self> {
        for (id, text) in SPECIAL.iter().enumerate() {
            let found = inner.token_to_id(text);
            if found != Some(id as u32) {
                return Err(TextError::Tokenizer(format!(
                    "{text}: found id {found:?}, expected {id}"
                )));
            }
        }
        // A prompt that spells out "[MASK]" means these letters.
        inner.set_encode_special_tokens(true);
        inner
            .with_truncation(None)
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner })
    }

    /// The contents of `tokenizer.json`.
    ///
    /// # Errors
    /// The vocabulary cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        self.inner
            .to_string(false)
            .map_err(|error| TextError::Tokenizer(error.to_string()))
    }

    /// Number of pieces.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Writes `text` as [`START`] and at most `max_tokens - 1` pieces. Any text is accepted.
    ///
    /// # Errors
    /// The vocabulary does not cover its own bytes (a damaged file).
    pub fn encode(&self, text: &str, max_tokens: usize) -> Result<Tokens> {
        let end = text.char_indices().nth(MAX_CHARACTERS).map(|(at, _)| at);
        let head = text[..end.unwrap_or(text.len())].trim();
        let encoding = self
            .inner
            .encode_fast(head, false)
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let room = max_tokens.max(1) - 1;
        let pieces = encoding.get_ids();
        let mut ids = Vec::with_capacity(1 + pieces.len().min(room));
        ids.push(START);
        ids.extend_from_slice(&pieces[..pieces.len().min(room)]);
        let cut = end.is_some_and(|end| !text[end..].trim().is_empty());
        Ok(Tokens {
            ids,
            truncated: cut || pieces.len() > room,
        })
    }

    /// The text that `ids` stand for, without special pieces; lower case, single accents lost.
    ///
    /// # Errors
    /// None in practice; the decoder's own.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self
            .inner
            .decode(ids, true)
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        Ok(text.trim_start().to_owned())
    }

    /// Encodes and pads `texts`.
    ///
    /// # Errors
    /// No texts; as [`TextTokenizer::encode`].
    pub fn batch<S: AsRef<str>>(&self, texts: &[S], max_tokens: usize, device: &Device) -> Result<TextBatch> {
        let rows: Vec<Tokens> = texts
            .iter()
            .map(|text| self.encode(text.as_ref(), max_tokens))
            .collect::<Result<_>>()?;
        Ok(TextBatch::new(&rows, device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentences() -> Vec<String> {
        let things = ["dog", "crow", "violin", "kettle", "train"];
        let sounds = ["barks", "caws", "plays", "whistles", "rattles"];
        let moves = [
            "drops in from the left",
            "slides in from the right",
            "bounces near the end",
        ];
        let mut all = Vec::new();
        for thing in things {
            for sound in sounds {
                all.extend(
                    moves
                        .iter()
                        .map(|motion| format!("a {thing} {sound} as it {motion}")),
                );
            }
        }
        all
    }

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::train(&sentences(), 400).unwrap()
    }

    #[test]
    fn training_is_deterministic_and_common_words_are_single_pieces() -> Result<()> {
        let first = tokenizer();
        assert_eq!(first.to_json()?, tokenizer().to_json()?);
        assert!(first.vocabulary() <= 400);
        assert_eq!(first.encode("a dog barks", 48)?.ids.len(), 4);
        Ok(())
    }

    #[test]
    fn texts_come_back() -> Result<()> {
        let tokenizer = tokenizer();
        for (text, expected) in [
            ("a dog barks", "a dog barks"),
            ("  A DOG, barks! ", "a dog, barks!"),
            ("Caf\u{e9} na\u{ef}ve", "cafe naive"),
            ("zebra \u{1f993} 7%", "zebra \u{1f993} 7%"),
            ("\u{72ac}\u{304c}\u{5420}", "\u{72ac}\u{304b}\u{5420}"),
            ("[MASK] [PAD]", "[mask] [pad]"),
            ("", ""),
        ] {
            let tokens = tokenizer.encode(text, 200)?;
            assert_eq!((tokens.ids[0], tokens.truncated), (START, false), "{text:?}");
            assert!(tokens.ids[1..].iter().all(|&id| id > MASK), "{text:?}");
            assert_eq!(tokenizer.decode(&tokens.ids)?, expected);
        }
        Ok(())
    }

    #[test]
    fn any_text_is_bounded() -> Result<()> {
        let tokenizer = tokenizer();
        let long = "dog ".repeat(10_000);
        let odd: String = (0..0x3000).filter_map(char::from_u32).collect();
        for text in [
            long.as_str(),
            &odd,
            &"a".repeat(1 << 20),
            "\u{0}\u{ffff}\u{10ffff}\u{202e}",
            "\n\t \r",
        ] {
            for max_tokens in [0, 1, 2, 48] {
                let tokens = tokenizer.encode(text, max_tokens)?;
                assert!((1..=max_tokens.max(1)).contains(&tokens.ids.len()));
                assert!(
                    tokens
                        .ids
                        .iter()
                        .all(|&id| (id as usize) < tokenizer.vocabulary())
                );
            }
        }
        assert!(tokenizer.encode(&long, 48)?.truncated);
        assert!(!tokenizer.encode("a dog barks", 48)?.truncated);
        let padded = format!("a dog barks{}", " ".repeat(2 * MAX_CHARACTERS));
        assert!(!tokenizer.encode(&padded, 48)?.truncated);
        Ok(())
    }

    #[test]
    fn saved_vocabulary_reads_back_and_broken_ones_are_named() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let tokenizer = tokenizer();
        std::fs::write(&path, tokenizer.to_json()?).unwrap();
        let text = "an unheard-of word [PAD]";
        assert_eq!(
            TextTokenizer::load(&path)?.encode(text, 48)?,
            tokenizer.encode(text, 48)?
        );

        for broken in ["", "{}", "{\"version\": \"1.0\", \"model\": {}}", "\u{1f415}"] {
            std::fs::write(&path, broken).unwrap();
            let message = TextTokenizer::load(&path).unwrap_err().to_string();
            assert!(
                message.contains("tokenizer.json") && !message.contains('\n'),
                "{message}"
            );
        }
        assert!(TextTokenizer::load(&folder.path().join("absent.json")).is_err());
        assert!(TextTokenizer::train(&sentences(), 100).is_err());
        Ok(())
    }
}
