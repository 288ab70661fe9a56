//! The data set TAVGBench: its caption file, manifests of clips, the split into parts, statistics, and the clips themselves.
//!
//! The release is one text file of captions (about 1.7 million lines); the clips are cut from media that the user has.
//! [`Captions`] reads the caption file, [`Manifest`] the JSON lines that every later step works on, and [`Clips`] either
//! of them. All of it streams: what stays in memory is a 64-bit hash a record, so that a name that comes again is known.
//!
//! ```
//! use fulgur_benchmark::captions::Captions;
//! let text = "P2RPnCJZMBo_290000_300000.mp4 A dog barks at a ball.\n";
//! let mut captions = Captions::new("release.txt", text.as_bytes());
//! let clip = captions.next_clip()?.unwrap();
//! assert_eq!((clip.video_id.as_deref(), clip.start_ms), (Some("P2RPnCJZMBo"), Some(290_000)));
//! assert!(captions.next_clip()?.is_none());
//! assert_eq!(captions.counts().records, 1);
//! # Ok::<(), fulgur_benchmark::captions::CaptionError>(())
//! ```

mod clips;
mod counts;
pub mod csv;
#[cfg(feature = "media")]
pub mod cut;
mod error;
mod json;
mod lines;
mod manifest;
mod parser;
mod record;
pub mod split;
pub mod statistics;
pub mod synthetic;
pub mod tally;
mod token;
#[cfg(feature = "media")]
pub mod verify;
mod words;

pub use clips::Clips;
pub use counts::{Counts, Example, Problem};
pub use error::CaptionError;
pub(crate) use json::fields as json_fields;
pub(crate) use lines::{Line, Lines};
pub use manifest::{Manifest, ManifestWriter};
pub use parser::Captions;
pub(crate) use parser::{Seen, hash};
pub use record::{Provenance, Record};
pub use token::{Refusal, Token};
pub use words::{sentences, words};
