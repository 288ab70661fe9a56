//! Muon (Jordan, 2024): the update of a matrix is its momentum with all singular values brought near one.
//!
//! ```text
//! m <- b m + (1 - b) g        u = b m + (1 - b) g              (Nesterov)
//! o = orthogonal(u)           w <- (1 - lr wd) w - lr s sqrt(max(rows, columns)) o
//! ```
//!
//! The root gives the elements of an update the root mean square `lr s`, whatever the shape (Liu et al., 2025): AdamW's
//! are of 0.2 lr to 1 lr, so that both share one learning rate.

use candle_core::{DType, Result, Tensor};

/// Memory of the momentum.
pub(super) const MOMENTUM: f64 = 0.95;
/// Smaller sides have nothing to orthogonalise.
pub(super) const SMALLEST_SIDE: usize = 32;
const ITERATIONS: usize = 5;
/// The quintic `a x + b x^3 + c x^5` whose iteration lifts small singular values fastest.
const QUINTIC: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);

/// Matrices `[G, r, c]`, r at most c, with singular values of about 0.7 to 1.2 and the same singular vectors, as f32.
///
/// The iteration runs in bf16 where the hardware makes it fast: it corrects its own rounding.
pub(super) fn orthogonal(matrices: &Tensor) -> Result<Tensor> {
    let (_, rows, columns) = matrices.dims3()?;
    if rows > columns {
        candle_core::bail!("orthogonal: found {rows} rows of {columns}, expected no more rows than columns");
    }
    let norm = matrices.sqr()?.sum_keepdim((1, 2))?.sqrt()?;
    let dtype = if matrices.device().is_cuda() {
        DType::BF16
    } else {
        DType::F32
    };
    let mut x = matrices.broadcast_div(&(norm + 1e-20)?)?.to_dtype(dtype)?;
    let (a, b, c) = QUINTIC;
    for _ in 0..ITERATIONS {
        let square = x.matmul(&x.t()?)?;
        let poly = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        x = ((&x * a)? + poly.matmul(&x)?)?;
    }
    x.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use fulgur_kernels::philox::Philox;

    fn random(shape: (usize, usize, usize)) -> Tensor {
        let values = Philox::named(3, "muon").normals(shape.0 * shape.1 * shape.2);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn rows_become_nearly_orthonormal() {
        let matrices = random((3, 8, 24));
        for scale in [1e-6, 1.0, 1e6] {
            let o = orthogonal(&(&matrices * scale).unwrap()).unwrap();
            let products = o.matmul(&o.t().unwrap()).unwrap().to_vec3::<f32>().unwrap();
            for product in products {
                for (i, row) in product.iter().enumerate() {
                    for (j, value) in row.iter().enumerate() {
                        let expected = if i == j { 0.4..1.5 } else { -0.45..0.45 };
                        assert!(expected.contains(value), "{i} {j}: {value}");
                    }
                }
            }
        }
    }

    /// A diagonal keeps its place and its signs.
    #[test]
    fn singular_vectors_stay() {
        let diagonal = Tensor::new(&[[[3f32, 0.0, 0.0], [0.0, -0.5, 0.0]]], &Device::Cpu).unwrap();
        let o = orthogonal(&diagonal)
            .unwrap()
            .squeeze(0)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap();
        assert!(
            (0.6..1.3).contains(&o[0][0]) && (-1.3..-0.6).contains(&o[1][1]),
            "{o:?}"
        );
        assert_eq!([o[0][1], o[0][2], o[1][0], o[1][2]], [0.0; 4]);
    }

    #[test]
    fn nothing_stays_nothing_and_tall_matrices_are_refused() {
        let zeros = Tensor::zeros((1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            orthogonal(&zeros)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap(),
            [0.0; 16]
        );
        assert!(orthogonal(&random((1, 5, 4))).is_err());
    }
}
