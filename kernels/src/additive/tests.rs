//! Every form against the literal one, gradients against differences, and the promises of LightNet's paper.

use super::reference::{Inputs, Sizes, causal};
use super::{Form, NonCausal, noncausal, run};
use crate::exchange::{StateExchange, threads};
use crate::testing::{check_gradients, check_precision, normal, relative_rms, values};
use candle_core::{DType, Device, Result, Tensor, Var};
use std::sync::Arc;

const LENGTHS: [usize; 10] = [1, 2, 15, 16, 17, 63, 64, 65, 128, 257];

/// One set of inputs in f64 and what they are made with.
pub(super) struct Case {
    sizes: Sizes,
    pub(super) q: Tensor,
    pub(super) logits: Tensor,
    pub(super) v: Tensor,
    phase: Option<Tensor>,
    keep: Option<Vec<bool>>,
    pub(super) d_o: Tensor,
    pub(super) d_state: Tensor,
}

impl Case {
    pub(super) fn new(sizes: Sizes, phase: bool, mask: bool) -> Self {
        let Sizes { b, n, h, d, e } = sizes;
        let width = if phase { 2 * d } else { d };
        // The second sequence is padding from its first token on where N is 2: a row without tokens.
        let keep = mask.then(|| {
            (0..b * n)
                .map(|i| if i < n { i % 3 != 1 } else { n > 2 && i % 4 != 0 })
                .collect()
        });
        Self {
            sizes,
            q: normal(1, &[b, n, h, d]),
            logits: (normal(2, &[b, n, h, d]) * 3.0).unwrap(),
            v: normal(3, &[b, n, h, e]),
            phase: phase.then(|| (normal(4, &[n, h, d]) * 2.0).unwrap()),
            keep,
            d_o: normal(5, &[b, n, h, e]),
            d_state: normal(6, &[b, h, width, e]),
        }
    }

    fn mask(&self) -> Option<Tensor> {
        let keep: Vec<u8> = self.keep.as_ref()?.iter().map(|&keep| u8::from(keep)).collect();
        Some(Tensor::from_vec(keep, (self.sizes.b, self.sizes.n), &Device::Cpu).unwrap())
    }

    /// o, state, dq, dlogits, dv and, with phases, dphase.
    pub(super) fn expected(&self) -> Vec<Vec<f64>> {
        let [q, logits, v] = [&self.q, &self.logits, &self.v].map(values);
        let phase = self.phase.as_ref().map(values);
        let keep = self.keep.as_deref();
        let inputs = Inputs {
            sizes: self.sizes,
            q: &q,
            logits: &logits,
            v: &v,
            phase: phase.as_deref(),
            keep,
        };
        let (o, state) = inputs.forward();
        let grads = inputs.backward(&values(&self.d_o), Some(&values(&self.d_state)));
        let mut all = vec![o, state, grads.dq, grads.dlogits, grads.dv];
        if phase.is_some() {
            all.push(grads.dphase);
        }
        all
    }

    /// The same from the operator, in `dtype` and `form`.
    fn found(&self, dtype: DType, form: Form) -> Result<Vec<Vec<f64>>> {
        let var = |t: &Tensor| Var::from_tensor(&t.to_dtype(dtype)?);
        let mut vars = vec![var(&self.q)?, var(&self.logits)?, var(&self.v)?];
        if let Some(phase) = &self.phase {
            vars.push(var(phase)?);
        }
        let mask = self.mask();
        let options = NonCausal {
            phase: vars.get(3).map(Var::as_tensor),
            mask: mask.as_ref(),
            exchange: None,
        };
        let (o, state) = run(&vars[0], &vars[1], &vars[2], &options, form)?;
        let loss = ((&o * self.d_o.to_dtype(dtype)?)?.sum_all()?
            + (&state * self.d_state.to_dtype(dtype)?)?.sum_all()?)?;
        let grads = loss.backward()?;
        let mut all = vec![values(&o), values(&state)];
        all.extend(
            vars.iter()
                .map(|var| values(grads.get(var).expect("a gradient for every input"))),
        );
        Ok(all)
    }

    fn check(&self, dtype: DType, form: Form, tolerance: f64) -> Result<()> {
        const NAMES: [&str; 6] = ["o", "state", "dq", "dlogits", "dv", "dphase"];
        let (found, expected) = (self.found(dtype, form)?, self.expected());
        assert_eq!(found.len(), expected.len());
        for ((name, found), expected) in NAMES.iter().zip(&found).zip(&expected) {
            let largest = found
                .iter()
                .zip(expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max);
            let error = relative_rms(found, expected);
            // The gradient of the logits of a lone token is zero; only the absolute size says anything.
            let vanishes = expected.iter().all(|x| x.abs() < 1e-12);
            assert!(
                error <= tolerance || vanishes && largest <= tolerance,
                "{name} of {:?} {form:?} {dtype:?}: relative {error:e}, largest {largest:e}",
                self.sizes
            );
        }
        Ok(())
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in LENGTHS {
        for (phase, mask) in [(false, false), (true, false), (false, true), (true, true)] {
            cases.push(Case::new(
                Sizes {
                    b: 2,
                    n,
                    h: 3,
                    d: 5,
                    e: 7,
                },
                phase,
                mask,
            ));
        }
    }
    cases
}

#[test]
fn both_forms_equal_the_literal_one() -> Result<()> {
    for case in cases() {
        for form in [Form::Chunked, Form::Composed] {
            case.check(DType::F64, form, 1e-10)?;
            case.check(DType::F32, form, 1e-5)?;
        }
    }
    Ok(())
}

/// Longer than a step and a partial state: 64 partial states of 512 tokens, the last ones empty or short.
#[test]
fn long_sequences_equal_the_literal_form() -> Result<()> {
    let (b, n, h, d, e) = (1, 16_900, 1, 2, 3);
    let (q, v) = (normal(1, &[b, n, h, d]), normal(3, &[b, n, h, e]));
    // Growing logits make every step rescale what came before.
    let slope = (Tensor::arange(0f64, n as f64, &Device::Cpu)? * 0.01)?.reshape((1, n, 1, 1))?;
    let logits = normal(2, &[b, n, h, d]).broadcast_add(&slope)?;
    let inputs = [&q, &logits, &v].map(values);
    let sizes = Sizes { b, n, h, d, e };
    let [q_vec, g_vec, v_vec] = &inputs;
    let reference = Inputs {
        sizes,
        q: q_vec,
        logits: g_vec,
        v: v_vec,
        phase: None,
        keep: None,
    };
    let (o, state) = reference.forward();
    let (found_o, found_state) = noncausal(&q, &logits, &v, &NonCausal::default())?;
    assert!(relative_rms(&values(&found_o), &o) < 1e-10);
    assert!(relative_rms(&values(&found_state), &state) < 1e-10);
    check_precision(
        &[q, logits, v],
        |t| Ok(noncausal(&t[0], &t[1], &t[2], &NonCausal::default())?.0),
        1e-5,
    )
}

#[test]
fn gradients_equal_central_differences() -> Result<()> {
    let device = &Device::Cpu;
    let mask = Tensor::new(&[[1u8, 0, 1, 1], [0, 0, 0, 1]], device)?;
    let inputs = [
        normal(1, &[2, 4, 2, 3]),
        normal(2, &[2, 4, 2, 3]),
        normal(3, &[2, 4, 2, 2]),
        normal(4, &[4, 2, 3]),
        normal(5, &[4, 3]),
    ];
    for form in [Form::Chunked, Form::Composed] {
        for read_state in [false, true] {
            let pick = move |(o, state): (Tensor, Tensor)| if read_state { state } else { o };
            // The state knows nothing of q: it is checked with q fixed.
            let q = inputs[0].clone();
            let take_q = move |t: &Tensor| if read_state { q.clone() } else { t.clone() };
            let first = usize::from(read_state);
            let with_q = |t: &[Tensor]| -> Vec<Tensor> {
                let mut all = t.to_vec();
                if read_state {
                    all.insert(0, take_q(&t[0]));
                }
                all
            };
            check_gradients(&inputs[first..3], |t| {
                let t = with_q(t);
                let options = NonCausal {
                    mask: Some(&mask),
                    ..Default::default()
                };
                Ok(pick(run(&t[0], &t[1], &t[2], &options, form)?))
            })?;
            check_gradients(&inputs[first..4], |t| {
                let t = with_q(t);
                let options = NonCausal {
                    phase: Some(&t[3]),
                    ..Default::default()
                };
                Ok(pick(run(&t[0], &t[1], &t[2], &options, form)?))
            })?;
            let shared = [&inputs[first..3], &inputs[4..]].concat();
            check_gradients(&shared, |t| {
                let t = with_q(t);
                let options = NonCausal {
                    phase: Some(&t[3]),
                    mask: Some(&mask),
                    ..Default::default()
                };
                Ok(pick(run(&t[0], &t[1], &t[2], &options, form)?))
            })?;
        }
    }
    Ok(())
}

#[test]
fn narrow_views_of_a_fused_projection_and_broadcasts() -> Result<()> {
    let (b, n, h, d) = (2, 33, 3, 4);
    let fused = normal(7, &[b, n, 3 * h * d]);
    let split = |fused: &Tensor, i: usize| fused.narrow(2, i * h * d, h * d)?.reshape((b, n, h, d));
    let dense = [split(&fused, 0)?, split(&fused, 1)?, split(&fused, 2)?];
    // The same views without the copy that reshape makes: heads first in memory, broken strides everywhere.
    let turned = fused
        .reshape((b, n, 3, h, d))?
        .permute((2, 0, 3, 4, 1))?
        .contiguous()?;
    let strided = |i: usize| turned.get(i)?.permute((0, 3, 1, 2));
    let options = NonCausal::default();
    let (o, state) = noncausal(&dense[0], &dense[1], &dense[2], &options)?;
    let views = [strided(0)?, strided(1)?, strided(2)?];
    assert!(views.iter().all(|view| !view.is_contiguous()));
    let (o_views, state_views) = noncausal(&views[0], &views[1], &views[2], &options)?;
    assert!(relative_rms(&values(&o_views), &values(&o)) < 1e-13);
    assert!(relative_rms(&values(&state_views), &values(&state)) < 1e-13);
    // A fused projection that a graph remembers: one gradient of its whole width.
    let var = Var::from_tensor(&fused)?;
    let heads = var.reshape((b, n, 3 * h, d))?;
    let part = |i: usize| heads.narrow(2, i * h, h);
    let (o, _) = noncausal(&part(0)?, &part(1)?, &part(2)?, &options)?;
    let weights = normal(9, &[b, n, h, d]);
    let grads = (&o * &weights)?.sum_all()?.backward()?;
    let [q, logits, v] = [&dense[0], &dense[1], &dense[2]].map(values);
    let sizes = Sizes { b, n, h, d, e: d };
    let inputs = Inputs {
        sizes,
        q: &q,
        logits: &logits,
        v: &v,
        phase: None,
        keep: None,
    };
    let expected = inputs.backward(&values(&weights), None);
    let found = grads.get(&var).expect("a gradient").reshape((b, n, 3, h, d))?;
    for (i, expected) in [expected.dq, expected.dlogits, expected.dv].iter().enumerate() {
        assert!(
            relative_rms(&values(&found.narrow(2, i, 1)?), expected) < 1e-10,
            "part {i}"
        );
    }
    // One query for all tokens, through a stride of zero.
    let one = normal(8, &[b, 1, h, d]);
    let (o, _) = noncausal(&one.broadcast_as((b, n, h, d))?, &dense[1], &dense[2], &options)?;
    let (o_dense, _) = noncausal(&one.repeat((1, n, 1, 1))?, &dense[1], &dense[2], &options)?;
    assert!(relative_rms(&values(&o), &values(&o_dense)) < 1e-13);
    Ok(())
}

/// 5.8.1: what the causal form knows at its last token is what the non-causal form knows everywhere.
#[test]
fn causal_at_the_last_token_equals_noncausal() -> Result<()> {
    for n in [1, 2, 17, 64] {
        let sizes = Sizes {
            b: 2,
            n,
            h: 3,
            d: 5,
            e: 7,
        };
        let case = Case::new(sizes, false, false);
        let (o_causal, state_causal) =
            causal(sizes, &values(&case.q), &values(&case.logits), &values(&case.v));
        let (o, state) = noncausal(&case.q, &case.logits, &case.v, &NonCausal::default())?;
        assert!(relative_rms(&values(&state), &state_causal) < 1e-10);
        let last = values(&o.narrow(1, n - 1, 1)?);
        let row = sizes.h * sizes.e;
        for b in 0..sizes.b {
            let causal_last = &o_causal[(b * n + n - 1) * row..][..row];
            assert!(relative_rms(&last[b * row..][..row], causal_last) < 1e-10);
        }
    }
    Ok(())
}

/// 5.8.2: tokens may come in any order.
#[test]
fn permuting_tokens_permutes_the_output() -> Result<()> {
    let n = 65;
    let case = Case::new(
        Sizes {
            b: 2,
            n,
            h: 3,
            d: 5,
            e: 7,
        },
        true,
        false,
    );
    let order = crate::philox::Philox::new(3, 3).permutation(n);
    let order = Tensor::from_vec(
        order.into_iter().map(|i| i as u32).collect::<Vec<_>>(),
        n,
        &Device::Cpu,
    )?;
    let shuffle = |t: &Tensor, dim: usize| t.index_select(&order, dim);
    let (o, state) = noncausal(&case.q, &case.logits, &case.v, &NonCausal::default())?;
    let (q, logits, v) = (
        shuffle(&case.q, 1)?,
        shuffle(&case.logits, 1)?,
        shuffle(&case.v, 1)?,
    );
    let (o_shuffled, state_shuffled) = noncausal(&q, &logits, &v, &NonCausal::default())?;
    assert!(relative_rms(&values(&o_shuffled), &values(&shuffle(&o, 1)?)) < 1e-12);
    assert!(relative_rms(&values(&state_shuffled), &values(&state)) < 1e-12);
    // With phases only if they move along; fixed phases must make order matter.
    let phase = case.phase.as_ref().expect("a case with phases");
    let with = |phase: &Tensor, q: &Tensor, logits: &Tensor, v: &Tensor| {
        noncausal(
            q,
            logits,
            v,
            &NonCausal {
                phase: Some(phase),
                ..Default::default()
            },
        )
    };
    let (o, _) = with(phase, &case.q, &case.logits, &case.v)?;
    let (moved, _) = with(&shuffle(phase, 0)?, &q, &logits, &v)?;
    let (fixed, _) = with(phase, &q, &logits, &v)?;
    assert!(relative_rms(&values(&moved), &values(&shuffle(&o, 1)?)) < 1e-12);
    assert!(relative_rms(&values(&fixed), &values(&shuffle(&o, 1)?)) > 0.1);
    Ok(())
}

/// 5.8.3 to 5.8.5: constant logits average, a constant shift changes nothing, one token, convexity.
#[test]
fn softmax_promises() -> Result<()> {
    let sizes = Sizes {
        b: 2,
        n: 63,
        h: 3,
        d: 5,
        e: 7,
    };
    let case = Case::new(sizes, false, false);
    let off = NonCausal::default();
    let q_sum = case.q.sum_keepdim(3)?;
    let (o, _) = noncausal(&case.q, &(case.logits.zeros_like()? + 0.7)?, &case.v, &off)?;
    let mean = case.v.mean_keepdim(1)?.broadcast_mul(&q_sum)?;
    assert!(
        relative_rms(&values(&o), &values(&mean)) < 1e-12,
        "constant logits"
    );

    let fixed = (case.v.zeros_like()? + 1.5)?;
    let (o, _) = noncausal(&case.q, &case.logits, &fixed, &off)?;
    let expected = (q_sum * 1.5)?.broadcast_as(case.v.shape())?;
    assert!(
        relative_rms(&values(&o), &values(&expected)) < 1e-12,
        "equal values"
    );

    let one = |t: &Tensor| t.narrow(1, 20, 1);
    let (o, _) = noncausal(&one(&case.q)?, &one(&case.logits)?, &one(&case.v)?, &off)?;
    let expected = one(&case.v)?.broadcast_mul(&one(&case.q)?.sum_keepdim(3)?)?;
    assert!(relative_rms(&values(&o), &values(&expected)) < 1e-13, "one token");

    for form in [Form::Chunked, Form::Composed] {
        // Logits on a grid that f32 keeps exactly beside 1e4: the shift may then not change a bit of the keys.
        let logits = ((case.logits.to_dtype(DType::F32)? * 64.0)?.round()? / 64.0)?;
        let (q, v) = (case.q.to_dtype(DType::F32)?, case.v.to_dtype(DType::F32)?);
        let (o, _) = run(&q, &logits, &v, &off, form)?;
        for shift in [1e4, -1e4] {
            let (shifted, _) = run(&q, &(&logits + shift)?, &v, &off, form)?;
            assert!(
                relative_rms(&values(&shifted), &values(&o)) < 1e-6,
                "{form:?} shifted by {shift}"
            );
        }
    }
    Ok(())
}

/// Padding may hold anything, and a row without a token gives zeros in every result.
#[test]
fn padding_never_leaks() -> Result<()> {
    let (b, n, h, d, e) = (2, 5, 2, 3, 4);
    let mask = Tensor::new(&[[1f32, 1.0, 1.0, 0.0, 0.0], [0.0; 5]], &Device::Cpu)?;
    for form in [Form::Chunked, Form::Composed] {
        let poison = |t: Tensor| -> Result<Var> {
            let tokens = mask.ne(0f64)?.reshape((b, n, 1, 1))?.broadcast_as(t.shape())?;
            Var::from_tensor(&tokens.where_cond(&t, &(t.ones_like()? * f64::NAN)?)?)
        };
        let q = Var::from_tensor(&normal(1, &[b, n, h, d]))?;
        let (logits, v) = (
            poison(normal(2, &[b, n, h, d]))?,
            poison(normal(3, &[b, n, h, e]))?,
        );
        let options = NonCausal {
            mask: Some(&mask),
            ..Default::default()
        };
        let (o, state) = run(&q, &logits, &v, &options, form)?;
        let short = |t: &Tensor| t.narrow(0, 0, 1)?.narrow(1, 0, 3);
        let (expected, _) = noncausal(&short(&q)?, &short(&logits)?, &short(&v)?, &NonCausal::default())?;
        assert!(relative_rms(&values(&short(&o)?), &values(&expected)) < 1e-12);
        assert!(
            values(&state.get(1)?)
                .iter()
                .chain(&values(&o.get(1)?))
                .all(|&x| x == 0.0)
        );
        let grads = (o.sqr()?.sum_all()? + state.sum_all()?)?.backward()?;
        for var in [&q, &logits, &v] {
            let grad = values(grads.get(var).expect("a gradient"));
            assert!(grad.iter().all(|x| x.is_finite()), "{form:?}");
        }
        let padded = grads.get(&v).expect("a gradient").narrow(1, 3, 2)?;
        assert!(values(&padded).iter().all(|&x| x == 0.0));
    }
    Ok(())
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for (phase, n) in [(false, 700), (true, 300)] {
        let case = Case::new(
            Sizes {
                b: 2,
                n,
                h: 3,
                d: 20,
                e: 12,
            },
            phase,
            true,
        );
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            pool.install(|| case.found(DType::F32, Form::Chunked))
        };
        let one = on(1)?;
        assert_eq!(one, on(2)?);
        assert_eq!(one, on(5)?);
    }
    Ok(())
}

/// Two parts on two threads, joined by an exchange, are the whole: forward and backward.
#[test]
fn parts_with_an_exchange_are_the_whole() -> Result<()> {
    for (form, lengths) in [
        (Form::Chunked, [13, 20]),
        (Form::Composed, [13, 20]),
        (Form::Chunked, [1, 300]),
    ] {
        let n = lengths.iter().sum();
        let case = Case::new(
            Sizes {
                b: 2,
                n,
                h: 3,
                d: 5,
                e: 7,
            },
            true,
            true,
        );
        let whole = case.found(DType::F64, form)?;
        let mask = case.mask().expect("a case with a mask");
        let part = |exchange: Arc<dyn StateExchange>, len: usize| -> Result<Vec<Tensor>> {
            let start = exchange.position_offset();
            let cut = |t: &Tensor| Var::from_tensor(&t.narrow(1, start, len)?.contiguous()?);
            let vars = [cut(&case.q)?, cut(&case.logits)?, cut(&case.v)?];
            let phase = case.phase.as_ref().expect("phases").narrow(0, start, len)?;
            let phase = Var::from_tensor(&phase.contiguous()?)?;
            let mask = mask.narrow(1, start, len)?;
            let options = NonCausal {
                phase: Some(&phase),
                mask: Some(&mask),
                exchange: Some(exchange),
            };
            let (o, state) = run(&vars[0], &vars[1], &vars[2], &options, form)?;
            let mut loss = (&o * case.d_o.narrow(1, start, len)?)?.sum_all()?;
            // The loss on the shared state belongs to one part.
            if start == 0 {
                loss = (loss + (&state * &case.d_state)?.sum_all()?)?;
            }
            let grads = loss.backward()?;
            let mut all = vec![o.detach(), state.detach()];
            for var in vars.iter().chain([&phase]) {
                all.push(grads.get(var).expect("a gradient").clone());
            }
            Ok(all)
        };
        let exchanges = threads(&lengths);
        let parts: Vec<Vec<Tensor>> = std::thread::scope(|scope| {
            let running: Vec<_> = exchanges
                .into_iter()
                .zip(lengths)
                .map(|(exchange, len)| scope.spawn(move || part(exchange, len)))
                .collect();
            running
                .into_iter()
                .map(|part| part.join().expect("no panic"))
                .collect::<Result<_>>()
        })?;
        for (i, (dim, whole)) in [1, 9, 1, 1, 1, 0].into_iter().zip(&whole).enumerate() {
            let joined = match dim {
                9 => {
                    assert_eq!(
                        values(&parts[0][i]),
                        values(&parts[1][i]),
                        "parts agree on the state"
                    );
                    parts[0][i].clone()
                }
                dim => Tensor::cat(&[&parts[0][i], &parts[1][i]], dim)?,
            };
            assert!(
                relative_rms(&values(&joined), whole) < 1e-10,
                "result {i} of {form:?} {lengths:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn sixteen_bit_inputs_are_computed_in_f32() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let case = Case::new(
            Sizes {
                b: 2,
                n: 65,
                h: 3,
                d: 5,
                e: 7,
            },
            true,
            false,
        );
        let narrow = |t: &Tensor| t.to_dtype(dtype);
        let (q, logits, v) = (narrow(&case.q)?, narrow(&case.logits)?, narrow(&case.v)?);
        let phase = case.phase.as_ref().expect("phases").to_dtype(DType::F32)?;
        let options = NonCausal {
            phase: Some(&phase),
            ..Default::default()
        };
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let (expected, expected_state) = noncausal(&wide(&q)?, &wide(&logits)?, &wide(&v)?, &options)?;
        for form in [Form::Chunked, Form::Composed] {
            let (o, state) = run(&q, &logits, &v, &options, form)?;
            assert_eq!((o.dtype(), state.dtype()), (dtype, DType::F32));
            assert!(relative_rms(&values(&state), &values(&expected_state)) < 1e-5);
            assert!(relative_rms(&values(&o), &values(&expected)) < 4e-3);
        }
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let good = normal(1, &[2, 4, 3, 5]);
    let off = NonCausal::default();
    let message = |result: Result<(Tensor, Tensor)>| result.unwrap_err().to_string();
    let text = message(noncausal(&good, &normal(1, &[2, 4, 3, 6]), &good, &off));
    assert!(
        text.contains("logits has shape [2, 4, 3, 6]") && text.contains("[2, 4, 3, 5]"),
        "{text}"
    );
    let text = message(noncausal(&good, &good, &normal(1, &[2, 5, 3, 5]), &off));
    assert!(text.contains("v has shape [2, 5, 3, 5]"), "{text}");
    let phase = normal(1, &[3, 5]);
    let text = message(noncausal(
        &good,
        &good,
        &good,
        &NonCausal {
            phase: Some(&phase),
            ..off.clone()
        },
    ));
    assert!(
        text.contains("phase has shape [3, 5], expected [4, 5] or [4, 3, 5]"),
        "{text}"
    );
    let text = message(noncausal(
        &good,
        &good,
        &good,
        &NonCausal {
            mask: Some(&phase),
            ..off.clone()
        },
    ));
    assert!(text.contains("mask has shape [3, 5], expected [2, 4]"), "{text}");
    let whole = good.to_dtype(DType::I64).unwrap();
    let text = message(noncausal(&whole, &whole, &whole, &off));
    assert!(text.contains("q is I64"), "{text}");
    assert!(message(noncausal(&phase, &good, &good, &off)).contains("[B, N, H, D]"));
}
