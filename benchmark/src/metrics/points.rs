//! Vectors of features, one for each thing that is compared, and how far they are from one another.

use rayon::prelude::*;

/// Sums that run side by side, so that they fill the vector units.
const LANES: usize = 8;

/// Why features cannot be compared.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PointsError {
    /// Values that are no whole rows.
    #[error("features: found {found} values, expected rows of {width}")]
    Shape {
        /// Values.
        found: usize,
        /// Width of a row.
        width: usize,
    },
    /// A value that is none.
    #[error("features: found {found} in row {row}, expected finite numbers")]
    NotFinite {
        /// Which row.
        row: usize,
        /// The value.
        found: f64,
    },
    /// Not enough rows.
    #[error("features: found {found} rows, expected at least {expected}")]
    Few {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// Rows of two widths.
    #[error("features: found a width of {found}, expected {expected}")]
    Width {
        /// The width of the second ones.
        found: usize,
        /// The width of the first ones.
        expected: usize,
    },
    /// Eigenvalues that are not found, as happens where numbers are too large to be squared.
    #[error("features: found a covariance without eigenvalues, expected numbers that can be squared")]
    Eigen,
    /// A kernel that overflows.
    #[error("features: found a kernel that is not finite, expected numbers that can be cubed")]
    Kernel,
    /// A matrix that would take too much memory.
    #[error("features: found a covariance of {found} columns, expected at most {expected}")]
    Side {
        /// Its columns.
        found: usize,
        /// The most that are decomposed.
        expected: usize,
    },
}

/// Finite vectors of one width, one behind the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Points {
    width: usize,
    values: Vec<f64>,
}

impl Points {
    /// Rows of `width` values.
    ///
    /// # Errors
    /// They are no whole rows, or not finite.
    pub fn new(width: usize, values: Vec<f64>) -> Result<Self, PointsError> {
        if width == 0 || !values.len().is_multiple_of(width) {
            return Err(PointsError::Shape {
                found: values.len(),
                width,
            });
        }
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(Self { width, values }),
            Some(at) => Err(PointsError::NotFinite {
                row: at / width,
                found: values[at],
            }),
        }
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// All rows in order.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.values.chunks_exact(self.width)
    }

    /// Row `index`.
    ///
    /// # Panics
    /// There is none of this number.
    pub fn row(&self, index: usize) -> &[f64] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    /// The rows of these numbers, in their order.
    ///
    /// # Panics
    /// There is none of a number.
    #[must_use]
    pub fn select(&self, indices: &[usize]) -> Self {
        Self {
            width: self.width,
            values: indices
                .iter()
                .flat_map(|&index| self.row(index))
                .copied()
                .collect(),
        }
    }

    /// # Errors
    /// Fewer than so many rows.
    pub(super) fn at_least(&self, expected: usize) -> Result<(), PointsError> {
        match self.len() {
            found if found < expected => Err(PointsError::Few { found, expected }),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// The rows of `other` have another width.
    pub(super) fn beside(&self, other: &Self) -> Result<(), PointsError> {
        match other.width {
            found if found != self.width => Err(PointsError::Width {
                found,
                expected: self.width,
            }),
            _ => Ok(()),
        }
    }
}

/// A neighbour: which one, and how far away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Near {
    /// Its number.
    pub index: usize,
    /// Its distance.
    pub distance: f64,
}

/// The `count` nearest ones of a list of distances, the nearest first; of equal ones the first comes first.
pub fn nearest_of(distances: impl Iterator<Item = f64>, count: usize) -> Vec<Near> {
    let mut best: Vec<Near> = Vec::with_capacity(count + 1);
    for (index, distance) in distances.enumerate() {
        let place = best.partition_point(|near| near.distance <= distance);
        if place < count {
            best.insert(place, Near { index, distance });
            best.truncate(count);
        }
    }
    best
}

/// For each of `queries` the `count` nearest of `among`, by Euclidean distance.
///
/// # Errors
/// Rows of two widths.
pub fn nearest(queries: &Points, among: &Points, count: usize) -> Result<Vec<Vec<Near>>, PointsError> {
    among.beside(queries)?;
    let rows: Vec<&[f64]> = queries.rows().collect();
    Ok(rows
        .into_par_iter()
        .map(|query| {
            let mut best = nearest_of(among.rows().map(|row| square(query, row)), count);
            best.iter_mut()
                .for_each(|near| near.distance = near.distance.sqrt());
            best
        })
        .collect())
}

/// Square of the Euclidean distance.
pub(super) fn square(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a_rest, b_rest) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = (a_rest.remainder().iter().zip(b_rest.remainder()))
        .map(|(a, b)| (a - b) * (a - b))
        .sum();
    for (a, b) in a_rest.zip(b_rest) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (a - b) * (a - b);
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Sum of products.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a_rest, b_rest) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = (a_rest.remainder().iter().zip(b_rest.remainder()))
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_rest.zip(b_rest) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_come_in_the_order_of_their_distances() {
        let among = Points::new(2, vec![0.0, 0.0, 3.0, 4.0, 0.0, 1.0, 0.0, 1.0]).unwrap();
        let queries = Points::new(2, vec![0.0, 0.0, 3.0, 3.0]).unwrap();
        let found = nearest(&queries, &among, 3).unwrap();
        let order: Vec<Vec<usize>> = found
            .iter()
            .map(|near| near.iter().map(|near| near.index).collect())
            .collect();
        assert_eq!(order, [[0, 2, 3], [1, 2, 3]]);
        assert_eq!(
            (found[0][0].distance, found[0][1].distance, found[1][0].distance),
            (0.0, 1.0, 1.0)
        );
        assert!((found[1][1].distance - 13f64.sqrt()).abs() < 1e-12);
        // There are no more than there are.
        assert_eq!(nearest(&queries, &among, 9).unwrap()[1].len(), 4);
    }

    #[test]
    fn long_rows_are_summed_whole() {
        let a: Vec<f64> = (0..19).map(f64::from).collect();
        let b: Vec<f64> = a.iter().map(|value| 2.0 * value + 1.0).collect();
        let plain: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
        assert!((square(&a, &b) - plain).abs() < 1e-9);
        let plain: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
        assert!((dot(&a, &b) - plain).abs() < 1e-9);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let line = |error: PointsError| error.to_string();
        assert_eq!(
            line(Points::new(3, vec![0.0; 4]).unwrap_err()),
            "features: found 4 values, expected rows of 3"
        );
        assert!(Points::new(0, Vec::new()).is_err());
        let mut values = vec![0.0; 6];
        values[5] = f64::NAN;
        assert_eq!(
            line(Points::new(3, values).unwrap_err()),
            "features: found NaN in row 1, expected finite numbers"
        );
        let (two, three) = (
            Points::new(2, vec![0.0; 2]).unwrap(),
            Points::new(3, vec![0.0; 3]).unwrap(),
        );
        assert_eq!(
            line(nearest(&three, &two, 1).unwrap_err()),
            "features: found a width of 3, expected 2"
        );
        assert_eq!(
            line(two.at_least(2).unwrap_err()),
            "features: found 1 rows, expected at least 2"
        );
    }
}
