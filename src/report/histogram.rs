//! Histograms as plots: a staircase over equal bins.

use super::picture::{Framed, picture};
use super::svg::{Line, Plot, Stroke};

/// A histogram with its words.
#[derive(Clone, Debug)]
pub struct Histogram<'a> {
    /// What is counted, as a title.
    pub title: &'a str,
    /// What the values are, with their unit.
    pub values: &'a str,
    /// What falls into the bins.
    pub counted: &'a str,
    /// The first value of each bin and what fell into it; the last one is the end of the last bin, with what lies beyond.
    pub bins: &'a [(f64, u64)],
}

impl Histogram<'_> {
    /// An SVG file of its own. What lies beyond the last bin is told in the title.
    #[must_use]
    pub fn draw(&self) -> String {
        let mut points = Vec::with_capacity(2 * self.bins.len() + 1);
        let (end, bins) = match self.bins.split_last() {
            Some((end, bins)) => (*end, bins),
            None => ((0.0, 0), &[][..]),
        };
        let ends = bins.iter().skip(1).map(|bin| bin.0).chain([end.0]);
        if let Some(first) = bins.first() {
            points.push((first.0, 0.0));
        }
        for ((from, count), to) in bins.iter().zip(ends) {
            points.extend([(*from, *count as f64), (to, *count as f64)]);
        }
        if !points.is_empty() {
            points.push((end.0, 0.0));
        }
        let title = match end.1 {
            0 => self.title.to_owned(),
            beyond => format!("{} ({beyond} beyond)", self.title),
        };
        let line = Line {
            stroke: Stroke::Plain,
            points,
            ..Line::default()
        };
        let plot = Plot {
            title,
            lines: vec![line],
            ..Plot::default()
        };
        picture(&[Framed {
            plot: &plot,
            steps: self.values,
            values: self.counted,
        }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_become_a_staircase_that_ends_at_zero() {
        let svg = Histogram {
            title: "Lengths",
            values: "seconds",
            counted: "clips",
            bins: &[(0.0, 2), (5.0, 8), (10.0, 3)],
        }
        .draw();
        assert!(
            svg.starts_with("<svg xmlns=") && svg.contains("Lengths (3 beyond)"),
            "{svg}"
        );
        let d = svg.split("class=\"l c0\" d=\"M").nth(1).unwrap();
        let places: Vec<(f64, f64)> = d[..d.find('"').unwrap()]
            .split('L')
            .map(|pair| {
                let (x, y) = pair.split_once(' ').unwrap();
                (x.parse().unwrap(), y.parse().unwrap())
            })
            .collect();
        assert_eq!(places.len(), 6);
        let (zero, two, eight) = (places[0].1, places[1].1, places[3].1);
        assert!((zero - eight - 4.0 * (zero - two)).abs() < 0.5, "{places:?}");
        assert_eq!(
            (places[1].1, places[2].0, places[5].1),
            (places[2].1, places[3].0, zero)
        );
        let none = Histogram {
            title: "Nothing",
            values: "x",
            counted: "y",
            bins: &[],
        };
        assert!(!none.draw().contains("NaN"));
    }
}
