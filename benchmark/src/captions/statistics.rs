//! What a data set is made of: lengths, words, sentences, parts, sizes and rates.

use std::collections::BTreeMap;

use serde::Serialize;

use super::record::Record;
use super::split::Rule;
use super::tally::{Figures, Tally};
use super::words::{sentences, words};

/// Different values of a field that are counted each for itself; more than that are counted together.
const MOST_KEYS: usize = 1000;
/// The name under which they are.
const OTHERS: &str = "other";
const MS_AN_HOUR: f64 = 3_600_000.0;

/// Counts of a field's values.
pub type Shares = BTreeMap<String, u64>;

/// Statistics under way.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Lengths of clips in ms.
    pub lengths: Tally,
    /// Words of each caption that is not empty.
    pub words: Tally,
    /// Sentences of each of them.
    pub sentences: Tally,
    unknown_length: u64,
    splits: Shares,
    flags: Shares,
    fps: Shares,
    sizes: Shares,
    sample_rates: Shares,
}

/// Statistics in figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Sum of the clips' lengths, in hours.
    pub hours: f64,
    /// Lengths of clips in seconds.
    pub duration_s: Figures,
    /// Clips whose length is not known.
    pub unknown_length: u64,
    /// Words a caption.
    pub words: Figures,
    /// Sentences a caption.
    pub sentences: Figures,
    /// Clips of each part: as the manifest says, else by the rule of [`Rule`].
    pub splits: Shares,
    /// Clips with each flag.
    pub flags: Shares,
    /// Clips of each rate in frames per second, where the manifest has it.
    pub fps: Shares,
    /// Clips of each size.
    pub sizes: Shares,
    /// Clips of each sample rate in Hz.
    pub sample_rates: Shares,
}

impl Statistics {
    /// Counts a clip.
    pub fn add(&mut self, record: &Record) {
        match record.length_ms() {
            Some(ms) => self.lengths.add(ms),
            None => self.unknown_length += 1,
        }
        if let Some(caption) = record.caption_text() {
            self.words.add(words(caption) as u64);
            self.sentences.add(sentences(caption) as u64);
        }
        let split = match (&record.split, &record.video_id) {
            (Some(split), _) => split,
            (None, Some(video)) => Rule::default().part(video).name(),
            (None, None) => Rule::default().part(&record.id).name(),
        };
        count(&mut self.splits, split);
        for flag in &record.flags {
            count(&mut self.flags, flag);
        }
        if let Some(fps) = record.fps {
            let text = format!("{fps:.2}");
            count(&mut self.fps, text.trim_end_matches('0').trim_end_matches('.'));
        }
        if let (Some(width), Some(height)) = (record.width, record.height) {
            count(&mut self.sizes, &format!("{width}x{height}"));
        }
        if let Some(rate) = record.sample_rate {
            count(&mut self.sample_rates, &rate.to_string());
        }
    }

    /// The figures.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            hours: self.lengths.sum() as f64 / MS_AN_HOUR,
            duration_s: self.lengths.figures(1e-3),
            unknown_length: self.unknown_length,
            words: self.words.figures(1.0),
            sentences: self.sentences.figures(1.0),
            splits: self.splits.clone(),
            flags: self.flags.clone(),
            fps: self.fps.clone(),
            sizes: self.sizes.clone(),
            sample_rates: self.sample_rates.clone(),
        }
    }
}

fn count(shares: &mut Shares, key: &str) {
    if let Some(known) = shares.get_mut(key) {
        *known += 1;
        return;
    }
    let key = if shares.len() < MOST_KEYS { key } else { OTHERS };
    *shares.entry(key.to_owned()).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_records() {
        let mut statistics = Statistics::default();
        for line in [
            r#"{"id":"P2RPnCJZMBo_0_10000","caption":"A dog barks. It runs.","fps":29.97003,"width":64,"height":36,"sample_rate":16000}"#,
            r#"{"id":"P2RPnCJZMBo_0_20000","caption":"  ","fps":30.0,"width":64,"height":36,"flags":["silent"]}"#,
            r#"{"id":"x","duration_s":0.5,"caption":"One bell rings","split":"test"}"#,
            r#"{"id":"y"}"#,
        ] {
            statistics.add(&Record::parse(line).unwrap());
        }
        let summary = statistics.summary();
        assert!((summary.hours - 30.5 / 3600.0).abs() < 1e-12);
        assert_eq!((summary.duration_s.n, summary.unknown_length), (3, 1));
        assert_eq!(
            (summary.duration_s.min, summary.duration_s.median),
            (Some(0.5), Some(10.0))
        );
        assert_eq!((summary.words.n, summary.words.mean), (2, Some(4.0)));
        assert_eq!(summary.sentences.mean, Some(1.0));
        let shares = |shares: &Shares| -> Vec<(String, u64)> { shares.clone().into_iter().collect() };
        assert_eq!(
            shares(&summary.fps),
            [("29.97".to_owned(), 1), ("30".to_owned(), 1)]
        );
        assert_eq!(shares(&summary.sizes), [("64x36".to_owned(), 2)]);
        assert_eq!(shares(&summary.sample_rates), [("16000".to_owned(), 1)]);
        assert_eq!(shares(&summary.flags), [("silent".to_owned(), 1)]);
        assert_eq!(
            shares(&summary.splits),
            [("test".to_owned(), 1), ("train".to_owned(), 3)]
        );
    }

    #[test]
    fn fields_of_endless_values_take_bounded_memory() {
        let mut shares = Shares::new();
        for i in 0..5000 {
            count(&mut shares, &i.to_string());
        }
        assert_eq!(
            (shares.len(), shares[OTHERS]),
            (MOST_KEYS + 1, 5000 - MOST_KEYS as u64)
        );
    }
}
