//! How often a classifier is right: over all pictures and by class.

use serde::Serialize;

use super::model::ranked;
use crate::report::heat::HeatMaps;

/// Guesses beside the true classes, counted.
#[derive(Clone, Debug)]
pub struct Tally {
    /// By true class, then by the likeliest.
    confusion: Vec<Vec<u64>>,
    /// By true class: pictures whose class is among the five likeliest.
    among_five: Vec<u64>,
    /// Sum of the negative logarithms of the true classes' shares.
    nats: f64,
}

/// What was counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Pictures.
    pub n: u64,
    /// Share whose likeliest class is theirs, 0 to 1.
    pub top1: f64,
    /// Share whose class is among the five likeliest.
    pub top5: f64,
    /// Mean over classes of the first share, for sets in which some are rare.
    pub macro_top1: f64,
    /// Cross-entropy, in nats a picture.
    pub loss: f64,
    /// By class.
    pub classes: Vec<OfClass>,
    /// Pictures by true class, then by the likeliest.
    pub confusion: Vec<Vec<u64>>,
}

/// The figures of a class. Shares of no picture are absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OfClass {
    /// Its name.
    pub label: String,
    /// Pictures of it.
    pub n: u64,
    /// Share of them that is recognised.
    pub recall: Option<f64>,
    /// Share of the pictures taken for it that is of it.
    pub precision: Option<f64>,
    /// Share of them of which it is among the five likeliest.
    pub top5: Option<f64>,
    /// What it is most often taken for by mistake.
    pub mistaken_for: Option<String>,
}

impl Tally {
    /// Of nothing yet, for so many classes.
    #[must_use]
    pub fn new(classes: usize) -> Self {
        Self {
            confusion: vec![vec![0; classes]; classes],
            among_five: vec![0; classes],
            nats: 0.0,
        }
    }

    /// Counts a picture of a class, whose shares are these.
    ///
    /// # Panics
    /// The class is none of those.
    pub fn add(&mut self, class: usize, shares: &[f32]) {
        let order = ranked(shares);
        if let Some(&likeliest) = order.first() {
            self.confusion[class][likeliest] += 1;
        }
        self.among_five[class] += u64::from(order.iter().take(5).any(|&guess| guess == class));
        // The least share that f32 tells from zero.
        self.nats -= f64::from(shares[class].max(f32::MIN_POSITIVE)).ln();
    }

    /// The figures, with the names of the classes; none where nothing was counted.
    #[must_use]
    pub fn figures(&self, labels: &[String]) -> Option<Figures> {
        let share = |part: u64, of: u64| (of > 0).then(|| part as f64 / of as f64);
        let classes: Vec<OfClass> = labels
            .iter()
            .enumerate()
            .map(|(class, label)| {
                let row = &self.confusion[class];
                let (n, right) = (row.iter().sum(), row[class]);
                let taken = self.confusion.iter().map(|row| row[class]).sum();
                let wrong = (0..row.len()).filter(|&other| other != class && row[other] > 0);
                let mistaken = wrong.max_by_key(|&other| (row[other], std::cmp::Reverse(other)));
                OfClass {
                    label: label.clone(),
                    n,
                    recall: share(right, n),
                    precision: share(right, taken),
                    top5: share(self.among_five[class], n),
                    mistaken_for: mistaken.map(|other| labels[other].clone()),
                }
            })
            .collect();
        let n: u64 = classes.iter().map(|class| class.n).sum();
        let right = (0..labels.len()).map(|class| self.confusion[class][class]).sum();
        let recalls: Vec<f64> = classes.iter().filter_map(|class| class.recall).collect();
        Some(Figures {
            n,
            top1: share(right, n)?,
            top5: share(self.among_five.iter().sum(), n)?,
            macro_top1: recalls.iter().sum::<f64>() / recalls.len() as f64,
            loss: self.nats / n as f64,
            classes,
            confusion: self.confusion.clone(),
        })
    }
}

impl Figures {
    /// The confusion matrix as a picture, an SVG file: a row is a true class, its fields are the shares of what it is taken for.
    #[must_use]
    pub fn picture(&self) -> String {
        let labels: Vec<String> = self.classes.iter().map(|class| class.label.clone()).collect();
        let rows = self.confusion.iter().map(|row| {
            let n: u64 = row.iter().sum();
            let share = |&count: &u64| (count > 0).then(|| count as f64 / n as f64);
            row.iter().map(share).collect()
        });
        HeatMaps {
            title: format!("{} pictures, {:.2} % right", self.n, 100.0 * self.top1),
            across: "taken for".to_owned(),
            columns: labels.clone(),
            down: "true class".to_owned(),
            rows: labels,
            maps: vec![("per cent of the true class".to_owned(), rows.collect())],
        }
        .draw()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_counted_by_hand() {
        let labels: Vec<String> = ('a'..='g').map(String::from).collect();
        let mut tally = Tally::new(7);
        assert_eq!(tally.figures(&labels), None);
        // The classes in the order of their shares.
        let shares = |order: [usize; 7]| {
            let mut shares = vec![0.0; 7];
            for (place, class) in order.into_iter().enumerate() {
                shares[class] = [0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02][place];
            }
            shares
        };
        tally.add(0, &shares([0, 1, 2, 3, 4, 5, 6]));
        tally.add(0, &shares([1, 2, 3, 4, 0, 5, 6]));
        tally.add(0, &shares([1, 2, 3, 4, 5, 0, 6]));
        tally.add(0, &shares([6, 0, 1, 2, 3, 4, 5]));
        tally.add(1, &shares([1, 0, 2, 3, 4, 5, 6]));
        let figures = tally.figures(&labels).unwrap();
        assert_eq!((figures.n, figures.top1, figures.top5), (5, 0.4, 0.8));
        assert_eq!(figures.macro_top1, f64::midpoint(0.25, 1.0));
        let nats = -(0.4f64.ln() + 0.08f64.ln() + 0.05f64.ln() + 0.2f64.ln() + 0.4f64.ln()) / 5.0;
        assert!((figures.loss - nats).abs() < 1e-6);
        let of = |class: usize| &figures.classes[class];
        assert_eq!(
            (of(0).n, of(0).recall, of(0).precision, of(0).top5),
            (4, Some(0.25), Some(1.0), Some(0.75))
        );
        assert_eq!(of(0).mistaken_for.as_deref(), Some("b"));
        assert_eq!((of(1).recall, of(1).precision), (Some(1.0), Some(1.0 / 3.0)));
        assert_eq!(
            (of(2).n, of(2).recall, of(2).precision, of(2).mistaken_for.clone()),
            (0, None, None, None)
        );
        assert_eq!(of(6).precision, Some(0.0));
        let svg = figures.picture();
        assert!(svg.starts_with("<svg") && svg.contains("5 pictures, 40.00 % right"));
        // Two quarters and a half of the first class, all of the second.
        for number in [">25<", ">50<", ">100<"] {
            assert!(svg.contains(number), "{number}");
        }
    }
}
