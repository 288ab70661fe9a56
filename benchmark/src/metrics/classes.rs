//! Figures of what a classifier says of generated sounds: the inception score (arXiv 1606.03498) and the divergence from what it
//! says of the real ones (arXiv 2104.00656).
//!
//! ```text
//! p = softmax(logits), in f64
//! IS = exp(mean_i sum_c p_ic (ln p_ic - ln mean_j p_jc))      mean and deviation over parts of the clips
//! KL = mean_i sum_c r_ic (ln r_ic - ln g_ic)                  of pairs of a real and a generated clip
//! ```

use fulgur_kernels::philox::Philox;

use crate::features::softmax;

/// Parts that IS is computed of, as is usual.
pub const SPLITS: usize = 10;
/// Below this a probability is none: its logarithm stays finite.
const LEAST: f64 = 1e-300;

/// IS over parts of some classes' probabilities: mean and standard deviation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InceptionScore {
    /// 1 to the number of classes.
    pub mean: f64,
    /// Over the parts.
    pub deviation: f64,
}

fn ln(x: f64) -> f64 {
    x.max(LEAST).ln()
}

/// IS of logits in the order that `seed` shuffles them to, in `splits` parts; fewer where there are fewer clips. `None` of no clips.
pub fn inception_score(logits: &[Vec<f64>], splits: usize, seed: Option<u64>) -> Option<InceptionScore> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    if let Some(seed) = seed {
        shuffle(&mut order, seed);
    }
    let n = order.len();
    let splits = splits.min(n);
    if splits == 0 {
        return None;
    }
    let rows: Vec<Vec<f64>> = order.iter().map(|&i| softmax(&logits[i])).collect();
    let scores: Vec<f64> = (0..splits)
        .map(|i| score(&rows[i * n / splits..(i + 1) * n / splits]))
        .collect();
    let mean = scores.iter().sum::<f64>() / splits as f64;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / splits as f64;
    Some(InceptionScore {
        mean,
        deviation: variance.sqrt(),
    })
}

/// Fisher and Yates, from the project's generator.
fn shuffle(order: &mut [usize], seed: u64) {
    let mut draw = Philox::named(seed, "inception score");
    for i in (1..order.len()).rev() {
        let other = (draw.range(0.0, 1.0) * (i + 1) as f32) as usize;
        order.swap(i, other.min(i));
    }
}

fn score(rows: &[Vec<f64>]) -> f64 {
    let n = rows.len() as f64;
    let classes = rows.first().map_or(0, Vec::len);
    let mean: Vec<f64> = (0..classes)
        .map(|c| rows.iter().map(|row| row[c]).sum::<f64>() / n)
        .collect();
    let sum: f64 = rows.iter().map(|row| divergence_of(row, &mean)).sum();
    (sum / n).exp()
}

fn divergence_of(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p * (ln(*p) - ln(*q))).sum()
}

/// KL of one pair of logits.
pub fn divergence(reference: &[f64], generated: &[f64]) -> f64 {
    divergence_of(&softmax(reference), &softmax(generated))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::golden;

    #[test]
    fn figures_are_those_of_numpy() {
        let tensors = golden("distances");
        let rows = |name: &str| tensors[&format!("logits.{name}")].to_vec2::<f64>().unwrap();
        let answer = tensors["classes.answer"].to_vec1::<f64>().unwrap();
        let (generated, reference) = (rows("generated"), rows("reference"));
        let found = inception_score(&generated, 3, None).unwrap();
        assert!((found.mean - answer[0]).abs() < 1e-10 && (found.deviation - answer[1]).abs() < 1e-10);
        let pairs = reference.iter().zip(&generated);
        let sum: f64 = pairs
            .map(|(reference, generated)| divergence(reference, generated))
            .sum();
        assert!((sum / reference.len() as f64 - answer[2]).abs() < 1e-10);
    }

    #[test]
    fn certain_and_different_is_best_and_equal_is_one() {
        let certain: Vec<Vec<f64>> = (0..20)
            .map(|i| (0..5).map(|c| if c == i % 5 { 2000.0 } else { 0.0 }).collect())
            .collect();
        let best = inception_score(&certain, 1, Some(7)).unwrap();
        assert!((best.mean - 5.0).abs() < 1e-9, "{best:?}");
        let same = vec![vec![1.0, 2.0, 3.0]; 12];
        let equal = inception_score(&same, SPLITS, Some(7)).unwrap();
        assert!((equal.mean - 1.0).abs() < 1e-12 && equal.deviation < 1e-12);
        assert_eq!(inception_score(&[], SPLITS, None), None);
        assert!(divergence(&certain[0], &certain[1]).is_finite());
        assert_eq!(divergence(&same[0], &same[1]), 0.0);
    }

    #[test]
    fn the_order_depends_on_the_seed_alone() {
        let of = |seed: u64| {
            let mut order: Vec<usize> = (0..30).collect();
            shuffle(&mut order, seed);
            order
        };
        assert_eq!(of(3), of(3));
        assert_ne!(of(3), of(4));
        let mut sorted = of(3);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..30).collect::<Vec<_>>());
    }
}
