//! Documents that were there before: exactly, or nearly.
//!
//! Exact: SHA-256 of the words with one blank between them. Near: MinHash of the runs of [`WORDS`] words (lower case, letters and
//! digits alone), [`BANDS`] bands of [`ROWS`] minima. Documents that agree in a whole band are compared by all minima, whose
//! share that agrees estimates the Jaccard index of the runs; at [`ALIKE`] the later one is a duplicate. Two documents of index s
//! meet in a band with probability `1 - (1 - s^8)^16`: 0.62 at 0.7, 0.95 at 0.8, 0.9999 at 0.9. Hashes are fixed, so the
//! same documents in the same order give the same answer.

use std::collections::{HashMap, HashSet};

use sha2::{Digest, Sha256};

/// Words of a run.
pub const WORDS: usize = 5;
/// Bands of minima.
pub const BANDS: usize = 16;
/// Minima of a band.
pub const ROWS: usize = 8;
/// Share of minima that agree, from which on documents are near duplicates.
pub const ALIKE: f64 = 0.7;

const MINIMA: usize = BANDS * ROWS;

/// The hash of a document for exact comparison.
pub fn exact_hash(text: &str) -> [u8; 16] {
    let mut hasher = Sha256::new();
    for word in text.split_whitespace() {
        hasher.update(word.as_bytes());
        hasher.update(b" ");
    }
    let hash = hasher.finalize();
    std::array::from_fn(|at| hash[at])
}

/// The minima of a document; None where it has no words.
pub fn minima(text: &str) -> Option<Box<[u32; MINIMA]>> {
    let words: Vec<u64> = text.split_whitespace().filter_map(word_hash).collect();
    if words.is_empty() {
        return None;
    }
    let mut minima = Box::new([u32::MAX; MINIMA]);
    for run in words.windows(WORDS.min(words.len())) {
        let hash = run.iter().fold(0, |hash: u64, word| mixed(hash ^ word));
        for (index, least) in minima.iter_mut().enumerate() {
            // Multiply and shift by a factor of its own: a hash function for each minimum.
            let factor = mixed(index as u64 + 1) | 1;
            let add = mixed(!(index as u64));
            *least = (*least).min((hash.wrapping_mul(factor).wrapping_add(add) >> 32) as u32);
        }
    }
    Some(minima)
}

/// A hash of the letters and digits of a word in lower case; None of a word without any.
fn word_hash(word: &str) -> Option<u64> {
    let letters = word.chars().filter(|c| c.is_alphanumeric());
    let mut any = false;
    let hash = letters.flat_map(char::to_lowercase).fold(0, |hash, c| {
        any = true;
        mixed(hash ^ u64::from(c))
    });
    any.then_some(hash)
}

/// A bijection that spreads every bit over all (the finaliser of SplitMix64).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What documents were seen: about 1 kB for each, whatever its length.
#[derive(Debug, Default)]
pub struct Seen {
    exact: HashSet<[u8; 16]>,
    minima: Vec<[u32; MINIMA]>,
    /// Documents by the hash of a band of theirs.
    bands: HashMap<(u8, u64), Vec<u32>>,
}

impl Seen {
    /// Notes down an exact hash; false where it was there.
    pub fn insert_exact(&mut self, hash: [u8; 16]) -> bool {
        self.exact.insert(hash)
    }

    /// Notes down the minima of a document; false, and nothing is noted, where a near duplicate was there.
    pub fn insert_near(&mut self, minima: &[u32; MINIMA]) -> bool {
        let keys: [(u8, u64); BANDS] = std::array::from_fn(|band| {
            let rows = &minima[band * ROWS..][..ROWS];
            let hash = rows.iter().fold(0, |hash, &row| mixed(hash ^ u64::from(row)));
            (band as u8, hash)
        });
        let candidates = keys.iter().filter_map(|key| self.bands.get(key)).flatten();
        let alike = |&index: &u32| {
            let other = &self.minima[index as usize];
            let same = other.iter().zip(minima.iter()).filter(|(a, b)| a == b).count();
            same as f64 >= ALIKE * MINIMA as f64
        };
        if candidates.into_iter().any(alike) {
            return false;
        }
        let index = self.minima.len() as u32;
        for key in keys {
            self.bands.entry(key).or_default().push(index);
        }
        self.minima.push(*minima);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(from: usize, to: usize) -> String {
        (from..to).map(|i| format!("Word{i}, ")).collect()
    }

    fn near(a: &str, b: &str) -> bool {
        let mut seen = Seen::default();
        assert!(seen.insert_near(&minima(a).unwrap()));
        !seen.insert_near(&minima(b).unwrap())
    }

    #[test]
    fn the_estimate_is_the_jaccard_index() {
        // Of 396 and 396 runs, 296 are shared: an index of 296 / 496.
        let (a, b) = (minima(&words(0, 400)).unwrap(), minima(&words(100, 500)).unwrap());
        let same = a.iter().zip(b.iter()).filter(|(a, b)| a == b).count() as f64 / MINIMA as f64;
        assert!((same - 296.0 / 496.0).abs() < 0.13, "{same}");
    }

    #[test]
    fn small_changes_are_seen_through_and_other_texts_are_not() {
        let text = words(0, 400);
        assert!(near(&text, &text.to_uppercase().replace(',', ";")));
        assert!(near(&text, &words(10, 405)));
        assert!(!near(&text, &words(200, 600)));
        assert!(!near(&text, &words(1000, 1400)));
        assert!(minima(" ,;- ").is_none());
        assert!(near("two words", "Two words!"));
    }

    #[test]
    fn exact_copies_differ_in_white_space_alone() {
        let mut seen = Seen::default();
        assert!(seen.insert_exact(exact_hash("a b\nc")));
        assert!(!seen.insert_exact(exact_hash("  a b c\n")));
        assert!(seen.insert_exact(exact_hash("ab c")));
        assert!(seen.insert_exact(exact_hash("A b c")));
    }
}
