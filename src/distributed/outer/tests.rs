//! Trajectories against their formulas, computed here number by number.

use candle_core::Device;

use super::*;
use crate::distributed::threads::Settings;
use crate::distributed::threads::tests::each;

fn flat(values: &[f64]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn list(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec1().unwrap()
}

fn rule(options: &OuterOptions, workers: usize) -> Rule {
    assert_eq!(options.wrong(), None);
    options.rule(workers)
}

/// A stale method without gap, momentum or clip.
fn plain() -> OuterOptions {
    OuterOptions {
        gap: Some(options::GapKind::Off),
        ..OuterOptions::default()
    }
}

/// Section 8.6: one worker whose round multiplies by A; x_{t+1} = x_t - (I - A) x_{t-1}, to the bit, and stable for the
/// eigenvalues that the roots of z^2 - z + c say.
#[test]
fn the_quadratic() {
    let factors = [0.9, 0.7, 0.25, 0.5, 1.0, -0.1];
    let found = each(1, Settings::default(), |comm| {
        let start = flat(&[1.0, -2.0, 3.0, 0.5, 4.0, 1.0]);
        let state = OuterState::new(&start).unwrap();
        let mut outer = Outer::new(rule(&plain(), 1), comm, None, vec![6], state);
        let mut trajectory = vec![list(&start)];
        let mut x = start;
        for _ in 0..60 {
            x = outer.round(&(&x * flat(&factors)).unwrap()).unwrap();
            trajectory.push(list(&x));
        }
        trajectory
    });
    let x = &found[0];
    for (i, factor) in factors.iter().enumerate() {
        // Nothing has arrived after the first round.
        assert_eq!(x[1][i], x[0][i]);
        for t in 1..60 {
            let expected = x[t][i] - (x[t - 1][i] - factor * x[t - 1][i]);
            assert_eq!(
                x[t + 1][i].to_bits(),
                expected.to_bits(),
                "factor {factor}, round {t}"
            );
        }
        let c = 1.0 - factor;
        let (first, last) = (x[0][i].abs(), x[60][i].abs());
        match c {
            0.0 => assert_eq!(first, last),
            c if c < 1.0 => assert!(last < 0.1 * first, "c {c}: {last}"),
            _ => assert!(last > 3.0 * first, "c {c}: {last}"),
        }
        // Above a quarter the roots are complex: the sign changes.
        let changes = (1..60).any(|t| x[t][i] * x[0][i] < 0.0);
        assert_eq!(changes, c > 0.25, "c {c}");
    }
}

/// What worker `worker` makes of x in a round: any map that differs between workers and elements.
fn inner(worker: usize, x: f64, i: usize) -> f64 {
    let target = (worker as f64 + 1.0) * (i as f64 - 1.5);
    x - 0.2 * (x - target) + 0.05 * (x * 3.0 + worker as f64).sin()
}

const SIZES: [usize; 3] = [2, 1, 3];
const START: [f64; 6] = [1.0, -2.0, 3.0, 0.5, 4.0, 1.0];

/// Points, momenta and gaps of a worker after each round, and the last point after what was under way.
type Course = (Vec<(Vec<f64>, Vec<f64>, Vec<f64>)>, Vec<f64>);

fn course(options: &OuterOptions, workers: usize, rounds: usize) -> Vec<Course> {
    each(workers, Settings::default(), |comm| {
        let worker = comm.rank();
        let state = OuterState::new(&flat(&START)).unwrap();
        let mut outer = Outer::new(rule(options, workers), comm, None, SIZES.to_vec(), state);
        let mut x = START.to_vec();
        let mut all = Vec::new();
        for _ in 0..rounds {
            let moved: Vec<f64> = x.iter().enumerate().map(|(i, &x)| inner(worker, x, i)).collect();
            x = list(&outer.round(&flat(&moved)).unwrap());
            all.push((x.clone(), list(&outer.state.momentum), outer.gaps.clone()));
        }
        let last = list(&outer.finish().unwrap());
        (all, last)
    })
}

/// The same by plain loops.
fn literal(options: &OuterOptions, workers: usize, rounds: usize) -> Course {
    let rule = options.rule(workers);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mean = |x: &[f64]| -> Vec<f64> {
        (0..6)
            .map(|i| (0..workers).map(|g| inner(g, x[i], i)).sum::<f64>() / workers as f64)
            .collect()
    };
    let (mut x, mut m) = (START.to_vec(), vec![0.0; 6]);
    let (mut before, mut late): (Vec<f64>, Option<Vec<f64>>) = (Vec::new(), None);
    let mut moved: Vec<Vec<f64>> = vec![Vec::new(); 3];
    let (mut all, mut gaps) = (Vec::new(), Vec::new());
    let mut last = Vec::new();
    for round in 0..=rounds {
        let (origin, arrived) = match rule.stale {
            true => (before.clone(), late.take()),
            false => (x.clone(), Some(mean(&x))),
        };
        if round == rounds && !rule.stale {
            last.clone_from(&x);
            break;
        }
        if rule.stale {
            late = Some(mean(&x));
        }
        let now = x.clone();
        if let Some(arrived) = arrived {
            let mut d: Vec<f64> = origin.iter().zip(&arrived).map(|(x, mean)| x - mean).collect();
            let ends: &[usize] = match rule.gap {
                Gap::Tensor => &[0, 2, 3, 6],
                _ => &[0, 6],
            };
            gaps = Vec::new();
            for (k, pair) in ends.windows(2).enumerate() {
                let piece = pair[0]..pair[1];
                let gap = match rule.gap {
                    Gap::Off => continue,
                    Gap::Constant(gap) => gap,
                    _ => {
                        moved[k].push(norm(&d[piece.clone()]));
                        let c = moved[k].iter().sum::<f64>() / moved[k].len() as f64;
                        let since: Vec<f64> = piece.clone().map(|i| x[i] - origin[i]).collect();
                        1.0 + norm(&since) / c
                    }
                };
                gaps.push(gap);
                for i in piece {
                    d[i] /= gap;
                }
            }
            for i in 0..6 {
                m[i] = rule.momentum * m[i] + d[i];
                if rule.clip > 0.0 {
                    m[i] = m[i].clamp(-rule.clip, rule.clip);
                }
            }
            if rule.clip_norm > 0.0 && norm(&m) > rule.clip_norm {
                let factor = rule.clip_norm / norm(&m);
                m.iter_mut().for_each(|m| *m *= factor);
            }
            for i in 0..6 {
                let step = if rule.nesterov {
                    d[i] + rule.momentum * m[i]
                } else {
                    m[i]
                };
                x[i] -= rule.lr * step;
            }
        }
        before = now;
        if round == rounds {
            last.clone_from(&x);
        } else {
            all.push((x.clone(), m.clone(), gaps.clone()));
        }
    }
    (all, last)
}

fn close(found: &[f64], expected: &[f64]) -> bool {
    found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|(a, b)| (a - b).abs() <= 1e-10 * (1.0 + b.abs()))
}

/// CO2 with all its options, SlowMo, Local SGD and DiLoCo are their formulas; all workers hold the same bits after every round.
#[test]
fn methods_are_their_formulas() {
    let of = |method| OuterOptions {
        method,
        inner_steps: 4,
        ..OuterOptions::default()
    };
    let co2 = of(OuterMethod::Co2);
    let cases = [
        plain(),
        co2.clone(),
        OuterOptions {
            momentum: Some(0.4),
            gap: Some(options::GapKind::Tensor),
            ..co2.clone()
        },
        OuterOptions {
            gap_constant: Some(1.5),
            lr: Some(0.8),
            momentum: Some(0.2),
            ..co2.clone()
        },
        OuterOptions {
            clip: 0.3,
            momentum: Some(0.5),
            ..co2.clone()
        },
        OuterOptions {
            clip_norm: 0.7,
            momentum: Some(0.5),
            ..co2.clone()
        },
        OuterOptions {
            momentum: Some(0.5),
            ..of(OuterMethod::Slowmo)
        },
        of(OuterMethod::Local),
        of(OuterMethod::Diloco),
    ];
    for options in cases {
        for workers in [1, 2, 4] {
            let found = course(&options, workers, 12);
            let (expected, last) = literal(&options, workers, 12);
            for course in &found {
                assert_eq!(*course, found[0], "{options:?}: workers differ");
            }
            for (round, ((x, m, gaps), (ex, em, egaps))) in found[0].0.iter().zip(&expected).enumerate() {
                assert!(close(x, ex), "{options:?}, round {round}: {x:?}, expected {ex:?}");
                assert!(close(m, em), "{options:?}, round {round}: {m:?}, expected {em:?}");
                assert!(
                    close(gaps, egaps),
                    "{options:?}, round {round}: {gaps:?}, expected {egaps:?}"
                );
                assert!(gaps.iter().all(|&gap| gap >= 1.0));
                assert!(options.clip == 0.0 || m.iter().all(|m| m.abs() <= options.clip));
            }
            assert!(
                close(&found[0].1, &last),
                "{options:?}: {:?}, expected {last:?}",
                found[0].1
            );
        }
    }
}

/// A clip that is never reached changes no bit, and one that is changes some; so does the gap.
#[test]
fn limits_and_gaps_matter_where_they_hold() {
    let with = |clip, gap| OuterOptions {
        clip,
        gap: Some(gap),
        ..OuterOptions::default()
    };
    use options::GapKind::{Global, Off};
    let free = course(&with(0.0, Off), 2, 8);
    assert_eq!(course(&with(1e6, Off), 2, 8), free);
    assert_ne!(course(&with(0.1, Off), 2, 8), free);
    assert_ne!(course(&with(0.0, Global), 2, 8), free);
}

/// Ranks of a worker that each let a part travel get what one gets that lets all travel, to the bit.
#[test]
fn parts_travel_apart() {
    let options = OuterOptions {
        momentum: Some(0.3),
        ..OuterOptions::default()
    };
    let whole = course(&options, 2, 6);
    // Ranks 0 to 3 are the first worker, 4 to 7 the second; six elements in parts of two, the last one empty but for padding.
    let found = each(8, Settings::default(), |comm| {
        let (worker, part) = (comm.rank() / 4, comm.rank() % 4);
        let alike: Vec<usize> = (0..4).map(|i| worker * 4 + i).collect();
        let alike = comm.group(&alike).unwrap();
        let workers = comm.group(&[part, part + 4]).unwrap();
        let state = OuterState::new(&flat(&START)).unwrap();
        let mut outer = Outer::new(rule(&options, 2), workers, Some(alike), SIZES.to_vec(), state);
        let mut x = START.to_vec();
        let mut points = Vec::new();
        for _ in 0..6 {
            let moved: Vec<f64> = x.iter().enumerate().map(|(i, &x)| inner(worker, x, i)).collect();
            x = list(&outer.round(&flat(&moved)).unwrap());
            points.push(x.clone());
        }
        (points, comm.traffic()["all-reduce"].payload)
    });
    for (points, bytes) in found {
        let expected: Vec<&Vec<f64>> = whole[0].0.iter().map(|(x, ..)| x).collect();
        assert_eq!(points.iter().collect::<Vec<_>>(), expected);
        assert_eq!(bytes, 6 * 2 * 8);
    }
}

/// A run that settles between two rounds and goes on from what it kept is the one that never stopped, to the bit.
#[test]
fn runs_go_on_from_what_they_kept() {
    let options = OuterOptions {
        momentum: Some(0.3),
        gap: Some(options::GapKind::Tensor),
        ..OuterOptions::default()
    };
    let whole = course(&options, 2, 9);
    let found = each(2, Settings::default(), |comm| {
        let worker = comm.rank();
        let mut state = OuterState::new(&flat(&START)).unwrap();
        let mut points = Vec::new();
        for _ in 0..3 {
            let mut outer = Outer::new(rule(&options, 2), comm.clone(), None, SIZES.to_vec(), state);
            for _ in 0..3 {
                let x = list(&outer.state.start);
                let moved: Vec<f64> = x.iter().enumerate().map(|(i, &x)| inner(worker, x, i)).collect();
                points.push(list(&outer.round(&flat(&moved)).unwrap()));
            }
            state = outer.settle().unwrap().clone();
        }
        points
    });
    for points in found {
        let expected: Vec<&Vec<f64>> = whole[0].0.iter().map(|(x, ..)| x).collect();
        assert_eq!(points.iter().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn options_that_make_no_sense_are_named() {
    type Change = fn(&mut OuterOptions);
    let cases: [(Change, &str); 8] = [
        (|o| o.lr = Some(0.0), "distributed.outer.lr"),
        (|o| o.lr = Some(f64::NAN), "distributed.outer.lr"),
        (|o| o.momentum = Some(1.0), "distributed.outer.momentum"),
        (|o| o.clip = f64::NAN, "distributed.outer.clip"),
        (|o| o.clip_norm = -1.0, "distributed.outer.clip_norm"),
        (|o| o.gap_constant = Some(0.5), "distributed.outer.gap_constant"),
        (
            |o| {
                (o.method, o.inner_steps, o.gap) = (OuterMethod::Local, 1, Some(options::GapKind::Global));
            },
            "distributed.outer.gap",
        ),
        (
            |o| o.method = OuterMethod::Diloco,
            "distributed.outer.inner_steps",
        ),
    ];
    for (change, field) in cases {
        let mut options = OuterOptions::default();
        change(&mut options);
        assert_eq!(options.wrong().map(|(field, ..)| field), Some(field));
    }
}

/// Seconds of a round of 6 inner steps of 10 ms, where an average takes `average_ms`.
fn seconds_of_a_round(method: OuterMethod, average_ms: f64) -> f64 {
    const ROUNDS: u32 = 5;
    let settings = Settings {
        // Two ranks: two hops.
        network: Some(crate::distributed::Network {
            latency_s: average_ms / 2e3,
            bandwidth: 1e12,
        }),
        ..Settings::default()
    };
    let options = OuterOptions {
        method,
        inner_steps: 6,
        ..OuterOptions::default()
    };
    let found = each(2, settings, |comm| {
        let state = OuterState::new(&flat(&START)).unwrap();
        let mut outer = Outer::new(rule(&options, 2), comm, None, SIZES.to_vec(), state);
        let mut x = flat(&START);
        let began = std::time::Instant::now();
        for _ in 0..ROUNDS {
            std::thread::sleep(std::time::Duration::from_millis(60));
            x = outer.round(&(&x * 0.9).unwrap()).unwrap();
        }
        began.elapsed().as_secs_f64() / f64::from(ROUNDS)
    });
    found.into_iter().fold(0.0, f64::max)
}

/// Section 8.6: an average that lasts less than the work of a round costs nothing; one that lasts longer costs the rest.
/// Methods without staleness wait for all of it.
#[test]
fn averages_hide_behind_the_work() {
    let free = seconds_of_a_round(OuterMethod::Co2, 0.0);
    let hidden = seconds_of_a_round(OuterMethod::Co2, 45.0);
    let late = seconds_of_a_round(OuterMethod::Co2, 160.0);
    let waited = seconds_of_a_round(OuterMethod::Local, 45.0);
    assert!(hidden < free + 0.02, "{hidden} {free}");
    // The first of five rounds waits for nothing.
    assert!(late > 0.06 + 0.07, "{late}");
    assert!(waited > 0.06 + 0.04, "{waited}");
}
