//! The moving average as the convolution that it is, in `f64`, for checking the fast forms. Slow on purpose.

/// `u_t = sum_s w_h lambda_h^|t-s| x_s` over s <= t, or over all s if `two_sided`, plus `lambda_h^(t+1)` times the
/// state before the first token. `x` and `u` are `[B, n, H, C]`, `rate` and `weight` `[H]`, `initial` `[B, H, C]`.
pub fn convolution(
    x: &[f64],
    [batch, n, heads, channels]: [usize; 4],
    rate: &[f64],
    weight: &[f64],
    initial: Option<&[f64]>,
    two_sided: bool,
) -> Vec<f64> {
    let mut u = vec![0.0; x.len()];
    for b in 0..batch {
        for h in 0..heads {
            for c in 0..channels {
                let at = |t: usize| ((b * n + t) * heads + h) * channels + c;
                for t in 0..n {
                    let seen = if two_sided { n } else { t + 1 };
                    let state = initial.map_or(0.0, |state| state[(b * heads + h) * channels + c]);
                    u[at(t)] = (-rate[h] * (t + 1) as f64).exp() * state
                        + (0..seen)
                            .map(|s| weight[h] * (-rate[h] * t.abs_diff(s) as f64).exp() * x[at(s)])
                            .sum::<f64>();
                }
            }
        }
    }
    u
}
