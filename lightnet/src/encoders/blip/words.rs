//! The vocabulary of a captioner: `tokenizer.json`, or the word pieces of BERT in `vocab.txt`, beside the weights.

use std::path::{Path, PathBuf};

use tokenizers::decoders::wordpiece::{WordPiece as Joined, cleanup};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, Tokenizer};

use crate::params::file;

/// Largest file that is read.
const LARGEST: u64 = 64 << 20;
const FAST: &str = "tokenizer.json";
const PLAIN: &str = "vocab.txt";
/// Pieces that are no words, and the piece of words that are not known.
const SPECIAL: [&str; 7] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"];
const UNKNOWN: &str = "[UNK]";

/// A vocabulary that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct WordsError {
    path: PathBuf,
    reason: String,
}

/// A vocabulary.
#[derive(Clone, Debug)]
pub struct Words {
    tokenizer: Tokenizer,
    path: PathBuf,
}

impl Words {
    /// Looks for the vocabulary in a folder.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn find(dir: &Path) -> Result<Self, WordsError> {
        let (fast, plain) = (dir.join(FAST), dir.join(PLAIN));
        let (path, found) = if fast.is_file() {
            let found = bytes(&fast)?;
            (
                fast,
                Tokenizer::from_bytes(found).map_err(|error| error.to_string()),
            )
        } else if plain.is_file() {
            let found = bytes(&plain)?;
            (plain, of_pieces(&found))
        } else {
            return Err(WordsError {
                path: dir.to_owned(),
                reason: format!("found no vocabulary, expected {FAST} or {PLAIN}"),
            });
        };
        match found {
            Ok(mut tokenizer) => {
                // A file may ask for texts of one length.
                tokenizer.with_padding(None);
                Ok(Self { tokenizer, path })
            }
            Err(reason) => Err(WordsError { path, reason }),
        }
    }

    /// The tokens of a text, without a beginning and an end.
    ///
    /// # Errors
    /// The tokenizer refuses it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, WordsError> {
        match self.tokenizer.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(self.refuse(&*error)),
        }
    }

    /// The text of tokens; those that are no words, and those that the vocabulary does not have, are left out.
    ///
    /// # Errors
    /// The tokenizer refuses them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, WordsError> {
        match self.tokenizer.decode(tokens, true) {
            // Points and apostrophes stand against their words, also where they are tokens of their own.
            Ok(text) => Ok(cleanup(&text)),
            Err(error) => Err(self.refuse(&*error)),
        }
    }

    fn refuse(&self, error: &dyn std::fmt::Display) -> WordsError {
        WordsError {
            path: self.path.clone(),
            reason: error.to_string(),
        }
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, WordsError> {
    file::read_bounded(path, LARGEST).map_err(|error| {
        let words = error.to_string();
        // The file stands before the reason already.
        let reason = words
            .split_once(": ")
            .map_or(words.clone(), |(_, rest)| rest.to_owned());
        WordsError {
            path: path.to_owned(),
            reason,
        }
    })
}

/// The tokenizer of BERT with a piece a line.
fn of_pieces(bytes: &[u8]) -> Result<Tokenizer, String> {
    let vocabulary = WordPiece::read_bytes(bytes).map_err(|error| error.to_string())?;
    if !vocabulary.contains_key(UNKNOWN) {
        return Err(format!(
            "found {} pieces without {UNKNOWN}, expected the word pieces of BERT, one a line",
            vocabulary.len()
        ));
    }
    let special: Vec<AddedToken> = SPECIAL
        .iter()
        .filter(|piece| vocabulary.contains_key(**piece))
        .map(|piece| AddedToken::from(*piece, true))
        .collect();
    let model = WordPiece::builder()
        .vocab(vocabulary)
        .unk_token(UNKNOWN.to_owned())
        .build()
        .map_err(|error| error.to_string())?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::default()))
        .map_err(|error| error.to_string())?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(Joined::default()));
    tokenizer
        .add_special_tokens(special)
        .map_err(|error| error.to_string())?;
    Ok(tokenizer)
}
