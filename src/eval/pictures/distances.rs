//! How like real pictures drawn ones are, by a judge's features.

use fulgur_benchmark::metrics::frechet::{Gaussian, frechet};
use fulgur_benchmark::metrics::manifold::{Cover, NEIGHBOURS, cover};
use fulgur_benchmark::metrics::points::{Points, PointsError};
use fulgur_kernels::philox::Philox;
use serde::Serialize;

/// Fewest pictures that have distances.
pub(super) const FEWEST: usize = NEIGHBOURS + 1;

/// How like a set of pictures another one is, each of n.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Likeness {
    /// Frechet distance of their features.
    pub frechet: f64,
    /// How they cover each other.
    #[serde(flatten)]
    pub cover: Cover,
}

/// Distances of drawn pictures from real ones, and of real ones from each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distances {
    /// Pictures on each side.
    pub n: usize,
    /// Drawn pictures beside training pictures.
    pub to_training: Likeness,
    /// Drawn pictures beside held-out ones.
    pub to_held_out: Likeness,
    /// Held-out pictures in the place of the drawn ones, beside the training pictures: what new real pictures give.
    pub reference: Likeness,
    /// Rank of the covariance of the n training pictures.
    pub rank: usize,
    /// Whether n is too small for the width: covariances of no more than n - 1 dimensions.
    pub rank_deficient: bool,
    /// The Frechet distance to more training pictures, where more were drawn than are held out.
    pub at_more: Option<AtMore>,
}

/// A Frechet distance at another number of pictures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtMore {
    /// Pictures on each side.
    pub n: usize,
    /// Drawn pictures beside training pictures.
    pub to_training: f64,
}

/// Features of some pictures, in an order by lot, so that the first n are a fair choice.
pub(super) struct Shuffled {
    points: Points,
}

impl Shuffled {
    pub(super) fn of(points: &Points, seed: u64, name: &str) -> Self {
        let order = Philox::named(seed, name).permutation(points.len());
        Self {
            points: points.select(&order),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.points.len()
    }

    fn first(&self, n: usize) -> Points {
        self.points.select(&(0..n).collect::<Vec<_>>())
    }
}

impl Distances {
    /// At the largest number that all three have.
    ///
    /// # Errors
    /// Fewer than [`FEWEST`] pictures of a kind.
    pub(super) fn of(
        drawn: &Shuffled,
        training: &Shuffled,
        held_out: &Shuffled,
    ) -> Result<Self, PointsError> {
        let n = drawn.len().min(training.len()).min(held_out.len());
        let [drawn_n, training_n, held_out_n] = [drawn, training, held_out].map(|all| Side::of(all.first(n)));
        let (drawn_n, training_n, held_out_n) = (drawn_n?, training_n?, held_out_n?);
        let more = drawn.len().min(training.len());
        let at_more = (more > n)
            .then(|| {
                let (a, b) = (
                    Gaussian::of(&training.first(more))?,
                    Gaussian::of(&drawn.first(more))?,
                );
                Ok::<_, PointsError>(AtMore {
                    n: more,
                    to_training: frechet(&a, &b)?,
                })
            })
            .transpose()?;
        let width = training.points.width();
        Ok(Self {
            n,
            to_training: training_n.likeness(&drawn_n)?,
            to_held_out: held_out_n.likeness(&drawn_n)?,
            reference: training_n.likeness(&held_out_n)?,
            rank: training_n.gaussian.rank(),
            rank_deficient: n <= width,
            at_more,
        })
    }
}

struct Side {
    points: Points,
    gaussian: Gaussian,
}

impl Side {
    fn of(points: Points) -> Result<Self, PointsError> {
        Ok(Self {
            gaussian: Gaussian::of(&points)?,
            points,
        })
    }

    /// How like these real pictures `other` ones are.
    fn likeness(&self, other: &Self) -> Result<Likeness, PointsError> {
        Ok(Likeness {
            frechet: frechet(&self.gaussian, &other.gaussian)?,
            cover: cover(&self.points, &other.points, NEIGHBOURS)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normals(n: usize, name: &str, moved: f64) -> Shuffled {
        let values = Philox::named(2, name).normals(n * 4);
        let values = values.into_iter().map(|value| f64::from(value) + moved);
        Shuffled::of(&Points::new(4, values.collect()).unwrap(), 0, name)
    }

    #[test]
    fn sides_are_of_equal_number_and_far_samples_are_far() {
        let (training, held_out) = (normals(900, "training", 0.0), normals(150, "held out", 0.0));
        let near = Distances::of(&normals(400, "near", 0.0), &training, &held_out).unwrap();
        assert_eq!((near.n, near.rank, near.rank_deficient), (150, 4, false));
        assert!(near.to_training.frechet < 3.0 * near.reference.frechet + 0.1);
        let more = near.at_more.unwrap();
        assert_eq!(more.n, 400);
        assert!(more.to_training < 0.2, "{more:?}");
        let far = Distances::of(&normals(100, "far", 3.0), &training, &held_out).unwrap();
        assert_eq!((far.n, far.at_more), (100, None));
        // Means three apart along four axes.
        assert!(
            (far.to_training.frechet - 36.0).abs() < 8.0 && far.to_held_out.frechet > 25.0,
            "{far:?}"
        );
        assert!(far.to_training.cover.precision < near.to_training.cover.precision);
        let few = Distances::of(&normals(4, "few", 0.0), &training, &held_out).unwrap();
        assert_eq!((few.n, few.rank, few.rank_deficient), (4, 3, true));
        assert!(Distances::of(&normals(3, "few", 0.0), &training, &held_out).is_err());
    }
}
