//! Text for language models: documents in files, and what makes a corpus of them.
//!
//! [`documents`] reads text and JSONL, [`rules`] says which documents are no prose, [`duplicates`] which were there before, [`clean()`]
//! does all of it in one pass. [`markup`] turns HTML and reStructuredText into text. [`Recall`]
//! draws examples of associative recall.

mod clean;
pub mod documents;
pub mod duplicates;
pub mod markup;
mod recall;
pub mod rules;
mod split;

pub use clean::{CleanError, Cleaned, Options, Reason, Scorer, Scores, clean};
pub use documents::{Documents, Rows, TextError};
pub use recall::{Recall, RecallError, RecallExample};
pub use split::Split;
