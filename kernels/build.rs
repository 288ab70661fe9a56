//! Compiles `cuda/*.cu` to PTX for compute capability 8.0 with the feature `cuda`; the driver does the rest.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// The compiler of the toolkit that the environment names, else the one in PATH.
fn nvcc() -> PathBuf {
    let named = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    let mut found = named
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .filter(|path| path.is_file());
    found.next().unwrap_or_else(|| "nvcc".into())
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut sources: Vec<PathBuf> = std::fs::read_dir("cuda")
        .map_err(|error| format!("kernels/cuda: {error}"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    for source in sources {
        let mut ptx = out.join(source.file_stem().unwrap_or_default());
        ptx.set_extension("ptx");
        let mut command = Command::new(nvcc());
        command.args([
            "--ptx",
            "-arch=compute_80",
            "-std=c++17",
            "-O3",
            "-Werror",
            "all-warnings",
            "-o",
        ]);
        let status = command.arg(&ptx).arg(&source).status().map_err(|error| {
            format!(
                "{}: {error}; the feature `cuda` needs the CUDA toolkit",
                nvcc().display()
            )
        })?;
        if !status.success() {
            return Err(format!("nvcc failed on kernels/{}", source.display()));
        }
    }
    Ok(())
}
