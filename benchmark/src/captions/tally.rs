//! Counts of whole numbers in fixed memory: mean, percentiles and histograms of millions of values.
//!
//! Numbers below 2^16 are counted exactly, each for itself. Larger ones share cells of 1/1024 of their size, so that a
//! percentile is off by less than 0.1 %. Cells are made when they are needed; all of them take 0.9 MB.

use serde::Serialize;

/// Numbers below 2^EXACT are counted for themselves.
const EXACT: u32 = 16;
/// Larger ones share 2^FINE cells between a power of two and the next.
const FINE: u32 = 10;

/// Counted numbers.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    cells: Vec<u64>,
    count: u64,
    sum: u128,
    least: u64,
    most: u64,
}

/// Figures of a tally; those of nothing are absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Numbers that were counted.
    pub n: u64,
    /// Their mean.
    pub mean: Option<f64>,
    /// The smallest.
    pub min: Option<f64>,
    /// Percentiles, interpolated between neighbours as NumPy does by default.
    pub p5: Option<f64>,
    /// The first quartile.
    pub p25: Option<f64>,
    /// The median.
    pub median: Option<f64>,
    /// The third quartile.
    pub p75: Option<f64>,
    /// Percentile 95.
    pub p95: Option<f64>,
    /// Percentile 99.
    pub p99: Option<f64>,
    /// The largest.
    pub max: Option<f64>,
}

impl Tally {
    /// Counts a number.
    pub fn add(&mut self, value: u64) {
        let cell = cell_of(value);
        if cell >= self.cells.len() {
            self.cells.resize(cell + 1, 0);
        }
        self.cells[cell] += 1;
        self.least = if self.count == 0 {
            value
        } else {
            self.least.min(value)
        };
        self.most = self.most.max(value);
        self.count += 1;
        self.sum += u128::from(value);
    }

    /// Numbers that were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their sum.
    #[must_use]
    pub fn sum(&self) -> u128 {
        self.sum
    }

    /// Their mean.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum as f64 / self.count as f64)
    }

    /// The quantile `part` in 0..=1, interpolated between neighbours.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<f64> {
        if self.count == 0 || !(0.0..=1.0).contains(&part) {
            return None;
        }
        let place = part * (self.count - 1) as f64;
        let (below, rest) = (place.floor(), place - place.floor());
        let low = self.at(below as u64);
        let high = self.at((below as u64).saturating_add(u64::from(rest > 0.0)));
        Some(low + rest * (high - low))
    }

    /// The number at a place, from 0, when all are in order.
    fn at(&self, place: u64) -> f64 {
        let mut before = 0;
        for (cell, count) in self.cells.iter().enumerate() {
            before += count;
            if before > place {
                // Cells of several numbers are shown by their middle, within what was counted.
                let (first, last) = (first_of(cell), first_of(cell + 1) - 1);
                let middle = first + (last - first) / 2;
                return middle.clamp(self.least, self.most) as f64;
            }
        }
        self.most as f64
    }

    /// All figures, each multiplied by `unit`.
    #[must_use]
    pub fn figures(&self, unit: f64) -> Figures {
        let quantile = |part| self.quantile(part).map(|value| value * unit);
        let bound = |value: u64| (self.count > 0).then_some(value as f64 * unit);
        Figures {
            n: self.count,
            mean: self.mean().map(|mean| mean * unit),
            min: bound(self.least),
            p5: quantile(0.05),
            p25: quantile(0.25),
            median: quantile(0.5),
            p75: quantile(0.75),
            p95: quantile(0.95),
            p99: quantile(0.99),
            max: bound(self.most),
        }
    }

    /// A histogram of at most `bins` equal bins over whole numbers, from the smallest to the 99.5th percentile: the first
    /// number of each bin and how many fell into it, then the end of the last bin with what lies beyond.
    #[must_use]
    pub fn histogram(&self, bins: u64) -> Vec<(u64, u64)> {
        let Some(high) = self.quantile(0.995).filter(|_| bins > 0) else {
            return Vec::new();
        };
        let (low, high) = (self.least, (high.ceil() as u64).max(self.least));
        let width = ((high - low + 1).div_ceil(bins)).max(1);
        let filled = (high - low + 1).div_ceil(width);
        let mut counts: Vec<(u64, u64)> = (0..=filled).map(|bin| (low + bin * width, 0)).collect();
        for (cell, count) in self.cells.iter().enumerate().filter(|(_, count)| **count > 0) {
            let bin = (first_of(cell).max(low) - low) / width;
            counts[bin.min(filled) as usize].1 += count;
        }
        counts
    }
}

fn cell_of(value: u64) -> usize {
    if value < 1 << EXACT {
        return value as usize;
    }
    let power = value.ilog2();
    let fine = (value >> (power - FINE)) - (1 << FINE);
    (1 << EXACT) + (((power - EXACT) as usize) << FINE) + fine as usize
}

/// The smallest number of a cell.
fn first_of(cell: usize) -> u64 {
    let Some(above) = cell.checked_sub(1 << EXACT) else {
        return cell as u64;
    };
    let power = EXACT + (above >> FINE) as u32;
    let fine = (above & ((1 << FINE) - 1)) as u64;
    // The cell behind the last one begins where numbers end.
    ((1 << FINE) + fine)
        .checked_shl(power - FINE)
        .filter(|_| power < u64::BITS)
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(values: &[u64]) -> Tally {
        let mut tally = Tally::default();
        values.iter().for_each(|value| tally.add(*value));
        tally
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // numpy.percentile([1, 2, 4, 8], [0, 25, 50, 95, 100])
        let four = tally(&[8, 1, 4, 2]);
        for (part, value) in [(0.0, 1.0), (0.25, 1.75), (0.5, 3.0), (0.95, 7.4), (1.0, 8.0)] {
            assert!((four.quantile(part).unwrap() - value).abs() < 1e-12, "{part}");
        }
        assert_eq!(four.mean(), Some(3.75));
        assert_eq!(tally(&[7]).quantile(0.5), Some(7.0));
        assert_eq!(tally(&[]).quantile(0.5), None);
        assert_eq!(four.quantile(f64::NAN), None);
    }

    #[test]
    fn every_number_has_a_cell_that_is_close_to_it() {
        let mut before = 0;
        for power in 0..64 {
            for offset in [0u64, 1, 12_345] {
                let value = (1u64 << power) + offset % (1u64 << power);
                let cell = cell_of(value);
                let (first, next) = (first_of(cell), first_of(cell + 1));
                assert!(first <= value && (value < next || next == u64::MAX), "{value}");
                assert!((next - first) as f64 <= 1.0 + value as f64 / 1000.0, "{value}");
                if value >= before {
                    assert!(cell >= cell_of(before));
                }
                before = value;
            }
        }
        assert!(cell_of(u64::MAX) < 120_000);
        let huge = tally(&[u64::MAX, u64::MAX]);
        assert_eq!(huge.sum(), 2 * u128::from(u64::MAX));
        assert_eq!(huge.quantile(0.5), Some(u64::MAX as f64));
    }

    #[test]
    fn figures_are_in_their_unit_and_absent_without_numbers() {
        let seconds = tally(&[9000, 10_000, 11_000]).figures(1e-3);
        assert_eq!(
            (seconds.n, seconds.min, seconds.median, seconds.max),
            (3, Some(9.0), Some(10.0), Some(11.0))
        );
        let none = tally(&[]).figures(1.0);
        assert_eq!((none.n, none.mean, none.min, none.p99), (0, None, None, None));
    }

    #[test]
    fn histograms_hold_every_number_once() {
        let mut tally = Tally::default();
        for i in 0..1000 {
            tally.add(100 + i % 50);
        }
        tally.add(1_000_000);
        let bins = tally.histogram(10);
        assert_eq!((bins.len(), bins[0], bins[9]), (11, (100, 100), (145, 100)));
        assert_eq!(bins[10], (150, 1));
        assert_eq!(bins.iter().map(|bin| bin.1).sum::<u64>(), tally.count());
        let one = tally_of_one().histogram(40);
        assert_eq!(one, [(10_000, 5), (10_001, 0)]);
        assert!(Tally::default().histogram(40).is_empty());
    }

    fn tally_of_one() -> Tally {
        tally(&[10_000; 5])
    }
}
