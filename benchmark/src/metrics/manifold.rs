//! How two sets of features cover each other, by balls around their points that reach to the k-th nearest of the same set.
//!
//! ```text
//! precision   share of generated points that lie in a ball of a real one         (Kynkaanniemi et al., arXiv 1904.06991)
//! recall      share of real points that lie in a ball of a generated one
//! density     mean over generated points of the number of real balls around them, over k      (Naeem et al., arXiv 2002.09797)
//! coverage    share of real points with a generated one in their ball
//! ```
//!
//! Balls are closed, and a point is no neighbour of its own. Precision is high where everything that is made looks real, recall
//! where all that is real could have been made. Like the Frechet distance they depend on how many points there are.

use rayon::prelude::*;
use serde::Serialize;

use super::points::{Points, PointsError, square};

/// The number of neighbours that the paper of precision and recall takes.
pub const NEIGHBOURS: usize = 3;

/// How generated points and real ones cover each other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cover {
    /// Share of generated points among the real ones.
    pub precision: f64,
    /// Share of real points among the generated ones.
    pub recall: f64,
    /// Real balls around a generated point, over k; may be more than 1.
    pub density: f64,
    /// Share of real points with a generated one near them.
    pub coverage: f64,
}

/// How `generated` points cover `real` ones, with balls to the `k`-th neighbour.
///
/// ```
/// use fulgur_benchmark::metrics::{manifold::cover, points::Points};
/// let real = Points::new(1, vec![0.0, 1.0, 2.0, 10.0])?;
/// let generated = Points::new(1, vec![0.5, 1.5, 2.5, 1.0])?;
/// let found = cover(&real, &generated, 1)?;
/// // Balls of 1 around 0, 1 and 2 hold everything; 10 has a ball of 8, which holds all but 0.5, 1.5 and 1.
/// assert_eq!((found.precision, found.coverage), (1.0, 1.0));
/// // Balls of 0.5 around 0.5, 1 and 1.5 and of 1 around 2.5 hold all but 10.
/// assert_eq!(found.recall, 0.75);
/// # Ok::<(), fulgur_benchmark::metrics::points::PointsError>(())
/// ```
///
/// # Errors
/// Points of two widths, or sets of no more than k points.
pub fn cover(real: &Points, generated: &Points, k: usize) -> Result<Cover, PointsError> {
    real.beside(generated)?;
    let (real_reach, generated_reach) = (reach(real, k)?, reach(generated, k)?);
    let n = real.len() as f64;
    let m = generated.len() as f64;
    // Of each generated point: how many real balls it lies in.
    let around: Vec<usize> = inside(generated, real, &real_reach);
    let recalled: Vec<usize> = inside(real, generated, &generated_reach);
    let found = |counts: &[usize]| counts.iter().filter(|&&count| count > 0).count() as f64;
    let rows: Vec<(&[f64], f64)> = real.rows().zip(real_reach.iter().copied()).collect();
    let covered = rows
        .par_iter()
        .filter(|(row, reach)| generated.rows().any(|other| square(row, other) <= *reach))
        .count();
    Ok(Cover {
        precision: found(&around) / m,
        recall: found(&recalled) / n,
        density: around.iter().sum::<usize>() as f64 / (k as f64 * m),
        coverage: covered as f64 / n,
    })
}

/// Squares of the distances to the `k`-th nearest other point, `k` at least 1.
fn reach(points: &Points, k: usize) -> Result<Vec<f64>, PointsError> {
    let k = k.max(1);
    points.at_least(k + 1)?;
    Ok((0..points.len())
        .into_par_iter()
        .map(|own| {
            let row = points.row(own);
            let mut squares: Vec<f64> = (points.rows().enumerate())
                .filter(|(other, _)| *other != own)
                .map(|(_, other)| square(row, other))
                .collect();
            *squares.select_nth_unstable_by(k - 1, f64::total_cmp).1
        })
        .collect())
}

/// For each of `points` the number of balls around `centres` that it lies in.
fn inside(points: &Points, centres: &Points, reach: &[f64]) -> Vec<usize> {
    let rows: Vec<&[f64]> = points.rows().collect();
    rows.into_par_iter()
        .map(|row| {
            let balls = centres.rows().zip(reach);
            balls
                .filter(|(centre, reach)| square(row, centre) <= **reach)
                .count()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    fn normals(n: usize, d: usize, name: &str, spread: f64, moved: f64) -> Points {
        let values = Philox::named(3, name).normals(n * d);
        let values = values.into_iter().map(|value| spread * f64::from(value) + moved);
        Points::new(d, values.collect()).unwrap()
    }

    /// The formulas of the papers, word by word, over the matrix of all distances.
    fn oracle(real: &Points, generated: &Points, k: usize) -> Cover {
        let distance = |a: &[f64], b: &[f64]| -> f64 {
            let sum: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
            sum.sqrt()
        };
        let radii = |points: &Points| -> Vec<f64> {
            points
                .rows()
                .map(|row| {
                    let mut all: Vec<f64> = points.rows().map(|other| distance(row, other)).collect();
                    all.sort_by(f64::total_cmp);
                    // The nearest one is the point itself.
                    all[k]
                })
                .collect()
        };
        let (real_radii, generated_radii) = (radii(real), radii(generated));
        let in_manifold = |row: &[f64], points: &Points, radii: &[f64]| {
            points
                .rows()
                .zip(radii)
                .any(|(p, &r)| distance(row, p) <= r * (1.0 + 1e-12))
        };
        let share = |hits: usize, of: usize| hits as f64 / of as f64;
        let mut balls = 0;
        for row in generated.rows() {
            for (p, &r) in real.rows().zip(&real_radii) {
                balls += usize::from(distance(row, p) <= r * (1.0 + 1e-12));
            }
        }
        let among_real = generated.rows().filter(|row| in_manifold(row, real, &real_radii));
        let among_generated = real
            .rows()
            .filter(|row| in_manifold(row, generated, &generated_radii));
        let covered = real.rows().zip(&real_radii).filter(|(p, r)| {
            generated
                .rows()
                .any(|row| distance(p, row) <= **r * (1.0 + 1e-12))
        });
        Cover {
            precision: share(among_real.count(), generated.len()),
            recall: share(among_generated.count(), real.len()),
            density: balls as f64 / (k * generated.len()) as f64,
            coverage: share(covered.count(), real.len()),
        }
    }

    #[test]
    fn covers_are_those_of_the_papers_formulas() {
        for (n, m, d, k, spread, moved) in [
            (40, 40, 2, 3, 1.0, 0.0),
            (60, 30, 9, 1, 0.5, 0.3),
            (25, 70, 17, 5, 1.6, 0.0),
            (30, 30, 3, 3, 1.0, 2.0),
        ] {
            let (real, made) = (
                normals(n, d, "real", 1.0, 0.0),
                normals(m, d, "made", spread, moved),
            );
            let found = cover(&real, &made, k).unwrap();
            assert_eq!(found, oracle(&real, &made, k), "{n} {m} {d} {k}");
            // Exchanged, precision is recall.
            let other = cover(&made, &real, k).unwrap();
            assert_eq!((found.precision, found.recall), (other.recall, other.precision));
        }
    }

    /// Narrow samples are precise and recall little, wide ones the other way round, far ones neither.
    #[test]
    fn narrow_wide_and_far_samples_are_told_apart() {
        let of = |spread, moved| {
            let (real, made) = (
                normals(200, 8, "real", 1.0, 0.0),
                normals(200, 8, "made", spread, moved),
            );
            cover(&real, &made, NEIGHBOURS).unwrap()
        };
        let (same, narrow, wide, far) = (of(1.0, 0.0), of(0.3, 0.0), of(3.0, 0.0), of(1.0, 20.0));
        assert!(same.precision > 0.5 && same.recall > 0.5 && same.density > 0.6);
        assert!(narrow.precision > 0.95 && narrow.recall < 0.2, "{narrow:?}");
        assert!(wide.precision < 0.2 && wide.recall > 0.95, "{wide:?}");
        assert_eq!(
            far,
            Cover {
                precision: 0.0,
                recall: 0.0,
                density: 0.0,
                coverage: 0.0
            }
        );
        let real = normals(50, 4, "real", 1.0, 0.0);
        let itself = cover(&real, &real, NEIGHBOURS).unwrap();
        assert_eq!(
            (itself.precision, itself.recall, itself.coverage),
            (1.0, 1.0, 1.0)
        );
    }

    #[test]
    fn balls_need_neighbours() {
        let three = normals(3, 2, "a", 1.0, 0.0);
        assert_eq!(
            cover(&three, &three, 3).unwrap_err().to_string(),
            "features: found 3 rows, expected at least 4"
        );
        assert!(cover(&three, &normals(4, 3, "b", 1.0, 0.0), 1).is_err());
        assert!(cover(&three, &three, 2).is_ok());
    }
}
