//! How fast a device could be, and what part of that a run makes use of (MFU, Chowdhery et al., 2022).

use candle_core::Device;

/// Most operations a second of products of bf16 matrices with f32 sums, without sparsity, by what the name of a GPU contains;
/// the first line that fits counts. From NVIDIA's data sheets.
const BF16_PEAKS: [(&str, f64); 18] = [
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A40", 150e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX 5090", 209e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
];

/// Operations a second that products in bf16 could reach on `device`, on which every task computes in bf16; none for the
/// CPU, for GPUs that are not in the table, and where the driver does not tell the name.
pub fn of(device: &Device) -> Option<f64> {
    by_name(&name(device)?)
}

fn by_name(name: &str) -> Option<f64> {
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
    let peak = BF16_PEAKS.iter().find(|(part, _)| fits(part));
    peak.map(|&(_, peak)| peak)
}

#[cfg(feature = "cuda")]
fn name(device: &Device) -> Option<String> {
    let Device::Cuda(device) = device else { return None };
    device.cuda_stream().context().name().ok()
}

#[cfg(not(feature = "cuda"))]
fn name(_: &Device) -> Option<String> {
    None
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
            assert_eq!(by_name(name), peak, "{name}");
        }
        assert_eq!(of(&Device::Cpu), None);
    }

    #[test]
    fn a_share_needs_both_sides() {
        assert_eq!(used(Some(2e9), Some(1e12), 125.0), Some(0.25));
        assert_eq!(used(None, Some(1e12), 1.0), None);
        assert_eq!(used(Some(1e9), None, 1.0), None);
    }
}
