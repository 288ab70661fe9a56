//! How long steps would take on more ranks, from a step that was measured on one: the volume formulas of section 7.4 of the LASP paper
//! (arXiv 2404.02882) and those of ring algorithms, on links of one latency and bandwidth.
//!
//! What is assumed: every rank has the same work as the one that was measured (the batch grows with the ranks), links have no
//! contention, sums of gradients do not overlap with the backward pass, and an average of CO2 hides behind `tau` steps whole.

use serde::Serialize;

use super::communicator::{Call, Reduce};
use super::network::Network;
use super::outer::least_steps;

/// A step as it was measured, and what it would exchange.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Seconds on one rank.
    pub step_s: f64,
    /// Bytes of all gradients, or of all parameters.
    pub bytes: usize,
    /// Bytes of the states that a rank hands on in a forward pass, of all layers together; 0 where sequences are not split.
    pub state_bytes: usize,
    /// Layers that hand on states.
    pub layers: usize,
    /// Inner steps of a round of CO2; 0 takes as few as hide an average.
    pub inner_steps: usize,
}

/// What is foretold for one number of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Ranks.
    pub ranks: usize,
    /// Seconds of a sum of all gradients.
    pub reduce_s: f64,
    /// Seconds of a step whose gradients are summed.
    pub synchronous_s: f64,
    /// The share of that in which ranks work.
    pub synchronous_share: f64,
    /// Inner steps of a round of CO2.
    pub inner_steps: usize,
    /// Seconds of a step of CO2, averages included.
    pub co2_s: f64,
    /// The share of that in which ranks work.
    pub co2_share: f64,
    /// Seconds that states of sequences over all ranks take in a step, forward and backward: from rank to rank (LASP-1).
    pub lasp1_s: f64,
    /// The same by all-gather (LASP-2).
    pub lasp2_s: f64,
    /// Bytes that a rank hands over for them.
    pub state_bytes: u64,
}

impl Measured {
    /// What is foretold for `ranks` ranks on `network`.
    pub fn on(&self, ranks: usize, network: &Network) -> Forecast {
        let Self {
            step_s,
            bytes,
            state_bytes,
            layers,
            inner_steps,
        } = *self;
        let reduce_s = network
            .time(Call::AllReduce(Reduce::Sum), bytes, ranks)
            .as_secs_f64();
        let inner_steps = match inner_steps {
            0 => least_steps(step_s, reduce_s),
            steps => steps,
        };
        let round = inner_steps as f64 * step_s;
        let co2_s = round.max(reduce_s) / inner_steps as f64;
        let each = state_bytes / layers.max(1);
        let hop = network.send_time(each).as_secs_f64();
        let gather = network.time(Call::AllGather, each, ranks).as_secs_f64();
        let both_ways = 2.0 * layers as f64;
        Forecast {
            ranks,
            reduce_s,
            synchronous_s: step_s + reduce_s,
            synchronous_share: step_s / (step_s + reduce_s),
            inner_steps,
            co2_s,
            co2_share: step_s / co2_s,
            lasp1_s: both_ways * (ranks as f64 - 1.0) * hop,
            lasp2_s: both_ways * gather,
            state_bytes: 2 * state_bytes as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forecasts_are_their_formulas() {
        let network = Network {
            latency_s: 1e-3,
            bandwidth: 1e9,
        };
        let measured = Measured {
            step_s: 0.1,
            bytes: 400_000_000,
            state_bytes: 8_000_000,
            layers: 4,
            inner_steps: 0,
        };
        let found = measured.on(8, &network);
        // 14 hops of 1 ms and 50 MB at 1 GB/s.
        let reduce = 14.0 * (1e-3 + 0.05);
        assert!((found.reduce_s - reduce).abs() < 1e-9);
        assert!((found.synchronous_s - 0.1 - reduce).abs() < 1e-9);
        assert_eq!(found.inner_steps, 12);
        assert!((found.co2_s - 0.1).abs() < 1e-12 && (found.co2_share - 1.0).abs() < 1e-12);
        // 8 passes of 7 hops of 1 ms and 2 MB.
        assert!((found.lasp1_s - 8.0 * 7.0 * 3e-3).abs() < 1e-9);
        assert!((found.lasp2_s - found.lasp1_s).abs() < 1e-9);
        assert_eq!(found.state_bytes, 16_000_000);
        // Too few inner steps: the rest of an average is waited for.
        let few = Measured {
            inner_steps: 3,
            ..measured
        };
        assert!((few.on(8, &network).co2_s - reduce / 3.0).abs() < 1e-9);
        assert_eq!(measured.on(1, &network).reduce_s, 0.0);
    }
}
