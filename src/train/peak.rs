//! How fast a device could be, and what part of that a run makes use of (MFU, Chowdhery et al., 2022).

use candle_core::Device;

use crate::device::device_name;

/// How fast a GPU could be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Operations a second of products of bf16 matrices with f32 sums, without sparsity.
    pub peak: f64,
    /// Bytes a second of its memory.
    pub bandwidth: f64,
}

/// By what the name of a GPU contains, teraflops and terabytes a second; the first line that fits counts. From NVIDIA's data
/// sheets.
const GPUS: [(&str, f64, f64); 20] = [
    ("H100 PCIe", 756.0, 2.0),
    ("H100 NVL", 835.0, 3.9),
    ("H100", 989.0, 3.35),
    ("H200", 989.0, 4.8),
    ("GH200", 989.0, 4.0),
    ("H800", 989.0, 3.35),
    ("B200", 2250.0, 8.0),
    ("A100 SXM4 80GB", 312.0, 2.04),
    ("A100 80GB PCIe", 312.0, 1.94),
    ("A100", 312.0, 1.56),
    ("A800", 312.0, 2.04),
    ("L40S", 362.0, 0.864),
    ("L40", 181.0, 0.864),
    ("L4", 121.0, 0.3),
    ("A10G", 70.0, 0.6),
    ("A40", 150.0, 0.696),
    ("RTX 6000 Ada", 364.0, 0.96),
    ("RTX 5090", 209.0, 1.79),
    ("RTX 4090", 165.0, 1.01),
    ("RTX 3090", 71.0, 0.936),
];

/// Operations a second that products in bf16 could reach on `device`, on which every task computes in bf16; none for the
/// CPU, for GPUs that are not in the table, and where the driver does not tell the name.
pub fn of(device: &Device) -> Option<f64> {
    Some(by_name(&device_name(device))?.peak)
}

/// The GPU of this name, as drivers give it, or part of it.
pub fn by_name(name: &str) -> Option<Gpu> {
    let words = |text: &str| {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric());
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let found = words(name);
    // A slice of a GPU, or one with less power.
    if found.iter().any(|word| word == "MIG" || word == "Laptop") {
        return None;
    }
    let fits = |part: &str| {
        let part = words(part);
        found.windows(part.len()).any(|window| window == part)
    };
    let (_, peak, bandwidth) = GPUS.into_iter().find(|(part, ..)| fits(part))?;
    Some(Gpu {
        peak: peak * 1e12,
        bandwidth: bandwidth * 1e12,
    })
}

/// The GPUs that are known.
pub fn names() -> String {
    GPUS.map(|(name, ..)| name).join(", ")
}

/// The part of `peak` that `per_s` samples a second of `flops` operations each make use of.
pub(super) fn used(flops: Option<f64>, peak: Option<f64>, per_s: f64) -> Option<f64> {
    Some(flops? * per_s / peak?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_drivers_give_them() {
        for (name, peak) in [
            ("NVIDIA H100 80GB HBM3", Some(989e12)),
            ("NVIDIA H100 PCIe", Some(756e12)),
            ("NVIDIA H200", Some(989e12)),
            ("NVIDIA GH200 480GB", Some(989e12)),
            ("NVIDIA A100-SXM4-80GB", Some(312e12)),
            ("NVIDIA A100-PCIE-40GB", Some(312e12)),
            ("NVIDIA L4", Some(121e12)),
            ("NVIDIA L40", Some(181e12)),
            ("NVIDIA L40S", Some(362e12)),
            ("NVIDIA GeForce RTX 4090", Some(165e12)),
            ("NVIDIA RTX 6000 Ada Generation", Some(364e12)),
            ("NVIDIA GeForce RTX 4090D", None),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
            ("NVIDIA H20", None),
            ("Quadro RTX 6000", None),
            ("NVIDIA A1000", None),
            ("", None),
        ] {
            assert_eq!(by_name(name).map(|gpu| gpu.peak), peak, "{name}");
        }
        let bandwidth = |name| by_name(name).unwrap().bandwidth;
        assert_eq!(bandwidth("NVIDIA A100-SXM4-80GB"), 2.04e12);
        assert_eq!(bandwidth("NVIDIA A100-SXM4-40GB"), 1.56e12);
        assert_eq!(of(&Device::Cpu), None);
    }

    #[test]
    fn a_share_needs_both_sides() {
        assert_eq!(used(Some(2e9), Some(1e12), 125.0), Some(0.25));
        assert_eq!(used(None, Some(1e12), 1.0), None);
        assert_eq!(used(Some(1e9), None, 1.0), None);
    }
}
