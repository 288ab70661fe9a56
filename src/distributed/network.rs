//! A network that is only imagined: how long operations between ranks would take on it.
//!
//! The times are those of ring algorithms on links of one latency and bandwidth, without contention between operations that are
//! under way at the same time:
//!
//! ```text
//! send            latency + bytes / bandwidth
//! all-reduce      2 (W - 1) (latency + bytes / W / bandwidth)
//! all-gather      (W - 1) (latency + bytes of a rank / bandwidth)
//! reduce-scatter  (W - 1) (latency + bytes / W / bandwidth)
//! broadcast       ceil(log2 W) (latency + bytes / bandwidth)
//! barrier         ceil(log2 W) latency
//! ```

use std::str::FromStr;
use std::time::Duration;

use super::communicator::Call;

/// Links between ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// Seconds before the first byte arrives.
    pub latency_s: f64,
    /// Bytes a second.
    pub bandwidth: f64,
}

/// What may follow a number, and what it multiplies by.
const TIMES: [(&str, f64); 4] = [("us", 1e-6), ("ms", 1e-3), ("ns", 1e-9), ("s", 1.0)];
/// As network hardware is sold: bits a second.
const BITS: [(&str, f64); 4] = [("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3), ("bit/s", 1.0)];

impl FromStr for Network {
    type Err = String;

    /// `LATENCY,BANDWIDTH`, as in `50us,10Gbit/s`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("found `{text}`, expected LATENCY,BANDWIDTH as in 50us,10Gbit/s");
        let (latency, bandwidth) = text.split_once(',').ok_or_else(wrong)?;
        let quantity = |text: &str, units: &[(&str, f64)]| {
            let text = text.trim();
            let (unit, factor) = units.iter().find(|(unit, _)| text.ends_with(unit))?;
            let number: f64 = text[..text.len() - unit.len()].trim().parse().ok()?;
            Some(number * factor)
        };
        let latency_s = quantity(latency, &TIMES).ok_or_else(wrong)?;
        let bandwidth = quantity(bandwidth, &BITS).ok_or_else(wrong)? / 8.0;
        if !(latency_s >= 0.0 && latency_s.is_finite() && bandwidth > 0.0 && bandwidth.is_finite()) {
            return Err(wrong());
        }
        Ok(Self { latency_s, bandwidth })
    }
}

impl Network {
    /// How long `call` takes among `ranks` ranks, each of which brings `bytes`.
    pub fn time(&self, call: Call, bytes: usize, ranks: usize) -> Duration {
        let (ranks, bytes) = (ranks as f64, bytes as f64);
        let hop = |bytes: f64| self.latency_s + bytes / self.bandwidth;
        let seconds = match call {
            Call::AllReduce(_) => 2.0 * (ranks - 1.0) * hop(bytes / ranks),
            Call::AllGather => (ranks - 1.0) * hop(bytes),
            Call::ReduceScatter => (ranks - 1.0) * hop(bytes / ranks),
            Call::Broadcast { .. } => ranks.log2().ceil() * hop(bytes),
            Call::Barrier => ranks.log2().ceil() * self.latency_s,
        };
        Duration::from_secs_f64(seconds.clamp(0.0, MOST_SECONDS))
    }

    /// How long a message of `bytes` takes to another rank.
    pub fn send_time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64((self.latency_s + bytes as f64 / self.bandwidth).min(MOST_SECONDS))
    }
}

/// Nothing takes longer: a day.
const MOST_SECONDS: f64 = 86_400.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distributed::communicator::Reduce;

    #[test]
    fn networks_are_read_and_timed() {
        let network: Network = "50us, 10Gbit/s".parse().unwrap();
        assert!((network.latency_s - 50e-6).abs() < 1e-15);
        assert_eq!(network.bandwidth, 1.25e9);
        // A gigabyte through a ring of four at 1.25 GB/s: 2 * 3 hops of a quarter each.
        let found = network
            .time(Call::AllReduce(Reduce::Sum), 1_000_000_000, 4)
            .as_secs_f64();
        assert!((found - 6.0 * (50e-6 + 0.2)).abs() < 1e-9, "{found}");
        let found = network.time(Call::AllGather, 1_250_000, 4).as_secs_f64();
        assert!((found - 3.0 * (50e-6 + 1e-3)).abs() < 1e-9, "{found}");
        assert_eq!(
            network.time(Call::AllReduce(Reduce::Sum), 1 << 20, 1),
            Duration::ZERO
        );
        assert!((network.send_time(1250).as_secs_f64() - 51e-6).abs() < 1e-9);
        for wrong in [
            "",
            "50us",
            "50,10",
            "x us,10Gbit/s",
            "-1us,1Gbit/s",
            "1us,0Gbit/s",
            "NaNus,1bit/s",
            "infs,1bit/s",
        ] {
            let line = wrong.parse::<Network>().unwrap_err();
            assert!(line.contains("expected LATENCY,BANDWIDTH"), "{line}");
        }
    }
}
