//! Operators over ranks beside operators over the whole, both methods, and the bytes that they move.

use candle_core::{DType, Device, Var};
use fulgur_kernels::additive::{self, NonCausal, noncausal};
use fulgur_kernels::decay::{self, LogDecay};
use fulgur_kernels::ema;
use fulgur_kernels::exchange::part_borders;
use fulgur_kernels::philox::Philox;

use super::*;
use crate::distributed::communicator::Traffic;
use crate::distributed::threads::Settings;
use crate::distributed::threads::tests::each;

const B: usize = 2;
const H: usize = 3;
const D: usize = 4;
const E: usize = 5;

fn normal(name: &str, shape: &[usize], dtype: DType) -> Tensor {
    let values = Philox::named(1, name).normals(shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)
        .and_then(|t| t.to_dtype(dtype))
        .unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Head,
    Token,
    Channel,
    Causal,
    Both,
    Ema,
}

const KINDS: [Kind; 7] = [
    Kind::None,
    Kind::Head,
    Kind::Token,
    Kind::Channel,
    Kind::Causal,
    Kind::Both,
    Kind::Ema,
];

/// Operands of the operator; those with tokens on the second axis are cut.
fn operands(kind: Kind, batch: usize, tokens: usize, dtype: DType) -> Vec<(Tensor, bool)> {
    let of = |name: &str, shape: &[usize]| (normal(name, shape, dtype), true);
    let log = |shape: &[usize], cut| {
        let log = normal("log", shape, dtype).abs().unwrap().neg().unwrap();
        (log, cut)
    };
    let mut all = vec![
        of("q", &[batch, tokens, H, D]),
        of("k", &[batch, tokens, H, D]),
        of("v", &[batch, tokens, H, E]),
    ];
    match kind {
        // Heads that forget nothing, a little, and quickly.
        Kind::Head => {
            let rates = Tensor::new(&[0f64, -0.01, -2.0], &Device::Cpu).unwrap();
            all.push((rates.to_dtype(dtype).unwrap(), false));
        }
        Kind::Token => all.push(log(&[batch, tokens, H], true)),
        Kind::Channel => all.push(log(&[batch, tokens, H, D], true)),
        Kind::Ema => {
            all = vec![
                of("x", &[batch, tokens, 1, H, D]),
                (normal("gamma", &[H], dtype), false),
                (normal("weight", &[H], dtype), false),
            ];
        }
        Kind::None | Kind::Causal | Kind::Both => {}
    }
    all
}

/// Output and final state of the operator.
fn operate(
    kind: Kind,
    t: &[Tensor],
    exchange: Option<Arc<dyn StateExchange>>,
    sequences: Option<&[usize]>,
) -> Result<[Tensor; 2]> {
    let decay = match kind {
        Kind::Head => LogDecay::Head(&t[3]),
        Kind::Token => LogDecay::Token(&t[3]),
        Kind::Channel => LogDecay::Channel(&t[3]),
        _ => LogDecay::None,
    };
    match kind {
        Kind::Causal => {
            let options = additive::Causal {
                exchange,
                sequences,
                ..Default::default()
            };
            let (o, last) = additive::causal(&t[0], &t[1], &t[2], &options)?;
            Ok([o, last.state])
        }
        Kind::Both => {
            let options = NonCausal {
                exchange,
                ..Default::default()
            };
            let (o, state) = noncausal(&t[0], &t[1], &t[2], &options)?;
            Ok([o, state])
        }
        Kind::Ema => {
            let options = ema::Options {
                exchange,
                ..Default::default()
            };
            let o = ema::scan(&t[0], &t[1], &t[2], &options)?;
            Ok([o.clone(), o.narrow(1, o.dim(1)? - 1, 1)?])
        }
        _ => {
            let options = decay::Causal {
                decay,
                exchange,
                sequences,
                ..Default::default()
            };
            let (o, state) = decay::causal(&t[0], &t[1], &t[2], &options)?;
            Ok([o, state])
        }
    }
}

/// Output, final state and all gradients of a part, or of the whole.
fn results(
    kind: Kind,
    t: &[Tensor],
    weights: &Tensor,
    exchange: Option<Arc<dyn StateExchange>>,
    sequences: Option<&[usize]>,
) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> = t.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let [o, state] = operate(kind, &tensors, exchange, sequences)?;
    let gradients = (&o * weights)?.sum_all()?.backward()?;
    let mut all = vec![o.detach(), state.detach()];
    for var in &vars {
        all.push(match gradients.get(var) {
            Some(gradient) => gradient.clone(),
            None => var.as_detached_tensor().zeros_like()?,
        });
    }
    Ok(all)
}

fn apart(found: &Tensor, expected: &Tensor) -> f64 {
    let length = |x: &Tensor| {
        let wide = x.to_dtype(DType::F64).unwrap();
        wide.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
            .sqrt()
    };
    length(&(found - expected).unwrap()) / length(expected).max(1e-30)
}

/// What each rank finds, and what it has moved.
fn over_ranks(
    kind: Kind,
    method: Method,
    ranks: usize,
    operands: &[(Tensor, bool)],
    weights: &Tensor,
    borders: Option<&[usize]>,
) -> Vec<(Vec<Tensor>, Traffic)> {
    each(ranks, Settings::default(), |comm| {
        let found = of_rank(kind, method, &comm, operands, weights, borders);
        (found, comm.traffic())
    })
}

/// What the rank of `comm` finds.
fn of_rank(
    kind: Kind,
    method: Method,
    comm: &Arc<dyn Communicator>,
    operands: &[(Tensor, bool)],
    weights: &Tensor,
    borders: Option<&[usize]>,
) -> Vec<Tensor> {
    let tokens = weights.dims()[1] / comm.size();
    let range = comm.rank() * tokens..(comm.rank() + 1) * tokens;
    let cut = |x: &Tensor| {
        x.narrow(1, range.start, tokens)
            .and_then(|x| x.contiguous())
            .unwrap()
    };
    let own: Vec<Tensor> = operands
        .iter()
        .map(|(x, by_token)| if *by_token { cut(x) } else { x.clone() })
        .collect();
    let borders = borders.map(|borders| part_borders(borders, &range));
    let join = || Arc::new(Lasp::new(comm.clone(), method, tokens)) as Arc<dyn StateExchange>;
    let exchange = (comm.size() > 1).then(join);
    results(kind, &own, &cut(weights), exchange, borders.as_deref()).unwrap()
}

/// Checks as the rank of `comm`, whatever is between ranks, that all operators give their part of the whole: outputs, states and
/// gradients, by both methods.
#[cfg(feature = "mpi")]
pub(in crate::distributed) fn check_as_rank(comm: &Arc<dyn Communicator>) {
    let tokens = 72;
    for (dtype, most) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        for kind in KINDS {
            let operands = operands(kind, B, tokens, dtype);
            let whole: Vec<Tensor> = operands.iter().map(|(x, _)| x.clone()).collect();
            let shape = operate(kind, &whole, None, None).unwrap()[0].dims().to_vec();
            let weights = normal("weights", &shape, dtype);
            let expected = results(kind, &whole, &weights, None, None).unwrap();
            for method in [Method::Ring, Method::Gather] {
                let found = of_rank(kind, method, comm, &operands, &weights, None);
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let own = tokens / comm.size();
                    let (found, expected) = match index {
                        // The state of the last rank.
                        1 => (comm.broadcast(comm.size() - 1, found).unwrap(), expected.clone()),
                        _ if index == 0 || operands[index - 2].1 => {
                            (found.clone(), expected.narrow(1, comm.rank() * own, own).unwrap())
                        }
                        _ => (comm.all_reduce(found, Reduce::Sum).unwrap(), expected.clone()),
                    };
                    let error = apart(&found, &expected);
                    assert!(
                        error < most,
                        "{kind:?}, {method:?}, {dtype:?}, result {index}: {error:e}"
                    );
                }
            }
        }
    }
}

/// Outputs, states and gradients of 1, 2, 4 and 8 ranks are those of the whole; both methods give the same bits.
#[test]
fn ranks_are_the_whole() {
    let tokens = 136;
    for (dtype, most) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        for kind in KINDS {
            let operands = operands(kind, B, tokens, dtype);
            let whole: Vec<Tensor> = operands.iter().map(|(x, _)| x.clone()).collect();
            let shape = operate(kind, &whole, None, None).unwrap()[0].dims().to_vec();
            let weights = normal("weights", &shape, dtype);
            let expected = results(kind, &whole, &weights, None, None).unwrap();
            for ranks in [1, 2, 4, 8] {
                let [ring, gather] = [Method::Ring, Method::Gather]
                    .map(|method| over_ranks(kind, method, ranks, &operands, &weights, None));
                for (one, other) in ring.iter().zip(&gather) {
                    for (one, other) in one.0.iter().zip(&other.0) {
                        assert_eq!(apart(one, other), 0.0, "{kind:?}, {ranks} ranks: methods differ");
                    }
                }
                for (index, expected) in expected.iter().enumerate() {
                    let parts: Vec<&Tensor> = ring.iter().map(|(found, _)| &found[index]).collect();
                    let by_token = index == 0 || index > 1 && operands[index - 2].1;
                    let found = match index {
                        // The state of the last rank, or that of all.
                        1 => parts[ranks - 1].clone(),
                        _ if by_token => Tensor::cat(&parts, 1).unwrap(),
                        _ => Tensor::stack(&parts, 0).unwrap().sum(0).unwrap(),
                    };
                    let error = apart(&found, expected);
                    assert!(error < most, "{kind:?}, {ranks} ranks, result {index}: {error:e}");
                }
            }
        }
    }
}

/// Packed documents over ranks, in both methods.
#[test]
fn packed_documents_over_ranks_are_the_whole() {
    let tokens = 72;
    for kind in [Kind::None, Kind::Head, Kind::Token, Kind::Channel, Kind::Causal] {
        let operands = operands(kind, 1, tokens, DType::F64);
        let whole: Vec<Tensor> = operands.iter().map(|(x, _)| x.clone()).collect();
        let weights = normal("weights", &[1, tokens, H, E], DType::F64);
        for borders in [&[0, 5, 18, 40, 41, 72][..], &[0, 1, 36, 54, 72]] {
            let expected = results(kind, &whole, &weights, None, Some(borders)).unwrap();
            for method in [Method::Ring, Method::Gather] {
                let found = over_ranks(kind, method, 4, &operands, &weights, Some(borders));
                for (index, expected) in expected.iter().enumerate().filter(|(index, _)| *index != 1) {
                    let parts: Vec<&Tensor> = found.iter().map(|(found, _)| &found[index]).collect();
                    let found = match index == 0 || operands[index - 2].1 {
                        true => Tensor::cat(&parts, 1).unwrap(),
                        false => Tensor::stack(&parts, 0).unwrap().sum(0).unwrap(),
                    };
                    let error = apart(&found, expected);
                    assert!(error < 1e-12, "{kind:?}, {borders:?}, result {index}: {error:e}");
                }
            }
        }
    }
}

/// Bytes are those of the formula, forward and backward, and know nothing of the number of tokens.
#[test]
fn bytes_do_not_depend_on_the_number_of_tokens() {
    let width = 8;
    let state = B * H * D * E * width;
    for (kind, log) in [
        (Kind::None, 1),
        (Kind::Head, 1),
        (Kind::Token, 1),
        (Kind::Channel, D),
    ] {
        for tokens in [64, 128, 256] {
            let operands = operands(kind, B, tokens, DType::F64);
            let weights = normal("weights", &[B, tokens, H, E], DType::F64);
            for (rank, (_, traffic)) in over_ranks(kind, Method::Gather, 4, &operands, &weights, None)
                .into_iter()
                .enumerate()
            {
                let moved = traffic["all-gather"];
                let once = (state + B * H * log * width) as u64;
                assert_eq!((moved.calls, moved.payload), (2, 2 * once), "rank {rank}");
                assert_eq!(moved.sent, 2 * 3 * once);
                assert_eq!(traffic.len(), 1);
            }
            for (rank, (_, traffic)) in over_ranks(kind, Method::Ring, 4, &operands, &weights, None)
                .into_iter()
                .enumerate()
            {
                // The last rank sends no state, and the first no adjoint.
                let calls = if rank == 0 || rank == 3 { 1 } else { 2 };
                let moved = traffic["send"];
                assert_eq!(
                    (moved.calls, moved.payload),
                    (calls, calls * state as u64),
                    "rank {rank}"
                );
                assert_eq!(traffic.len(), 1);
            }
        }
    }
    for tokens in [64, 256] {
        // LightNet in both directions: (max), (den, num), and the adjoint of the state.
        let operands = operands(Kind::Both, B, tokens, DType::F64);
        let weights = normal("weights", &[B, tokens, H, E], DType::F64);
        for (_, traffic) in over_ranks(Kind::Both, Method::Gather, 4, &operands, &weights, None) {
            let moved = traffic["all-reduce"];
            let expected = 2 * B * H * D * width + 2 * state;
            assert_eq!((moved.calls, moved.payload as usize), (3, expected));
        }
        // LightNet: the sums of weights beside the states, and the adjoints of both.
        let operands = self::operands(Kind::Causal, B, tokens, DType::F64);
        for (_, traffic) in over_ranks(Kind::Causal, Method::Gather, 4, &operands, &weights, None) {
            let channels = B * H * D * width;
            let gathered = traffic["all-gather"];
            assert_eq!(gathered.payload as usize, channels + 2 * (state + channels));
            let scattered = traffic["reduce-scatter"];
            assert_eq!(scattered.payload as usize, 4 * channels);
        }
    }
}

/// A rank that never comes: the others say who is missing, and do not hang.
#[test]
fn a_rank_that_never_comes_is_named() {
    let settings = Settings {
        timeout: std::time::Duration::from_millis(100),
        network: None,
    };
    for method in [Method::Ring, Method::Gather] {
        let found = each(3, settings, |comm| {
            if comm.rank() == 0 {
                std::thread::sleep(std::time::Duration::from_millis(350));
                return String::new();
            }
            let state = Tensor::zeros((1, 1, 2, 2), DType::F64, &Device::Cpu).unwrap();
            let log = Tensor::zeros((1, 1, 1, 1), DType::F64, &Device::Cpu).unwrap();
            Lasp::new(comm, method, 4)
                .prefix(&state, &log)
                .unwrap_err()
                .to_string()
        });
        assert!(found[1].contains("for rank 0"), "{}", found[1]);
        let waiting = match method {
            Method::Ring => "rank 1",
            Method::Gather => "rank 0",
        };
        assert!(found[2].contains(waiting), "{}", found[2]);
    }
}
