//! The norm in f64, row by row.

/// `x` [rows, width]; `scale` and `shift` [groups, width], one group for each run of `rows_per_group` rows.
pub(super) fn rms_norm(
    x: &[f64],
    width: usize,
    rows_per_group: usize,
    eps: f64,
    offset: f64,
    scale: &[f64],
    shift: &[f64],
) -> Vec<f64> {
    let mut y = vec![f64::NAN; x.len()];
    for row in 0..x.len() / width {
        let at = row * width;
        let group = row / rows_per_group * width;
        let mean = x[at..at + width].iter().map(|x| x * x).sum::<f64>() / width as f64;
        for j in 0..width {
            y[at + j] = x[at + j] / (mean + eps).sqrt() * (offset + scale[group + j]) + shift[group + j];
        }
    }
    y
}
