//! The Frechet distance of two sets of features, each taken for a Gaussian (FID, arXiv 1706.08500; FVD and FAD with other
//! features).
//!
//! ```text
//! d = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))
//! tr (S_1 S_2)^(1/2) = sum of sqrt(eigenvalues of R S_2 R^T),   S_1 = R^T R,   R = L^(1/2) V^T of the eigenvalues L of S_1
//! ```
//!
//! Covariances have the divisor n - 1. Nothing is added to their diagonals; eigenvalues that rounding has taken below zero count
//! as zero. The distance of finite samples is larger than that of what they were drawn from, by about a constant over n (arXiv
//! 1911.07023): distances are to be compared at equal n alone.

use rayon::prelude::*;

use super::eigen::{eigen, eigenvalues};
use super::points::{Points, PointsError, dot};

/// Eigenvalues of less than this part of the largest one are rounding.
const ROUNDING: f64 = 1e-10;
/// Columns of the largest matrix that is decomposed: half a gigabyte.
const MOST_COLUMNS: usize = 8192;

/// Mean and covariance of features.
#[derive(Clone, Debug)]
pub struct Gaussian {
    n: usize,
    mean: Vec<f64>,
    /// `[d, d]`.
    covariance: Vec<f64>,
    /// Eigenvalues, none below zero.
    values: Vec<f64>,
    /// Their vectors, a row each.
    vectors: Vec<f64>,
}

impl Gaussian {
    /// Of features, two of them at least.
    ///
    /// # Errors
    /// Fewer, or numbers too large to be squared.
    pub fn of(points: &Points) -> Result<Self, PointsError> {
        points.at_least(2)?;
        let (n, d) = (points.len(), points.width());
        let mut mean = vec![0.0; d];
        for row in points.rows() {
            mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        mean.iter_mut().for_each(|sum| *sum /= n as f64);
        // A row for each feature, so that products run along memory.
        let mut centred = vec![0.0; d * n];
        for (i, row) in points.rows().enumerate() {
            for (j, (value, mean)) in row.iter().zip(&mean).enumerate() {
                centred[j * n + i] = value - mean;
            }
        }
        let mut covariance = vec![0.0; d * d];
        covariance.par_chunks_mut(d).enumerate().for_each(|(i, row)| {
            let own = &centred[i * n..(i + 1) * n];
            for (value, other) in row.iter_mut().zip(centred.chunks_exact(n)) {
                *value = dot(own, other) / (n - 1) as f64;
            }
        });
        let found = eigen(&covariance, d)?;
        Ok(Self {
            n,
            mean,
            covariance,
            values: found.values.into_iter().map(|value| value.max(0.0)).collect(),
            vectors: found.vectors,
        })
    }

    /// How many features it is of.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Rank of the covariance, at most n - 1: eigenvalues that are no rounding.
    pub fn rank(&self) -> usize {
        let largest = self.values.iter().copied().fold(0.0, f64::max);
        let is_some = |value: &&f64| **value > ROUNDING * largest;
        self.values.iter().filter(is_some).count()
    }

    fn trace(&self) -> f64 {
        self.values.iter().sum()
    }
}

/// The Frechet distance of two Gaussians, 0 or more.
///
/// ```
/// use fulgur_benchmark::metrics::{frechet::{Gaussian, frechet}, points::Points};
/// let a = Gaussian::of(&Points::new(1, vec![-1.0, 1.0])?)?;
/// let b = Gaussian::of(&Points::new(1, vec![1.0, 5.0])?)?;
/// // Means 0 and 3, deviations sqrt(2) and sqrt(8): 9 + (sqrt(8) - sqrt(2))^2.
/// assert!((frechet(&a, &b)? - 11.0).abs() < 1e-12);
/// # Ok::<(), fulgur_benchmark::metrics::points::PointsError>(())
/// ```
///
/// # Errors
/// Features of two widths, or numbers too large to be squared.
pub fn frechet(a: &Gaussian, b: &Gaussian) -> Result<f64, PointsError> {
    let d = a.mean.len();
    if b.mean.len() != d {
        return Err(PointsError::Width {
            found: b.mean.len(),
            expected: d,
        });
    }
    let roots: Vec<f64> = a.values.iter().map(|value| value.sqrt()).collect();
    // Rows of R S_2: R is the vectors, each times the root of its value.
    let mut half = vec![0.0; d * d];
    half.par_chunks_mut(d).enumerate().for_each(|(i, out)| {
        let vector = &a.vectors[i * d..(i + 1) * d];
        for (value, row) in vector.iter().zip(b.covariance.chunks_exact(d)) {
            let value = value * roots[i];
            out.iter_mut()
                .zip(row)
                .for_each(|(out, other)| *out += value * other);
        }
    });
    let mut inner = vec![0.0; d * d];
    inner.par_chunks_mut(d).enumerate().for_each(|(i, out)| {
        let row = &half[i * d..(i + 1) * d];
        for ((out, vector), root) in out.iter_mut().zip(a.vectors.chunks_exact(d)).zip(&roots) {
            *out = root * dot(row, vector);
        }
    });
    // Rounding leaves the halves beside the diagonal a little apart.
    for i in 0..d {
        for j in 0..i {
            let mean = f64::midpoint(inner[i * d + j], inner[j * d + i]);
            (inner[i * d + j], inner[j * d + i]) = (mean, mean);
        }
    }
    let roots: f64 = eigenvalues(&inner, d)?
        .into_iter()
        .map(|value| value.max(0.0).sqrt())
        .sum();
    let apart: f64 = a.mean.iter().zip(&b.mean).map(|(a, b)| (a - b) * (a - b)).sum();
    Ok((apart + a.trace() + b.trace() - 2.0 * roots).max(0.0))
}

/// The Frechet distance of the Gaussians of two sets of features, of two rows each at least.
///
/// A set of no more rows than columns has a singular covariance, and the roots of eigenvalues that should be zero would add
/// up rounding. There the trace comes from the factors: with `S_1 = A^T A` and `S_2 = B^T B` it is the sum of the singular
/// values of `A B^T`, which are the positive eigenvalues of `[[0, A B^T], [B A^T, 0]]`.
///
/// # Errors
/// Fewer rows, rows of two widths, numbers too large to be squared, or more than 8192 columns to decompose.
pub fn between(a: &Points, b: &Points) -> Result<f64, PointsError> {
    a.beside(b)?;
    a.at_least(2)?;
    b.at_least(2)?;
    let d = a.width();
    let columns = if a.len() > d && b.len() > d {
        d
    } else {
        a.len().min(d) + b.len().min(d)
    };
    if columns > MOST_COLUMNS {
        return Err(PointsError::Side {
            found: columns,
            expected: MOST_COLUMNS,
        });
    }
    if a.len() > d && b.len() > d {
        return frechet(&Gaussian::of(a)?, &Gaussian::of(b)?);
    }
    let (a, b) = (Factor::of(a)?, Factor::of(b)?);
    let apart: f64 = a.mean.iter().zip(&b.mean).map(|(a, b)| (a - b) * (a - b)).sum();
    Ok((apart + a.trace() + b.trace() - 2.0 * a.nuclear(&b)?).max(0.0))
}

/// Mean of features, and rows whose products with themselves are their covariance.
struct Factor {
    mean: Vec<f64>,
    /// `[r, d]` with r the smaller one of rows and columns.
    rows: Vec<f64>,
}

impl Factor {
    fn of(points: &Points) -> Result<Self, PointsError> {
        let (n, d) = (points.len(), points.width());
        if n > d {
            let whole = Gaussian::of(points)?;
            let mut rows = whole.vectors;
            for (row, value) in rows.chunks_exact_mut(d).zip(&whole.values) {
                row.iter_mut().for_each(|entry| *entry *= value.sqrt());
            }
            return Ok(Self {
                mean: whole.mean,
                rows,
            });
        }
        let mut mean = vec![0.0; d];
        for row in points.rows() {
            mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        mean.iter_mut().for_each(|sum| *sum /= n as f64);
        let scale = 1.0 / ((n - 1) as f64).sqrt();
        let centre = |row: &[f64]| -> Vec<f64> {
            let both = row.iter().zip(&mean);
            both.map(|(value, mean)| (value - mean) * scale).collect()
        };
        let rows: Vec<f64> = points.rows().flat_map(centre).collect();
        Ok(Self { mean, rows })
    }

    fn trace(&self) -> f64 {
        dot(&self.rows, &self.rows)
    }

    /// Sum of the singular values of `A B^T`.
    fn nuclear(&self, other: &Self) -> Result<f64, PointsError> {
        let d = self.mean.len();
        let (p, q) = (self.rows.len() / d, other.rows.len() / d);
        let side = p + q;
        let mut matrix = vec![0.0; side * side];
        matrix[..p * side]
            .par_chunks_mut(side)
            .zip(self.rows.par_chunks(d))
            .for_each(|(out, row)| {
                for (value, other) in out[p..].iter_mut().zip(other.rows.chunks_exact(d)) {
                    *value = dot(row, other);
                }
            });
        for i in 0..p {
            for j in p..side {
                matrix[j * side + i] = matrix[i * side + j];
            }
        }
        let values = eigenvalues(&matrix, side)?;
        Ok(values.into_iter().filter(|value| *value > 0.0).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    type Matrix = Vec<Vec<f64>>;

    fn product(a: &Matrix, b: &Matrix) -> Matrix {
        let n = b.len();
        a.iter()
            .map(|row| {
                (0..b[0].len())
                    .map(|j| (0..n).map(|k| row[k] * b[k][j]).sum())
                    .collect()
            })
            .collect()
    }

    /// By elimination with pivots.
    fn inverse(a: &Matrix) -> Matrix {
        let n = a.len();
        let mut wide: Matrix = a
            .iter()
            .enumerate()
            .map(|(i, row)| {
                let unit = (0..n).map(|j| f64::from(u8::from(i == j)));
                row.iter().copied().chain(unit).collect()
            })
            .collect();
        for k in 0..n {
            let pivot = (k..n).max_by(|&i, &j| wide[i][k].abs().total_cmp(&wide[j][k].abs()));
            wide.swap(k, pivot.unwrap());
            let scale = wide[k][k];
            wide[k].iter_mut().for_each(|value| *value /= scale);
            let row = wide[k].clone();
            for (_, other) in wide.iter_mut().enumerate().filter(|(i, _)| *i != k) {
                let factor = other[k];
                other
                    .iter_mut()
                    .zip(&row)
                    .for_each(|(value, row)| *value -= factor * row);
            }
        }
        wide.into_iter().map(|row| row[n..].to_vec()).collect()
    }

    /// The square root of a matrix without eigenvalues: Denman and Beavers' iteration, on the product as it is.
    fn root(a: &Matrix) -> Matrix {
        let n = a.len();
        let mean = |a: &Matrix, b: &Matrix| -> Matrix {
            a.iter()
                .zip(b)
                .map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::midpoint(*a, *b)).collect())
                .collect()
        };
        let mut y = a.clone();
        let mut z: Matrix = (0..n)
            .map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect())
            .collect();
        for _ in 0..40 {
            (y, z) = (mean(&y, &inverse(&z)), mean(&z, &inverse(&y)));
        }
        y
    }

    /// Written down from the formula, with covariances of two passes and the root above.
    fn oracle(a: &Points, b: &Points) -> f64 {
        let d = a.width();
        let statistics = |points: &Points| -> (Vec<f64>, Matrix) {
            let n = points.len() as f64;
            let mean: Vec<f64> = (0..d)
                .map(|j| points.rows().map(|row| row[j]).sum::<f64>() / n)
                .collect();
            let entry = |i: usize, j: usize| {
                let products = points.rows().map(|row| (row[i] - mean[i]) * (row[j] - mean[j]));
                products.sum::<f64>() / (n - 1.0)
            };
            let covariance = (0..d).map(|i| (0..d).map(|j| entry(i, j)).collect()).collect();
            (mean, covariance)
        };
        let ((m1, s1), (m2, s2)) = (statistics(a), statistics(b));
        let both = root(&product(&s1, &s2));
        let trace = |m: &Matrix| (0..d).map(|i| m[i][i]).sum::<f64>();
        let apart: f64 = m1.iter().zip(&m2).map(|(a, b)| (a - b).powi(2)).sum();
        apart + trace(&s1) + trace(&s2) - 2.0 * trace(&both)
    }

    /// Correlated features: normals times a random matrix, moved.
    fn features(n: usize, d: usize, name: &str, moved: f64) -> Points {
        let mut draw = Philox::named(5, name);
        let mix = draw.normals(d * d);
        let values = (0..n).flat_map(|_| {
            let own = draw.normals(d);
            (0..d)
                .map(|i| {
                    let sum: f64 = (0..d)
                        .map(|j| f64::from(mix[i * d + j]) * f64::from(own[j]))
                        .sum();
                    sum + moved
                })
                .collect::<Vec<_>>()
        });
        Points::new(d, values.collect()).unwrap()
    }

    fn distance(a: &Points, b: &Points) -> f64 {
        frechet(&Gaussian::of(a).unwrap(), &Gaussian::of(b).unwrap()).unwrap()
    }

    #[test]
    fn distances_are_those_of_another_computation() {
        for (d, n, m, moved) in [
            (1, 5, 9, 0.5),
            (3, 20, 30, 0.0),
            (8, 60, 40, 1.0),
            (16, 200, 90, 0.1),
        ] {
            let (a, b) = (features(n, d, "a", 0.0), features(m, d, "b", moved));
            let (found, expected) = (distance(&a, &b), oracle(&a, &b));
            assert!(
                (found - expected).abs() < 1e-8 * expected.max(1.0),
                "{d}: {found} {expected}"
            );
            assert!((distance(&b, &a) - found).abs() < 1e-9 * found.max(1.0));
        }
    }

    /// Of equal means and covariances that commute, by hand; and of a set with itself, nothing.
    #[test]
    fn simple_cases_are_as_by_hand() {
        // Variances 2 and 8 along the axes, then exchanged: 2 (sqrt 8 - sqrt 2)^2.
        let corner = |x: f64, y: f64| vec![x, y, -x, -y, x, -y, -x, y];
        let scale = (3.0f64 / 4.0).sqrt();
        let a = Points::new(2, corner(2f64.sqrt() * scale, 8f64.sqrt() * scale)).unwrap();
        let b = Points::new(2, corner(8f64.sqrt() * scale, 2f64.sqrt() * scale)).unwrap();
        assert!((distance(&a, &b) - 4.0).abs() < 1e-12);
        let c = features(50, 6, "c", 0.0);
        assert!(distance(&c, &c) < 1e-9);
    }

    /// Fewer features than their width: the rank says so, and the distance is still that of the formula.
    #[test]
    fn few_features_have_little_rank() {
        let (few, many) = (features(5, 12, "few", 0.0), features(300, 12, "few", 0.0));
        let (a, b) = (Gaussian::of(&few).unwrap(), Gaussian::of(&many).unwrap());
        assert_eq!((a.n(), a.rank(), b.rank()), (5, 4, 12));
        // Variances 2 and 0 beside 8 and 6: (sqrt 8 - sqrt 2)^2 + 6, whichever comes first.
        let line = Points::new(2, vec![1.0, 0.0, -1.0, 0.0]).unwrap();
        let plane = |x: f64, y: f64| vec![x, y, -x, -y, x, -y, -x, y];
        let plane = Points::new(2, plane(6f64.sqrt(), 4.5f64.sqrt())).unwrap();
        assert_eq!(Gaussian::of(&line).unwrap().rank(), 1);
        for found in [distance(&line, &plane), distance(&plane, &line)] {
            assert!((found - 8.0).abs() < 1e-7, "{found}");
        }
        assert!(frechet(&a, &a).unwrap() < 1e-5);
    }

    /// Singular covariances: the same through factors as through the whole matrices, and exact where it is known.
    #[test]
    fn factors_give_what_whole_covariances_give() {
        for (n, m, d) in [(5, 300, 12), (300, 5, 12), (7, 9, 20), (12, 12, 12), (2, 2, 3)] {
            let (a, b) = (features(n, d, "a", 0.0), features(m, d, "b", 0.5));
            let (found, whole) = (between(&a, &b).unwrap(), distance(&a, &b));
            assert!(
                (found - whole).abs() < 1e-6 * whole,
                "{n} {m} {d}: {found} {whole}"
            );
            assert!(between(&a, &a).unwrap() < 1e-9 * whole);
        }
        let line = Points::new(3, vec![1.0, 0.0, 0.0, -1.0, 0.0, 0.0]).unwrap();
        let other = Points::new(3, vec![0.0, 2.0, 0.0, 0.0, -2.0, 0.0]).unwrap();
        // Variances 2 and 8 along axes that share nothing.
        assert!((between(&line, &other).unwrap() - 10.0).abs() < 1e-12);
        let long = |moved: f64| {
            let values = vec![moved; 5000 * 2].into_iter().enumerate();
            Points::new(2, values.map(|(i, v)| v + (i % 7) as f64).collect()).unwrap()
        };
        assert!((between(&long(0.0), &long(1.0)).unwrap() - 2.0).abs() < 1e-9);
        let wide = Points::new(5000, vec![0.0; 5000 * 5000]).unwrap();
        let refused = between(&wide, &wide).unwrap_err().to_string();
        assert_eq!(
            refused,
            "features: found a covariance of 10000 columns, expected at most 8192"
        );
    }

    #[test]
    fn what_has_no_distance_is_refused() {
        let one = Points::new(3, vec![1.0; 3]).unwrap();
        assert_eq!(
            Gaussian::of(&one).unwrap_err().to_string(),
            "features: found 1 rows, expected at least 2"
        );
        let (two, three) = (features(9, 2, "a", 0.0), features(9, 3, "a", 0.0));
        let of = |points: &Points| Gaussian::of(points).unwrap();
        assert_eq!(
            frechet(&of(&two), &of(&three)).unwrap_err().to_string(),
            "features: found a width of 3, expected 2"
        );
        let huge = Points::new(2, vec![1e200, 0.0, -1e200, 1.0]).unwrap();
        assert_eq!(Gaussian::of(&huge).unwrap_err(), PointsError::Eigen);
    }
}
