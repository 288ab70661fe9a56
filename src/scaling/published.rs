//! The fits that the study published (arXiv 2406.16690), for comparison.
//!
//! Compute is in PFLOP/s-days, loss that of training on another corpus with another tokenizer: only slopes compare. The loss and
//! N of HGRN2 and cosFormer2 come from a secondary table whose other rows are those of the paper.

use serde::Serialize;

/// `beta C^alpha`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Power {
    /// The exponent.
    pub alpha: f64,
    /// The value at one PFLOP/s-day.
    pub beta: f64,
}

/// What was published of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Published {
    /// Its name.
    #[serde(skip)]
    pub architecture: &'static str,
    /// Loss, nats a token.
    pub loss: Power,
    /// Weights of the layers.
    pub n_opt: Power,
    /// Tokens, where they are known.
    pub d_opt: Option<Power>,
}

const fn power(beta: f64, alpha: f64) -> Power {
    Power { alpha, beta }
}

/// All of them.
pub const PUBLISHED: [Published; 4] = [
    Published {
        architecture: "llama",
        loss: power(3.7087, -0.0798),
        n_opt: power(1.82e8, 0.7118),
        d_opt: Some(power(2.56e10, 0.5102)),
    },
    Published {
        architecture: "tnl",
        loss: power(3.5391, -0.0768),
        n_opt: power(2.74e8, 0.6470),
        d_opt: Some(power(4.43e10, 0.4684)),
    },
    Published {
        architecture: "hgrn2",
        loss: power(3.4788, -0.0753),
        n_opt: power(2.66e8, 0.6427),
        d_opt: None,
    },
    Published {
        architecture: "cosformer2",
        loss: power(3.5877, -0.0756),
        n_opt: power(2.65e8, 0.6516),
        d_opt: None,
    },
];

/// What was published of the architecture of this name.
#[must_use]
pub fn of(architecture: &str) -> Option<Published> {
    PUBLISHED.into_iter().find(|fit| fit.architecture == architecture)
}

impl Power {
    /// The value at `compute`.
    #[must_use]
    pub fn at(&self, compute: f64) -> f64 {
        self.beta * compute.powf(self.alpha)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a model of 7e9 weights on 3e11 tokens took is 146 PFLOP/s-days, for which the paper's fits give these.
    #[test]
    fn values_are_sane() {
        let llama = of("llama").unwrap();
        assert!((llama.loss.at(146.0) - 2.49).abs() < 0.005);
        assert!((llama.n_opt.at(146.0) / 6.3e9 - 1.0).abs() < 0.01);
        assert_eq!(of("lightnet"), None);
    }
}
