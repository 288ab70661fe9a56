//! Ranks as processes of MPI: a test starts them with `mpirun`, and each runs another one of these tests.

use std::process::Command;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::distributed::{Reduce, lasp};

/// Two and four processes exchange what threads do, with the results of the whole.
#[test]
fn processes_are_the_whole() {
    if Command::new("mpirun").arg("--version").output().is_err() {
        eprintln!("skipped: there is no mpirun");
        return;
    }
    let program = std::env::current_exe().unwrap();
    for ranks in ["2", "4"] {
        let ran = Command::new("mpirun")
            .args(["--oversubscribe", "--allow-run-as-root", "-n", ranks])
            .arg(&program)
            .args([
                "--exact",
                "distributed::mpi::tests::as_one_rank",
                "--ignored",
                "--nocapture",
            ])
            .env("RAYON_NUM_THREADS", "1")
            .output()
            .unwrap();
        let [out, err] = [&ran.stdout, &ran.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        assert!(ran.status.success(), "{ranks} ranks: {out}{err}");
        assert_eq!(
            out.matches("test result: ok. 1 passed").count().to_string(),
            ranks,
            "{out}"
        );
    }
}

#[test]
#[ignore = "is run by another test, by mpirun"]
fn as_one_rank() {
    let (comm, job) = join(Settings::default()).unwrap();
    let (rank, size) = (comm.rank(), comm.size());
    assert!(is_launched() && size > 1);
    let own = Tensor::new(&[rank as f64, 1.0], &Device::Cpu).unwrap();
    let values = |tensor: Tensor| tensor.to_vec1::<f64>().unwrap();
    let sum = (size * (size - 1) / 2) as f64;
    assert_eq!(
        values(comm.all_reduce(&own, Reduce::Sum).unwrap()),
        [sum, size as f64]
    );
    assert_eq!(
        values(comm.all_reduce(&own, Reduce::Max).unwrap()),
        [size as f64 - 1.0, 1.0]
    );
    for (member, found) in comm.all_gather(&own).unwrap().into_iter().enumerate() {
        assert_eq!(values(found), [member as f64, 1.0]);
    }
    assert_eq!(values(comm.broadcast(1, &own).unwrap()), [1.0, 1.0]);
    let rows = Tensor::arange(0f64, 3.0 * size as f64, &Device::Cpu).unwrap();
    let row = comm.reduce_scatter(&rows.reshape((size, 3)).unwrap()).unwrap();
    let expected = [0, 1, 2].map(|column| (size * (3 * rank + column)) as f64);
    assert_eq!(values(row), expected);
    // A long message goes in several, in order.
    let long = Tensor::arange(0u32, 3 << 20, &Device::Cpu).unwrap();
    let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
    comm.send(to, &long).unwrap();
    let found = comm.receive(from, &Tensor::zeros(3 << 20, DType::U32, &Device::Cpu).unwrap());
    assert_eq!(
        found.unwrap().to_vec1::<u32>().unwrap(),
        long.to_vec1::<u32>().unwrap()
    );
    let pairs = comm.group(&[rank / 2 * 2, rank / 2 * 2 + 1]).unwrap();
    let pair = values(pairs.all_reduce(&own, Reduce::Sum).unwrap());
    assert_eq!(pair, [(4 * (rank / 2) + 1) as f64, 2.0]);
    lasp::tests::check_as_rank(&comm);
    comm.barrier().unwrap();
    drop((comm, pairs));
    drop(job);
}
