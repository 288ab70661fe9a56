//! Worlds of 1 to 8 threads: results against loops over ranks, and everything that can go wrong.

use candle_core::DType;

use crate::distributed::Moved;

use super::*;
use crate::distributed::communicator::Reduce;

/// What `work` answers on each rank of a world.
pub(in crate::distributed) fn each<T: Send>(
    size: usize,
    settings: Settings,
    work: impl Fn(Arc<dyn Communicator>) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let handles: Vec<_> = world(size, settings)
            .into_iter()
            .map(|comm| scope.spawn(|| work(comm)))
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("no panic"))
            .collect()
    })
}

fn quick(milliseconds: u64) -> Settings {
    Settings {
        timeout: Duration::from_millis(milliseconds),
        network: None,
    }
}

fn tensor(values: &[f64]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn list(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// What rank `rank` brings.
fn own(rank: usize) -> [f64; 2] {
    let rank = rank as f64;
    [1.0 + rank, 0.1 * rank * rank]
}

#[test]
fn operations_are_what_they_are_called() {
    for size in 1..=8 {
        let settings = Settings::default();
        let results = each(size, settings, |comm| {
            let rank = comm.rank();
            let mine = tensor(&own(rank));
            let rows: Vec<f64> = (0..size).map(|row| (rank * 10 + row) as f64).collect();
            let rows = tensor(&rows).reshape((size, 1)).unwrap();
            let sum = comm.all_reduce(&mine, Reduce::Sum).unwrap();
            let most = comm.all_reduce(&mine, Reduce::Max).unwrap();
            let all = comm.all_gather(&mine).unwrap();
            let row = comm.reduce_scatter(&rows).unwrap();
            let root = size / 2;
            let told = comm.broadcast(root, &mine).unwrap();
            comm.barrier().unwrap();
            if size > 1 {
                comm.send((rank + 1) % size, &mine).unwrap();
                let before = (rank + size - 1) % size;
                assert_eq!(list(&comm.receive(before, &mine).unwrap()), own(before));
            }
            (
                list(&sum),
                list(&most),
                all.iter().map(list).collect::<Vec<_>>(),
                list(&row),
                list(&told),
            )
        });
        let mut sum = own(0);
        for rank in 1..size {
            sum = [sum[0] + own(rank)[0], sum[1] + own(rank)[1]];
        }
        for (rank, (found, most, all, row, told)) in results.iter().enumerate() {
            // Bit for bit: in the order of ranks.
            assert_eq!(found[..], sum);
            assert_eq!(most[..], own(size - 1));
            assert_eq!(*all, (0..size).map(|rank| own(rank).to_vec()).collect::<Vec<_>>());
            let expected: usize = (0..size).map(|other| other * 10 + rank).sum();
            assert_eq!(*row, [expected as f64]);
            assert_eq!(told[..], own(size / 2));
        }
    }
}

/// Operations that were started bring what was given then, in whatever order they are waited for.
#[test]
fn operations_may_be_waited_for_later() {
    let found = each(3, Settings::default(), |comm| {
        let value = candle_core::Var::from_tensor(&tensor(&[comm.rank() as f64])).unwrap();
        let first = comm.start(Call::AllReduce(Reduce::Sum), &value).unwrap();
        value.set(&tensor(&[100.0])).unwrap();
        let second = comm.start(Call::AllReduce(Reduce::Sum), &value).unwrap();
        let later = second.wait().unwrap();
        let first = first.wait().unwrap();
        // What came back is the rank's own: to write to it changes nothing elsewhere.
        let own = candle_core::Var::from_tensor(&first[0]).unwrap();
        own.set(&tensor(&[comm.rank() as f64])).unwrap();
        comm.barrier().unwrap();
        (list(&own), list(&later[0]))
    });
    for (rank, (own, later)) in found.iter().enumerate() {
        assert_eq!((own[0], later[0]), (rank as f64, 300.0));
    }
}

#[test]
fn groups_do_not_hear_each_other() {
    let found = each(6, Settings::default(), |comm| {
        let rank = comm.rank();
        let (row, column) = (rank / 3, rank % 3);
        let sequence = comm.group(&[row * 3, row * 3 + 1, row * 3 + 2]).unwrap();
        let data = comm.group(&[column, column + 3]).unwrap();
        let again = data.group(&[0, 1]).unwrap();
        let mine = tensor(&[rank as f64]);
        let late = data.start(Call::AllReduce(Reduce::Sum), &mine).unwrap();
        let row = list(&sequence.all_reduce(&mine, Reduce::Sum).unwrap());
        let same = list(&again.all_reduce(&mine, Reduce::Sum).unwrap());
        let column = list(&late.wait().unwrap()[0]);
        assert_eq!(same, column);
        assert_eq!(data.own(), rank);
        (row[0], column[0])
    });
    for (rank, found) in found.into_iter().enumerate() {
        let (row, column) = (rank / 3, rank % 3);
        assert_eq!(found, ((9 * row + 3) as f64, (2 * column + 3) as f64));
    }
    let wrong = each(2, quick(50), |comm| {
        let line = |members: &[usize]| comm.group(members).unwrap_err().to_string();
        [line(&[1 - comm.rank()]), line(&[0, 1, 2]), line(&[1, 0])]
    });
    assert!(
        wrong[0][0].contains("rank 0: group: [1], expected 0 among them"),
        "{}",
        wrong[0][0]
    );
    assert!(wrong[1][1].contains("below 2") && wrong[1][2].contains("that rise"));
}

#[test]
fn missing_ranks_and_operations_are_named() {
    let found = each(3, quick(80), |comm| {
        let one = tensor(&[1.0]);
        let line = match comm.rank() {
            0 => comm.all_reduce(&one, Reduce::Sum).unwrap_err().to_string(),
            1 => comm.receive(2, &one).unwrap_err().to_string(),
            _ => String::new(),
        };
        // Keeps its place until the others have given up.
        std::thread::sleep(Duration::from_millis(400));
        line
    });
    assert_eq!(
        found[0],
        "rank 0: all-reduce number 0 of ranks 0 to 2: waited 80ms for ranks 1, 2"
    );
    assert_eq!(found[1], "rank 1: receive from rank 2: waited 80ms for rank 2");
}

#[test]
fn a_rank_that_ends_is_told_at_once() {
    let began = Instant::now();
    let found = each(4, quick(20_000), |comm| {
        comm.barrier().unwrap();
        match comm.rank() {
            1 => {
                comm.fail("step 7: out of memory");
                String::new()
            }
            2 => comm.receive(1, &tensor(&[1.0])).unwrap_err().to_string(),
            // Another group of the same ranks hears of it too.
            3 => comm.group(&[1, 3]).unwrap().barrier().unwrap_err().to_string(),
            _ => comm.all_gather(&tensor(&[1.0])).unwrap_err().to_string(),
        }
    });
    for (rank, operation) in [
        (0, "all-gather number 1"),
        (2, "receive"),
        (3, "barrier number 0"),
    ] {
        let line = &found[rank];
        assert!(
            line.contains(operation) && line.contains("rank 1 has ended: step 7: out of memory"),
            "{line}"
        );
    }
    // One that just goes away.
    let found = each(2, quick(20_000), |comm| {
        if comm.rank() == 1 {
            return String::new();
        }
        comm.barrier().unwrap_err().to_string()
    });
    assert!(
        found[0].contains("rank 1 has ended: it left without a word"),
        "{}",
        found[0]
    );
    assert!(began.elapsed() < Duration::from_secs(10));
}

/// What a rank has given before it ends still counts.
#[test]
fn the_last_words_of_a_rank_are_heard() {
    let found = each(2, quick(20_000), |comm| {
        let sum = comm.start(Call::AllReduce(Reduce::Sum), &tensor(&[1.0])).unwrap();
        if comm.rank() == 1 {
            comm.send(0, &tensor(&[5.0])).unwrap();
            return 0.0;
        }
        std::thread::sleep(Duration::from_millis(50));
        list(&sum.wait().unwrap()[0])[0] + list(&comm.receive(1, &tensor(&[0.0])).unwrap())[0]
    });
    assert_eq!(found[0], 7.0);
}

#[test]
fn ranks_that_call_different_things_are_told() {
    type Act = fn(&Arc<dyn Communicator>) -> Result<(), CommError>;
    let acts: [(Act, Act, &str, &str); 4] = [
        (
            |comm| comm.all_reduce(&tensor(&[1.0]), Reduce::Sum).map(drop),
            |comm| comm.all_reduce(&tensor(&[1.0, 2.0]), Reduce::Sum).map(drop),
            "rank 0 called all-reduce of [1] F64",
            "rank 1 called all-reduce of [2] F64",
        ),
        (
            |comm| comm.all_gather(&tensor(&[1.0])).map(drop),
            |comm| comm.barrier(),
            "rank 0 called all-gather of [1] F64",
            "rank 1 called barrier",
        ),
        (
            |comm| comm.broadcast(0, &tensor(&[1.0])).map(drop),
            |comm| comm.broadcast(1, &tensor(&[1.0])).map(drop),
            "broadcast from member 0",
            "broadcast from member 1",
        ),
        (
            |comm| comm.all_gather(&tensor(&[1.0])).map(drop),
            |comm| {
                let narrow = tensor(&[1.0]).to_dtype(DType::F32).unwrap();
                comm.all_gather(&narrow).map(drop)
            },
            "[1] F64",
            "[1] F32",
        ),
    ];
    for (zero, one, first, second) in acts {
        let found = each(2, quick(20_000), |comm| {
            let act = if comm.rank() == 0 { zero } else { one };
            act(&comm).unwrap_err().to_string()
        });
        for line in found {
            assert!(line.contains(first) && line.contains(second), "{line}");
        }
    }
    let found = each(2, quick(20_000), |comm| match comm.rank() {
        0 => comm
            .send(1, &tensor(&[1.0, 2.0]))
            .map(drop)
            .err()
            .map(|e| e.to_string()),
        _ => comm.receive(0, &tensor(&[1.0])).err().map(|e| e.to_string()),
    });
    let line = found[1].clone().unwrap();
    assert!(
        line.contains("rank 0 called send of [2] F64, rank 1 called receive of [1] F64"),
        "{line}"
    );
    let refused = each(1, quick(50), |comm| {
        [
            comm.reduce_scatter(&tensor(&[1.0, 2.0])).unwrap_err().to_string(),
            comm.broadcast(3, &tensor(&[1.0])).unwrap_err().to_string(),
            comm.send(0, &tensor(&[1.0])).unwrap_err().to_string(),
        ]
    });
    assert!(
        refused[0][0].contains("found [2], expected [1, ..]"),
        "{:?}",
        refused[0]
    );
    assert!(
        refused[0][1].contains("from member 3, expected one of 1"),
        "{:?}",
        refused[0]
    );
    assert!(
        refused[0][2].contains("member 0, expected another one of 1"),
        "{:?}",
        refused[0]
    );
}

#[test]
fn other_recipes_are_refused() {
    let found = each(3, quick(20_000), |comm| {
        comm.agree("recipe", "the same").unwrap();
        let text = if comm.rank() == 1 { "lr = 1" } else { "lr = 2" };
        comm.agree("recipe", text).unwrap_err().to_string()
    });
    for line in found {
        assert!(
            line.starts_with("recipe: rank 0 called ") && line.contains(", rank 1 called "),
            "{line}"
        );
    }
}

#[test]
fn bytes_are_counted() {
    let found = each(4, Settings::default(), |comm| {
        let eight = tensor(&[0.0; 8]);
        comm.all_reduce(&eight, Reduce::Sum).unwrap();
        comm.all_gather(&eight).unwrap();
        comm.all_gather(&eight).unwrap();
        comm.reduce_scatter(&eight.reshape((4, 2)).unwrap()).unwrap();
        comm.barrier().unwrap();
        let half = comm
            .group(&[comm.rank() / 2 * 2, comm.rank() / 2 * 2 + 1])
            .unwrap();
        half.broadcast(0, &eight).unwrap();
        comm.send((comm.rank() + 1) % 4, &eight).unwrap();
        comm.receive((comm.rank() + 3) % 4, &eight).unwrap();
        comm.traffic()
    });
    for traffic in found {
        let moved = |calls, payload, sent| Moved { calls, payload, sent };
        let expected = Traffic::from([
            ("all-reduce", moved(1, 64, 96)),
            ("all-gather", moved(2, 128, 384)),
            ("reduce-scatter", moved(1, 64, 48)),
            ("barrier", moved(1, 0, 0)),
            ("broadcast", moved(1, 64, 64)),
            ("send", moved(1, 64, 64)),
        ]);
        assert_eq!(traffic, expected);
    }
}

/// Results of an imagined network come when it would have brought them, and not before; work in between costs nothing.
#[test]
fn a_network_delays_what_it_carries() {
    let settings = Settings {
        network: Some(Network {
            latency_s: 0.02,
            bandwidth: 1e4,
        }),
        ..Settings::default()
    };
    let found = each(2, settings, |comm| {
        let kilobyte = tensor(&[0.0; 125]);
        comm.barrier().unwrap();
        let began = Instant::now();
        // 2 hops of 20 ms and 500 bytes at 10 kB/s: 140 ms.
        let pending = comm.start(Call::AllReduce(Reduce::Sum), &kilobyte).unwrap();
        let early = pending.is_done();
        std::thread::sleep(Duration::from_millis(100));
        pending.wait().unwrap();
        let reduced = began.elapsed().as_secs_f64();
        let began = Instant::now();
        match comm.rank() {
            0 => comm.send(1, &kilobyte).unwrap(),
            _ => drop(comm.receive(0, &kilobyte).unwrap()),
        }
        (early, reduced, began.elapsed().as_secs_f64())
    });
    for (rank, (early, reduced, passed)) in found.into_iter().enumerate() {
        assert!(!early);
        assert!((0.139..0.35).contains(&reduced), "{reduced}");
        if rank == 1 {
            assert!((0.1..0.35).contains(&passed), "{passed}");
        }
    }
}
