//! Ranks over TCP, here as threads that know nothing of each other but the port.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::*;
use crate::distributed::{Call, Reduce};

fn place(rank: usize, world: usize, port: u16) -> Place {
    Place {
        rank,
        world,
        local: rank,
        address: "127.0.0.1".to_owned(),
        port,
        job: "test".to_owned(),
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn settings(milliseconds: u64) -> Settings {
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

fn over_tcp<T: Send>(
    places: &[Place],
    settings: Settings,
    work: impl Fn(Result<(Arc<dyn Communicator>, Option<Hub>), CommError>) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let handles: Vec<_> = places
            .iter()
            .map(|place| {
                let work = &work;
                scope.spawn(move || work(join(place, settings)))
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

#[test]
fn operations_over_tcp_are_those_of_threads() {
    let port = free_port();
    let places: Vec<Place> = (0..3).map(|rank| place(rank, 3, port)).collect();
    let found = over_tcp(&places, settings(20_000), |joined| {
        let (comm, hub) = joined.unwrap();
        let rank = comm.rank();
        let mine = tensor(&[rank as f64, 1.0 / 3.0]);
        let late = comm.start(Call::AllReduce(Reduce::Sum), &mine).unwrap();
        let all = comm.all_gather(&mine).unwrap();
        assert_eq!(
            all.iter().map(|one| list(one)[0]).collect::<Vec<_>>(),
            [0.0, 1.0, 2.0]
        );
        let rows = tensor(&[1.0, 2.0, 3.0]).reshape((3, 1)).unwrap();
        assert_eq!(
            list(&comm.reduce_scatter(&rows).unwrap()),
            [3.0 * (rank as f64 + 1.0)]
        );
        assert_eq!(list(&comm.broadcast(1, &mine).unwrap())[0], 1.0);
        comm.send((rank + 1) % 3, &mine).unwrap();
        let before = (rank + 2) % 3;
        assert_eq!(list(&comm.receive(before, &mine).unwrap())[0], before as f64);
        if rank > 0 {
            let pair = comm.group(&[1, 2]).unwrap();
            assert_eq!(pair.members(), [1, 2]);
            assert_eq!(list(&pair.all_reduce(&mine, Reduce::Max).unwrap())[0], 2.0);
        }
        comm.agree("recipe", "one").unwrap();
        comm.barrier().unwrap();
        let sum = list(&late.wait().unwrap()[0]);
        let traffic = comm.traffic();
        drop(comm);
        drop(hub);
        (sum, traffic["all-gather"])
    });
    for (sum, moved) in &found {
        assert_eq!(*sum, [3.0, 1.0 / 3.0 + 1.0 / 3.0 + 1.0 / 3.0]);
        assert_eq!(*moved, found[0].1);
    }
}

/// A process that goes away, and one that says why.
#[test]
fn processes_that_end_are_told_of() {
    for leaver in [0, 1] {
        for says_why in [true, false] {
            let port = free_port();
            let places: Vec<Place> = (0..3).map(|rank| place(rank, 3, port)).collect();
            let began = Instant::now();
            let found = over_tcp(&places, settings(30_000), |joined| {
                let (comm, hub) = joined.unwrap();
                comm.barrier().unwrap();
                if comm.rank() == leaver {
                    if says_why {
                        comm.fail("step 3: no more disk");
                    }
                    drop(comm);
                    drop(hub);
                    return String::new();
                }
                let line = comm.all_gather(&tensor(&[1.0])).unwrap_err().to_string();
                drop(comm);
                drop(hub);
                line
            });
            for (rank, line) in found.iter().enumerate().filter(|(rank, _)| *rank != leaver) {
                let words = match says_why {
                    true => "step 3: no more disk",
                    false => "it left without a word",
                };
                assert!(
                    line.starts_with(&format!("rank {rank}: all-gather"))
                        && line.contains(&format!("rank {leaver} has ended"))
                        && line.contains(words),
                    "{line}"
                );
            }
            assert!(began.elapsed() < Duration::from_secs(20));
        }
    }
}

#[test]
fn jobs_that_cannot_start_say_why() {
    // Nobody comes.
    let line = over_tcp(&[place(0, 3, free_port())], settings(150), |joined| {
        joined.unwrap_err().to_string()
    });
    assert!(line[0].contains("start of 3 ranks at 127.0.0.1:"), "{}", line[0]);
    assert!(line[0].contains("waited 150ms for ranks 1, 2"), "{}", line[0]);
    // Rank 0 is not there.
    let line = over_tcp(&[place(1, 2, free_port())], settings(150), |joined| {
        joined.unwrap_err().to_string()
    });
    assert!(line[0].starts_with("rank 1: rank 0 at 127.0.0.1:"), "{}", line[0]);
    // The port is taken.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let line = over_tcp(&[place(0, 2, port)], settings(150), |joined| {
        joined.unwrap_err().to_string()
    });
    assert!(
        line[0].contains(&format!("cannot listen at 127.0.0.1:{port}")),
        "{}",
        line[0]
    );
    drop(taken);
    // The same rank twice, and another number of ranks.
    for (other, words) in [
        (place(1, 3, 0), "rank 1 was started twice"),
        (
            place(1, 5, 0),
            "rank 1 was started as one of 5 ranks, rank 0 as one of 3",
        ),
    ] {
        let port = free_port();
        let places = [place(0, 3, port), place(1, 3, port), Place { port, ..other }];
        let found = over_tcp(&places, settings(3_000), |joined| {
            joined.map(|_| ()).err().map(|e| e.to_string())
        });
        let line = found[0].clone().unwrap_or_default();
        assert!(line.contains(words), "{line}");
        assert!(
            found[1..].iter().flatten().any(|line| line.contains(words)),
            "{found:?}"
        );
    }
}
