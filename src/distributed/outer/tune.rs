//! How many inner steps hide an average (section 3.3 of arXiv 2401.16265: full overlap).

/// Numbers of inner steps to choose from.
pub const INNER_STEPS: [usize; 6] = [3, 6, 12, 24, 48, 96];

/// The least of [`INNER_STEPS`] whose work lasts as long as an average, given the seconds of both, or the most where none does.
pub fn least_steps(step_s: f64, average_s: f64) -> usize {
    let enough = |&steps: &usize| steps as f64 * step_s >= average_s;
    let most = INNER_STEPS[INNER_STEPS.len() - 1];
    INNER_STEPS
        .into_iter()
        .find(|steps| enough(steps))
        .unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_hidden() {
        assert_eq!(least_steps(0.1, 0.0), 3);
        assert_eq!(least_steps(0.1, 0.3), 3);
        assert_eq!(least_steps(0.1, 0.31), 6);
        assert_eq!(least_steps(0.1, 4.7), 48);
        assert_eq!(least_steps(0.1, 100.0), 96);
    }
}
