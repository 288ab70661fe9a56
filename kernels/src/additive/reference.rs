//! Literal `f64` forms of the additive recurrence, for checking the fast ones. Slow and obvious on purpose.
//!
//! Arrays are flat and row-major: `q`, `logits` `[B, N, H, D]`, `v`, `o` `[B, N, H, E]`, `phase` `[N, H, D]`,
//! `keep` `[B, N]`, state `[B, H, D, E]`, or `[B, H, 2D, E]` with phases.

pub use crate::sizes::Sizes;

/// Inputs of the non-causal form.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Sizes of all arrays.
    pub sizes: Sizes,
    /// Queries `[B, N, H, D]`.
    pub q: &'a [f64],
    /// Logits of the keys `[B, N, H, D]`.
    pub logits: &'a [f64],
    /// Values `[B, N, H, E]`.
    pub v: &'a [f64],
    /// Phases in radians `[N, H, D]`.
    pub phase: Option<&'a [f64]>,
    /// Which tokens count `[B, N]`.
    pub keep: Option<&'a [bool]>,
}

/// Gradients of the non-causal form, each shaped like its input.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Adjoint of the queries.
    pub dq: Vec<f64>,
    /// Adjoint of the logits.
    pub dlogits: Vec<f64>,
    /// Adjoint of the values.
    pub dv: Vec<f64>,
    /// Adjoint of the phases, zero without phases.
    pub dphase: Vec<f64>,
}

impl Inputs<'_> {
    fn token(&self, b: usize, t: usize, h: usize) -> usize {
        (b * self.sizes.n + t) * self.sizes.h + h
    }

    fn width(&self) -> usize {
        self.sizes.d * if self.phase.is_some() { 2 } else { 1 }
    }

    fn counts(&self, b: usize, t: usize) -> bool {
        self.keep.is_none_or(|keep| keep[b * self.sizes.n + t])
    }

    /// `x` of one token, doubled to its cosine and sine parts where there are phases.
    fn rotate(&self, x: &[f64], t: usize, h: usize) -> Vec<f64> {
        match self.phase {
            None => x.to_vec(),
            Some(phase) => {
                let phase = &phase[(t * self.sizes.h + h) * self.sizes.d..][..self.sizes.d];
                let cos = x.iter().zip(phase).map(|(x, p)| x * p.cos());
                let sin = x.iter().zip(phase).map(|(x, p)| x * p.sin());
                cos.chain(sin).collect()
            }
        }
    }

    /// Softmax over tokens of one head: `[N, D]`.
    fn keys(&self, b: usize, h: usize) -> Vec<f64> {
        let Sizes { n, d, .. } = self.sizes;
        let tokens: Vec<usize> = (0..n).filter(|&t| self.counts(b, t)).collect();
        let mut keys = vec![0.0; n * d];
        for c in 0..d {
            let logit = |t: usize| self.logits[self.token(b, t, h) * d + c];
            let max = tokens.iter().map(|&t| logit(t)).fold(f64::NEG_INFINITY, f64::max);
            let den: f64 = tokens.iter().map(|&t| (logit(t) - max).exp()).sum();
            tokens
                .iter()
                .for_each(|&t| keys[t * d + c] = (logit(t) - max).exp() / den);
        }
        keys
    }

    /// Output `[B, N, H, E]` and state: K = softmax of logits over tokens, S = K^T V, O = Q S.
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let Sizes {
            b: batch,
            n,
            h: heads,
            d,
            e,
        } = self.sizes;
        let width = self.width();
        let mut o = vec![0.0; batch * n * heads * e];
        let mut state = vec![0.0; batch * heads * width * e];
        for b in 0..batch {
            for h in 0..heads {
                let state = &mut state[(b * heads + h) * width * e..][..width * e];
                for (t, key) in self.keys(b, h).chunks_exact(d).enumerate() {
                    for (c, k) in self.rotate(key, t, h).into_iter().enumerate() {
                        for j in 0..e {
                            state[c * e + j] += k * self.v[self.token(b, t, h) * e + j];
                        }
                    }
                }
                for t in 0..n {
                    let token = self.token(b, t, h);
                    for (c, q) in self
                        .rotate(&self.q[token * d..][..d], t, h)
                        .into_iter()
                        .enumerate()
                    {
                        for j in 0..e {
                            o[token * e + j] += q * state[c * e + j];
                        }
                    }
                }
            }
        }
        (o, state)
    }

    /// Gradients by the chain rule with the softmax Jacobian written out: no collapsed sums.
    pub fn backward(&self, d_o: &[f64], d_state: Option<&[f64]>) -> Gradients {
        let Sizes {
            b: batch,
            n,
            h: heads,
            d,
            e,
        } = self.sizes;
        let width = self.width();
        let (_, state) = self.forward();
        let mut grads = Gradients {
            dq: vec![0.0; self.q.len()],
            dlogits: vec![0.0; self.logits.len()],
            dv: vec![0.0; self.v.len()],
            dphase: vec![0.0; n * heads * d],
        };
        for b in 0..batch {
            for h in 0..heads {
                let state = &state[(b * heads + h) * width * e..][..width * e];
                let mut ds = match d_state {
                    Some(ds) => ds[(b * heads + h) * width * e..][..width * e].to_vec(),
                    None => vec![0.0; width * e],
                };
                for t in 0..n {
                    let token = self.token(b, t, h);
                    let d_o = &d_o[token * e..][..e];
                    let q = &self.q[token * d..][..d];
                    let dq: Vec<f64> = (0..width)
                        .map(|c| (0..e).map(|j| state[c * e + j] * d_o[j]).sum())
                        .collect();
                    self.rotate_back(q, &dq, t, h, &mut grads.dq[token * d..][..d], &mut grads.dphase);
                    for (c, q) in self.rotate(q, t, h).into_iter().enumerate() {
                        for j in 0..e {
                            ds[c * e + j] += q * d_o[j];
                        }
                    }
                }
                let keys = self.keys(b, h);
                let mut dkeys = vec![0.0; n * d];
                for t in 0..n {
                    let token = self.token(b, t, h);
                    let v = &self.v[token * e..][..e];
                    for (c, k) in self.rotate(&keys[t * d..][..d], t, h).into_iter().enumerate() {
                        for j in 0..e {
                            grads.dv[token * e + j] += k * ds[c * e + j];
                        }
                    }
                    let dk: Vec<f64> = (0..width)
                        .map(|c| (0..e).map(|j| ds[c * e + j] * v[j]).sum())
                        .collect();
                    self.rotate_back(
                        &keys[t * d..][..d],
                        &dk,
                        t,
                        h,
                        &mut dkeys[t * d..][..d],
                        &mut grads.dphase,
                    );
                }
                for c in 0..d {
                    for s in 0..n {
                        let through: f64 = (0..n)
                            .map(|t| {
                                let same = if s == t { 1.0 } else { 0.0 };
                                dkeys[t * d + c] * keys[t * d + c] * (same - keys[s * d + c])
                            })
                            .sum();
                        grads.dlogits[self.token(b, s, h) * d + c] += through;
                    }
                }
            }
        }
        grads
    }

    /// Adjoint of `rotate`: adds to `dx` and, with phases, to `dphase`.
    fn rotate_back(&self, x: &[f64], dy: &[f64], t: usize, h: usize, dx: &mut [f64], dphase: &mut [f64]) {
        let d = self.sizes.d;
        for c in 0..d {
            match self.phase {
                None => dx[c] += dy[c],
                Some(phase) => {
                    let at = (t * self.sizes.h + h) * d + c;
                    let (sin, cos) = phase[at].sin_cos();
                    dx[c] += cos * dy[c] + sin * dy[d + c];
                    dphase[at] += x[c] * (cos * dy[d + c] - sin * dy[c]);
                }
            }
        }
    }
}

/// The causal form, token by token: z_t = logaddexp(z_{t-1}, g_t), S_t = exp(z_{t-1} - z_t) S_{t-1} +
/// exp(g_t - z_t) v_t^T, o_t = S_t^T q_t. Returns `o [B, N, H, E]` and the last state `[B, H, D, E]`.
pub fn causal(sizes: Sizes, q: &[f64], logits: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let Sizes {
        b: batch,
        n,
        h: heads,
        d,
        e,
    } = sizes;
    let mut o = vec![0.0; batch * n * heads * e];
    let mut states = vec![0.0; batch * heads * d * e];
    for b in 0..batch {
        for h in 0..heads {
            let state = &mut states[(b * heads + h) * d * e..][..d * e];
            let mut z = vec![f64::NEG_INFINITY; d];
            for t in 0..n {
                let token = (b * n + t) * heads + h;
                for c in 0..d {
                    let g = logits[token * d + c];
                    let high = z[c].max(g);
                    let next = high + ((z[c] - high).exp() + (g - high).exp()).ln();
                    let (a, k) = ((z[c] - next).exp(), (g - next).exp());
                    z[c] = next;
                    for j in 0..e {
                        state[c * e + j] = a * state[c * e + j] + k * v[token * e + j];
                        o[token * e + j] += q[token * d + c] * state[c * e + j];
                    }
                }
            }
        }
    }
    (o, states)
}
