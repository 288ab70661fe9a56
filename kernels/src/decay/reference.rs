//! The decayed recurrence and its adjoint token by token in `f64`, for checking the fast forms. Slow and obvious on
//! purpose.
//!
//! Arrays are flat and row-major: `q`, `k` and the log-decays `[B, N, H, D]`, `v`, `o` `[B, N, H, E]`, states
//! `[B, H, D, E]`. Decays of fewer dimensions are repeated to this shape by the caller, and sums of the gradient over
//! what was repeated are the caller's.

pub use crate::sizes::Sizes;

/// Inputs of the recurrence.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Sizes of all arrays.
    pub sizes: Sizes,
    /// Queries `[B, N, H, D]`.
    pub q: &'a [f64],
    /// Keys `[B, N, H, D]`.
    pub k: &'a [f64],
    /// Values `[B, N, H, E]`.
    pub v: &'a [f64],
    /// Logarithms of the decays `[B, N, H, D]`.
    pub log_decay: &'a [f64],
    /// State before the first token `[B, H, D, E]`.
    pub initial: &'a [f64],
}

/// Gradients, each shaped like its input.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Adjoint of the queries.
    pub dq: Vec<f64>,
    /// Adjoint of the keys.
    pub dk: Vec<f64>,
    /// Adjoint of the values.
    pub dv: Vec<f64>,
    /// Adjoint of the log-decays.
    pub dlog_decay: Vec<f64>,
    /// Adjoint of the state before the first token.
    pub dinitial: Vec<f64>,
}

impl Inputs<'_> {
    fn token(&self, b: usize, t: usize, h: usize) -> usize {
        (b * self.sizes.n + t) * self.sizes.h + h
    }

    fn decay(&self, token: usize, c: usize) -> f64 {
        self.log_decay[token * self.sizes.d + c].exp()
    }

    /// States of one head: before the first token, then after every token.
    fn states(&self, b: usize, h: usize) -> Vec<Vec<f64>> {
        let Sizes { n, d, e, .. } = self.sizes;
        let mut states = vec![self.initial[(b * self.sizes.h + h) * d * e..][..d * e].to_vec()];
        for t in 0..n {
            let token = self.token(b, t, h);
            let mut state = states[t].clone();
            for c in 0..d {
                for j in 0..e {
                    state[c * e + j] = self.decay(token, c) * state[c * e + j]
                        + self.k[token * d + c] * self.v[token * e + j];
                }
            }
            states.push(state);
        }
        states
    }

    /// Outputs and final states: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let Sizes {
            b: batch,
            n,
            h: heads,
            d,
            e,
        } = self.sizes;
        let mut o = vec![0.0; batch * n * heads * e];
        let mut last = Vec::with_capacity(batch * heads * d * e);
        for b in 0..batch {
            for h in 0..heads {
                let states = self.states(b, h);
                for t in 0..n {
                    let token = self.token(b, t, h);
                    for c in 0..d {
                        for j in 0..e {
                            o[token * e + j] += self.q[token * d + c] * states[t + 1][c * e + j];
                        }
                    }
                }
                last.extend_from_slice(&states[n]);
            }
        }
        (o, last)
    }

    /// Gradients by the adjoint state R_t = q_t do_t^T + diag(a_{t+1}) R_{t+1}, from the adjoints of the outputs and of
    /// the final state.
    pub fn backward(&self, d_o: &[f64], d_state: &[f64]) -> Gradients {
        let Sizes {
            b: batch,
            n,
            h: heads,
            d,
            e,
        } = self.sizes;
        let mut grads = Gradients {
            dq: vec![0.0; self.q.len()],
            dk: vec![0.0; self.k.len()],
            dv: vec![0.0; self.v.len()],
            dlog_decay: vec![0.0; self.log_decay.len()],
            dinitial: d_state.to_vec(),
        };
        for b in 0..batch {
            for h in 0..heads {
                let states = self.states(b, h);
                let adjoint = &mut grads.dinitial[(b * heads + h) * d * e..][..d * e];
                for t in (0..n).rev() {
                    let token = self.token(b, t, h);
                    for c in 0..d {
                        let a = self.decay(token, c);
                        for j in 0..e {
                            let at = c * e + j;
                            let (d_o, v) = (d_o[token * e + j], self.v[token * e + j]);
                            adjoint[at] += self.q[token * d + c] * d_o;
                            grads.dq[token * d + c] += states[t + 1][at] * d_o;
                            grads.dk[token * d + c] += adjoint[at] * v;
                            grads.dv[token * e + j] += adjoint[at] * self.k[token * d + c];
                            grads.dlog_decay[token * d + c] += a * states[t][at] * adjoint[at];
                            adjoint[at] *= a;
                        }
                    }
                }
            }
        }
        grads
    }
}
