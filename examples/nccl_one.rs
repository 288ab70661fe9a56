//! Runs every collective of the NCCL backend on one GPU, as a world of one rank, and checks what comes out.
//!
//! ```sh
//! cargo run --release --no-default-features --features cuda,nccl --example nccl_one
//! ```

#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use fulgur::distributed::threads::{Settings, world};
use fulgur::distributed::{Call, Reduce, nccl};

fn main() -> anyhow::Result<()> {
    let (major, minor, patch) = fulgur_kernels::nccl::version()?;
    println!("NCCL {major}.{minor}.{patch}");
    let device = Device::new_cuda(0)?;
    let Some(meeting) = world(1, Settings::default()).pop() else {
        anyhow::bail!("a world of one has a rank")
    };
    let comm = nccl::join(meeting, &device, Duration::from_secs(60))?;
    let group = comm.group(&[0])?;
    for dtype in [DType::F32, DType::BF16, DType::U32, DType::I64, DType::U8] {
        let values = Tensor::arange(0u32, 120, &Device::Cpu)?
            .to_dtype(dtype)?
            .reshape((1, 8, 15))?;
        let there = values.to_device(&device)?;
        for call in [
            Call::AllReduce(Reduce::Sum),
            Call::AllReduce(Reduce::Max),
            Call::AllGather,
            Call::ReduceScatter,
            Call::Broadcast { root: 0 },
        ] {
            for (name, group) in [("world", &comm), ("group", &group)] {
                let found = group.start(call, &there)?.wait()?;
                let [found] = found.as_slice() else {
                    anyhow::bail!("{}: {} tensors, expected 1", call.name(), found.len())
                };
                let read = |tensor: &Tensor| -> candle_core::Result<Vec<f32>> {
                    tensor
                        .to_device(&Device::Cpu)?
                        .to_dtype(DType::F32)?
                        .flatten_all()?
                        .to_vec1()
                };
                anyhow::ensure!(
                    found.device().is_cuda() && read(found)? == read(&values)?,
                    "{} of {dtype:?} in the {name} gives something else",
                    call.name()
                );
            }
        }
        println!("{dtype:?}: all-reduce, all-gather, reduce-scatter and broadcast give what they were given");
    }
    comm.barrier()?;
    // An operation that is under way while the device multiplies, and an original that changes meanwhile.
    let long = Tensor::ones(64 << 20, DType::F32, &device)?;
    let matrix = Tensor::ones((4096, 4096), DType::BF16, &device)?;
    let began = Instant::now();
    let pending = comm.start(Call::AllReduce(Reduce::Sum), &long)?;
    let product = matrix.matmul(&matrix)?;
    let over = pending.is_done();
    let Some(sum) = pending.wait()?.pop() else {
        anyhow::bail!("nothing came out of it")
    };
    anyhow::ensure!(
        sum.sum_all()?.to_scalar::<f32>()? == (64 << 20) as f32,
        "a sum of ones"
    );
    anyhow::ensure!(product.to_dtype(DType::F32)?.max_all()?.to_scalar::<f32>()? == 4096.0);
    println!(
        "256 MiB all-reduced beside a product in {:.1} ms; over when asked at once: {over}",
        1e3 * began.elapsed().as_secs_f64()
    );
    println!("moved: {:?}", comm.traffic());
    Ok(())
}
