//! Ranks whose messages are carried by channels, beside those that meet in memory.

use std::sync::mpsc::{Sender, channel};

use super::*;
use crate::distributed::threads::{self, Settings};

/// A sender and what it sends.
type Parcel = (usize, Vec<u8>);

#[derive(Debug)]
struct Channels {
    own: usize,
    others: Vec<Mutex<Sender<Parcel>>>,
}

impl Carrier for Channels {
    fn carry(&self, to: usize, bytes: Vec<u8>) {
        let sender = self.others[to].lock().unwrap();
        // A rank that is done reads no more.
        sender.send((self.own, bytes)).ok();
    }
}

/// What `work` answers on each of `size` ranks.
fn each<T: Send>(size: usize, timeout: Duration, work: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..size).map(|_| channel()).unzip();
    std::thread::scope(|scope| {
        let handles: Vec<_> = receivers
            .into_iter()
            .enumerate()
            .map(|(rank, receiver)| {
                let others = senders.iter().map(|sender| Mutex::new(sender.clone())).collect();
                let mesh = Mesh::new(Box::new(Channels { own: rank, others }), rank, size, timeout);
                let (world, weak, work) = (mesh.world(), Arc::downgrade(&mesh), &work);
                drop(mesh);
                std::thread::spawn(move || {
                    while let Ok((from, bytes)) = receiver.recv_timeout(Duration::from_secs(20)) {
                        let Some(mesh) = weak.upgrade() else { break };
                        mesh.deliver(from, &bytes);
                    }
                });
                scope.spawn(move || work(world))
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn list(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Bit for bit what threads that meet in memory find, with the same counts, whatever the length.
#[test]
fn operations_are_those_of_threads() {
    for size in [1, 2, 3, 4, 8] {
        for length in [1, 2, 7, 64] {
            let work = |comm: Arc<dyn Communicator>| {
                let rank = comm.rank();
                let mine: Vec<f32> = (0..length).map(|i| 0.1 + (rank * 31 + i) as f32 / 3.0).collect();
                let mine = tensor(&mine);
                let rows = Tensor::stack(&vec![&mine; size], 0).unwrap();
                let late = comm.start(Call::AllReduce(Reduce::Sum), &mine).unwrap();
                let mut found = vec![
                    comm.all_reduce(&mine, Reduce::Max).unwrap(),
                    comm.reduce_scatter(&rows).unwrap(),
                    comm.broadcast(size - 1, &mine).unwrap(),
                ];
                found.extend(comm.all_gather(&mine).unwrap());
                comm.barrier().unwrap();
                if size > 1 {
                    comm.send((rank + 1) % size, &mine).unwrap();
                    found.push(comm.receive((rank + size - 1) % size, &mine).unwrap());
                    let pair = comm.group(&[rank / 2 * 2, rank / 2 * 2 + 1]);
                    if let Ok(pair) = pair {
                        found.push(pair.all_reduce(&mine, Reduce::Sum).unwrap());
                    }
                }
                found.extend(late.wait().unwrap());
                comm.barrier().unwrap();
                let shapes: Vec<Vec<usize>> = found.iter().map(|t| t.dims().to_vec()).collect();
                (found.iter().map(list).collect::<Vec<_>>(), shapes, comm.traffic())
            };
            let expected = threads::tests::each(size, Settings::default(), work);
            assert_eq!(
                each(size, PATIENCE, work),
                expected,
                "{size} ranks, {length} values"
            );
        }
    }
}

#[test]
fn what_goes_wrong_is_named() {
    let found = each(3, Duration::from_millis(150), |comm| {
        let line = match comm.rank() {
            0 => comm
                .all_reduce(&tensor(&[1.0]), Reduce::Sum)
                .unwrap_err()
                .to_string(),
            1 => comm.receive(2, &tensor(&[1.0])).unwrap_err().to_string(),
            _ => String::new(),
        };
        std::thread::sleep(Duration::from_millis(500));
        line
    });
    assert_eq!(
        found[0],
        "rank 0: all-reduce number 0 of ranks 0 to 2: waited 150ms for ranks 1, 2"
    );
    assert_eq!(found[1], "rank 1: receive from rank 2: waited 150ms for rank 2");
    let found = each(3, PATIENCE, |comm| {
        comm.barrier().unwrap();
        match comm.rank() {
            1 => {
                comm.fail("step 7: out of memory");
                String::new()
            }
            0 => comm.all_gather(&tensor(&[1.0])).unwrap_err().to_string(),
            _ => comm.receive(1, &tensor(&[1.0])).unwrap_err().to_string(),
        }
    });
    for rank in [0, 2] {
        assert!(
            found[rank].contains("rank 1 has ended: step 7: out of memory"),
            "{}",
            found[rank]
        );
    }
    let found = each(2, PATIENCE, |comm| {
        let line = match comm.rank() {
            0 => comm.all_reduce(&tensor(&[1.0, 2.0]), Reduce::Sum).unwrap_err(),
            _ => comm.all_gather(&tensor(&[1.0])).unwrap_err(),
        };
        std::thread::sleep(Duration::from_millis(100));
        line.to_string()
    });
    for line in found {
        assert!(
            line.contains("rank 0 called AllReduce(Sum) of [2] F32, rank 1 called AllGather of [1] F32"),
            "{line}"
        );
    }
}
