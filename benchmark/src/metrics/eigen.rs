//! Eigenvalues of symmetric matrices: reflections to three diagonals, then rotations with Wilkinson's shift (Golub and Van Loan,
//! Matrix Computations, sections 8.3.1 to 8.3.3).

use super::points::{PointsError, dot};

/// Rotations through a block of n rows after which there is something wrong with the numbers; two are usual.
const MOST_SWEEPS: usize = 60;
/// Elements beside the diagonal that are this part of the largest one are zero, whatever stands beside them.
const NOTHING: f64 = 1e-19;

/// `A = sum value_i vector_i vector_i^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct Eigen {
    /// In no order.
    pub values: Vec<f64>,
    /// `[n, n]`, row i belongs to value i; orthonormal.
    pub vectors: Vec<f64>,
}

/// Values and vectors of the symmetric matrix `[n, n]`.
///
/// # Errors
/// Numbers that are not finite or that overflow.
pub fn eigen(matrix: &[f64], n: usize) -> Result<Eigen, PointsError> {
    let mut three = Diagonals::of(matrix, n);
    let mut vectors = vec![0.0; n * n];
    for i in 0..n {
        vectors[i * n + i] = 1.0;
    }
    for (k, v) in three.reflections.iter().enumerate() {
        reflect_rows(&mut vectors[(k + 1) * n..], v, n);
    }
    three.diagonalise(&mut |k, c, s| {
        let (above, below) = vectors[k * n..(k + 2) * n].split_at_mut(n);
        for (a, b) in above.iter_mut().zip(below) {
            (*a, *b) = (c * *a + s * *b, c * *b - s * *a);
        }
    })?;
    Ok(Eigen {
        values: three.diagonal,
        vectors,
    })
}

/// The values alone, in no order.
///
/// # Errors
/// As [`eigen`].
pub fn eigenvalues(matrix: &[f64], n: usize) -> Result<Vec<f64>, PointsError> {
    let mut three = Diagonals::of(matrix, n);
    three.diagonalise(&mut |_, _, _| {})?;
    Ok(three.diagonal)
}

/// A matrix with three diagonals, and the reflections that made it one.
struct Diagonals {
    diagonal: Vec<f64>,
    beside: Vec<f64>,
    /// Unit vectors; number k is of the rows from k + 1 on.
    reflections: Vec<Vec<f64>>,
}

impl Diagonals {
    fn of(matrix: &[f64], n: usize) -> Self {
        let mut a = matrix.to_vec();
        let mut beside = Vec::with_capacity(n.saturating_sub(1));
        let mut reflections = Vec::with_capacity(n.saturating_sub(2));
        for k in 0..n.saturating_sub(2) {
            let from = k + 1;
            // Row k is column k.
            let mut v = a[k * n + from..(k + 1) * n].to_vec();
            let length = dot(&v, &v).sqrt();
            // The sign that adds up loses no digits.
            let end = if v[0] > 0.0 { -length } else { length };
            v[0] -= end;
            let norm = dot(&v, &v).sqrt();
            if norm > 0.0 {
                v.iter_mut().for_each(|value| *value /= norm);
                reflect_both(&mut a, &v, from, n);
            }
            beside.push(end);
            reflections.push(v);
        }
        if n > 1 {
            beside.push(a[(n - 2) * n + n - 1]);
        }
        Self {
            diagonal: (0..n).map(|i| a[i * n + i]).collect(),
            beside,
            reflections,
        }
    }

    /// Rotates until nothing is left beside the diagonal; `turn(k, c, s)` turns rows k and k + 1 of what turns with it.
    fn diagonalise(&mut self, turn: &mut dyn FnMut(usize, f64, f64)) -> Result<(), PointsError> {
        let (d, e) = (&mut self.diagonal, &mut self.beside);
        let largest = d.iter().chain(e.iter()).fold(0.0f64, |most, v| most.max(v.abs()));
        if !d.iter().chain(e.iter()).all(|value| value.is_finite()) {
            return Err(PointsError::Eigen);
        }
        let mut left = MOST_SWEEPS * d.len().max(1);
        let mut high = d.len().saturating_sub(1);
        while high > 0 {
            let mut low = high;
            while low > 0 {
                let near = f64::EPSILON * (d[low - 1].abs() + d[low].abs());
                if e[low - 1].abs() <= near.max(NOTHING * largest) {
                    e[low - 1] = 0.0;
                    break;
                }
                low -= 1;
            }
            if low == high {
                high -= 1;
                continue;
            }
            left = left.checked_sub(1).ok_or(PointsError::Eigen)?;
            sweep(d, e, low, high, turn);
        }
        Ok(())
    }
}

/// One implicit step of QR through the rows `low..=high`.
fn sweep(d: &mut [f64], e: &mut [f64], low: usize, high: usize, turn: &mut dyn FnMut(usize, f64, f64)) {
    let half = f64::midpoint(d[high - 1], -d[high]);
    let last = e[high - 1];
    let shift = d[high] - last * last / (half + half.hypot(last).copysign(half));
    let (mut x, mut z) = (d[low] - shift, e[low]);
    for k in low..high {
        let r = x.hypot(z);
        let (c, s) = if r > 0.0 { (x / r, z / r) } else { (1.0, 0.0) };
        if k > low {
            e[k - 1] = r;
        }
        let (a, b, g) = (d[k], e[k], d[k + 1]);
        d[k] = c * c * a + 2.0 * c * s * b + s * s * g;
        d[k + 1] = s * s * a - 2.0 * c * s * b + c * c * g;
        e[k] = c * s * (g - a) + (c * c - s * s) * b;
        if k + 1 < high {
            (x, z) = (e[k], s * e[k + 1]);
            e[k + 1] *= c;
        }
        turn(k, c, s);
    }
}

/// `H A H` with `H = 1 - 2 v v^T` on the rows and columns of `a` `[n, n]` from `from` on.
fn reflect_both(a: &mut [f64], v: &[f64], from: usize, n: usize) {
    let rows = |a: &[f64]| -> Vec<f64> { (from..n).map(|i| dot(&a[i * n + from..(i + 1) * n], v)).collect() };
    let mut w = rows(a);
    let along = dot(&w, v);
    w.iter_mut().zip(v).for_each(|(w, v)| *w -= along * v);
    for (i, (vi, wi)) in v.iter().zip(&w).enumerate() {
        let row = &mut a[(from + i) * n + from..(from + i + 1) * n];
        let (vi, wi) = (2.0 * vi, 2.0 * wi);
        for ((value, v), w) in row.iter_mut().zip(v).zip(&w) {
            *value -= vi * w + wi * v;
        }
    }
}

/// `H R` on rows `[len of v, n]`.
fn reflect_rows(rows: &mut [f64], v: &[f64], n: usize) {
    let mut sums = vec![0.0; n];
    for (row, &v) in rows.chunks_exact(n).zip(v) {
        sums.iter_mut()
            .zip(row)
            .for_each(|(sum, value)| *sum += v * value);
    }
    for (row, &v) in rows.chunks_exact_mut(n).zip(v) {
        row.iter_mut()
            .zip(&sums)
            .for_each(|(value, sum)| *value -= 2.0 * v * sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    /// The sum of `value vector vector^T`.
    fn again(found: &Eigen, n: usize) -> Vec<f64> {
        let mut sum = vec![0.0; n * n];
        for (value, vector) in found.values.iter().zip(found.vectors.chunks_exact(n)) {
            add_product(&mut sum, vector, *value);
        }
        sum
    }

    /// Adds `factor x x^T`.
    fn add_product(sum: &mut [f64], x: &[f64], factor: f64) {
        for (row, a) in sum.chunks_exact_mut(x.len()).zip(x) {
            row.iter_mut().zip(x).for_each(|(sum, b)| *sum += factor * a * b);
        }
    }

    fn apart(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    /// `X^T X` of `rows` random rows: of that rank at most.
    fn products(n: usize, rows: usize) -> Vec<f64> {
        let x = Philox::named(1, "eigen").normals(rows * n);
        let x: Vec<f64> = x.into_iter().map(f64::from).collect();
        let mut sum = vec![0.0; n * n];
        for row in x.chunks_exact(n) {
            add_product(&mut sum, row, 1.0);
        }
        sum
    }

    #[test]
    fn values_and_vectors_make_the_matrix_again() {
        for (n, rows) in [(1, 3), (2, 5), (3, 2), (17, 40), (40, 9), (64, 1)] {
            let matrix = products(n, rows);
            let found = eigen(&matrix, n).unwrap();
            let size = matrix.iter().fold(0.0f64, |most, v| most.max(v.abs()));
            assert!(apart(&matrix, &again(&found, n)) < 1e-13 * size * n as f64, "{n}");
            for (i, one) in found.vectors.chunks_exact(n).enumerate() {
                for (j, other) in found.vectors.chunks_exact(n).enumerate() {
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((dot(one, other) - expected).abs() < 1e-12, "{n}: {i} {j}");
                }
            }
            let zeros = found.values.iter().filter(|v| v.abs() < 1e-12 * size).count();
            assert_eq!(zeros, n.saturating_sub(rows), "{n} {rows}");
            let mut alone = eigenvalues(&matrix, n).unwrap();
            let mut values = found.values.clone();
            alone.sort_by(f64::total_cmp);
            values.sort_by(f64::total_cmp);
            assert!(apart(&alone, &values) < 1e-12 * size * n as f64);
        }
    }

    /// The second difference has the values 2 - 2 cos(pi k / (n + 1)).
    #[test]
    fn a_known_matrix_has_its_known_values() {
        let n = 30;
        let mut matrix = vec![0.0; n * n];
        for i in 0..n {
            matrix[i * n + i] = 2.0;
            if i > 0 {
                matrix[i * n + i - 1] = -1.0;
                matrix[(i - 1) * n + i] = -1.0;
            }
        }
        let mut found = eigenvalues(&matrix, n).unwrap();
        found.sort_by(f64::total_cmp);
        for (k, value) in found.into_iter().enumerate() {
            let angle = std::f64::consts::PI * (k + 1) as f64 / (n + 1) as f64;
            assert!((value - (2.0 - 2.0 * angle.cos())).abs() < 1e-13, "{k}: {value}");
        }
        let plain = eigenvalues(&[3.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 3.0], 3).unwrap();
        assert_eq!(plain, [3.0, -1.0, 3.0]);
        assert_eq!(eigenvalues(&[0.0; 16], 4).unwrap(), [0.0; 4]);
        assert_eq!(eigenvalues(&[], 0).unwrap(), Vec::<f64>::new());
    }

    #[test]
    fn numbers_that_are_none_have_no_values() {
        assert_eq!(eigenvalues(&[f64::NAN; 9], 3), Err(PointsError::Eigen));
        assert_eq!(eigenvalues(&[f64::INFINITY; 4], 2), Err(PointsError::Eigen));
        assert_eq!(eigenvalues(&[1e300; 16], 4), Err(PointsError::Eigen));
    }
}
