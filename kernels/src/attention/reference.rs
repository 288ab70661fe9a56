//! The definition of softmax attention and its adjoint in `f64`, one query at a time, for checking the fast forms. Slow and
//! obvious on purpose.
//!
//! Arrays are flat and row-major: `q` `[B, N, H, D]`, `k` `[B, L, G, D]`, `v` `[B, L, G, E]`, outputs `[B, N, H, E]`.

use super::Problem;

/// Inputs; `mask` is `[B, L]`.
pub(super) struct Inputs<'a> {
    pub(super) problem: &'a Problem,
    pub(super) q: &'a [f64],
    pub(super) k: &'a [f64],
    pub(super) v: &'a [f64],
    pub(super) mask: Option<&'a [f64]>,
}

/// The output, and the adjoints of q, k and v.
pub(super) struct Results {
    pub(super) o: Vec<f64>,
    pub(super) dq: Vec<f64>,
    pub(super) dk: Vec<f64>,
    pub(super) dv: Vec<f64>,
}

impl Inputs<'_> {
    /// Whether the query at `query` of a batch meets the key at `key`.
    fn meets(&self, batch: usize, query: usize, key: usize) -> bool {
        let p = self.problem;
        let together = p.borders.as_ref().is_none_or(|borders| {
            let sequence = |place: usize| borders.iter().filter(|&&border| border <= place).count();
            sequence(query) == sequence(key)
        });
        // With packed sequences N = L, and the last query of each has the place of its last key.
        let past = !p.causal || key + p.n <= query + p.l;
        together && past && self.mask.is_none_or(|mask| mask[batch * p.l + key] != 0.0)
    }

    /// Output and adjoints for the adjoint `d_o` of the output.
    pub(super) fn run(&self, d_o: &[f64]) -> Results {
        let p = self.problem;
        let (d, e) = (p.d, p.e);
        let mut results = Results {
            o: vec![0.0; p.b * p.n * p.h * e],
            dq: vec![0.0; self.q.len()],
            dk: vec![0.0; self.k.len()],
            dv: vec![0.0; self.v.len()],
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for batch in 0..p.b {
            for query in 0..p.n {
                for head in 0..p.h {
                    let row = (batch * p.n + query) * p.h + head;
                    let key_row = |key: usize| (batch * p.l + key) * p.g + head / p.share();
                    let (q, d_o) = (&self.q[row * d..][..d], &d_o[row * e..][..e]);
                    let keys: Vec<usize> = (0..p.l).filter(|&key| self.meets(batch, query, key)).collect();
                    let score = |key: usize| p.scale * dot(q, &self.k[key_row(key) * d..][..d]);
                    let largest = keys
                        .iter()
                        .map(|&key| score(key))
                        .fold(f64::NEG_INFINITY, f64::max);
                    let powers: Vec<f64> = keys.iter().map(|&key| (score(key) - largest).exp()).collect();
                    let total: f64 = powers.iter().sum();
                    for (&key, power) in keys.iter().zip(&powers) {
                        for c in 0..e {
                            results.o[row * e + c] += power / total * self.v[key_row(key) * e + c];
                        }
                    }
                    let mean = dot(&results.o[row * e..][..e], d_o);
                    for (&key, power) in keys.iter().zip(&powers) {
                        let (weight, at) = (power / total, key_row(key));
                        let d_score = weight * (dot(&self.v[at * e..][..e], d_o) - mean) * p.scale;
                        for (c, d_o) in d_o.iter().enumerate() {
                            results.dv[at * e + c] += weight * d_o;
                        }
                        for (c, q) in q.iter().enumerate() {
                            results.dq[row * d + c] += d_score * self.k[at * d + c];
                            results.dk[at * d + c] += d_score * q;
                        }
                    }
                }
            }
        }
        results
    }
}
