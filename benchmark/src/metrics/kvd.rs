//! Kernel distance of two sets of features: the unbiased squared maximum mean discrepancy with a cubic kernel (KID, arXiv
//! 1801.01401; KVD with features of videos).
//!
//! ```text
//! k(x, y) = (x.y / d + 1)^3
//! d = sum_{i /= j} k(x_i, x_j) / (m (m - 1)) + sum_{i /= j} k(y_i, y_j) / (n (n - 1)) - 2 sum k(x_i, y_j) / (m n)
//! ```
//!
//! Unlike the Frechet distance its expectation does not depend on how many features there are; it may be below zero.

use rayon::prelude::*;

use super::points::{Points, PointsError, dot};

/// The kernel distance of two sets, of two rows each at least; nothing is scaled.
///
/// ```
/// use fulgur_benchmark::metrics::{kvd::kvd, points::Points};
/// let a = Points::new(1, vec![0.0, 1.0])?;
/// let b = Points::new(1, vec![1.0, 1.0])?;
/// // Within a: 1; within b: 8; between: the mean of 1, 1, 8 and 8.
/// assert_eq!(kvd(&a, &b)?, 1.0 + 8.0 - 2.0 * 4.5);
/// # Ok::<(), fulgur_benchmark::metrics::points::PointsError>(())
/// ```
///
/// # Errors
/// Fewer rows, rows of two widths, or numbers whose cubes overflow.
pub fn kvd(a: &Points, b: &Points) -> Result<f64, PointsError> {
    a.beside(b)?;
    a.at_least(2)?;
    b.at_least(2)?;
    let (m, n) = (a.len() as f64, b.len() as f64);
    let between = sum(a.len(), |i| row_sum(a.row(i), b.rows()));
    let found = within(a) / (m * (m - 1.0)) + within(b) / (n * (n - 1.0)) - 2.0 * between / (m * n);
    if found.is_finite() {
        Ok(found)
    } else {
        Err(PointsError::Kernel)
    }
}

/// Sum over all pairs of different rows.
fn within(points: &Points) -> f64 {
    2.0 * sum(points.len(), |i| {
        row_sum(points.row(i), points.rows().skip(i + 1))
    })
}

/// Sum over rows, added up in their order whatever threads there are.
fn sum(rows: usize, of: impl Fn(usize) -> f64 + Sync + Send) -> f64 {
    let sums: Vec<f64> = (0..rows).into_par_iter().map(of).collect();
    sums.into_iter().sum()
}

fn row_sum<'a>(row: &[f64], others: impl Iterator<Item = &'a [f64]>) -> f64 {
    let width = row.len() as f64;
    others.map(|other| (dot(row, other) / width + 1.0).powi(3)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    fn features(n: usize, d: usize, name: &str) -> Points {
        let values = Philox::named(8, name).normals(n * d);
        Points::new(d, values.into_iter().map(f64::from).collect()).unwrap()
    }

    /// Both distances of every case of the golden file.
    #[test]
    fn distances_are_those_of_numpy_and_scipy() {
        let tensors = crate::features::testing::golden("distances");
        let points = |name: String| {
            let tensor = &tensors[&name];
            let values = tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            Points::new(tensor.dims()[1], values).unwrap()
        };
        for case in ["tall", "narrow", "flat", "mixed", "same", "square"] {
            let (x, y) = (
                points(format!("case.{case}.generated")),
                points(format!("case.{case}.reference")),
            );
            let answer = tensors[&format!("case.{case}.answer")].to_vec1::<f64>().unwrap();
            let found = [
                super::super::frechet::between(&x, &y).unwrap(),
                kvd(&x, &y).unwrap(),
            ];
            for (found, answer) in found.iter().zip(&answer) {
                assert!(
                    (found - answer).abs() < 1e-8 * answer.abs().max(1.0),
                    "{case}: {found} {answer}"
                );
            }
        }
    }

    #[test]
    fn halves_of_one_set_are_near_and_moved_ones_are_not() {
        let (a, b) = (features(300, 12, "a"), features(200, 12, "b"));
        let near = kvd(&a, &b).unwrap();
        assert!(near.abs() < 0.02, "{near}");
        let values = b.rows().flatten().map(|value| value + 1.0).collect();
        let moved = kvd(&a, &Points::new(12, values).unwrap()).unwrap();
        assert!(moved > 1.0, "{moved}");
        assert_eq!(kvd(&b, &a).unwrap().to_bits(), kvd(&b, &a).unwrap().to_bits());
    }

    #[test]
    fn what_has_no_distance_is_refused() {
        let line = |a: &Points, b: &Points| kvd(a, b).unwrap_err().to_string();
        let (one, two, wide) = (features(1, 3, "a"), features(2, 3, "a"), features(2, 4, "a"));
        assert_eq!(line(&one, &two), "features: found 1 rows, expected at least 2");
        assert_eq!(line(&two, &one), "features: found 1 rows, expected at least 2");
        assert_eq!(line(&two, &wide), "features: found a width of 4, expected 3");
        let huge = Points::new(1, vec![1e200, 1e200]).unwrap();
        assert_eq!(kvd(&huge, &huge), Err(PointsError::Kernel));
    }
}
