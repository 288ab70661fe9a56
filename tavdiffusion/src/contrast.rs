//! Contrastive alignment of the two streams: pooled features of picture and sound of one clip lie closer than those of
//! different clips (TAVGBench section 4, pooled form).

use candle_core::{D, DType, Result, Tensor};

/// Temperature of the cosine similarities.
pub const TEMPERATURE: f64 = 0.07;

/// Symmetric cross-entropy over the cosines of pooled features `a` and `b`, `[B, c]` each; row i of both is one clip.
pub fn pooled(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let unit = |x: &Tensor| {
        let x = x.to_dtype(DType::F32)?;
        x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-8)?.sqrt()?)
    };
    let (a, b) = (unit(a)?, unit(b)?);
    let matched = ((&a * &b)?.sum(D::Minus1)? / TEMPERATURE)?;
    let scores = (a.matmul(&b.t()?)? / TEMPERATURE)?;
    let both = (scores.log_sum_exp(1)? + scores.log_sum_exp(0)?)?;
    (both * 0.5)?.sub(&matched)?.mean_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn matched_pairs_lose_less_than_shuffled_ones() -> Result<()> {
        let a = Tensor::eye(4, DType::F32, &Device::Cpu)?;
        let shuffled = a.index_select(&Tensor::new(&[1u32, 2, 3, 0], &Device::Cpu)?, 0)?;
        let matched = pooled(&a, &a)?.to_scalar::<f32>()?;
        let wrong = pooled(&a, &shuffled)?.to_scalar::<f32>()?;
        // exp(1/0.07) against three exp(0): next to nothing; and a mismatch costs 1/0.07.
        assert!(matched < 1e-4, "{matched}");
        assert!((f64::from(wrong) - 1.0 / TEMPERATURE).abs() < 0.01, "{wrong}");
        Ok(())
    }
}
