//! The chunked form against the literal recurrence, gradients against differences; parts and steps in `tests/joined.rs`.

mod joined;

use super::reference::{self, Sizes};
use super::{Causal, LogDecay, causal, step};
use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    None,
    Head,
    Token,
    Channel,
}

const KINDS: [Kind; 4] = [Kind::None, Kind::Head, Kind::Token, Kind::Channel];

impl Kind {
    fn with(self, log: &Tensor) -> LogDecay<'_> {
        match self {
            Self::None => LogDecay::None,
            Self::Head => LogDecay::Head(log),
            Self::Token => LogDecay::Token(log),
            Self::Channel => LogDecay::Channel(log),
        }
    }

    fn shape(self, Sizes { b, n, h, d, .. }: Sizes) -> Vec<usize> {
        match self {
            Self::None | Self::Head => vec![h],
            Self::Token => vec![b, n, h],
            Self::Channel => vec![b, n, h, d],
        }
    }

    /// Log-decays of the shape as `[B, N, H, D]`.
    fn spread(self, log: &Tensor, Sizes { b, n, h, d, .. }: Sizes) -> Result<Tensor> {
        match self {
            Self::None => Tensor::zeros((b, n, h, d), DType::F64, &Device::Cpu),
            Self::Head => log.reshape((1, 1, h, 1))?.broadcast_as((b, n, h, d)),
            Self::Token => log.unsqueeze(3)?.broadcast_as((b, n, h, d)),
            Self::Channel => Ok(log.clone()),
        }
    }

    /// The adjoint of the log-decays from that of their spread form.
    fn gather(self, spread: Vec<f64>, Sizes { b, n, h, d, .. }: Sizes) -> Result<Vec<f64>> {
        let spread = Tensor::from_vec(spread, (b, n, h, d), &Device::Cpu)?;
        Ok(values(&match self {
            Self::None | Self::Head => spread.sum((0, 1, 3))?,
            Self::Token => spread.sum(3)?,
            Self::Channel => spread,
        }))
    }
}

const NAMES: [&str; 7] = ["o", "state", "dq", "dk", "dv", "dinitial", "dlog"];

/// One set of inputs in f64 and of adjoints of the results.
pub(super) struct Case {
    sizes: Sizes,
    kind: Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    log: Tensor,
    pub(super) d_o: Tensor,
    pub(super) d_state: Tensor,
}

impl Case {
    pub(super) fn new(sizes: Sizes, kind: Kind) -> Self {
        let Sizes { b, n, h, d, e } = sizes;
        Self {
            sizes,
            kind,
            q: normal(1, &[b, n, h, d]),
            k: normal(2, &[b, n, h, d]),
            v: normal(3, &[b, n, h, e]),
            initial: normal(4, &[b, h, d, e]),
            // From hardly any decay to a strong one.
            log: (normal(5, &kind.shape(sizes)).sqr().unwrap() * -0.2).unwrap(),
            d_o: normal(6, &[b, n, h, e]),
            d_state: normal(7, &[b, h, d, e]),
        }
    }

    /// Results and gradients in the order of `NAMES`, without the last where there is no decay.
    pub(super) fn expected(&self) -> Result<Vec<Vec<f64>>> {
        let log = self.kind.spread(&self.log, self.sizes)?;
        let [q, k, v, initial, log] = [&self.q, &self.k, &self.v, &self.initial, &log].map(values);
        let inputs = reference::Inputs {
            sizes: self.sizes,
            q: &q,
            k: &k,
            v: &v,
            log_decay: &log,
            initial: &initial,
        };
        let (o, state) = inputs.forward();
        let grads = inputs.backward(&values(&self.d_o), &values(&self.d_state));
        let mut all = vec![o, state, grads.dq, grads.dk, grads.dv, grads.dinitial];
        if self.kind != Kind::None {
            all.push(self.kind.gather(grads.dlog_decay, self.sizes)?);
        }
        Ok(all)
    }

    /// The inputs in the order of the gradients.
    pub(super) fn inputs(&self) -> Vec<Tensor> {
        let mut all = vec![
            self.q.clone(),
            self.k.clone(),
            self.v.clone(),
            self.initial.clone(),
        ];
        if self.kind != Kind::None {
            all.push(self.log.clone());
        }
        all
    }

    fn run(&self, t: &[Tensor]) -> Result<(Tensor, Tensor)> {
        let options = Causal {
            decay: t.get(4).map_or(LogDecay::None, |log| self.kind.with(log)),
            initial: Some(&t[3]),
            ..Default::default()
        };
        causal(&t[0], &t[1], &t[2], &options)
    }

    fn found(&self, dtype: DType) -> Result<Vec<Vec<f64>>> {
        let vars: Vec<Var> = self
            .inputs()
            .iter()
            .map(|t| Var::from_tensor(&t.to_dtype(dtype)?))
            .collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let (o, state) = self.run(&tensors)?;
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

    fn check(&self, dtype: DType, tolerance: f64) -> Result<()> {
        let (found, expected) = (self.found(dtype)?, self.expected()?);
        assert_eq!(found.len(), expected.len());
        for ((name, found), expected) in NAMES.iter().zip(&found).zip(&expected) {
            let error = relative_rms(found, expected);
            assert!(
                error <= tolerance,
                "{name} of {:?} {:?} {dtype:?}: {error:e}",
                self.sizes,
                self.kind
            );
        }
        Ok(())
    }
}

fn sizes(n: usize, d: usize, e: usize) -> Sizes {
    Sizes { b: 2, n, h: 3, d, e }
}

#[test]
fn chunked_equals_the_literal_form() -> Result<()> {
    for kind in KINDS {
        for n in [1, 15, 16, 17, 63, 64, 65, 257] {
            Case::new(sizes(n, 16, 16), kind).check(DType::F64, 1e-10)?;
        }
        for n in [17, 65] {
            Case::new(sizes(n, 24, 16), kind).check(DType::F64, 1e-10)?;
            Case::new(sizes(n, 8, 80), kind).check(DType::F64, 1e-10)?;
            Case::new(sizes(n, 5, 3), kind).check(DType::F64, 1e-10)?;
        }
        Case::new(sizes(130, 24, 16), kind).check(DType::F32, 1e-5)?;
    }
    Ok(())
}

#[test]
fn long_sequences_equal_the_literal_form() -> Result<()> {
    for kind in KINDS {
        let sizes = Sizes {
            b: 1,
            n: 4096,
            h: 1,
            d: 8,
            e: 6,
        };
        let case = Case::new(sizes, kind);
        case.check(DType::F64, 1e-10)?;
        case.check(DType::F32, 2e-5)?;
    }
    Ok(())
}

#[test]
fn gradients_equal_central_differences() -> Result<()> {
    for kind in KINDS {
        let case = Case::new(
            Sizes {
                b: 2,
                n: 4,
                h: 2,
                d: 3,
                e: 2,
            },
            kind,
        );
        let inputs = case.inputs();
        check_gradients(&inputs, |t| Ok(case.run(t)?.0))?;
        // The state knows nothing of the queries.
        check_gradients(&inputs[1..], |t| {
            let mut all = vec![inputs[0].clone()];
            all.extend_from_slice(t);
            Ok(case.run(&all)?.1)
        })?;
        // Through both at once, and through views.
        check_gradients(&inputs, |t| {
            let (o, state) = case.run(t)?;
            let o = o.transpose(1, 2)?.mean(2)?.unsqueeze(2)?;
            state.broadcast_mul(&o)
        })?;
        check_gradients(&inputs[..3], |t| {
            let options = Causal {
                decay: kind.with(&case.log),
                ..Default::default()
            };
            Ok(causal(&t[0], &t[1], &t[2], &options)?.0)
        })?;
    }
    Ok(())
}

/// Chunks and blocks in finite differences too: few channels, more tokens than a chunk.
#[test]
fn gradients_across_chunks() -> Result<()> {
    for kind in KINDS {
        let case = Case::new(
            Sizes {
                b: 1,
                n: 82,
                h: 1,
                d: 2,
                e: 1,
            },
            kind,
        );
        check_gradients(&case.inputs(), |t| {
            let (o, state) = case.run(t)?;
            o.sum_all()? + state.sqr()?.sum_all()?
        })?;
    }
    Ok(())
}

/// Only a decay or an initial state is a variable, or nothing.
#[test]
fn single_variables_and_none() -> Result<()> {
    for kind in KINDS {
        let case = Case::new(sizes(20, 4, 5), kind);
        let inputs = case.inputs();
        let (o, state) = case.run(&inputs)?;
        assert!(!o.track_op() && !state.track_op());
        let expected = case.expected()?;
        for index in 0..inputs.len() {
            let mut tensors = inputs.clone();
            let var = Var::from_tensor(&inputs[index])?;
            tensors[index] = var.as_tensor().clone();
            let (o, state) = case.run(&tensors)?;
            let loss = ((o * &case.d_o)?.sum_all()? + (state * &case.d_state)?.sum_all()?)?;
            let grads = loss.backward()?;
            let found = values(grads.get(&var).expect("a gradient"));
            assert!(
                relative_rms(&found, &expected[index + 2]) < 1e-10,
                "{kind:?} input {index}"
            );
            // A second walk over the same graph finds the same.
            let again = loss.backward()?;
            assert_eq!(values(again.get(&var).expect("a gradient")), found);
        }
    }
    Ok(())
}

#[test]
fn f32_is_precise_and_independent_of_threads() -> Result<()> {
    for kind in KINDS {
        let case = Case::new(sizes(200, 20, 12), kind);
        let f = |t: &[Tensor]| {
            let (o, state) = case.run(t)?;
            Tensor::cat(&[o.flatten_all()?, state.flatten_all()?], 0)
        };
        check_precision(&case.inputs(), f, 1e-5)?;
        check_threads(&case.inputs(), f)?;
    }
    Ok(())
}

/// Decays of one, of zero, that underflow and that hardly differ from one, mixed over tokens and channels.
#[test]
fn extreme_decays() -> Result<()> {
    let extremes = [0.0, -1e4, f64::NEG_INFINITY, -1e-9, -100.0, 0.0, 0.0];
    for kind in [Kind::Head, Kind::Token, Kind::Channel] {
        for only in [None, Some(0.0), Some(-1e4), Some(f64::NEG_INFINITY), Some(-1e-9)] {
            let mut case = Case::new(sizes(130, 6, 4), kind);
            let shape = kind.shape(case.sizes);
            let count = shape.iter().product();
            let log: Vec<f64> = (0..count)
                .map(|i: usize| only.unwrap_or(extremes[i * i % 97 % extremes.len()]))
                .collect();
            case.log = Tensor::from_vec(log, shape, &Device::Cpu)?;
            let expected = case.expected()?;
            for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
                let found = case.found(dtype)?;
                for ((name, found), expected) in NAMES.iter().zip(&found).zip(&expected) {
                    let largest = found
                        .iter()
                        .zip(expected)
                        .map(|(a, b)| (a - b).abs())
                        .fold(0.0, f64::max);
                    let vanishes = expected.iter().all(|x| x.abs() < 1e-30);
                    let error = relative_rms(found, expected);
                    assert!(
                        error < tolerance || vanishes && largest < tolerance,
                        "{name} {kind:?} {only:?} {dtype:?}: relative {error:e}, largest {largest:e}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// 1e-5 a token over 65,536 tokens adds up, and nothing grows beyond what entered.
#[test]
fn long_runs_keep_slow_decays() -> Result<()> {
    let n = 65_536;
    let rates = [0.0, -1e-5, -1.0 / 256.0, -1.0, -8.0];
    let ones = Tensor::ones((1, n, 5, 1), DType::F32, &Device::Cpu)?;
    let heads = Tensor::from_vec(rates.to_vec(), 5, &Device::Cpu)?.to_dtype(DType::F32)?;
    let tokens = heads.reshape((1, 1, 5))?.broadcast_as((1, n, 5))?;
    let channels = tokens.unsqueeze(3)?;
    for decay in [
        LogDecay::Head(&heads),
        LogDecay::Token(&tokens),
        LogDecay::Channel(&channels),
    ] {
        let options = Causal {
            decay,
            ..Default::default()
        };
        let (_, state) = causal(&ones, &ones, &ones, &options)?;
        for (state, rate) in values(&state).into_iter().zip(rates) {
            let sum = |rate: f64| (f64::exp_m1(rate * n as f64)) / f64::exp_m1(rate);
            let expected = if rate == 0.0 {
                n as f64
            } else {
                sum(f64::from(rate as f32))
            };
            assert!(
                (state / expected - 1.0).abs() < 2e-5,
                "{rate}: {state}, expected {expected}"
            );
        }
    }
    Ok(())
}

#[test]
fn views_of_a_fused_projection() -> Result<()> {
    let (b, n, h, d) = (2, 70, 3, 4);
    for kind in KINDS {
        let turned = normal(7, &[4, b, h, d, n]);
        let strided = |i: usize| turned.get(i)?.permute((0, 3, 1, 2));
        let (q, k, v) = (strided(0)?, strided(1)?, strided(2)?);
        let log = (strided(3)?.sqr()? * -0.1)?
            .transpose(1, 3)?
            .contiguous()?
            .transpose(1, 3)?;
        let log = match kind {
            Kind::None | Kind::Head => log.i((0, 0, .., 1))?,
            Kind::Token => log.i((.., .., .., 1))?,
            Kind::Channel => log,
        };
        assert!([&q, &k, &v, &log].iter().all(|view| !view.is_contiguous()));
        let initial = normal(8, &[b, h, d, d]).transpose(2, 3)?;
        let run = |q: &Tensor, k: &Tensor, v: &Tensor, log: &Tensor, initial: &Tensor| {
            let options = Causal {
                decay: kind.with(log),
                initial: Some(initial),
                ..Default::default()
            };
            let (o, state) = causal(q, k, v, &options)?;
            Ok::<_, candle_core::Error>([values(&o), values(&state)])
        };
        let found = run(&q, &k, &v, &log, &initial);
        let dense = |t: &Tensor| t.force_contiguous();
        let expected = run(
            &dense(&q)?,
            &dense(&k)?,
            &dense(&v)?,
            &dense(&log)?,
            &dense(&initial)?,
        )?;
        for (found, expected) in found?.iter().zip(&expected) {
            assert!(relative_rms(found, expected) < 1e-13, "{kind:?}");
        }
    }
    Ok(())
}

#[test]
fn sixteen_bit_inputs_are_computed_in_f32() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let case = Case::new(sizes(65, 8, 6), Kind::Token);
        let narrow: Vec<Tensor> = case
            .inputs()
            .iter()
            .map(|t| t.to_dtype(dtype))
            .collect::<Result<_>>()?;
        let wide: Vec<Tensor> = narrow
            .iter()
            .map(|t| t.to_dtype(DType::F64))
            .collect::<Result<_>>()?;
        let ((o, state), (expected, expected_state)) = (case.run(&narrow)?, case.run(&wide)?);
        assert_eq!((o.dtype(), state.dtype()), (dtype, DType::F32));
        assert_eq!(expected_state.dtype(), DType::F64);
        assert!(relative_rms(&values(&state), &values(&expected_state)) < 1e-5);
        assert!(relative_rms(&values(&o), &values(&expected)) < 4e-3);
        // Gradients come in the types of the inputs.
        let vars: Vec<Var> = narrow.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let grads = case.run(&tensors)?.0.sum_all()?.backward()?;
        assert!(
            vars.iter()
                .all(|var| grads.get(var).expect("a gradient").dtype() == dtype)
        );
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let good = normal(1, &[2, 4, 3, 5]);
    let (flat, off) = (normal(1, &[3, 5]), Causal::default());
    let message = |result: Result<(Tensor, Tensor)>| result.unwrap_err().to_string();
    let with = |options: Causal<'_>| message(causal(&good, &good, &good, &options));
    let expect = |text: String, part: &str| assert!(text.contains(part) && !text.contains('\n'), "{text}");
    expect(
        message(causal(&flat, &good, &good, &off)),
        "q has shape [3, 5], expected [B, N, H, D]",
    );
    let empty = Tensor::zeros((2, 0, 3, 5), DType::F32, &Device::Cpu).unwrap();
    expect(
        message(causal(&empty, &empty, &empty, &off)),
        "q has shape [2, 0, 3, 5]",
    );
    let other = normal(1, &[2, 4, 3, 6]);
    expect(
        message(causal(&good, &other, &good, &off)),
        "k has shape [2, 4, 3, 6], expected [2, 4, 3, 5]",
    );
    let short = normal(1, &[2, 3, 3, 6]);
    expect(
        message(causal(&good, &good, &short, &off)),
        "v has shape [2, 3, 3, 6], expected [2, 4, 3, E]",
    );
    for (decay, expected) in [
        (LogDecay::Head(&flat), "[3]"),
        (LogDecay::Token(&flat), "[2, 4, 3]"),
        (LogDecay::Channel(&flat), "[2, 4, 3, 5]"),
    ] {
        let text = with(Causal {
            decay,
            ..Default::default()
        });
        expect(text, &format!("decay has shape [3, 5], expected {expected}"));
    }
    let text = with(Causal {
        initial: Some(&flat),
        ..Default::default()
    });
    expect(text, "initial has shape [3, 5], expected [2, 3, 5, 5]");
    let text = with(Causal {
        sequences: Some(&[0, 4]),
        ..Default::default()
    });
    expect(text, "sequences is [0, 4], expected 0, .., 4");
    let one = good.narrow(0, 0, 1).unwrap();
    for borders in [&[] as &[usize], &[0], &[1, 4], &[0, 3], &[0, 3, 2, 4]] {
        let options = Causal {
            sequences: Some(borders),
            ..Default::default()
        };
        expect(message(causal(&one, &one, &one, &options)), "sequences is [");
    }
    let whole = good.to_dtype(DType::I64).unwrap();
    expect(message(causal(&whole, &whole, &whole, &off)), "q is I64");
    let (token, state) = (normal(1, &[2, 3, 5]), normal(1, &[2, 3, 5, 5]));
    let text = message(step(&token, &token, &token, LogDecay::Token(&flat), &state));
    expect(text, "log_decay has shape [3, 5], expected [2, 3]");
    expect(
        message(step(&token, &token, &token, LogDecay::None, &good)),
        "state has shape [2, 4, 3, 5]",
    );
}
