//! Philox 4x32-10: counter-based random numbers (Salmon, Moraes, Dror and Shaw, 2011).
//!
//! A draw depends on the seed, the stream and its position alone, so that a seed gives the same noise on every
//! device, for any number of threads and at every place in a batch. Numbers are always drawn on the host.
//!
//! ```
//! use fulgur_kernels::philox::Philox;
//! let mut noise = Philox::new(7, 0);
//! let first = noise.normal();
//! assert_eq!(first, Philox::new(7, 0).normal());
//! assert_ne!(first, Philox::new(8, 0).normal());
//! ```

use rayon::prelude::*;

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One block of four 32-bit words: the Philox 4x32-10 bijection of `counter` under `key`.
pub fn block(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
    }
    counter
}

/// Hashes a name to a stream number (FNV-1a), so that named things get independent draws.
pub fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A sequence of random numbers, a pure function of (seed, stream).
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: u64,
    position: u64,
    words: [u32; 4],
    used: usize,
    spare: Option<f32>,
}

impl Philox {
    /// The sequence of `stream` under `seed`; different streams are independent.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            stream,
            position: 0,
            words: [0; 4],
            used: 4,
            spare: None,
        }
    }

    /// The sequence that belongs to `name` under `seed`.
    pub fn named(seed: u64, name: &str) -> Self {
        Self::new(seed, stream_of(name))
    }

    /// The first `n` values of `draw`, each of which takes one word, from the sequence of `stream` under `seed`: by all
    /// threads, and the same as one after the other.
    pub fn fill(seed: u64, stream: u64, n: usize, draw: impl Fn(&mut Self) -> f32 + Sync) -> Vec<f32> {
        /// Whole blocks of words, and pairs of normal draws.
        const PART: usize = 1 << 14;
        let mut values = vec![0.0; n];
        let parts = values.par_chunks_mut(PART).enumerate();
        parts.for_each(|(part, values)| {
            let mut noise = Self::new(seed, stream);
            noise.position = (part * PART / 4) as u64;
            values.fill_with(|| draw(&mut noise));
        });
        values
    }

    /// Uniform 32-bit word.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let counter = [
                self.position as u32,
                (self.position >> 32) as u32,
                self.stream as u32,
                (self.stream >> 32) as u32,
            ];
            self.words = block(counter, self.key);
            self.position += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform 64-bit word.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }

    /// Uniform in [0, 1), all 24 mantissa bits random.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer below `n`; `n` must be at least 1. The bias is under n / 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        debug_assert!(n > 0, "below needs a range of at least one");
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }

    /// Standard normal draw (Box-Muller; pairs are kept).
    pub fn normal(&mut self) -> f32 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        // 1 - u is in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * f64::from(self.uniform())).sin_cos();
        self.spare = Some((radius * sin) as f32);
        (radius * cos) as f32
    }

    /// `n` standard normal draws.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// A random order of `0..n` (Fisher-Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors published with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(
            block([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            block([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            block(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn threads_draw_what_one_draws() {
        for n in [0, 5, 40_000] {
            let normals = Philox::fill(3, 9, n, Philox::normal);
            assert_eq!(normals, Philox::new(3, 9).normals(n));
            let range = |noise: &mut Philox| noise.range(-2.0, 3.0);
            let mut noise = Philox::new(3, 9);
            let expected: Vec<f32> = (0..n).map(|_| range(&mut noise)).collect();
            assert_eq!(Philox::fill(3, 9, n, range), expected);
        }
    }

    #[test]
    fn normal_moments() {
        let draws = Philox::new(3, 1).normals(200_000);
        let n = draws.len() as f64;
        let mean = draws.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = draws.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n - mean * mean;
        let fourth = draws.iter().map(|&x| f64::from(x).powi(4)).sum::<f64>() / n;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
        assert!((fourth - 3.0).abs() < 0.1, "fourth moment {fourth}");
    }

    #[test]
    fn permutation_holds_each_index_once() {
        let mut order = Philox::named(5, "order").permutation(1000);
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert!(order.iter().copied().eq(0..1000));
    }
}
