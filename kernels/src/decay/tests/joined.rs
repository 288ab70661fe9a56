//! Packed sequences, parts with an exchange, and steps, against the whole.

use super::{Case, KINDS, Kind, NAMES, sizes};
use crate::decay::reference::Sizes;
use crate::decay::{Causal, causal, step};
use crate::exchange::{StateExchange, threads};
use crate::testing::{check_parts, normal, own_borders, relative_rms, values};
use candle_core::{Device, Result, Tensor, Var};
use std::sync::Arc;

/// Tokens `range` of a tensor with tokens on its second dimension.
fn cut(t: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    t.narrow(1, start, len)?.contiguous()
}

/// Packed sequences, an empty one among them, are the separate ones: forward and backward.
#[test]
fn packed_sequences_are_separate() -> Result<()> {
    let borders = [0, 70, 71, 71, 100];
    for kind in KINDS {
        let case = Case::new(
            Sizes {
                b: 1,
                n: 100,
                h: 2,
                d: 5,
                e: 3,
            },
            kind,
        );
        let (initial, d_state) = (normal(8, &[4, 2, 5, 3]), normal(9, &[4, 2, 5, 3]));
        let results = |part: Option<usize>| -> Result<Vec<Tensor>> {
            let (first, last) = part.map_or((0, 4), |i| (i, i + 1));
            let (start, len) = (borders[first], borders[last] - borders[first]);
            let states = |t: &Tensor| t.narrow(0, first, last - first)?.contiguous();
            let token_wise = matches!(kind, Kind::Token | Kind::Channel);
            let log = if token_wise {
                cut(&case.log, start, len)?
            } else {
                case.log.clone()
            };
            let vars = [
                &cut(&case.q, start, len)?,
                &cut(&case.k, start, len)?,
                &cut(&case.v, start, len)?,
                &states(&initial)?,
                &log,
            ]
            .into_iter()
            .map(Var::from_tensor)
            .collect::<Result<Vec<_>>>()?;
            let options = Causal {
                decay: kind.with(&vars[4]),
                initial: Some(&vars[3]),
                sequences: part.is_none().then_some(&borders),
                ..Default::default()
            };
            let (o, state) = causal(&vars[0], &vars[1], &vars[2], &options)?;
            let loss = ((&o * cut(&case.d_o, start, len)?)?.sum_all()?
                + (&state * states(&d_state)?)?.sum_all()?)?;
            let grads = loss.backward()?;
            let mut all = vec![o.detach(), state.detach()];
            for var in &vars {
                all.push(match grads.get(var) {
                    Some(grad) => grad.clone(),
                    None => var.zeros_like()?,
                });
            }
            Ok(all)
        };
        let packed = results(None)?;
        let parts: Vec<Vec<Tensor>> = [0, 1, 3]
            .into_iter()
            .map(|i| results(Some(i)))
            .collect::<Result<_>>()?;
        for (i, packed) in packed.iter().enumerate() {
            let found: Vec<&Tensor> = parts.iter().map(|part| &part[i]).collect();
            let (packed, joined) = match i {
                1 | 5 => {
                    // The empty sequence hands its state through.
                    let expected = if i == 1 { &initial } else { &d_state };
                    assert_eq!(values(&packed.get(2)?), values(&expected.get(2)?));
                    let index = Tensor::new(&[0u32, 1, 3], &Device::Cpu)?;
                    (packed.index_select(&index, 0)?, Tensor::cat(&found, 0)?)
                }
                6 if kind == Kind::Head => (packed.clone(), Tensor::stack(&found, 0)?.sum(0)?),
                6 if kind == Kind::None => continue,
                _ => (packed.clone(), Tensor::cat(&found, 1)?),
            };
            assert!(
                relative_rms(&values(&packed), &values(&joined)) < 1e-10,
                "{kind:?} {i}"
            );
        }
    }
    Ok(())
}

/// Three parts on three threads are the whole, forward and backward.
#[test]
fn parts_with_an_exchange_are_the_whole() -> Result<()> {
    let lengths = [70, 1, 29];
    for kind in KINDS {
        let case = Case::new(
            Sizes {
                b: 2,
                n: 100,
                h: 2,
                d: 5,
                e: 3,
            },
            kind,
        );
        let expected = case.expected()?;
        let token_wise = matches!(kind, Kind::Token | Kind::Channel);
        let part = |exchange: Arc<dyn StateExchange>, len: usize| -> Result<Vec<Tensor>> {
            let start = exchange.position_offset();
            let (is_first, is_last) = (start == 0, start + len == 100);
            let log = if token_wise {
                cut(&case.log, start, len)?
            } else {
                case.log.clone()
            };
            let vars = [
                &cut(&case.q, start, len)?,
                &cut(&case.k, start, len)?,
                &cut(&case.v, start, len)?,
                &case.initial,
                &log,
            ]
            .into_iter()
            .map(Var::from_tensor)
            .collect::<Result<Vec<_>>>()?;
            let options = Causal {
                decay: kind.with(&vars[4]),
                initial: is_first.then_some(vars[3].as_tensor()),
                exchange: Some(exchange),
                ..Default::default()
            };
            let (o, state) = causal(&vars[0], &vars[1], &vars[2], &options)?;
            let mut loss = (&o * cut(&case.d_o, start, len)?)?.sum_all()?;
            if is_last {
                loss = (loss + (&state * &case.d_state)?.sum_all()?)?;
            }
            let grads = loss.backward()?;
            let mut all = vec![o.detach(), state.detach()];
            for var in &vars {
                all.push(match grads.get(var) {
                    Some(grad) => grad.clone(),
                    None => var.zeros_like()?,
                });
            }
            Ok(all)
        };
        let parts: Vec<Vec<Tensor>> = std::thread::scope(|scope| {
            let running: Vec<_> = threads(&lengths)
                .into_iter()
                .zip(lengths)
                .map(|(exchange, len)| {
                    let part = &part;
                    scope.spawn(move || part(exchange, len))
                })
                .collect();
            running
                .into_iter()
                .map(|part| part.join().expect("no panic"))
                .collect::<Result<_>>()
        })?;
        for (i, (name, whole)) in NAMES.iter().zip(&expected).enumerate() {
            let found: Vec<&Tensor> = parts.iter().map(|part| &part[i]).collect();
            let joined = match i {
                1 => found[2].clone(),
                5 => found[0].clone(),
                6 if !token_wise => Tensor::stack(&found, 0)?.sum(0)?,
                _ => Tensor::cat(&found, 1)?,
            };
            let error = relative_rms(&values(&joined), whole);
            assert!(error < 1e-10, "{name} {kind:?}: {error:e}");
        }
    }
    Ok(())
}

/// Token after token, from the start and after a prefill, equals the whole.
#[test]
fn steps_equal_the_whole() -> Result<()> {
    for kind in KINDS {
        let case = Case::new(sizes(70, 5, 7), kind);
        let inputs = case.inputs();
        let (whole, final_state) = case.run(&inputs)?;
        for prefill in [0, 1, 66] {
            let mut state = case.initial.clone();
            let mut outputs = Vec::new();
            let token_wise = matches!(kind, Kind::Token | Kind::Channel);
            if prefill > 0 {
                let log = if token_wise {
                    cut(&case.log, 0, prefill)?
                } else {
                    case.log.clone()
                };
                let options = Causal {
                    decay: kind.with(&log),
                    initial: Some(&state),
                    ..Default::default()
                };
                let [q, k, v] = [&case.q, &case.k, &case.v].map(|t| t.narrow(1, 0, prefill));
                let (o, after) = causal(&q?, &k?, &v?, &options)?;
                (state, outputs) = (after, vec![o]);
            }
            for t in prefill..70 {
                let token = |x: &Tensor| x.narrow(1, t, 1)?.squeeze(1);
                let log = if token_wise {
                    token(&case.log)?
                } else {
                    case.log.clone()
                };
                let (o, after) = step(
                    &token(&case.q)?,
                    &token(&case.k)?,
                    &token(&case.v)?,
                    kind.with(&log),
                    &state,
                )?;
                state = after;
                outputs.push(o.unsqueeze(1)?);
            }
            let found = Tensor::cat(&outputs, 1)?;
            assert!(
                relative_rms(&values(&found), &values(&whole)) < 1e-12,
                "{kind:?} {prefill}"
            );
            assert!(
                relative_rms(&values(&state), &values(&final_state)) < 1e-12,
                "{kind:?} {prefill}"
            );
        }
    }
    Ok(())
}

/// Packed sequences in parts are those in one: borders within parts, between them, on both sides of a part, and nowhere.
#[test]
fn packed_sequences_may_be_in_parts() -> Result<()> {
    let borders: [&[usize]; 4] = [
        &[0, 66, 80, 100],
        &[0, 70, 100],
        &[0, 3, 70, 70, 71, 100],
        &[0, 100],
    ];
    for kind in KINDS {
        let sizes = Sizes {
            b: 1,
            n: 100,
            h: 2,
            d: 5,
            e: 3,
        };
        let case = Case::new(sizes, kind);
        let mut inputs = vec![case.q, case.k, case.v];
        if matches!(kind, Kind::Token | Kind::Channel) {
            inputs.push(case.log.clone());
        }
        for borders in borders {
            check_parts(&inputs, &[70, 1, 29], |t, exchange| {
                let own = own_borders(borders, t[0].dim(1)?, exchange.as_ref());
                let options = Causal {
                    decay: kind.with(t.get(3).unwrap_or(&case.log)),
                    exchange,
                    sequences: Some(&own),
                    ..Default::default()
                };
                Ok(causal(&t[0], &t[1], &t[2], &options)?.0)
            })?;
        }
    }
    Ok(())
}
