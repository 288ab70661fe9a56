//! Compiles `cuda/*.cu` with the feature `cuda`: to PTX for compute capability 8.0, which the driver compiles for the device
//! that it finds, and that to machine code for 9.0, because the driver takes ten seconds for all of them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-env-changed=CUDA_PATH");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        println!("cargo::error={message}");
    }
}

/// A program of the toolkit that the environment names, else the one in PATH.
fn tool(name: &str) -> PathBuf {
    let named = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    let mut found = named
        .map(|home| Path::new(&home).join("bin").join(name))
        .filter(|path| path.is_file());
    found.next().unwrap_or_else(|| name.into())
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut sources: Vec<PathBuf> = std::fs::read_dir("cuda")
        .map_err(|error| format!("kernels/cuda: {error}"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let jobs = env::var("NUM_JOBS")
        .ok()
        .and_then(|jobs| jobs.parse().ok())
        .unwrap_or(1);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                        translate(source, &out)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let mut done = workers.into_iter().map(|worker| worker.join());
        done.try_for_each(|result| result.unwrap_or_else(|_| Err("a thread of the build panicked".into())))
    })
}

fn translate(source: &Path, out: &Path) -> Result<(), String> {
    let ptx = out
        .join(source.file_stem().unwrap_or_default())
        .with_extension("ptx");
    let mut nvcc = Command::new(tool("nvcc"));
    nvcc.args([
        "--ptx",
        "-arch=compute_80",
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
    ]);
    call(nvcc.arg("-o").arg(&ptx).arg(source), source)?;
    let mut ptxas = Command::new(tool("ptxas"));
    ptxas.args(["-arch=sm_90", "-O3", "-o"]);
    call(ptxas.arg(ptx.with_extension("cubin")).arg(&ptx), source)
}

fn call(command: &mut Command, source: &Path) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .map_err(|error| format!("{program}: {error}; the feature `cuda` needs the CUDA toolkit"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{program} failed on kernels/{}", source.display()))
    }
}
